use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::*;

/// A screen whose picture the test paints.
struct Painted(Mutex<Option<Picture>>, AtomicU64);

impl Painted {
    fn paint(&self, change: impl FnOnce(&mut Option<Picture>)) {
        change(&mut self.0.lock().unwrap());
        self.1.fetch_add(1, Ordering::Relaxed);
    }
}

impl Screen for Painted {
    fn picture(&self) -> Option<Picture> {
        self.0.lock().unwrap().clone()
    }

    fn version(&self) -> u64 {
        self.1.load(Ordering::Relaxed)
    }
}

fn picture(width: u32, height: u32) -> Picture {
    Picture { width, height, rgb: vec![0; 3 * (width * height) as usize] }
}

fn dot(picture: &mut Option<Picture>, x: usize, y: usize, colour: [u8; 3]) {
    let picture = picture.as_mut().unwrap();
    let at = 3 * (y * picture.width as usize + x);
    picture.rgb[at..at + 3].copy_from_slice(&colour);
}

/// A viewer, and the screen that it sees.
struct Session {
    stream: UnixStream,
    screen: Arc<Painted>,
    server: JoinHandle<io::Result<()>>,
}

impl Session {
    async fn new(first: Option<Picture>) -> Self {
        let screen = Arc::new(Painted(Mutex::new(first), AtomicU64::new(0)));
        let display = Display {
            name: "machine".to_owned(),
            screen: screen.clone(),
            keyboard: None,
            tablet: None,
        };
        let (stream, end) = UnixStream::pair().unwrap();
        Self { stream, screen, server: tokio::spawn(attend(end, display)) }
    }

    async fn greeted(first: Option<Picture>) -> (Self, [u16; 2]) {
        let mut session = Self::new(first).await;
        assert_eq!(session.take(12).await, VERSION);
        session.say(VERSION).await;
        assert_eq!(session.take(2).await, [1, 1]);
        session.say(&[1]).await;
        assert_eq!(session.take(4).await, [0; 4]);
        session.say(&[1]).await;
        let size = [session.u16().await, session.u16().await];
        assert_eq!(
            session.take(16).await,
            [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0]
        );
        assert_eq!(session.take(11).await, b"\0\0\0\x07machine");
        (session, size)
    }

    async fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    async fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        timeout(PATIENCE, self.stream.read_exact(&mut bytes)).await.unwrap().unwrap();
        bytes
    }

    async fn u16(&mut self) -> u16 {
        let bytes = self.take(2).await;
        u16::from_be_bytes([bytes[0], bytes[1]])
    }

    async fn ask(&mut self, changed: bool, area: [u16; 4]) {
        let mut message = vec![3, u8::from(changed)];
        message.extend(area.into_iter().flat_map(u16::to_be_bytes));
        self.say(&message).await;
    }

    async fn encodings(&mut self, encodings: &[i32]) {
        let mut message = vec![2, 0, 0, u8::try_from(encodings.len()).unwrap()];
        message.extend(encodings.iter().flat_map(|encoding| encoding.to_be_bytes()));
        self.say(&message).await;
    }

    /// The rectangles of the next update: place, encoding, and pixels if there are any.
    async fn update(&mut self, pixel: usize) -> Vec<([u16; 4], i32, Vec<u8>)> {
        assert_eq!(self.take(2).await, [0, 0]);
        let count = self.u16().await;
        let mut rectangles = Vec::new();
        for _ in 0..count {
            let mut area = [0; 4];
            for number in &mut area {
                *number = self.u16().await;
            }
            let encoding = i32::from_be_bytes(self.take(4).await.try_into().unwrap());
            let size =
                if encoding == RAW { usize::from(area[2]) * usize::from(area[3]) } else { 0 };
            rectangles.push((area, encoding, self.take(pixel * size).await));
        }
        rectangles
    }
}

#[tokio::test]
async fn a_viewer_is_told_everything_once_and_then_what_changes() {
    let (mut session, size) = Session::greeted(Some(picture(100, 50))).await;
    assert_eq!(size, [100, 50]);
    session.screen.paint(|picture| dot(picture, 99, 49, [1, 2, 3]));
    session.ask(false, [0, 0, 100, 50]).await;
    let [(area, RAW, pixels)] = &session.update(4).await[..] else { panic!("one area") };
    assert_eq!((*area, pixels.len()), ([0, 0, 100, 50], 100 * 50 * 4));
    assert_eq!(pixels[pixels.len() - 8..], [0, 0, 0, 0, 3, 2, 1, 0]);

    session.ask(true, [0, 0, 100, 50]).await;
    sleep(3 * PERIOD).await;
    let mut byte = [0];
    let quiet = session.stream.try_read(&mut byte).unwrap_err();
    assert_eq!(quiet.kind(), io::ErrorKind::WouldBlock, "nothing has changed");
    session.screen.paint(|picture| dot(picture, 40, 40, [255, 0, 0]));
    let [([32, 32, 32, 18], RAW, pixels)] = &session.update(4).await[..] else {
        panic!("one tile")
    };
    assert_eq!(pixels[4 * (8 * 32 + 8)..][..4], [0, 0, 255, 0]);

    // Beyond the screen there is nothing, and beside it what was asked for.
    session.ask(false, [90, 40, 1000, 1000]).await;
    assert_eq!(session.update(4).await[0].0, [90, 40, 10, 10]);
    session.ask(false, [100, 0, 5, 5]).await;
    assert!(session.update(4).await.is_empty());
}

#[tokio::test]
async fn what_changes_outside_the_area_asked_for_is_told_later() {
    let (mut session, _) = Session::greeted(Some(picture(128, 32))).await;
    session.ask(false, [0, 0, 128, 32]).await;
    session.update(4).await;
    session.screen.paint(|picture| {
        dot(picture, 0, 0, [9; 3]);
        dot(picture, 127, 0, [9; 3]);
    });
    session.ask(true, [0, 0, 64, 32]).await;
    assert_eq!(session.update(4).await[0].0, [0, 0, 32, 32]);
    session.ask(true, [64, 0, 64, 32]).await;
    assert_eq!(session.update(4).await[0].0, [96, 0, 32, 32]);
}

#[tokio::test]
async fn a_screen_changes_its_size() {
    let (mut session, size) = Session::greeted(None).await;
    assert_eq!(size, [1024, 768], "nothing is shown yet");
    session.encodings(&[RAW, DESKTOP_SIZE, EXTENDED_KEYS]).await;
    session.ask(false, [0, 0, 1024, 768]).await;
    let update = session.update(4).await;
    assert_eq!([update[0].1, update[1].1], [EXTENDED_KEYS, RAW]);
    session.ask(true, [0, 0, 1024, 768]).await;
    session.screen.paint(|shown| *shown = Some(picture(64, 64)));
    let update = session.update(4).await;
    assert_eq!((update.len(), update[0].0, update[0].1), (1, [0, 0, 64, 64], DESKTOP_SIZE));
    session.ask(true, [0, 0, 64, 64]).await;
    assert_eq!(session.update(4).await[0].0, [0, 0, 64, 64], "all of it is new");

    // One that cannot follow sees what fits.
    session.encodings(&[RAW]).await;
    session.screen.paint(|shown| *shown = Some(picture(200, 32)));
    session.ask(true, [0, 0, 64, 64]).await;
    assert_eq!(session.update(4).await[0].0, [0, 0, 64, 32]);
}

#[tokio::test]
async fn pixels_in_the_viewers_format() {
    let (mut session, _) = Session::greeted(Some(picture(1, 1))).await;
    session.screen.paint(|picture| dot(picture, 0, 0, [255, 128, 8]));
    // 16 bits, big-endian, 5, 6 and 5 of them.
    session.say(&[0, 0, 0, 0, 16, 16, 1, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0, 0, 0, 0]).await;
    session.ask(false, [0, 0, 1, 1]).await;
    let value = (31_u16 << 11) | (31 << 5);
    assert_eq!(session.update(2).await[0].2, value.to_be_bytes());
    session.say(&[0, 0, 0, 0, 8, 8, 0, 1, 0, 7, 0, 7, 0, 3, 0, 3, 6, 0, 0, 0]).await;
    session.ask(true, [0, 0, 1, 1]).await;
    assert_eq!(session.update(1).await[0].2, [7 | 3 << 3]);
}

#[tokio::test]
async fn a_viewer_that_speaks_otherwise_is_left() {
    let bad: [&[u8]; 6] = [
        b"\x07",
        b"\xff\x01",
        // A clipboard of 4 GiB.
        b"\x06\0\0\0\xff\xff\xff\xff",
        // A palette; 24 bits; a shift of 32.
        b"\0\0\0\0\x08\x08\0\0\0\xff\0\xff\0\xff\x10\x08\0\0\0\0",
        b"\0\0\0\0\x18\x18\0\x01\0\xff\0\xff\0\xff\x10\x08\0\0\0\0",
        b"\0\0\0\0\x20\x18\0\x01\0\xff\0\xff\0\xff\x20\x08\0\0\0\0",
    ];
    for bytes in bad {
        let (mut session, _) = Session::greeted(None).await;
        session.say(bytes).await;
        let left = timeout(PATIENCE, session.server).await.unwrap().unwrap();
        assert_eq!(left.unwrap_err().kind(), io::ErrorKind::InvalidData, "{bytes:?}");
    }
    let mut session = Session::new(None).await;
    session.say(b"GET / HTTP/1.1\r\n").await;
    assert!(timeout(PATIENCE, session.server).await.unwrap().unwrap().is_err());
    let session = Session::new(None).await;
    drop(session.stream);
    assert!(timeout(PATIENCE, session.server).await.unwrap().unwrap().is_err());
}

#[tokio::test]
async fn one_that_does_not_read_waits_alone_and_is_told_what_is_there_then() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vnc.sock");
    let screen = Arc::new(Painted(Mutex::new(Some(picture(512, 512))), AtomicU64::new(0)));
    let display =
        Display { name: "a".to_owned(), screen: screen.clone(), keyboard: None, tablet: None };
    let server = tokio::spawn(serve(Listener::bind(&path).unwrap(), display));
    let connect = async || {
        let stream = UnixStream::connect(&path).await.unwrap();
        let server = tokio::spawn(std::future::pending());
        let mut session = Session { stream, screen: screen.clone(), server };
        session.say(VERSION).await;
        session.say(&[1, 1]).await;
        session.take(12 + 2 + 4 + 4 + 16 + 5).await;
        session
    };
    let mut idle = connect().await;
    for _ in 0..50 {
        idle.ask(false, [0, 0, 512, 512]).await;
    }
    let mut busy = connect().await;
    for round in 0..20 {
        screen.paint(|picture| dot(picture, 0, 0, [round; 3]));
        busy.ask(false, [0, 0, 1, 1]).await;
        assert_eq!(busy.update(4).await[0].2[..3], [round; 3]);
    }
    drop((idle, busy));
    server.abort();
    assert!(server.await.unwrap_err().is_cancelled());
    assert!(!path.exists(), "its file goes with it");
}

#[test]
fn keys_by_their_symbols() {
    for (symbol, code) in [
        (u32::from('a'), 30),
        (u32::from('A'), 30),
        (u32::from('!'), 2),
        (u32::from(' '), 57),
        (u32::from('~'), 41),
        (0xff0d, 28),
        (0xff51, 105),
        (0xffc9, 88),
        (0xffe9, 56),
        (0xffff, 111),
        (0xffb0, 82),
        (0xff8d, 96),
    ] {
        assert_eq!(keysym::code(symbol), Some(code), "{symbol:#x}");
    }
    for symbol in [0, 0xff62, 0xffe6, 0x20ac, 0x0100_0000, u32::MAX] {
        assert_eq!(keysym::code(symbol), None, "{symbol:#x}");
    }
}
