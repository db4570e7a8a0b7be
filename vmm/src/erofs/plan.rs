//! Where everything is in an image.
//!
//! ```text
//! block 0: superblock | inodes, with small directories and links behind them | large directories | small files |
//! large files, the largest at multiples of 2 MiB
//! ```
//!
//! All but the large files is memory. Before [`FIRST_DATA`] each block begins with zeros or an inode, never with what a
//! file says.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use super::ComposeError;
use super::format::{self, BLOCK, Directory, Layout, SLOT, SUPER_AT, SUPER_LEN};
use super::mapping::HUGE_PAGE;
use super::walk::{Kind, Node, Tree};

/// Files of this size are mapped, smaller ones copied. Mapping one is cheaper than copying it from 8 KiB on, and takes
/// no memory; but guests have what is copied by huge pages, and there may be only so many mappings.
const LARGE: u64 = 16 << 10;
/// Most files that are mapped: those that are largest.
const MAX_LARGE: usize = 8192;
/// The nvdimm drivers look for information of their own in the first blocks (`nd_pfn_validate` in
/// drivers/nvdimm/pfn_devs.c at 4 KiB, `nd_btt_version` in drivers/nvdimm/btt_devs.c at 0 or 4 KiB): no file's bytes are
/// there.
const FIRST_DATA: u64 = 16 << 10;
/// KVM takes less than 2^31 pages at one place (`KVM_MEM_MAX_NR_PAGES` in include/linux/kvm_host.h), and an image has
/// whole huge pages. EROFS counts blocks by 32 bits.
pub(super) const MAX_END: u64 = (8 << 40) - HUGE_PAGE as u64;

/// Places of an image.
pub(super) struct Plan {
    /// By node.
    pub(super) places: Vec<Place>,
    /// Where large files begin: all before is memory.
    pub(super) written: u64,
    /// The end of the last file.
    pub(super) end: u64,
    /// The large files, as they follow each other.
    pub(super) large: Vec<u32>,
}

#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Where its inode is.
    pub(super) inode: u64,
    /// Where its content is, if it is not behind the inode; 0 if it has none.
    pub(super) data: u64,
    pub(super) size: u64,
    pub(super) layout: Layout,
}

impl Plan {
    pub(super) fn new(tree: &Tree) -> Result<Self, ComposeError> {
        let mut places = Vec::with_capacity(tree.nodes.len());
        let mut at = SUPER_AT + SUPER_LEN;
        for node in &tree.nodes {
            let (size, inline) = match &node.kind {
                Kind::Directory(range) => {
                    let mut blocks = Directory::default();
                    tree.entries(range).for_each(|(name, _)| {
                        blocks.add(name.len());
                    });
                    (blocks.size(), true)
                }
                Kind::Link(target) => (target.len() as u64, true),
                Kind::File(contents) => (contents.size, false),
                Kind::Device(_) | Kind::Other => (0, false),
            };
            let inline = inline && format::fits_inline(size, node.links);
            let len = format::inode_len(size, node.links) + if inline { size } else { 0 };
            // Neither an inode nor what is behind it may lie in two blocks (the latter: `erofs_map_blocks_flatmode` in
            // fs/erofs/data.c).
            if at / BLOCK != (at + len - 1) / BLOCK {
                at = at.next_multiple_of(BLOCK);
            }
            let layout = if inline { Layout::Inline } else { Layout::Plain };
            places.push(Place { inode: at, data: 0, size, layout });
            at = (at + len).next_multiple_of(SLOT);
        }

        let mut large = large(&tree.nodes);
        let mut copied = vec![true; places.len()];
        large.iter().for_each(|node| copied[*node as usize] = false);
        let mut end = at.next_multiple_of(BLOCK).max(FIRST_DATA);
        // What Linux asks for most first, and near the inodes.
        for of_files in [false, true] {
            let nodes = (0..).zip(&tree.nodes).zip(&mut places);
            for (((number, node), place), copied) in nodes.zip(&copied) {
                let file = matches!(node.kind, Kind::File(_));
                let somewhere = place.layout == Layout::Plain && place.size > 0;
                if file == of_files && *copied && somewhere {
                    place.data = end;
                    end = behind(end, place.size).ok_or_else(|| tree.too_large(number))?;
                }
            }
        }
        let written = end;
        arrange(&mut large, &mut places, &mut end).map_err(|node| tree.too_large(node))?;
        Ok(Self { places, written, end, large })
    }

    /// Whether a file is mapped.
    pub(super) fn is_mapped(&self, place: &Place) -> bool {
        place.data >= self.written
    }
}

/// The files to map, the largest first.
fn large(nodes: &[Node]) -> Vec<u32> {
    let size = |node: &Node| match &node.kind {
        Kind::File(contents) if contents.size >= LARGE => Some(contents.size),
        _ => None,
    };
    let sizes = (0..).zip(nodes).filter_map(|(index, node)| Some((Reverse(size(node)?), index)));
    let mut sizes: Vec<(_, u32)> = sizes.collect();
    sizes.sort_unstable();
    sizes.truncate(MAX_LARGE);
    sizes.into_iter().map(|(_, index)| index).collect()
}

/// Gives large files their places, and puts them into that order. Those of a huge page or more begin with one, so that
/// guests can map them by huge pages; what is left between them the others fill, as far as they fit.
fn arrange(large: &mut Vec<u32>, places: &mut [Place], end: &mut u64) -> Result<(), u32> {
    let size = |places: &[Place], node: u32| places[node as usize].size;
    let huge = large.partition_point(|node| size(places, *node) >= HUGE_PAGE as u64);
    // The largest last, of equals the first.
    let rest = large.split_off(huge);
    let mut rest: BTreeSet<_> =
        rest.into_iter().map(|node| (size(places, node), Reverse(node))).collect();
    let mut order = Vec::with_capacity(huge + rest.len());
    let mut put = |node: u32, end: &mut u64| {
        let place = &mut places[node as usize];
        place.data = *end;
        order.push(node);
        *end = behind(*end, place.size).ok_or(node)?;
        Ok::<_, u32>(())
    };
    for node in large.drain(..) {
        let start = end.next_multiple_of(HUGE_PAGE as u64);
        while let Some(&next) = rest.range(..=(start - *end, Reverse(0))).next_back() {
            rest.remove(&next);
            put(next.1.0, end)?;
        }
        *end = start;
        put(node, end)?;
    }
    // As they are found: what belongs together lies together.
    let mut rest: Vec<_> = rest.into_iter().map(|(_, Reverse(node))| node).collect();
    rest.sort_unstable();
    for node in rest {
        put(node, end)?;
    }
    *large = order;
    Ok(())
}

/// The first block behind `size` bytes at `at`.
fn behind(at: u64, size: u64) -> Option<u64> {
    let end = at.checked_add(size).and_then(|end| end.checked_next_multiple_of(BLOCK));
    end.filter(|end| *end <= MAX_END)
}
