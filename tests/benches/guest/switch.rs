//! The network between guests: pairs of them on firn's switch, and of QEMU's on the one of vde.

use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use firn_bench::monitor::{Devices, Net, find};
use firn_bench::{Guest, OtherMonitor, Sample};
use firn_net_switch::Switch;
use firn_vmm::spec::{Mac, NetSpec};

use super::running::{self, Parts, Running, nanoseconds};
use super::{FIRN, Subject, Way};

/// How many pairs send at once.
const PAIRS: [usize; 3] = [1, 4, 8];
/// What all that send at once have to share: in blocks of 256 KiB, and pings. On one processor more takes minutes.
const BLOCKS: usize = 128;
const PINGS: usize = 200;
const MEMORY_MIB: u64 = 128;
const VDE: &str = ", vde";
const SWITCH: &str = "vde_switch";

pub(crate) struct Pairs;

impl Subject for Pairs {
    fn title(&self) -> String {
        let mib = BLOCKS >> 2;
        format!(
            "Guests on one network, in pairs: {mib} MiB by TCP in all, then {PINGS} pings in all"
        )
    }

    fn ways(&self) -> Vec<Way> {
        let mut ways = vec![Way::firn(FIRN)];
        if find(SWITCH).is_none() {
            eprintln!("{SWITCH} is not installed: QEMU is left out");
            return ways;
        }
        // To boot all guests takes minutes, so there is one machine of QEMU's: the one that nixpkgs has.
        let monitor = OtherMonitor::QemuQ35;
        ways.extend(monitor.find().map(|_| Way::other(format!("{}{VDE}", monitor.as_str()))));
        ways
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(900)
    }

    fn prepare(&self, dir: &Path) -> Result<()> {
        running::prepare(include_str!("switch.sh"), None, dir)
    }

    fn round(&self, way: &str, dir: &Path) -> Result<Sample> {
        match way.strip_suffix(VDE) {
            None => {
                let switch = Switch::new("bench");
                let mut plug = |number: u8, guest: &Guest| {
                    let card = NetSpec { mac: Mac([0x52, 0x54, 0, 0x12, 9, number]) };
                    let spec = serde_json::json!({ "nets": [card] });
                    let port = std::sync::Arc::new(switch.add_port(number.to_string()));
                    Running::firn(guest, Parts { spec, net: Some(port), ..Parts::default() })
                };
                talk(dir, &mut plug)
            }
            Some(monitor) => {
                let monitor = running::other(monitor)?;
                let switch = VdeSwitch::start(dir)?;
                let mut plug = |number: u8, guest: &Guest| {
                    let mac = format!("52:54:00:12:09:{number:02x}");
                    let net = Net::Vde { switch: dir.join(SWITCH), mac };
                    let devices = Devices { net: Some(net), ..Devices::default() };
                    Running::other(monitor, guest, &devices, (dir, &number.to_string()))
                };
                let steps = talk(dir, &mut plug);
                drop(switch);
                steps
            }
        }
    }
}

/// Who sends, and who receives.
type Pair = [Running; 2];

/// Starts a guest, by its number.
type Start<'a> = dyn FnMut(u8, &Guest) -> Result<Running> + 'a;

/// Starts one more pair; its first guest is told where the second is.
fn pair(dir: &Path, start: &mut Start<'_>, first: u8) -> Result<Pair> {
    let mut one = |number: u8, more: &str| {
        let variables = format!("number={number} {more}");
        start(number, &running::guest(dir, MEMORY_MIB, &variables))
    };
    let second = first + 1;
    Ok([one(first, &format!("peer=10.9.0.{second}"))?, one(second, "")?])
}

/// Has more and more pairs talk, until the last is done.
fn talk(dir: &Path, start: &mut Start<'_>) -> Result<Sample> {
    let mut steps = Sample::new();
    let (mut pairs, mut numbers) = (Vec::<Pair>::new(), (1..).step_by(2));
    for count in PAIRS {
        let before = pairs.len();
        for first in numbers.by_ref().take(count - before) {
            pairs.push(pair(dir, start, first)?);
        }
        for guest in pairs[before..].iter().flatten() {
            guest.until("ready")?;
        }
        // Afterwards all have touched the memory that they need for it.
        for [sender, receiver] in &mut pairs[before..] {
            sender.say("stream 8")?;
            receiver.until("received")?;
        }
        let named = |what: &str| match count {
            1 => format!("{what}, 1 pair"),
            _ => format!("{what}, {count} pairs"),
        };
        for (what, say, by, said) in [
            ("stream", format!("stream {}", BLOCKS / count), 1, "received"),
            ("pings", format!("ping {}", PINGS / count), 0, "answered"),
        ] {
            let began = Instant::now();
            for [sender, _] in &mut pairs {
                sender.say(&say)?;
            }
            let ends = pairs.iter().map(|pair| pair[by].until(said));
            let ends = ends.collect::<Result<Vec<_>>>()?;
            let last = ends.into_iter().max().context("there are pairs")?;
            steps.push((named(what), nanoseconds(last - began)));
        }
    }
    Ok(steps)
}

/// A switch of vde, which ends with this. It would end, too, if nobody could say anything more to it.
struct VdeSwitch {
    child: Child,
    _input: Option<ChildStdin>,
}

impl VdeSwitch {
    fn start(dir: &Path) -> Result<Self> {
        let socket = dir.join(SWITCH);
        let mut child = Command::new(SWITCH)
            .arg("-s")
            .arg(&socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run {SWITCH}"))?;
        let input = child.stdin.take();
        let switch = Self { child, _input: input };
        // It says nothing that could be waited for.
        for _ in 0..1000 {
            if socket.join("ctl").exists() {
                return Ok(switch);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        anyhow::bail!("{SWITCH} has no socket")
    }
}

impl Drop for VdeSwitch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
