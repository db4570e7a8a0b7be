//! Files of the host that are passed to the guest at its start.

use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use firn_vmm::spec::ShareSpec;
use tempfile::NamedTempFile;
use tokio::fs;

use crate::config::NodeConfig;
use crate::error::MachineError;

/// A machine's credentials as SMBIOS strings, where systemd looks for them (`man 7 systemd.system-credentials`).
pub(super) async fn credentials(node: &NodeConfig) -> Result<Vec<String>, MachineError> {
    let mut texts = Vec::with_capacity(node.credentials.len());
    for (name, path) in &node.credentials {
        let secret = fs::read(path).await.map_err(MachineError::file("read", path))?;
        texts.push(format!("io.systemd.credential.binary:{name}={}", BASE64.encode(secret)));
    }
    Ok(texts)
}

/// Copies the files that belong into a share's directory. Calls `missing` for each that does not exist, with its name
/// in the share first.
pub(super) async fn fill(
    share: &ShareSpec,
    missing: impl Fn(&str, &Path),
) -> Result<(), MachineError> {
    let directory = &share.source;
    if !share.copies.is_empty() {
        fs::create_dir_all(directory).await.map_err(MachineError::file("make", directory))?;
    }
    for (name, file) in &share.copies {
        match fs::read(file).await {
            Ok(bytes) => {
                let target = directory.join(&**name);
                put(directory, &target, &bytes).map_err(MachineError::file("write", target))?;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => missing(name, file),
            Err(error) => return Err(MachineError::file("read", file)(error)),
        }
    }
    Ok(())
}

/// Writes a whole file. Anything a guest has put in its place, even a link, is replaced and not followed.
fn put(directory: &Path, target: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    // Not only root in the guest reads it.
    file.as_file().set_permissions(PermissionsExt::from_mode(0o644))?;
    file.persist(target)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn share(source: &Path, copies: &[(&str, &Path)]) -> ShareSpec {
        ShareSpec {
            copies: copies
                .iter()
                .map(|(name, file)| ((*name).try_into().expect("a name"), (*file).into()))
                .collect(),
            ..ShareSpec::new("certs".try_into().expect("a tag"), source.into())
        }
    }

    #[tokio::test]
    async fn copies_are_made_anew_at_each_start_and_follow_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let (certs, bundle) = (dir.path().join("certs"), dir.path().join("bundle"));
        let (secret, target) = (dir.path().join("secret"), certs.join("a.crt"));
        std::fs::write(&bundle, "first").expect("written");
        std::fs::write(&secret, "kept").expect("written");
        let share = share(&certs, &[("a.crt", &bundle), ("b.crt", Path::new(""))]);
        let missing = Mutex::new(Vec::new());
        let note = |name: &str, _: &Path| missing.lock().expect("no panic").push(name.to_owned());
        fill(&share, note).await.expect("filled");
        assert_eq!(std::fs::read(&target).expect("there"), b"first");
        let mode = std::fs::metadata(&target).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o644);

        // A guest may have done this between two starts.
        std::fs::remove_file(&target).expect("removed");
        std::os::unix::fs::symlink(&secret, &target).expect("linked");
        std::fs::write(&bundle, "second").expect("written");
        fill(&share, note).await.expect("filled");
        assert_eq!(std::fs::read(&target).expect("there"), b"second");
        assert!(!target.is_symlink());
        assert_eq!(std::fs::read(&secret).expect("there"), b"kept");
        assert_eq!(*missing.lock().expect("no panic"), ["b.crt", "b.crt"]);
        // Nothing else is left.
        assert_eq!(std::fs::read_dir(&certs).expect("there").count(), 1);

        let bad = fill(&self::share(&certs, &[("a.crt", dir.path())]), note).await;
        assert!(bad.is_err(), "a directory is no file");
    }
}
