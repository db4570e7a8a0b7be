use super::*;

#[test]
fn resolvers_are_read_as_the_c_library_does() {
    let text = "# a comment\nsearch example.org\n nameserver 192.0.2.1 \nnameserver\t2001:db8::1\n\
                nameserver fe80::1%eth0\nnameserver\nnameservers 192.0.2.9\n\
                nameserver 192.0.2.2\nnameserver 192.0.2.3\n";
    let found: Vec<_> = resolvers(text).iter().map(ToString::to_string).collect();
    assert_eq!(found, ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:53"]);
    assert_eq!(resolvers(""), []);
}

/// A question for the address of `a.b`, and something behind it.
const QUERY: &[u8] =
    b"\x12\x34\x01\x20\x00\x01\x00\x00\x00\x00\x00\x01\x01a\x01b\x00\x00\x01\x00\x01rest";

#[test]
fn a_failure_repeats_the_question() {
    let end = QUERY.len() - 4;
    let answer = failure(QUERY);
    assert_eq!(answer[..2], QUERY[..2]);
    assert_eq!(answer[2..12], *b"\x81\x82\x00\x01\x00\x00\x00\x00\x00\x00");
    assert_eq!(answer[12..], QUERY[12..end]);
}

#[test]
fn a_failure_to_nonsense_is_only_a_header() {
    for length in HEADER..QUERY.len() - 4 {
        let answer = failure(&QUERY[..length]);
        assert_eq!((answer.len(), answer[5]), (HEADER, 0), "of {length} bytes");
    }
    let mut compressed = QUERY.to_vec();
    compressed[12] = 0xc0;
    assert_eq!(failure(&compressed).len(), HEADER);
}
