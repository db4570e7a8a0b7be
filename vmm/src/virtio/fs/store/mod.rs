//! Shares that nobody changes, such as the Nix store: read-only, to be trusted for ever.
//!
//! virtiofsd keeps a descriptor and a count for each file that a guest remembers, for each guest, and is asked to open
//! and close each file that is read. Where nothing changes none of that is needed. All machines of the process that
//! share a directory have one [`Tree`] of what has been found in it, of which nothing is ever forgotten; a guest looks
//! each name up once and is told to keep it. Files are read without being opened first, straight into guest memory,
//! and on the vCPU's thread if the host has them in its cache.
//!
//! A file that changes all the same costs the guest that file: what was cut short gives `EIO` beyond its end, what was
//! removed or replaced `ESTALE`.

mod filter;
mod open;
mod request;
mod tree;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use super::server::{Fuse, Session};
use crate::common::Common;
use crate::spec::ShareSpec;
use crate::virtio::queue::Chain;
pub(crate) use filter::Filter;
use request::{Patience, serve};
pub(super) use tree::Place;
use tree::{Tree, errno};

/// A share of such a directory.
pub(super) struct Store {
    /// Replaced when a state of another process is restored whose nodes are others.
    tree: RwLock<Arc<Tree>>,
    root: File,
    filter: Filter,
    descriptors: u64,
}

impl Store {
    /// For the directory `root` of `spec`, of which guests see what `filter` shows.
    pub(super) fn new(
        spec: &ShareSpec,
        root: &File,
        filter: &Filter,
        descriptors: u64,
    ) -> io::Result<Store> {
        let tree = common_tree(spec, root, filter, descriptors)?;
        let (root, filter) = (root.try_clone()?, filter.clone());
        Ok(Store { tree: RwLock::new(tree), root, filter, descriptors })
    }

    fn tree(&self) -> Arc<Tree> {
        Arc::clone(&self.tree.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What makes two shares the same directory. The path is for those who mount something below one of two. Guests that
/// see different parts of a directory have no nodes in common, by which one could reach what only another sees.
type Key = (u64, u64, PathBuf, Filter);

/// The trees of the process.
static TREES: Common<Key, Tree> = Common::new();

fn common_tree(
    spec: &ShareSpec,
    root: &File,
    filter: &Filter,
    descriptors: u64,
) -> io::Result<Arc<Tree>> {
    let metadata = root.metadata()?;
    let key = (metadata.dev(), metadata.ino(), spec.source.clone(), filter.clone());
    TREES.get(key, || Tree::new(root, filter.clone(), descriptors))
}

impl Fuse for Store {
    fn serve(&self, chain: &Chain) -> u32 {
        // With patience there is always an answer.
        serve(&self.tree(), chain, Patience::Any).unwrap_or(0)
    }

    fn serve_quickly(&self, chain: &Chain) -> Option<u32> {
        serve(&self.tree(), chain, Patience::None)
    }

    fn end_session(&self) {
        // The guest has nothing open.
    }

    fn save(&self) -> Session {
        Session::Store(self.tree().places())
    }

    fn restore(&self, session: &Session) -> io::Result<()> {
        let Session::Store(places) = session else {
            return Err(io::Error::other("it is not that of a store"));
        };
        let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        if !tree.adopt(places)? {
            let own = Tree::new(&self.root, self.filter.clone(), self.descriptors)?;
            if !own.adopt(places)? {
                return Err(errno(libc::EINVAL));
            }
            *tree = Arc::new(own);
        }
        Ok(())
    }
}
