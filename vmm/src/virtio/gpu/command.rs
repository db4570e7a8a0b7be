//! What the guest asks for and what it is answered (virtio 1.2, 5.7.6).

use std::io;
use std::mem::size_of;

use virtio_bindings::virtio_gpu::{self as wire, VIRTIO_GPU_FLAG_FENCE, VIRTIO_GPU_MAX_SCANOUTS};
use vm_memory::{ByteValued, Le32, Le64};

use super::resource::{Entry, Layout, MAX_ENTRIES, Rect};
use crate::virtio::config_space::config_space;
use crate::virtio::queue::ChainReader;

config_space! {
    /// `struct virtio_gpu_ctrl_hdr`: before each request and each answer.
    pub(super) struct Header {
        kind: Le32,
        flags: Le32,
        fence_id: Le64,
        ctx_id: Le32,
        ring_idx: u8,
        padding: [u8; 3],
    }
}

config_space! {
    /// `struct virtio_gpu_resource_create_2d`, behind the header.
    struct Create2d {
        id: Le32,
        format: Le32,
        width: Le32,
        height: Le32,
    }
}

config_space! {
    /// `struct virtio_gpu_rect`.
    struct WireRect {
        x: Le32,
        y: Le32,
        width: Le32,
        height: Le32,
    }
}

config_space! {
    /// What follows the rectangle in `struct virtio_gpu_transfer_to_host_2d`.
    struct Transfer {
        offset: Le64,
        id: Le32,
        padding: Le32,
    }
}

config_space! {
    /// `struct virtio_gpu_mem_entry`.
    struct WireEntry {
        address: Le64,
        length: Le32,
        padding: Le32,
    }
}

config_space! {
    /// `struct virtio_gpu_resource_create_blob`, behind the header.
    struct CreateBlob {
        id: Le32,
        memory: Le32,
        flags: Le32,
        entries: Le32,
        blob_id: Le64,
        size: Le64,
    }
}

config_space! {
    /// What follows scanout and resource in `struct virtio_gpu_set_scanout_blob`; the first of its four planes.
    struct ScanoutBlob {
        width: Le32,
        height: Le32,
        format: Le32,
        padding: Le32,
        stride: Le32,
        strides: [u8; 12],
        offset: Le32,
    }
}

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    DisplayInfo,
    Create2d {
        id: u32,
        format: u32,
        width: u32,
        height: u32,
    },
    CreateBlob {
        id: u32,
        memory: u32,
        size: u64,
        entries: Vec<Entry>,
    },
    Unref {
        id: u32,
    },
    Attach {
        id: u32,
        entries: Vec<Entry>,
    },
    Detach {
        id: u32,
    },
    Transfer {
        id: u32,
        rect: Rect,
        offset: u64,
    },
    Flush {
        id: u32,
        rect: Rect,
    },
    /// Shows what is in `rect` of a resource, or nothing for resource 0. A blob's layout is said with it.
    Scanout {
        scanout: u32,
        id: u32,
        rect: Rect,
        layout: Option<Layout>,
    },
}

/// Why a request failed: what the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Refusal {
    Unspecified = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_UNSPEC,
    OutOfMemory = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY,
    Scanout = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID,
    Resource = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID,
    Parameter = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER,
}

/// A request that ends too early has no meaning.
impl From<io::Error> for Refusal {
    fn from(_: io::Error) -> Self {
        Refusal::Unspecified
    }
}

impl Header {
    pub(super) fn read(reader: &mut ChainReader<'_>) -> io::Result<Header> {
        reader.read_obj()
    }

    /// The header of the answer: the guest waits for the fence that it sent, whatever became of the request.
    fn answer(&self, kind: u32) -> Header {
        let fence = self.flags.to_native() & VIRTIO_GPU_FLAG_FENCE;
        let (fence_id, ctx_id) = match fence {
            0 => (0.into(), 0.into()),
            _ => (self.fence_id, self.ctx_id),
        };
        let (kind, flags) = (kind.into(), fence.into());
        Header { kind, flags, fence_id, ctx_id, ring_idx: 0, padding: [0; 3] }
    }

    /// The whole answer, if it has no content of its own.
    pub(super) fn plain_answer(&self, outcome: Result<(), Refusal>) -> Vec<u8> {
        let kind = match outcome {
            Ok(()) => wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_NODATA,
            Err(refusal) => refusal as u32,
        };
        self.answer(kind).as_slice().to_vec()
    }

    /// The answer to [`Command::DisplayInfo`]: the first scanout has this size, there are no others.
    pub(super) fn display_info(&self, width: u32, height: u32) -> Vec<u8> {
        let kind = wire::virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_DISPLAY_INFO;
        let mut answer = self.answer(kind).as_slice().to_vec();
        // A rectangle, whether it is enabled, and flags.
        const MODE: usize = size_of::<WireRect>() + 8;
        answer.extend([0, 0, width, height, 1, 0].iter().flat_map(|word: &u32| word.to_le_bytes()));
        answer.resize(size_of::<Header>() + VIRTIO_GPU_MAX_SCANOUTS as usize * MODE, 0);
        answer
    }
}

impl Command {
    /// Reads what follows the header.
    pub(super) fn read(header: &Header, reader: &mut ChainReader<'_>) -> Result<Command, Refusal> {
        use wire::{
            virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_DISPLAY_INFO as GET_DISPLAY_INFO,
            virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING as ATTACH_BACKING,
            virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_2D as CREATE_2D,
            virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB as CREATE_BLOB,
            virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING as DETACH_BACKING,
            virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_FLUSH as FLUSH,
            virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_UNREF as UNREF,
            virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT as SET_SCANOUT,
            virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT_BLOB as SET_SCANOUT_BLOB,
            virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D as TRANSFER,
        };
        Ok(match header.kind.to_native() {
            GET_DISPLAY_INFO => Command::DisplayInfo,
            CREATE_2D => {
                let Create2d { id, format, width, height } = reader.read_obj()?;
                let [id, format, width, height] = [id, format, width, height].map(u32::from);
                Command::Create2d { id, format, width, height }
            }
            CREATE_BLOB => {
                let blob: CreateBlob = reader.read_obj()?;
                let (id, memory) = (blob.id.into(), blob.memory.into());
                let entries = read_entries(blob.entries.into(), reader)?;
                Command::CreateBlob { id, memory, size: blob.size.into(), entries }
            }
            UNREF => Command::Unref { id: word(reader)? },
            ATTACH_BACKING => {
                let (id, count) = (word(reader)?, word(reader)?);
                Command::Attach { id, entries: read_entries(count, reader)? }
            }
            DETACH_BACKING => Command::Detach { id: word(reader)? },
            TRANSFER => {
                let rect = read_rect(reader)?;
                let Transfer { offset, id, .. } = reader.read_obj()?;
                Command::Transfer { id: id.into(), rect, offset: offset.into() }
            }
            FLUSH => {
                let rect = read_rect(reader)?;
                Command::Flush { id: word(reader)?, rect }
            }
            kind @ (SET_SCANOUT | SET_SCANOUT_BLOB) => {
                let rect = read_rect(reader)?;
                let (scanout, id) = (word(reader)?, word(reader)?);
                let layout = match kind {
                    SET_SCANOUT => None,
                    _ => {
                        let blob: ScanoutBlob = reader.read_obj()?;
                        let [width, height] = [blob.width, blob.height].map(u32::from);
                        let [format, stride] = [blob.format, blob.stride].map(u32::from);
                        Some(Layout { format, width, height, stride, offset: blob.offset.into() })
                    }
                };
                Command::Scanout { scanout, id, rect, layout }
            }
            _ => return Err(Refusal::Unspecified),
        })
    }
}

fn word(reader: &mut ChainReader<'_>) -> io::Result<u32> {
    Ok(reader.read_obj::<Le32>()?.into())
}

fn read_rect(reader: &mut ChainReader<'_>) -> io::Result<Rect> {
    let WireRect { x, y, width, height } = reader.read_obj()?;
    let [x, y, width, height] = [x, y, width, height].map(u32::from);
    Ok(Rect { x, y, width, height })
}

fn read_entries(count: u32, reader: &mut ChainReader<'_>) -> Result<Vec<Entry>, Refusal> {
    let room = reader.available_bytes() / size_of::<WireEntry>();
    let count = usize::try_from(count).ok().filter(|count| *count <= MAX_ENTRIES.min(room));
    let entry = |_| {
        let WireEntry { address, length, .. } = reader.read_obj()?;
        Ok(Entry { address: address.into(), length: length.into() })
    };
    (0..count.ok_or(Refusal::Parameter)?).map(entry).collect()
}
