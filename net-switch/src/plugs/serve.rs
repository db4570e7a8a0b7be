//! The thread that watches the sockets of a directory.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{MsgFlags, recv};
use tracing::{debug, warn};
use vm_memory::VolatileSlice;

use super::outlet::{Framing, Outlet};
use super::stream::Decoder;
use super::vde::{self, MAX_REQUEST, Request};
use super::{MAX_PLUGS, PlugStats, close};
use crate::lock;
use crate::port::{Frame, Header, MAX_FRAME, NetPort, Receiver};
use crate::switch::{Switch, SwitchPort};

/// How many frames are taken from one plug before the others have their turn.
const TURN: usize = 64;
/// How long a plug may take to ask.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most that connect and have not asked yet; the oldest goes for a new one.
const MAX_ASKING: usize = 32;
/// What is waited after an error of accepting, most likely for want of descriptors.
const PAUSE: Duration = Duration::from_millis(40);

/// What others may know of a plug.
#[derive(Debug)]
pub(super) struct Plugged {
    name: String,
    port: SwitchPort,
    outlet: Arc<Outlet>,
}

impl Plugged {
    pub(super) fn stats(&self) -> PlugStats {
        PlugStats {
            name: self.name.clone(),
            port: self.port.stats(),
            dropped: self.outlet.dropped(),
        }
    }

    fn send(&self, data: &mut [u8]) {
        // With this a point-to-point plug says goodbye.
        if data.is_empty() {
            return;
        }
        let data = [VolatileSlice::from(data)];
        self.port.send(&Frame { header: Header::default(), data: &data });
    }
}

/// What is watched and done for all plugs of a directory.
pub(super) struct Server {
    pub(super) switch: Switch,
    pub(super) dir: PathBuf,
    pub(super) control: UnixListener,
    pub(super) stream: UnixListener,
    pub(super) datagrams: UnixDatagram,
    pub(super) waker: Arc<EventFd>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) plugged: Arc<Mutex<Vec<Arc<Plugged>>>>,
}

/// A connection that has not asked yet.
struct Asking {
    control: UnixStream,
    since: Instant,
    over: bool,
}

struct Plug {
    plugged: Arc<Plugged>,
    kind: Kind,
    gone: bool,
}

enum Kind {
    Vde {
        /// Silent; its end is the plug's.
        control: UnixStream,
        names: Names,
    },
    Stream(Decoder),
    /// Of what the common socket gets, it sends what comes from this address.
    Datagrams(PathBuf),
}

/// The names of the sockets of a VDE plug, which are removed.
struct Names {
    own: PathBuf,
    /// That of the plug; it does the same unless it is killed.
    plug: PathBuf,
    /// Whether that lies in the switch's directory.
    inside: bool,
}

impl Drop for Names {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.own);
        let is_socket = |file: fs::Metadata| file.file_type().is_socket();
        if self.inside && fs::symlink_metadata(&self.plug).is_ok_and(is_socket) {
            let _ = fs::remove_file(&self.plug);
        }
    }
}

/// What is watched.
#[derive(Clone, Copy)]
enum Watched {
    Waker,
    Control,
    Stream,
    Datagrams,
    Asking(usize),
    /// The connection of a VDE plug.
    Line(usize),
    /// Its frames.
    Frames(usize),
}

impl Server {
    /// Runs until it is told to stop.
    pub(super) fn run(self) {
        let mut state = State {
            server: &self,
            asking: Vec::new(),
            plugs: Vec::new(),
            next: 0,
            pause: None,
            buffer: vec![0; MAX_FRAME + 1],
        };
        while !self.stop.load(Ordering::Acquire) {
            if let Err(error) = state.round() {
                warn!(dir = %self.dir.display(), %error, "plugs are not served any more");
                break;
            }
        }
        lock(&self.plugged).clear();
    }
}

struct State<'a> {
    server: &'a Server,
    asking: Vec<Asking>,
    plugs: Vec<Plug>,
    /// The number of the next plug.
    next: usize,
    /// Until then nobody is accepted.
    pause: Option<Instant>,
    /// Longer than any frame, so that longer ones are seen to be so.
    buffer: Vec<u8>,
}

impl State<'_> {
    fn round(&mut self) -> io::Result<()> {
        for (what, events) in self.wait()? {
            let room = events.contains(PollFlags::POLLOUT);
            // Errors and hang-ups show when it is read from.
            let readable = events.intersects(!PollFlags::POLLOUT);
            match what {
                Watched::Waker => drop(self.server.waker.read()),
                Watched::Control => self.accept_asking(),
                Watched::Stream => self.accept_stream(),
                Watched::Datagrams => self.datagrams(),
                Watched::Asking(index) => self.asked(index),
                Watched::Line(index) => self.line(index),
                Watched::Frames(index) => {
                    if room {
                        self.plugs[index].plugged.outlet.drain();
                    }
                    if readable {
                        self.frames(index);
                    }
                }
            }
        }
        self.asking.retain(|asking| !asking.over && asking.since.elapsed() < PATIENCE);
        self.unplug();
        Ok(())
    }

    /// Waits until something happens.
    fn wait(&mut self) -> io::Result<Vec<(Watched, PollFlags)>> {
        let now = Instant::now();
        let server = self.server;
        self.pause = self.pause.filter(|until| *until > now);
        let input = PollFlags::POLLIN;
        let mut watched = vec![
            (Watched::Waker, PollFd::new(server.waker.as_fd(), input)),
            (Watched::Datagrams, PollFd::new(server.datagrams.as_fd(), input)),
        ];
        if self.pause.is_none() {
            watched.push((Watched::Control, PollFd::new(server.control.as_fd(), input)));
            watched.push((Watched::Stream, PollFd::new(server.stream.as_fd(), input)));
        }
        for (index, asking) in self.asking.iter().enumerate() {
            watched.push((Watched::Asking(index), PollFd::new(asking.control.as_fd(), input)));
        }
        for (index, plug) in self.plugs.iter().enumerate() {
            let outlet = &plug.plugged.outlet;
            let mut events = input;
            if outlet.is_waiting() {
                events |= PollFlags::POLLOUT;
            }
            if let Kind::Vde { control, .. } = &plug.kind {
                watched.push((Watched::Line(index), PollFd::new(control.as_fd(), input)));
            }
            watched.push((Watched::Frames(index), PollFd::new(outlet.as_fd(), events)));
        }
        let ends = self.asking.iter().map(|asking| asking.since + PATIENCE).chain(self.pause);
        let timeout = match ends.min() {
            Some(end) => {
                // Rounded up, or it would be woken too early.
                let left = end.saturating_duration_since(now) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        let (kinds, mut fds): (Vec<_>, Vec<_>) = watched.into_iter().unzip();
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        Ok(kinds.into_iter().zip(events).filter(|(_, events)| !events.is_empty()).collect())
    }

    fn accept_asking(&mut self) {
        if let Some(control) = accept(&self.server.control, &mut self.pause) {
            if self.asking.len() >= MAX_ASKING
                && let Some(oldest) = self.asking.iter_mut().find(|asking| !asking.over)
            {
                oldest.over = true;
            }
            self.asking.push(Asking { control, since: Instant::now(), over: false });
        }
    }

    fn accept_stream(&mut self) {
        if let Some(stream) = accept(&self.server.stream, &mut self.pause) {
            let kind = Kind::Stream(Decoder::default());
            self.plug("stream".to_owned(), stream.into(), Framing::Stream, kind);
        }
    }

    /// Reads what a connection asks.
    fn asked(&mut self, index: usize) {
        let asking = &mut self.asking[index];
        let mut request = [0; MAX_REQUEST];
        let read = match asking.control.read(&mut request) {
            Err(error) if is_passing(&error) => return,
            read => read,
        };
        asking.over = true;
        let (Ok(read @ 1..), Ok(control)) = (read, asking.control.try_clone()) else { return };
        let done = match Request::parse(&request[..read]) {
            Ok(request) => self.plug_vde(control, &request),
            Err(error) => Err(error.to_string()),
        };
        if let Err(why) = done {
            // The plug sees that the connection is closed, and no more.
            debug!(dir = %self.server.dir.display(), why, "refused a plug");
        }
    }

    fn plug_vde(&mut self, control: UnixStream, request: &Request<'_>) -> Result<(), String> {
        let taken = |plug: &Plug| match &plug.kind {
            Kind::Vde { names, .. } => names.plug == request.path,
            _ => false,
        };
        if self.plugs.iter().any(taken) {
            return Err(format!("another plug has the socket {}", request.path.display()));
        }
        let said = |error: io::Error| error.to_string();
        if self.plugs.len() >= MAX_PLUGS {
            return Err(format!("{MAX_PLUGS} are plugged in already"));
        }
        self.next = self.next % 999 + 1;
        // The descriptor makes it unique.
        let own = self.server.dir.join(format!("{:03}.{}", self.next, control.as_raw_fd()));
        let socket = UnixDatagram::bind(&own).map_err(said)?;
        let inside = lies_in(&self.server.dir, request.path);
        let names = Names { own, plug: request.path.to_owned(), inside };
        socket.connect(request.path).map_err(said)?;
        close(&names.own).map_err(said)?;
        let answer = vde::answer(&names.own).ok_or("its socket's path is too long")?;
        let text = String::from_utf8_lossy(request.description);
        let name = text.chars().filter(|letter| !letter.is_control()).collect();
        let mut answered = control.try_clone().map_err(said)?;
        // Before the answer: a plug that has it expects frames.
        self.plug(name, socket.into(), Framing::Datagrams, Kind::Vde { control, names });
        // A new connection has room for it. One that has gone is unplugged when its end is read.
        answered.write_all(&answer).map_err(said)
    }

    fn plug(&mut self, name: String, socket: OwnedFd, framing: Framing, kind: Kind) {
        let server = self.server;
        if self.plugs.len() >= MAX_PLUGS {
            return debug!(dir = %server.dir.display(), name, "refused a plug: too many");
        }
        let outlet = Arc::new(Outlet::new(socket, framing, Arc::clone(&server.waker)));
        let port = server.switch.add_port(format!("plug {name}"));
        port.attach(Arc::clone(&outlet) as Arc<dyn Receiver>);
        let plugged = Arc::new(Plugged { name, port, outlet });
        lock(&server.plugged).push(Arc::clone(&plugged));
        self.plugs.push(Plug { plugged, kind, gone: false });
    }

    /// Something came over the connection of a VDE plug, where nothing is to be said.
    fn line(&mut self, index: usize) {
        let plug = &mut self.plugs[index];
        let Kind::Vde { control, .. } = &mut plug.kind else { return };
        match control.read(&mut self.buffer) {
            Err(error) if is_passing(&error) => {}
            Ok(1..) => {}
            Ok(0) | Err(_) => plug.gone = true,
        }
    }

    /// Takes a plug's frames.
    fn frames(&mut self, index: usize) {
        let Plug { plugged, kind, gone } = &mut self.plugs[index];
        let decoder = match kind {
            Kind::Vde { .. } => None,
            Kind::Stream(decoder) => Some(decoder),
            // Nothing comes here, and what cannot be sent says so itself.
            Kind::Datagrams(_) => return,
        };
        *gone |= match decoder {
            None => take_datagrams(plugged, &mut self.buffer),
            Some(decoder) => take_stream(plugged, decoder),
        }
        .is_err();
    }

    /// Takes the frames of all plugs that share a socket.
    fn datagrams(&mut self) {
        for _ in 0..TURN {
            let (read, from) = match self.server.datagrams.recv_from(&mut self.buffer) {
                Ok(got) => got,
                Err(_) => return,
            };
            // Who has no address cannot be answered.
            let Some(from) = from.as_pathname() else { continue };
            let same = |plug: &&Plug| {
                !plug.gone && matches!(&plug.kind, Kind::Datagrams(address) if address == from)
            };
            let mut plug = self.plugs.iter().find(same);
            if plug.is_none() {
                self.plug_datagrams(from.to_owned());
                plug = self.plugs.iter().find(same);
            }
            if let Some(plug) = plug {
                let plugged = Arc::clone(&plug.plugged);
                plugged.send(&mut self.buffer[..read]);
            }
        }
    }

    fn plug_datagrams(&mut self, from: PathBuf) {
        let connected =
            UnixDatagram::unbound().and_then(|socket| socket.connect(&from).map(|()| socket));
        if let Ok(socket) = connected {
            let name = format!("dgram {}", from.display());
            self.plug(name, socket.into(), Framing::Datagrams, Kind::Datagrams(from));
        }
    }

    /// Lets those go that have gone.
    fn unplug(&mut self) {
        let is_gone = |plug: &mut Plug| {
            // A VDE plug's end is that of its connection.
            plug.gone || !matches!(plug.kind, Kind::Vde { .. }) && plug.plugged.outlet.is_broken()
        };
        for plug in self.plugs.extract_if(.., is_gone) {
            debug!(dir = %self.server.dir.display(), name = plug.plugged.name, "unplugged");
            lock(&self.server.plugged).retain(|there| !Arc::ptr_eq(there, &plug.plugged));
        }
    }
}

/// The next connection, if one is there.
fn accept(listener: &UnixListener, pause: &mut Option<Instant>) -> Option<UnixStream> {
    let accepted = listener.accept().and_then(|(stream, _)| {
        stream.set_nonblocking(true)?;
        Ok(stream)
    });
    match accepted {
        Ok(stream) => Some(stream),
        Err(error) if is_passing(&error) => None,
        Err(error) => {
            debug!(%error, "cannot accept a plug");
            *pause = Some(Instant::now() + PAUSE);
            None
        }
    }
}

/// Takes a turn's frames that come as datagrams.
fn take_datagrams(plug: &Plugged, buffer: &mut [u8]) -> io::Result<()> {
    for _ in 0..TURN {
        match receive(&plug.outlet, buffer) {
            Ok(read) => plug.send(&mut buffer[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // Its end was closed with frames in it. The connection's end follows, or another socket of its.
            Err(error) if error.kind() == ErrorKind::ConnectionReset || is_passing(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Takes what has come of a stream.
fn take_stream(plug: &Plugged, decoder: &mut Decoder) -> io::Result<()> {
    match receive(&plug.outlet, decoder.room()) {
        Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
        Ok(read) => decoder.filled(read),
        Err(error) if is_passing(&error) => return Ok(()),
        Err(error) => return Err(error),
    }
    while let Some(frame) = decoder.next_frame().map_err(io::Error::other)? {
        plug.send(frame);
    }
    Ok(())
}

fn receive(outlet: &Outlet, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(recv(outlet.raw(), buffer, MsgFlags::MSG_DONTWAIT)?)
}

fn is_passing(error: &io::Error) -> bool {
    use ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}

/// Whether this is the path of a plug's own socket in the directory: their names begin with a dot.
fn lies_in(dir: &Path, path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"."));
    let parent = path.parent().and_then(|parent| fs::canonicalize(parent).ok());
    hidden && parent.as_deref() == Some(dir)
}
