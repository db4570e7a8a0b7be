//! Reports what is wrong with a test's file, and where.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};

/// Why a test's file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A key has an invalid value.
    #[error("{}: {message}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key, its value, and what is allowed.
        message: String,
    },
    /// It is not a machine file.
    #[error("{} is no machine file of firn, it is {what}", path.display())]
    NotMachineFile {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It is readable but invalid.
    #[error(transparent)]
    Invalid(#[from] Report),
}

/// What is wrong with a file, shown with the line in question.
#[derive(Debug)]
pub struct Report {
    message: String,
    help: Option<String>,
    path: PathBuf,
    text: String,
    span: Range<usize>,
}

impl Report {
    pub(super) fn new(
        path: &Path,
        text: &str,
        span: Range<usize>,
        message: impl Into<String>,
    ) -> Self {
        let end = text.len();
        let start = span.start.min(end);
        Self {
            message: message.into(),
            help: None,
            path: path.to_owned(),
            text: text.to_owned(),
            span: start..span.end.clamp(start, end),
        }
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Renders the report for a terminal, with or without colours.
    #[must_use]
    pub fn render(&self, colours: bool) -> String {
        let path = self.path.display().to_string();
        let snippet = Snippet::source(&self.text)
            .path(&path)
            .annotation(AnnotationKind::Primary.span(self.span.clone()));
        let mut group = Level::ERROR.primary_title(&self.message).element(snippet);
        if let Some(help) = &self.help {
            group = group.element(Level::HELP.message(help));
        }
        let renderer = if colours { Renderer::styled() } else { Renderer::plain() };
        renderer.render(&[group])
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Report {}
