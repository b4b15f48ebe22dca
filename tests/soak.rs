//! Real load on real nodes for as long as one likes, as operators have it: wallets that pay all
//! the time and some of them twice, others that follow and ask, databases that are made compact
//! meanwhile, a node that is killed in the middle, a node that is stopped and looked into.
//!
//! After each round everything that was sent is settled and no notification is missing; each
//! database that is looked into is sound in every invariant; at the end all nodes hold the same.
//!
//! Two rounds in CI. `TIME_SOAK_SECONDS=3600 cargo test --release --test soak` goes on for an
//! hour; `TIME_SEED=17` repeats the choices.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

#[path = "support/faults/mod.rs"]
mod faults;
mod support;
#[path = "support/tool.rs"]
mod tool;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use faults::{Dice, number, seed};
use serde_json::Value;
use support::{TestNet, until};
use tool::{rows, stderr, time_db};

const NODES: usize = 4;
const ROUNDS: u64 = 2;

/// What wallets may be doing.
const LOADS: [&[&str]; 6] = [
    &["--in-flight", "1"],
    &["--in-flight", "64", "--inputs", "2", "--outputs", "3"],
    &["--in-flight", "64", "--chained"],
    &["--in-flight", "1024"],
    &["--rate", "100"],
    &["--rate", "100", "--inputs", "2", "--outputs", "3"],
];

/// Loads these nodes for so many seconds.
fn load(net: &TestNet, nodes: &[usize], seconds: u64, dice: &mut Dice) -> Child {
    let load = LOADS[dice.index(LOADS.len())];
    eprintln!("  {load:?} to {nodes:?}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_time-bench"));
    command.arg("--network").arg(net.directory()).args(["--format", "json", "--duration", &seconds.to_string()]);
    command.args(["--wallets", "128", "--conflicts", "0.05", "--subscriptions", "48", "--queries", "50"]);
    command.args(["--prepare-for", "1500"]).args(load);
    for node in nodes {
        command.args(["--to", &net.devnet.nodes[*node].id]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until the load has begun. What it says is passed on.
fn begun(load: &mut Child) {
    let lines = BufReader::new(load.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut lines = lines.inspect(|line| eprintln!("  {line}"));
    assert!(lines.any(|line| line.contains("measuring")), "the load ended before it began");
    std::thread::spawn(move || lines.for_each(drop));
}

/// What the load was told; nothing is open, missing or broken.
fn settled(net: &TestNet, load: Child) -> u64 {
    let output = load.wait_with_output().unwrap();
    let logs = || (0..NODES).map(|node| net.log(node)).collect::<Vec<_>>().join("\n--\n");
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), logs());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["broken"].as_array().unwrap().len(), 0, "{report:#}");
    assert_eq!(report["notifications"]["missing"], 0, "{report:#}");
    assert_eq!(report["totals"]["confirmed"], report["totals"]["finalised"], "{report:#}");
    report["totals"]["finalised"].as_u64().unwrap()
}

fn height(net: &TestNet, node: usize) -> Option<u64> {
    let status: Value = serde_json::from_str(&net.http(node, "/status")?.1).ok()?;
    status["height"].as_u64()
}

/// Waits until every node has all blocks; there is one only when there is something to confirm.
fn catch_up(net: &TestNet) {
    until("every node has the blocks", || {
        let heights: Option<BTreeSet<u64>> = (0..NODES).map(|node| height(net, node)).collect();
        heights.filter(|heights| heights.len() == 1)
    });
}

fn assert_sound(net: &TestNet, node: usize, args: &[&str]) {
    let verified = time_db(&net.data_dir(node), &[&["verify"], args].concat());
    assert!(verified.status.success(), "node {node}: {}{}", tool::stdout(&verified), stderr(&verified));
}

/// The outputs of a stopped node that can be spent. Those that were are forgotten by each node
/// in its own time.
fn unspent(net: &TestNet, node: usize) -> BTreeSet<String> {
    let outputs = rows(&net.data_dir(node), &["dump", "--tree", "utxos"]).into_iter();
    outputs.filter(|row| row["value"]["state"] == "Unspent").map(|row| row.to_string()).collect()
}

#[test]
fn nothing_is_lost_under_load_while_nodes_are_killed_and_made_compact() {
    let time = number("TIME_SOAK_SECONDS").map(Duration::from_secs);
    let mut dice = Dice::new(seed("soak"));
    let mut net = TestNet::with_interval(4, 1_000);
    net.set_environment("TIME_COMPACT_ABOVE_MB", "1");
    net.set_environment("TIME_RETENTION_BLOCKS", "20");
    net.start_all();
    let began = Instant::now();
    let (mut rounds, mut told) = (0, 0);
    while time.map_or(rounds < ROUNDS, |time| began.elapsed() < time) {
        rounds += 1;
        eprintln!("round {rounds}, {:?}, {told} final", began.elapsed());
        if rounds % 2 == 0 {
            let victim = dice.index(NODES);
            let others: Vec<usize> = (0..NODES).filter(|node| *node != victim).collect();
            let mut load = load(&net, &others, 10, &mut dice);
            begun(&mut load);
            net.kill(victim);
            let height_then = height(&net, others[0]);
            until("the others go on", || (height(&net, others[0]) > height_then).then_some(()));
            net.start(victim);
            told += settled(&net, load);
        } else {
            let load = load(&net, &[0, 1, 2, 3], 4, &mut dice);
            told += settled(&net, load);
        }
        net.wait_ready(&[0, 1, 2, 3]);
        catch_up(&net);
        let looked_into = dice.index(NODES);
        net.stop(looked_into);
        assert_sound(&net, looked_into, &[]);
        net.start(looked_into);
        net.wait_ready(&[0, 1, 2, 3]);
    }
    catch_up(&net);
    (0..NODES).for_each(|node| net.stop(node));
    (0..NODES).for_each(|node| assert_sound(&net, node, &["--full"]));
    let first = unspent(&net, 0);
    assert!(first.len() as u64 > told);
    for node in 1..NODES {
        let here = unspent(&net, node);
        assert_eq!(first.symmetric_difference(&here).collect::<Vec<_>>(), Vec::<&String>::new(), "node {node}");
    }
    eprintln!("{rounds} rounds in {:?}, {told} payments final and confirmed", began.elapsed());
}
