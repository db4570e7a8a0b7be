//! Going back in time: a machine returns to an earlier state of its own, as often as wanted.

use std::io;

use super::{HostSide, Phase, Vm, VmError, VmState, build, host, kvm};
use crate::arch::generation;
use crate::memory;
use crate::memory::checkpoint::MemoryCheckpoint;
use crate::spec::MachineSpec;
use crate::virtio::blk::{DiskCheckpoint, DiskHandle};
use crate::virtio::build::Handle;

/// What a machine was at some time. Checkpoints are a stack: going back to one ends all later ones.
pub struct Checkpoint {
    pub(super) state: VmState,
    pub(super) memory: MemoryCheckpoint,
    /// In the order of the disks.
    pub(super) disks: Vec<DiskCheckpoint>,
}

impl Vm {
    /// Keeps what a paused machine is: processors, devices, memory and disks. The first time its memory is copied,
    /// later only what has changed since. Files of shares, and what others have in their ends of sockets, is not part
    /// of it. The machine may go on.
    ///
    /// # Errors
    /// It is not paused, KVM refuses, or there is no room for memory or disks; the machine is as it was.
    pub fn checkpoint(&mut self) -> Result<Checkpoint, VmError> {
        let state = self.state()?;
        let mut disks = Vec::new();
        match self.keep(&mut disks) {
            Ok(memory) => Ok(Checkpoint { state, memory, disks }),
            Err(error) => {
                self.give_up_disks(&disks);
                Err(error)
            }
        }
    }

    /// Gives up a checkpoint since which the machine has been paused: its disks are as they were before.
    pub fn give_up(&self, checkpoint: &Checkpoint) {
        self.give_up_disks(&checkpoint.disks);
    }

    fn give_up_disks(&self, kept: &[DiskCheckpoint]) {
        for (disk, kept) in self.disks().zip(kept) {
            disk.give_up(kept);
        }
    }

    /// Keeps memory and, in `disks`, the disks, as far as it comes.
    fn keep(&mut self, disks: &mut Vec<DiskCheckpoint>) -> Result<MemoryCheckpoint, VmError> {
        for disk in self.disks() {
            disks.push(disk.checkpoint().map_err(host("cannot keep what a disk holds"))?);
        }
        let memories = build::memories(&self.memory, self.frame_buffer.as_ref());
        self.backing.checkpoint(&memories).map_err(host("cannot keep guest memory"))
    }

    /// Builds another machine that begins with what this checkpoint's was, and shares with it what neither changes:
    /// memory, and what is on disks; [`Vm::start`] lets it go on. `spec` is that of the checkpoint's machine, but may
    /// name other places on the host: sockets, and copies of what it shares. Its disks take nothing from the images
    /// that it names and leave nothing there. For its guest no time has passed, and it
    /// is told to draw fresh entropy.
    ///
    /// The checkpoint has to outlive it, and the machine of the checkpoint cannot end with [`Vm::stop`] before it does
    /// without losing what was written to its disks since its first checkpoint.
    ///
    /// # Errors
    /// As for [`Vm::restore`].
    pub fn fork(spec: &MachineSpec, host_side: HostSide, from: &Checkpoint) -> Result<Vm, VmError> {
        Vm::begin_with(spec, host_side, &from.disks, &from.memory, &from.state)
    }

    /// Builds a machine in a state, with what disks, if any are given, and memory hold.
    pub(super) fn begin_with(
        spec: &MachineSpec,
        host_side: HostSide,
        disks: &[DiskCheckpoint],
        held: &MemoryCheckpoint,
        state: &VmState,
    ) -> Result<Vm, VmError> {
        build::check(spec)?;
        let memory = memory::allocate(spec.memory.get())?;
        let frame_buffer = build::frame_buffer(spec)?;
        let mut vm = Vm::assemble(spec, host_side, memory, frame_buffer, disks)?;
        vm.boots = false;
        let memories = build::memories(&vm.memory, vm.frame_buffer.as_ref());
        vm.backing.roll_back(&memories, held).map_err(host("cannot map guest memory"))?;
        vm.apply(state, 0)?;
        generation::write(&vm.memory)
            .map_err(|error| host("cannot write guest memory")(io::Error::other(error)))?;
        generation::announce(&vm.vm).map_err(kvm("KVM_IRQ_LINE"))?;
        Ok(vm)
    }

    /// Makes the machine, whatever became of it meanwhile, what it was at a checkpoint of its own; [`Vm::start`] lets
    /// it go on from there. For its guest no time has passed. Connections of its vsock end, and what the host has sent
    /// to its consoles and the guest has not taken is lost. Not after [`Vm::stop`].
    ///
    /// # Errors
    /// The checkpoint is gone, because the machine went back to an earlier one: it goes on as it is then. KVM or the
    /// host refuse: it is stopped.
    pub fn roll_back(&mut self, to: &Checkpoint) -> Result<(), VmError> {
        let there = self.disks().zip(&to.disks).all(|(disk, checkpoint)| disk.has(checkpoint));
        if self.phase == Phase::Stopped || !there {
            let problem =
                if there { "it has been stopped" } else { "it went back to an earlier checkpoint" };
            let (machine, problem) = (self.spec.name.clone(), problem.to_owned());
            return Err(VmError::Saved { machine, problem });
        }
        self.end_vcpus();
        let done = self.go_back(to);
        match done {
            Ok(()) => self.phase = Phase::Built,
            Err(_) => self.stop(),
        }
        done
    }

    fn go_back(&mut self, to: &Checkpoint) -> Result<(), VmError> {
        for transport in &self.transports {
            transport.reset();
        }
        let memories = build::memories(&self.memory, self.frame_buffer.as_ref());
        self.backing.roll_back(&memories, &to.memory).map_err(host("cannot put memory back"))?;
        for (disk, checkpoint) in self.disks().zip(&to.disks) {
            disk.roll_back(checkpoint).map_err(host("cannot put a disk back"))?;
        }
        self.apply(&to.state, 0)?;
        self.group.rearm();
        self.boots = false;
        Ok(())
    }

    /// Leaves in the images of its disks what they hold.
    pub(super) fn merge_disks(&self) {
        for disk in self.disks() {
            if let Err(error) = disk.merge() {
                tracing::error!(machine = self.spec.name, %error, "a disk's image lacks what was written last");
            }
        }
    }

    pub(super) fn disks(&self) -> impl Iterator<Item = &DiskHandle> {
        self.handles.iter().filter_map(|handle| match handle {
            Handle::Disk(disk) => Some(disk),
            _ => None,
        })
    }
}
