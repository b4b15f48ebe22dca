//! `time-wallet`: keys, payments and proofs from the command line.
//!
//! - `cli` the arguments, `context` what all commands share, `report` what is printed
//! - what is kept on disk is read and written by the library's `files` and `keyfile`
//! - `coins`, `payment`, `proof` decide, without I/O
//! - `client`, `query`, `pay`, `watch`, `watch_state` talk to a node
//!
//! This file joins them and turns errors into exit codes. It decides nothing about money.
#![forbid(unsafe_code)]

mod cli;
mod client;
mod coins;
mod context;
mod pay;
mod payment;
mod proof;
mod query;
mod report;
mod watch;
mod watch_state;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::Parser;
use serde_json::json;
use time_masternode::consensus::{Committee, Rules, check_form};
use time_masternode::files;
use time_masternode::keyfile::{self, KeyFile};
use time_masternode::limits::MAX_TRANSACTION_BYTES;
use time_masternode::net::TransactionStatusKind;
use time_masternode::types::{Address, Amount, Genesis, RawTransaction, SecretKey, UTXOState};

use cli::{Cli, Command};
use client::{Client, ClientError};
use context::{Context, parse_address};
use pay::{Delivery, PayError, announce};
use payment::{Plan, check_own};
use proof::ProofError;
use query::QueryError;
use report::{Report, printable, remark};
use watch::{Watch, WatchError};

/// Bytes that a proof may have: 256 votes with paths are far below.
const MAX_PROOF_BYTES: u64 = 16 * 1024 * 1024;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Cli { node, genesis, format, command } = Cli::parse();
    let context = Context::new(node, genesis, Report::new(format));
    let Err(error) = run(&context, command).await else { return ExitCode::SUCCESS };
    let refused = is_refusal(&error);
    // Every message already says what caused it; the chain would say it twice.
    context.report.failure(&error.to_string(), refused);
    ExitCode::from(if refused { 1 } else { 2 })
}

async fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Keygen(arguments) => keygen(context, &arguments),
        Command::Address(arguments) => address(context, &arguments),
        Command::Balance(arguments) => balance(context, arguments).await,
        Command::Send(arguments) => send(context, arguments).await,
        Command::Broadcast(arguments) => broadcast(context, &arguments).await,
        Command::Status(arguments) => status(context, &arguments).await,
        Command::Watch(arguments) => follow(context, arguments).await,
        Command::VerifyProof(arguments) => verify_proof(context, &arguments),
        Command::Proof(arguments) => fetch_proof(context, &arguments).await,
    }
}

/// Whether an error means "refused or not valid" rather than "could not be done".
fn is_refusal(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_some_and(PayError::is_refusal)
        || error.downcast_ref().is_some_and(ProofError::is_refusal)
        || error.downcast_ref().is_some_and(QueryError::is_refusal)
        || error.downcast_ref().is_some_and(WatchError::is_refusal)
        || error.downcast_ref().is_some_and(ClientError::is_refusal)
}

fn keygen(context: &Context, arguments: &cli::Keygen) -> anyhow::Result<()> {
    // Before the file is made, so that a bad genesis leaves none behind.
    let network = context.network_if_given(None)?;
    let key = match &arguments.from_seed_file {
        Some(path) => keyfile::read_seed(path)?,
        None => SecretKey::generate(),
    };
    let passphrase = match &arguments.passphrase_file {
        Some(path) => Some(keyfile::passphrase(Some(path))?),
        None if arguments.passphrase => Some(keyfile::new_passphrase()?),
        None => None,
    };
    keyfile::create(&arguments.out, &key, passphrase.as_ref().map(|text| text.as_str()))?;
    let public_key = key.public_key();
    let address = network.map(|network| Address::of_key(&public_key, network));
    let encrypted = if passphrase.is_some() { "encrypted" } else { "not encrypted" };
    let mut text = format!("{}: new key file, {encrypted}\npublic key {public_key}", arguments.out.display());
    if let Some(address) = address {
        text.push_str(&format!("\naddress    {address}"));
    }
    let json = json!({
        "file": arguments.out.display().to_string(), "public_key": public_key,
        "address": address, "encrypted": passphrase.is_some(),
    });
    Ok(context.report.result(&text, &json)?)
}

fn address(context: &Context, arguments: &cli::AddressOf) -> anyhow::Result<()> {
    let addresses = context.addresses(std::slice::from_ref(&arguments.key), &[], arguments.network)?;
    let address = addresses.first().context("the key has no address")?;
    Ok(context.report.result(&address.to_string(), &json!({"address": address}))?)
}

async fn balance(context: &Context, arguments: cli::Balance) -> anyhow::Result<()> {
    let keys: Vec<_> = arguments.key.into_iter().collect();
    let texts: Vec<_> = arguments.address.into_iter().collect();
    let addresses = context.addresses(&keys, &texts, arguments.network)?;
    let address = *addresses.first().context("no address was given")?;
    let mut client = Client::connect(&context.node).await?;
    let coins = query::live_coins(&mut client, address).await?;
    let sum = |unspent: bool| {
        let of_kind = coins.iter().filter(|coin| (coin.state == UTXOState::Unspent) == unspent);
        Amount::checked_sum(of_kind.map(|coin| coin.output.amount))
    };
    let sums = sum(true).zip(sum(false)).and_then(|(a, b)| Some((a, b, a.checked_add(b)?)));
    let (unspent, locked, total) = sums.context("the node's coins add up to more than there can be")?;
    let text = format!(
        "address  {address}\nunspent  {unspent} TIME\nlocked   {locked} TIME\ntotal    {total} TIME in {} coins",
        coins.len()
    );
    let json = json!({"address": address, "unspent": unspent, "locked": locked, "total": total, "coins": coins.len()});
    Ok(context.report.result(&text, &json)?)
}

fn unlock(path: &Path, passphrase_file: Option<&Path>) -> anyhow::Result<SecretKey> {
    Ok(KeyFile::read(path)?.unlock(|| keyfile::passphrase(passphrase_file))?)
}

fn delivery<'a>(context: &'a Context, genesis: &'a Genesis, waiting: &cli::Waiting) -> Delivery<'a> {
    Delivery {
        node: &context.node,
        genesis,
        report: context.report,
        timeout: Duration::from_secs(waiting.timeout),
        wait: !waiting.no_wait,
    }
}

async fn send(context: &Context, arguments: cli::Send) -> anyhow::Result<()> {
    let genesis = context.genesis()?;
    let parse = |text: &String| parse_address(text, Some(genesis.network()));
    let addresses = arguments.to.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    let plan = Plan::new(&addresses, &arguments.amount, arguments.fee, &genesis)?;
    let key = unlock(&arguments.key, arguments.passphrase_file.as_deref())?;
    let owner = Address::of_key(&key.public_key(), genesis.network());

    let local = if arguments.offline { pay::genesis_coins(&arguments.coin, &genesis, owner)? } else { None };
    let (coins, client) = match local {
        Some(coins) => (coins::take_named(coins, plan.needed()).map_err(PayError::from)?, None),
        None => {
            let mut client = Client::connect(&context.node).await?;
            (pay::pick(&mut client, &genesis, owner, plan.needed(), &arguments.coin).await?, Some(client))
        }
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let transaction = plan.sign(&coins, &key, &genesis, i64::try_from(now.as_secs())?)?;
    drop(key);
    match client {
        Some(client) if !arguments.offline => {
            announce(context.report, &transaction, &plan)?;
            Ok(delivery(context, &genesis, &arguments.waiting).deliver(client, &transaction).await?)
        }
        _ => {
            let json = serde_json::to_value(transaction.to_raw())?;
            Ok(context.report.result(&json.to_string(), &json)?)
        }
    }
}

async fn broadcast(context: &Context, arguments: &cli::Broadcast) -> anyhow::Result<()> {
    let genesis = context.genesis()?;
    let bytes = files::read(&arguments.file, MAX_TRANSACTION_BYTES as u64)?;
    let raw: RawTransaction = serde_json::from_slice(&bytes)
        .map_err(|error| anyhow::anyhow!("{}: not a transaction: {error}", arguments.file.display()))?;
    let rules = Rules { network: genesis.network(), min_fee: genesis.min_fee() };
    let transaction = check_form(raw, &rules).map_err(PayError::from)?;
    check_own(&transaction, &genesis).map_err(PayError::from)?;
    let client = Client::connect(&context.node).await?;
    Ok(delivery(context, &genesis, &arguments.waiting).deliver(client, &transaction).await?)
}

async fn status(context: &Context, arguments: &cli::Status) -> anyhow::Result<()> {
    let genesis = context.genesis_if_given()?;
    let mut client = Client::connect(&context.node).await?;
    let status = query::status(&mut client, arguments.txid).await?;
    let verdict = status.finality_proof.as_ref().map(|proof| {
        let committee = Committee::of_genesis(genesis.as_ref()?);
        Some(proof::verify(proof, &committee, Some(arguments.txid)))
    });
    let (proof_text, proof_code) = match &verdict {
        None => ("no proof".into(), "none"),
        Some(None) => ("proof not checked: give --genesis FILE".into(), "unchecked"),
        Some(Some(Ok(proven))) => (format!("proof verified\n{}", proven.text()), "verified"),
        Some(Some(Err(error))) => (error.to_string(), "invalid"),
    };
    let mut text = format!(
        "{}  {:?}  approvals {}, commits {} of {}",
        status.txid, status.status, status.approvals, status.commits, status.total_masternodes
    );
    if let Some(height) = status.block_height {
        text.push_str(&format!(", block {height}"));
    }
    if let Some(why) = &status.rejection {
        text.push_str(&format!("\n{}: {}", printable(&why.code), printable(&why.message)));
    }
    let mut json = serde_json::to_value(&status)?;
    if let Some(map) = json.as_object_mut() {
        map.insert("proof".into(), proof_code.into());
    }
    context.report.result(&format!("{text}\n{proof_text}"), &json)?;
    match verdict {
        Some(Some(Err(error))) if error.is_refusal() => Err(error.into()),
        _ => Ok(()),
    }
}

async fn follow(context: &Context, arguments: cli::WatchArguments) -> anyhow::Result<()> {
    let addresses = context.addresses(&arguments.key, &arguments.address, arguments.network)?;
    let watch = Watch::open(&context.node, context.report, addresses, arguments.state.as_deref())?;
    let stop = async {
        if let Err(error) = tokio::signal::ctrl_c().await {
            remark(&format!("Ctrl-C cannot be caught: {error}"));
            std::future::pending::<()>().await;
        }
    };
    Ok(watch.run(stop).await?)
}

fn verify_proof(context: &Context, arguments: &cli::VerifyProof) -> anyhow::Result<()> {
    let genesis = context.genesis()?;
    let bytes = files::read(&arguments.file, MAX_PROOF_BYTES)?;
    let proof = proof::read(&bytes)?;
    let proven = proof::verify(&proof, &Committee::of_genesis(&genesis), arguments.txid)?;
    Ok(context.report.result(&proven.text(), &proven.json())?)
}

async fn fetch_proof(context: &Context, arguments: &cli::FetchProof) -> anyhow::Result<()> {
    let genesis = context.genesis()?;
    let mut client = Client::connect(&context.node).await?;
    let status = query::status(&mut client, arguments.txid).await?;
    let Some(proof) = status.finality_proof else {
        let final_anyway = matches!(status.status, TransactionStatusKind::Finalized | TransactionStatusKind::Confirmed);
        remark(&format!("{} is {:?}{}", status.txid, status.status, if final_anyway { ", the node says" } else { "" }));
        return Err(ProofError::Missing.into());
    };
    let proven = proof::verify(&proof, &Committee::of_genesis(&genesis), Some(arguments.txid))?;
    let json = serde_json::to_value(&proof)?;
    match &arguments.out {
        None => Ok(context.report.result(&json.to_string(), &json)?),
        Some(path) => {
            files::create_new(path, 0o644, format!("{json}\n").as_bytes())?;
            Ok(context.report.result(&format!("{}: {}", path.display(), proven.text()), &proven.json())?)
        }
    }
}
