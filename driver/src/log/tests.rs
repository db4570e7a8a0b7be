use super::*;

#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic while held").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn written(colours: bool, act: impl FnOnce(&Logger)) -> String {
    let buffer = Buffer::default();
    act(&Logger::new(Box::new(buffer.clone()), colours));
    let bytes = buffer.0.lock().expect("no panic while held").clone();
    String::from_utf8(bytes).expect("only text was logged")
}

#[test]
fn steps_nest_and_say_how_long_they_took() {
    let log = written(false, |log| {
        let _outer = log.nested("subtest: ping");
        let _inner = log.for_machine("machine1").nested("must succeed: true");
    });
    assert_eq!(
        log,
        "subtest: ping\nmachine1: must succeed: true\n\
         machine1: (finished: must succeed: true, in 0.00 seconds)\n\
         (finished: subtest: ping, in 0.00 seconds)\n"
    );
}

#[test]
fn colours_only_when_asked_for() {
    let act = |log: &Logger| {
        drop(log.nested("step"));
        log.serial("m", "hello");
        log.error("bad\nworse");
    };
    let plain = written(false, act);
    assert!(!plain.contains('\x1b'), "{plain:?}");
    assert!(plain.contains("m # hello\n!!! bad\n!!! worse\n"), "{plain:?}");
    let coloured = written(true, act);
    assert!(coloured.contains("\x1b[1m\x1b[32mstep\x1b[0m\n"), "{coloured:?}");
    assert!(coloured.contains("\x1b[2mm # hello\x1b[0m\n"), "{coloured:?}");
    assert!(coloured.contains("\x1b[31m!!! worse\x1b[0m\n"), "{coloured:?}");
}

#[test]
fn a_guest_cannot_drive_the_terminal() {
    let log = written(true, |log| log.serial("m", "a\x1b[2Jb\x1b]0;title\x07c\u{8}\u{9b}d\te\r"));
    assert_eq!(log, "\x1b[2mm # abcd\te\x1b[0m\n");
}

#[test]
fn serial_lines_can_be_hidden() {
    let log = written(false, |log| {
        log.show_serial(false);
        log.serial("m", "hidden");
        log.show_serial(true);
        log.serial("m", "shown");
    });
    assert_eq!(log, "m # shown\n");
}
