use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn path() -> impl Strategy<Value = BytePath> {
    vec(1u8.., 0..40).prop_map(|bytes| {
        use std::os::unix::ffi::OsStringExt;
        BytePath::from(&std::ffi::OsString::from_vec(bytes))
    })
}

fn to_agent() -> impl Strategy<Value = ToAgent> {
    let exec =
        (vec(".*", 0..4), vec((".*", ".*"), 0..3), proptest::option::of(path()), any::<bool>());
    let exec = (exec, proptest::option::of(any::<u64>())).prop_map(
        |((argv, env, cwd, stdin), timeout_ms)| {
            let stderr = if stdin { StderrMode::ToStdout } else { StderrMode::Console };
            ToAgent::Exec(ExecRequest {
                program: Program::Argv(argv),
                env,
                cwd,
                stdin,
                stderr,
                timeout_ms,
            })
        },
    );
    prop_oneof![
        exec,
        (path(), any::<u32>()).prop_map(|(path, mode)| ToAgent::WriteFile { path, mode }),
        (path(), any::<bool>()).prop_map(|(path, follow)| ToAgent::Stat { path, follow }),
        vec(any::<u8>(), 0..2000).prop_map(ToAgent::Data),
        any::<u32>().prop_map(ToAgent::Credit),
        any::<i32>().prop_map(|signal| ToAgent::Signal { signal }),
        Just(ToAgent::Eof),
        Just(ToAgent::Cancel),
    ]
}

fn to_host() -> impl Strategy<Value = ToHost> {
    fn info() -> impl Strategy<Value = FileInfo> {
        (any::<u32>(), any::<u64>(), proptest::option::of(path())).prop_map(
            |(mode, size, target)| {
                let kind = if target.is_some() { FileKind::Symlink } else { FileKind::File };
                FileInfo { kind, mode, size, target }
            },
        )
    }
    prop_oneof![
        vec(any::<u8>(), 0..2000)
            .prop_map(|bytes| ToHost::Output { stream: Stream::Stderr, bytes }),
        vec((path(), info()).prop_map(|(name, info)| Entry { name, info }), 0..5)
            .prop_map(ToHost::Entries),
        info().prop_map(ToHost::Info),
        any::<i32>().prop_map(|signal| ToHost::Exited(Exit::Signal(signal))),
        (".*", proptest::option::of(any::<i32>()))
            .prop_map(|(message, errno)| ToHost::Failed(Failure { message, errno })),
        Just(ToHost::Done),
    ]
}

/// Pushes `bytes` in pieces whose lengths repeat `cuts`, and gives everything found until the end or an error.
fn decode<M: serde::de::DeserializeOwned>(
    bytes: &[u8],
    cuts: &[usize],
) -> (Vec<Item<M>>, Option<ProtocolError>) {
    let mut decoder = Decoder::new();
    let mut items = Vec::new();
    let mut rest = bytes;
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let (piece, next) = rest.split_at(rest.len().min((*cuts.next().unwrap()).max(1)));
        rest = next;
        decoder.push(piece);
        loop {
            match decoder.next_item() {
                Ok(Some(item)) => items.push(item),
                Ok(None) => break,
                Err(error) => return (items, Some(error)),
            }
        }
    }
    (items, None)
}

proptest! {
    #[test]
    fn frames_survive_any_cut(
        messages in vec((any::<u32>(), to_agent()), 0..8),
        answers in vec((any::<u32>(), to_host()), 0..8),
        nonce: u64,
        cuts in vec(1usize..300, 1..6),
    ) {
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for (id, message) in messages {
            let frame = Frame { id, message };
            encode(&frame, &mut bytes).unwrap();
            expected.push(Item::Frame(frame));
        }
        let hello = Greeting::new(GreetingKind::Hello, nonce);
        bytes.extend(hello.to_bytes());
        expected.push(Item::Greeting(hello));
        prop_assert_eq!(decode::<ToAgent>(&bytes, &cuts), (expected, None));

        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for (id, message) in answers {
            let frame = Frame { id, message };
            encode(&frame, &mut bytes).unwrap();
            expected.push(Item::Frame(frame));
        }
        prop_assert_eq!(decode::<ToHost>(&bytes, &cuts), (expected, None));
    }

    #[test]
    fn garbage_never_panics_nor_grows(bytes in vec(any::<u8>(), 0..5000), cuts in vec(1usize..300, 1..6)) {
        decode::<ToAgent>(&bytes, &cuts);
        decode::<ToHost>(&bytes, &cuts);
    }

    /// Damage to one byte of a valid stream is either refused or gives other messages, and never a panic.
    #[test]
    fn damaged_frames_never_panic(messages in vec(to_host(), 1..4), at: prop::sample::Index, value: u8) {
        let mut bytes = Vec::new();
        for message in messages {
            encode(&Frame { id: 7, message }, &mut bytes).unwrap();
        }
        let at = at.index(bytes.len());
        bytes[at] = value;
        decode::<ToHost>(&bytes, &[4096]);
    }

    #[test]
    fn greeting_is_found_behind_stale_bytes(
        stale in vec(any::<u8>(), 0..3000),
        partial in 0usize..GREETING_LEN,
        nonce: u64,
        cuts in vec(1usize..300, 1..6),
    ) {
        let hello = Greeting::new(GreetingKind::Hello, nonce);
        let mut bytes = stale;
        // A greeting that was cut off in an earlier session must not hide the whole one behind it.
        bytes.extend(&Greeting::new(GreetingKind::Hello, !nonce).to_bytes()[..partial]);
        bytes.extend(hello.to_bytes());
        let mut decoder = Decoder::new();
        let mut found = None;
        let mut rest = &bytes[..];
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() && found.is_none() {
            let (piece, next) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
            rest = next;
            decoder.push(piece);
            found = decoder.find_greeting();
        }
        prop_assert_eq!(found, Some(hello));
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn padding_and_hello_end_any_cut_frame(message in to_agent(), kept: prop::sample::Index, nonce: u64) {
        let mut bytes = Vec::new();
        encode(&Frame { id: 1, message }, &mut bytes).unwrap();
        bytes.truncate(kept.index(bytes.len()));
        bytes.resize(bytes.len() + RESYNC_PADDING, 0);
        let hello = Greeting::new(GreetingKind::Hello, nonce);
        bytes.extend(hello.to_bytes());
        let mut decoder = Decoder::new();
        decoder.push(&bytes);
        let error = loop {
            match decoder.next_item::<ToAgent>() {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the decoder still waits"),
                Err(error) => break error,
            }
        };
        prop_assert!(matches!(error, ProtocolError::Length { .. } | ProtocolError::Undecodable { .. }
            | ProtocolError::Surplus { .. }), "{}", error);
        prop_assert_eq!(decoder.find_greeting(), Some(hello));
    }
}

/// What a session's end leaves of a frame must not become another command.
#[test]
fn guard_and_hello_make_no_other_script() {
    let script = Program::Shell("rm -rf /tmp/directory".to_owned());
    let message = ToAgent::Exec(ExecRequest::new(script.clone()));
    let mut whole = Vec::new();
    encode(&Frame { id: 1, message }, &mut whole).unwrap();
    let hello = Greeting::new(GreetingKind::Hello, 7);
    for cut in 0..whole.len() {
        let mut bytes = whole[..cut].to_vec();
        bytes.resize(cut + RESYNC_GUARD, 0);
        bytes.extend(hello.to_bytes());
        for item in decode::<ToAgent>(&bytes, &[bytes.len()]).0 {
            match item {
                Item::Greeting(greeting) => assert_eq!(greeting, hello),
                Item::Frame(Frame { message: ToAgent::Exec(exec), .. }) => assert!(
                    exec.program == script || format!("{:?}", exec.program).contains(r"\0"),
                    "after {cut} bytes: {exec:?}"
                ),
                Item::Frame(frame) => panic!("after {cut} bytes: {frame:?}"),
            }
        }
    }
}

fn first_error(bytes: &[u8]) -> ProtocolError {
    decode::<ToAgent>(bytes, &[bytes.len()]).1.expect("an error")
}

#[test]
fn lengths_outside_the_limits_are_refused_before_the_payload() {
    assert_eq!(first_error(&[0, 0, 0, 0]), ProtocolError::Length { length: 0 });
    let above = u32::try_from(MAX_PAYLOAD).unwrap() + 1;
    assert_eq!(first_error(&above.to_le_bytes()), ProtocolError::Length { length: above });
    assert_eq!(first_error(&[0xff; 4]), ProtocolError::Length { length: u32::MAX });
}

#[test]
fn unknown_kinds_and_surplus_are_refused() {
    assert!(matches!(
        first_error(&[2, 0, 0, 0, 1, 120]),
        ProtocolError::Undecodable { length: 2, .. }
    ));
    let mut bytes = Vec::new();
    encode(&Frame { id: 1, message: ToAgent::Eof }, &mut bytes).unwrap();
    bytes[0] += 3;
    bytes.extend([9, 9, 9]);
    assert_eq!(first_error(&bytes), ProtocolError::Surplus { surplus: 3 });
}

#[test]
fn lengths_inside_a_payload_are_checked_against_it() {
    // Data that claims 4 GiB: kind of Data, then a varint length, then nothing.
    let mut bytes = Vec::new();
    encode(&Frame { id: 1, message: ToAgent::Data(vec![]) }, &mut bytes).unwrap();
    let kind = bytes[5];
    let lie = [7, 0, 0, 0, 1, kind, 0xff, 0xff, 0xff, 0xff, 0x0f];
    assert!(matches!(first_error(&lie), ProtocolError::Undecodable { .. }));
}

#[test]
fn too_long_a_message_is_refused_and_leaves_no_trace() {
    let mut out = vec![1, 2, 3];
    let message = ToAgent::Exec(ExecRequest::shell("x".repeat(MAX_PAYLOAD)));
    assert!(matches!(
        encode(&Frame { id: 1, message }, &mut out),
        Err(ProtocolError::TooLong { .. })
    ));
    assert_eq!(out, [1, 2, 3]);
}

#[test]
fn a_full_chunk_fits_and_encodes_without_blow_up() {
    let mut out = Vec::new();
    let bytes = vec![0xff; MAX_CHUNK];
    encode(&Frame { id: u32::MAX, message: ToHost::Data(bytes) }, &mut out).unwrap();
    assert!(out.len() <= MAX_CHUNK + 16, "{}", out.len());
}

#[test]
fn decoder_memory_is_bounded_when_drained() {
    let mut decoder = Decoder::new();
    let mut frame = Vec::new();
    encode(&Frame { id: 1, message: ToAgent::Data(vec![5; 50_000]) }, &mut frame).unwrap();
    let stream = frame.repeat(200);
    for piece in stream.chunks(65_537) {
        decoder.push(piece);
        while decoder.next_item::<ToAgent>().unwrap().is_some() {}
        assert!(decoder.buffered() <= MAX_PAYLOAD * 2 + 70_000, "{}", decoder.buffered());
    }
}

#[test]
fn versions_are_told_apart_by_fixed_bytes() {
    let mut bytes = Greeting::new(GreetingKind::Welcome, 5).to_bytes();
    bytes[12] = 200;
    let greeting = Greeting::from_bytes(&bytes).unwrap();
    assert_eq!((greeting.version, greeting.nonce, greeting.kind), (200, 5, GreetingKind::Welcome));
    bytes[14] = 9;
    assert_eq!(Greeting::from_bytes(&bytes), None);
}
