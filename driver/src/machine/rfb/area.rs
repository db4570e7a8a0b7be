//! Parts of a picture, and which of them differ between two pictures.

use std::ops::Range;

use firn_vmm::screen::Picture;

/// Pictures are compared in tiles of this many rows and columns.
const TILE: u32 = 32;

/// A rectangle of pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
}

impl Area {
    /// All of a picture.
    pub(super) fn of(picture: &Picture) -> Self {
        Self { x: 0, y: 0, width: picture.width, height: picture.height }
    }

    /// What both have in common, if anything.
    pub(super) fn common(self, other: Self) -> Option<Self> {
        let (x, y) = (self.x.max(other.x), self.y.max(other.y));
        let right = (self.x + self.width).min(other.x + other.width);
        let bottom = (self.y + self.height).min(other.y + other.height);
        let inside = x < right && y < bottom;
        inside.then(|| Self { x, y, width: right - x, height: bottom - y })
    }

    /// The rows of `picture` that are in it, as far as they are there.
    pub(super) fn rows(self, picture: &Picture) -> impl Iterator<Item = &[u8]> {
        self.spans(picture.width).filter_map(|span| picture.rgb.get(span))
    }

    /// Copies what is in it to a picture of the same size.
    pub(super) fn copy(self, from: &Picture, to: &mut Picture) {
        for span in self.spans(from.width) {
            if let (Some(from), Some(to)) = (from.rgb.get(span.clone()), to.rgb.get_mut(span)) {
                to.copy_from_slice(from);
            }
        }
    }

    /// Where its rows are in the bytes of a picture with this width.
    fn spans(self, width: u32) -> impl Iterator<Item = Range<usize>> {
        (self.y..self.y + self.height).map(move |y| {
            let start = 3 * (y as usize * width as usize + self.x as usize);
            start..start + 3 * self.width as usize
        })
    }

    /// The parts of it in which two pictures of equal size differ, from the top; tiles beside each other are one.
    pub(super) fn changed(self, old: &Picture, new: &Picture) -> Vec<Self> {
        let mut changed: Vec<Self> = Vec::new();
        for y in (self.y..self.y + self.height).step_by(TILE as usize) {
            for x in (self.x..self.x + self.width).step_by(TILE as usize) {
                let tile = Self { x, y, width: TILE, height: TILE };
                let Some(tile) = tile.common(self) else { continue };
                if tile.rows(old).eq(tile.rows(new)) {
                    continue;
                }
                match changed.last_mut() {
                    Some(last) if last.y == y && last.x + last.width == x => {
                        last.width += tile.width
                    }
                    _ => changed.push(tile),
                }
            }
        }
        changed
    }
}
