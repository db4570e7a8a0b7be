//! Screens: what a guest shows, as pictures.

pub mod plain;

/// What is on a screen at one moment.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// Red, green and blue of each pixel, row after row from the top, without gaps.
    pub rgb: Vec<u8>,
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({} x {})", self.width, self.height)
    }
}

/// A machine's screen. It can be kept for longer than the machine.
pub trait Screen: Send + Sync {
    /// What it shows; `None` as long as the guest has shown nothing, and after it has switched it off.
    fn picture(&self) -> Option<Picture>;
    /// Another number whenever the picture may be another.
    fn version(&self) -> u64;
}

/// Adds `pixels` of four bytes each, in which red, green and blue are where `order` says, to `rgb`.
pub(crate) fn rgb(pixels: &[u8], order: [usize; 3], rgb: &mut Vec<u8>) {
    let pixels = pixels.as_chunks::<4>().0;
    rgb.extend(pixels.iter().flat_map(|pixel| order.map(|at| pixel[at])));
}
