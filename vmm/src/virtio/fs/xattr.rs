//! Names of extended attributes.
//!
//! Attributes of the namespaces `trusted` and `security` mean something to the host's kernel, and
//! need privileges that firn seldom has: a guest that could set `security.capability` could make
//! programs that run as root on the host. So they are kept as attributes of users, by the names
//! that `virtiofsd` uses for the same purpose. Attributes of users and ACLs stay what they are.
//! What the host itself has in the two namespaces the guest does not see.
//!
//! Not every file system has attributes for users (tmpfs: since Linux 6.6). There all of them are
//! kept as trusted ones, if firn may.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// What the host calls the guest's attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// Those of users by their own names.
    User,
    /// Those of users by others, too.
    Trusted,
}

impl Names {
    /// Those that suit the file system of a directory, if it has any attributes.
    pub(super) fn supported_by(directory: &File) -> Option<Names> {
        if has(directory, c"user.virtiofs.probe") {
            return Some(Names::User);
        }
        let probe = c"trusted.virtiofs.probe";
        // SAFETY: the name is a string. Nobody has such an attribute; whether it could be removed
        // tells more than whether it can be read, which looks alike without the privilege.
        let removed = unsafe { libc::fremovexattr(directory.as_raw_fd(), probe.as_ptr()) };
        (removed == 0 || last_error_is(libc::ENODATA)).then_some(Names::Trusted)
    }

    fn prefix(self) -> &'static [u8] {
        match self {
            Names::User => b"user.virtiofs.",
            Names::Trusted => b"trusted.virtiofs.",
        }
    }

    /// Whether a guest's attribute has another name on the host.
    fn is_mapped(self, name: &[u8]) -> bool {
        name.starts_with(b"trusted.")
            || name.starts_with(b"security.")
            || self == Names::Trusted && name.starts_with(b"user.")
    }

    /// Whether a name is the same in the guest and on the host.
    fn is_plain(self, name: &[u8]) -> bool {
        let of_users =
            self == Names::User && name.starts_with(b"user.") && !name.starts_with(self.prefix());
        of_users || ACLS.contains(&name)
    }

    /// What the host calls the guest's attribute `name`.
    ///
    /// # Errors
    /// `ENOTSUP`: it cannot be.
    pub(super) fn to_host(self, name: &CStr) -> io::Result<Cow<'_, CStr>> {
        let bytes = name.to_bytes();
        if self.is_plain(bytes) {
            return Ok(Cow::Borrowed(name));
        }
        if self.is_mapped(bytes) {
            return Ok(Cow::Owned(CString::new([self.prefix(), bytes].concat())?));
        }
        Err(io::Error::from_raw_os_error(libc::ENOTSUP))
    }

    /// What the guest calls the host's attributes, each of which ends with a zero byte.
    pub(super) fn to_guest(self, names: &[u8]) -> Vec<u8> {
        let names = names.split(|&byte| byte == 0);
        let names = names.filter_map(|name| match name.strip_prefix(self.prefix()) {
            Some(mapped) => Some(mapped).filter(|name| self.is_mapped(name)),
            None => Some(name).filter(|name| self.is_plain(name)),
        });
        names.flat_map(|name| name.iter().copied().chain([0])).collect()
    }
}

/// Whether the file system of a directory has the kind of attribute that `name` is of.
pub(super) fn has(directory: &File, name: &CStr) -> bool {
    // SAFETY: the name is a string, and with a length of 0 no value is written.
    let found =
        unsafe { libc::fgetxattr(directory.as_raw_fd(), name.as_ptr(), std::ptr::null_mut(), 0) };
    found >= 0 || last_error_is(libc::ENODATA)
}

fn last_error_is(code: i32) -> bool {
    io::Error::last_os_error().raw_os_error() == Some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_privileged_namespaces_are_mapped_and_come_back() {
        for (names, guest, host) in [
            (Names::User, c"trusted.overlay.opaque", c"user.virtiofs.trusted.overlay.opaque"),
            (Names::User, c"security.capability", c"user.virtiofs.security.capability"),
            (Names::User, c"user.note", c"user.note"),
            (Names::User, c"system.posix_acl_access", c"system.posix_acl_access"),
            (Names::Trusted, c"trusted.a", c"trusted.virtiofs.trusted.a"),
            (Names::Trusted, c"security.capability", c"trusted.virtiofs.security.capability"),
            (Names::Trusted, c"user.note", c"trusted.virtiofs.user.note"),
            (Names::Trusted, c"system.posix_acl_access", c"system.posix_acl_access"),
        ] {
            assert_eq!(*names.to_host(guest).unwrap(), *host);
            assert_eq!(names.to_guest(host.to_bytes_with_nul()), guest.to_bytes_with_nul());
        }
    }

    #[test]
    fn nothing_else_leads_to_the_host_or_back() {
        for name in [c"user.virtiofs.security.capability", c"system.other", c"", c"trusted"] {
            let error = Names::User.to_host(name).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOTSUP));
        }
        let names = b"security.selinux\0trusted.x\0user.virtiofs.other\0user.a\0";
        assert_eq!(Names::User.to_guest(names), b"user.a\0");
        assert_eq!(Names::Trusted.to_guest(names), b"");
    }
}
