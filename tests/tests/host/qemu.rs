//! A machine under QEMU needs no KVM.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use firn::Machine;
use firn::config::{MachineFile, Script, TestConfig};
use firn_tests::{
    PATIENCE, connect_to_vsock, install_vsock_peer, micro, noise, output, start_script, with_config,
};

/// Debian's loader, where the firmware looks for it.
const LOADER: &str = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi";

/// The start script of a machine with a firmware, a TPM, and a disk with a boot loader.
fn with_firmware(dir: &Path) -> PathBuf {
    let kit = micro();
    let disk = dir.join("disk");
    for part in ["EFI/BOOT", "loader/entries"] {
        fs::create_dir_all(disk.join(part)).unwrap();
    }
    fs::copy(LOADER, disk.join("EFI/BOOT/BOOTX64.EFI")).unwrap();
    fs::copy(kit.kernel(), disk.join("linux")).unwrap();
    let initrd = start_script::initrd(&kit, "s", &["r", "s"], &[]);
    fs::write(disk.join("initrd"), initrd).unwrap();
    let options = format!("options {} of-the-disk", kit.manifest.cmdline);
    let entry = format!("title firn\nlinux /linux\ninitrd /initrd\n{options}\n");
    fs::write(disk.join("loader/entries/firn.conf"), entry).unwrap();
    fs::write(disk.join("loader/loader.conf"), "timeout 0\n").unwrap();
    let prepare = r#"cp /usr/share/OVMF/OVMF_VARS_4M.fd s-efi-vars.fd
NIX_SWTPM_DIR=$(readlink -f s-swtpm)
mkdir -p "$NIX_SWTPM_DIR"
swtpm socket --tpmstate dir="$NIX_SWTPM_DIR" --ctrl type=unixio,path="$NIX_SWTPM_DIR"/socket.ctrl \
  --pid file="$NIX_SWTPM_DIR"/pid --daemon --tpm2"#;
    let options = format!(
        r#"-machine accel=tcg,type=q35 -m 512 \
  -object memory-backend-memfd,id=mem0,size=512M,share=on -machine memory-backend=mem0 \
  -drive if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd \
  -drive if=pflash,format=raw,unit=1,file=s-efi-vars.fd \
  -chardev socket,id=chrtpm,path="$NIX_SWTPM_DIR"/socket.ctrl \
  -tpmdev emulator,id=tpm_dev_0,chardev=chrtpm -device tpm-tis,tpmdev=tpm_dev_0 \
  {cards} \
  -drive if=none,id=disk,format=raw,readonly=on,file=fat:{disk} \
  -device virtio-blk-pci,drive=disk,bootindex=1"#,
        cards = start_script::cards(2),
        disk = disk.display(),
    );
    start_script::write(dir, "s", prepare, &options)
}

/// A test without machines, for those that it makes itself, with vlan 1.
fn empty(name: &str) -> TestConfig {
    TestConfig {
        name: name.to_owned(),
        script: Script { text: String::new(), file: PathBuf::new(), line: 1 },
        global_timeout: None,
        nodes: vec![],
        files: vec![],
        more_vlans: vec![1_u64.try_into().unwrap()],
        vsock_offset: None,
        from_boot: false,
    }
}

fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// An image of a disk that a BIOS boots, by Debian's loader.
fn bootable_image(dir: &Path) -> PathBuf {
    let (kit, image) = (micro(), dir.join("disk.img"));
    let entry = dir.join("syslinux.cfg");
    let options = format!("{} of-the-image", kit.manifest.cmdline);
    let text = format!("DEFAULT firn\nLABEL firn\nLINUX linux\nINITRD initrd\nAPPEND {options}\n");
    fs::write(&entry, text).unwrap();
    fs::File::create(&image).unwrap().set_len(32 << 20).unwrap();
    run(Command::new("mformat")
        .arg("-i")
        .arg(&image)
        .args(["-h", "64", "-s", "32", "-t", "32", "::"]));
    for (file, name) in
        [(kit.kernel(), "::linux"), (kit.initrd(), "::initrd"), (entry, "::syslinux.cfg")]
    {
        run(Command::new("mcopy").arg("-i").arg(&image).arg(file).arg(name));
    }
    run(Command::new("syslinux").arg("--install").arg(&image));
    image
}

/// As nixpkgs' tests of images do it: by a start command, each time from the image as it was made.
#[test]
fn a_start_command_boots_an_image_by_its_loader() {
    let dir = tempfile::tempdir().unwrap();
    let command = format!(
        "qemu-system-x86_64 -machine accel=tcg -cpu max -m 384 \
         -netdev vde,id=vlan1,sock=$QEMU_VDE_SOCKET_1 -device virtio-net-pci,netdev=vlan1 \
         -drive file={},format=raw,if=virtio,snapshot=on",
        bootable_image(dir.path()).display()
    );
    with_config(&empty("image"), async |driver| {
        let file = MachineFile::start_command(&command, Path::new("script")).unwrap();
        let m = &driver.create_machine(file, false).unwrap();
        m.start(false).await.unwrap();
        output(m, "grep of-the-image /proc/cmdline && ! test -e /sys/firmware/efi").await;
        assert_eq!(
            output(m, "cat /sys/block/vda/size; ls /sys/class/net").await,
            "65536\neth0\nlo"
        );
        output(m, "dd if=/dev/zero of=/dev/vda bs=1M count=1 2>/dev/null && sync").await;
        m.shutdown().await.unwrap();
    });
    let image = fs::read(dir.path().join("disk.img")).unwrap();
    assert_eq!(image[510..512], [0x55, 0xaa], "the image is as it was");
}

#[test]
fn a_script_boots_a_disk_with_firmware_loader_and_tpm() {
    let dir = tempfile::tempdir().unwrap();
    let path = with_firmware(dir.path());
    let config = TestConfig { vsock_offset: Some(2), ..empty("firmware") };
    with_config(&config, async |driver| {
        let s = &driver.create_machine(MachineFile::read(&path).unwrap(), false).unwrap();
        assert_eq!(s.name(), "s");
        s.start(false).await.unwrap();
        output(s, "ls -d /sys/firmware/efi /sys/firmware/acpi/tables/TPM2").await;
        output(s, "grep of-the-disk /proc/cmdline && ping -c 1 s").await;
        assert_eq!(output(s, "cat /sys/class/net/eth1/carrier").await, "1");
        s.block();
        let pulled = "[ $(cat /sys/class/net/eth1/carrier) = 0 ]";
        s.wait_until_succeeds(pulled, PATIENCE, None).await.unwrap();
        let swtpm = fs::read_to_string(s.state_dir().join("s-swtpm/pid")).unwrap();
        let swtpm = Path::new("/proc").join(swtpm.trim());
        // One that has ended has none, even if nobody has taken note of that.
        let runs = || fs::read(swtpm.join("cmdline")).is_ok_and(|line| !line.is_empty());
        assert!(runs());
        let socket = s.state_dir().join("vsock");
        let mut stream = programs_talk(s, &socket).await;
        s.shutdown().await.unwrap();
        assert!(!runs(), "a helper is left");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        assert!(!socket.exists());
    });
}

/// Programs in the guest and on the host, by a vsock; the connection is the guest's echo.
async fn programs_talk(s: &Machine, socket: &Path) -> UnixStream {
    assert!(s.ssh_backdoor_command().unwrap().ends_with(&socket.display().to_string()));
    assert_eq!(connect_to_vsock(socket, 5000).1, "", "nobody listens there yet");
    install_vsock_peer(s, env!("CARGO_BIN_EXE_vsock-peer")).await;
    let start = "mkfifo /tmp/up; vsock-peer echo 5000 >/tmp/up 2>/dev/null </dev/null & \
                 read -r line </tmp/up; echo $line";
    assert_eq!(output(s, start).await, "ready");
    let data = noise(3 << 20);
    let (mut stream, answer) = connect_to_vsock(socket, 5000);
    assert!(answer.starts_with("OK "), "{answer:?}");
    let mut writer = stream.try_clone().unwrap();
    let sent = data.clone();
    let sending = thread::spawn(move || writer.write_all(&sent).unwrap());
    assert!(heard(&mut stream, data.len()) == data);
    sending.join().unwrap();

    let listener = UnixListener::bind(format!("{}_1234", socket.display())).unwrap();
    let greeting = thread::spawn(move || listener.accept().unwrap().0.write_all(b"hello").unwrap());
    assert_eq!(output(s, "vsock-peer connect 2 1234 </dev/null").await, "hello");
    greeting.join().unwrap();

    s.pause().await.unwrap();
    stream.write_all(b"and on").unwrap();
    s.resume().await.unwrap();
    assert_eq!(heard(&mut stream, 6), b"and on");
    stream
}

/// The next bytes.
fn heard(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}
