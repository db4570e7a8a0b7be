//! One TCP connection of a guest through the user network, by firn's gateway and by QEMU's.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use firn_bench::monitor::{Devices, Net};
use firn_bench::{OtherMonitor, Sample};
use firn_gateway::{CARD_MAC, Forward, GUEST_V4, Gateway, GatewaySpec, Protocol, Side};
use firn_vmm::spec::{Mac, NetSpec};

use super::running::{self, Parts, Running, nanoseconds};
use super::{FIRN, Subject, Way};

/// What is sent each way.
const TRANSFER_MIB: usize = 100;
const MEMORY_MIB: u64 = 256;
/// A transfer that hangs is given up.
const PATIENCE: Duration = Duration::from_secs(240);

pub(crate) struct Network;

impl Subject for Network {
    fn title(&self) -> String {
        format!("{TRANSFER_MIB} MiB by TCP through the user network")
    }

    fn ways(&self) -> Vec<Way> {
        running::ways([OtherMonitor::QemuQ35, OtherMonitor::QemuMicrovm])
    }

    fn prepare(&self, dir: &Path) -> Result<()> {
        running::prepare(include_str!("network.sh"), None, dir)
    }

    fn round(&self, way: &str, dir: &Path) -> Result<Sample> {
        let host = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = host.local_addr()?.port();
        let variables = format!("port={port} blocks={}", TRANSFER_MIB << 2);
        let guest = running::guest(dir, MEMORY_MIB, &variables);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let (mut parts, mut devices) = (Parts::default(), Devices::default());
        let forwarded = match way {
            FIRN => {
                let (gateway, forwarded) = runtime.block_on(gateway())?;
                parts.spec = serde_json::json!({ "nets": [NetSpec { mac: Mac(CARD_MAC) }] });
                parts.net = Some(gateway);
                forwarded
            }
            _ => {
                let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
                devices.net = Some(Net::User(free));
                free
            }
        };
        let _running = Running::start(way, &guest, parts, &devices, dir)?;
        let to_guest = send(&host)?;
        // It connects again when it serves what it has.
        let _serves = host.accept().context("the guest connects again")?;
        let from_guest = receive(forwarded)?;
        let steps = [("to the guest", to_guest), ("from the guest", from_guest)];
        Ok(steps.map(|(name, time)| (name.to_owned(), nanoseconds(time))).into())
    }
}

/// A user network, and the port of the host that leads to the guest's.
async fn gateway() -> Result<(Arc<Gateway>, u16)> {
    let gateway = Gateway::new(GatewaySpec::default()).await?;
    let forward = Forward {
        from: Side::Host,
        protocol: Protocol::Tcp,
        host: (Ipv4Addr::LOCALHOST, 0).into(),
        guest: (GUEST_V4, 80).into(),
    };
    let forwarded = gateway.forward(forward).await?.port();
    Ok((Arc::new(gateway), forwarded))
}

/// Sends the guest something, and waits until it has it.
fn send(host: &TcpListener) -> Result<Duration> {
    let data = vec![0x5a; TRANSFER_MIB << 20];
    let (mut stream, _) = host.accept().context("the guest connects")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let began = Instant::now();
    stream.write_all(&data)?;
    stream.shutdown(Shutdown::Write)?;
    ensure!(stream.read(&mut [0])? == 0, "the guest says something");
    Ok(began.elapsed())
}

/// Fetches something from the guest.
fn receive(port: u16) -> Result<Duration> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let began = Instant::now();
    let (mut buffer, mut sum) = (vec![0; 1 << 18], 0);
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => sum += count,
        }
    }
    ensure!(sum == TRANSFER_MIB << 20, "{sum} bytes have come");
    Ok(began.elapsed())
}
