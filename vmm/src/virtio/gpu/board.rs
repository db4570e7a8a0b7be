//! What a graphics card holds: resources, and which of them is shown.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_gpu::VIRTIO_GPU_BLOB_MEM_GUEST;

use super::command::{Command, Refusal};
use super::resource::{Backing, Entry, Layout, PIXEL, Pixels, Rect, Resource, order};
use super::{MAX_BYTES, MAX_RESOURCES};
use crate::memory::{Memory, MemoryMap};
use crate::screen::{Picture, rgb};

/// What is on the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Shown {
    id: u32,
    rect: Rect,
    layout: Layout,
}

/// What a saved resource needs.
#[derive(Serialize, Deserialize)]
struct SavedResource {
    id: u32,
    /// Of one on the host.
    image: Option<(Layout, Vec<u8>)>,
    /// Of one in the guest.
    size: u64,
    entries: Option<Vec<Entry>>,
}

/// Everything of a board.
#[derive(Serialize, Deserialize)]
pub(super) struct SavedBoard {
    resources: Vec<SavedResource>,
    shown: Option<Shown>,
}

/// Resources, and what is shown of them.
#[derive(Default)]
pub(super) struct Board {
    resources: BTreeMap<u32, Resource>,
    shown: Option<Shown>,
    /// What resources take on the host.
    cost: u64,
    /// As long as there is a driver.
    pub(super) memory: Option<Memory>,
}

/// Pixels as they were found, which are yet to be made a picture: that needs no lock.
pub(super) struct Raw {
    width: u32,
    height: u32,
    order: [usize; 3],
    bytes: Vec<u8>,
}

impl Raw {
    pub(super) fn picture(&self) -> Picture {
        let mut pixels = Vec::with_capacity(self.bytes.len() / 4 * 3);
        rgb(&self.bytes, self.order, &mut pixels);
        Picture { width: self.width, height: self.height, rgb: pixels }
    }
}

/// What became of a command that succeeded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Done {
    /// The screen may show something else.
    pub(super) changed: bool,
    /// Bytes moved.
    pub(super) moved: usize,
}

impl Done {
    const CHANGED: Done = Done { changed: true, moved: 0 };
}

impl Board {
    /// Does what is asked for, but for [`Command::DisplayInfo`], which changes nothing.
    pub(super) fn execute(
        &mut self,
        command: Command,
        memory: &MemoryMap,
    ) -> Result<Done, Refusal> {
        match command {
            Command::DisplayInfo => {}
            Command::Create2d { id, format, width, height } => {
                self.create_2d(id, Layout::packed(format, width, height))?;
            }
            Command::CreateBlob { id, memory: kind, size, entries } => {
                if kind != VIRTIO_GPU_BLOB_MEM_GUEST {
                    return Err(Refusal::Parameter);
                }
                self.create_blob(id, size, &entries, Some(memory))?;
            }
            Command::Unref { id } => return self.remove(id),
            Command::Attach { id, entries } => self.attach(id, &entries, Some(memory))?,
            Command::Detach { id } => {
                let backing = self.resource(id)?.backing.take().ok_or(Refusal::Unspecified)?;
                self.cost -= backing.cost();
            }
            Command::Transfer { id, rect, offset } => {
                let moved = transfer(self.resource(id)?, rect, offset, memory)?;
                return Ok(Done { changed: false, moved });
            }
            Command::Flush { id, rect } => {
                if let Pixels::Host { layout, .. } = self.resource(id)?.pixels
                    && !rect.is_inside(layout.width, layout.height)
                {
                    return Err(Refusal::Parameter);
                }
                let changed = self.shown.is_some_and(|shown| shown.id == id);
                return Ok(Done { changed, moved: 0 });
            }
            Command::Scanout { scanout, id, rect, layout } => {
                if scanout != 0 {
                    return Err(Refusal::Scanout);
                }
                return self.show(id, rect, layout);
            }
        }
        Ok(Done::default())
    }

    fn resource(&mut self, id: u32) -> Result<&mut Resource, Refusal> {
        self.resources.get_mut(&id).ok_or(Refusal::Resource)
    }

    /// Makes sure that there may be a new resource, before anything is allocated for it.
    fn check_new(&self, id: u32) -> Result<(), Refusal> {
        if id == 0 || self.resources.contains_key(&id) {
            return Err(Refusal::Resource);
        }
        match self.resources.len() < MAX_RESOURCES {
            true => Ok(()),
            false => Err(Refusal::OutOfMemory),
        }
    }

    /// Books what a resource takes on the host.
    fn spend(&mut self, cost: u64) -> Result<(), Refusal> {
        let total = self.cost.checked_add(cost).filter(|total| *total <= MAX_BYTES);
        self.cost = total.ok_or(Refusal::OutOfMemory)?;
        Ok(())
    }

    fn create_2d(&mut self, id: u32, layout: Layout) -> Result<(), Refusal> {
        self.check_new(id)?;
        layout.check()?;
        self.spend(layout.end())?;
        let bytes = vec![0; usize::try_from(layout.end()).unwrap_or(0)];
        let pixels = Pixels::Host { layout, bytes };
        self.resources.insert(id, Resource { pixels, backing: None });
        Ok(())
    }

    fn create_blob(
        &mut self,
        id: u32,
        size: u64,
        entries: &[Entry],
        memory: Option<&MemoryMap>,
    ) -> Result<(), Refusal> {
        self.check_new(id)?;
        let backing = Backing::new(entries);
        if size == 0 || size > backing.len() || memory.is_some_and(|memory| !backing.is_in(memory))
        {
            return Err(Refusal::Parameter);
        }
        self.spend(backing.cost())?;
        let resource = Resource { pixels: Pixels::Guest { size }, backing: Some(backing) };
        self.resources.insert(id, resource);
        Ok(())
    }

    fn attach(
        &mut self,
        id: u32,
        entries: &[Entry],
        memory: Option<&MemoryMap>,
    ) -> Result<(), Refusal> {
        if self.resource(id)?.backing.is_some() {
            return Err(Refusal::Unspecified);
        }
        let backing = Backing::new(entries);
        if memory.is_some_and(|memory| !backing.is_in(memory)) {
            return Err(Refusal::Parameter);
        }
        self.spend(backing.cost())?;
        self.resource(id)?.backing = Some(backing);
        Ok(())
    }

    fn remove(&mut self, id: u32) -> Result<Done, Refusal> {
        let resource = self.resources.remove(&id).ok_or(Refusal::Resource)?;
        self.cost -= resource.cost();
        let shown = self.shown.take_if(|shown| shown.id == id);
        Ok(Done { changed: shown.is_some(), moved: 0 })
    }

    fn show(&mut self, id: u32, rect: Rect, layout: Option<Layout>) -> Result<Done, Refusal> {
        if id == 0 {
            self.shown = None;
            return Ok(Done::CHANGED);
        }
        if let Some(layout) = layout {
            layout.check()?;
        }
        let layout = match (&self.resource(id)?.pixels, layout) {
            (Pixels::Host { layout, .. }, None) => *layout,
            (Pixels::Guest { size }, Some(layout)) if layout.end() <= *size => layout,
            _ => return Err(Refusal::Parameter),
        };
        if !rect.is_inside(layout.width, layout.height) {
            return Err(Refusal::Parameter);
        }
        self.shown = Some(Shown { id, rect, layout });
        Ok(Done::CHANGED)
    }

    /// What is shown; nothing without a driver, too.
    pub(super) fn raw(&self) -> Option<Raw> {
        let Shown { id, rect, layout } = self.shown?;
        let (resource, memory) = (self.resources.get(&id)?, self.memory.as_ref()?);
        let row = usize::try_from(rect.width * PIXEL).ok()?;
        let mut bytes = vec![0; row * usize::try_from(rect.height).ok()?];
        for (y, row) in (rect.y..).zip(bytes.chunks_exact_mut(row)) {
            resource.row(memory, layout.at(rect.x, y), row);
        }
        let (width, height) = (rect.width, rect.height);
        Some(Raw { width, height, order: order(layout.format)?, bytes })
    }

    pub(super) fn save(&self) -> SavedBoard {
        let saved = |(&id, Resource { pixels, backing }): (&u32, &Resource)| {
            let (image, size) = match pixels {
                Pixels::Host { layout, bytes } => (Some((*layout, bytes.clone())), 0),
                Pixels::Guest { size } => (None, *size),
            };
            SavedResource { id, image, size, entries: backing.as_ref().map(Backing::entries) }
        };
        SavedBoard { resources: self.resources.iter().map(saved).collect(), shown: self.shown }
    }

    /// Makes the board that was saved, as its guest has once made it: a damaged state is refused like a guest's errors.
    pub(super) fn restore(saved: SavedBoard) -> Result<Board, Refusal> {
        let mut board = Board::default();
        for SavedResource { id, image, size, entries } in saved.resources {
            match image {
                Some((layout, content)) => {
                    let packed = Layout::packed(layout.format, layout.width, layout.height);
                    board.create_2d(id, packed)?;
                    match &mut board.resource(id)?.pixels {
                        Pixels::Host { bytes, .. } if bytes.len() == content.len() => {
                            *bytes = content;
                        }
                        _ => return Err(Refusal::Parameter),
                    }
                    if let Some(entries) = entries {
                        board.attach(id, &entries, None)?;
                    }
                }
                None => match entries {
                    Some(entries) => board.create_blob(id, size, &entries, None)?,
                    None => {
                        board.check_new(id)?;
                        let pixels = Pixels::Guest { size };
                        board.resources.insert(id, Resource { pixels, backing: None });
                    }
                },
            }
        }
        if let Some(Shown { id, rect, layout }) = saved.shown {
            let host = matches!(board.resource(id)?.pixels, Pixels::Host { .. });
            board.show(id, rect, (!host).then_some(layout))?;
        }
        Ok(board)
    }
}

/// Takes over what is in `rect` of a resource from the guest's memory, where that part begins at `offset`; the number
/// of bytes. A blob is in the guest's memory anyway.
fn transfer(
    resource: &mut Resource,
    rect: Rect,
    offset: u64,
    memory: &MemoryMap,
) -> Result<usize, Refusal> {
    let Pixels::Host { layout, bytes } = &mut resource.pixels else { return Ok(0) };
    if !rect.is_inside(layout.width, layout.height) {
        return Err(Refusal::Parameter);
    }
    let backing = resource.backing.as_ref().ok_or(Refusal::Unspecified)?;
    let len = usize::try_from(rect.width * PIXEL).unwrap_or(usize::MAX);
    let stride = u64::from(layout.stride);
    for y in 0..rect.height {
        let source = stride.checked_mul(y.into()).and_then(|rows| rows.checked_add(offset));
        let at = usize::try_from(layout.at(rect.x, rect.y + y)).unwrap_or(usize::MAX);
        let row = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..len));
        let (Some(source), Some(row)) = (source, row) else { return Err(Refusal::Parameter) };
        backing.read(memory, source, row);
    }
    Ok(len.saturating_mul(usize::try_from(rect.height).unwrap_or(usize::MAX)))
}
