//! The command line.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand};
use time_masternode::db::TREE_NAMES;
use time_masternode::types::{Address, OutPoint, Txid};

use super::report::Format;

/// Why an argument is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a number or an inclusive range: 7, 7..9, 7.. or ..9")]
pub struct RangeError;

/// `7`, `7..9` (both included), `7..`, `..9`.
fn range(text: &str) -> Result<RangeInclusive<u64>, RangeError> {
    let number = |text: &str, absent: u64| match text {
        "" => Ok(absent),
        text => text.parse().map_err(|_| RangeError),
    };
    let (from, to) = match text.split_once("..") {
        Some(("", "")) => return Err(RangeError),
        Some((from, to)) => (number(from, 0)?, number(to, u64::MAX)?),
        None if text.is_empty() => return Err(RangeError),
        None => (number(text, 0)?, number(text, 0)?),
    };
    if from <= to { Ok(from..=to) } else { Err(RangeError) }
}

const STATES: [&str; 4] = ["Unspent", "Locked", "SpentFinalized", "Confirmed"];

const AFTER_HELP: &str = "\
Examples:
  time-db --config node/config.toml stats
  time-db --data-dir node/data locks
  time-db --data-dir node/data dump --tree utxos --state Locked --format ndjson
  time-db --data-dir node/data get --txid TXID
  time-db --data-dir node/data changes --from 1000 --limit 50

It works on the database of a stopped node, or on a copy of one: a running node's is
refused. To look changes no record; the storage engine may rewrite files of its own.

Exit codes: 0 sound, or done; 1 there are findings (they are printed), or nothing was found;
2 it cannot be told, or could not be done (the message says why, and what to do next).";

/// Looks into, copies and mends the database of a stopped node.
#[derive(Debug, Parser)]
#[command(name = "time-db", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    /// Which database.
    #[command(flatten)]
    pub target: Target,
    /// How results are written to standard output
    #[arg(long, global = true, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Which database, and how it is opened.
#[derive(Debug, Args)]
pub struct Target {
    /// The node's data directory
    #[arg(long, global = true, env = "TIME_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// The node's configuration, for its data_dir, genesis_file and cache_mb; flags go first
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The network's genesis file; a database of another network is refused
    #[arg(long, global = true, env = "TIME_GENESIS_FILE", value_name = "FILE")]
    pub genesis: Option<PathBuf>,
    /// Megabytes of the database's cache [default: 64]
    #[arg(long, global = true, env = "TIME_CACHE_MB", value_name = "MB", value_parser = clap::value_parser!(u64).range(1..=1024 * 1024))]
    pub cache_mb: Option<u64>,
    /// How long opening may take before the database counts as damaged
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 900, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub open_timeout: u64,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print records of the trees, decoded
    #[command(
        after_help = "A record is {tree, key, value}. Where several filters are given, a record has to pass all.\n\nExamples:\n  time-db --data-dir node/data dump --tree locks\n  time-db --data-dir node/data dump --tree utxos --address dtime1...\n  time-db --data-dir node/data dump --format ndjson | jq 'select(.tree == \"utxos\")'"
    )]
    Dump(Dump),
    /// Print every record about one thing
    #[command(
        after_help = "A record is {tree, key, value}, as `dump` prints it. The change log has no index, so it is\nread through. Exit code 1: there is nothing about it.\n\nExamples:\n  time-db --data-dir node/data get --outpoint TXID:0\n  time-db --data-dir node/data get --height 7 --format json\n  time-db --data-dir node/data get --tree meta --key head"
    )]
    Get(Get),
    /// Count and sum: outputs by state, supply, sizes, schema, guard, fence
    #[command(after_help = "Exit code 1: something is not as it should be; it is said at the end.")]
    Stats,
    /// Print what is in flight: since when, own votes, certificates, outputs held
    Locks,
    /// Print the change log
    #[command(after_help = "An entry is {sequence, change}; a change is a Transition or a Block.")]
    Changes(Changes),
    /// Check every invariant by name, in bounded memory
    #[command(after_help = "Without --genesis no member's signature can be checked; the report says what was left out.
Exit code 1: something is wrong; where, and what it means for a repair, is said.

Example:
  time-db --config node/config.toml verify --full")]
    Verify(Verify),
    /// Say what would be done about what is wrong, and why that is safe; --apply does it
    #[command(after_help = "Without --apply nothing is changed. A repair keeps a copy of what was there, and repairing
twice is the same as once. What may have lost votes goes behind the fence; a ledger that
is wrong is set aside and fetched from the other members.
Exit code 1: there is something to repair.

Examples:
  time-db --config node/config.toml repair
  time-db --config node/config.toml repair --apply")]
    Repair(Repair),
    /// Copy the database to a new directory, and see that the copy opens
    #[command(
        after_help = "The directory has to be new. A copy that is cut off stands under another name.\n\nExit code 1: it was copied, and does not fit its guard.\n\nExample:\n  time-db --config node/config.toml backup --to backups/monday"
    )]
    Backup(Backup),
    /// Put a backup in place of the database, behind the fence
    #[command(
        after_help = "What was there is set aside, never deleted. The node has said more than the backup knows, so\nwhat is restored goes behind the fence: the node asks the other members what it must not\nvote on, and votes on what comes into being after that. Wallets take a new snapshot.\nA backup of an older schema needs --genesis; it is migrated.\n\nExample:\n  time-db --config node/config.toml restore --from backups/monday"
    )]
    Restore(Restore),
    /// Write the whole ledger to a file that does not depend on the database
    #[command(
        after_help = "Lines of JSON with a checksum, described in docs/EXPORT.md; `-` is standard output.\n\nExamples:\n  time-db --config node/config.toml export ledger.export\n  time-db --config node/config.toml export - | zstd > ledger.export.zst"
    )]
    Export(Transfer),
    /// Make a new, compact database of an export, behind the fence
    #[command(
        after_help = "It needs --genesis (or --config), and everything in the file is checked against it: blocks,\nproofs, the digest of the outputs, the supply. What was there is set aside, never deleted.\nThe node may have said more than the export knows, so what is imported goes behind the\nfence, as with `restore`. `-` is standard input.\n\nTo save space, `compact` is better: it needs no fence."
    )]
    Import(Transfer),
    /// Write the same rows into a new, compact database, and put that in its place
    #[command(
        after_help = "Every row is compared before the new database takes its place; nothing is lost, so the\nmember votes on as before and wallets notice nothing. What was there is set aside, never\ndeleted: remove it when the node has run for a while. It needs room for the new one\nbeside the old one. One that does not fit its guard is refused: repair it first.\n\nExample:\n  time-db --config node/config.toml compact"
    )]
    Compact,
    /// Bring the database up to this program's schema, as the node does when it starts
    #[command(after_help = "A copy of the database is kept first. It needs --genesis (or --config).")]
    Migrate,
}

/// What records have to be about.
#[derive(Debug, Args)]
pub struct Filters {
    /// Outputs in, and steps to, this state
    #[arg(long, value_parser = STATES)]
    pub state: Option<String>,
    /// What this address owns, owned or follows
    #[arg(long)]
    pub address: Option<Address>,
    /// This output, and what spends or creates it
    #[arg(long, value_name = "TXID:VOUT")]
    pub outpoint: Option<OutPoint>,
    /// This transaction, its outputs, and what it locked or spent
    #[arg(long)]
    pub txid: Option<Txid>,
    /// Blocks of this height, and what became so by them; 7, 7..9, 7.. or ..9
    #[arg(long, value_name = "RANGE", value_parser = range)]
    pub height: Option<RangeInclusive<u64>>,
    /// Entries of the change log; 7, 7..9, 7.. or ..9
    #[arg(long, value_name = "RANGE", value_parser = range)]
    pub sequence: Option<RangeInclusive<u64>>,
}

/// `dump`.
#[derive(Debug, Args)]
pub struct Dump {
    /// Only this tree; may be repeated
    #[arg(long, value_parser = TREE_NAMES)]
    pub tree: Vec<String>,
    /// What records have to be about.
    #[command(flatten)]
    pub filters: Filters,
    /// Records of each tree at most
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}

/// `get`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("thing").required(true))]
pub struct Get {
    /// An output: where it stands, who made it, who holds or spent it
    #[arg(long, value_name = "TXID:VOUT", group = "thing")]
    pub outpoint: Option<OutPoint>,
    /// A transaction: its body, votes, certificates, what it spends and creates
    #[arg(long, group = "thing")]
    pub txid: Option<Txid>,
    /// A block, and what became so by it
    #[arg(long, group = "thing")]
    pub height: Option<u64>,
    /// An entry of the change log, and where its output stands now
    #[arg(long, value_name = "N", group = "thing")]
    pub sequence: Option<u64>,
    /// One record of this tree
    #[arg(long, value_parser = TREE_NAMES, group = "thing", requires = "key")]
    pub tree: Option<String>,
    /// Its key, as `dump` prints it
    #[arg(long, requires = "tree")]
    pub key: Option<String>,
}

/// `changes`.
#[derive(Debug, Args)]
pub struct Changes {
    /// The first entry
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub from: u64,
    /// The last entry
    #[arg(long, value_name = "N", default_value_t = u64::MAX, hide_default_value = true)]
    pub to: u64,
    /// Entries at most
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}

/// `verify`.
#[derive(Debug, Args)]
pub struct Verify {
    /// Also the owners' signatures, and the chain executed anew from the genesis
    #[arg(long)]
    pub full: bool,
}

/// `repair`.
#[derive(Debug, Args)]
pub struct Repair {
    /// Carry the plan out
    #[arg(long)]
    pub apply: bool,
}

/// `backup`.
#[derive(Debug, Args)]
pub struct Backup {
    /// The directory to make
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
}

/// `restore`.
#[derive(Debug, Args)]
pub struct Restore {
    /// A backup, or a copy of a stopped node's data directory
    #[arg(long, value_name = "DIR")]
    pub from: PathBuf,
}

/// `export` and `import`.
#[derive(Debug, Args)]
pub struct Transfer {
    /// The export
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn ranges_include_both_ends() {
        assert_eq!(range("7"), Ok(7..=7));
        assert_eq!(range("7..9"), Ok(7..=9));
        assert_eq!(range("7.."), Ok(7..=u64::MAX));
        assert_eq!(range("..9"), Ok(0..=9));
        for bad in ["", "..", "9..7", "x", "7...9", "-1"] {
            assert_eq!(range(bad), Err(RangeError), "{bad}");
        }
    }
}
