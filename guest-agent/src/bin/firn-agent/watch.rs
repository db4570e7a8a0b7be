//! Checks the conditions that the host waits for.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use firn_guest_agent::protocol::{Condition, Failure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::failure::failure;

/// Between two checks of a port or socket: the kernel has no event for their opening.
const INTERVAL: Duration = Duration::from_millis(5);
/// Between two checks of a file: inotify does not see what other systems do on a shared file system.
const FILE_INTERVAL_MS: u16 = 20;
/// Between two checks of a port that is to close: its server has to accept each connection.
const CLOSED_INTERVAL: Duration = Duration::from_millis(20);
/// How long a port may take to answer.
const CONNECT: Duration = Duration::from_secs(1);
/// A port that answers nothing for as long counts as closed. Shorter silence may be a server whose
/// backlog is full. Linux gives up a connection after 127 s (tcp_syn_retries, ip-sysctl.rst).
const SILENCE: Duration = Duration::from_secs(127);

/// A condition, and what is needed to check it.
pub enum Watch {
    File { path: PathBuf, events: Option<Events> },
    PortOpen { addresses: Vec<SocketAddr> },
    PortClosed { addresses: Vec<SocketAddr>, silent_since: Option<Instant> },
    Socket { path: PathBuf, datagram: bool },
}

/// Tells of changes in the directory that is nearest to a path.
pub struct Events {
    inotify: Inotify,
    watched: Option<(PathBuf, WatchDescriptor)>,
}

impl Watch {
    /// Prepares the checks.
    pub fn new(condition: &Condition) -> Result<Self, Failure> {
        Ok(match condition {
            Condition::Exists(path) => {
                Self::File { path: path.as_path().to_owned(), events: Events::new() }
            }
            Condition::PortOpen { host, port } => {
                Self::PortOpen { addresses: addresses(host, *port)? }
            }
            Condition::PortClosed { host, port } => {
                Self::PortClosed { addresses: addresses(host, *port)?, silent_since: None }
            }
            Condition::SocketOpen { path, datagram } => {
                Self::Socket { path: path.as_path().to_owned(), datagram: *datagram }
            }
        })
    }

    /// Whether it holds now.
    pub fn holds(&mut self) -> bool {
        match self {
            Self::File { path, events } => {
                // Watched before the look, or a change between both would be missed.
                if let Some(events) = events {
                    events.watch_near(path);
                }
                path.exists()
            }
            Self::PortOpen { addresses } => {
                addresses.iter().any(|address| answer(address) == Answer::Accepted)
            }
            Self::PortClosed { addresses, silent_since } => {
                let answers = addresses.iter().map(answer).max().unwrap_or(Answer::Refused);
                if answers != Answer::Silence {
                    *silent_since = None;
                    return answers == Answer::Refused;
                }
                silent_since.get_or_insert_with(Instant::now).elapsed() >= SILENCE
            }
            Self::Socket { path, datagram: false } => UnixStream::connect(path).is_ok(),
            Self::Socket { path, datagram: true } => {
                UnixDatagram::unbound().is_ok_and(|socket| socket.connect(path).is_ok())
            }
        }
    }

    /// Waits until another check is worthwhile.
    pub fn pause(&self) {
        match self {
            Self::File { events: Some(events), .. } => events.wait(),
            Self::PortClosed { .. } => thread::sleep(CLOSED_INTERVAL),
            Self::File { .. } | Self::PortOpen { .. } | Self::Socket { .. } => {
                thread::sleep(INTERVAL);
            }
        }
    }
}

impl Events {
    fn new() -> Option<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok()?;
        Some(Self { inotify, watched: None })
    }

    /// Watches the nearest directory above `path` that there is.
    fn watch_near(&mut self, path: &Path) {
        let Some(near) = path.ancestors().skip(1).find(|above| above.is_dir()) else { return };
        if self.watched.as_ref().is_some_and(|(watched, _)| watched == near) {
            return;
        }
        if let Some((_, watch)) = self.watched.take() {
            self.inotify.rm_watch(watch).ok();
        }
        let news =
            AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE_SELF;
        self.watched =
            self.inotify.add_watch(near, news).ok().map(|watch| (near.to_owned(), watch));
    }

    fn wait(&self) {
        let mut fds = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(FILE_INTERVAL_MS)).ok();
        // What happened does not matter: the path is looked at.
        self.inotify.read_events().ok();
    }
}

/// What becomes of a connection to a port; of several addresses, the greatest counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Answer {
    Refused,
    Silence,
    Accepted,
}

fn answer(address: &SocketAddr) -> Answer {
    match TcpStream::connect_timeout(address, CONNECT) {
        Ok(_) => Answer::Accepted,
        Err(error) if error.kind() == ErrorKind::TimedOut => Answer::Silence,
        Err(_) => Answer::Refused,
    }
}

/// The addresses of a host. A static program has no resolver; what it cannot find out is an error.
fn addresses(host: &str, port: u16) -> Result<Vec<SocketAddr>, Failure> {
    let found = match host.parse() {
        Ok(address) => vec![address],
        Err(_) if host == "localhost" => {
            vec![Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()]
        }
        Err(_) => in_hosts(&std::fs::read_to_string("/etc/hosts").unwrap_or_default(), host),
    };
    if found.is_empty() {
        return Err(failure(format!("{host} is no address, nor a name of /etc/hosts")));
    }
    Ok(found.into_iter().map(|address| SocketAddr::new(address, port)).collect())
}

/// The addresses that a hosts file has for a name.
fn in_hosts(file: &str, name: &str) -> Vec<IpAddr> {
    let address = |line: &str| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|word| word == name).then_some(address)
    };
    file.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixListener;

    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, getsockname, listen, socket,
    };

    use super::*;

    fn holds(condition: &Condition) -> bool {
        Watch::new(condition).unwrap_or_else(|e| panic!("{e}")).holds()
    }

    #[test]
    fn names_are_found_in_the_hosts_file() {
        let file = "127.0.0.1 localhost\n# 10.0.0.1 b\n10.0.0.2 a b # c\nnonsense b\nfd00::2 b";
        let expected: [IpAddr; 2] = ["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        assert_eq!(in_hosts(file, "b"), expected);
        assert!(in_hosts(file, "c").is_empty());
        assert!(addresses("no.such.name.invalid", 1).is_err());
    }

    #[test]
    fn ports_and_sockets_are_tried() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let host = || "localhost".to_owned();
        assert!(holds(&Condition::PortOpen { host: host(), port }));
        assert!(!holds(&Condition::PortClosed { host: host(), port }));
        drop(listener);
        assert!(!holds(&Condition::PortOpen { host: host(), port }));
        assert!(holds(&Condition::PortClosed { host: "127.0.0.1".to_owned(), port }));

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let open = |datagram| Condition::SocketOpen { path: (&path).into(), datagram };
        assert!(!holds(&open(false)));
        let listener = UnixListener::bind(&path).unwrap();
        assert!(holds(&open(false)) && !holds(&open(true)));
        drop(listener);
        assert!(!holds(&open(false)));
    }

    #[test]
    fn a_port_whose_backlog_is_full_is_neither_open_nor_closed() {
        let kind = SockType::Stream;
        let listener = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let port = getsockname::<SockaddrIn>(listener.as_raw_fd()).unwrap().port();
        let _waits = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        let host = || "127.0.0.1".to_owned();
        assert!(!holds(&Condition::PortOpen { host: host(), port }));
        assert!(!holds(&Condition::PortClosed { host: host(), port }));
    }

    #[test]
    fn a_file_is_seen_wherever_its_way_begins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/c");
        let mut watch = Watch::new(&Condition::Exists((&path).into())).unwrap();
        assert!(!watch.holds());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        assert!(!watch.holds());
        let writer = thread::spawn(move || std::fs::write(path, "").unwrap());
        while !watch.holds() {
            watch.pause();
        }
        writer.join().unwrap();
    }
}
