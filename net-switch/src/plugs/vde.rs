//! The request that a plug sends to a switch, and the switch's answer (VDE 2, version 3 of its protocol).
//!
//! Both are packed structures in the host's byte order: see src/vde_switch/datasock.c of vde-2.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The most bytes that are read of a request: more than any plug sends.
pub(super) const MAX_REQUEST: usize = 256;
/// The bytes of a `struct sockaddr_un`.
const ADDRESS: usize = 2 + SUN_PATH;
/// The bytes of the path in it, its terminator included.
pub(super) const SUN_PATH: usize = 108;
/// Where the address starts, after three words.
const ADDRESS_AT: usize = 12;
const DESCRIPTION_AT: usize = ADDRESS_AT + ADDRESS;
const MAX_DESCRIPTION: usize = 128;

const MAGIC: u32 = 0xfeed_face;
const VERSION: u32 = 3;
/// The lowest byte of the type: any port or that of the number above it, and the port 0. Ports have no numbers here.
const KINDS: [u32; 2] = [0, 1];
/// `AF_UNIX`.
const FAMILY: u16 = 1;

/// Why what came is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Shorter than a request without a description.
    #[error("{0} bytes are no request of a VDE plug")]
    Short(usize),
    /// Another protocol.
    #[error("{0:#x} is not the magic number of VDE")]
    Magic(u32),
    /// Another version of the protocol.
    #[error("version {0} of VDE's protocol; 3 is supported")]
    Version(u32),
    /// Neither a plug for any port nor one for port 0.
    #[error("type {0:#x}")]
    Kind(u32),
    /// Not a UNIX socket with an absolute path.
    #[error("the plug's socket has no absolute path")]
    Address,
}

/// What a plug asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Where the plug's socket for frames is.
    pub path: &'a Path,
    /// What the plug says about itself.
    pub description: &'a [u8],
}

impl<'a> Request<'a> {
    /// Reads a request, which anybody may have written.
    ///
    /// # Errors
    /// Why it is not one.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, RequestError> {
        let short = RequestError::Short(bytes.len());
        let (head, description) = bytes.split_at_checked(DESCRIPTION_AT).ok_or(short)?;
        let (words, address) = head.split_at(ADDRESS_AT);
        let (words, _) = words.as_chunks::<4>();
        let [magic, version, kind] = words else { return Err(short) };
        match (u32::from_ne_bytes(*magic), u32::from_ne_bytes(*version)) {
            (MAGIC, VERSION) => {}
            (MAGIC, version) => return Err(RequestError::Version(version)),
            (magic, _) => return Err(RequestError::Magic(magic)),
        }
        let kind = u32::from_ne_bytes(*kind);
        if !KINDS.contains(&(kind & 0xff)) {
            return Err(RequestError::Kind(kind));
        }
        let (family, path) = address.split_at(2);
        let end = path.iter().position(|&byte| byte == 0).unwrap_or(path.len());
        let path = Path::new(OsStr::from_bytes(&path[..end]));
        // A relative path starts at the plug's directory, which is not known; an abstract one is empty here.
        if family != FAMILY.to_ne_bytes() || !path.is_absolute() {
            return Err(RequestError::Address);
        }
        let end = description.iter().position(|&byte| byte == 0).unwrap_or(description.len());
        Ok(Self { path, description: &description[..end.min(MAX_DESCRIPTION)] })
    }
}

/// The answer: the switch's socket for the plug's frames. `None` if its path is too long.
pub(super) fn answer(path: &Path) -> Option<[u8; ADDRESS]> {
    let path = path.as_os_str().as_bytes();
    let mut answer = [0; ADDRESS];
    answer[..2].copy_from_slice(&FAMILY.to_ne_bytes());
    // The last byte stays zero.
    answer[2..ADDRESS - 1].get_mut(..path.len())?.copy_from_slice(path);
    Some(answer)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A request as libvdeplug makes it.
    pub fn request(kind: u32, path: &Path, description: &str) -> Vec<u8> {
        let words = [MAGIC, VERSION, kind].map(u32::to_ne_bytes).concat();
        let address = answer(path).expect("it fits");
        [&words, &address[..], description.as_bytes()].concat()
    }

    #[test]
    fn what_qemu_sends_is_understood() {
        let path = Path::new("/tmp/v/.01234-00000");
        let description = "QEMU user=root pid=12345";
        let bytes = request(0, path, description);
        assert_eq!(bytes.len(), 146);
        let expected = Request { path, description: description.as_bytes() };
        assert_eq!(Request::parse(&bytes), Ok(expected));
        for kind in [1, 7 << 8] {
            let bytes = request(kind, path, "");
            assert_eq!(Request::parse(&bytes), Ok(Request { path, description: b"" }));
        }
        let long = request(0, Path::new(&format!("/{}", "x".repeat(106))), &"d".repeat(134));
        let parsed = Request::parse(&long).expect("it is one");
        assert_eq!((parsed.path.as_os_str().len(), parsed.description.len()), (107, 128));
    }

    #[test]
    fn what_is_none_is_refused() {
        let good = request(0, Path::new("/tmp/v"), "");
        assert_eq!(Request::parse(&[]), Err(RequestError::Short(0)));
        assert_eq!(Request::parse(&good[..121]), Err(RequestError::Short(121)));
        let http = [b"GET / HTTP/1.1\r\n", &[b'x'; 200][..]].concat();
        assert!(matches!(Request::parse(&http), Err(RequestError::Magic(_))));
        let with = |at: usize, byte| {
            let mut bad = good.clone();
            bad[at] = byte;
            Request::parse(&bad).map(|_| ())
        };
        assert_eq!(with(4, 2), Err(RequestError::Version(2)));
        assert_eq!(with(8, 2), Err(RequestError::Kind(2)));
        assert_eq!(with(12, 2), Err(RequestError::Address), "AF_INET");
        assert_eq!(with(14, b't'), Err(RequestError::Address), "a relative path");
        assert_eq!(with(14, 0), Err(RequestError::Address), "an abstract one");
    }

    #[test]
    fn an_answer_is_an_address() {
        let bytes = answer(Path::new("/d/001.9")).expect("it fits");
        assert_eq!(bytes[..10], [1, 0, b'/', b'd', b'/', b'0', b'0', b'1', b'.', b'9']);
        assert!(bytes[10..].iter().all(|&byte| byte == 0));
        assert!(answer(Path::new(&"x".repeat(107))).is_some());
        assert!(answer(Path::new(&"x".repeat(108))).is_none());
    }
}
