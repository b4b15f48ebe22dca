//! A run: connections, warm-up, the measured window, and what is open at the end.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use time_masternode::consensus::{CheckedBlock, Committee, VoteKind};
use time_masternode::net::{FinalityProof, NetworkMessage, parse};
use tokio::time::{sleep, timeout};

use super::cli::{LoadSettings, Until};
use super::load::{Load, Sample};
use super::network::Network;
use super::plan::Plan;
use super::probe::{self, MachineSample, NodeSample, ProcessSample};
use super::query::Queries;
use super::report::remark;
use super::stats::Window;
use super::subscribe::{self, Subscription, Tally};
use super::wire::{Goal, Shared, connect};

/// Confirmations are waited for where blocks come at least this often.
const CONFIRMED_WITHIN_MS: u64 = 30_000;
/// How often it is looked whether all subscribers have heard everything.
const HEARD_POLL: Duration = Duration::from_millis(20);

/// Everything at one end of the window.
pub struct Edge {
    pub machine: MachineSample,
    pub this: ProcessSample,
    pub nodes: Vec<NodeSample>,
    /// Bytes written to the device that has the network's directory, by everybody.
    pub device_written_bytes: Option<u64>,
}

/// What a run brought.
pub struct Outcome {
    pub load: Rc<Shared>,
    pub window: Window,
    pub edges: [Edge; 2],
    pub tally: Rc<RefCell<Tally>>,
    /// Notifications that did not come.
    pub missing: usize,
    pub queries: Vec<Sample>,
    pub waited_for_blocks: bool,
    /// Proofs that were verified, and why one of them is none.
    pub proofs: (usize, Option<String>),
    /// What the nodes said before the load when they were compact, if that was waited for.
    pub compact: Option<Vec<NodeSample>>,
    /// What the nodes say at the very end, compact again if they were before.
    pub last: Vec<NodeSample>,
}

async fn edge(network: &Network) -> anyhow::Result<Edge> {
    // This process and the machine first, for asking the nodes takes some of both.
    let (machine, this) = (probe::machine()?, probe::process("self")?);
    let device_written_bytes = probe::device_written_bytes(&network.directory);
    Ok(Edge { machine, this, device_written_bytes, nodes: network.sample().await? })
}

/// Loads the chosen nodes. Runs on a `LocalSet`.
pub async fn run(
    network: &Network,
    settings: &LoadSettings,
    slots: &[usize],
    plan: Plan,
    compacted: bool,
) -> anyhow::Result<Outcome> {
    let compact = if compacted {
        network.compacted().await?;
        Some(network.sample().await?)
    } else {
        None
    };
    let addresses: Vec<String> =
        slots.iter().map(|slot| network.devnet.nodes[*slot].websocket_address.clone()).collect();
    let connections = slots.len() * settings.connections;
    let slot_of = Rc::new((0..connections).map(|connection| connection / settings.connections).collect::<Vec<_>>());
    let wallets: Vec<_> = plan.wallets.iter().map(|wallet| (wallet.slot, wallet.address)).collect();
    let subscriptions = subscribe::subscriptions(settings.subscriptions, &wallets, slots.len());
    let mut lines = Vec::with_capacity(connections);
    for connection in 0..connections {
        lines.push(connect(&addresses[slot_of[connection]]).await?);
    }
    let followers = subscribe::begin(&addresses, &subscriptions).await?;

    let shared = Shared::new(Load::new(plan, settings, connections), connections);
    let tally = Rc::new(RefCell::new(Tally::default()));
    for line in followers {
        shared.spawn(subscribe::follow(Rc::clone(&shared), Rc::clone(&tally), Rc::clone(&slot_of), line));
    }
    let coins = || shared.look(|load| load.plan().coins.clone());
    let ask = || Queries::begin(addresses.clone(), coins(), settings.queries, shared.began());
    let queries = (settings.queries > 0.0).then(ask).transpose()?;
    for (connection, (sink, source)) in lines.into_iter().enumerate() {
        shared.spawn(Rc::clone(&shared).read(connection, source));
        shared.spawn(Rc::clone(&shared).write(connection, sink));
    }
    shared.spawn(Rc::clone(&shared).keep_pace(settings.pace));

    let (window, edges) = measure(network, settings, &shared).await?;
    let queries = queries.map(Queries::end).transpose()?.unwrap_or_default();
    let waited_for_blocks = network.genesis.block_interval_ms() <= CONFIRMED_WITHIN_MS;
    let missing = drain(settings, &shared, waited_for_blocks, &subscriptions, &tally).await?;
    subscribe::cancel(&addresses, &subscriptions).await?;
    let proofs = shared.look(|load| verify(load.proofs(), &Committee::of_genesis(&network.genesis)));
    if compacted {
        network.compacted().await?;
    }
    let last = network.sample().await?;
    Ok(Outcome { load: shared, window, edges, tally, missing, queries, waited_for_blocks, proofs, compact, last })
}

/// Warm-up, then the window.
async fn measure(
    network: &Network,
    settings: &LoadSettings,
    shared: &Rc<Shared>,
) -> anyhow::Result<(Window, [Edge; 2])> {
    // Either is over early when there is nothing left to send.
    let wait_for = |time: Duration| async move {
        match timeout(time, shared.wait_for(Goal::Finals(None))).await {
            Ok(ended) => ended,
            Err(_) => Ok(()),
        }
    };
    if settings.warm_up > Duration::ZERO {
        remark(&format!("warming up for {:?}", settings.warm_up));
        wait_for(settings.warm_up).await?;
    }
    let (from, begun) = (shared.now(), shared.look(Load::final_count));
    let first = edge(network).await?;
    remark("measuring");
    match settings.until {
        Until::Time(duration) => {
            // From the window's beginning, not from when its edge had been looked at.
            let passed = Duration::from_micros(shared.now() - from);
            wait_for(duration.saturating_sub(passed)).await?;
        }
        Until::Count(count) => {
            let stalled = Duration::from_secs(3_600);
            let counted = timeout(stalled, shared.wait_for(Goal::Finals(Some(begun + count)))).await;
            counted.context("the payments do not become final")??;
        }
    }
    let to = shared.now();
    let second = edge(network).await?;
    shared.update(|load, _| load.stop());
    Ok((Window { from, to }, [first, second]))
}

/// Waits for what is open, as long as it may take; gives the notifications that are missing.
async fn drain(
    settings: &LoadSettings,
    shared: &Rc<Shared>,
    blocks: bool,
    subscriptions: &[Subscription],
    tally: &Rc<RefCell<Tally>>,
) -> anyhow::Result<usize> {
    remark(&format!("waiting for {} open payments", shared.look(Load::open)));
    let until = Instant::now() + settings.drain;
    let settled = timeout(settings.drain, shared.wait_for(Goal::Settled { confirmed: blocks })).await;
    if let Ok(ended) = settled {
        ended?;
    }
    loop {
        let missing = shared.look(|load| tally.borrow().missing(subscriptions, load));
        if missing == 0 || Instant::now() >= until {
            return Ok(missing);
        }
        sleep(HEARD_POLL).await;
    }
}

/// Verifies the kept proofs as their wallets would: how many are good, and what is wrong with
/// the first that is not.
fn verify(proofs: &[String], committee: &Committee) -> (usize, Option<String>) {
    let check = |text: &String| -> Result<(), String> {
        let Ok(NetworkMessage::TransactionStatus(status)) = parse(text.as_bytes()).map(|incoming| incoming.message)
        else {
            return Err("not a status".into());
        };
        let txid = status.txid;
        match status.finality_proof {
            Some(FinalityProof::Commit(proof)) if proof.txid == txid && proof.kind == VoteKind::Commit => {
                Arc::unwrap_or_clone(proof).verify(committee).map(drop).map_err(|error| format!("{txid}: {error}"))
            }
            Some(FinalityProof::Block(block)) => CheckedBlock::prove(Arc::unwrap_or_clone(block), committee, &txid)
                .map(drop)
                .map_err(|error| format!("{txid}: {error}")),
            _ => Err(format!("{txid}: no proof of it")),
        }
    };
    let mut good = 0;
    for proof in proofs {
        if let Err(error) = check(proof) {
            return (good, Some(error));
        }
        good += 1;
    }
    (good, None)
}
