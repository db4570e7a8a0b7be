//! The screen and the keyboard as scripts use them: on a system with a login prompt.

use std::time::Duration;

use firn::error::MachineError;
use firn::machine::keys;
use firn::ocr::Reader;
use firn::{Error, Machine, picture};
use firn_tests::input::{self, END, Event, POWER_KEYS, press};
use firn_tests::{output, skip, with_machines};
use firn_vmm::virtio::input::BTN_LEFT;
use serde_json::json;

/// Nothing that is waited for here takes as long.
const PATIENCE: Duration = Duration::from_secs(240);

async fn wait_for_text(machine: &Machine, text: &str) {
    let find = |shown: &str| Ok(shown.contains(text));
    machine.wait_for_text(text, find, PATIENCE).await.unwrap();
}

async fn listen(machine: &Machine, device: &str) {
    output(machine, &input::listen(device)).await;
}

async fn heard(machine: &Machine, device: &str, count: usize) -> Vec<Event> {
    input::heard(device, count, async |script| output(machine, script).await).await
}

#[test]
fn a_login_prompt_is_seen_read_and_typed_into() {
    if Reader::find().is_err() {
        skip::skipped("there is no tesseract");
        return;
    }
    let nodes = "[nodes.machine]\nkit = 'systemd'\nkeyboard = true\ntablet = true\n\
                 screen = { kind = 'gpu', width = 320, height = 200 }";
    with_machines(nodes, async |driver| {
        let [machine] = driver.machines() else { panic!("one machine") };
        let early = machine.screenshot("early").await.unwrap_err();
        assert!(matches!(early, Error::Machine(MachineError::NotRunning { .. })), "{early}");
        machine.start(true).await.unwrap();
        // Before the guest has drawn anything.
        machine.screenshot("early").await.unwrap();
        assert!(picture::read(&machine.out_dir().join("early.png")).unwrap() == picture::black());

        wait_for_text(machine, "machine login:").await;
        machine.send_chars("Nobody-1", None).await.unwrap();
        wait_for_text(machine, "machine login: Nobody-1").await;
        // Nothing is read once the picture is not that of the text console.
        output(machine, "printf '\\033[2J\\033[H\\033[?25lpassphrase' >/dev/tty1").await;
        wait_for_text(machine, "passphrase").await;
        machine.screenshot("shown").await.unwrap();
        let shown = picture::read(&machine.out_dir().join("shown.png")).unwrap();
        assert_eq!((shown.width, shown.height), (320, 200));
        let texts = Reader::find().unwrap().texts(shown.into()).await.unwrap();
        assert!(texts.iter().any(|text| text.contains("passphrase")), "{texts:?}");

        every_name_is_a_key(machine).await;
        the_tablet_goes_where_it_is_told(machine).await;
        machine.reboot().await.unwrap();
        wait_for_text(machine, "machine login:").await;
        machine.pause().await.unwrap();
        machine.screenshot("paused").await.unwrap();
        machine.resume().await.unwrap();
        assert_eq!(output(machine, "ls /run/keyboard 2>/dev/null || echo new").await, "new");
    });
}

async fn every_name_is_a_key(machine: &Machine) {
    listen(machine, "keyboard").await;
    let names: Vec<_> =
        keys().filter(|(_, code)| *code != 0 && !POWER_KEYS.contains(code)).collect();
    assert!(names.len() > 155, "{}", names.len());
    let mut wanted = Vec::new();
    // A reader of the kernel's misses what is behind 64 events.
    for some in names.chunks(8) {
        for (name, code) in some {
            machine.send_key(name, None, false).await.unwrap();
            wanted.extend(press(*code));
        }
        assert_eq!(heard(machine, "keyboard", wanted.len()).await, wanted);
    }
    let none = machine.send_key("retn", None, false).await.unwrap_err().to_string();
    assert!(none.contains("no key `retn`; close to it: ret"), "{none}");
}

async fn the_tablet_goes_where_it_is_told(machine: &Machine) {
    listen(machine, "tablet").await;
    let events = json!([
        {"type": "abs", "data": {"axis": "x", "value": 100}},
        {"type": "abs", "data": {"axis": "y", "value": 200}},
        {"type": "btn", "data": {"down": true, "button": "left"}},
        {"type": "btn", "data": {"down": false, "button": "left"}},
        {"type": "btn", "data": {"down": true, "button": "wheel-up"}},
    ]);
    let answer = machine.send_qmp("input-send-event", &json!({"events": events})).await.unwrap();
    assert_eq!(answer, json!({"return": {}}));
    let moved = [(3, 0, 100), (3, 1, 200), END];
    let wanted = [&moved[..], &press(BTN_LEFT), &[(2, 8, 1), END]].concat();
    assert_eq!(heard(machine, "tablet", wanted.len()).await, wanted);
    let half = json!({"events": [{"type": "abs", "data": {"axis": "x", "value": 1}}]});
    let answer = machine.send_qmp("input-send-event", &half).await.unwrap();
    assert_eq!(answer["error"]["class"], "GenericError");
}
