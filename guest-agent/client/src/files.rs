//! Files in the guest.

use std::path::Path;

use firn_guest_agent::protocol::{BytePath, Entry, FileInfo, MAX_CHUNK, ToAgent, ToHost};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::request::Request;
use super::{AgentClient, AgentError, MAX_FILE, MAX_LISTING};

impl AgentClient {
    /// Writes a guest file from `source`, with permission bits `mode`; parents are made. On failure the file may be
    /// there in part.
    ///
    /// # Errors
    /// [`AgentError::Local`] if `source` cannot be read, [`AgentError::Refused`] for what fails in the guest.
    pub async fn write_file<R>(
        &self,
        path: &Path,
        mode: u32,
        source: &mut R,
    ) -> Result<(), AgentError>
    where
        R: AsyncRead + Unpin + ?Sized,
    {
        let request =
            Request::begin(self, ToAgent::WriteFile { path: BytePath::from(path), mode })?;
        let contents = request.contents();
        loop {
            let mut chunk = Vec::with_capacity(MAX_CHUNK);
            // A short read is filled up: each message has its price.
            while chunk.len() < MAX_CHUNK {
                let room = u64::try_from(MAX_CHUNK - chunk.len()).unwrap_or(0);
                if source.take(room).read_buf(&mut chunk).await.map_err(AgentError::local)? == 0 {
                    break;
                }
            }
            if chunk.is_empty() {
                contents.end()?;
                break;
            }
            if !self.soon(contents.send(chunk)).await? {
                // The agent has said why.
                break;
            }
        }
        self.soon(request.finish()).await
    }

    /// Reads a guest file into `destination` and says what it is.
    ///
    /// # Errors
    /// [`AgentError::Local`] if `destination` cannot be written, [`AgentError::Refused`] for what fails in the guest;
    /// [`AgentError::TooMuch`] beyond [`MAX_FILE`].
    pub async fn read_file<W>(
        &self,
        path: &Path,
        destination: &mut W,
    ) -> Result<FileInfo, AgentError>
    where
        W: AsyncWrite + Unpin + ?Sized,
    {
        let mut request = Request::begin(self, ToAgent::ReadFile { path: BytePath::from(path) })?;
        let Some(ToHost::Info(info)) = self.soon(request.next()).await? else {
            return Err(request.misplaced());
        };
        let mut room = MAX_FILE;
        while let Some(message) = self.soon(request.next()).await? {
            let ToHost::Data(bytes) = message else {
                return Err(request.misplaced());
            };
            let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            room = room
                .checked_sub(length)
                .ok_or(AgentError::TooMuch { what: "a file", limit: MAX_FILE })?;
            destination.write_all(&bytes).await.map_err(AgentError::local)?;
        }
        destination.flush().await.map_err(AgentError::local)?;
        Ok(info)
    }

    /// What is at `path`; a symbolic link at its end is followed if `follow`.
    ///
    /// # Errors
    /// [`AgentError::Refused`], with the error number, if there is nothing.
    pub async fn stat(&self, path: &Path, follow: bool) -> Result<FileInfo, AgentError> {
        let mut request =
            Request::begin(self, ToAgent::Stat { path: BytePath::from(path), follow })?;
        self.soon(async {
            let Some(ToHost::Info(info)) = request.next().await? else {
                return Err(request.misplaced());
            };
            request.finish().await?;
            Ok(info)
        })
        .await
    }

    /// A directory's entries, in no particular order.
    ///
    /// # Errors
    /// [`AgentError::Refused`] for what fails in the guest; [`AgentError::TooMuch`] beyond [`MAX_LISTING`].
    pub async fn list(&self, path: &Path) -> Result<Vec<Entry>, AgentError> {
        let mut request = Request::begin(self, ToAgent::List { path: BytePath::from(path) })?;
        self.soon(async {
            let (mut all, mut room) = (Vec::new(), MAX_LISTING);
            while let Some(message) = request.next().await? {
                let ToHost::Entries(entries) = message else {
                    return Err(request.misplaced());
                };
                let length = entries.iter().map(Entry::cost).sum();
                room = room
                    .checked_sub(length)
                    .ok_or(AgentError::too_much("a directory", MAX_LISTING))?;
                all.extend(entries);
            }
            Ok(all)
        })
        .await
    }

    /// Makes a directory, which may exist, and its parents, and gives it the permission bits.
    ///
    /// # Errors
    /// [`AgentError::Refused`] for what fails in the guest.
    pub async fn make_directory(&self, path: &Path, mode: u32) -> Result<(), AgentError> {
        let message = ToAgent::MakeDirectory { path: BytePath::from(path), mode };
        self.soon(Request::begin(self, message)?.finish()).await
    }

    /// Makes a symbolic link at `path`, in place of a file or link; parents are made.
    ///
    /// # Errors
    /// [`AgentError::Refused`] for what fails in the guest.
    pub async fn symlink(&self, path: &Path, target: &Path) -> Result<(), AgentError> {
        let message =
            ToAgent::Symlink { path: BytePath::from(path), target: BytePath::from(target) };
        self.soon(Request::begin(self, message)?.finish()).await
    }
}
