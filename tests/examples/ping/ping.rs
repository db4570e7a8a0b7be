//! The test of test.toml in Rust: `cargo test -p firn-tests --test ping`, where KVM works.

use std::error::Error;
use std::path::Path;

use firn::config::TestConfig;
use firn::{Driver, DriverOptions};

#[tokio::test(flavor = "multi_thread")]
async fn machines_ping_each_other() -> Result<(), Box<dyn Error>> {
    // Two machines on one network. Whatever a node does not say comes from the kit `micro`.
    let test = "name = 'ping'\ntest_script = ''\n[nodes.machine1]\n[nodes.machine2]";
    let test = TestConfig::from_toml(test, Path::new("ping.toml"))?;
    let kits = Driver::kits_needed(&test).into_iter().map(|name| firn_kits::build(name, &|_| ()));
    let kits = kits.collect::<Result<_, _>>()?;
    let options = DriverOptions { kits, ..Default::default() };

    let driver = Driver::new(&test, options)?;
    driver.start_all().await?;
    let [machine1, machine2] = driver.machines() else { panic!("two machines") };
    for (here, there) in [(machine1, machine2), (machine2, machine1)] {
        here.succeed(&[&format!("ping -c 1 {}", there.name())], None).await?;
    }
    let (status, output) = machine1.execute("echo out; exit 3", Default::default()).await?;
    assert_eq!((status, output.as_str()), (3, "out\n"));
    machine2.shutdown().await?;
    assert!(machine1.booted() && !machine2.booted());

    // Ends what still runs, and waits until nothing is left of it.
    driver.close().await;
    Ok(())
}
