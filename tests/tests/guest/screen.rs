//! Screens, keyboards and tablets, as the monitor has them: what guests draw is seen, what is pressed is heard.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use firn::kit::{GuestConfig, Kit, KitName, STORE_TAG, machine_overlay};
use firn_agent_client::{AgentClient, ExecRequest};
use firn_tests::input::{self, END, Event, POWER_KEYS, press};
use firn_tests::{PATIENCE, micro, systemd};
use firn_vmm::Cancel;
use firn_vmm::screen::{Picture, Screen};
use firn_vmm::spec::{
    CachePolicy, ConsolePortSpec, Cores, MachineSpec, ScreenKind, ScreenSpec, ShareSpec,
};
use firn_vmm::virtio::build::Connect;
use firn_vmm::virtio::input::BTN_LEFT;
use firn_vmm::vm::{HostSide, Vm, VmState};

fn spec(dir: &Path, kit: &Kit, name: KitName, screen: ScreenSpec) -> MachineSpec {
    let nothing = GuestConfig {
        hostname: "m".to_owned(),
        hosts: Vec::new(),
        interfaces: Vec::new(),
        dns: Vec::new(),
        mounts: Vec::new(),
    };
    let overlay = dir.join("overlay.cpio");
    fs::write(&overlay, machine_overlay(&nothing).unwrap()).unwrap();
    let store = kit.store().map(|source| ShareSpec {
        read_only: true,
        cache: CachePolicy::Always,
        ..ShareSpec::new(STORE_TAG.try_into().unwrap(), source)
    });
    MachineSpec {
        name: "m".to_owned(),
        cores: Cores::MIN,
        memory: name.default_memory(),
        kernel: kit.vmlinux(),
        initrd: vec![kit.initrd(), overlay],
        cmdline: kit.manifest.cmdline.clone(),
        console_ports: vec![
            ConsolePortSpec { name: None },
            ConsolePortSpec { name: Some("org.firn.agent".to_owned()) },
        ],
        nets: vec![],
        shares: store.into_iter().collect(),
        disks: vec![],
        rng: true,
        balloon: false,
        vsock: None,
        oem_strings: vec![],
        screen: Some(screen),
        keyboard: true,
        tablet: true,
    }
}

/// The other ends of the console's ports: that of the backdoor is not used.
struct Ends(Vec<UnixStream>);

impl Connect for Ends {
    fn console_port(&mut self, _port: &ConsolePortSpec) -> io::Result<UnixStream> {
        self.0.pop().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

struct Guest {
    vm: Vm,
    ends: [UnixStream; 2],
    screen: Arc<dyn Screen>,
}

impl Guest {
    fn new(make: impl FnOnce(HostSide) -> Vm) -> Guest {
        let (agent, agent_guest) = UnixStream::pair().unwrap();
        let (backdoor, backdoor_guest) = UnixStream::pair().unwrap();
        let host = HostSide {
            events: Box::new(|event| eprintln!("{event:?}")),
            serial: Box::new(io::stderr()),
            connect: Box::new(Ends(vec![agent_guest, backdoor_guest])),
            descriptors: 10_000,
            cancel: Cancel::default(),
        };
        let vm = make(host);
        let screen = vm.screen().expect("it has one");
        Guest { vm, ends: [agent, backdoor], screen }
    }

    fn stream(&self) -> tokio::net::UnixStream {
        let stream = self.ends[0].try_clone().unwrap();
        stream.set_nonblocking(true).unwrap();
        tokio::net::UnixStream::from_std(stream).unwrap()
    }

    /// Saves it to a file of its memory, and ends it. Gives the rest of its state, and its screen.
    fn save(mut self, memory: &Path) -> (VmState, Option<Picture>, Arc<dyn Screen>) {
        self.vm.pause();
        let before = self.screen.picture();
        let state = self.vm.save(&File::create_new(memory).unwrap()).unwrap();
        (state, before, self.screen)
    }

    /// Starts it once it was restored.
    async fn goes_on(&mut self, before: &Option<Picture>) -> AgentClient {
        assert_eq!(self.screen.picture(), *before);
        self.vm.start().unwrap();
        AgentClient::reconnect(self.stream()).await.unwrap()
    }

    /// Waits until the screen shows what `wanted` looks for.
    async fn shows(&self, wanted: impl Fn(&Picture) -> bool) -> Picture {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(picture) = self.screen.picture().filter(|picture| wanted(picture)) {
                return picture;
            }
            if Instant::now() > deadline {
                let picture = self.screen.picture();
                if let Some(picture) = &picture {
                    let header = format!("P6 {} {} 255\n", picture.width, picture.height);
                    fs::write("/tmp/screen.ppm", [header.as_bytes(), &picture.rgb].concat())
                        .unwrap();
                }
                panic!("the screen does not show it: {picture:?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn output(agent: &AgentClient, script: &str) -> String {
    let done = agent.exec_collect(ExecRequest::shell(script)).await.unwrap();
    let text = String::from_utf8_lossy(&done.stdout).trim().to_owned();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.exit.success(), "{script}: {:?} {text} {said}", done.exit);
    text
}

/// Letters of the kernel's own font (`font_vga_8x16`), without the empty rows above and below.
const LETTERS: [(char, [u8; 10]); 4] = [
    ('E', [0xfe, 0x66, 0x62, 0x68, 0x78, 0x68, 0x60, 0x62, 0x66, 0xfe]),
    ('H', [0xc6, 0xc6, 0xc6, 0xc6, 0xfe, 0xc6, 0xc6, 0xc6, 0xc6, 0xc6]),
    ('L', [0xf0, 0x60, 0x60, 0x60, 0x60, 0x60, 0x60, 0x62, 0x66, 0xfe]),
    ('O', [0x7c, 0xc6, 0xc6, 0xc6, 0xc6, 0xc6, 0xc6, 0xc6, 0xc6, 0x7c]),
];
/// The console's red and blue.
const RED: [u8; 3] = [0xaa, 0, 0];
const BLUE: [u8; 3] = [0, 0, 0xaa];

/// Whether `text` stands at the beginning of the console's row `row`, red on blue.
fn reads(picture: &Picture, row: usize, text: &str) -> bool {
    let width = usize::try_from(picture.width).unwrap();
    let pixel = |x: usize, y: usize| &picture.rgb[3 * (y * width + x)..][..3];
    text.chars().enumerate().all(|(column, letter)| {
        let (_, rows) = LETTERS.iter().find(|(name, _)| *name == letter).expect("it is known");
        (0..16).all(|y: usize| {
            let bits = y.checked_sub(2).and_then(|y| rows.get(y)).copied().unwrap_or(0);
            (0..8).all(|x| {
                let colour = if bits & 0x80 >> x == 0 { BLUE } else { RED };
                pixel(8 * column + x, 16 * row + y) == colour
            })
        })
    })
}

/// Writes `text` there on the first console, and nothing else.
async fn write(agent: &AgentClient, row: usize, text: &str) {
    let command = format!(
        "printf '\\033[?25l\\033[2J\\033[{};1H\\033[31;44m{text}\\033[0m' >/dev/tty1",
        row + 1
    );
    output(agent, &command).await;
}

fn run(script: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(4 * PATIENCE, script).await.expect("it takes too long");
    });
}

#[test]
fn a_plain_screen_shows_the_console_after_a_reset_a_restore_and_the_end() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let screen = ScreenSpec { height: 600_u64.try_into().unwrap(), ..ScreenSpec::default() };
        let spec = spec(dir.path(), &micro(), KitName::Micro, screen);
        let mut guest = Guest::new(|host| Vm::new(&spec, host).unwrap());
        assert_eq!(guest.screen.picture(), None, "nothing has been drawn");
        for row in [3, 36] {
            guest.vm.start().unwrap();
            let agent = AgentClient::connect(guest.stream()).await.unwrap();
            let before = guest.screen.version();
            write(&agent, row, "HELLO").await;
            let picture = guest.shows(|picture| reads(picture, row, "HELLO")).await;
            assert_eq!((picture.width, picture.height), (1024, 600));
            assert_ne!(guest.screen.version(), before);
            if row == 3 {
                guest.vm.reset().unwrap();
                assert_eq!(guest.screen.picture(), None, "it is new after a reset");
            }
        }
        let memory = dir.path().join("memory");
        let (state, before, screen) = guest.save(&memory);
        assert_eq!(screen.picture(), before, "the last picture outlives the machine");

        let memory = File::open(&memory).unwrap();
        let mut guest = Guest::new(|host| Vm::restore(&spec, host, &state, &memory).unwrap());
        let agent = guest.goes_on(&before).await;
        write(&agent, 0, "HOLE").await;
        guest.shows(|picture| reads(picture, 0, "HOLE")).await;
        guest.vm.pause();
        let mut other = spec.clone();
        other.screen = None;
        let refused = Guest::new(|host| {
            assert!(Vm::restore(&other, host, &state, &memory).is_err());
            guest.vm
        });
        drop(refused);
    });
}

const LEFT_SHIFT: u16 = 42;

async fn listen(agent: &AgentClient, device: &str) {
    output(agent, &input::listen(device)).await;
}

async fn heard(agent: &AgentClient, device: &str, count: usize) -> Vec<Event> {
    input::heard(device, count, async |script| output(agent, script).await).await
}

#[test]
fn a_gpu_shows_the_console_and_keys_and_tablet_are_heard() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let gpu = ScreenSpec { kind: ScreenKind::Gpu, ..ScreenSpec::default() };
        let mut spec = spec(dir.path(), &systemd(), KitName::Systemd, gpu);
        // A login prompt would clear the screen, and take the keys.
        spec.cmdline.push_str(" systemd.mask=getty@tty1.service");
        let mut guest = Guest::new(|host| Vm::new(&spec, host).unwrap());
        guest.vm.start().unwrap();
        let agent = AgentClient::connect(guest.stream()).await.unwrap();
        let ready = "until [ -e /dev/fb0 -a -e /dev/input/event2 -a -e /dev/dri/card0 ]; do \
             sleep 0.1; done; cat /sys/class/graphics/fb0/name; udevadm settle";
        assert_eq!(output(&agent, ready).await, "virtio_gpudrmfb");
        write(&agent, 5, "HELLO").await;
        let picture = guest.shows(|picture| reads(picture, 5, "HELLO")).await;
        assert_eq!((picture.width, picture.height), (1024, 768));
        let version = guest.screen.version();
        write(&agent, 47, "HOLE").await;
        guest.shows(|picture| reads(picture, 47, "HOLE")).await;
        assert_ne!(guest.screen.version(), version);

        // It is saved with a key held.
        listen(&agent, "keyboard").await;
        guest.vm.keyboard().expect("it has one").key(LEFT_SHIFT, true);
        heard(&agent, "keyboard", 2).await;
        let memory = dir.path().join("memory");
        let (state, before, screen) = guest.save(&memory);
        assert_eq!(screen.picture(), None, "its picture was the guest's memory");

        let memory = File::open(&memory).unwrap();
        let mut guest = Guest::new(|host| Vm::restore(&spec, host, &state, &memory).unwrap());
        let agent = guest.goes_on(&before).await;
        assert_eq!(heard(&agent, "keyboard", 4).await, press(LEFT_SHIFT));
        write(&agent, 5, "HELLO").await;
        guest.shows(|picture| reads(picture, 5, "HELLO")).await;
        keys_and_tablet(&mut guest, &agent).await;
    });
}

async fn keys_and_tablet(guest: &mut Guest, agent: &AgentClient) {
    listen(agent, "keyboard").await;
    let keyboard = guest.vm.keyboard().expect("it has one");
    let codes: Vec<u16> = (1..=226).filter(|code| !POWER_KEYS.contains(code)).collect();
    let mut expected = Vec::new();
    // A reader of the kernel's misses what is behind 64 events.
    for some in codes.chunks(8) {
        for &code in some {
            keyboard.key(code, true);
            keyboard.key(code, false);
            expected.extend(press(code));
        }
        heard(agent, "keyboard", expected.len()).await;
    }
    assert_eq!(heard(agent, "keyboard", expected.len()).await, expected);

    // Nothing is held through a pause.
    listen(agent, "keyboard").await;
    keyboard.key(LEFT_SHIFT, true);
    heard(agent, "keyboard", 2).await;
    guest.vm.pause();
    guest.vm.resume();
    assert_eq!(heard(agent, "keyboard", 4).await, press(LEFT_SHIFT));

    listen(agent, "tablet").await;
    let tablet = guest.vm.tablet().expect("it has one");
    tablet.move_to(100, 32767);
    tablet.button(BTN_LEFT, true);
    tablet.button(BTN_LEFT, false);
    tablet.wheel(-1);
    let moved = [(3, 0, 100), (3, 1, 32767), END];
    let expected = [&moved[..], &press(BTN_LEFT), &[(2, 8, -1), END]].concat();
    assert_eq!(heard(agent, "tablet", expected.len()).await, expected);
}
