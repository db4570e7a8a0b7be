//! Boot once: a run keeps what its machines are after their boot, and the next one starts there.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use firn_vmm::spec::MachineSpec;
use firn_vmm::vm::{self, KeptVm};
use futures_util::future::{join_all, try_join_all};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::tree::Tree;
use super::{Filling, Found, Key, World, Worlds, WorldsError};
use crate::driver::Driver;
use crate::error::{MachineError, Result, chain};
use crate::kit;
use crate::kit::integrity::hex;
use crate::machine::{Create, KeptMachine, Machine};
use crate::task::blocking;

/// The file with what is kept beside what the monitor keeps.
const RUN: &str = "run.json";
/// The point at which worlds are kept: part of what they depend on.
const POINT: &str = "after the boot";

/// The file [`RUN`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeptRun {
    machines: Vec<KeptMachine>,
    /// What was in the directories of the run that guests write to, in the order of the machines.
    dirs: Vec<Tree>,
}

/// Whatever went wrong with the cache.
type Trouble = Box<dyn std::error::Error + Send + Sync>;

impl Driver {
    /// Brings all machines to the end of their boot: they take commands, and systemd, where it is, has started what
    /// belongs to its default target. The first run of a test boots and keeps that world in `worlds`; later ones start
    /// there, as long as nothing that it depends on has changed: the log says what has. The guests' clocks are set.
    ///
    /// With `allow_reboot`, guests that reset themselves start again, as with [`Machine::start`].
    ///
    /// # Errors
    /// [`MachineError::Usage`] if a machine cannot be kept: it was started, runs under QEMU, or writes to what is not
    /// the run's alone. A machine does not boot. Trouble with the cache only costs a boot, and the log says so.
    pub async fn boot_once(&self, worlds: &Worlds, test: &str, allow_reboot: bool) -> Result<()> {
        let (machines, key) = self.keepable().await?;
        let (cache, name, wanted) = (worlds.clone(), test.to_owned(), key.clone());
        let found = blocking(move || {
            // Where it cannot be made, nothing is found either.
            let _ = cache.prepare();
            cache.find(&name, &wanted)
        });
        let found = found.await;
        let there = matches!(found, Found::World(_));
        if self.start_found(&machines, found, allow_reboot).await? {
            return Ok(());
        }
        if there {
            let (cache, key) = (worlds.clone(), key.clone());
            blocking(move || cache.forget(&key)).await;
        }
        let boot = self.boot(&machines, allow_reboot).await?;
        let cache = worlds.clone();
        match self.keep(&machines, test, boot, move || cache.fill(key)).await {
            Ok(Some(path)) => self.say_kept(&path),
            Ok(None) => self.logger().info("another run keeps this world"),
            Err(error) => {
                let error = chain(&*error);
                self.logger().warning(format_args!("the booted world is not kept: {error}"));
            }
        }
        Ok(())
    }

    /// As [`Self::boot_once`], but with the world that [`Self::keep_boot`] has kept in `dir`, where nothing is written,
    /// or else by a boot that is not kept.
    ///
    /// # Errors
    /// Those of [`Self::boot_once`]. A world that does not fit only costs a boot, and the log says why.
    pub async fn boot_from(&self, dir: &Path, allow_reboot: bool) -> Result<()> {
        let (machines, key) = self.keepable().await?;
        let dir = dir.to_owned();
        let found = blocking(move || World::in_dir(dir, &key)).await;
        if !self.start_found(&machines, found, allow_reboot).await? {
            self.boot(&machines, allow_reboot).await?;
        }
        Ok(())
    }

    /// Boots all machines and keeps that world in `dir`, which is made or empty.
    ///
    /// # Errors
    /// Those of [`Self::boot_once`]; the world cannot be kept.
    pub async fn keep_boot(&self, dir: &Path, test: &str, allow_reboot: bool) -> Result<()> {
        let (machines, key) = self.keepable().await?;
        let boot = self.boot(&machines, allow_reboot).await?;
        let dir = dir.to_owned();
        let kept = self.keep(&machines, test, boot, move || Filling::into_dir(dir, key).map(Some));
        match kept.await {
            Ok(path) => path.iter().for_each(|path| self.say_kept(path)),
            Err(error) => {
                let what = format!("the booted world is not kept: {}", chain(&*error));
                return Err(MachineError::Usage(what).into());
            }
        }
        Ok(())
    }

    fn say_kept(&self, path: &Path) {
        self.logger().info(format_args!("kept the booted world in {}", path.display()));
    }

    /// All machines, if they can be kept, and everything that their booted world depends on.
    async fn keepable(&self) -> Result<(Vec<Machine>, Key)> {
        let machines = self.all_machines();
        let reasons = machines.iter().map(Machine::unkeepable).collect::<Result<Vec<_>>>()?;
        let reasons: Vec<String> = reasons.into_iter().flatten().collect();
        if !reasons.is_empty() {
            let what = format!("its boot cannot be kept on disk: {}", reasons.join("; "));
            return Err(MachineError::Usage(what).into());
        }
        let key = self.key(&machines).await?;
        Ok((machines, key))
    }

    /// Starts all machines from a world; false if they have to boot, and the log says why.
    async fn start_found(
        &self,
        machines: &[Machine],
        found: Found,
        allow_reboot: bool,
    ) -> Result<bool> {
        let world = match found {
            Found::World(world) => world,
            Found::Nothing(why) => {
                self.logger().info(format_args!("boots afresh: {why}"));
                return Ok(false);
            }
        };
        let (path, boot) = (world.path().to_owned(), world.boot());
        let began = Instant::now();
        if let Err(error) = self.start_from(machines, world, allow_reboot).await {
            let (path, error) = (path.display(), chain(&*error));
            self.logger().warning(format_args!(
                "boots afresh: cannot start from the world kept in {path}: {error}"
            ));
            for machine in machines {
                machine.begin_afresh().await?;
            }
            return Ok(false);
        }
        let [boot, took] = [boot, began.elapsed()].map(|time| time.as_secs_f64());
        self.logger().info(format_args!(
            "started from the world kept in {} in {took:.1} seconds; its boot took {boot:.1}",
            path.display()
        ));
        Ok(true)
    }

    /// Boots all machines; how long that took.
    async fn boot(&self, machines: &[Machine], allow_reboot: bool) -> Result<Duration> {
        let began = Instant::now();
        try_join_all(machines.iter().map(|machine| machine.start(allow_reboot))).await?;
        try_join_all(machines.iter().map(Machine::wait_until_booted)).await?;
        Ok(began.elapsed())
    }

    /// Everything that the booted world depends on.
    async fn key(&self, machines: &[Machine]) -> Result<Key> {
        let mut key = Key::default();
        key.add("the point", POINT);
        key.add("firn", own_version());
        let run = self.state_dir().unwrap_or_default();
        let mut specs = Vec::new();
        for machine in machines {
            specs.push(machine.spec().await?);
        }
        blocking(move || {
            let host = vm::fingerprint().map_err(|error| MachineError::Usage(chain(&error)))?;
            key.add("the host's processor or KVM", hash(&host));
            for spec in specs {
                add_machine(&mut key, &spec, &run)
                    .map_err(|error| MachineError::Usage(format!("{error}")))?;
            }
            Ok(key)
        })
        .await
    }

    /// Starts all machines from a kept world.
    async fn start_from(
        &self,
        machines: &[Machine],
        world: World,
        allow_reboot: bool,
    ) -> Result<(), Trouble> {
        let names: Vec<String> = machines.iter().map(|machine| machine.name().to_owned()).collect();
        let read = move || {
            let run: KeptRun = serde_json::from_reader(io::BufReader::new(world.open(RUN)?))?;
            let mut vms = Vec::new();
            for name in &names {
                vms.push(KeptVm::read(&mut |part| world.open(&file_name(name, part)))?);
            }
            Ok::<_, Trouble>((run, vms))
        };
        let (run, vms) = blocking(read).await?;
        let dirs = dirs(machines);
        let fits =
            run.machines.iter().map(KeptMachine::name).eq(machines.iter().map(Machine::name));
        if !fits || run.dirs.len() != dirs.len() {
            return Err("it has other machines".into());
        }
        // Before the machines: their guests have files open there.
        let trees = run.dirs;
        let write = move || {
            dirs.iter().zip(&trees).try_for_each(|(dir, tree)| {
                fs::create_dir_all(dir)?;
                tree.write(dir)
            })
        };
        blocking(write).await?;
        let changing = join_all(machines.iter().map(Machine::changing)).await;
        let kept = machines.iter().zip(&run.machines).zip(vms);
        let backs = kept.map(|((machine, kept), vm)| machine.go_on_from(kept, vm, allow_reboot));
        let backs = join_all(backs).await.into_iter().collect::<Result<Vec<_>>>()?;
        for (machine, back) in machines.iter().zip(backs) {
            machine.go_on(back).await?;
        }
        drop(changing);
        try_join_all(machines.iter().map(Machine::connect)).await?;
        self.reseed().await?;
        self.set_clocks().await?;
        Ok(())
    }

    /// Keeps the world as it is now, where `fill` says; None if another process does.
    async fn keep(
        &self,
        machines: &[Machine],
        test: &str,
        boot: Duration,
        fill: impl FnOnce() -> Result<Option<Filling>, WorldsError> + Send + 'static,
    ) -> Result<Option<PathBuf>, Trouble> {
        let Some(filling) = blocking(fill).await? else { return Ok(None) };
        let filling = Arc::new(filling);
        let checkpoint = self.checkpoint(POINT).await?;
        let done = self.write(machines, &checkpoint, &filling).await;
        checkpoint.forget();
        done?;
        let names = machines.iter().map(|machine| machine.name().to_owned()).collect();
        let filling = Arc::into_inner(filling).ok_or("it is still being written")?;
        let test = test.to_owned();
        Ok(Some(blocking(move || filling.finish(&test, names, boot)).await?))
    }

    async fn write(
        &self,
        machines: &[Machine],
        checkpoint: &crate::checkpoint::Checkpoint,
        filling: &Arc<Filling>,
    ) -> Result<(), Trouble> {
        let Some(world) = checkpoint.world() else { return Err("the run is over".into()) };
        let mut kept = Vec::new();
        for (machine, then) in world.machines() {
            let (to, name) = (Arc::clone(filling), machine.name().to_owned());
            let create: Create = Arc::new(move |part| to.create(&file_name(&name, part)));
            kept.push(machine.write(then, create).await?);
        }
        let (to, dirs) = (Arc::clone(filling), dirs(machines));
        let write = move || {
            let trees = dirs.iter().map(|dir| match world.copy_of(dir) {
                Some(copy) => Tree::read(&copy),
                None => Ok(Tree::default()),
            });
            let run = KeptRun { machines: kept, dirs: trees.collect::<io::Result<_>>()? };
            Ok::<_, Trouble>(serde_json::to_writer(to.create(RUN)?, &run)?)
        };
        blocking(write).await
    }
}

/// The directories of the run that guests write to, in the order of the machines.
fn dirs(machines: &[Machine]) -> Vec<PathBuf> {
    machines.iter().flat_map(|machine| machine.writable_dirs().0).collect()
}

fn file_name(machine: &str, part: &str) -> String {
    format!("{machine}.{part}")
}

/// What a machine depends on.
fn add_machine(key: &mut Key, spec: &MachineSpec, run: &Path) -> io::Result<()> {
    let name = &spec.name;
    let of = |what: &str| format!("{what} of machine {name}");
    key.add(of("the kernel"), file(&spec.kernel, run)?);
    let initrd = spec.initrd.iter().map(|path| file(path, run)).collect::<io::Result<Vec<_>>>()?;
    key.add(of("the initrd"), hash(initrd.join("\n").as_bytes()));
    key.add(of("the kernel's command line"), hash(spec.cmdline.as_bytes()));
    for (at, disk) in spec.disks.iter().enumerate() {
        let mut value = outside(&serde_json::to_string(disk)?, run);
        if !disk.image.starts_with(run) {
            for path in [&disk.image].into_iter().chain(&disk.backing) {
                value += &file(path, run)?;
            }
        }
        key.add(of(&format!("disk {at}")), hash(value.as_bytes()));
    }
    for share in &spec.shares {
        let mut value = outside(&serde_json::to_string(share)?, run);
        if !share.source.starts_with(run) {
            value += &file(&share.source, run)?;
        }
        let copies = share.copies.values().filter(|copy| copy.is_file());
        for file in copies.chain(&share.only) {
            value += &hash(&fs::read(file)?);
        }
        key.add(of(&format!("share {}", share.tag)), hash(value.as_bytes()));
    }
    for (what, value) in [("memory", spec.memory.get()), ("cores", spec.cores.get().into())] {
        key.add(of(what), value.to_string());
    }
    let mut rest = serde_json::to_value(spec)?;
    if let Some(rest) = rest.as_object_mut() {
        let told = ["name", "kernel", "initrd", "cmdline", "disks", "shares", "memory", "cores"];
        rest.retain(|part, _| !told.contains(&part.as_str()));
    }
    // It may have secrets.
    key.add(of("the description"), hash(outside(&rest.to_string(), run).as_bytes()));
    Ok(())
}

/// The text without where this run keeps its state.
fn outside(text: &str, run: &Path) -> String {
    text.replace(&*run.to_string_lossy(), "${RUN}")
}

/// What tells a file, or a directory, and its changes apart.
fn file(path: &Path, run: &Path) -> io::Result<String> {
    let named = |error: io::Error| {
        io::Error::new(error.kind(), format!("cannot look at {}: {error}", path.display()))
    };
    let path = fs::canonicalize(path).map_err(named)?;
    if path.starts_with("/nix/store") {
        return Ok(path.display().to_string());
    }
    if path.starts_with(run) {
        return Ok(hash(&fs::read(&path).map_err(named)?));
    }
    if kit::kernels_dir().is_some_and(|dir| path.starts_with(dir)) {
        // The name has its hash.
        return Ok(path.file_name().unwrap_or_default().display().to_string());
    }
    let meta = fs::metadata(&path).map_err(named)?;
    Ok(format!(
        "{} {} {} {}.{} {}.{}",
        path.display(),
        meta.size(),
        meta.ino(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec()
    ))
}

/// This firn: its version, and the program or library that it is in.
fn own_version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let own = own_file().and_then(|path| file(&path, Path::new("/nonexistent")).ok());
    format!("{version} {}", hash(own.unwrap_or_default().as_bytes()))
}

/// The file that holds this code, as the kernel says.
fn own_file() -> Option<PathBuf> {
    let own = (own_version as fn() -> String as *const ()).addr();
    let maps = fs::read("/proc/self/maps").ok()?;
    // Other mapped files may be called anything.
    String::from_utf8_lossy(&maps).lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let [start, end] = [start, end].map(|text| usize::from_str_radix(text, 16).ok());
        let path = rest.split_once('/').map(|(_, path)| PathBuf::from(format!("/{path}")));
        path.filter(|_| start.is_some_and(|start| start <= own) && end.is_some_and(|end| own < end))
    })
}

fn hash(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_firn_is_found() {
        let own = own_file().expect("it is in a file");
        assert_eq!(own, std::env::current_exe().unwrap());
        assert_eq!(own_version(), own_version());
    }

    #[test]
    fn what_lies_in_the_run_counts_by_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
        fs::write(&one, "same").unwrap();
        fs::write(&two, "same").unwrap();
        let run = fs::canonicalize(dir.path()).unwrap();
        assert_eq!(file(&one, &run).unwrap(), file(&two, &run).unwrap());
        let elsewhere = Path::new("/elsewhere");
        let before = file(&one, elsewhere).unwrap();
        assert_ne!(before, file(&two, elsewhere).unwrap());
        assert_eq!(before, file(&one, elsewhere).unwrap());
        fs::write(&one, "more").unwrap();
        assert_ne!(before, file(&one, elsewhere).unwrap());
        let error = file(&dir.path().join("none"), &run).unwrap_err().to_string();
        assert!(error.contains("/none: No such file"), "{error}");
    }

    #[test]
    fn a_machine_depends_on_what_it_is_made_of_and_not_on_where_the_run_is() {
        let dir = tempfile::tempdir().unwrap();
        let dir = fs::canonicalize(dir.path()).unwrap();
        let [kernel, image, data, list] =
            ["kernel", "image.qcow2", "data", "list"].map(|name| dir.join(name));
        fs::write(&list, "a").unwrap();
        fs::write(&kernel, "kernel").unwrap();
        fs::write(&image, "image").unwrap();
        fs::create_dir(&data).unwrap();
        let spec = |run: &Path| {
            fs::create_dir_all(run.join("a/xchg")).unwrap();
            fs::write(run.join("a/overlay.cpio"), "overlay").unwrap();
            serde_json::json!({
                "name": "a", "cores": 1, "memory": 256, "kernel": kernel, "cmdline": "quiet",
                "initrd": [run.join("a/overlay.cpio")],
                "shares": [
                    { "tag": "xchg", "source": run.join("a/xchg") },
                    { "tag": "data", "source": data, "read_only": true, "cache": "always", "only": list },
                ],
                "disks": [
                    { "image": run.join("a/disk0.img"), "size": 16 },
                    { "image": image, "read_only": true },
                ],
                "vsock": { "cid": 3, "socket": run.join("a/vsock") },
                "oem_strings": ["secret"],
            })
        };
        let key = |run: &Path, spec: serde_json::Value| {
            let mut key = Key::default();
            add_machine(&mut key, &serde_json::from_value(spec).unwrap(), run).unwrap();
            key
        };
        let [one, two] = ["one", "two"].map(|name| dir.join(name));
        let before = key(&one, spec(&one));
        assert_eq!(before, key(&two, spec(&two)));
        assert!(!serde_json::to_string(&before).unwrap().contains("secret"));
        for (pointer, value, changed) in [
            ("/memory", 300.into(), "memory of machine a has changed from 256 to 300"),
            ("/cores", 2.into(), "cores of machine a has changed from 1 to 2"),
            ("/cmdline", "loud".into(), "the kernel's command line of machine a has changed"),
            ("/initrd", serde_json::json!([]), "the initrd of machine a has changed"),
            ("/disks/0/size", 17.into(), "disk 0 of machine a has changed"),
            (
                "/shares/0/tag",
                "other".into(),
                "share other of machine a is new, share xchg of machine a is gone",
            ),
            ("/vsock/cid", 4.into(), "the description of machine a has changed"),
            ("/oem_strings/0", "".into(), "the description of machine a has changed"),
        ] {
            let mut spec = spec(&one);
            *spec.pointer_mut(pointer).unwrap() = value;
            assert_eq!(key(&one, spec).changes_since(&before), changed);
        }
        let touched = |path: &Path| fs::write(path, "other").unwrap();
        for (path, changed) in [
            (&kernel, "the kernel of machine a has changed"),
            (&image, "disk 1 of machine a has changed"),
            (&list, "share data of machine a has changed"),
        ] {
            let before = key(&two, spec(&two));
            touched(path);
            assert_eq!(key(&two, spec(&two)).changes_since(&before), changed);
        }
        let before = key(&two, spec(&two));
        touched(&data.join("new"));
        assert_eq!(
            key(&two, spec(&two)).changes_since(&before),
            "share data of machine a has changed"
        );
        fs::remove_file(&image).unwrap();
        let mut key = Key::default();
        let gone = add_machine(&mut key, &serde_json::from_value(spec(&one)).unwrap(), &one);
        assert!(gone.unwrap_err().to_string().contains("image.qcow2: No such file"));
    }
}
