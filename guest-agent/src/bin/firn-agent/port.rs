//! The byte stream to the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use firn_guest_agent::protocol::{Failure, PORT_NAME};
use nix::fcntl::OFlag;
use nix::sys::socket::{self, AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType};

use crate::failure::{Context, failure};

/// The kernel's class of named virtio-console ports (Documentation/ABI: `/sys/class/virtio-ports/.../name`).
const CLASS: &str = "/sys/class/virtio-ports";
/// Where udev links the ports by name.
const LINKS: &str = "/dev/virtio-ports";

/// Where the stream is.
#[derive(Debug, Clone)]
pub enum Place {
    /// A virtio port.
    Port(PathBuf),
    /// A UNIX socket to connect to.
    Socket(PathBuf),
}

impl Default for Place {
    fn default() -> Self {
        Self::Port(Path::new(LINKS).join(PORT_NAME))
    }
}

/// What came of an attempt to open the stream.
pub enum Opening {
    /// It is open, non-blocking.
    Open(OwnedFd),
    /// It is not there yet.
    Absent,
}

impl Place {
    /// Whether the stream belongs to the machine the agent runs in, so that it may power it off.
    pub fn is_machine(&self) -> bool {
        matches!(self, Self::Port(_))
    }

    /// Opens the stream, if it is there.
    pub fn open(&self) -> Result<Opening, Failure> {
        match self {
            Self::Port(path) => open_port(path),
            Self::Socket(path) => {
                let what = || format!("connect to {}", path.display());
                let stream = UnixStream::connect(path).context(what)?;
                stream.set_nonblocking(true).context(what)?;
                Ok(Opening::Open(stream.into()))
            }
        }
    }
}

fn open_port(path: &Path) -> Result<Opening, Failure> {
    match open_device(path) {
        Ok(file) => return Ok(Opening::Open(file.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).context(|| format!("open {}", path.display())),
    }
    // Without udev nobody makes the link, but the name is in sysfs and the node in devtmpfs.
    let name = path
        .strip_prefix(LINKS)
        .map_err(|_| failure(format!("{} does not exist", path.display())))?;
    let Some(device) = find(name) else {
        return Ok(Opening::Absent);
    };
    match open_device(&device) {
        Ok(file) => Ok(Opening::Open(file.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Opening::Absent),
        Err(error) => Err(error).context(|| format!("open {}", device.display())),
    }
}

fn open_device(path: &Path) -> io::Result<File> {
    // Blocking writes would spin in the kernel until the host has taken them (drivers/char/virtio_console.c).
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(path)
}

/// The device node of the port called `name`.
fn find(name: &Path) -> Option<PathBuf> {
    for port in fs::read_dir(CLASS).ok()?.flatten() {
        let found = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if Path::new(found.trim_end()) == name {
            return Some(Path::new("/dev").join(port.file_name()));
        }
    }
    None
}

/// The kernel's own messages about devices: a port is announced when it is there, and again when it has its name.
pub fn device_events() -> Result<OwnedFd, Failure> {
    let what = || "listen for device events".to_owned();
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let kind = SockType::Datagram;
    let socket =
        socket::socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkKObjectUEvent)
            .context(what)?;
    // Group 1 is the kernel's; 2 would be udev's.
    let address = NetlinkAddr::new(0, 1);
    socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket.as_fd()), &address).context(what)?;
    Ok(socket)
}
