//! Names of extended attributes.
//!
//! Attributes of the namespaces `trusted` and `security` mean something to the host's kernel, and
//! need privileges that firn seldom has: a guest that could set `security.capability` could make
//! programs that run as root on the host. So they are kept as attributes of users, by the names
//! that `virtiofsd` uses for the same purpose. Attributes of users and ACLs stay what they are.
//! What the host itself has in the two namespaces the guest does not see.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const PREFIX: &[u8] = b"user.virtiofs.";
const MAPPED: [&[u8]; 2] = [b"trusted.", b"security."];
const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// What the host calls the attribute of file capabilities.
pub(super) const CAPABILITY: &CStr = c"user.virtiofs.security.capability";

fn is_mapped(name: &[u8]) -> bool {
    MAPPED.iter().any(|namespace| name.starts_with(namespace))
}

fn is_plain(name: &[u8]) -> bool {
    name.starts_with(b"user.") && !name.starts_with(PREFIX) || ACLS.contains(&name)
}

/// What the host calls the guest's attribute `name`.
///
/// # Errors
/// `ENOTSUP`: it cannot be.
pub(super) fn to_host(name: &CStr) -> io::Result<Cow<'_, CStr>> {
    let bytes = name.to_bytes();
    if is_plain(bytes) {
        return Ok(Cow::Borrowed(name));
    }
    if is_mapped(bytes) {
        return Ok(Cow::Owned(CString::new([PREFIX, bytes].concat())?));
    }
    Err(io::Error::from_raw_os_error(libc::ENOTSUP))
}

/// What the guest calls the host's attributes, each of which ends with a zero byte.
pub(super) fn to_guest(names: &[u8]) -> Vec<u8> {
    let names = names.split(|&byte| byte == 0).filter_map(|name| match name.strip_prefix(PREFIX) {
        Some(mapped) => Some(mapped).filter(|name| is_mapped(name)),
        None => Some(name).filter(|name| is_plain(name)),
    });
    names.flat_map(|name| name.iter().copied().chain([0])).collect()
}

/// Whether the file system of a directory has the kind of attribute that `name` is of.
pub(super) fn are_supported(directory: &File, name: &CStr) -> bool {
    // SAFETY: the name is a string, and of no value nothing is written.
    let found =
        unsafe { libc::fgetxattr(directory.as_raw_fd(), name.as_ptr(), std::ptr::null_mut(), 0) };
    found >= 0 || io::Error::last_os_error().raw_os_error() == Some(libc::ENODATA)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_privileged_namespaces_are_mapped_and_come_back() {
        for (guest, host) in [
            (c"trusted.overlay.opaque", c"user.virtiofs.trusted.overlay.opaque"),
            (c"security.capability", CAPABILITY),
            (c"user.note", c"user.note"),
            (c"system.posix_acl_access", c"system.posix_acl_access"),
        ] {
            assert_eq!(*to_host(guest).unwrap(), *host);
            assert_eq!(to_guest(host.to_bytes_with_nul()), guest.to_bytes_with_nul());
        }
    }

    #[test]
    fn nothing_else_leads_to_the_host_or_back() {
        for name in [c"user.virtiofs.security.capability", c"system.other", c"", c"trusted"] {
            let error = to_host(name).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOTSUP));
        }
        let names = b"security.selinux\0trusted.x\0user.virtiofs.other\0user.a\0";
        assert_eq!(to_guest(names), b"user.a\0");
    }
}
