//! What programs outside send to a switch: a VDE plug's request, and frames in a stream.

use bolero::check;
use firn_net_switch::MAX_FRAME;
use firn_net_switch::plugs::stream::Decoder;
use firn_net_switch::plugs::vde::Request;

/// Inputs of an ordinary test run.
const ITERATIONS: usize = 5000;

/// The first 14 bytes of a good request for any port: magic number, version, type, address family.
fn head() -> Vec<u8> {
    let words = [0xfeed_face_u32, 3, 0].map(u32::to_ne_bytes).concat();
    [&words[..], &1_u16.to_ne_bytes(), b"/"].concat()
}

#[test]
fn a_request_is_refused_or_makes_sense() {
    check!().with_iterations(ITERATIONS).with_type::<(bool, Vec<u8>)>().for_each(|(good, rest)| {
        let head = if *good { head() } else { Vec::new() };
        let mut bytes = [head, rest.clone()].concat();
        // Most random inputs are shorter than a request.
        bytes.resize(bytes.len().max(if *good { 122 } else { 0 }), 0);
        if let Ok(request) = Request::parse(&bytes) {
            assert!(request.path.is_absolute() && request.path.as_os_str().len() <= 108);
            assert!(request.description.len() <= 128);
        } else {
            assert!(!good, "the rest of a request may be anything");
        }
    });
}

#[test]
fn a_stream_gives_frames_or_ends() {
    type Pieces = Vec<(u16, Vec<u8>)>;
    check!().with_iterations(ITERATIONS).with_type::<Pieces>().for_each(|pieces| {
        let mut decoder = Decoder::default();
        let (mut fed, mut got) = (0, 0);
        for (length, data) in pieces {
            let stream = [&u32::from(*length).to_be_bytes()[..], data].concat();
            let mut rest = &stream[..];
            while !rest.is_empty() {
                let room = decoder.room();
                let now = rest.len().min(room.len());
                assert!(now > 0, "there is always room");
                room[..now].copy_from_slice(&rest[..now]);
                decoder.filled(now);
                (rest, fed) = (&rest[now..], fed + now);
                loop {
                    match decoder.next_frame() {
                        Ok(Some(frame)) => {
                            assert!(frame.len() <= MAX_FRAME);
                            got += 4 + frame.len();
                        }
                        Ok(None) => break,
                        Err(_) => return,
                    }
                }
                assert!(got <= fed);
            }
        }
    });
}
