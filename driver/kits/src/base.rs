//! The part of a kit that comes from Debian: fetched once, then kept.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use firn::kit::integrity::{self, Check, Stamps, hex};
use firn::kit::json;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::apt::{Apt, Package};
use super::cache::{Cache, Lock};
use super::debian::Debian;
use super::modules::{self, ModuleTree};
use super::{BuildError, FORMAT, Progress, Recipe};

const BUSYBOX: &str = "busybox-static";
/// The stamps of all its other files.
const FILES: &str = "files.json";

/// A base in the cache.
pub(crate) struct Base {
    pub(crate) dir: PathBuf,
    pub(crate) key: String,
    pub(crate) info: Info,
}

/// The contents of a base.
#[derive(Serialize, Deserialize)]
pub(crate) struct Info {
    pub(crate) kernel_release: String,
    pub(crate) packages: BTreeMap<String, String>,
    /// The names of the modules in load order; each is `modules/NAME.ko`.
    pub(crate) modules: Vec<String>,
    /// More modules, which are not loaded at every boot.
    pub(crate) on_demand: Vec<String>,
    /// Those for shares that are images.
    #[serde(default)]
    pub(crate) images: Vec<String>,
    /// busybox's commands.
    pub(crate) applets: Vec<String>,
}

impl Base {
    /// The base for `recipe`, if it exists. Does not check for newer Debian packages.
    pub(crate) fn open(recipe: &Recipe, cache: &Cache) -> Result<Option<Self>, BuildError> {
        let key = key(recipe);
        let dir = cache.base_dir(recipe.name, &key);
        let info = json::read(&dir.join("base.json"))?;
        Ok(info.map(|info| Self { dir, key, info }))
    }

    /// The path of the base for `recipe`.
    #[cfg(test)]
    pub(crate) fn dir_of(recipe: &Recipe, cache: &Cache) -> PathBuf {
        cache.base_dir(recipe.name, &key(recipe))
    }

    /// Fetches the packages and rebuilds the base.
    pub(crate) fn fetch(
        recipe: &Recipe,
        cache: &Cache,
        lock: &Lock<'_>,
        progress: Progress<'_>,
    ) -> Result<Self, BuildError> {
        let kit = recipe.name;
        let staging = lock.staging()?;
        let (debs, files) = (staging.path().join("debs"), staging.path().join("files"));
        for dir in [&debs, &files] {
            fs::create_dir(dir).map_err(BuildError::io("create", dir))?;
        }
        progress(&format!("kit {kit}: fetching the package lists of Debian {}", recipe.suite));
        let apt = Apt::new(recipe.suite, &cache.apt_dir(recipe.suite))?;
        apt.update()?;
        apt.pretend(recipe.absent)?;
        let kernel = apt.kernel_of(recipe.kernel)?;
        let what = if recipe.packages.is_empty() { "" } else { " and a Debian system" };
        progress(&format!("kit {kit}: downloading {kernel}, {BUSYBOX}{what}"));
        let mut packages = apt.download(&[&kernel, BUSYBOX], &debs)?;
        if !recipe.packages.is_empty() {
            packages = apt.download_all(&recipe.packages.concat(), &debs)?;
        }
        progress(&format!("kit {kit}: unpacking {} packages", packages.len()));
        for package in &packages {
            package.unpack(&files)?;
        }
        let made = lock.staging()?;
        let info = collect(recipe, &kernel, &packages, &files, made.path())?;
        let key = key(recipe);
        let dir = cache.base_dir(kit, &key);
        lock.publish(made, &dir)?;
        Ok(Self { dir, key, info })
    }

    /// Fails if one of its files is damaged.
    pub(crate) fn check(&self, look: Check) -> Result<(), BuildError> {
        // An earlier version of firn wrote none.
        let stamps: Option<Stamps> = json::read(&self.dir.join(FILES))?;
        integrity::check(&self.dir, stamps.unwrap_or_default().iter_mut(), look)?;
        Ok(())
    }

    /// Reads one of its files.
    pub(crate) fn read(&self, file: &str) -> Result<Vec<u8>, BuildError> {
        let path = self.dir.join(file);
        fs::read(&path).map_err(BuildError::io("read", path))
    }
}

/// Names a base by this program's recipe, so that another version's base is not mistaken for it.
fn key(recipe: &Recipe) -> String {
    let (modules, on_demand) = (recipe.modules, recipe.on_demand);
    let (suite, packages) = (recipe.suite, recipe.packages.concat());
    let mut wanted = format!(
        "{FORMAT} {suite} {} {BUSYBOX} {packages:?} {modules:?} {on_demand:?}",
        recipe.kernel
    );
    if !recipe.images.is_empty() {
        wanted.push_str(&format!("{:?}", recipe.images));
    }
    if !packages.is_empty() {
        wanted.push_str(&format!("{} {:?}", Debian::recipe(), recipe.absent));
    }
    hex(&Sha256::digest(wanted)[..8])
}

/// Copies what the kit needs from unpacked packages in `files` to `base`.
fn collect(
    recipe: &Recipe,
    kernel: &str,
    packages: &[Package],
    files: &Path,
    base: &Path,
) -> Result<Info, BuildError> {
    let release = kernel.trim_start_matches("linux-image-");
    let missing = |package: &str, file: &str| BuildError::Missing {
        package: package.to_owned(),
        file: file.to_owned(),
    };

    let image = files.join("boot").join(format!("vmlinuz-{release}"));
    let bytes =
        fs::read(&image).map_err(|_| missing(kernel, &format!("/boot/vmlinuz-{release}")))?;
    let vmlinux = firn_vmm::boot::unpack::vmlinux(&bytes)
        .map_err(|source| BuildError::Kernel { path: image.clone(), source })?;
    write(&base.join("kernel"), &bytes)?;
    write(&base.join("vmlinux"), &vmlinux)?;

    let below = ["usr/lib/modules", "lib/modules"].map(|dir| files.join(dir).join(release));
    let tree = ModuleTree::scan(if below[0].exists() { &below[0] } else { &below[1] })?;
    let loaded = tree.load_order(recipe.modules)?;
    let mut on_demand = tree.load_order(recipe.on_demand)?;
    on_demand.retain(|module| !loaded.contains(module));
    let mut images = tree.load_order(recipe.images)?;
    images.retain(|module| !loaded.contains(module) && !on_demand.contains(module));
    let dir = base.join("modules");
    fs::create_dir(&dir).map_err(BuildError::io("create", &dir))?;
    for (name, path) in loaded.iter().chain(&on_demand).chain(&images) {
        write(&dir.join(format!("{name}.ko")), &modules::read(path)?)?;
    }

    let busybox = base.join("busybox");
    let source = files.join("bin/busybox");
    if !source.exists() {
        return Err(missing(BUSYBOX, "/bin/busybox"));
    }
    copy(&source, &busybox)?;
    let info = Info {
        kernel_release: release.to_owned(),
        packages: packages
            .iter()
            .map(|package| (package.name.clone(), package.version.clone()))
            .collect(),
        modules: loaded.into_iter().map(|(name, _)| name).collect(),
        on_demand: on_demand.into_iter().map(|(name, _)| name).collect(),
        images: images.into_iter().map(|(name, _)| name).collect(),
        applets: applets(&busybox)?,
    };
    if !recipe.packages.is_empty() {
        let debian = base.join("debian");
        fs::rename(files, &debian).map_err(BuildError::io("move", files))?;
        Debian::set_up(&debian, release)?;
    }
    json::write(&base.join("base.json"), &info)?;
    json::write(&base.join(FILES), &integrity::stamps(base, None)?)?;
    Ok(info)
}

/// Returns the commands that `busybox` lists.
fn applets(busybox: &Path) -> Result<Vec<String>, BuildError> {
    let output = Command::new(busybox).arg("--list").stdin(Stdio::null()).output();
    let output = output.map_err(|error| BuildError::Busybox(error.to_string()))?;
    let applets: Vec<_> =
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    if !output.status.success() || !applets.iter().any(|applet| applet == "sh") {
        return Err(BuildError::Busybox(output.status.to_string()));
    }
    Ok(applets)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    fs::write(path, bytes).map_err(BuildError::io("write", path))
}

fn copy(from: &Path, to: &Path) -> Result<(), BuildError> {
    fs::copy(from, to).map(drop).map_err(BuildError::io("copy", from))
}
