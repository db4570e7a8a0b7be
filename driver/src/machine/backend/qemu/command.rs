//! What is run: a start script, or firn's own command line, with what the driver adds to either.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use firn_gateway::{CARD_MAC, Forward, Protocol};
use firn_guest_agent::protocol::PORT_NAME;
use firn_vmm::spec::{DiskSpec, Mac, MachineSpec, ScreenKind};
use tokio::process::Command;

use crate::config::{NodeConfig, PortForward};
use crate::machine::Dirs;
use crate::vlan::SOCKET_VARIABLE;

/// What runs firn's own command line.
const PROGRAM: &str = "qemu-system-x86_64";
/// The most that a socket's address holds (`man 7 unix`).
pub(super) const MAX_SOCKET: usize = 107;

/// The sockets that QEMU and the driver meet at, in the machine's state directory.
pub(super) struct Sockets {
    pub(super) qmp: PathBuf,
    pub(super) shell: PathBuf,
    pub(super) agent: PathBuf,
    /// Who serves a vsock comes there.
    pub(super) vsock: PathBuf,
}

impl Sockets {
    pub(super) fn of(state: &Path) -> Self {
        let names = ["qmp", "shell", "agent", "vsock-guest"];
        let [qmp, shell, agent, vsock] = names.map(|name| state.join(name));
        Self { qmp, shell, agent, vsock }
    }

    /// The first whose path is too long for a socket.
    pub(super) fn too_long(&self) -> Option<&Path> {
        let all = [&self.qmp, &self.shell, &self.agent, &self.vsock];
        all.into_iter().find(|path| path.as_os_str().len() > MAX_SOCKET).map(PathBuf::as_path)
    }
}

/// A start command, as the shell has it.
pub(super) fn of_shell(command: &str, added: Vec<OsString>) -> Command {
    // The path of a program takes the shell's place, so that its end is seen as it is.
    let path = command.starts_with('\'') || command.starts_with('/') && !command.contains(' ');
    let exec = if path { "exec " } else { "" };
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(format!("{exec}{command} \"$@\"")).arg("start").args(added);
    shell
}

/// firn's own command line.
pub(super) fn own(mut arguments: Arguments, added: Vec<OsString>) -> Command {
    let mut command = Command::new(PROGRAM);
    arguments.0.extend(added);
    command.args(arguments.0);
    command
}

/// Gives a command the place and the variables that start scripts expect.
pub(super) fn environment<'a>(
    command: &mut Command,
    dirs: &Dirs,
    vlans: impl IntoIterator<Item = (u8, &'a Path)>,
) {
    command.current_dir(&dirs.state);
    command.env("TMPDIR", &dirs.state).env("USE_TMPDIR", "1").env("SHARED_DIR", &dirs.shared);
    for (vlan, directory) in vlans {
        command.env(format!("{SOCKET_VARIABLE}{vlan}"), directory);
    }
}

/// What the driver adds to each command line.
pub(super) fn added(sockets: &Sockets, vsock: bool, may_reboot: bool) -> Vec<OsString> {
    let mut arguments = Arguments::default();
    arguments.add("-qmp", path("unix:", &sockets.qmp, ",server=on,wait=off"));
    // What people would type there goes through the other monitor.
    arguments.add("-monitor", "none");
    arguments.add("-chardev", path("socket,id=shell,path=", &sockets.shell, ""));
    arguments.add("-chardev", path("socket,id=firn-agent,path=", &sockets.agent, ""));
    arguments.add("-device", "virtio-serial").add("-device", "virtconsole,chardev=shell");
    arguments.add("-device", format!("virtserialport,chardev=firn-agent,name={PORT_NAME}"));
    arguments.add("-device", "virtio-rng-pci").add("-serial", "stdio").flag("-nographic");
    if vsock {
        arguments.add("-chardev", path("socket,id=vsock,path=", &sockets.vsock, ",server=on"));
        arguments.add("-device", "vhost-user-vsock-pci,chardev=vsock");
    }
    if !may_reboot {
        arguments.flag("-no-reboot");
    }
    arguments.0
}

/// The command line of a machine that has no start command: what firn's own monitor would build. A share has the socket
/// of who serves it, and `initrd` is all of them in one.
pub(super) fn of_spec(
    spec: &MachineSpec,
    node: &NodeConfig,
    kvm: bool,
    initrd: &Path,
    shares: &[PathBuf],
    vlans: &[PathBuf],
) -> Arguments {
    let mut arguments = Arguments::default();
    arguments.flag("-no-user-config").flag("-nodefaults");
    arguments.add("-name", path("guest=", Path::new(&node.name), ""));
    let accel = if kvm { "kvm" } else { "tcg" };
    arguments.add("-machine", format!("q35,accel={accel},memory-backend=memory"));
    arguments.add("-cpu", "max");
    arguments.add("-smp", spec.cores.get().to_string());
    let memory = format!("{}M", spec.memory.get());
    arguments.add("-m", &memory);
    // Who serves shares reads and writes the guest's memory.
    arguments.add("-object", format!("memory-backend-memfd,id=memory,size={memory},share=on"));
    arguments.add("-kernel", &spec.kernel).add("-append", &spec.cmdline);
    if !spec.initrd.is_empty() {
        arguments.add("-initrd", initrd);
    }
    user_network(&mut arguments, node);
    for (net, directory) in spec.nets.iter().filter(|net| net.mac != Mac(CARD_MAC)).zip(vlans) {
        let id = format!("vlan{}", arguments.0.len());
        arguments.add("-netdev", path(&format!("vde,id={id},sock="), directory, ""));
        arguments.add("-device", format!("virtio-net-pci,netdev={id},mac={}", net.mac));
    }
    for (at, disk) in spec.disks.iter().enumerate() {
        self::disk(&mut arguments, at, disk);
    }
    for (at, (share, socket)) in spec.shares.iter().zip(shares).enumerate() {
        arguments
            .add("-chardev", path(&format!("socket,id=share{at},path="), socket, ",server=on"));
        arguments
            .add("-device", format!("vhost-user-fs-pci,chardev=share{at},tag={}", &*share.tag));
    }
    if spec.balloon {
        arguments.add("-device", "virtio-balloon-pci");
    }
    match &spec.screen {
        None => arguments.add("-vga", "none"),
        Some(screen) => {
            let kind = match screen.kind {
                ScreenKind::Plain => "VGA",
                ScreenKind::Gpu => "virtio-vga",
            };
            let (width, height) = (screen.width.get(), screen.height.get());
            arguments.add("-device", format!("{kind},xres={width},yres={height}"))
        }
    };
    for (wanted, device) in
        [(spec.keyboard, "virtio-keyboard-pci"), (spec.tablet, "virtio-tablet-pci")]
    {
        if wanted {
            arguments.add("-device", device);
        }
    }
    for text in &spec.oem_strings {
        arguments.add("-smbios", path("type=11,value=", Path::new(text), ""));
    }
    arguments
}

fn user_network(arguments: &mut Arguments, node: &NodeConfig) {
    let Some(network) = &node.user_network else { return };
    let mut user = format!("user,id=user.0,hostname={}", node.name);
    if network.restrict {
        user.push_str(",restrict=on");
    }
    for PortForward(forward) in &network.forward_ports {
        user.push_str(&format!(",hostfwd={}", rule(forward)));
    }
    arguments.add("-netdev", user);
    let mac = Mac(CARD_MAC);
    arguments.add("-device", format!("virtio-net-pci,netdev=user.0,mac={mac}"));
}

fn disk(arguments: &mut Arguments, at: usize, disk: &DiskSpec) {
    let read_only = if disk.read_only { ",readonly=on" } else { "" };
    let drive = format!("if=none,id=virtio{at},format={}{read_only},file=", disk.format());
    arguments.add("-drive", path(&drive, &disk.image, ""));
    let serial = disk.serial.as_ref().map_or(String::new(), |serial| {
        let serial: &str = serial;
        format!(",serial={}", serial.replace(',', ",,"))
    });
    arguments.add("-device", format!("virtio-blk-pci,drive=virtio{at}{serial}"));
}

/// A rule of QEMU's user network, `tcp:HOST:PORT-GUEST:PORT`.
pub(super) fn rule(forward: &Forward) -> String {
    let protocol = match forward.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!("{protocol}:{}-{}", forward.host, forward.guest)
}

/// Writes all initrds into one file, as QEMU takes one.
pub(super) fn join(initrds: &[PathBuf], target: &Path) -> io::Result<()> {
    let mut file = fs::File::create(target)?;
    for initrd in initrds {
        let length = io::copy(&mut fs::File::open(initrd)?, &mut file)?;
        // The kernel looks for the next at a multiple of four.
        let rest = usize::try_from(length.next_multiple_of(4) - length).unwrap_or(0);
        file.write_all(&[0; 4][..rest])?;
    }
    Ok(())
}

/// Options of QEMU.
#[derive(Default)]
pub(super) struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, option: &str) -> &mut Self {
        self.0.push(option.into());
        self
    }

    fn add(&mut self, option: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.0.extend([option.into(), value.as_ref().to_owned()]);
        self
    }
}

/// A path in an option's value.
fn path(before: &str, path: &Path, behind: &str) -> OsString {
    let mut value = before.as_bytes().to_vec();
    for &byte in path.as_os_str().as_bytes() {
        value.push(byte);
        if byte == b',' {
            // QEMU takes two commas for one that does not end the value.
            value.push(byte);
        }
    }
    value.extend(behind.as_bytes());
    OsString::from_vec(value)
}
