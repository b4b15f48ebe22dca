//! The command line, and what it means once it has been checked.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, ValueEnum};
use time_masternode::limits::{MAX_INPUTS, MAX_OUTPUTS};

/// Wallets where none are asked for and payments are independent of each other.
const WALLETS: usize = 256;
/// The longest that anything may be asked to take.
const MAX_SECONDS: f64 = 24.0 * 3_600.0;

const AFTER_HELP: &str = "\
Examples:
  time-bench                                             four nodes, 64 payments in flight, 10 s
  time-bench --in-flight 1 --count 500                   one payment at a time
  time-bench --in-flight 256 --chained --duration 30     256 chains of payments
  time-bench --rate 1000 --duration 60 --picture out.svg open loop, with a picture
  time-bench --rate 10000 --on-busy drop                 more than the network can do
  time-bench --conflicts 0.05 --subscriptions 256 --queries 50
  time-bench --network net --pids 101,102,103,104        a devnet that runs already

What is measured:
  Payments are signed and encoded before the clock starts, and the coins that they spend
  are final on every node by then. Only what a wallet was told counts: a payment is final
  when `Finalized` (or `Confirmed`) with a proof has come on the connection that sent it.
  Some of the proofs are verified afterwards.
  finalised latency      from the broadcast (open loop: from when it was due) to `Finalized`
  confirmed latency      from the same to `Confirmed`; at most the network's block interval
                         and the agreement on the block behind the other
  notification, whole    from the payer's broadcast to the subscriber's notification of a new
                         output, on whichever node
  notification, commit   from the payer's `Finalized` to the notification of the new output
                         on the same node, 0 if the notification came first. Both tell of the
                         same commit of that node, and the `Finalized` is the earliest word of
                         it that leaves the node; notifications themselves carry whole seconds
  query                  a `UTXOStateQuery` for one coin, there and back
  CPU                    of a node's process and of time-bench, from /proc, over the window,
                         for each payment that became final in the window
  disk                   growth of a node's data directory; and what was written to the disk
                         under it, by all nodes and everybody else
  compact (--compacted)  growth of the data directory from before the warm-up, made compact, to
                         after the end, made compact, for each payment of the whole run
  wire                   bytes of messages by the node's own count, without framing
The window opens after --warm-up and closes after --duration, or with the payment that
makes --count full. Contested payments (--conflicts) are sent in pairs that spend the same
coin, to two nodes at once, beside the load; they count as final but not in the latencies.

Exit codes: 0 measured; 1 measured, and the network broke a promise (each is named);
2 could not be done (bad arguments, no network, a lost connection).";

/// Loads a network as wallets do and measures what they see.
#[derive(Debug, Parser)]
#[command(name = "time-bench", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub network: NetworkArgs,
    #[command(flatten)]
    pub load: LoadArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Which network is loaded.
#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
pub struct NetworkArgs {
    /// Start a network of so many masternodes, each a process of its own
    #[arg(long, default_value_t = 4, conflicts_with = "network")]
    pub nodes: u16,
    /// Where to keep that network [default: a temporary directory, removed at the end]
    #[arg(long, value_name = "DIR", conflicts_with = "network")]
    pub data_dir: Option<PathBuf>,
    /// The program of its nodes [default: time-masternode beside this one]
    #[arg(long, value_name = "FILE", conflicts_with = "network")]
    pub masternode: Option<PathBuf>,
    /// Its first node's first port [default: some that are free]
    #[arg(long, value_name = "PORT", conflicts_with = "network")]
    pub base_port: Option<u16>,
    /// How long after a block its next is due
    #[arg(long, value_name = "MS", default_value_t = 2_000, conflicts_with = "network")]
    pub block_interval_ms: u64,
    /// Blocks whose spent outputs, proofs and changes its nodes keep; 0 keeps everything
    /// [default: the nodes' own]
    #[arg(long, value_name = "N", conflicts_with = "network")]
    pub retention_blocks: Option<u64>,
    /// Wait before the load and after it until the nodes have made their databases compact, as they
    /// do when they have little to do, and tell also how much larger they are then; nodes
    /// that are started here do it above one megabyte
    #[arg(long)]
    pub compacted: bool,
    /// Load a devnet that is running: the directory with its devnet.json
    #[arg(long, value_name = "DIR")]
    pub network: Option<PathBuf>,
    /// The processes of that devnet's nodes, in the order of devnet.json, to measure them
    #[arg(long, value_name = "PID", value_delimiter = ',', requires = "network")]
    pub pids: Vec<u32>,
}

/// What a wallet does when a node says that it is busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnBusy {
    /// Send the same payment again a little later.
    Resend,
    /// Give the payment up.
    Drop,
}

/// What the network is loaded with.
#[derive(Debug, Args)]
#[command(next_help_heading = "Load")]
pub struct LoadArgs {
    /// Closed loop: keep so many payments in flight; 1 is one at a time
    #[arg(long, value_name = "N", default_value_t = 64, conflicts_with = "rate")]
    pub in_flight: usize,
    /// Open loop: send so many payments a second, whatever comes back
    #[arg(long, value_name = "PER_SECOND")]
    pub rate: Option<f64>,
    /// Measure until so many payments have become final
    #[arg(long, value_name = "N", conflicts_with = "duration")]
    pub count: Option<usize>,
    /// Measure for so many seconds [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub duration: Option<f64>,
    /// Seconds of the same load before the clock starts [default: 2; with --count: 0]
    #[arg(long, value_name = "SECONDS")]
    pub warm_up: Option<f64>,
    /// The most payments a second that payments are prepared for (with --rate: that)
    #[arg(long, value_name = "PER_SECOND", default_value_t = 3_000.0)]
    pub prepare_for: f64,
    /// Wallets that pay [default: 256; with --chained as many as in flight]
    #[arg(long, value_name = "N")]
    pub wallets: Option<usize>,
    /// Inputs of a payment
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub inputs: usize,
    /// Outputs of a payment, the change among them
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub outputs: usize,
    /// Each payment spends the change of its wallet's last one, as soon as that is final
    #[arg(long)]
    pub chained: bool,
    /// The share of payments that contradict another one, 0 to 0.9
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub conflicts: f64,
    /// Coins that are there besides, and that nobody spends
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub idle_coins: usize,
    /// What a wallet does when a node is busy
    #[arg(long, value_enum, default_value_t = OnBusy::Resend)]
    pub on_busy: OnBusy,
    /// Send to these nodes only, by id; wallets are shared out among them [default: all]
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    pub to: Vec<String>,
    /// Connections to each of them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub connections: u16,
    /// Subscribers that follow one wallet's address each
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub subscriptions: usize,
    /// Queries a second beside the load
    #[arg(long, value_name = "PER_SECOND", default_value_t = 0.0)]
    pub queries: f64,
    /// How long what is open at the end may take until it counts as unsettled
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub drain: f64,
}

/// Where the results go.
#[derive(Debug, Args)]
#[command(next_help_heading = "Results")]
pub struct OutputArgs {
    /// How they are written to standard output
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Write them as JSON to this file too
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw latency and throughput over time as SVG into this file
    #[arg(long, value_name = "FILE")]
    pub picture: Option<PathBuf>,
}

/// How results look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// When a payment is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// So many in flight.
    Closed(usize),
    /// So many a second.
    Open(f64),
}

/// When the clock stops.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Until {
    /// With this many final payments.
    Count(usize),
    /// After this time.
    Time(Duration),
}

/// The load, checked.
#[derive(Debug, Clone)]
pub struct LoadSettings {
    pub pace: Pace,
    pub until: Until,
    pub warm_up: Duration,
    pub wallets: usize,
    /// Uncontested payments that are signed beforehand.
    pub payments: usize,
    /// Pairs of contradicting payments that are signed beforehand.
    pub pairs: usize,
    /// Pairs for each uncontested payment.
    pub pairs_per_payment: f64,
    pub inputs: usize,
    pub outputs: usize,
    pub chained: bool,
    pub on_busy: OnBusy,
    pub connections: usize,
    pub subscriptions: usize,
    pub queries: f64,
    pub drain: Duration,
}

/// Why arguments cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// A number outside its range.
    #[error("--{name} has to be {range}")]
    Range {
        /// Of which option.
        name: &'static str,
        /// What is allowed.
        range: String,
    },
    /// A chain has to give back what it takes.
    #[error("--chained needs at least as many --outputs as --inputs: its change is spent next")]
    ChainDries,
    /// Two subscriptions would be one.
    #[error("--subscriptions: with {wallets} wallets on {nodes} nodes there can be {most}; give more --wallets")]
    Subscriptions {
        /// Wallets.
        wallets: usize,
        /// Nodes.
        nodes: usize,
        /// What is possible.
        most: usize,
    },
}

fn range(name: &'static str, range: impl Into<String>) -> ArgumentError {
    ArgumentError::Range { name, range: range.into() }
}

fn seconds(name: &'static str, value: f64) -> Result<Duration, ArgumentError> {
    if !(0.0..=MAX_SECONDS).contains(&value) {
        return Err(range(name, format!("0 to {MAX_SECONDS} seconds")));
    }
    Ok(Duration::from_secs_f64(value))
}

/// A number of payments; the caller has bounded both factors.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded and not negative")]
fn whole(value: f64) -> usize {
    value.ceil().max(0.0) as usize
}

impl LoadArgs {
    /// Checks the arguments for a load on `nodes` nodes.
    pub fn settings(&self, nodes: usize) -> Result<LoadSettings, ArgumentError> {
        const MAX_RATE: f64 = 1_000_000.0;
        let rate = |name, value: f64| {
            if (0.0..=MAX_RATE).contains(&value) { Ok(value) } else { Err(range(name, "0 to 1000000 a second")) }
        };
        let pace = match self.rate {
            Some(value) if value > 0.0 => Pace::Open(rate("rate", value)?),
            Some(_) => return Err(range("rate", "above 0")),
            None if self.in_flight == 0 => return Err(range("in-flight", "at least 1")),
            None => Pace::Closed(self.in_flight),
        };
        let until = match (self.count, self.duration) {
            (Some(0), _) => return Err(range("count", "at least 1")),
            (Some(count), _) => Until::Count(count),
            (None, duration) => Until::Time(seconds("duration", duration.unwrap_or(10.0))?),
        };
        let warm_up = if self.count.is_some() { 0.0 } else { 2.0 };
        let warm_up = seconds("warm-up", self.warm_up.unwrap_or(warm_up))?;
        if !(1..=MAX_INPUTS).contains(&self.inputs) {
            return Err(range("inputs", format!("1 to {MAX_INPUTS}")));
        }
        if !(1..=MAX_OUTPUTS).contains(&self.outputs) {
            return Err(range("outputs", format!("1 to {MAX_OUTPUTS}")));
        }
        if self.chained && self.outputs < self.inputs {
            return Err(ArgumentError::ChainDries);
        }
        if !(0.0..=0.9).contains(&self.conflicts) {
            return Err(range("conflicts", "0 to 0.9"));
        }
        let queries = rate("queries", self.queries)?;
        let prepared_rate = match pace {
            Pace::Open(rate) => rate,
            Pace::Closed(_) => rate("prepare-for", self.prepare_for)?,
        };
        let in_flight = match pace {
            Pace::Closed(in_flight) => in_flight,
            // What a second of the rate has in flight is more than a network needs.
            Pace::Open(rate) => whole(rate),
        };
        let payments = match until {
            Until::Count(count) => count + whole(prepared_rate * warm_up.as_secs_f64()) + in_flight,
            Until::Time(duration) => whole(prepared_rate * (warm_up + duration).as_secs_f64()).max(in_flight),
        };
        let wallets = match (self.wallets, self.chained) {
            (Some(0), _) => return Err(range("wallets", "at least 1")),
            (Some(wallets), _) => wallets,
            (None, true) => in_flight,
            (None, false) => WALLETS,
        };
        // Each node has equally many, and at least two, of which one pays the other.
        let wallets = wallets.max(2 * nodes).next_multiple_of(nodes.max(1));
        if self.chained && wallets < in_flight {
            return Err(range("wallets", format!("at least {in_flight}, for each has one payment in flight")));
        }
        if self.subscriptions > wallets * nodes {
            return Err(ArgumentError::Subscriptions { wallets, nodes, most: wallets * nodes });
        }
        let pairs_per_payment = self.conflicts / (1.0 - self.conflicts) / 2.0;
        Ok(LoadSettings {
            pace,
            until,
            warm_up,
            wallets,
            payments,
            pairs: whole(payments as f64 * pairs_per_payment),
            pairs_per_payment,
            inputs: self.inputs,
            outputs: self.outputs,
            chained: self.chained,
            on_busy: self.on_busy,
            connections: usize::from(self.connections),
            subscriptions: self.subscriptions,
            queries,
            drain: seconds("drain", self.drain)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn settings(arguments: &[&str]) -> Result<LoadSettings, ArgumentError> {
        let all = std::iter::once(&"time-bench").chain(arguments);
        Cli::try_parse_from(all).unwrap().load.settings(4)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let default = settings(&[]).unwrap();
        assert_eq!((default.pace, default.until), (Pace::Closed(64), Until::Time(Duration::from_secs(10))));
        assert_eq!((default.payments, default.wallets, default.pairs), (36_000, 256, 0));
        let counted = settings(&["--count", "100", "--in-flight", "10", "--conflicts", "0.5"]).unwrap();
        // Of 100 payments 50 are uncontested, and 50 are 25 pairs.
        assert_eq!((counted.payments, counted.pairs, counted.warm_up), (110, 55, Duration::ZERO));
        let open = settings(&["--rate", "500", "--duration", "2", "--warm-up", "1"]).unwrap();
        assert_eq!((open.pace, open.payments), (Pace::Open(500.0), 1_500));
    }

    #[test]
    fn chains_have_a_wallet_each() {
        assert_eq!(settings(&["--chained", "--in-flight", "1"]).unwrap().wallets, 8, "two for each node");
        assert_eq!(settings(&["--chained", "--in-flight", "30"]).unwrap().wallets, 32);
        assert!(settings(&["--chained", "--in-flight", "30", "--wallets", "8"]).is_err());
        assert_eq!(settings(&["--chained", "--outputs", "1", "--inputs", "2"]).unwrap_err(), ArgumentError::ChainDries);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for arguments in [
            &["--rate", "0"][..],
            &["--rate", "nan"],
            &["--in-flight", "0"],
            &["--count", "0"],
            &["--duration", "-1"],
            &["--inputs", "257"],
            &["--outputs", "0"],
            &["--conflicts", "1"],
            &["--wallets", "4", "--subscriptions", "33"],
        ] {
            let named: Vec<String> = arguments.iter().map(|text| (*text).to_owned()).collect();
            let joined = [format!("{}={}", named[0], named[1])];
            let rest = &named[2..];
            let all: Vec<&str> = joined.iter().chain(rest).map(String::as_str).collect();
            assert!(settings(&all).is_err(), "{arguments:?}");
        }
    }
}
