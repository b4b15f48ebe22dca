//! The results: computed once, written as a table for people or as JSON for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};

use serde::Serialize;

use super::cli::{LoadSettings, Pace, Until};
use super::load::Load;
use super::network::Network;
use super::prepare::Prepared;
use super::probe::{NodeSample, ProcessSample};
use super::run::Outcome;
use super::stats::{Latency, Window, round};

/// Everything that was found out.
#[derive(Debug, Serialize)]
pub struct Report {
    pub version: &'static str,
    pub load: LoadReport,
    pub preparation: PreparationReport,
    /// Seconds of the measured window.
    pub seconds: f64,
    /// Payments that became final in the window.
    pub finalised: usize,
    pub finalised_per_second: f64,
    /// Whether payments ran out before the window's time was over.
    pub ran_out: bool,
    pub latency_ms: LatencyReport,
    /// Of the whole run, warm-up and end included.
    pub totals: Totals,
    pub contested: Option<ContestedReport>,
    pub notifications: Option<NotificationReport>,
    pub nodes: Vec<NodeReport>,
    pub this_program: ProcessReport,
    pub machine: MachineReport,
    /// Promises that the network broke; nothing that is listed here should ever happen.
    pub broken: Vec<String>,
}

/// What was asked for.
#[derive(Debug, Serialize)]
pub struct LoadReport {
    pub nodes: usize,
    pub loaded_nodes: Vec<String>,
    pub in_flight: Option<usize>,
    pub rate: Option<f64>,
    pub inputs: usize,
    pub outputs: usize,
    pub chained: bool,
    pub wallets: usize,
    pub connections: usize,
    pub conflicts: f64,
    pub subscriptions: usize,
    pub queries_per_second: f64,
    pub warm_up_seconds: f64,
    pub count: Option<usize>,
    pub duration_seconds: Option<f64>,
    pub block_interval_ms: u64,
}

/// What went before.
#[derive(Debug, Serialize)]
pub struct PreparationReport {
    pub coins: usize,
    /// Transactions that made them; the nodes count them as final too.
    pub transactions: usize,
    /// Payments that were signed.
    pub signed: usize,
}

/// Latencies of the window.
#[derive(Debug, Serialize)]
pub struct LatencyReport {
    /// To `Pending`: stored and locked on the wallet's node.
    pub pending: Option<Latency>,
    pub finalised: Option<Latency>,
    pub confirmed: Option<Latency>,
    pub notification_whole: Option<Latency>,
    pub notification_commit: Option<Latency>,
    pub query: Option<Latency>,
}

/// Counts of the whole run.
#[derive(Debug, Serialize)]
pub struct Totals {
    pub sent: usize,
    pub finalised: usize,
    pub confirmed: usize,
    pub aborted: usize,
    pub rejected: BTreeMap<String, usize>,
    pub rejected_contested: BTreeMap<String, usize>,
    pub busy: usize,
    pub resent: usize,
    pub dropped: usize,
    pub withheld: usize,
    pub unsettled: usize,
    pub proofs_verified: usize,
}

/// What became of the pairs.
#[derive(Debug, Serialize)]
pub struct ContestedReport {
    pub pairs: usize,
    pub won_by_one: usize,
    pub won_by_none: usize,
    pub won_by_both: usize,
    pub unsettled: usize,
    /// From the broadcast to `Finalized` of those that won.
    pub finalised: Option<Latency>,
}

/// What the subscribers heard.
#[derive(Debug, Serialize)]
pub struct NotificationReport {
    pub subscriptions: usize,
    pub notifications: usize,
    pub missing: usize,
    pub out_of_order: usize,
}

/// A process over the window.
#[derive(Debug, Serialize)]
pub struct ProcessReport {
    pub cpu_ms_per_transaction: Option<f64>,
    /// Cores that it used, 1.0 for a whole one.
    pub cores: f64,
    /// CPU milliseconds for each transaction, by the names of threads.
    pub threads_ms_per_transaction: BTreeMap<String, f64>,
    pub resident_mib: f64,
    pub peak_resident_mib: f64,
}

/// A node over the window.
#[derive(Debug, Serialize)]
pub struct NodeReport {
    pub id: String,
    /// Missing where its process is not known.
    pub process: Option<ProcessReport>,
    /// Growth of its data directory.
    pub disk_bytes_per_transaction: Option<f64>,
    /// Its growth over the whole run, compact before and after; missing unless that was waited for.
    pub compact_disk_bytes_per_transaction: Option<f64>,
    pub wire: WireReport,
    pub commits: u64,
    pub commit_ms_mean: Option<f64>,
    pub transactions_per_commit: Option<f64>,
    /// Transactions that became final on it, by its own count: in the window, and since its
    /// start until the end of the run.
    pub finalised: u64,
    pub finalised_since_start: u64,
}

/// Bytes of messages for each transaction.
#[derive(Debug, Serialize)]
pub struct WireReport {
    pub from_members: Option<f64>,
    pub to_members: Option<f64>,
    pub from_wallets: Option<f64>,
    pub to_wallets: Option<f64>,
}

/// Where the rest of the machine's time went in the window.
#[derive(Debug, Serialize)]
pub struct MachineReport {
    pub cores: usize,
    pub idle_percent: f64,
    /// Work that was neither the nodes' nor this program's: the larger, the less the figures
    /// are worth. Unknown where the nodes' processes are.
    pub others_percent: Option<f64>,
    /// Time that the hypervisor gave to somebody else.
    pub stolen_percent: f64,
    /// Bytes written to the device that has the network's directory, by all nodes and
    /// everybody else, for each transaction.
    pub device_written_bytes_per_transaction: Option<f64>,
}

fn per(value: u64, transactions: usize) -> Option<f64> {
    (transactions > 0).then(|| round(value as f64 / transactions as f64))
}

fn process(edges: [&ProcessSample; 2], window: Window, transactions: usize) -> ProcessReport {
    let [first, second] = edges;
    let cpu_ms = second.cpu_ms.saturating_sub(first.cpu_ms);
    let mib = |bytes: u64| round(bytes as f64 / 1_048_576.0);
    let thread = |(name, ms): (&String, &u64)| {
        let spent = ms.saturating_sub(first.threads_ms.get(name).copied().unwrap_or(0));
        Some((name.clone(), per(spent, transactions)?))
    };
    ProcessReport {
        cpu_ms_per_transaction: per(cpu_ms, transactions),
        cores: round(cpu_ms as f64 / 1e3 / window.seconds()),
        threads_ms_per_transaction: second.threads_ms.iter().filter_map(thread).collect(),
        resident_mib: mib(second.resident_bytes),
        peak_resident_mib: mib(second.peak_resident_bytes),
    }
}

fn node(id: &str, edges: [&NodeSample; 2], last: &NodeSample, window: Window, transactions: usize) -> NodeReport {
    let [first, second] = edges;
    let of = |sample: &NodeSample, name: &str| sample.metrics.get(name).copied().unwrap_or(0);
    let grown = |name: &str| of(second, name).saturating_sub(of(first, name));
    let wire = |name: &str| second.metrics.get(name).and_then(|_| per(grown(name), transactions));
    let commits = grown("commits");
    let processes = first.process.as_ref().zip(second.process.as_ref());
    NodeReport {
        id: id.to_owned(),
        process: processes.map(|(first, second)| process([first, second], window, transactions)),
        disk_bytes_per_transaction: per(second.disk_bytes.saturating_sub(first.disk_bytes), transactions),
        compact_disk_bytes_per_transaction: None,
        wire: WireReport {
            from_members: wire("member_bytes_received"),
            to_members: wire("member_bytes_sent"),
            from_wallets: wire("wallet_bytes_received"),
            to_wallets: wire("wallet_bytes_sent"),
        },
        commits,
        commit_ms_mean: (commits > 0).then(|| round(grown("commit_microseconds") as f64 / commits as f64 / 1e3)),
        transactions_per_commit: (commits > 0).then(|| round(grown("finalized") as f64 / commits as f64)),
        finalised: grown("finalized"),
        finalised_since_start: of(last, "finalized"),
    }
}

/// How much larger each node's data directory is after the run for each payment, compact both times.
fn growth_when_compact(outcome: &Outcome, finalised: usize) -> Vec<Option<f64>> {
    let Some(before) = &outcome.compact else { return vec![None; outcome.last.len()] };
    let grown = |(before, after): (&NodeSample, &NodeSample)| {
        per(after.disk_bytes.saturating_sub(before.disk_bytes), finalised)
    };
    before.iter().zip(&outcome.last).map(grown).collect()
}

fn machine(outcome: &Outcome, transactions: usize) -> MachineReport {
    let [first, second] = &outcome.edges;
    let busy = second.machine.busy_ms.saturating_sub(first.machine.busy_ms);
    let idle = second.machine.idle_ms.saturating_sub(first.machine.idle_ms);
    let stolen = second.machine.stolen_ms.saturating_sub(first.machine.stolen_ms);
    let whole = (busy + idle + stolen).max(1) as f64;
    let percent = |ms: u64| round(ms as f64 * 100.0 / whole);
    let ours = std::iter::once(Some((&first.this, &second.this)))
        .chain(first.nodes.iter().zip(&second.nodes).map(|(a, b)| a.process.as_ref().zip(b.process.as_ref())))
        .map(|edges| edges.map(|(a, b)| b.cpu_ms.saturating_sub(a.cpu_ms)))
        .sum::<Option<u64>>();
    MachineReport {
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        idle_percent: percent(idle),
        others_percent: ours.map(|ours| percent(busy.saturating_sub(ours))),
        stolen_percent: percent(stolen),
        device_written_bytes_per_transaction: first
            .device_written_bytes
            .zip(second.device_written_bytes)
            .and_then(|(first, second)| per(second.saturating_sub(first), transactions)),
    }
}

fn broken(load: &Load, outcome: &Outcome, totals: &Totals) -> Vec<String> {
    let counts = load.counts();
    let [both, ..] = load.pairs();
    let rejected: usize = totals.rejected.values().sum();
    let unconfirmed = if outcome.waited_for_blocks { totals.finalised - totals.confirmed } else { 0 };
    let found = [
        (both, "pairs of contradicting payments of which both are final"),
        (rejected, "payments that nobody contradicts and that were refused"),
        (counts.aborted_uncontested, "payments that nobody contradicts and that were aborted"),
        (counts.unproved, "final statuses without a proof"),
        (totals.unsettled, "payments that were not settled in the end"),
        (unconfirmed, "final payments that were in no block in the end"),
        (outcome.missing, "notifications that did not come"),
        (outcome.tally.borrow().out_of_order, "notifications out of order"),
    ];
    let found = found.into_iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}"));
    found.chain(outcome.proofs.1.iter().map(|why| format!("a proof that is none: {why}"))).collect()
}

impl Report {
    /// Computes the figures of a run.
    pub fn new(
        network: &Network,
        settings: &LoadSettings,
        slots: &[usize],
        prepared: Prepared,
        conflicts: f64,
        outcome: &Outcome,
    ) -> Self {
        let window = outcome.window;
        outcome.load.look(|load| {
            let (accepted, finalised, confirmed, contested) = load.samples();
            let in_window = window.sorted(finalised).len() + window.sorted(contested).len();
            let counts = load.counts();
            let tally = outcome.tally.borrow();
            let totals = Totals {
                sent: counts.sent,
                finalised: counts.finalised,
                confirmed: counts.confirmed,
                aborted: counts.aborted,
                rejected: counts.rejected.clone(),
                rejected_contested: counts.rejected_contested.clone(),
                busy: counts.busy,
                resent: counts.resent,
                dropped: counts.dropped,
                withheld: counts.withheld,
                unsettled: load.open(),
                proofs_verified: outcome.proofs.0,
            };
            let [won_by_both, won_by_one, won_by_none, unsettled] = load.pairs();
            let [first, second] = &outcome.edges;
            let edges = first.nodes.iter().zip(&second.nodes).zip(&outcome.last);
            let nodes = network.devnet.nodes.iter().zip(edges);
            Self {
                version: env!("CARGO_PKG_VERSION"),
                load: LoadReport::new(network, settings, slots, conflicts),
                preparation: PreparationReport {
                    coins: prepared.coins,
                    transactions: prepared.transactions,
                    signed: load.plan().payments.len(),
                },
                seconds: round(window.seconds()),
                finalised: in_window,
                finalised_per_second: round(in_window as f64 / window.seconds()),
                ran_out: matches!(settings.until, Until::Time(time) if load.exhausted()
                    && window.seconds() < 0.99 * time.as_secs_f64()),
                latency_ms: LatencyReport {
                    pending: Latency::of(accepted, window),
                    finalised: Latency::of(finalised, window),
                    confirmed: Latency::of(confirmed, window),
                    notification_whole: Latency::of(&tally.whole, window),
                    notification_commit: Latency::of(&tally.commit, window),
                    query: Latency::of(&outcome.queries, window),
                },
                contested: (settings.pairs > 0).then(|| ContestedReport {
                    pairs: won_by_both + won_by_one + won_by_none + unsettled,
                    won_by_one,
                    won_by_none,
                    won_by_both,
                    unsettled,
                    finalised: Latency::of(contested, window),
                }),
                notifications: (settings.subscriptions > 0).then(|| NotificationReport {
                    subscriptions: settings.subscriptions,
                    notifications: tally.notifications,
                    missing: outcome.missing,
                    out_of_order: tally.out_of_order,
                }),
                nodes: nodes
                    .map(|(is, ((first, second), last))| node(&is.id, [first, second], last, window, in_window))
                    .zip(growth_when_compact(outcome, totals.finalised))
                    .map(|(node, growth)| NodeReport { compact_disk_bytes_per_transaction: growth, ..node })
                    .collect(),
                this_program: process([&first.this, &second.this], window, in_window),
                machine: machine(outcome, in_window),
                broken: broken(load, outcome, &totals),
                totals,
            }
        })
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing into a string does not fail.
        self.write_table(&mut out).unwrap_or_default();
        out
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        let load = &self.load;
        let pace = match (load.in_flight, load.rate) {
            (Some(in_flight), _) => format!("{in_flight} in flight"),
            (None, rate) => format!("{} a second", rate.unwrap_or_default()),
        };
        let shape = if load.chained { "chained" } else { "independent" };
        writeln!(out, "load        {pace}, {} in {} out, {shape}, {} nodes", load.inputs, load.outputs, load.nodes)?;
        writeln!(out, "prepared    {} coins, {} payments", self.preparation.coins, self.preparation.signed)?;
        writeln!(
            out,
            "finalised   {} in {:.2} s: {:.1} a second",
            self.finalised, self.seconds, self.finalised_per_second
        )?;
        if self.ran_out {
            writeln!(out, "            all prepared payments were sent before the time was over: --prepare-for more")?;
        }
        let t = &self.totals;
        writeln!(
            out,
            "whole run   {} sent, {} final, {} confirmed, {} aborted, {} unsettled, {} proofs verified",
            t.sent, t.finalised, t.confirmed, t.aborted, t.unsettled, t.proofs_verified
        )?;
        if t.busy + t.dropped + t.withheld > 0 {
            writeln!(
                out,
                "overload    {} answers Busy, {} sent again, {} dropped, {} withheld for lack of a ready wallet",
                t.busy, t.resent, t.dropped, t.withheld
            )?;
        }
        for (code, count) in t.rejected.iter().chain(&t.rejected_contested) {
            writeln!(out, "rejected    {count} {code}")?;
        }
        if let Some(pairs) = &self.contested {
            writeln!(
                out,
                "contested   {} pairs: {} won by one, {} by none, {} by both, {} unsettled",
                pairs.pairs, pairs.won_by_one, pairs.won_by_none, pairs.won_by_both, pairs.unsettled
            )?;
        }
        if let Some(heard) = &self.notifications {
            writeln!(
                out,
                "subscribed  {} subscriptions, {} notifications, {} missing",
                heard.subscriptions, heard.notifications, heard.missing
            )?;
        }
        writeln!(out, "\nlatency, ms               count     p50      p90      p99      max")?;
        let latency = &self.latency_ms;
        let contested = self.contested.as_ref().and_then(|contested| contested.finalised.as_ref());
        for (name, latency) in [
            ("pending", latency.pending.as_ref()),
            ("finalised", latency.finalised.as_ref()),
            ("finalised, contested", contested),
            ("confirmed", latency.confirmed.as_ref()),
            ("notification, whole", latency.notification_whole.as_ref()),
            ("notification, commit", latency.notification_commit.as_ref()),
            ("query", latency.query.as_ref()),
        ] {
            if let Some(l) = latency {
                let Latency { count, p50, p90, p99, max, .. } = l;
                writeln!(out, "{name:<22}{count:>9} {p50:>8.2} {p90:>8.2} {p99:>8.2} {max:>8.2}")?;
            }
        }
        self.write_processes(out)?;
        for broken in &self.broken {
            writeln!(out, "\nBROKEN PROMISE: {broken}")?;
        }
        Ok(())
    }

    fn write_processes(&self, out: &mut String) -> std::fmt::Result {
        let number = |value: Option<f64>, places: usize| match value {
            Some(value) => format!("{value:.places$}"),
            None => "-".into(),
        };
        writeln!(
            out,
            "\nfor each transaction      CPU ms    disk B   in B  out B  wallets in/out B  tx/commit  commit ms  RSS MiB"
        )?;
        for node in &self.nodes {
            let cpu = node.process.as_ref().and_then(|process| process.cpu_ms_per_transaction);
            let wallets = format!("{}/{}", number(node.wire.from_wallets, 0), number(node.wire.to_wallets, 0));
            writeln!(
                out,
                "{:<22}{:>10} {:>9} {:>6} {:>6} {:>17} {:>10} {:>10} {:>8}",
                node.id,
                number(cpu, 3),
                number(node.disk_bytes_per_transaction, 0),
                number(node.wire.from_members, 0),
                number(node.wire.to_members, 0),
                wallets,
                number(node.transactions_per_commit, 1),
                number(node.commit_ms_mean, 2),
                number(node.process.as_ref().map(|process| process.resident_mib), 0),
            )?;
        }
        let compact: Vec<_> = self.nodes.iter().filter_map(|node| node.compact_disk_bytes_per_transaction).collect();
        if !compact.is_empty() {
            let each: Vec<_> = compact.iter().map(|bytes| format!("{bytes:.0}")).collect();
            writeln!(out, "compact     {} B of disk for each payment of the whole run", each.join(", "))?;
        }
        let this = &self.this_program;
        let cpu = number(this.cpu_ms_per_transaction, 3);
        writeln!(out, "{:<22}{cpu:>10}{:>73}", "time-bench", number(Some(this.resident_mib), 0))?;
        let machine = &self.machine;
        writeln!(
            out,
            "machine     {} cores, {:.0}% idle, {}% somebody else's work, {:.0}% stolen; {} B written to its disk for each",
            machine.cores,
            machine.idle_percent,
            number(machine.others_percent, 0),
            machine.stolen_percent,
            number(machine.device_written_bytes_per_transaction, 0)
        )
    }
}

impl LoadReport {
    fn new(network: &Network, settings: &LoadSettings, slots: &[usize], conflicts: f64) -> Self {
        let (in_flight, rate) = match settings.pace {
            Pace::Closed(in_flight) => (Some(in_flight), None),
            Pace::Open(rate) => (None, Some(rate)),
        };
        let (count, duration_seconds) = match settings.until {
            Until::Count(count) => (Some(count), None),
            Until::Time(duration) => (None, Some(duration.as_secs_f64())),
        };
        Self {
            nodes: network.devnet.nodes.len(),
            loaded_nodes: slots.iter().map(|slot| network.devnet.nodes[*slot].id.clone()).collect(),
            in_flight,
            rate,
            inputs: settings.inputs,
            outputs: settings.outputs,
            chained: settings.chained,
            wallets: settings.wallets,
            connections: settings.connections * slots.len(),
            conflicts,
            subscriptions: settings.subscriptions,
            queries_per_second: settings.queries,
            warm_up_seconds: settings.warm_up.as_secs_f64(),
            count,
            duration_seconds,
            block_interval_ms: network.genesis.block_interval_ms(),
        }
    }
}

/// Writes a remark. Nobody may be reading standard error, and that is no failure.
pub fn remark(text: &str) {
    writeln!(io::stderr().lock(), "time-bench: {text}").unwrap_or_default();
}

/// Writes a result to standard output.
pub fn result(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", text.trim_end())?;
    out.flush()
}
