//! From specs to devices: the same call for each kind.
//!
//! A new device implements [`DeviceSpec`] for its spec beside its own code, and joins the list that
//! [`device_specs`] makes of a machine.

use std::error::Error;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use firn_net_switch::NetPort;

use super::balloon::{BalloonHandle, BalloonSpec};
use super::input::{self, InputHandle};
use super::rng::RngSpec;
use super::{VirtioDevice, blk, console, fs, vsock};
use crate::Cancel;
use crate::memory::window::{Window, Windows};
use crate::screen::Screen;
use crate::spec::{ConsolePortSpec, MachineSpec, NetSpec, ValueError};

/// Connects a machine's devices to the outside: it provides the other end of each as the device is built. By default
/// there is none.
pub trait Connect: Send {
    /// The other end of a port of the console.
    ///
    /// # Errors
    /// There is none.
    fn console_port(&mut self, _port: &ConsolePortSpec) -> io::Result<UnixStream> {
        Err(io::ErrorKind::NotConnected.into())
    }

    /// What a network card is plugged into.
    ///
    /// # Errors
    /// There is nothing.
    fn net(&mut self, _card: &NetSpec) -> io::Result<Arc<dyn NetPort>> {
        Err(io::ErrorKind::NotConnected.into())
    }
}

/// For machines that have no device with another end.
impl Connect for () {}

/// What devices are built from, beside their specs.
pub struct Host<'a> {
    /// Provides their other ends.
    pub connect: &'a mut dyn Connect,
    /// Cancels builds that take long.
    pub cancel: &'a Cancel,
    /// The machine's processors.
    pub cores: u8,
    /// How many descriptors a share may keep open for the guest.
    pub share_descriptors: u64,
    /// How many connections the vsock device may have.
    pub vsock_connections: usize,
    /// Where there is room for images.
    pub windows: Windows,
    /// What disks begin with, in their order, if not with what their images hold.
    pub frozen: std::slice::Iter<'a, blk::DiskCheckpoint>,
}

/// What the host can do with a running device.
#[derive(Clone, Default)]
#[non_exhaustive]
pub enum Handle {
    /// Nothing.
    #[default]
    None,
    /// Set the size of the balloon.
    Balloon(BalloonHandle),
    /// Press keys, or move the pointer.
    Input(input::Kind, InputHandle),
    /// Put the disk back to earlier contents.
    Disk(blk::DiskHandle),
    /// Look at the screen.
    Screen(Arc<dyn Screen>),
    /// Let the guest read an image.
    Window(Arc<Window>),
}

impl Handle {
    /// The image that the guest may read, if it is one.
    #[must_use]
    pub fn window(&self) -> Option<Arc<Window>> {
        match self {
            Self::Window(window) => Some(Arc::clone(window)),
            _ => None,
        }
    }
}

/// A device and the host's handle on it.
pub type Built = (Box<dyn VirtioDevice>, Handle);

/// A device could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The spec is wrong.
    #[error("`{key}` of a {device}: {problem}")]
    Spec {
        /// The kind of device.
        device: &'static str,
        /// The key of its spec.
        key: &'static str,
        /// What is wrong with its value.
        problem: ValueError,
    },
    /// A console cannot be served.
    #[error("console")]
    Console(#[from] console::ConsoleError),
    /// A share cannot be served.
    #[error(transparent)]
    Share(#[from] fs::FsError),
    /// A share cannot be given to the guest as an image.
    #[error("share {tag:?}")]
    Image {
        /// The share.
        tag: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// There is no room for a share as an image, on the host or in the guest: by virtio-fs it can be given.
    #[error("share {tag:?}")]
    NoRoom {
        /// The share.
        tag: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] blk::BlkError),
    /// A vsock device cannot be served.
    #[error(transparent)]
    Vsock(#[from] vsock::VsockError),
    /// The host lacks something it needs.
    #[error("{device}")]
    Host {
        /// The kind of device.
        device: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl BuildError {
    /// For the share `tag`.
    pub(crate) fn no_room(tag: &str, source: impl Error + Send + Sync + 'static) -> Self {
        Self::NoRoom { tag: tag.to_owned(), source: source.into() }
    }

    /// For `device`, which the host refused something.
    pub(super) fn host(device: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { device, source }
    }
}

/// One device, before it exists.
pub trait DeviceSpec {
    /// Checks what can be checked without touching anything: called for all devices of a machine before the first one
    /// is built.
    ///
    /// # Errors
    /// It cannot be built as specified.
    fn check(&self) -> Result<(), BuildError> {
        Ok(())
    }

    /// Creates the device and everything on the host that it needs.
    ///
    /// # Errors
    /// Something it needs is not available.
    fn build(&self, host: &mut Host<'_>) -> Result<Built, BuildError>;
}

/// All devices of a machine, in the order in which the guest finds them.
pub fn device_specs(machine: &MachineSpec) -> Vec<&dyn DeviceSpec> {
    let mut specs: Vec<&dyn DeviceSpec> = Vec::new();
    if !machine.console_ports.is_empty() {
        specs.push(&machine.console_ports);
    }
    if machine.rng {
        specs.push(&RngSpec);
    }
    specs.extend(machine.nets.iter().map(|spec| spec as &dyn DeviceSpec));
    specs.extend(machine.shares.iter().map(|spec| spec as &dyn DeviceSpec));
    specs.extend(machine.disks.iter().map(|spec| spec as &dyn DeviceSpec));
    specs.extend(machine.vsock.iter().map(|spec| spec as &dyn DeviceSpec));
    if machine.balloon {
        specs.push(&BalloonSpec);
    }
    if machine.plain_screen().is_none() {
        specs.extend(machine.screen.iter().map(|spec| spec as &dyn DeviceSpec));
    }
    if machine.keyboard {
        specs.push(&input::Kind::Keyboard);
    }
    if machine.tablet {
        specs.push(&input::Kind::Tablet);
    }
    specs
}
