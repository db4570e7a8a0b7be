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
    // The guest's text is also in command output, panics and errors.
    let hostile = "a\x1b[2Jb\r\nc\x1b]52;c;AA==\x07\u{9b}31m\td\x1b";
    let log = written(true, |log| {
        log.for_machine("m").info(format_args!("output: {hostile}"));
        log.warning(hostile);
        log.error(hostile);
        drop(log.nested(hostile));
    });
    let own = regex::Regex::new(r"\x1b\[\d*m").expect("valid");
    let left = own.replace_all(&log, "").into_owned();
    let odd: Vec<char> = left.chars().filter(|c| c.is_control()).collect();
    assert!(odd.iter().all(|c| matches!(c, '\t' | '\n')), "{left:?}");
    assert!(left.starts_with("m: output: ab\nc31m\td\nwarning: ab\nc"), "{left:?}");
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

#[test]
fn levels() {
    let lines = |level| {
        let buffer = Buffer::default();
        let log = Logger::new(Box::new(buffer.clone()), false);
        log.set_level(level);
        log.debug("debug");
        drop(log.nested("step"));
        log.serial("m", "line");
        log.warning("careful");
        log.error("bad");
        let bytes = buffer.0.lock().expect("no panic while held").clone();
        String::from_utf8(bytes).expect("only text was logged").lines().count()
    };
    let levels = ["debug", "info", "warning", "error"];
    let counts = levels.map(|name| lines(name.parse().expect("a level")));
    assert_eq!(counts, [6, 5, 2, 1]);
    assert!("loud".parse::<Level>().expect_err("no level").contains("allowed: debug, info"));
}

/// Returns what a log writes to a file.
fn file(add: impl FnOnce(&Logger, &Path) -> io::Result<()>, act: impl FnOnce(&Logger)) -> String {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("log.xml");
    let log = Logger::new(Box::new(io::sink()), false);
    add(&log, &path).expect("the file can be made");
    act(&log);
    log.finish().expect("it can be written");
    log.info("too late");
    log.finish().expect("nothing to do");
    std::fs::read_to_string(path).expect("it was written")
}

/// Takes out the digits of durations.
fn timeless(text: &str) -> String {
    let digits = regex::Regex::new(r"\d+\.\d+").expect("valid");
    digits.replace_all(text, "T").into_owned()
}

#[test]
fn an_xml_log() {
    let xml = file(Logger::add_xml, |log| {
        let step = log.for_machine("a").nested("run <x> & \"y\"");
        log.show_serial(false);
        log.serial("a", "ring\u{7} \u{fffe}");
        log.error("one\ntwo");
        drop(step);
        std::mem::forget(log.nested("never ends"));
    });
    assert_eq!(
        timeless(&xml),
        "<?xml version=\"T\" encoding=\"utf-8\"?><logfile>\
         <nest><head machine=\"a\">run &lt;x&gt; &amp; &quot;y&quot;</head>\
         <line machine=\"a\" type=\"serial\">ring </line>\
         <line type=\"error\">one</line><line type=\"error\">two</line>\
         <line machine=\"a\">(finished: run &lt;x&gt; &amp; &quot;y&quot;, in T seconds)</line></nest>\
         <nest><head>never ends</head></nest></logfile>"
    );
}

#[test]
fn a_junit_report() {
    let xml = file(Logger::add_junit, |log| {
        log.info("hello");
        drop(log.subtest("good"));
        for why in ["1 != 2", "not again"] {
            let mut bad = log.subtest("bad");
            log.serial("m", "oops");
            std::thread::sleep(Duration::from_millis(20));
            bad.fail(why);
        }
        std::mem::forget(log.subtest("killed"));
        log.fail("ended by SIGTERM");
    });
    let report = quick_junit::Report::deserialize_from_str(&xml).expect("a report");
    assert_eq!((report.tests, report.failures), (4, 2));
    let suite = &report.test_suites[0];
    let cases: Vec<_> = suite.test_cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(cases, ["main", "good", "bad", "killed"]);
    let [main, _, bad, killed] = &suite.test_cases[..] else { unreachable!("there are four") };
    // The parser drops the last newline.
    let text = |text: &Option<quick_junit::XmlString>| text.as_ref().map(|text| text.to_string());
    assert_eq!(text(&main.system_out).as_deref(), Some("hello"));
    assert_eq!(main.system_err, None);
    assert!(bad.time.expect("it was measured") >= Duration::from_millis(40));
    assert_eq!(text(&bad.system_out).expect("output").matches("m # oops\n").count(), 2);
    let said = |why| format!("Test \"bad\" failed with error: \"{why}\"");
    let both = [said("1 != 2"), said("not again")].join("\n");
    assert_eq!(text(&bad.system_err), Some(both));
    assert_eq!(text(&killed.system_err).as_deref(), Some("ended by SIGTERM"));
    let failure = r#"<failure message="test case failed" type="failure"/>"#;
    assert_eq!(xml.matches(failure).count(), 2, "{xml}");
}

#[test]
fn logs_within_a_log() {
    let terminals = [Buffer::default(), Buffer::default()];
    let all = Logger::nowhere();
    let [first, second] = terminals.clone().map(|buffer| Logger::new(Box::new(buffer), false));
    assert!(all.add_log(&first) && all.add_log(&second) && !all.add_log(&all.clone()));
    all.for_machine("m").info("to both");
    first.show_serial(false);
    all.serial("m", "to the second");
    second.set_level(Level::Error);
    all.info("to the first");
    all.set_level(Level::Error);
    all.info("to none");
    all.finish().expect("they have no files");
    all.error("late");
    let written = terminals.map(|buffer| {
        String::from_utf8(buffer.0.lock().expect("no panic while held").clone()).expect("text")
    });
    let [first, second] = written.each_ref().map(String::as_str);
    assert_eq!(first, "m: to both\nto the first\n!!! late\n");
    assert_eq!(second, "m: to both\nm # to the second\n!!! late\n");
}

#[test]
fn a_log_file_that_cannot_be_written() {
    let log = Logger::new(Box::new(io::sink()), false);
    log.add_xml(Path::new("/no/such/log.xml")).expect_err("no such directory");
    log.add_junit(Path::new("/no/such/junit.xml")).expect_err("no such directory");
    log.add_xml(Path::new("/dev/full")).expect("it opens");
    log.info("hello");
    log.finish().expect_err("it is full");
}

#[test]
fn what_a_guest_prints_is_bounded_in_files() {
    let junit = file(Logger::add_junit, |log| {
        for _ in 0..60_000 {
            log.info("ä".repeat(40));
        }
        log.info("last");
    });
    assert!(junit.len() < 3 * (1 << 20), "{} bytes", junit.len());
    assert!(junit.contains("last") && junit.contains("bytes before this are left out)"));
    let xml = file(Logger::add_xml, |log| {
        // Each takes five bytes of the file.
        let line = "&".repeat(1 << 16);
        for _ in 0..60 {
            log.serial("loud", &line);
        }
        log.serial("quiet", "here I am");
    });
    assert!(xml.len() < 17 << 20, "{} bytes", xml.len());
    let said = "type=\"warning\">its console has taken 16 MiB of this log; the rest is left out<";
    assert_eq!(xml.matches(said).count(), 1);
    assert!(xml.contains(">here I am<"));
}
