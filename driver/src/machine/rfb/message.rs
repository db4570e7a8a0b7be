//! What viewers say (RFC 6143, 7.5), and the formats of pixels that they ask for (7.4).

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::area::Area;

/// The longest text that a viewer may put on its clipboard, which nobody reads, in bytes.
const MAX_CUT_TEXT: u32 = 1 << 20;

/// The server says when the screen's size changes (RFC 6143, 7.8.2).
pub(super) const DESKTOP_SIZE: i32 = -223;
/// Keys come with the codes that the keyboard sends (QEMU's extended key event, -258 in the registry of RFB).
pub(super) const EXTENDED_KEYS: i32 = -258;

/// What a viewer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Pixels shall be in this format from now on.
    Format(PixelFormat),
    /// The viewer understands these encodings.
    Encodings(Vec<i32>),
    /// It wants to know what is in this area; if `changed`, once something there has changed.
    Update { changed: bool, area: Area },
    /// A key of the X Window System's names went down or up.
    Symbol { symbol: u32, down: bool },
    /// A key with this scan code (set 1, 0xe0 as 0x80) went down or up.
    ScanCode { code: u32, down: bool },
    /// The pointer is there, and these buttons are down: left, middle, right, wheel up, wheel down.
    Pointer { buttons: u8, x: u16, y: u16 },
    /// Nothing that matters here.
    Other,
}

impl Message {
    /// Reads the next one.
    ///
    /// # Errors
    /// At the stream's end, and when the viewer does not speak the protocol.
    pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        Ok(match from.read_u8().await? {
            0 => {
                skip(from, 3).await?;
                let mut format = [0; PixelFormat::SIZE];
                from.read_exact(&mut format).await?;
                Self::Format(PixelFormat::from_bytes(&format)?)
            }
            2 => {
                skip(from, 1).await?;
                let count = from.read_u16().await?;
                let mut encodings = Vec::new();
                for _ in 0..count {
                    encodings.push(from.read_i32().await?);
                }
                Self::Encodings(encodings)
            }
            3 => {
                let changed = from.read_u8().await? != 0;
                let [x, y, width, height] = [
                    from.read_u16().await?,
                    from.read_u16().await?,
                    from.read_u16().await?,
                    from.read_u16().await?,
                ]
                .map(u32::from);
                Self::Update { changed, area: Area { x, y, width, height } }
            }
            4 => {
                let down = from.read_u8().await? != 0;
                skip(from, 2).await?;
                Self::Symbol { symbol: from.read_u32().await?, down }
            }
            5 => Self::Pointer {
                buttons: from.read_u8().await?,
                x: from.read_u16().await?,
                y: from.read_u16().await?,
            },
            6 => {
                skip(from, 3).await?;
                let length = from.read_u32().await?;
                if length > MAX_CUT_TEXT {
                    return Err(invalid("the text on the clipboard is too long"));
                }
                skip(from, length).await?;
                Self::Other
            }
            255 => {
                if from.read_u8().await? != 0 {
                    return Err(invalid("an unknown extension"));
                }
                let down = from.read_u16().await? != 0;
                let _symbol = from.read_u32().await?;
                Self::ScanCode { code: from.read_u32().await?, down }
            }
            _ => return Err(invalid("an unknown message")),
        })
    }
}

async fn skip(from: &mut (impl AsyncRead + Unpin), bytes: u32) -> io::Result<()> {
    let mut part = from.take(bytes.into());
    let skipped = tokio::io::copy(&mut part, &mut tokio::io::sink()).await?;
    if skipped < u64::from(bytes) { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

pub(super) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// How a viewer wants pixels to be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PixelFormat {
    bytes: u8,
    big_endian: bool,
    /// Of red, green and blue: the highest value, and how far it is shifted to the left.
    channels: [(u16, u8); 3],
}

impl PixelFormat {
    /// Bytes of a `PIXEL_FORMAT`.
    pub(super) const SIZE: usize = 16;
    /// What the server proposes: a byte each of blue, green and red, and one that is 0.
    pub(super) const DEFAULT: Self =
        Self { bytes: 4, big_endian: false, channels: [(255, 16), (255, 8), (255, 0)] };

    pub(super) fn to_bytes(self) -> [u8; Self::SIZE] {
        let [(red, red_shift), (green, green_shift), (blue, blue_shift)] = self.channels;
        let mut bytes = [0; Self::SIZE];
        bytes[..4].copy_from_slice(&[self.bytes * 8, 24, u8::from(self.big_endian), 1]);
        bytes[4..6].copy_from_slice(&red.to_be_bytes());
        bytes[6..8].copy_from_slice(&green.to_be_bytes());
        bytes[8..10].copy_from_slice(&blue.to_be_bytes());
        bytes[10..13].copy_from_slice(&[red_shift, green_shift, blue_shift]);
        bytes
    }

    fn from_bytes(bytes: &[u8; Self::SIZE]) -> io::Result<Self> {
        let [bits, _depth, big_endian, true_colour, r0, r1, g0, g1, b0, b1, rs, gs, bs, ..] =
            *bytes;
        if true_colour == 0 || !matches!(bits, 8 | 16 | 32) {
            return Err(invalid(
                "pixels of 8, 16 or 32 bits without a palette are there, no others",
            ));
        }
        let channels = [([r0, r1], rs), ([g0, g1], gs), ([b0, b1], bs)]
            .map(|(max, shift)| (u16::from_be_bytes(max), shift));
        if channels.iter().any(|&(_, shift)| shift >= bits) {
            return Err(invalid("a shift by more bits than a pixel has"));
        }
        Ok(Self { bytes: bits / 8, big_endian: big_endian != 0, channels })
    }

    /// Appends pixels, given as red, green and blue.
    pub(super) fn append(self, rgb: &[u8], to: &mut Vec<u8>) {
        let (pixels, _) = rgb.as_chunks::<3>();
        if self == Self::DEFAULT {
            to.extend(pixels.iter().flat_map(|&[red, green, blue]| [blue, green, red, 0]));
            return;
        }
        let bytes = usize::from(self.bytes);
        for pixel in pixels {
            let value = pixel.iter().zip(self.channels).fold(0, |value, (&level, (max, shift))| {
                let level = u32::from(level) * u32::from(max) / 255;
                value | level.checked_shl(shift.into()).unwrap_or(0)
            });
            match self.big_endian {
                true => to.extend_from_slice(&value.to_be_bytes()[4 - bytes..]),
                false => to.extend_from_slice(&value.to_le_bytes()[..bytes]),
            }
        }
    }
}
