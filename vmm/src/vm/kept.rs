//! Checkpoints in files, for another process to go on from.
//!
//! ```text
//! state     processors and devices, and where the parts of the other files belong; postcard
//! memory    what is not zero of it
//! disk0 …   the same of each disk that can be written
//! ```

use std::fs::File;
use std::io::{self, Read, Write};

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::{Checkpoint, HostSide, Vm, VmError, VmState, build, host, kvm};
use crate::arch::state::fingerprint as fingerprint_of_host;
use crate::extents::Extents;
use crate::memory::checkpoint::MemoryCheckpoint;
use crate::spec::MachineSpec;
use crate::virtio::blk;
use crate::virtio::build::BuildError;

/// Layout version of these files. [`VmState`] has its own, and so has each device.
const VERSION: u32 = 1;
/// The largest state that is read, in bytes.
const MAX_STATE: u64 = 256 << 20;

/// The file `state`: its version, then [`Parts`].
#[derive(Serialize, Deserialize)]
struct Parts<S> {
    state: S,
    memory: Extents,
    /// None of those that are only read.
    disks: Vec<Option<Extents>>,
}

impl Vm {
    /// Writes a checkpoint of this machine to files, which `create` makes by their names; [`KeptVm::read`] reads
    /// them. The machine may run meanwhile. What its read-only disks hold is not written.
    ///
    /// # Errors
    /// The files cannot be written; the machine went back to an earlier checkpoint.
    pub fn write_checkpoint(
        &self,
        checkpoint: &Checkpoint,
        create: &mut dyn FnMut(&str) -> io::Result<File>,
    ) -> Result<(), VmError> {
        self.write_parts(checkpoint, create).map_err(host("cannot write a checkpoint"))
    }

    fn write_parts(
        &self,
        checkpoint: &Checkpoint,
        create: &mut dyn FnMut(&str) -> io::Result<File>,
    ) -> io::Result<()> {
        let memory = checkpoint.memory.write(&create("memory")?)?;
        let mut disks = Vec::new();
        let all = self.disks().zip(&self.spec.disks).zip(&checkpoint.disks);
        for (index, ((disk, spec), kept)) in all.enumerate() {
            if !disk.has(kept) {
                return Err(io::Error::other("the machine went back to an earlier checkpoint"));
            }
            disks.push(match spec.read_only {
                true => None,
                false => Some(disk.write(kept, &create(&disk_name(index))?)?),
            });
        }
        let parts = Parts { state: &checkpoint.state, memory, disks };
        let mut file = create("state")?;
        file.write_all(&VERSION.to_le_bytes())?;
        file.write_all(&postcard::to_stdvec(&parts).map_err(io::Error::other)?)
    }
}

/// The files of a machine that was kept.
pub struct KeptVm {
    parts: Parts<VmState>,
    memory: MemoryCheckpoint,
    /// None of those that are only read.
    disks: Vec<Option<File>>,
}

impl KeptVm {
    /// Reads what [`Vm::write_checkpoint`] has written, from files that `open` opens by their names. Memory that lies
    /// in a file that nobody may write is mapped, and that file may only be removed then. Otherwise it is copied:
    /// whatever becomes of the file cannot hurt the machine.
    ///
    /// # Errors
    /// A file is missing, damaged or of another version; there is no room for the memory.
    pub fn read(open: &mut dyn FnMut(&str) -> io::Result<File>) -> Result<Self, VmError> {
        Self::read_parts(open).map_err(host("cannot read a checkpoint"))
    }

    fn read_parts(open: &mut dyn FnMut(&str) -> io::Result<File>) -> io::Result<Self> {
        let mut text = Vec::new();
        open("state")?.take(MAX_STATE).read_to_end(&mut text)?;
        let (version, parts) = text.split_first_chunk().unwrap_or((&[0; 4], &[]));
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            let problem = format!("it has version {version}, this firn reads version {VERSION}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        let parts: Parts<VmState> = postcard::from_bytes(parts).map_err(io::Error::other)?;
        let memory = MemoryCheckpoint::read(&parts.memory, open("memory")?)?;
        let disk = |(index, extents): (usize, &Option<Extents>)| {
            extents.as_ref().map(|_| open(&disk_name(index))).transpose()
        };
        let disks = parts.disks.iter().enumerate().map(disk).collect::<io::Result<_>>()?;
        Ok(Self { parts, memory, disks })
    }
}

impl Vm {
    /// Builds a machine that begins with what a kept one was; [`Vm::start`] lets it go on. `spec` is that of the kept
    /// one, but may name other places on the host. The images of disks that can be written are made, where nothing is
    /// yet. For its guest no time has passed.
    ///
    /// # Errors
    /// As for [`Vm::restore`]; an image is there.
    pub fn go_on(spec: &MachineSpec, host_side: HostSide, from: &KeptVm) -> Result<Vm, VmError> {
        build::check(spec)?;
        let parts = &from.parts;
        if spec.disks.len() != parts.disks.len() {
            let problem = "its state has other disks than its spec".to_owned();
            return Err(VmError::Saved { machine: spec.name.clone(), problem });
        }
        for ((disk, extents), file) in spec.disks.iter().zip(&parts.disks).zip(&from.disks) {
            if let (Some(extents), Some(file)) = (extents, file) {
                blk::make_image(disk, extents, file).map_err(BuildError::from)?;
            }
        }
        Vm::begin_with(spec, host_side, &[], &from.memory, &parts.state)
    }
}

/// What going on from a checkpoint needs of the host, as bytes that mean nothing but whether two hosts are alike: their
/// processors, KVM's features, and what this firn writes.
///
/// # Errors
/// There is no KVM.
pub fn fingerprint() -> Result<Vec<u8>, VmError> {
    let mut bytes = fingerprint_of_host(&Kvm::new().map_err(kvm("open /dev/kvm"))?)?;
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(super::state::VERSION.to_le_bytes());
    Ok(bytes)
}

fn disk_name(index: usize) -> String {
    format!("disk{index}")
}
