//! Reads text in pictures with the program `tesseract`.

use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use firn_vmm::screen::Picture;
use futures_util::future::{BoxFuture, FutureExt, Shared};
use futures_util::stream::{FuturesUnordered, Stream, StreamExt};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::task::spawn_blocking;

use crate::picture::{self, Grey};

const PROGRAM: &str = "tesseract";
/// A dense screen takes half a minute on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);
/// Both of its engines; some systems have data for the second only.
const BOTH_ENGINES: &str = "2";
const NEURAL_ENGINE: &str = "1";
/// The resolution given for an enlarged picture: that of print.
const PRINTED_DPI: &str = "300";
/// How much of its error output is shown, in bytes.
const SHOWN: usize = 300;

/// Why OCR failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OcrError {
    /// The program is not installed.
    #[error(
        "OCR requested but `tesseract` is not available: it has to be in PATH, from Debian's package tesseract-ocr or, in a \
         NixOS test, by `enableOCR = true`"
    )]
    Missing,
    /// The program cannot be started.
    #[error("OCR failed: {}: {source}", program.display())]
    Start {
        /// Which.
        program: PathBuf,
        /// Why not.
        source: Arc<std::io::Error>,
    },
    /// It did not finish in time.
    #[error("OCR failed: tesseract has not ended within {} seconds", .0.as_secs())]
    Endless(Duration),
    /// It failed.
    #[error("OCR failed: tesseract: {status}{said}")]
    Failed {
        /// How.
        status: ExitStatus,
        /// Its error output.
        said: String,
    },
    /// A picture could not be prepared.
    #[error("OCR failed: the picture cannot be prepared")]
    Picture,
}

/// The program and its capabilities.
#[derive(Debug)]
pub struct Reader {
    program: PathBuf,
    /// Only the neural engine is available.
    neural: AtomicBool,
    /// The time limit for one picture.
    limit: Duration,
}

impl Reader {
    /// Finds the program in PATH.
    ///
    /// # Errors
    /// [`OcrError::Missing`] if it is not installed.
    pub fn find() -> Result<&'static Self, OcrError> {
        static FOUND: OnceLock<Reader> = OnceLock::new();
        if let Some(reader) = FOUND.get() {
            return Ok(reader);
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let program = env::split_paths(&path).map(|dir| dir.join(PROGRAM)).find(|file| runs(file));
        let program = program.ok_or(OcrError::Missing)?;
        Ok(FOUND.get_or_init(|| Self::new(program, LIMIT)))
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    fn new(program: PathBuf, limit: Duration) -> Self {
        Self { program, neural: AtomicBool::new(false), limit }
    }

    /// Returns the text in an unmodified picture.
    ///
    /// # Errors
    /// If the program fails.
    pub async fn text(&self, picture: &Picture) -> Result<String, OcrError> {
        self.run(&picture::ppm(picture), None).await
    }

    /// The texts in a picture as it is, and in two made from it: of its dark letters and of its bright ones. They
    /// arrive as they are found, with their index. Dropping this ends the programs that still run.
    pub fn variants(
        &self,
        picture: Arc<Picture>,
    ) -> impl Stream<Item = (usize, Result<String, OcrError>)> {
        let large: Shared<BoxFuture<'static, Option<Arc<Grey>>>> = {
            let picture = Arc::clone(&picture);
            let work = spawn_blocking(move || Arc::new(Grey::of(&picture).for_reading()));
            async { work.await.ok() }.boxed().shared()
        };
        let read = move |place: usize, letters: Option<bool>| {
            let (large, picture) = (large.clone(), Arc::clone(&picture));
            async move {
                let Some(bright) = letters else { return (place, self.text(&picture).await) };
                let large = large.await;
                let ready = spawn_blocking(move || Some(large?.letters(bright).pgm())).await;
                let text = match ready {
                    Ok(Some(image)) => self.run(&image, Some(PRINTED_DPI)).await,
                    _ => Err(OcrError::Picture),
                };
                (place, text)
            }
        };
        [None, Some(false), Some(true)]
            .into_iter()
            .enumerate()
            .map(|(place, letters)| read(place, letters))
            .collect::<FuturesUnordered<_>>()
    }

    /// The texts of [`Self::variants`], in order.
    ///
    /// # Errors
    /// If the program fails.
    pub async fn texts(&self, picture: Arc<Picture>) -> Result<Vec<String>, OcrError> {
        let mut texts: Vec<_> = self.variants(picture).collect().await;
        texts.sort_unstable_by_key(|(place, _)| *place);
        texts.into_iter().map(|(_, text)| text).collect()
    }

    async fn run(&self, image: &[u8], dpi: Option<&str>) -> Result<String, OcrError> {
        if !self.neural.load(Ordering::Relaxed) {
            match self.run_by(BOTH_ENGINES, image, dpi).await {
                Err(OcrError::Failed { .. }) => {}
                answer => return answer,
            }
        }
        let text = self.run_by(NEURAL_ENGINE, image, dpi).await?;
        self.neural.store(true, Ordering::Relaxed);
        Ok(text)
    }

    async fn run_by(
        &self,
        engine: &str,
        image: &[u8],
        dpi: Option<&str>,
    ) -> Result<String, OcrError> {
        let failed =
            |source| OcrError::Start { program: self.program.clone(), source: Arc::new(source) };
        let mut command = Command::new(&self.program);
        command.args(["stdin", "stdout", "--oem", engine, "--psm", "11"]);
        command.args(dpi.map(|dpi| ["--dpi", dpi]).into_iter().flatten());
        let mut child = command
            // Several run in parallel.
            .env("OMP_THREAD_LIMIT", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let stdin = child.stdin.take();
        let feed = async move {
            if let Some(mut stdin) = stdin {
                // A program that has ended reports the reason itself.
                let _ = stdin.write_all(image).await;
            }
        };
        let run = async { tokio::join!(feed, child.wait_with_output()).1 };
        let output = tokio::time::timeout(self.limit, run).await;
        let output = output.map_err(|_| OcrError::Endless(self.limit))?.map_err(failed)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said: String = said.trim().chars().take(SHOWN).collect();
            let said = if said.is_empty() { said } else { format!(": {said}") };
            return Err(OcrError::Failed { status: output.status, said });
        }
        // It ends each page with a form feed.
        Ok(String::from_utf8_lossy(&output.stdout).trim_end_matches('\x0c').to_owned())
    }
}

fn runs(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests;
