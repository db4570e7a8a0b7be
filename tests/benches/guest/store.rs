//! A tree that nobody changes, from a directory in memory: of the systemd kit's store its programs, the libraries, and
//! Python. It is served by firn's own server, as an image in the guest's memory, and by virtiofsd, to firn and to others.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use firn_bench::monitor::{Devices, Share, find};
use firn_bench::{OtherMonitor, Sample};
use firn_tests::{micro, systemd};
use firn_vmm::spec::{CachePolicy, ShareSpec};
use firn_vmm::virtio::fs::ShareServer;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Uid;

use super::running::{self, Parts, Running};
use super::{FIRN, Subject, Way};

const MEMORY_MIB: u64 = 512;
const TAG: &str = "store";
/// What of a kit's store is shared: 2,000 files of 120 MB. With all of it, the slowest ways would take twice as long.
const PARTS: [&str; 3] = ["bin", "lib/python3.13", "lib/x86_64-linux-gnu"];
const IMAGE: &str = "firn, image";
const IN_FIRN: &str = "firn, virtiofsd";
/// virtiofsd as a library, which firn has, and as a program.
const LIBRARY: &str = ", virtiofsd";
const PROGRAM: &str = ", installed virtiofsd";

pub(crate) struct Store;

impl Subject for Store {
    fn title(&self) -> String {
        "A store of 2,000 files, 120 MB, from the host's memory".to_owned()
    }

    fn ways(&self) -> Vec<Way> {
        let mut ways: Vec<_> = [FIRN, IMAGE, IN_FIRN].map(Way::firn).into();
        let mut add = |monitor: OtherMonitor, server: &str| {
            if monitor.find().is_some() {
                ways.push(Way::other(format!("{}{server}", monitor.as_str())));
            }
        };
        add(OtherMonitor::QemuQ35, LIBRARY);
        add(OtherMonitor::QemuMicrovm, LIBRARY);
        if virtiofsd().is_some() {
            add(OtherMonitor::QemuQ35, PROGRAM);
            // It wants a server that listens.
            add(OtherMonitor::CloudHypervisor, PROGRAM);
        }
        ways
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(600)
    }

    fn prepare(&self, dir: &Path) -> Result<()> {
        running::prepare(include_str!("store.sh"), None, dir)?;
        let source = systemd().store().context("the kit has a store")?.join("debian/usr");
        for part in PARTS {
            let target = dir.join(TAG).join("usr").join(part);
            std::fs::create_dir_all(target.parent().context("it has one")?)?;
            let copied =
                Command::new("cp").arg("-a").arg(source.join(part)).arg(&target).status()?;
            ensure!(copied.success(), "{} cannot be copied", source.display());
        }
        Ok(())
    }

    fn round(&self, way: &str, dir: &Path) -> Result<Sample> {
        // virtiofsd opens each file that a guest remembers.
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        let socket = dir.join("share.sock");
        match (way, way.strip_suffix(PROGRAM), way.strip_suffix(LIBRARY)) {
            (FIRN, ..) => by_firn(&share(dir, true), dir),
            (IMAGE, ..) => by_firn(&ShareSpec { image: true, ..share(dir, true) }, dir),
            // The store's own server is for what is read-only.
            (IN_FIRN, ..) => by_firn(&share(dir, false), dir),
            (_, Some(monitor), _) => {
                let _server = Program::start(dir, &socket)?;
                by_other(monitor, socket, true, dir)
            }
            (_, _, Some(monitor)) => {
                let _ = std::fs::remove_file(&socket);
                let _server = ShareServer::start(&share(dir, false), 10_000, socket.clone())?;
                by_other(monitor, socket, false, dir)
            }
            _ => by_other(way, socket, false, dir),
        }
    }
}

fn share(dir: &Path, read_only: bool) -> ShareSpec {
    let share = ShareSpec::new(TAG.try_into().expect("a tag"), dir.join(TAG));
    ShareSpec { read_only, cache: CachePolicy::Always, ..share }
}

fn by_firn(share: &ShareSpec, dir: &Path) -> Result<Sample> {
    let initrd = share.image.then(|| micro().image_drivers());
    let spec = serde_json::json!({ "shares": [share] });
    let guest = running::guest(dir, MEMORY_MIB, "");
    Running::firn(&guest, Parts { spec, initrd, net: None })?.steps()
}

fn by_other(monitor: &str, socket: PathBuf, server_listens: bool, dir: &Path) -> Result<Sample> {
    let share = Share { tag: TAG.to_owned(), socket, server_listens };
    let devices = Devices { share: Some(share), ..Devices::default() };
    let guest = running::guest(dir, MEMORY_MIB, "");
    Running::other(running::other(monitor)?, &guest, &devices, (dir, monitor))?.steps()
}

/// The program, which distributions do not have where programs are looked for.
fn virtiofsd() -> Option<PathBuf> {
    let places = ["/usr/libexec", "/usr/lib/qemu"].map(|dir| Path::new(dir).join("virtiofsd"));
    find("virtiofsd").or_else(|| places.into_iter().find(|program| program.is_file()))
}

/// virtiofsd as a process, which ends with this.
struct Program(Child);

impl Program {
    fn start(dir: &Path, socket: &Path) -> Result<Self> {
        let program = virtiofsd().context("it is not installed")?;
        let _ = std::fs::remove_file(socket);
        let sandbox = if Uid::effective().is_root() { "chroot" } else { "none" };
        let source = dir.join(TAG);
        let options =
            format!("source={},cache=always,sandbox={sandbox},log_level=err", source.display());
        let child = Command::new(&program)
            .arg("-f")
            .arg(format!("--socket-path={}", socket.display()))
            .args(["-o", &options])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let server = Self(child);
        // It says nothing that could be waited for.
        for _ in 0..1000 {
            if socket.exists() {
                return Ok(server);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        anyhow::bail!("{} does not listen", program.display())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
