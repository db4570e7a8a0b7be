//! Speaks AF_VSOCK for the tests, inside a guest.
//!
//! ```text
//! vsock-peer echo PORT          sends back what each client sends; says `ready` when it listens
//! vsock-peer connect CID PORT   sends its standard input, then prints what comes back
//! ```

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::net::Shutdown;
use std::thread;

use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["echo", port] => echo(number(port)?),
        ["connect", cid, port] => talk(number(cid)?, number(port)?),
        _ => Err(io::Error::other("vsock-peer echo PORT | connect CID PORT")),
    }
}

fn number(text: &str) -> io::Result<u32> {
    text.parse().map_err(io::Error::other)
}

fn echo(port: u32) -> io::Result<()> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
    println!("ready");
    for client in listener.incoming() {
        let mut client = client?;
        thread::spawn(move || {
            let mut output = client.try_clone()?;
            io::copy(&mut client, &mut output)?;
            client.shutdown(Shutdown::Write)
        });
    }
    Ok(())
}

fn talk(cid: u32, port: u32) -> io::Result<()> {
    let mut stream = VsockStream::connect_with_cid_port(cid, port)?;
    let mut output = stream.try_clone()?;
    let sender = thread::spawn(move || {
        io::copy(&mut io::stdin(), &mut output)?;
        output.shutdown(Shutdown::Write)
    });
    io::copy(&mut stream, &mut io::stdout())?;
    io::stdout().flush()?;
    sender.join().map_err(|_| io::Error::other("the sender panicked"))?
}
