//! What lies in guest memory before its first instruction: kernel and initrd. What the kernel is told beside them is the
//! processor's.

mod archive;
pub mod image;
pub mod kernel;

pub use crate::arch::unpack;
