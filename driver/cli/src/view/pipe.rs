//! The end in a carrier of a viewer's way to a machine.

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result, bail};
use firn::viewers;

/// The longest machine id, in bytes.
const MAX_ID: u64 = 4096;

pub(super) fn run(dir: &Path) -> Result<ExitCode> {
    // Of what comes after the line nothing may be taken here.
    let mut stdin = io::stdin().lock();
    let mut id = Vec::new();
    for byte in stdin.by_ref().take(MAX_ID).bytes() {
        match byte? {
            b'\n' => break,
            byte => id.push(byte),
        }
    }
    drop(stdin);
    let machines = viewers::find(dir)?;
    if id.is_empty() {
        let ids: Vec<String> = machines.iter().map(viewers::Found::id).collect();
        println!("{}", serde_json::to_string(&ids)?);
        return Ok(ExitCode::SUCCESS);
    }
    let Some(machine) = machines.iter().find(|machine| machine.id().as_bytes() == id) else {
        bail!("there is no machine {}", String::from_utf8_lossy(&id));
    };
    let stream = machine.connect().context("cannot connect to the machine")?;
    stream.set_nonblocking(false)?;
    let mut up = stream.try_clone()?;
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut up);
        let _ = up.shutdown(std::net::Shutdown::Write);
    });
    let mut stdout = io::stdout().lock();
    let mut bytes = vec![0; 64 << 10];
    let mut down = stream;
    while let read @ 1.. = down.read(&mut bytes)? {
        stdout.write_all(&bytes[..read])?;
        stdout.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}
