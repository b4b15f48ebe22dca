//! What all commands share: which database, which network, how results look.

use std::path::PathBuf;

use anyhow::Context as _;
use time_masternode::config::{ConfigError, Options, read_genesis};
use time_masternode::db::guard::Agreement;
use time_masternode::db::{InspectTrees, Watcher};
use time_masternode::types::Genesis;

use super::cli::Target;
use super::progress::Progress;
use super::report::{Format, remark};
use super::supervise::Watchdog;

/// Megabytes of the cache where nobody says how many.
const CACHE_MB: u64 = 64;

/// What a command works with.
#[derive(Debug)]
pub struct Context<'a> {
    /// Where the database lives.
    pub data_dir: PathBuf,
    /// How results look.
    pub format: Format,
    /// Bytes of the database's cache.
    pub cache_bytes: u64,
    /// Whom to tell that something is being opened.
    pub watchdog: &'a Watchdog,
    /// Where progress is shown.
    pub progress: Progress,
    genesis_file: Option<PathBuf>,
}

impl<'a> Context<'a> {
    /// What was asked for; what no flag says stands in the node's configuration.
    pub fn new(target: Target, format: Format, watchdog: &'a Watchdog) -> Result<Self, ConfigError> {
        let given = Options {
            data_dir: target.data_dir,
            genesis_file: target.genesis,
            cache_mb: target.cache_mb,
            ..Options::default()
        };
        let options = match &target.config {
            Some(path) => given.or(Options::read(path)?),
            None => given,
        };
        Ok(Self {
            data_dir: options.data_dir.ok_or(ConfigError::Missing("data_dir"))?,
            format,
            cache_bytes: options.cache_mb.unwrap_or(CACHE_MB) * 1024 * 1024,
            watchdog,
            progress: Progress::default(),
            genesis_file: options.genesis_file,
        })
    }

    /// The network, if it was said which.
    pub fn genesis_if_given(&self) -> anyhow::Result<Option<Genesis>> {
        Ok(self.genesis_file.as_deref().map(read_genesis).transpose()?)
    }

    /// The network, without which the command cannot do its work.
    pub fn genesis(&self) -> anyhow::Result<Genesis> {
        self.genesis_if_given()?.context("the network's genesis file is needed: give --genesis FILE or --config FILE")
    }

    /// Opens the database to look at it.
    pub fn inspect(&self) -> anyhow::Result<&'static InspectTrees> {
        let genesis = self.genesis_if_given()?;
        self.watchdog.opening();
        let trees = InspectTrees::open_with_cache(&self.data_dir, self.cache_bytes)?;
        self.watchdog.opened();
        // Never closed: nothing was written, and on a damaged database closing can come apart
        // in the middle of a panic, which nobody could catch.
        let trees: &'static InspectTrees = Box::leak(Box::new(trees));
        if let Some(genesis) = genesis {
            trees.belongs_to(&genesis)?;
        }
        let condition = trees.condition()?;
        if condition.agreement == Agreement::Mismatch {
            let (here, seen) = (condition.commit, condition.guarded);
            let seen = seen.map_or_else(|| "there is no guard".to_owned(), |seen| format!("the guard has seen {seen}"));
            remark(&format!(
                "warning: the database does not fit its guard (its last commit is {here}, {seen}): it may be older \
                 than what the node has said. Started on it, a member follows and does not vote"
            ));
        }
        Ok(trees)
    }
}

impl Watcher for Context<'_> {
    fn progress(&self, what: &'static str, done: u64, total: Option<u64>) {
        self.progress.tell(what, done, total);
    }

    fn opening(&self) {
        self.watchdog.opening();
    }

    fn opened(&self) {
        self.watchdog.opened();
    }
}
