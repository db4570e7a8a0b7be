use proptest::prelude::*;
use virtio_bindings::virtio_gpu as wire;

use super::*;
use crate::spec::{Pixels, ScreenKind};
use crate::virtio::testing::{DriverQueue, Guest, HOSTILE_MEMORY, Part, hostile_ring};

const OK: u32 = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_NODATA;
const UNSPECIFIED: u32 = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_UNSPEC;
const OUT_OF_MEMORY: u32 = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY;
const BAD_SCANOUT: u32 = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID;
const BAD_RESOURCE: u32 = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID;
const BAD_PARAMETER: u32 = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER;
const BGRX: u32 = wire::virtio_gpu_formats_VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM;
const RGBX: u32 = wire::virtio_gpu_formats_VIRTIO_GPU_FORMAT_R8G8B8X8_UNORM;

fn spec() -> ScreenSpec {
    let pixels = |count: u64| Pixels::try_from(count).unwrap();
    ScreenSpec { kind: ScreenKind::Gpu, width: pixels(800), height: pixels(600) }
}

struct Bench {
    guest: Guest,
    drivers: Vec<DriverQueue>,
    device: Box<dyn ActiveDevice>,
    screen: Arc<dyn Screen>,
}

fn bench() -> Bench {
    let guest = Guest::new();
    let (drivers, activation) = guest.activation(&QUEUE_SIZES, 0);
    let gpu = Gpu::new(&spec()).unwrap();
    let screen = gpu.screen();
    let device = Box::new(gpu).activate(activation).ok().unwrap();
    Bench { guest, drivers, device, screen }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A header without a fence, and the rest.
fn request(kind: u32, rest: &[u32]) -> Vec<u8> {
    words(&[&[kind, 0, 0, 0, 0, 0], rest].concat())
}

fn create_2d(id: u32, format: u32, width: u32, height: u32) -> Vec<u8> {
    let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_2D;
    request(kind, &[id, format, width, height])
}

fn unref(id: u32) -> Vec<u8> {
    request(wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_UNREF, &[id, 0])
}

/// Addresses and lengths; all below 4 GiB.
fn entries(parts: &[(u64, u32)]) -> Vec<u32> {
    parts.iter().flat_map(|&(at, len)| [u32::try_from(at).unwrap(), 0, len, 0]).collect()
}

fn attach(id: u32, parts: &[(u64, u32)]) -> Vec<u8> {
    let count = u32::try_from(parts.len()).unwrap();
    let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING;
    request(kind, &[&[id, count][..], &entries(parts)].concat())
}

fn detach(id: u32) -> Vec<u8> {
    request(wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING, &[id, 0])
}

fn transfer(id: u32, rect: [u32; 4], offset: u64) -> Vec<u8> {
    let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D;
    let [low, high] = [offset & 0xffff_ffff, offset >> 32].map(|half| u32::try_from(half).unwrap());
    request(kind, &[&rect[..], &[low, high, id, 0]].concat())
}

fn flush(id: u32, rect: [u32; 4]) -> Vec<u8> {
    let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_FLUSH;
    request(kind, &[&rect[..], &[id, 0]].concat())
}

fn scanout(scanout: u32, id: u32, rect: [u32; 4]) -> Vec<u8> {
    let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT;
    request(kind, &[&rect[..], &[scanout, id]].concat())
}

fn blob(id: u32, memory: u32, size: u64, parts: &[(u64, u32)]) -> Vec<u8> {
    let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB;
    let count = u32::try_from(parts.len()).unwrap();
    let [low, high] = [size & 0xffff_ffff, size >> 32].map(|half| u32::try_from(half).unwrap());
    let head = [id, memory, 0, count, 0, 0, low, high];
    request(kind, &[&head[..], &entries(parts)].concat())
}

/// `layout` is width, height, format, stride and offset.
fn scanout_blob(id: u32, rect: [u32; 4], layout: [u32; 5]) -> Vec<u8> {
    let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT_BLOB;
    let [width, height, format, stride, offset] = layout;
    let rest = [0, id, width, height, format, 0, stride, 0, 0, 0, offset, 0, 0, 0];
    request(kind, &[&rect[..], &rest].concat())
}

impl Bench {
    /// The answer to a request.
    fn answer(&mut self, request: &[u8]) -> Vec<u8> {
        self.drivers[CONTROL].add(&[Part::Read(request), Part::Write(512)]);
        self.device.notify(CONTROL).unwrap();
        self.drivers[CONTROL].used().expect("an answer").data
    }

    /// What kind of answer a request gets.
    fn ask(&mut self, request: &[u8]) -> u32 {
        u32::from_le_bytes(self.answer(request)[..4].try_into().unwrap())
    }

    fn all_right(&mut self, requests: &[Vec<u8>]) {
        for request in requests {
            assert_eq!(self.ask(request), OK, "{request:?}");
        }
    }

    /// Memory with these pixels.
    fn pixels(&self, pixels: &[[u8; 4]]) -> (u64, u32) {
        let bytes = pixels.concat();
        let at = self.guest.alloc(bytes.len());
        self.guest.write(at, &bytes);
        (at, u32::try_from(bytes.len()).unwrap())
    }

    fn rgb(&self) -> Vec<u8> {
        self.screen.picture().expect("something is shown").rgb
    }
}

/// Pixels of which each tells its place.
fn ramp(count: u8) -> Vec<[u8; 4]> {
    (0..count).map(|n| [n, 100 + n, 200 + n, 0]).collect()
}

#[test]
fn the_guest_is_told_of_one_screen_of_the_size_that_was_asked_for() {
    let mut bench = bench();
    let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_DISPLAY_INFO;
    let answer = bench.answer(&request(kind, &[]));
    let info = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_DISPLAY_INFO;
    assert_eq!(answer.len(), 24 + 16 * 24);
    assert_eq!(answer[..4], info.to_le_bytes());
    assert_eq!(answer[24..48], words(&[0, 0, 800, 600, 1, 0]));
    assert!(answer[48..].iter().all(|byte| *byte == 0));
    let mut config = [0xff; 16];
    bench.device.read_config(0, &mut config);
    assert_eq!(config.to_vec(), words(&[0, 0, 1, 0]));
}

#[test]
fn a_transferred_picture_is_shown_with_its_scattered_memory_put_together() {
    let mut bench = bench();
    assert_eq!(bench.screen.picture(), None);
    let pixels = ramp(12);
    // Four columns, three rows; the parts end in the middle of rows, and one of pixels.
    let (at, len) = bench.pixels(&pixels);
    let parts = [(at, 6), (at + 6, 0), (at + 6, 22), (at + 28, len - 28)];
    bench.all_right(&[
        create_2d(1, BGRX, 4, 3),
        attach(1, &parts),
        transfer(1, [0, 0, 4, 3], 0),
        scanout(0, 1, [0, 0, 4, 3]),
    ]);
    let shown = |at: &[usize]| at.iter().flat_map(|&at| [2, 1, 0].map(|c| pixels[at][c])).collect();
    let all: Vec<u8> = shown(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    assert_eq!(bench.rgb(), all);

    // A part of it is shown, a part of that is new; nobody sees it before it is transferred.
    let version = bench.screen.version();
    bench.all_right(&[scanout(0, 1, [1, 1, 2, 2])]);
    assert_ne!(bench.screen.version(), version);
    assert_eq!(bench.rgb(), shown(&[5, 6, 9, 10]));
    bench.guest.write(at, &[77; 48]);
    assert_eq!(bench.rgb(), shown(&[5, 6, 9, 10]));
    let version = bench.screen.version();
    bench.all_right(&[transfer(1, [2, 1, 1, 1], 4 * 6)]);
    assert_eq!(bench.screen.version(), version);
    bench.all_right(&[flush(1, [2, 1, 1, 1])]);
    assert_ne!(bench.screen.version(), version);
    assert_eq!(bench.rgb()[3..6], [77; 3]);
    assert_eq!(bench.rgb()[6..], shown(&[9, 10]));

    bench.all_right(&[scanout(0, 0, [0; 4])]);
    assert_eq!(bench.screen.picture(), None);
    bench.all_right(&[scanout(0, 1, [0, 0, 1, 1]), unref(1)]);
    assert_eq!(bench.screen.picture(), None);
}

#[test]
fn a_blob_is_the_guests_own_memory() {
    let mut bench = bench();
    let pixels = ramp(8);
    let (at, len) = bench.pixels(&pixels);
    // Two columns and two rows of a picture that begins at the second pixel and has gaps.
    let layout = [2, 2, RGBX, 12, 4];
    bench.all_right(&[
        blob(7, 1, len.into(), &[(at, 16), (at + 16, len - 16)]),
        scanout_blob(7, [0, 0, 2, 2], layout),
    ]);
    let expected: Vec<u8> =
        [1, 2, 4, 5].iter().flat_map(|&at: &usize| pixels[at][..3].to_vec()).collect();
    assert_eq!(bench.rgb(), expected);
    bench.guest.write(at + 4, &[9, 8, 7, 6]);
    assert_eq!(bench.rgb()[..3], [9, 8, 7]);
    let version = bench.screen.version();
    // As Linux sends it: there is nothing to transfer.
    bench.all_right(&[transfer(7, [0, 0, 2, 2], 0), flush(7, [0, 0, 2, 2])]);
    assert_ne!(bench.screen.version(), version);

    let version = bench.screen.version();
    bench.all_right(&[blob(8, 1, len.into(), &[(at, len)]), flush(8, [0, 0, 2, 2])]);
    assert_eq!(bench.screen.version(), version, "another one is not shown");
    bench.all_right(&[detach(7)]);
    assert_eq!(bench.rgb(), [0; 12], "it has no memory any more");
}

#[test]
fn fences_come_back_whatever_becomes_of_the_request() {
    let mut bench = bench();
    for kind in [wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_UNREF, 0xffff, 0] {
        let fenced = words(&[kind, 1, 0x1234, 0x5678, 9, 0, 0, 0]);
        let answer = bench.answer(&fenced);
        assert_eq!(answer[4..], words(&[1, 0x1234, 0x5678, 9, 0]));
    }
    let answer = bench.answer(&words(&[0xffff, 0, 0x1234, 0x5678, 9, 0]));
    assert_eq!(answer[4..], [0; 20]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut bench = bench();
    let (at, len) = bench.pixels(&ramp(16));
    bench.all_right(&[create_2d(1, BGRX, 4, 4), attach(1, &[(at, len)])]);
    bench.all_right(&[blob(2, 1, len.into(), &[(at, len)])]);
    let end = 256 << 20;
    let far = u32::MAX;
    for (request, expected) in [
        (create_2d(1, BGRX, 4, 4), BAD_RESOURCE),
        (create_2d(0, BGRX, 4, 4), BAD_RESOURCE),
        (create_2d(3, 5, 4, 4), BAD_PARAMETER),
        (create_2d(3, BGRX, 0, 4), BAD_PARAMETER),
        (create_2d(3, BGRX, far, far), BAD_PARAMETER),
        (create_2d(3, BGRX, far, 1), BAD_PARAMETER),
        (unref(9), BAD_RESOURCE),
        (detach(9), BAD_RESOURCE),
        (attach(1, &[(at, len)]), UNSPECIFIED),
        (attach(9, &[(at, len)]), BAD_RESOURCE),
        (transfer(1, [1, 0, 4, 1], 0), BAD_PARAMETER),
        (transfer(1, [0, 0, 0, 1], 0), BAD_PARAMETER),
        (transfer(1, [far, far, 2, 2], 0), BAD_PARAMETER),
        (transfer(1, [0, 0, 4, 4], u64::MAX), BAD_PARAMETER),
        (transfer(9, [0, 0, 1, 1], 0), BAD_RESOURCE),
        (flush(1, [0, 0, 5, 1]), BAD_PARAMETER),
        (flush(9, [0, 0, 1, 1]), BAD_RESOURCE),
        (scanout(1, 1, [0, 0, 4, 4]), BAD_SCANOUT),
        (scanout(0, 9, [0, 0, 4, 4]), BAD_RESOURCE),
        (scanout(0, 1, [0, 0, 4, 5]), BAD_PARAMETER),
        (scanout(0, 1, [far, 0, far, 1]), BAD_PARAMETER),
        (scanout(0, 2, [0, 0, 4, 4]), BAD_PARAMETER),
        (scanout_blob(1, [0, 0, 4, 4], [4, 4, BGRX, 16, 0]), BAD_PARAMETER),
        (scanout_blob(2, [0, 0, 4, 4], [4, 4, BGRX, 15, 0]), BAD_PARAMETER),
        (scanout_blob(2, [0, 0, 4, 4], [4, 4, BGRX, 16, 1]), BAD_PARAMETER),
        (scanout_blob(2, [0, 0, 4, 4], [4, 4, 5, 16, 0]), BAD_PARAMETER),
        (scanout_blob(2, [0, 0, 4, 5], [4, 4, BGRX, 16, 0]), BAD_PARAMETER),
        (scanout_blob(2, [0, 0, 4, 4], [4, 4, BGRX, far, far]), BAD_PARAMETER),
        (scanout_blob(2, [0, 0, 4, 4], [far, far, BGRX, far, far]), BAD_PARAMETER),
        (blob(3, 2, len.into(), &[(at, len)]), BAD_PARAMETER),
        (blob(3, 1, u64::from(len) + 1, &[(at, len)]), BAD_PARAMETER),
        (blob(3, 1, 0, &[(at, len)]), BAD_PARAMETER),
        (blob(3, 1, 8, &[]), BAD_PARAMETER),
        (blob(3, 1, 8, &[(end - 4, 8)]), BAD_PARAMETER),
        (blob(2, 1, len.into(), &[(at, len)]), BAD_RESOURCE),
    ] {
        assert_eq!(bench.ask(&request), expected, "{request:?}");
    }
    bench.all_right(&[detach(1)]);
    assert_eq!(bench.ask(&detach(1)), UNSPECIFIED);
    assert_eq!(bench.ask(&transfer(1, [0, 0, 1, 1], 0)), UNSPECIFIED);
    assert_eq!(bench.ask(&attach(1, &[(end, 4)])), BAD_PARAMETER);
    assert_eq!(bench.screen.picture(), None);
    // Memory that ends before the picture: what is there is taken.
    bench.all_right(&[attach(1, &[(at, 4)]), transfer(1, [0, 0, 4, 4], 0)]);
    bench.all_right(&[transfer(1, [0, 0, 4, 4], u64::MAX - 100), scanout(0, 1, [0, 0, 4, 4])]);
    assert_eq!(bench.rgb()[..6], [200, 100, 0, 0, 0, 0]);
}

#[test]
fn requests_that_end_too_early_and_answers_without_room() {
    let mut bench = bench();
    let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_2D;
    assert_eq!(bench.ask(&request(kind, &[1, BGRX, 4])), UNSPECIFIED);
    let mut more = attach(1, &[(0x1000, 16)]);
    more[28..32].copy_from_slice(&2_u32.to_le_bytes());
    assert_eq!(bench.ask(&more), BAD_PARAMETER, "fewer entries than it says");
    let control = &mut bench.drivers[CONTROL];
    control.add(&[Part::Read(&[1; 23]), Part::Write(24)]);
    control.add(&[Part::Write(24)]);
    control.add(&[Part::Read(&create_2d(1, BGRX, 1, 1)), Part::Write(23)]);
    control.add(&[Part::Read(&flush(1, [0, 0, 1, 1]))]);
    bench.device.notify(CONTROL).unwrap();
    let used = bench.drivers[CONTROL].all_used();
    assert!(used.len() == 4 && used.iter().all(|used| used.len == 0), "{used:?}");
    assert_eq!(bench.ask(&unref(1)), OK, "what was asked for was done");

    bench.drivers[CURSOR].add(&[Part::Read(&[3; 56])]);
    bench.device.notify(CURSOR).unwrap();
    assert_eq!(bench.drivers[CURSOR].used().unwrap().len, 0);
}

#[test]
fn resources_have_an_end() {
    let mut bench = bench();
    // 16 MiB each.
    bench.all_right(&[1, 2, 3, 4].map(|id| create_2d(id, BGRX, 2048, 2048)));
    assert_eq!(bench.ask(&create_2d(5, BGRX, 64, 64)), OUT_OF_MEMORY);
    assert_eq!(bench.ask(&attach(1, &[(0x1000, 4096)])), OUT_OF_MEMORY);
    bench.all_right(&[unref(2), create_2d(5, BGRX, 64, 64), attach(1, &[(0x1000, 4096)])]);
    bench.all_right(&[unref(1), unref(3), unref(4), unref(5)]);

    // Lists of memory count, too.
    let many = vec![(0x1000, 16); resource::MAX_ENTRIES];
    let mut made = 0;
    while bench.ask(&blob(made + 1, 1, 16, &many)) == OK {
        made += 1;
    }
    assert!((100..400).contains(&made), "{made}");
    for id in 1..=made {
        assert_eq!(bench.ask(&unref(id)), OK);
    }
    let mut more = many;
    more.push((0x1000, 16));
    assert_eq!(bench.ask(&blob(1, 1, 16, &more)), BAD_PARAMETER);
    for id in 1..=u32::try_from(MAX_RESOURCES).unwrap() {
        assert_eq!(bench.ask(&create_2d(id, BGRX, 1, 1)), OK);
    }
    assert_eq!(bench.ask(&create_2d(9999, BGRX, 1, 1)), OUT_OF_MEMORY);
}

#[test]
fn resets_in_a_loop_leave_nothing_behind() {
    let mut bench = bench();
    for _ in 0..20 {
        bench.all_right(&[1, 2, 3, 4].map(|id| create_2d(id, BGRX, 2048, 2048)));
        bench.all_right(&[scanout(0, 4, [0, 0, 2048, 2048])]);
        let version = bench.screen.version();
        let inactive = bench.device.reset();
        assert_ne!(bench.screen.version(), version);
        assert_eq!(bench.screen.picture(), None);
        let holders = 1 + bench.drivers.len();
        assert_eq!(Arc::strong_count(&bench.guest.memory), holders, "who looks holds no memory");
        let (drivers, activation) = bench.guest.activation(&QUEUE_SIZES, 0);
        let device = inactive.activate(activation).ok().unwrap();
        bench = Bench { drivers, device, ..bench };
    }
}

#[test]
fn a_saved_screen_shows_the_same() {
    let mut bench = bench();
    let pixels = ramp(4);
    let (at, len) = bench.pixels(&pixels);
    bench.all_right(&[
        blob(1, 1, len.into(), &[(at, len)]),
        create_2d(2, RGBX, 2, 2),
        attach(2, &[(at, len)]),
        transfer(2, [0, 0, 2, 2], 0),
        create_2d(3, RGBX, 2, 2),
    ]);
    let host = [scanout(0, 2, [0, 0, 2, 2])];
    let blob = [scanout_blob(1, [0, 0, 2, 2], [2, 2, RGBX, 8, 0]), detach(2)];
    for requests in [&host[..], &blob] {
        bench.all_right(requests);
        let before = bench.screen.picture();
        assert!(before.is_some());
        bench.device.pause();
        let (state, positions) = (bench.device.save(), bench.device.queue_positions());
        let mut restored = Box::new(Gpu::new(&spec()).unwrap());
        restored.restore(&state).unwrap();
        bench.screen = restored.screen();
        let activation = bench.guest.reactivation(&bench.drivers, 0, &positions);
        bench.device = restored.activate(activation).ok().unwrap();
        assert_eq!(bench.screen.picture(), before);
        let bad_again = create_2d(3, RGBX, 2, 2);
        assert_eq!(bench.ask(&bad_again), BAD_RESOURCE, "the others are there, too");
    }
    let mut state = bench.device.save();
    for at in 0..state.data.len() {
        // Refused or not, nothing is shown that is not there.
        let kept = std::mem::replace(&mut state.data[at], 0xff);
        let mut gpu = Gpu::new(&spec()).unwrap();
        let _ = gpu.restore(&state);
        state.data[at] = kept;
        let (_, activation) = bench.guest.activation(&QUEUE_SIZES, 0);
        let screen = gpu.screen();
        let device = Box::new(gpu).activate(activation).ok().unwrap();
        let _ = (screen.picture(), device.save());
    }
    let mut other = spec();
    other.width = Pixels::MAX;
    assert_ne!(Gpu::new(&other).unwrap().identity(), bench.device.identity());
}

proptest! {
    #[test]
    fn hostile_chains_do_no_harm(
        rings in prop::collection::vec(hostile_ring(), 2), content in any::<[u32; 16]>(),
    ) {
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        let mut drivers: Vec<_> = (0..2).map(|index| guest.driver(index, 16)).collect();
        let activation = guest.reactivation(&drivers, 0, &[Some(Position::default()); 2]);
        let gpu = Gpu::new(&spec()).unwrap();
        let screen = gpu.screen();
        let mut device = Box::new(gpu).activate(activation).ok().unwrap();
        let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_DISPLAY_INFO + content[0] % 14;
        guest.write(0x2000, &request(kind, &content.map(|word| word % 8)));
        for (driver, ring) in drivers.iter_mut().zip(&rings) {
            driver.corrupt(ring);
        }
        for index in 0..3 {
            let _ = device.notify(index);
        }
        let _ = (device.host_event(), screen.picture());
    }
}
