//! Guest physical memory and its layout.

use std::sync::Arc;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::GuestMemoryMmap;

/// Guest memory as mapped into this process.
///
/// The bitmap type is the one virtiofsd's FUSE server wants; the whole monitor uses it so that
/// there is one memory type. Without a bitmap installed it costs nothing but a lock read.
pub type MemoryMap = GuestMemoryMmap<BitmapMmapRegion>;

/// A shared handle on guest memory.
pub type Memory = Arc<MemoryMap>;
