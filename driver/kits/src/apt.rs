//! Fetches Debian packages with apt, without root and without touching the host's own apt.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use thiserror::Error;

const MIRROR: &str = "http://deb.debian.org";
const MIRROR_VARIABLE: &str = "FIRN_DEBIAN_MIRROR";
/// Package lists are signed; the transport need not be.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Why a package could not be fetched.
#[derive(Debug, Error)]
pub enum AptError {
    /// A program is not installed.
    #[error(
        "`{program}` is not installed; kits are built from Debian packages with apt (Debian package `{package}`)"
    )]
    NoProgram {
        /// The program.
        program: &'static str,
        /// The Debian package that contains it.
        package: &'static str,
    },
    /// Debian's signing keys are not installed.
    #[error(
        "{KEYRING} is missing, so packages cannot be verified (Debian package `debian-archive-keyring`)"
    )]
    NoKeyring,
    /// apt ran and failed.
    #[error(
        "{what} from {mirror} failed:\n{message}\nIs the network up? {MIRROR_VARIABLE} can name another mirror."
    )]
    Failed {
        /// What was fetched.
        what: String,
        /// The mirror.
        mirror: String,
        /// apt's error output.
        message: String,
    },
    /// A package file could not be unpacked.
    #[error("unpacking {path} failed:\n{message}")]
    Unpack {
        /// The package file.
        path: PathBuf,
        /// dpkg-deb's error output.
        message: String,
    },
    /// The metapackage depends on no kernel image.
    #[error("Debian package {0} depends on no kernel image")]
    NoKernel(String),
    /// apt left no package file behind, or one with an invalid name.
    #[error("apt left no package file for {0}")]
    NoFile(String),
    /// A program could not be run, or a file could not be written.
    #[error("{action}")]
    Io {
        /// What was attempted.
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A downloaded package.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) file: PathBuf,
}

/// apt with its own package lists.
pub(crate) struct Apt {
    /// The codename of the Debian release.
    suite: &'static str,
    state: PathBuf,
    mirror: String,
}

impl Apt {
    /// Prepares `state`, a directory that keeps the package lists of `suite` between builds.
    pub(crate) fn new(suite: &'static str, state: &Path) -> Result<Self, AptError> {
        if !Path::new(KEYRING).exists() {
            return Err(AptError::NoKeyring);
        }
        let mirror = env::var(MIRROR_VARIABLE).unwrap_or_else(|_| MIRROR.to_owned());
        let io = |source| AptError::Io { action: format!("prepare {}", state.display()), source };
        for dir in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(state.join(dir)).map_err(io)?;
        }
        fs::write(state.join("sources.list"), sources(suite, &mirror)).map_err(io)?;
        // For this apt nothing is installed.
        fs::write(state.join("status"), "").map_err(io)?;
        Ok(Self { suite, state: state.to_owned(), mirror })
    }

    /// Updates the package lists.
    pub(crate) fn update(&self) -> Result<(), AptError> {
        self.run("fetching package lists", self.command("apt-get").arg("update")).map(drop)
    }

    /// Marks the newest versions of `packages` as installed, so that nothing pulls them in.
    pub(crate) fn pretend(&self, packages: &[&str]) -> Result<(), AptError> {
        let mut status = String::new();
        for package in packages {
            let mut command = self.command("apt-cache");
            let shown = self.run(package, command.args(["show", "--no-all-versions", package]))?;
            status.push_str(&installed(package, &String::from_utf8_lossy(&shown.stdout)));
        }
        let path = self.state.join("status");
        fs::write(&path, status)
            .map_err(|source| AptError::Io { action: format!("write {}", path.display()), source })
    }

    /// Returns the kernel image that the metapackage `meta` depends on, such as `linux-image-6.1.0-56-amd64`.
    pub(crate) fn kernel_of(&self, meta: &str) -> Result<String, AptError> {
        let output =
            self.run(meta, self.command("apt-cache").args(["depends", "--important", meta]))?;
        kernel_in(&String::from_utf8_lossy(&output.stdout))
            .ok_or_else(|| AptError::NoKernel(meta.to_owned()))
    }

    /// Downloads `packages` into `dir`. apt checks their signatures.
    pub(crate) fn download(&self, packages: &[&str], dir: &Path) -> Result<Vec<Package>, AptError> {
        self.run(
            &packages.join(", "),
            self.command("apt-get").arg("download").args(packages).current_dir(dir),
        )?;
        self.downloaded(packages, dir)
    }

    /// Returns the packages in `dir`, if all of `packages` are among them.
    fn downloaded(&self, packages: &[&str], dir: &Path) -> Result<Vec<Package>, AptError> {
        let io = |source| AptError::Io { action: format!("list {}", dir.display()), source };
        let mut found = Vec::new();
        for entry in fs::read_dir(dir).map_err(io)? {
            found.extend(package_of(&entry.map_err(io)?.path()));
        }
        match packages.iter().find(|name| !found.iter().any(|package| package.name == **name)) {
            None => Ok(found),
            Some(missing) => Err(AptError::NoFile((*missing).to_owned())),
        }
    }

    /// Downloads `packages` and their dependencies into `dir`, in addition to what it holds.
    pub(crate) fn download_all(
        &self,
        packages: &[&str],
        dir: &Path,
    ) -> Result<Vec<Package>, AptError> {
        let partial = dir.join("partial");
        fs::create_dir_all(&partial).map_err(|source| AptError::Io {
            action: format!("create {}", partial.display()),
            source,
        })?;
        let mut command = self.command("apt-get");
        command.arg("-o").arg(format!("Dir::Cache::Archives={}", dir.display()));
        command.args(["install", "--download-only", "--no-install-recommends", "--yes"]);
        let what = format!("{} and what it needs from {}", packages.join(", "), self.suite);
        self.run(&what, command.args(packages))?;
        self.downloaded(packages, dir)
    }

    fn command(&self, program: &'static str) -> Command {
        let mut command = mortal(program);
        let state = self.state.display();
        for option in [
            format!("Dir::State={state}"),
            format!("Dir::Cache={state}/cache"),
            format!("Dir::Etc::SourceList={state}/sources.list"),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            "Dir::Etc::Preferences=/dev/null".to_owned(),
            "Dir::Etc::PreferencesParts=/dev/null".to_owned(),
            format!("Dir::State::Status={state}/status"),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            // Root's cache is inaccessible to the user that apt would download as.
            "APT::Sandbox::User=root".to_owned(),
            "APT::Update::Error-Mode=any".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::GzipIndexes=true".to_owned(),
            "Acquire::Retries=2".to_owned(),
            "Acquire::http::Timeout=20".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command.arg("-q").env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    fn run(&self, what: &str, command: &mut Command) -> Result<Output, AptError> {
        let output = run(command, "apt-get", "apt")?;
        if output.status.success() {
            return Ok(output);
        }
        let message = complaint(&output);
        Err(AptError::Failed { what: what.to_owned(), mirror: self.mirror.clone(), message })
    }
}

impl Package {
    /// Unpacks the package's files into `dir`.
    pub(crate) fn unpack(&self, dir: &Path) -> Result<(), AptError> {
        let output =
            run(mortal("dpkg-deb").arg("--extract").args([&self.file, dir]), "dpkg-deb", "dpkg")?;
        if output.status.success() {
            return Ok(());
        }
        Err(AptError::Unpack { path: self.file.clone(), message: complaint(&output) })
    }
}

/// Returns a command that ends when this program is killed.
fn mortal(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--", program]);
    command
}

fn run(
    command: &mut Command,
    program: &'static str,
    package: &'static str,
) -> Result<Output, AptError> {
    let output = command.output().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => {
            AptError::NoProgram { program: "setpriv", package: "util-linux" }
        }
        _ => AptError::Io { action: format!("run {program}"), source },
    })?;
    // setpriv's exit status if it does not find the program.
    if output.status.code() == Some(127) {
        return Err(AptError::NoProgram { program, package });
    }
    Ok(output)
}

/// The last lines of a program's error output.
fn complaint(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

/// Returns a sources.list: the release, its updates and its security updates.
fn sources(suite: &str, mirror: &str) -> String {
    [("debian", ""), ("debian", "-updates"), ("debian-security", "-security")]
        .map(|(archive, part)| {
            format!(
                "deb [signed-by={KEYRING} target=Packages] {mirror}/{archive} {suite}{part} main\n"
            )
        })
        .concat()
}

/// Returns dpkg's status entry, without dependencies, for a package for which `apt-cache show` printed this. It is on
/// hold, or apt would take the version with dependencies for a newer one.
fn installed(package: &str, shown: &str) -> String {
    let version = shown.lines().find(|line| line.starts_with("Version: ")).unwrap_or_default();
    format!("Package: {package}\nStatus: hold ok installed\nArchitecture: amd64\n{version}\n\n")
}

/// Returns the kernel image in the output of `apt-cache depends`.
fn kernel_in(depends: &str) -> Option<String> {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| {
            name.strip_prefix("linux-image-")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
        .map(str::to_owned)
}

/// Parses `NAME_VERSION_ARCH.deb`; apt writes the colon of a version as `%3a`.
fn package_of(file: &Path) -> Option<Package> {
    let stem = file.file_name()?.to_str()?.strip_suffix(".deb")?;
    let mut parts = stem.split('_');
    let (name, version, _arch) = (parts.next()?, parts.next()?, parts.next()?);
    let version = version.replace("%3a", ":");
    parts.next().is_none().then(|| Package {
        name: name.to_owned(),
        version,
        file: file.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_kernel_of_a_metapackage() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n  Depends: linux-base\n";
        assert_eq!(kernel_in(depends).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(kernel_in("linux-image-amd64\n  Depends: linux-image-amd64-signed\n"), None);
        assert_eq!(kernel_in(""), None);
    }

    #[test]
    fn takes_package_files_apart() {
        let file = Path::new("/d/busybox-static_1%3a1.35.0-4+deb12u1+b1_amd64.deb");
        let package = package_of(file).unwrap();
        assert_eq!(
            (package.name.as_str(), package.version.as_str()),
            ("busybox-static", "1:1.35.0-4+deb12u1+b1")
        );
        for wrong in ["/d/partial", "/d/a_1.deb", "/d/a_1_amd64.deb.tmp", "/d/a_1_amd64_x.deb", "/"]
        {
            assert_eq!(package_of(Path::new(wrong)), None, "{wrong}");
        }
    }

    #[test]
    fn what_shall_be_absent_is_noted_as_there() {
        let shown = "Package: a\nSource: b (1.0)\nVersion: 2:1.0-1\nDepends: c, d\nSize: 1\n\n";
        assert_eq!(
            installed("a", shown),
            "Package: a\nStatus: hold ok installed\nArchitecture: amd64\nVersion: 2:1.0-1\n\n"
        );
    }

    #[test]
    fn sources_are_signed() {
        let sources = sources("bookworm", "http://mirror.example");
        assert_eq!(sources.lines().count(), 3);
        assert!(
            sources.lines().all(|line| line.starts_with("deb [signed-by=/usr/share/keyrings/"))
        );
        assert!(sources.contains("http://mirror.example/debian-security bookworm-security main"));
    }

    #[test]
    fn a_failure_shows_what_apt_said() {
        let dir = tempfile::tempdir().unwrap();
        let apt = Apt {
            suite: "bookworm",
            state: dir.path().to_owned(),
            mirror: "http://nowhere.invalid".to_owned(),
        };
        apt.pretend(&[]).unwrap();
        let error = apt.download(&["no-such-package-at-all"], dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("no-such-package-at-all") && error.contains("nowhere.invalid"),
            "{error}"
        );
        assert!(error.contains("Unable to locate package"), "{error}");
    }
}
