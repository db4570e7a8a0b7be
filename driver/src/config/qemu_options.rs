//! The QEMU options that NixOS start scripts take from the environment. The few that apply to firn are honoured; all
//! others are errors, rather than starting a machine that is not what was asked for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use firn_gateway::{Forward, GUEST_V4, Protocol, Side};
use firn_vmm::spec::{Cores, MemoryMib, ScreenKind, ScreenSpec, ValueError};

use super::screen::ScreenChoice;

/// What QEMU options change about a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Overrides {
    pub(super) memory: Option<MemoryMib>,
    pub(super) cores: Option<Cores>,
    pub(super) screen: ScreenChoice,
    pub(super) keyboard: bool,
    pub(super) tablet: bool,
}

/// An option that cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadOption {
    #[error(transparent)]
    Foreign(#[from] Foreign),
    #[error("{option} {error}")]
    Value { option: &'static str, error: ValueError },
}

/// An option that does not apply to firn.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{is}` is not for firn; allowed: {allowed}")]
pub(super) struct Foreign {
    is: String,
    allowed: &'static str,
}

const OPTIONS: &str = "`-m SIZE`, `-smp CORES`, `-cpu host`, `-cpu max`, `-nographic`, `-display none`, `-enable-kvm`, \
                       `-vga std`, `-vga virtio`, `-vga none`, `-usb`, and `-device` with VGA, virtio-gpu-pci or virtio-vga \
                       (`,xres=…,yres=…` behind them), virtio-keyboard-pci, usb-kbd, virtio-tablet-pci, usb-tablet";
const NET_OPTIONS: &str = "`hostfwd=tcp:HOST:PORT-GUEST:PORT` or with udp, where both addresses may be missing, \
                           and `restrict=on`";

/// Parses QEMU options, as in QEMU_OPTS.
pub(super) fn options(text: &str) -> Result<Overrides, BadOption> {
    let value_of = |option| move |error| BadOption::Value { option, error };
    let mut words = text.split_whitespace();
    let mut overrides = Overrides::default();
    while let Some(word) = words.next() {
        let foreign = |value: &str| Foreign {
            is: format!("{word} {value}").trim_end().to_owned(),
            allowed: OPTIONS,
        };
        if matches!(word, "-nographic" | "-enable-kvm" | "-usb") {
            continue;
        }
        let value = words.next().unwrap_or_default();
        match (word, value) {
            ("-m", size) => {
                let memory = mebibytes(size).ok_or_else(|| foreign(value))?;
                overrides.memory = Some(memory.try_into().map_err(value_of("-m"))?);
            }
            ("-smp", cores) => {
                let cores: u64 = cores.parse().map_err(|_| foreign(value))?;
                overrides.cores = Some(cores.try_into().map_err(value_of("-smp"))?);
            }
            ("-cpu", "host" | "max") | ("-display", "none") => {}
            ("-vga", "std") => overrides.screen = screen(ScreenKind::Plain),
            ("-vga", "virtio") => overrides.screen = screen(ScreenKind::Gpu),
            // The graphics card may be a separate device.
            ("-vga", "none") => overrides.screen = overrides.screen.or(ScreenChoice::No),
            ("-device", device) => {
                add(&mut overrides, device)?.ok_or_else(|| foreign(value))?;
            }
            _ => return Err(foreign(value).into()),
        }
    }
    Ok(overrides)
}

/// A screen of this kind, in the default size.
fn screen(kind: ScreenKind) -> ScreenChoice {
    ScreenChoice::Yes(ScreenSpec { kind, ..ScreenSpec::default() })
}

/// Adds a device in QEMU's notation; None if it does not apply to firn.
fn add(overrides: &mut Overrides, device: &str) -> Result<Option<()>, BadOption> {
    let mut words = device.split(',');
    // The bus it is plugged into and its id in QEMU are invisible to the guest.
    let own =
        |word: &&str| !["id=", "bus=", "addr=", "port="].iter().any(|key| word.starts_with(key));
    let kind = match words.next().unwrap_or_default() {
        "VGA" | "bochs-display" => ScreenKind::Plain,
        "virtio-gpu" | "virtio-gpu-pci" | "virtio-gpu-device" | "virtio-vga" => ScreenKind::Gpu,
        input => {
            let added = match input {
                "virtio-keyboard" | "virtio-keyboard-pci" | "usb-kbd" => &mut overrides.keyboard,
                "virtio-tablet" | "virtio-tablet-pci" | "usb-tablet" => &mut overrides.tablet,
                _ => return Ok(None),
            };
            *added = true;
            return Ok(words.all(|word| !own(&word)).then_some(()));
        }
    };
    let mut spec = ScreenSpec { kind, ..ScreenSpec::default() };
    for word in words.filter(own) {
        let (option, pixels) = match word.split_once('=') {
            Some(("xres", pixels)) => ("xres", pixels),
            Some(("yres", pixels)) => ("yres", pixels),
            _ => return Ok(None),
        };
        let Ok(number) = pixels.parse::<u64>() else { return Ok(None) };
        let number = number.try_into().map_err(|error| BadOption::Value { option, error })?;
        let side = if option == "xres" { &mut spec.width } else { &mut spec.height };
        *side = number;
    }
    overrides.screen = ScreenChoice::Yes(spec);
    Ok(Some(()))
}

/// A size in QEMU's notation; MiB if it has no unit.
fn mebibytes(size: &str) -> Option<u64> {
    let unit = |letters: [char; 2], mebibytes: u64| {
        let number: u64 = size.strip_suffix(letters)?.parse().ok()?;
        number.checked_mul(mebibytes)
    };
    size.parse().ok().or_else(|| unit(['M', 'm'], 1)).or_else(|| unit(['G', 'g'], 1024))
}

/// What options of QEMU's user network set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NetOptions {
    pub(super) restrict: Option<bool>,
    pub(super) forwards: Vec<Forward>,
}

/// Parses options of QEMU's user network, as in QEMU_NET_OPTS: separated by commas.
pub(super) fn net_options(text: &str) -> Result<NetOptions, BadOption> {
    let mut options = NetOptions::default();
    for option in text.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("restrict", "on" | "yes" | "y")) => options.restrict = Some(true),
            Some(("restrict", "off" | "no" | "n")) => options.restrict = Some(false),
            Some(("hostfwd", rule)) if let Some(forward) = forward(rule) => {
                options.forwards.push(forward);
            }
            _ => return Err(Foreign { is: option.to_owned(), allowed: NET_OPTIONS }.into()),
        }
    }
    Ok(options)
}

/// Parses `[tcp|udp]:[HOST]:PORT-[GUEST]:PORT`.
pub(crate) fn forward(rule: &str) -> Option<Forward> {
    let (protocol, rest) = rule.split_once(':')?;
    let protocol = match protocol {
        "tcp" | "" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    let (host, guest) = rest.split_once('-')?;
    let end = |text: &str, default: Ipv4Addr| {
        let (address, port) = text.split_once(':')?;
        let address: IpAddr =
            if address.is_empty() { default.into() } else { address.parse().ok()? };
        Some(SocketAddr::new(address, port.parse().ok()?))
    };
    let (host, guest) = (end(host, Ipv4Addr::LOCALHOST)?, end(guest, GUEST_V4)?);
    (guest.port() != 0).then_some(Forward { from: Side::Host, protocol, host, guest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_a_machine() {
        for (text, memory_mib, cores) in [
            ("", None, None),
            ("  -nographic -display none\n-cpu max -enable-kvm", None, None),
            ("-m 2048 -smp 4", Some(2048), Some(4)),
            ("-m 512M", Some(512), None),
            ("-m 1G -m 2g", Some(2048), None),
        ] {
            let memory = memory_mib.map(|mib: u64| mib.try_into().expect("in range"));
            let cores = cores.map(|cores: u64| cores.try_into().expect("in range"));
            let wanted = Overrides { memory, cores, ..Overrides::default() };
            assert_eq!(options(text), Ok(wanted), "{text}");
        }
    }

    #[test]
    fn screens_and_what_is_typed_on() {
        let sized = |kind, width: u64, height: u64| {
            let side = |pixels: u64| pixels.try_into().expect("in range");
            ScreenChoice::Yes(ScreenSpec { kind, width: side(width), height: side(height) })
        };
        let (plain, gpu) = (screen(ScreenKind::Plain), screen(ScreenKind::Gpu));
        for (text, screen, keyboard, tablet) in [
            ("-usb -device usb-tablet,bus=usb-bus.0", ScreenChoice::Unsaid, false, true),
            ("-device virtio-keyboard", ScreenChoice::Unsaid, true, false),
            ("-vga std -device usb-kbd,id=k", plain, true, false),
            ("-vga none", ScreenChoice::No, false, false),
            ("-vga virtio -device virtio-tablet-pci", gpu, false, true),
            ("-device virtio-gpu-pci -vga none", gpu, false, false),
            (
                "-vga none -device virtio-gpu-pci,xres=720,yres=1440",
                sized(ScreenKind::Gpu, 720, 1440),
                false,
                false,
            ),
            ("-device VGA,xres=800", sized(ScreenKind::Plain, 800, 768), false, false),
        ] {
            let wanted = Overrides { screen, keyboard, tablet, ..Overrides::default() };
            assert_eq!(options(text), Ok(wanted), "{text}");
        }
        let error = options("-device VGA,yres=5000").expect_err("too high").to_string();
        assert!(
            error.starts_with("yres 5000 cannot be used; allowed: 64 to 4096 pixels"),
            "{error}"
        );
    }

    #[test]
    fn what_is_qemus() {
        for (text, is) in [
            ("-nographic -vga qxl", "-vga qxl"),
            ("-display gtk", "-display gtk"),
            ("-device virtio-gpu-gl-pci", "-device virtio-gpu-gl-pci"),
            ("-device virtio-gpu-pci,blob=true", "-device virtio-gpu-pci,blob=true"),
            ("-device VGA,xres=wide", "-device VGA,xres=wide"),
            ("-device usb-kbd,serial=1", "-device usb-kbd,serial=1"),
            ("-device", "-device"),
            ("-snapshot", "-snapshot"),
            ("-m", "-m"),
            ("-m 2T", "-m 2T"),
            ("-m 99999999999999999999G", "-m 99999999999999999999G"),
            ("-m 18446744073709551615G", "-m 18446744073709551615G"),
            ("-smp cores=2,threads=2", "-smp cores=2,threads=2"),
            ("-cpu EPYC", "-cpu EPYC"),
            ("disk.img", "disk.img"),
        ] {
            let error = options(text).expect_err(text).to_string();
            let wanted = format!("`{is}` is not for firn; allowed: `-m SIZE`, ");
            assert!(error.starts_with(&wanted), "{error}");
        }
    }

    #[test]
    fn what_changes_a_user_network() {
        let forward = |protocol, host: &str, guest: &str| Forward {
            from: Side::Host,
            protocol,
            host: host.parse().expect("an address"),
            guest: guest.parse().expect("an address"),
        };
        for (text, restrict, forwards) in [
            ("", None, vec![]),
            ("restrict=on", Some(true), vec![]),
            (
                ",hostfwd=tcp::2222-:22,restrict=off,hostfwd=udp:0.0.0.0:53-10.0.2.15:5353",
                Some(false),
                vec![
                    forward(Protocol::Tcp, "127.0.0.1:2222", "10.0.2.15:22"),
                    forward(Protocol::Udp, "0.0.0.0:53", "10.0.2.15:5353"),
                ],
            ),
            ("hostfwd=::0-:80", None, vec![forward(Protocol::Tcp, "127.0.0.1:0", "10.0.2.15:80")]),
        ] {
            assert_eq!(net_options(text), Ok(NetOptions { restrict, forwards }), "{text}");
        }
    }

    #[test]
    fn what_is_qemus_user_networks() {
        for text in [
            "net=10.0.3.0/24",
            "restrict",
            "restrict=perhaps",
            "hostfwd=tcp::22",
            "hostfwd=tcp::-:22",
            "hostfwd=tcp::22-:0",
            "hostfwd=tcp:localhost:22-:22",
            "hostfwd=sctp::22-:22",
            "hostfwd=tcp::65536-:22",
            "guestfwd=tcp:10.0.2.100:80-cmd:cat",
        ] {
            let error = net_options(text).expect_err(text).to_string();
            assert!(error.starts_with(&format!("`{text}` is not for firn; allowed: ")), "{error}");
        }
    }
}
