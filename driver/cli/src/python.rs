//! Finds the Python that runs test scripts.

use std::ffi::OsString;
use std::iter;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A Python interpreter with firn's package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Python {
    pub(super) path: PathBuf,
    /// Its version, such as `3.11.2`.
    pub(super) version: String,
}

/// Prints the version, and whether the package is installed in this program's version.
const PROBE: &str = "import sys, platform
print(platform.python_version())
try:
    from firn import __version__
    print(__version__)
except ImportError as error:
    print('!', error)
";

/// Checks what [`check`] does and says it in the same words; then calls `main` of the module that its first argument
/// names.
const EXECUTE: &str = "import sys
_, module, own, help, *arguments = sys.argv
try:
    from firn._firn import __version__ as package
except ImportError as error:
    version = '.'.join(map(str, sys.version_info[:3]))
    sys.exit(f'error: {sys.executable} (Python {version}) has no package firn ({error}): {help}')
if package != own:
    sys.exit(f'error: {sys.executable} has the package firn {package}, and this is firn {own}: {help}')
sys.argv[:] = [module, *arguments]
sys.exit(__import__(module, fromlist=['main']).main(arguments))
";

const HELP: &str =
    "install it with `maturin develop` (see the README), or name another Python by FIRN_PYTHON";

/// Finds a Python: `FIRN_PYTHON`, the one beside this program, one in a `.venv` above it or above the current directory,
/// or the one in `PATH`, in this order.
pub(super) fn find() -> Result<Python> {
    check(&locate()?)
}

/// The same without a look at what it is: [`execute`] does that.
pub(super) fn locate() -> Result<PathBuf> {
    candidates()
        .into_iter()
        .find(|path| path.is_file())
        .context("there is no python3: install it, or name one by FIRN_PYTHON")
}

/// The command that calls `main` of a module of the package with `arguments`, after what [`check`] would check:
/// starting Python only for that would double the time until a script runs.
pub(super) fn execute(
    python: &Path,
    module: &str,
    arguments: impl IntoIterator<Item = OsString>,
) -> Vec<OsString> {
    // -P: a file of the current directory must not stand in for a module.
    let words = ["-P", "-c", EXECUTE, module, env!("CARGO_PKG_VERSION"), HELP].map(OsString::from);
    iter::once(python.into()).chain(words).chain(arguments).collect()
}

fn candidates() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os("FIRN_PYTHON").filter(|value| !value.is_empty()) {
        return vec![in_path(&named).unwrap_or_else(|| named.into())];
    }
    let mut all = Vec::new();
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
    if let Some(dir) = &beside {
        all.push(dir.join("python3"));
    }
    for start in [beside, std::env::current_dir().ok()].into_iter().flatten() {
        all.extend(start.ancestors().map(|dir| dir.join(".venv/bin/python3")));
    }
    all.extend(in_path(&"python3".into()));
    all
}

fn in_path(name: &OsString) -> Option<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return None;
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

pub(super) fn check(path: &Path) -> Result<Python> {
    let shown = path.display();
    let output = Command::new(path).args(["-c", PROBE]).stdin(Stdio::null()).output();
    let output = match output {
        Ok(output) if output.status.success() => output,
        Ok(output) => {
            bail!("{shown} does not work: {}", String::from_utf8_lossy(&output.stderr).trim())
        }
        Err(error) => bail!("{shown} does not work: {error}"),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let (version, package) = text.split_once('\n').unwrap_or((&text, "! no answer"));
    let package = package.trim();
    if let Some(error) = package.strip_prefix("! ") {
        bail!("{shown} (Python {version}) has no package firn ({error}): {HELP}");
    }
    let own = env!("CARGO_PKG_VERSION");
    if package != own {
        bail!("{shown} has the package firn {package}, and this is firn {own}: {HELP}");
    }
    Ok(Python { path: path.to_owned(), version: version.to_owned() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// What `check` makes of a Python that prints this.
    fn checked(output: &str) -> Result<Python> {
        let dir = tempfile::tempdir().expect("a temp dir");
        let path = dir.path().join("python3");
        fs::write(&path, format!("#!/bin/sh\n{output}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("ours");
        check(&path)
    }

    #[test]
    fn one_with_the_package_will_do() {
        let python = checked(&format!("echo 3.12.1; echo {}", env!("CARGO_PKG_VERSION")))
            .expect("all is there");
        assert_eq!(python.version, "3.12.1");
    }

    /// What a real Python with this package makes of a command: its exit status and output.
    fn executed(files: &[(&str, &str)]) -> (Option<i32>, String) {
        let dir = tempfile::tempdir().expect("a temp dir");
        fs::create_dir(dir.path().join("firn")).expect("made");
        for (name, text) in files {
            fs::write(dir.path().join("firn").join(name), text).expect("written");
        }
        let python = in_path(&"python3".into()).expect("tests need Python");
        let argv = execute(&python, "firn.runner", ["one".into(), "".into()]);
        let output = Command::new(&argv[0])
            .args(&argv[1..])
            .env("PYTHONPATH", dir.path())
            .output()
            .expect("it starts");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    }

    #[test]
    fn what_is_executed_checks_itself() {
        let own = format!("__version__ = {:?}", env!("CARGO_PKG_VERSION"));
        let runner = "import sys\ndef main(given):\n    print(given, sys.argv)\n    return 7\n";
        let (status, said) = executed(&[("_firn.py", &own), ("runner.py", runner)]);
        assert_eq!((status, said.as_str()), (Some(7), "['one', ''] ['firn.runner', 'one', '']\n"));
        let (status, said) = executed(&[("_firn.py", "__version__ = '0.0.0-old'")]);
        assert_eq!(status, Some(1), "{said}");
        assert!(said.contains("has the package firn 0.0.0-old, and this is firn"), "{said}");
        let (status, said) = executed(&[("__init__.py", "")]);
        assert_eq!(status, Some(1), "{said}");
        assert!(said.contains(") has no package firn (No module named 'firn._firn')"), "{said}");
    }

    #[test]
    fn what_is_missing_is_said() {
        let error = checked("echo 3.12.1; echo \"! No module named 'firn'\"")
            .expect_err("no package")
            .to_string();
        assert!(
            error.contains("(Python 3.12.1) has no package firn (No module named 'firn')"),
            "{error}"
        );
        let error =
            checked("echo 3.12.1; echo 0.0.0-old").expect_err("another version").to_string();
        assert!(error.contains("has the package firn 0.0.0-old"), "{error}");
        let error = checked("echo broken >&2; exit 3").expect_err("it fails").to_string();
        assert!(error.ends_with("does not work: broken"), "{error}");
    }
}
