//! What a program does that does not do what it should. What it does when it does is shown where it is there.

use std::fs;
use std::time::Instant;

use futures_util::StreamExt;
use tempfile::TempDir;

use super::*;

/// A program that is a shell script.
fn reader(script: &str, limit: Duration) -> (TempDir, Reader) {
    let dir = tempfile::tempdir().expect("a directory");
    let program = dir.path().join(PROGRAM);
    fs::write(&program, format!("#!/bin/sh\ncd {}\n{script}\n", dir.path().display()))
        .expect("written");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("a program");
    assert!(runs(&program) && !runs(dir.path()));
    (dir, Reader::new(program, limit))
}

const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn the_engine_that_is_not_there_is_asked_for_once() {
    let (dir, reader) = reader(
        "echo \"$4\" >> engines; echo \"$OMP_THREAD_LIMIT\" >> threads; cat > image\n\
         [ \"$4\" = 1 ] || { echo 'components are not present' >&2; exit 1; }\nprintf 'a\\n\\014'",
        LONG,
    );
    for _ in 0..2 {
        assert_eq!(reader.text(&picture::black()).await.expect("read"), "a\n");
    }
    let written = |name: &str| fs::read_to_string(dir.path().join(name)).expect("written");
    assert_eq!(written("engines"), "2\n1\n1\n");
    assert_eq!(written("threads"), "1\n1\n1\n");
    assert!(fs::read(dir.path().join("image")).expect("written").starts_with(b"P6\n1024 768\n"));
}

#[tokio::test]
async fn a_program_that_crashes_says_how() {
    let (_dir, crashing) = reader("echo 'no data' >&2; exit 3", LONG);
    let error = crashing.text(&picture::black()).await.expect_err("it crashes").to_string();
    assert_eq!(error, "OCR failed: tesseract: exit status: 3: no data");
    let (_dir, killed) = reader("kill -SEGV $$", LONG);
    let error = killed.text(&picture::black()).await.expect_err("it crashes").to_string();
    assert!(error.starts_with("OCR failed: tesseract: signal: 11"), "{error}");
    let gone = Reader::new("/nonexistent/tesseract".into(), LONG);
    let error = gone.text(&picture::black()).await.expect_err("not there").to_string();
    assert!(error.starts_with("OCR failed: /nonexistent/tesseract: "), "{error}");
}

/// Whether a process is there and not just waiting to be reaped.
fn lives(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

#[tokio::test]
async fn a_program_that_hangs_is_ended() {
    let (dir, hanging) = reader("echo $$ > pid; exec sleep 1000", Duration::from_millis(500));
    let error = hanging.text(&picture::black()).await.expect_err("it hangs").to_string();
    assert_eq!(error, "OCR failed: tesseract has not ended within 0 seconds");
    let pid = fs::read_to_string(dir.path().join("pid")).expect("written");
    let began = Instant::now();
    while lives(&pid) {
        assert!(began.elapsed() < LONG, "it lives on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn variants_run_side_by_side_until_nobody_waits_for_them() {
    // That of the picture itself, the only one without a resolution, answers; the others never do.
    let (dir, reader) = reader(
        "cat > image.$$; case $* in *--dpi*) echo $$ >> pids; exec sleep 1000;; *) echo here;; esac",
        LONG,
    );
    let picture = Arc::new(picture::black());
    let mut variants = Box::pin(reader.variants(Arc::clone(&picture)));
    let (place, text) = variants.next().await.expect("one of three");
    assert_eq!((place, text.expect("read").as_str()), (0, "here\n"));
    let pids = || fs::read_to_string(dir.path().join("pids")).unwrap_or_default();
    let began = Instant::now();
    while pids().lines().count() < 2 {
        assert!(began.elapsed() < LONG, "the others do not run");
        // They are started as they are waited for.
        let _ = tokio::time::timeout(Duration::from_millis(20), variants.next()).await;
    }
    drop(variants);
    while pids().lines().any(lives) {
        assert!(began.elapsed() < LONG, "they live on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
