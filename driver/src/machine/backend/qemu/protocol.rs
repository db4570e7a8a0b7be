//! QEMU's machine protocol, QMP: JSON objects, one on each line (docs/interop/qmp-spec in QEMU's source).
//!
//! A thread reads; calls are made from any thread, and block.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

/// How long QEMU may take to answer: it answers from its main loop, which a busy host keeps waiting.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// A longer line is none of QEMU's.
const MAX_LINE: u64 = 64 << 20;
/// How much of a line that makes no sense is quoted.
const QUOTED: usize = 200;

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    #[error("QEMU has closed its monitor")]
    Gone,
    #[error("QEMU's monitor has not answered within {} seconds: QEMU hangs", .0.as_secs())]
    Mute(Duration),
    #[error("QEMU's monitor says {0:?}, which is not of its protocol")]
    Garbage(String),
    #[error("QEMU refuses {command}: {why}")]
    Refused { command: String, why: String },
    #[error("QEMU's monitor cannot be reached")]
    Io(#[from] io::Error),
}

/// A connection. Clones are handles to the same one.
#[derive(Clone)]
pub(super) struct Qmp(Arc<Shared>);

struct Shared {
    writer: Mutex<UnixStream>,
    calls: Mutex<Calls>,
}

#[derive(Default)]
struct Calls {
    last: u64,
    waiting: HashMap<u64, mpsc::Sender<Value>>,
    gone: bool,
}

impl Qmp {
    /// Speaks with the QEMU at the other end, which has `limit` to answer. `heard` is called with each event, on a thread
    /// of its own, and is dropped when QEMU has closed the connection.
    pub(super) fn new(
        stream: UnixStream,
        limit: Duration,
        heard: impl FnMut(Value) + Send + 'static,
    ) -> Result<Self, QmpError> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        let mut lines = BufReader::new(stream.try_clone()?);
        let greeting = match read_line(&mut lines) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(QmpError::Mute(limit));
            }
            greeting => greeting?,
        };
        if greeting.is_empty() {
            return Err(QmpError::Gone);
        }
        let said: Option<Value> = serde_json::from_slice(&greeting).ok();
        if said.is_none_or(|said| said.get("QMP").is_none()) {
            let end = greeting.len().min(QUOTED);
            let text = String::from_utf8_lossy(&greeting[..end]).into_owned();
            return Err(QmpError::Garbage(text));
        }
        stream.set_read_timeout(None)?;
        let shared = Shared { writer: Mutex::new(stream), calls: Mutex::default() };
        let qmp = Self(Arc::new(shared));
        let reader = qmp.clone();
        thread::Builder::new()
            .name("qmp".to_owned())
            .spawn(move || reader.read(&mut lines, heard))?;
        qmp.call("qmp_capabilities", &json!({}), limit)?;
        Ok(qmp)
    }

    /// Gives a command, and waits for what it returns.
    pub(super) fn call(
        &self,
        command: &str,
        arguments: &Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let mut reply = self.ask(command, arguments, limit)?;
        match reply["error"]["desc"].as_str() {
            Some(why) => {
                Err(QmpError::Refused { command: command.to_owned(), why: why.to_owned() })
            }
            None => Ok(reply["return"].take()),
        }
    }

    /// Gives a command, and waits for the reply: an object with `return`, or with `error`.
    pub(super) fn ask(
        &self,
        command: &str,
        arguments: &Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let (reply, replied) = mpsc::channel();
        let id = self.send(command, arguments, Some(reply))?;
        match replied.recv_timeout(limit) {
            Ok(reply) => Ok(reply),
            Err(RecvTimeoutError::Disconnected) => Err(QmpError::Gone),
            Err(RecvTimeoutError::Timeout) => {
                self.calls().waiting.remove(&id);
                Err(QmpError::Mute(limit))
            }
        }
    }

    /// Gives a command without waiting for anything; commands are done in their order.
    pub(super) fn post(&self, command: &str, arguments: &Value) {
        if let Err(error) = self.send(command, arguments, None) {
            tracing::debug!(command, %error, "QEMU does not take a command");
        }
    }

    fn send(
        &self,
        command: &str,
        arguments: &Value,
        reply: Option<mpsc::Sender<Value>>,
    ) -> Result<u64, QmpError> {
        let mut writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let id = {
            let mut calls = self.calls();
            if calls.gone {
                return Err(QmpError::Gone);
            }
            calls.last += 1;
            let id = calls.last;
            calls.waiting.extend(reply.map(|reply| (id, reply)));
            id
        };
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments, "id": id}));
        match writer.write_all(line.as_bytes()) {
            Ok(()) => Ok(id),
            Err(error) => {
                self.calls().waiting.remove(&id);
                Err(match error.kind() {
                    io::ErrorKind::BrokenPipe => QmpError::Gone,
                    _ => error.into(),
                })
            }
        }
    }

    fn read(&self, lines: &mut impl BufRead, mut heard: impl FnMut(Value)) {
        while let Ok(line) = read_line(lines)
            && !line.is_empty()
        {
            let Ok(mut said) = serde_json::from_slice::<Value>(&line) else {
                let end = line.len().min(QUOTED);
                let text = String::from_utf8_lossy(&line[..end]);
                tracing::debug!(%text, "not of QEMU's machine protocol");
                continue;
            };
            if said.get("event").is_some() {
                heard(said);
                continue;
            }
            let id = said["id"].as_u64().unwrap_or_default();
            if let Some(object) = said.as_object_mut() {
                object.remove("id");
            }
            if let Some(reply) = self.calls().waiting.remove(&id) {
                // Whoever has asked may have given up.
                let _ = reply.send(said);
            }
        }
        let mut calls = self.calls();
        calls.gone = true;
        calls.waiting.clear();
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.0.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The next line; an empty one at the end.
fn read_line(lines: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    lines.take(MAX_LINE).read_until(b'\n', &mut line)?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(300);

    /// A QEMU that says these lines, each after it has heard one; the first at once.
    fn speaker(said: &'static [&'static str]) -> (UnixStream, thread::JoinHandle<Vec<String>>) {
        let (own, mut other) = UnixStream::pair().expect("a pair");
        let speaker = thread::spawn(move || {
            let mut lines = BufReader::new(other.try_clone().expect("a copy")).lines();
            let mut heard = Vec::new();
            for (at, said) in said.iter().enumerate() {
                if at > 0 {
                    heard.extend(lines.next().and_then(Result::ok));
                }
                other.write_all(said.as_bytes()).expect("written");
            }
            heard.extend(lines.map_while(Result::ok));
            heard
        });
        (own, speaker)
    }

    const HELLO: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

    #[test]
    fn answers_find_their_calls_between_events() {
        let (stream, speaker) = speaker(&[
            HELLO,
            "{\"return\": {}, \"id\": 1}\r\n",
            "{\"event\": \"STOP\"}\r\n{\"return\": {\"status\": \"paused\"}, \"id\": 2}\r\n",
            "{\"id\": 3, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\r\n",
            "{\"return\": 1, \"id\": 77}\r\nnonsense\r\n{\"return\": 4, \"id\": 4}\r\n",
        ]);
        let (sender, events) = mpsc::channel();
        let qmp = Qmp::new(stream, ANSWER_WITHIN, move |event| sender.send(event).expect("heard"))
            .expect("it speaks");
        let status = qmp.call("query-status", &json!({}), ANSWER_WITHIN).expect("answered");
        assert_eq!(status, json!({"status": "paused"}));
        assert_eq!(events.recv().expect("one"), json!({"event": "STOP"}));
        let error = qmp.call("fail", &json!({"a": 1}), ANSWER_WITHIN).expect_err("refused");
        assert_eq!(error.to_string(), "QEMU refuses fail: no");
        let reply = qmp.ask("query", &json!({}), ANSWER_WITHIN).expect("answered");
        assert_eq!(reply, json!({"return": 4}));
        qmp.0.writer.lock().expect("whole").shutdown(std::net::Shutdown::Both).expect("closed");
        let heard = speaker.join().expect("no panic");
        assert_eq!(heard.len(), 4);
        assert_eq!(heard[2], r#"{"arguments":{"a":1},"execute":"fail","id":3}"#);
        events.recv().expect_err("the reader is gone");
        let error = qmp.call("query", &json!({}), SOON).expect_err("it is gone");
        assert!(matches!(error, QmpError::Gone), "{error}");
    }

    #[test]
    fn one_that_hangs_ends_goes_or_is_something_else() {
        let (stream, _speaker) = speaker(&[""]);
        let error = Qmp::new(stream, SOON, |_| {}).err().expect("silent").to_string();
        assert_eq!(error, "QEMU's monitor has not answered within 0 seconds: QEMU hangs");
        let (stream, _speaker) = speaker(&[HELLO]);
        let error = Qmp::new(stream, SOON, |_| {}).err().expect("silent");
        assert!(matches!(error, QmpError::Mute(_)), "{error}");
        let (stream, _speaker) = speaker(&["SSH-2.0-OpenSSH\n"]);
        let error = Qmp::new(stream, SOON, |_| {}).err().expect("no QEMU").to_string();
        assert!(error.starts_with("QEMU's monitor says \"SSH-2.0-OpenSSH\\n\""), "{error}");
        let (stream, other) = UnixStream::pair().expect("a pair");
        drop(other);
        let error = Qmp::new(stream, SOON, |_| {}).err().expect("gone");
        assert!(matches!(error, QmpError::Gone), "{error}");
    }
}
