//! What is in guest memory before its first instruction: kernel and initrd. What else the kernel needs to know
//! depends on the processor, see [`crate::arch`].

mod archive;
pub mod image;
pub mod kernel;

pub use crate::arch::unpack;
