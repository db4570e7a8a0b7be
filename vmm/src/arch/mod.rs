//! What differs by processor: a folder for each, whose modules have the same names. Nothing outside this module knows
//! which one it is, as `make lint` checks.
//!
//! Another processor is another folder and two lines below. It has to provide:
//!
//! | module | what |
//! | --- | --- |
//! | `layout` | where memory, images and devices lie, and which interrupt lines virtio devices share |
//! | `vcpu` | a VM with its interrupt controller, vCPUs as after power-on; how far it can address; whether a vCPU can still execute anything, where it is, and telling it of a pause |
//! | `entry` | the registers with which the first vCPU enters the kernel |
//! | `kernel` | the image formats: loading one, where it is entered and where its initrd may lie |
//! | `unpack` | taking the kernel out of an image that would unpack itself in the guest |
//! | `params` | what the kernel is given beside its image: command line, initrd, memory map |
//! | `firmware` | the tables that announce devices and say what the machine is |
//! | `board` | the places and interrupts of the devices that are not virtio: serial console, boot timer, panic, power |
//! | `generation` | telling a guest that it goes on from a past that others have too |
//! | `state` | saving and restoring vCPUs, clocks and interrupt controllers, and their state after power-on |
//! | `probe` | a tiny guest whose speed tells whether KVM is of use |
//! | `ArchError` | what can go wrong with all that |
//!
//! Beyond that a folder may have what only callers for this very processor use, such as x86-64's `tsc` for the carrier.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
