//! Writes an image's inodes and directories, and fetches its files.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;

use nix::sys::stat::fstat;

use super::ComposeError;
use super::format::{self, BLOCK, Directory, Entry, Inode, Layout, SLOT};
use super::mapping::Mapping;
use super::plan::{Place, Plan};
use super::walk::{Contents, Kind, Tree, open_file};

/// Writes all inodes, and what directories and links hold.
pub(super) fn write_metadata(
    tree: &Tree,
    plan: &Plan,
    image: &mut [u8],
) -> Result<(), ComposeError> {
    for ((number, node), place) in (0..).zip(&tree.nodes).zip(&plan.places) {
        let inode = Inode {
            layout: place.layout,
            mode: node.mode,
            links: node.links,
            size: place.size,
            place: match &node.kind {
                Kind::Device(device) => *device,
                _ => u32::try_from(place.data / BLOCK).map_err(|_| tree.too_large(number))?,
            },
            number: number + 1,
        };
        let at = index(place.inode);
        let behind = at + inode.write(&mut image[at..]);
        let content = match place.layout {
            Layout::Inline => behind,
            Layout::Plain => index(place.data),
        };
        match &node.kind {
            Kind::Directory(range) => {
                let to = &mut image[content..content + index(place.size)];
                write_directory(tree.entries(range), tree, plan, to);
            }
            Kind::Link(target) => image[content..content + target.len()].copy_from_slice(target),
            Kind::File(_) | Kind::Device(_) | Kind::Other => {}
        }
    }
    Ok(())
}

fn write_directory<'a>(
    entries: impl Iterator<Item = (&'a [u8], u32)>,
    tree: &Tree,
    plan: &Plan,
    to: &mut [u8],
) {
    let mut blocks = to.chunks_mut(index(BLOCK));
    let mut packing = Directory::default();
    let mut together = Vec::new();
    let mut write = |together: &mut Vec<Entry<'_>>| {
        if let Some(block) = blocks.next() {
            format::write_block(block, together.drain(..));
        }
    };
    for (name, node) in entries {
        if packing.add(name.len()) && !together.is_empty() {
            write(&mut together);
        }
        let nid = plan.places[node as usize].inode / SLOT;
        let file_type = format::file_type(tree.nodes[node as usize].mode);
        together.push(Entry { name, nid, file_type });
    }
    write(&mut together);
}

/// Reads the small files and maps the large ones.
pub(super) fn fetch_files(
    tree: &Tree,
    plan: &Plan,
    image: &mut Mapping,
) -> Result<(), ComposeError> {
    let mut directory: Option<(u32, OwnedFd)> = None;
    for ((number, node), place) in (0..).zip(&tree.nodes).zip(&plan.places) {
        let Kind::File(contents) = &node.kind else { continue };
        if contents.size == 0 {
            continue;
        }
        tree.wanted()?;
        // What is in one directory follows each other.
        let (_, open) = match directory.take().filter(|(parent, _)| *parent == node.parent) {
            Some(open) => directory.insert(open),
            None => directory.insert((node.parent, tree.open(node.parent)?)),
        };
        let file = open_file(open, tree.name(node)).map_err(|error| tree.failed(number, error))?;
        let fetched = match plan.is_mapped(place) {
            true => map(&file, contents, place, image),
            false => read(&file, place, image.memory_mut()),
        };
        fetched.map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => tree.changed(number),
            _ => tree.failed(number, error),
        })?;
    }
    Ok(())
}

fn read(mut file: &File, place: &Place, memory: &mut [u8]) -> io::Result<()> {
    let at = index(place.data);
    file.read_exact(&mut memory[at..at + index(place.size)])
}

fn map(file: &File, contents: &Contents, place: &Place, image: &mut Mapping) -> io::Result<()> {
    if Contents::of(&fstat(file)?) != *contents {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    image.map(index(place.data), index(place.size), file)
}

/// Of something that [`Mapping::new`] has found room for.
pub(super) fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
