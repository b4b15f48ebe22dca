//! The command line.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand};
use time_masternode::types::{Amount, Network, OutPoint, Txid};

use super::report::Format;

/// Why an argument is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// Not an amount.
    #[error("an amount is decimal TIME with at most eight places, such as 1 or 0.5")]
    Amount,
    /// Not a network.
    #[error("a network is mainnet, testnet or devnet")]
    Network,
}

fn amount(text: &str) -> Result<Amount, ArgumentError> {
    Amount::parse_time(text).ok_or(ArgumentError::Amount)
}

fn network(text: &str) -> Result<Network, ArgumentError> {
    Network::ALL.into_iter().find(|network| network.to_string() == text).ok_or(ArgumentError::Network)
}

const AFTER_HELP: &str = "\
Examples:
  time-wallet keygen --out alice.key --passphrase
  time-wallet --genesis genesis.json address --key alice.key
  time-wallet --genesis genesis.json balance --key alice.key
  time-wallet --genesis genesis.json send --key alice.key --to dtime1... --amount 1.5
  time-wallet --genesis genesis.json send --key alice.key --to dtime1... --amount 1.5 --offline > payment.json
  time-wallet --genesis genesis.json broadcast payment.json
  time-wallet --genesis genesis.json proof TXID --out proof.json
  time-wallet --genesis genesis.json verify-proof proof.json
  time-wallet --genesis genesis.json watch --key alice.key --state alice.watch

The node is asked and never trusted: the wallet hashes the transactions whose coins it
spends, and says \"final\" only after it has verified the proof against the genesis file.
Get the genesis file from somebody you trust; the node is not the place to ask.

Exit codes: 0 done; 1 refused or not valid (a rejected payment, an invalid proof, too few
coins); 2 could not be done (bad arguments, no connection, an unreadable file).";

/// A wallet for TIME.
#[derive(Debug, Parser)]
#[command(name = "time-wallet", version, after_help = AFTER_HELP)]
pub struct Cli {
    /// The node's WebSocket address.
    #[arg(long, global = true, env = "TIME_WALLET_NODE", default_value = "ws://127.0.0.1:24002", value_name = "URL")]
    pub node: String,
    /// The network's genesis file.
    #[arg(long, global = true, env = "TIME_WALLET_GENESIS", value_name = "FILE")]
    pub genesis: Option<PathBuf>,
    /// How results are written to standard output.
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new key file, mode 0600; never overwrites one.
    Keygen(Keygen),
    /// Print the address of a key.
    Address(AddressOf),
    /// Print what an address has, as the node says.
    Balance(Balance),
    /// Pay, and wait until the payment is proved final.
    Send(Send),
    /// Send a transaction that was signed with `send --offline`.
    Broadcast(Broadcast),
    /// Print where a transaction stands, and verify its proof.
    Status(Status),
    /// Follow addresses and print each change, across restarts and lost connections.
    Watch(WatchArguments),
    /// Verify a finality proof offline.
    VerifyProof(VerifyProof),
    /// Fetch a finality proof, verify it and write it as JSON.
    Proof(FetchProof),
}

/// `keygen`.
#[derive(Debug, Args)]
pub struct Keygen {
    /// The key file to make.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Encrypt it with a passphrase that is asked for.
    #[arg(long, conflicts_with = "passphrase_file")]
    pub passphrase: bool,
    /// Encrypt it with the passphrase in the first line of this file.
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// Import this seed, 64 hex digits, instead of making one; `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    pub from_seed_file: Option<PathBuf>,
}

/// `address`.
#[derive(Debug, Args)]
pub struct AddressOf {
    /// The key file.
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// The network, where no genesis says so.
    #[arg(long, value_parser = network)]
    pub network: Option<Network>,
}

/// `balance`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("owner").required(true))]
pub struct Balance {
    /// The balance of this key's address.
    #[arg(long, value_name = "FILE", group = "owner")]
    pub key: Option<PathBuf>,
    /// The balance of this address.
    #[arg(long, group = "owner")]
    pub address: Option<String>,
    /// The network, where no genesis says so.
    #[arg(long, value_parser = network)]
    pub network: Option<Network>,
}

/// How a payment is followed.
#[derive(Debug, Args)]
pub struct Waiting {
    /// Do not wait for finality; done when the node has stored the payment.
    #[arg(long)]
    pub no_wait: bool,
    /// How long to wait for finality.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
}

/// `send`.
#[derive(Debug, Args)]
pub struct Send {
    /// The key that pays.
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// The key file's passphrase is the first line of this file.
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// Whom to pay; repeat it together with --amount to pay several at once.
    #[arg(long, value_name = "ADDRESS", required = true)]
    pub to: Vec<String>,
    /// How much, in TIME: the first amount belongs to the first --to, and so on.
    #[arg(long, value_name = "TIME", required = true, value_parser = amount)]
    pub amount: Vec<Amount>,
    /// The fee; without it the network's least.
    #[arg(long, value_name = "TIME", value_parser = amount)]
    pub fee: Option<Amount>,
    /// Spend exactly this coin; may be repeated. Without it the largest coins are picked.
    #[arg(long, value_name = "TXID:VOUT")]
    pub coin: Vec<OutPoint>,
    /// Print the signed transaction instead of sending it. With --coin of the genesis only,
    /// no node is asked.
    #[arg(long, conflicts_with = "no_wait")]
    pub offline: bool,
    /// How it is followed.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// `broadcast`.
#[derive(Debug, Args)]
pub struct Broadcast {
    /// The signed transaction; `-` reads standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// How it is followed.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// `status`.
#[derive(Debug, Args)]
pub struct Status {
    /// Which transaction.
    pub txid: Txid,
}

/// `watch`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("owner").required(true).multiple(true))]
pub struct WatchArguments {
    /// Follow this key's address; may be repeated.
    #[arg(long, value_name = "FILE", group = "owner")]
    pub key: Vec<PathBuf>,
    /// Follow this address; may be repeated.
    #[arg(long, group = "owner")]
    pub address: Vec<String>,
    /// Where the position is kept, so that a restart misses nothing and repeats nothing.
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// The network, where no genesis says so.
    #[arg(long, value_parser = network)]
    pub network: Option<Network>,
}

/// `verify-proof`.
#[derive(Debug, Args)]
pub struct VerifyProof {
    /// A certificate, a finality proof or a TransactionStatus as JSON; `-` reads standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The transaction that it has to be about.
    #[arg(long)]
    pub txid: Option<Txid>,
}

/// `proof`.
#[derive(Debug, Args)]
pub struct FetchProof {
    /// Which transaction.
    pub txid: Txid,
    /// Where to write it; without it, to standard output. Never overwrites a file.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        assert_eq!(network("devnet"), Ok(Network::Devnet));
        assert_eq!(network("Devnet"), Err(ArgumentError::Network));
        assert_eq!(amount("0.5"), Ok(Amount::from_units(50_000_000).unwrap()));
        assert_eq!(amount("-1"), Err(ArgumentError::Amount));
    }
}
