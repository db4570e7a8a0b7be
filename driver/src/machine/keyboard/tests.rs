use super::*;

#[test]
fn all_names_and_scan_codes_are_keys() {
    assert_eq!(KEYS.len(), 162);
    assert!(KEYS.is_sorted_by_key(|key| key.name));
    for named in KEYS {
        assert_eq!(key(named.name), Ok(named.code), "{}", named.name);
        if let Some(scan) = named.scan {
            assert_eq!(key(&format!("0x{scan:x}")), Ok(named.code), "{}", named.name);
            // Two that have no code of their own there.
            let other = matches!(named.name, "print" | "sysrq" | "f16");
            assert!(scan > SAME_SCANS || other || u16::from(scan) == named.code, "{}", named.name);
        }
    }
    // Numbers of linux/input-event-codes.h that a table of another kind would miss.
    for (name, code) in
        [("less", 86), ("<", 86), ("alt_r", 100), ("menu", 139), ("compose", 127), ("kp_enter", 96)]
    {
        assert_eq!(key(name), Ok(code), "{name}");
    }
}

#[test]
fn chords() {
    assert_eq!(chord("ctrl-alt-delete"), Ok(vec![29, 56, 111]));
    assert_eq!(chord("0x2B"), Ok(vec![43]));
    // Extended ones: the arrow up is e0 48.
    assert_eq!(chord("shift-0xc8"), Ok(vec![42, 103]));
    assert_eq!(chord("minus"), Ok(vec![12]));
    let sixteen = ["a"; 16].join("-");
    assert_eq!(chord(&sixteen).map(|codes| codes.len()), Ok(16));
    assert_eq!(chord(&format!("{sixteen}-a")), Err(BadKey::TooMany(format!("{sixteen}-a"))));
    for text in ["", "-", "ctrl-", "ctrl--", "-a"] {
        assert_eq!(chord(text), Err(BadKey::Empty(text.to_owned())), "{text}");
    }
    for text in ["0x", "0x00", "0x100", "0xg", "0xff"] {
        assert_eq!(chord(text), Err(BadKey::Scan(text.to_owned())), "{text}");
    }
}

#[test]
fn a_key_that_is_none_has_others_near_it() {
    for (name, near) in [
        ("enter", "kp_enter"),
        ("Enter", "ret"),
        ("windows", "meta_l"),
        ("retn", "ret"),
        ("Delete", "delete"),
        ("control", "ctrl"),
        ("capslock", "caps_lock"),
        ("f99", "f9"),
    ] {
        let Err(BadKey::Unknown { close_to, .. }) = chord(name) else { panic!("{name} is one") };
        assert!(close_to.contains(&near), "{name}: {close_to:?}");
        assert!(close_to.len() <= SUGGESTIONS);
    }
    let error = chord("ctrl-nonsense!").expect_err("none").to_string();
    assert_eq!(
        error,
        "there is no key `nonsense!`: names are those of QEMU's sendkey, `ret` or `ctrl-alt-f2`"
    );
    let error = chord("retn").expect_err("none").to_string();
    assert!(error.starts_with("there is no key `retn`; close to it: ret"), "{error}");
}

#[test]
fn characters_of_an_american_keyboard() {
    let all = characters();
    for (typed, chord) in [
        (' ', "spc"),
        ('\n', "ret"),
        ('A', "shift-a"),
        ('-', "0x0C"),
        ('_', "shift-0x0C"),
        ('~', "shift-0x29"),
        ('|', "shift-0x2B"),
        ('!', "shift-0x02"),
        (')', "shift-0x0B"),
    ] {
        assert!(all.contains(&(typed, chord.to_owned())), "{typed} in {all:?}");
    }
    // Everything that can be printed is typed by one key, alone or with shift, and no two by the same.
    let mut chords = Vec::new();
    for typed in (' '..='~').chain(['\n']) {
        let codes = chord(&meant(&typed.to_string())).expect("a key");
        assert!(codes.len() == 1 || codes.len() == 2 && codes[0] == 42, "{typed}");
        chords.push(codes);
    }
    chords.sort_unstable();
    let count = chords.len();
    chords.dedup();
    assert_eq!(chords.len(), count);
    assert_eq!((meant("ret"), meant("é")), ("ret".to_owned(), "é".to_owned()));
}

#[test]
fn texts_are_shown_as_in_python() {
    for (text, shown) in [
        ("a\n", r"'a\n'"),
        ("it's", "\"it's\""),
        ("'\"", r#"'\'"'"#),
        ("\\", r"'\\'"),
        ("é", "'é'"),
    ] {
        assert_eq!(quoted(text), shown);
    }
}
