//! Values that are checked when they are made: from a file by serde, or in a program by `try_from`. Each limit of a
//! machine is written here and nowhere else.

use std::fmt;
use std::ops::Deref;

use serde::{Deserialize, Serialize};

/// A value that cannot be, and what can.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{value} cannot be used; allowed: {allowed}")]
pub struct ValueError {
    /// The value, as shown in messages.
    pub value: String,
    /// What would be right.
    pub allowed: String,
}

impl ValueError {
    /// Says that `value` is wrong, and what would be right.
    #[must_use]
    pub fn new(value: impl fmt::Display, allowed: impl Into<String>) -> Self {
        Self { value: value.to_string(), allowed: allowed.into() }
    }
}

/// A whole number within a range.
macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty) = $low:literal..=$high:expr, $unit:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "u64", into = "u64")]
        pub struct $name($inner);

        impl $name {
            /// The least there is.
            pub const MIN: Self = Self($low);
            /// The most there is.
            pub const MAX: Self = Self($high);

            /// The number.
            #[must_use]
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl TryFrom<u64> for $name {
            type Error = ValueError;

            fn try_from(number: u64) -> Result<Self, ValueError> {
                let fits = <$inner>::try_from(number).ok();
                match fits.filter(|number| ($low..=$high).contains(number)) {
                    Some(number) => Ok(Self(number)),
                    None => {
                        let allowed = format!("{} to {}{}", $low, $high, $unit);
                        Err(ValueError::new(number, allowed))
                    }
                }
            }
        }

        impl From<$name> for u64 {
            fn from(value: $name) -> Self {
                Self::from(value.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

/// A text of certain characters and a greatest length.
macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $fits:expr, $allowed:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl TryFrom<String> for $name {
            type Error = ValueError;

            fn try_from(text: String) -> Result<Self, ValueError> {
                let fits: fn(&str) -> bool = $fits;
                match fits(&text) {
                    true => Ok(Self(text)),
                    false => Err(ValueError::new(format_args!("{text:?}"), $allowed)),
                }
            }
        }

        impl TryFrom<&str> for $name {
            type Error = ValueError;

            fn try_from(text: &str) -> Result<Self, ValueError> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.0
            }
        }

        impl Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

number! {
    /// A number of vCPUs.
    Cores(u8) = 1..=32, " processors"
}
number! {
    /// Guest memory in MiB. A distribution kernel does not unpack itself in less than the least; more than the
    /// most, 1 TiB, was meant as bytes or KiB.
    MemoryMib(u64) = 64..=1 << 20, " MiB"
}
number! {
    /// The size of a disk to make, in MiB; more than the most, 64 TiB, was meant as bytes or KiB.
    DiskMib(u64) = 1..=64 << 20, " MiB"
}
number! {
    /// A guest's vsock address (`man 7 vsock`): lower ones are the hypervisor's and the host's, and the highest is
    /// `VMADDR_CID_ANY`.
    Cid(u32) = 3..=u32::MAX - 1, ""
}
number! {
    /// The width or height of a screen.
    Pixels(u16) = 64..=4096, " pixels"
}

impl Pixels {
    /// The width of a screen of which nothing else is said.
    pub const WIDTH: Self = Self(1024);
    /// The height of a screen of which nothing else is said.
    pub const HEIGHT: Self = Self(768);
}

number! {
    /// The number of a vlan or of a node: a byte of a MAC and of an IPv4 address.
    Number(u8) = 1..=254, ""
}

text! {
    /// The name a guest mounts a share by (virtio 1.2, 5.11.4).
    Tag,
    |text| (1..=36).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)),
    "1 to 36 of A-Z a-z 0-9 `.` `_` `-`"
}
text! {
    /// A disk's serial number (virtio 1.2, 5.2.6); the guest finds the disk at `/dev/disk/by-id/virtio-SERIAL`.
    Serial,
    |text| text.len() <= 20 && text.chars().all(|c| c.is_ascii_graphic()),
    "at most 20 ASCII characters, no blanks"
}
text! {
    /// The label of an ext4 file system (`s_volume_name` of the superblock).
    Label,
    |text| text.len() <= 16 && text.chars().all(|c| c.is_ascii_graphic()),
    "at most 16 ASCII characters, no blanks"
}
text! {
    /// The name of a machine: it becomes a host name, which is one DNS label (RFC 1035, 2.3.4).
    MachineName,
    |text| {
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        (1..=63).contains(&text.len()) && text.chars().all(fits) && !text.starts_with('-')
    },
    "1 to 63 of A-Z a-z 0-9 `-` `_`, not beginning with `-`: it becomes the host name"
}

/// Whether a file can have this name: `NAME_MAX` of Linux is 255.
fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains(['/', '\0'])
}

text! {
    /// The name of a file in a directory.
    FileName,
    is_file_name,
    "the name of a file, without `/`"
}
text! {
    /// The name of a credential, as systemd accepts it: without the `=` that follows it.
    CredentialName,
    |name| {
        let fits = |c: char| (c == ' ' || c.is_ascii_graphic()) && !matches!(c, ':' | '=');
        is_file_name(name) && name.chars().all(fits)
    },
    "the name of a credential: ASCII without `/`, `:` and `=`"
}

/// The address of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl TryFrom<String> for Mac {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        let byte = |part: &str| match part.len() == 2 && part.is_char_boundary(1) {
            // `from_str_radix` takes a sign, too.
            true if !part.starts_with('+') => u8::from_str_radix(part, 16).ok(),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        match bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
            // The lowest bit of the first byte marks a group's address (IEEE 802).
            Some(mac) if mac[0] & 1 == 0 => Ok(Self(mac)),
            _ => Err(ValueError::new(
                format_args!("{text:?}"),
                "the address of one card, such as 52:54:00:12:01:01",
            )),
        }
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_ranges() {
        for (cores, fits) in [(0, false), (1, true), (32, true), (33, false), (u64::MAX, false)] {
            assert_eq!(Cores::try_from(cores).is_ok(), fits, "{cores}");
        }
        let error = MemoryMib::try_from(1).expect_err("too little").to_string();
        assert_eq!(error, "1 cannot be used; allowed: 64 to 1048576 MiB");
        for (pixels, fits) in [(63, false), (64, true), (4096, true), (4097, false), (65600, false)]
        {
            assert_eq!(Pixels::try_from(pixels).is_ok(), fits, "{pixels}");
        }
        for (cid, fits) in [(2, false), (3, true), (4_294_967_294, true), (4_294_967_295, false)] {
            assert_eq!(Cid::try_from(cid).is_ok(), fits, "{cid}");
        }
    }

    #[test]
    fn texts_have_lengths_and_characters() {
        for (tag, fits) in [("", false), ("nix-store", true), ("a b", false), ("a/b", false)] {
            assert_eq!(Tag::try_from(tag).is_ok(), fits, "{tag}");
        }
        assert!(Tag::try_from("x".repeat(36)).is_ok() && Tag::try_from("x".repeat(37)).is_err());
        assert!(
            Serial::try_from("x".repeat(20)).is_ok() && Serial::try_from("x".repeat(21)).is_err()
        );
        assert!(Label::try_from("x".repeat(16)).is_ok() && Label::try_from("a b").is_err());
        for (name, fits) in
            [("a-b_C1", true), ("", false), ("-a", false), ("ä", false), ("a.b", false)]
        {
            assert_eq!(MachineName::try_from(name).is_ok(), fits, "{name}");
        }
    }

    #[test]
    fn addresses_are_of_one_card() {
        let mac = Mac::try_from("52:54:00:12:02:FF".to_owned()).expect("an address");
        assert_eq!(mac.0, [0x52, 0x54, 0, 0x12, 2, 0xff]);
        assert_eq!(mac.to_string(), "52:54:00:12:02:ff");
        for bad in ["", "1:2", "01:00:00:00:00:00", "52:54:00:12:02:+1", "52:54:00:12:02:ff:00"] {
            assert!(Mac::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
