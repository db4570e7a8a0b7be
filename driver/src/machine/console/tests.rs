use std::sync::Arc;
use std::time::Duration;

use regex::Regex;

use super::*;
use crate::error::Error;
use firn_agent_client::Clock;

fn console(text: &str) -> Arc<Console> {
    let console = Arc::new(Console::new(Clock::new()));
    print(&console, text);
    console
}

fn print(console: &Arc<Console>, text: &str) {
    // Byte by byte, as a UART does.
    for byte in text.as_bytes() {
        ConsoleWriter(Arc::clone(console)).write_all(&[*byte]).expect("never fails");
    }
}

async fn wait(console: &Console, pattern: &str, seconds: u64) -> Result<()> {
    let regex = Regex::new(pattern).expect("a valid pattern");
    let find = |text: &str| Ok(regex.find(text).map(|m| m.end()));
    console.wait_for_text(find, Some(Duration::from_secs(seconds))).await
}

#[tokio::test(start_paused = true)]
async fn each_line_matches_once() {
    let console = console("one ready\r\ntwo\r\nthree ready\r\n");
    wait(&console, "ready", 1).await.expect("line one");
    wait(&console, "ready", 1).await.expect("line three");
    let error = wait(&console, "ready", 1).await.expect_err("no more lines");
    assert!(matches!(error, Error::Assertion(_)), "{error:?}");
    assert_eq!(console.text(), "one ready\ntwo\nthree ready\n");
}

#[tokio::test(start_paused = true)]
async fn a_match_may_span_lines_and_leaves_the_next() {
    let console = console("a\nb\nc\n");
    wait(&console, r"a\nb", 1).await.expect("two lines");
    wait(&console, "c", 1).await.expect("the next line is not consumed");
}

#[tokio::test(start_paused = true)]
async fn lines_match_as_if_they_had_no_ends() {
    let console = console("one  \r\n\r\ntwo tail\r\nthree\r\n");
    wait(&console, "e.*tw", 1).await.expect("`.` does not match a line end");
    wait(&console, "two", 1).await.expect_err("consumed with its line");
    wait(&console, "three", 1).await.expect("the next line is not");
    print(&console, "four\nfive\nsix\n");
    wait(&console, "fourfive", 1).await.expect("both");
    assert_eq!(console.lines_left(), 1);
    assert_eq!(console.next_line(Duration::from_secs(1)).await.expect("it is there"), "six");
    console.next_line(Duration::from_secs(1)).await.expect_err("no line is left");
    console.wait_for_text(|_| Ok(None), Some(Duration::ZERO)).await.expect_err("nor is text");
}

#[tokio::test]
async fn text_that_comes_later_ends_the_wait() {
    let console = console("boot\n");
    let waiter = tokio::spawn({
        let console = Arc::clone(&console);
        async move { wait(&console, "login: ", 30).await }
    });
    tokio::task::yield_now().await;
    print(&console, "Welcome\nmachine log");
    print(&console, "in: ");
    waiter.await.expect("no panic").expect("the prompt has no line end");
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_no_text_keep_positions_right() {
    let console = Arc::new(Console::new(Clock::new()));
    console.push(b"\xff\xfe ready\nready again\n");
    wait(&console, "ready", 1).await.expect("first line");
    wait(&console, "ready again", 1).await.expect("second line");
}

#[tokio::test(start_paused = true)]
async fn a_new_start_forgets() {
    let console = console("ready\n");
    console.restart();
    assert!(wait(&console, "ready", 1).await.is_err());
    assert_eq!(console.text(), "");
    assert_eq!(console.tail().0, [""; 0]);
}

#[test]
fn the_tail_is_short_and_clean() {
    let lines: String = (0..100).map(|n| format!("\x1b[31mline {n}\x1b[0m\n\n")).collect();
    let tail = console(&lines).tail().0;
    assert_eq!(tail.len(), TAIL_LINES);
    assert_eq!((tail[0].as_str(), tail[49].as_str()), ("line 50", "line 99"));
}

#[test]
fn memory_is_bounded() {
    let console = Console::new(Clock::new());
    let line = [b'x'; 1 << 20];
    for _ in 0..60 {
        console.push(&line);
    }
    let buffer = console.lock();
    assert!(buffer.bytes.len() <= MAX_KEPT + SLACK);
    assert_eq!(buffer.end(), 60 << 20);
}

#[test]
fn positions_in_lossy_text() {
    let bytes = b"\xffab\xc3\xa4\xff!";
    let text = String::from_utf8_lossy(bytes);
    for (needle, position) in [("a", 2), ("\u{e4}", 5), ("!", 7)] {
        let at = text.find(needle).expect("it is in the text") + needle.len();
        assert_eq!(byte_position(bytes, at), position, "{needle}");
    }
}

#[test]
fn long_lines_are_cut() {
    assert_eq!(next_line(b"ab\ncd", false), Some(3));
    assert_eq!(next_line(b"ab", false), None);
    assert_eq!(next_line(b"ab", true), Some(2));
    assert_eq!(next_line(&[b'x'; MAX_LINE + 5], false), Some(MAX_LINE));
}
