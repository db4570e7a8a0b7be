//! A command of the host, with what it needs to run in the carrier as it would here.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use firn_agent_client::ExecRequest;

use super::CarrierError;

/// Changes to the directory in the first argument and executes the others; exits with 125 if that fails, as `env` and
/// `chroot` do. The kernel's limit of 4,096 open files for init, which all others inherit, is too low for machines.
const IN_DIRECTORY: &str = "ulimit -Hn 1048576; cd \"$1\" || exit 125; shift; exec \"$@\"";

/// Variables that refer to things not in the carrier.
const FOREIGN: [&str; 3] = ["XDG_RUNTIME_DIR", "SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS"];

/// A command, its environment and its user: by default those of this process.
#[derive(Clone, Debug)]
pub struct HostCommand {
    argv: Vec<OsString>,
    pub(super) cwd: PathBuf,
    env: Vec<(OsString, OsString)>,
    user: User,
    stdin: bool,
}

/// A process's user.
#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    uid: u32,
    gid: u32,
    groups: String,
}

impl HostCommand {
    /// Creates the command `argv`, the program first, with this process's working directory, environment and user.
    ///
    /// # Errors
    /// If `argv` is empty or the working directory is gone.
    pub fn new<S: Into<OsString>>(argv: impl IntoIterator<Item = S>) -> Result<Self, CarrierError> {
        let argv: Vec<_> = argv.into_iter().map(Into::into).collect();
        if argv.is_empty() {
            return Err(CarrierError::Command("there is no command to run".to_owned()));
        }
        let cwd = env::current_dir().map_err(CarrierError::host("find the working directory"))?;
        let env = env::vars_os().filter(|(name, _)| !FOREIGN.iter().any(|it| name == it)).collect();
        let user = User::of_this_process().map_err(CarrierError::host("read /proc/self"))?;
        Ok(Self { argv, cwd, env, user, stdin: false })
    }

    /// Runs it in `dir`.
    #[must_use]
    pub fn current_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = dir.into();
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        let name = name.into();
        self.env.retain(|(other, _)| *other != name);
        self.env.push((name, value.into()));
        self
    }

    /// Gives it input, through [`Exec::take_stdin`](firn_agent_client::Exec::take_stdin).
    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// The request to the carrier's agent: the command, in the host's root directory and as the host's user.
    pub(super) fn request(&self) -> Result<ExecRequest, CarrierError> {
        let mut argv = vec!["/bin/busybox".to_owned(), "chroot".to_owned(), "/mnt".to_owned()];
        // The shell comes first: busybox would run its own applet for a bare `setpriv`.
        argv.extend(["/bin/sh", "-c", IN_DIRECTORY, "sh"].map(str::to_owned));
        argv.push(text(self.cwd.as_os_str(), "the working directory")?);
        argv.extend(self.user.switch());
        for argument in &self.argv {
            argv.push(text(argument, "an argument")?);
        }
        let mut request = ExecRequest::argv(argv);
        for (name, value) in &self.env {
            // Variables that are not UTF-8 are rare, and commands seldom depend on them.
            if let (Some(name), Some(value)) = (name.to_str(), value.to_str()) {
                request.env.push((name.to_owned(), value.to_owned()));
            }
        }
        request.cwd = Some("/".into());
        request.stdin = self.stdin;
        Ok(request)
    }
}

impl User {
    fn of_this_process() -> io::Result<Self> {
        let this = fs::metadata("/proc/self")?;
        let status = fs::read_to_string("/proc/self/status")?;
        let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
        let groups = groups.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(",");
        Ok(Self { uid: this.uid(), gid: this.gid(), groups })
    }

    /// The command prefix that switches from root to this user.
    fn switch(&self) -> Vec<String> {
        if self.uid == 0 {
            return Vec::new();
        }
        let groups = match self.groups.as_str() {
            "" => "--clear-groups".to_owned(),
            groups => format!("--groups={groups}"),
        };
        let (uid, gid) = (self.uid, self.gid);
        vec!["setpriv".into(), format!("--reuid={uid}"), format!("--regid={gid}"), groups]
    }
}

fn text(value: &OsStr, what: &str) -> Result<String, CarrierError> {
    let refuse = || CarrierError::Command(format!("{what} is not UTF-8: {}", value.display()));
    value.to_str().map(str::to_owned).ok_or_else(refuse)
}

/// The working directory, if it can be writable in the carrier: neither the root, which is shared read-only, nor a
/// directory where the carrier has a file system of its own.
pub(super) fn writable_here(cwd: &Path) -> Option<PathBuf> {
    let own = ["/dev", "/proc", "/sys", "/run"].iter().any(|own| cwd.starts_with(own));
    (cwd != Path::new("/") && !own).then(|| cwd.to_owned())
}

/// `directories` with symbolic links resolved, in mount order, without those that lie inside another.
pub(super) fn writable_roots(directories: &[PathBuf]) -> Result<Vec<PathBuf>, CarrierError> {
    let mut roots = Vec::new();
    for path in directories {
        let failed = |source| CarrierError::Writable { path: path.clone(), source };
        let real = fs::canonicalize(path).map_err(failed)?;
        if !real.is_dir() {
            return Err(failed(io::ErrorKind::NotADirectory.into()));
        }
        let real = writable_here(&real).ok_or_else(|| {
            failed(io::Error::other("it is the root, or the carrier has its own"))
        })?;
        roots.push(real);
    }
    roots.sort();
    let mut kept: Vec<PathBuf> = Vec::new();
    for root in roots {
        // Sorted by components, so a directory comes right before its contents.
        if !kept.last().is_some_and(|last| root.starts_with(last)) {
            kept.push(root);
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use firn_agent_client::Program;

    fn argv(request: ExecRequest) -> Vec<String> {
        match request.program {
            Program::Argv(argv) => argv,
            Program::Shell(script) => panic!("{script}"),
        }
    }

    #[test]
    fn runs_in_the_hosts_root_as_the_caller() {
        let mut command = HostCommand::new(["ls", "-l"]).unwrap().current_dir("/work").stdin();
        command.user = User { uid: 1000, gid: 100, groups: "100,27".into() };
        let request = command.request().unwrap();
        assert!(request.stdin);
        let argv_of_user = argv(request).join(" ");
        assert_eq!(
            argv_of_user,
            format!(
                "/bin/busybox chroot /mnt /bin/sh -c {IN_DIRECTORY} sh /work \
                 setpriv --reuid=1000 --regid=100 --groups=100,27 ls -l"
            )
        );
        command.user = User { uid: 0, gid: 0, groups: String::new() };
        assert!(!argv(command.request().unwrap()).contains(&"setpriv".to_owned()));
    }

    #[test]
    fn variables_can_be_replaced() {
        let command = HostCommand::new(["x"]).unwrap().env("FIRN_X", "1").env("FIRN_X", "2");
        let env = command.request().unwrap().env;
        assert_eq!(env.iter().filter(|(name, _)| name == "FIRN_X").count(), 1);
        assert!(env.contains(&("FIRN_X".into(), "2".into())));
    }

    #[test]
    fn refuses_what_cannot_be_sent() {
        use std::os::unix::ffi::OsStringExt;
        assert!(HostCommand::new([""; 0]).is_err());
        let odd = OsString::from_vec(vec![b'a', 0xff]);
        let error = HostCommand::new([odd]).unwrap().request().unwrap_err().to_string();
        assert!(error.starts_with("an argument is not UTF-8"), "{error}");
    }

    #[test]
    fn nested_directories_are_shared_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = fs::canonicalize(dir.path()).unwrap();
        for name in ["a", "a/b", "a-c"] {
            fs::create_dir(dir.join(name)).unwrap();
        }
        std::os::unix::fs::symlink("a", dir.join("link")).unwrap();
        let wanted = ["a/b", "a-c", "link", "a"].map(|name| dir.join(name));
        assert_eq!(writable_roots(&wanted).unwrap(), [dir.join("a"), dir.join("a-c")]);
        for wrong in ["/", "/proc", "/no/such/dir", "/etc/passwd"] {
            assert!(writable_roots(&[wrong.into()]).is_err(), "{wrong}");
        }
    }
}
