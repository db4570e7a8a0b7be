//! The fixed-size messages that start a session. Their layout never changes between versions.

/// The length of an encoded [`Greeting`].
pub const GREETING_LEN: usize = 25;

/// Random bytes, so that they do not turn up by chance. Read as a frame's length, the first four are far above the
/// allowed maximum, so no valid frame starts like a greeting.
pub(super) const MAGIC: [u8; 12] =
    [0xf1, 0x72, 0x6e, 0xa6, 0x0d, 0x9c, 0x3b, 0xe4, 0x81, 0x55, 0x0a, 0xd7];

/// Which greeting it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GreetingKind {
    /// Agent to host: the port is open, say hello (again).
    Announce,
    /// Host to agent: begin a session.
    Hello,
    /// Agent to host: the session of this nonce has begun, if the versions agree.
    Welcome,
}

/// A message of the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// Which one.
    pub kind: GreetingKind,
    /// The sender's protocol version.
    pub version: u16,
    /// Chosen by the host for each session; 0 in announcements.
    pub nonce: u64,
}

impl Greeting {
    /// A greeting of this program's version.
    #[must_use]
    pub const fn new(kind: GreetingKind, nonce: u64) -> Self {
        Self { kind, version: super::VERSION, nonce }
    }

    /// The bytes on the wire: magic (12), version (2), kind (1), zero (1), nonce (8), zero (1).
    ///
    /// The magic has no zero and no byte twice, so a greeting that was cut off and is followed by another one never
    /// passes for a whole one: its last byte would be one of the other's magic.
    #[must_use]
    pub fn to_bytes(self) -> [u8; GREETING_LEN] {
        let mut bytes = [0; GREETING_LEN];
        bytes[..12].copy_from_slice(&MAGIC);
        bytes[12..14].copy_from_slice(&self.version.to_le_bytes());
        bytes[14] = match self.kind {
            GreetingKind::Announce => 1,
            GreetingKind::Hello => 2,
            GreetingKind::Welcome => 3,
        };
        bytes[16..24].copy_from_slice(&self.nonce.to_le_bytes());
        bytes
    }

    /// Parses the greeting in `bytes`; `None` if it is not one.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; GREETING_LEN]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk::<12>()?;
        let (version, rest) = rest.split_first_chunk::<2>()?;
        let ([kind, zero], rest) = rest.split_first_chunk::<2>()?;
        let (nonce, end) = rest.split_first_chunk::<8>()?;
        if *magic != MAGIC || *zero != 0 || end != [0] {
            return None;
        }
        let kind = match kind {
            1 => GreetingKind::Announce,
            2 => GreetingKind::Hello,
            3 => GreetingKind::Welcome,
            _ => return None,
        };
        Some(Self {
            kind,
            version: u16::from_le_bytes(*version),
            nonce: u64::from_le_bytes(*nonce),
        })
    }
}
