use super::*;

/// Builds a relocatable ELF file with a `.modinfo` section: all that is read of a kernel module.
pub(crate) fn module(depends: &str) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let modinfo = format!("license=GPL\0depends={depends}\0name=x\0");
    let (names_at, modinfo_at) = (64, 64 + names.len());
    let sections_at = (modinfo_at + modinfo.len()).next_multiple_of(8);
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for (size, value) in
        [(2, 1), (2, 62), (4, 1), (8, 0), (8, 0), (8, sections_at), (4, 0), (2, 64), (2, 0), (2, 0)]
    {
        elf.extend_from_slice(&value.to_le_bytes()[..size]);
    }
    for value in [64_u16, 3, 2] {
        elf.extend_from_slice(&value.to_le_bytes());
    }
    elf.extend_from_slice(names);
    elf.extend_from_slice(modinfo.as_bytes());
    elf.resize(sections_at + 64, 0);
    for (name, kind, at, size) in
        [(1_u32, 1_u32, modinfo_at, modinfo.len()), (10, 3, names_at, names.len())]
    {
        elf.extend_from_slice(&name.to_le_bytes());
        elf.extend_from_slice(&kind.to_le_bytes());
        for value in [0, 0, at, size, 0, 1, 0] {
            elf.extend_from_slice(&value.to_le_bytes());
        }
    }
    elf
}

fn tree(modules: &[(&str, &str)], builtin: &str) -> (tempfile::TempDir, ModuleTree) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("kernel/drivers")).unwrap();
    fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
    for (name, depends) in modules {
        fs::write(dir.path().join(format!("kernel/drivers/{name}.ko")), module(depends)).unwrap();
    }
    let tree = ModuleTree::scan(dir.path()).unwrap();
    (dir, tree)
}

fn names(order: Vec<(String, PathBuf)>) -> Vec<String> {
    order.into_iter().map(|(name, _)| name).collect()
}

#[test]
fn packed_modules_are_unpacked() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let packed = dir.path().join("kernel/net/bridge/bridge.ko.xz");
    fs::create_dir_all(packed.parent().unwrap()).unwrap();
    let mut writer =
        lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::default()).unwrap();
    writer.write_all(&module("llc")).unwrap();
    fs::write(&packed, writer.finish().unwrap()).unwrap();
    fs::write(dir.path().join("kernel/net/llc.ko"), module("")).unwrap();
    let tree = ModuleTree::scan(dir.path()).unwrap();
    assert_eq!(tree.below(dir.path(), &["kernel/net/bridge", "kernel/fs"]), ["bridge"]);
    assert_eq!(names(tree.load_order(&["bridge"]).unwrap()), ["llc", "bridge"]);
    assert_eq!(read(&packed).unwrap(), module("llc"));
    fs::write(&packed, "not xz").unwrap();
    assert!(matches!(read(&packed), Err(ModuleError::Io { .. })));
}

#[test]
fn dependencies_come_first_and_once() {
    let (_dir, tree) = tree(
        &[
            ("virtio", "virtio_ring"),
            ("virtio_ring", ""),
            ("virtio-net", "virtio,net_failover,virtio-ring"),
            ("net_failover", "failover"),
            ("failover", ""),
            ("unwanted", ""),
        ],
        "kernel/fs/ext4/ext4.ko\nkernel/drivers/rng-core.ko\n",
    );
    let order = names(tree.load_order(&["virtio", "ext4", "virtio_net", "rng_core"]).unwrap());
    assert_eq!(order, ["virtio_ring", "virtio", "failover", "net_failover", "virtio_net"]);
}

#[test]
fn a_circle_ends() {
    let (_dir, tree) = tree(&[("a", "b"), ("b", "a")], "");
    assert_eq!(names(tree.load_order(&["a"]).unwrap()), ["b", "a"]);
}

#[test]
fn says_what_is_missing() {
    let (_dir, tree) = tree(&[("a", "gone")], "");
    let error = tree.load_order(&["a"]).unwrap_err().to_string();
    assert_eq!(error, "the kernel package has no module `gone`, which `a` needs");
    let error = tree.load_order(&["b"]).unwrap_err().to_string();
    assert_eq!(error, "the kernel package has no module `b`");
}

#[test]
fn refuses_what_is_no_module() {
    for bytes in [&b""[..], b"text", &module("a")[..100], b"\x7fELF"] {
        assert_eq!(dependencies(bytes), None);
    }
    assert_eq!(dependencies(&module("a,b-c")).unwrap(), ["a", "b_c"]);
}

#[test]
fn modules_lose_their_signatures() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.ko");
    let stored = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        read(&path).unwrap()
    };
    let bare = module("b");
    let mut signed = bare.clone();
    signed.extend_from_slice(&[7; 300]);
    signed.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 44]);
    signed.extend_from_slice(b"~Module signature appended~\n");
    assert_eq!(stored(&signed), bare);
    assert_eq!(stored(&bare), bare);
    // What says of itself that it is longer than the file is left to the kernel.
    let cut = &signed[signed.len() - 100..];
    assert_eq!(stored(cut), cut);
}
