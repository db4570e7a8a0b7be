//! File requests and waits, each on a thread of its own: any of them may block for as long as a file system likes.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;

use firn_guest_agent::protocol::{
    BytePath, Condition, Entry, Failure, FileInfo, FileKind, MAX_CHUNK, MESSAGE_COST, MIN_CHUNK,
    ReceiveWindow, RequestId, SEED_LEN, SendWindow, ToAgent, ToHost, WINDOW,
};
use linux_crng_ioctl::ioctl::{add_randomness_to_kernel, force_kernel_crng_reseed};

use crate::failure::{Context, failure};
use crate::outbox::Outbox;
use crate::watch::Watch;

/// Entries of a directory are sent in messages of about this cost.
const LIST_BATCH: usize = 32 * 1024;

/// The main thread's end of a file request. The worker is cancelled when it is dropped.
pub struct Transfer {
    inbox: Sender<ToAgent>,
    queued: Arc<AtomicU32>,
}

impl Transfer {
    /// Hands a message of the host to the worker.
    pub fn deliver(&self, message: ToAgent) -> Result<(), &'static str> {
        let cost = message.cost();
        let before = self.queued.fetch_add(cost, Ordering::Relaxed);
        if cost > WINDOW || before > WINDOW - cost {
            return Err("data beyond the window");
        }
        // A worker that has just ended needs nothing more.
        self.inbox.send(message).ok();
        Ok(())
    }
}

/// Starts a worker for a request of the family `WriteFile` to `Sync`, for `Wait` or `Reseed`.
pub fn start(id: RequestId, request: ToAgent, outbox: Arc<Outbox>) -> Result<Transfer, Failure> {
    let (sender, inbox) = channel();
    let queued = Arc::new(AtomicU32::new(0));
    let transfer = Transfer { inbox: sender, queued: Arc::clone(&queued) };
    let (send, receive) = (SendWindow::default(), ReceiveWindow::default());
    let mut worker = Worker { id, inbox, queued, outbox, send, receive };
    let run = move || {
        let message = match worker.run(request) {
            Ok(()) => ToHost::Done,
            Err(End::Failed(failure)) => ToHost::Failed(failure),
            Err(End::Cancelled) => ToHost::Done,
        };
        // A session that has ended wants to hear nothing.
        worker.outbox.push_from_worker(id, message, true).ok();
    };
    thread::Builder::new()
        .name(format!("file-{id}"))
        .stack_size(256 * 1024)
        .spawn(run)
        .context(|| "start a thread".to_owned())?;
    Ok(transfer)
}

/// Why a worker stops early.
enum End {
    Failed(Failure),
    Cancelled,
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<crate::outbox::Closed> for End {
    fn from(_: crate::outbox::Closed) -> Self {
        Self::Cancelled
    }
}

struct Worker {
    id: RequestId,
    inbox: Receiver<ToAgent>,
    /// The cost of the messages in `inbox`.
    queued: Arc<AtomicU32>,
    outbox: Arc<Outbox>,
    send: SendWindow,
    receive: ReceiveWindow,
}

impl Worker {
    fn run(&mut self, request: ToAgent) -> Result<(), End> {
        match request {
            ToAgent::WriteFile { path, mode } => self.write(path.as_path(), mode),
            ToAgent::ReadFile { path } => self.read(path.as_path()),
            ToAgent::Stat { path, follow } => {
                let info = info(path.as_path(), follow)?;
                Ok(self.outbox.push_from_worker(self.id, ToHost::Info(info), false)?)
            }
            ToAgent::List { path } => self.list(path.as_path()),
            ToAgent::MakeDirectory { path, mode } => Ok(make_directory(path.as_path(), mode)?),
            ToAgent::Symlink { path, target } => {
                Ok(make_symlink(path.as_path(), target.as_path())?)
            }
            ToAgent::Sync => {
                nix::unistd::sync();
                Ok(())
            }
            ToAgent::Wait(condition) => self.wait(&condition),
            ToAgent::Reseed(seed) => Ok(reseed(&seed)?),
            _ => Err(failure("not a file request").into()),
        }
    }

    fn wait(&mut self, condition: &Condition) -> Result<(), End> {
        let mut watch = Watch::new(condition)?;
        while !watch.holds() {
            watch.pause();
            match self.inbox.try_recv() {
                Ok(ToAgent::Cancel) | Err(TryRecvError::Disconnected) => {
                    return Err(End::Cancelled);
                }
                Ok(_) | Err(TryRecvError::Empty) => {}
            }
        }
        Ok(())
    }

    fn write(&mut self, path: &Path, mode: u32) -> Result<(), End> {
        make_parents(path)?;
        let what = || format!("write {}", path.display());
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode & 0o7777)
            .open(path)
            .context(|| format!("open {}", path.display()))?;
        let regular = file.metadata().context(what)?.is_file();
        loop {
            match self.inbox.recv() {
                Ok(ToAgent::Data(bytes)) => {
                    file.write_all(&bytes).context(what)?;
                    self.used(ToAgent::Data(bytes).cost())?;
                }
                Ok(ToAgent::Eof) => break,
                Ok(ToAgent::Cancel) | Err(_) => return Err(End::Cancelled),
                Ok(_) => {}
            }
        }
        if regular {
            // Last, because a write clears set-uid, and because the umask took part in the creation.
            file.set_permissions(Permissions::from_mode(mode & 0o7777)).context(what)?;
        }
        Ok(())
    }

    fn used(&mut self, cost: u32) -> Result<(), End> {
        self.queued.fetch_sub(cost, Ordering::Relaxed);
        if let Some(credit) = self.receive.release(cost) {
            self.outbox.push_from_worker(self.id, ToHost::Credit(credit), false)?;
        }
        Ok(())
    }

    fn read(&mut self, path: &Path) -> Result<(), End> {
        let mut file = File::open(path).context(|| format!("open {}", path.display()))?;
        let what = || format!("read {}", path.display());
        let metadata = file.metadata().context(what)?;
        self.outbox.push_from_worker(self.id, ToHost::Info(describe(path, &metadata)), false)?;
        loop {
            let mut bytes = vec![0; self.wait_for_window(MIN_CHUNK)?.min(MAX_CHUNK)];
            let length = match file.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).context(what)?,
            };
            bytes.truncate(length);
            self.contents(ToHost::Data(bytes))?;
        }
    }

    fn contents(&mut self, message: ToHost) -> Result<(), End> {
        if !self.send.spend(message.cost()) {
            return Err(failure("sent beyond the window").into());
        }
        Ok(self.outbox.push_contents(self.id, message)?)
    }

    /// Waits until `least` bytes and a message may be sent, and gives the bytes that may.
    fn wait_for_window(&mut self, least: usize) -> Result<usize, End> {
        loop {
            let open = usize::try_from(self.send.open().saturating_sub(MESSAGE_COST))
                .unwrap_or(usize::MAX);
            let message = if open >= least {
                match self.inbox.try_recv() {
                    Ok(message) => message,
                    Err(TryRecvError::Empty) => return Ok(open),
                    Err(TryRecvError::Disconnected) => return Err(End::Cancelled),
                }
            } else {
                self.inbox.recv().map_err(|_| End::Cancelled)?
            };
            match message {
                ToAgent::Credit(credit) if !self.send.grant(credit) => {
                    return Err(failure("credit beyond the window").into());
                }
                ToAgent::Cancel => return Err(End::Cancelled),
                _ => {}
            }
        }
    }

    fn list(&mut self, path: &Path) -> Result<(), End> {
        let what = || format!("list {}", path.display());
        let mut batch = Vec::new();
        let mut cost = 0;
        for entry in fs::read_dir(path).context(what)? {
            let entry = entry.context(what)?;
            let info = match info(&entry.path(), false) {
                Ok(info) => info,
                // It has gone since the directory was read.
                Err(failure) if failure.errno == Some(nix::errno::Errno::ENOENT as i32) => continue,
                Err(failure) => return Err(failure.into()),
            };
            let entry = Entry { name: BytePath::from(&entry.file_name()), info };
            cost += entry.cost();
            batch.push(entry);
            if cost >= LIST_BATCH {
                self.wait_for_window(cost)?;
                cost = 0;
                self.contents(ToHost::Entries(std::mem::take(&mut batch)))?;
            }
        }
        if !batch.is_empty() {
            self.wait_for_window(cost)?;
            self.contents(ToHost::Entries(batch))?;
        }
        Ok(())
    }
}

fn info(path: &Path, follow: bool) -> Result<FileInfo, Failure> {
    let metadata = if follow { fs::metadata(path) } else { fs::symlink_metadata(path) };
    Ok(describe(path, &metadata.context(|| format!("stat {}", path.display()))?))
}

fn describe(path: &Path, metadata: &fs::Metadata) -> FileInfo {
    let kind = match metadata.file_type() {
        kind if kind.is_file() => FileKind::File,
        kind if kind.is_dir() => FileKind::Directory,
        kind if kind.is_symlink() => FileKind::Symlink,
        _ => FileKind::Other,
    };
    let target = (kind == FileKind::Symlink).then(|| fs::read_link(path).ok()).flatten();
    FileInfo {
        kind,
        mode: metadata.permissions().mode() & 0o7777,
        size: metadata.len(),
        target: target.map(|target| BytePath::from(&target)),
    }
}

fn make_parents(path: &Path) -> Result<(), Failure> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).context(|| format!("make {}", parent.display())),
        None => Ok(()),
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<(), Failure> {
    fs::create_dir_all(path).context(|| format!("make {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(mode & 0o7777))
        .context(|| format!("set the mode of {}", path.display()))
}

fn make_symlink(path: &Path, target: &Path) -> Result<(), Failure> {
    make_parents(path)?;
    let what = || format!("link {}", path.display());
    match symlink(target, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(path).context(what)?;
            symlink(target, path).context(what)
        }
        result => result.context(what),
    }
}

/// Mixes the seed into the kernel's pool, as good as it says, and has the generator take a new key from there. What a
/// copy of this guest draws differs from now on (`RNDADDENTROPY` and `RNDRESEEDCRNG`, drivers/char/random.c).
fn reseed(seed: &[u8; SEED_LEN]) -> Result<(), Failure> {
    let bits = u32::try_from(seed.len() * 8).unwrap_or(0);
    add_randomness_to_kernel(seed, bits)
        .and_then(|()| force_kernel_crng_reseed())
        .map_err(|error| failure(format!("reseed the kernel's random numbers: {error:#}")))
}
