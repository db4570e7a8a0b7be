use super::*;

fn picture(width: u32, height: u32, pixel: impl Fn(usize, usize) -> [u8; 3]) -> Picture {
    let places = (0..height as usize).flat_map(|y| (0..width as usize).map(move |x| (x, y)));
    Picture { width, height, rgb: places.flat_map(|(x, y)| pixel(x, y)).collect() }
}

fn low(value: usize) -> u8 {
    value.to_le_bytes()[0]
}

fn grey(rows: &[&[u8]]) -> Grey {
    Grey { width: rows[0].len(), height: rows.len(), pixels: rows.concat() }
}

#[test]
fn files_come_back_as_they_were() {
    let dir = tempfile::tempdir().expect("a directory");
    let there = picture(5, 3, |x, y| [low(x) * 50, low(y) * 100, 7]);
    for (name, bytes) in [("a.png", png(&there).expect("encoded")), ("a.ppm", ppm(&there))] {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        let back = read(&path).expect(name);
        assert!(back == there, "{name}");
    }
    for (name, bytes) in [
        ("text", &b"some text"[..]),
        ("short", b"P6\n9 9\n255\nabc"),
        ("deep", b"P6 1 1 65535 abcdef"),
        ("large", b"P6 4294967295 4294967295 255 abc"),
        ("empty", b""),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        assert_eq!(read(&path).expect_err(name).to_string(), "it is not a PNG or PPM picture");
    }
    assert_eq!(read(&dir.path().join("gone")).expect_err("gone").kind(), io::ErrorKind::NotFound);
    assert_eq!(black().rgb.len(), 1024 * 768 * 3);
}

#[test]
fn shades_are_weighed_spread_and_enlarged() {
    let colours = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]];
    let weighed = Grey::of(&picture(5, 1, |x, _| colours[x]));
    assert_eq!(weighed.pixels, [0, 255, 76, 149, 28]);
    let large = grey(&[&[0, 200]]).enlarged(2);
    assert_eq!((large.width, large.height), (4, 2));
    assert_eq!(large.pixels, [0, 50, 150, 200, 0, 50, 150, 200]);
    let mut pale = grey(&[&[100, 120, 150]]);
    pale.stretch();
    assert_eq!(pale.pixels, [0, 102, 255]);
    let mut even = grey(&[&[9, 9, 9]]);
    even.stretch();
    assert_eq!(even.pixels, [9, 9, 9], "one shade stays");
}

#[test]
fn letters_are_black_on_white_in_one_of_two_ways() {
    // Dark and bright letters on grey.
    let both = grey(&[&[0, 128, 255]]);
    assert_eq!(both.letters(false).pixels, [0, 246, 255]);
    assert_eq!(both.letters(true).pixels, [255, 242, 0]);
    assert_eq!(both.letters(true).pgm(), [&b"P5\n3 1\n255\n"[..], &[255, 242, 0]].concat());
}

#[test]
fn a_picture_is_enlarged_as_far_as_that_helps() {
    for (width, height, factor) in [(1024, 768, 3), (1920, 1080, 2), (4096, 4096, 1), (64, 64, 3)] {
        let large = Grey::of(&picture(width, height, |_, _| [0; 3])).for_reading();
        assert_eq!(
            (large.width, large.height),
            (width as usize * factor, height as usize * factor)
        );
    }
}

#[test]
fn a_consoles_text_is_what_the_picture_shows_or_not() {
    let text = b"login: root     # make          ";
    let drawn = |shift: usize| {
        picture(16 * 8 + 3, 2 * 16 + 5, |x, y| {
            let at = y / 16 * 16 + x / 8 + shift;
            let letter = x < 16 * 8 && text.get(at).is_some_and(|c| *c != b' ');
            [if letter && (x + y) % 2 == 0 { 170 } else { 0 }; 3]
        })
    };
    assert!(shows(&drawn(0), 16, text));
    assert!(!shows(&drawn(5), 16, text), "another text");
    assert!(!shows(&picture(131, 37, |_, _| [0; 3]), 16, text), "nothing is drawn");
    assert!(!shows(&picture(131, 37, |x, y| [low(x ^ y); 3]), 16, text), "a desktop");
    assert!(shows(&picture(131, 37, |_, _| [0; 3]), 16, &[b' '; 32]));
    assert!(!shows(&picture(2, 2, |_, _| [0; 3]), 16, text), "smaller than its cells");
    assert!(!shows(&drawn(0), 0, text));
    assert!(!shows(&drawn(0), 16, b""));
}
