//! A blocking host's end of the protocol, which can also misbehave.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use firn_guest_agent::protocol::{
    Decoder, ExecRequest, Exit, Frame, Greeting, GreetingKind, Item, Ready, ToAgent, ToHost, encode,
};

/// Far above what anything here takes.
const LONG: Duration = Duration::from_secs(30);

pub struct Host {
    pub stream: UnixStream,
    pub decoder: Decoder,
    next: u32,
}

/// Starts `command`, to which `--connect PATH` is added, and waits for the agent to connect.
pub fn start(command: &mut Command, directory: &Path) -> (Child, Host) {
    let path = directory.join("agent");
    let listener = UnixListener::bind(&path).unwrap();
    let mut child = command.arg("--connect").arg(&path).stdin(Stdio::null()).spawn().unwrap();
    listener.set_nonblocking(true).unwrap();
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
        // Two things are waited for, and one of them is a process.
        assert!(child.try_wait().unwrap().is_none(), "the agent has ended");
        std::thread::sleep(Duration::from_millis(5));
    };
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    (child, Host { stream, decoder: Decoder::new(), next: 1 })
}

impl Host {
    /// Reads more; false at the end of the stream.
    pub fn fill(&mut self) -> bool {
        let mut buffer = [0; 65536];
        let length = loop {
            match self.stream.read(&mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                result => break result.expect("the agent is silent"),
            }
        };
        self.decoder.push(&buffer[..length]);
        length > 0
    }

    pub fn hello(&mut self, nonce: u64) {
        self.stream.write_all(&Greeting::new(GreetingKind::Hello, nonce).to_bytes()).unwrap();
    }

    pub fn greeting(&mut self) -> Greeting {
        loop {
            match self.decoder.find_greeting() {
                Some(greeting) => return greeting,
                None => assert!(self.fill(), "the agent left"),
            }
        }
    }

    /// Waits for the welcome to `nonce` and for the agent to be ready.
    pub fn welcome(&mut self, nonce: u64) -> Ready {
        while self.greeting() != Greeting::new(GreetingKind::Welcome, nonce) {}
        self.next = 1;
        match self.message() {
            (0, ToHost::Ready(ready)) => ready,
            other => panic!("{other:?}"),
        }
    }

    pub fn session(&mut self, nonce: u64) -> Ready {
        self.hello(nonce);
        self.welcome(nonce)
    }

    pub fn message(&mut self) -> (u32, ToHost) {
        loop {
            match self.decoder.next_item().unwrap() {
                Some(Item::Frame(frame)) => return (frame.id, frame.message),
                Some(Item::Greeting(greeting)) => panic!("{greeting:?}"),
                None => assert!(self.fill(), "the agent left"),
            }
        }
    }

    pub fn send(&mut self, id: u32, message: ToAgent) {
        let mut bytes = Vec::new();
        encode(&Frame { id, message }, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    pub fn begin(&mut self, message: ToAgent) -> u32 {
        let id = self.next;
        self.next += 1;
        self.send(id, message);
        id
    }

    /// Runs a script and gives its exit and its standard output.
    pub fn shell(&mut self, script: &str) -> (Exit, String) {
        let id = self.begin(ToAgent::Exec(ExecRequest::shell(script)));
        let (mut output, mut exit) = (Vec::new(), None);
        loop {
            match self.message() {
                (from, ToHost::Done) if from == id => break,
                (from, ToHost::Exited(how)) if from == id => exit = Some(how),
                (from, ToHost::Output { bytes, .. }) if from == id => output.extend(bytes),
                (from, message) => {
                    assert!(!matches!(message, ToHost::Failed(_)), "{from} {message:?}")
                }
            }
        }
        (exit.unwrap(), String::from_utf8(output).unwrap())
    }
}
