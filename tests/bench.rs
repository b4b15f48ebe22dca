//! `time-bench` against real networks: what it reports is what the nodes say, whatever it is
//! asked to load them with; and it leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use support::{TestNet, free_base_port, until};

fn time_bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_time-bench")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The report of a run on a network that goes on afterwards.
fn report(net: &TestNet, args: &[&str]) -> Value {
    let directory = net.directory().to_str().unwrap();
    let output = time_bench(&[&["--network", directory, "--format", "json"], args].concat());
    assert!(output.status.success(), "{}\n{}", stderr(&output), String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn count(report: &Value, path: &str) -> u64 {
    report.pointer(path).unwrap_or_else(|| panic!("{path} in {report:#}")).as_u64().unwrap()
}

/// A node's own count of final transactions, since its start.
fn finalised(net: &TestNet, node: usize) -> u64 {
    let metrics = net.http(node, "/metrics").unwrap().1;
    let line = metrics.lines().find(|line| line.starts_with("time_finalized_total ")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// What the wallets were told is what every node counts, contested payments and those of the
/// preparation included; and where nobody contradicts, everything becomes final.
#[test]
fn the_report_agrees_with_the_nodes() {
    let mut net = TestNet::with_interval(4, 500);
    net.start_all();
    let mut expected = 0;
    for args in [
        &["--count", "300", "--in-flight", "20", "--conflicts", "0.2", "--subscriptions", "24", "--queries", "40"][..],
        &["--count", "100", "--in-flight", "10", "--chained", "--inputs", "2", "--outputs", "3"],
        &["--rate", "200", "--duration", "1", "--warm-up", "0.3", "--to", "masternode-2,masternode-3"],
    ] {
        let report = report(&net, args);
        let (sent, told) = (count(&report, "/totals/sent"), count(&report, "/totals/finalised"));
        assert_eq!(report["broken"].as_array().unwrap().len(), 0, "{report:#}");
        assert_eq!(count(&report, "/totals/confirmed"), told);
        assert!(count(&report, "/totals/proofs_verified") > 0);
        if let Some(wanted) = report["load"]["count"].as_u64() {
            assert!(count(&report, "/finalised") >= wanted, "{report:#}");
        }
        expected += told + count(&report, "/preparation/transactions");
        for node in 0..4 {
            until("every node counts what the wallets were told", || (finalised(&net, node) == expected).then_some(()));
        }
        match report["contested"].as_object() {
            None => assert_eq!(sent, told),
            Some(contested) => {
                let of = |name: &str| contested[name].as_u64().unwrap();
                assert!(of("pairs") >= 30, "{report:#}");
                assert_eq!((of("won_by_both"), of("unsettled")), (0, 0));
                let uncontested = sent - 2 * of("pairs");
                assert_eq!(told, uncontested + of("won_by_one"));
                // Each loser was refused by its node, or aborted by a block.
                let refused: u64 = report["totals"]["rejected_contested"]
                    .as_object()
                    .unwrap()
                    .values()
                    .map(|n| n.as_u64().unwrap())
                    .sum();
                assert_eq!(refused + count(&report, "/totals/aborted"), of("won_by_one") + 2 * of("won_by_none"));
                assert_eq!(count(&report, "/notifications/missing"), 0);
                assert!(count(&report, "/notifications/notifications") >= told);
                assert!(count(&report, "/latency_ms/query/count") > 0);
            }
        }
    }
    // The subscriptions were cancelled, so nothing is left of the runs but payments.
    for node in 0..4 {
        assert_eq!(net.status(node)["subscriptions"], 0);
    }
}

/// It starts a network of its own, measures its processes, and ends them.
#[test]
fn a_network_of_its_own_is_measured_and_ended() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (net, json, picture) = (file("net"), file("report.json"), file("picture.svg"));
    let port = free_base_port(4).to_string();
    let output = time_bench(&[
        "--data-dir",
        &net,
        "--base-port",
        &port,
        "--count",
        "200",
        "--in-flight",
        "8",
        "--idle-coins",
        "3000",
        "--json",
        &json,
        "--picture",
        &picture,
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("masternode-4") && table.contains("finalised"), "{table}");
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    for node in report["nodes"].as_array().unwrap() {
        for path in ["/process/cpu_ms_per_transaction", "/process/resident_mib", "/wire/from_members", "/commits"] {
            let value = node.pointer(path).unwrap().as_f64();
            assert!(value.is_some_and(|value| value > 0.0), "{path} in {node:#}");
        }
    }
    assert!(std::fs::read_to_string(&picture).unwrap().starts_with("<svg"));
    // The nodes have let go of their databases and ports. What was only to be there is there.
    let database = Command::new(env!("CARGO_BIN_EXE_time-db"))
        .args(["--data-dir", &format!("{net}/masternode-1/data"), "stats", "--format", "json"])
        .output()
        .unwrap();
    assert!(database.status.success(), "{}", stderr(&database));
    let stats: Value = serde_json::from_slice(&database.stdout).unwrap();
    let unspent = stats["outputs"]["Unspent"]["count"].as_u64().unwrap();
    assert!((3_200..4_000).contains(&unspent), "3,000 that nobody spends, two of each payment: {unspent}");
    assert!(std::net::TcpListener::bind(format!("127.0.0.1:{port}")).is_ok());
}

/// A node that nothing is sent to may go down meanwhile: what it counts is missing, and no more.
#[test]
fn a_node_that_goes_down_is_no_reason_to_lose_the_report() {
    let mut net = TestNet::running(4);
    let directory = net.directory().to_str().unwrap().to_owned();
    let mut bench = Command::new(env!("CARGO_BIN_EXE_time-bench"))
        .args(["--network", &directory, "--format", "json", "--duration", "3", "--in-flight", "8"])
        .args(["--to", "masternode-1", "--to", "masternode-2", "--to", "masternode-3"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(bench.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(said.any(|line| line.contains("measuring")));
    net.kill(3);
    assert!(said.any(|line| line.contains("masternode-4 does not say")));
    let output = bench.wait_with_output().unwrap();
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(count(&report, "/finalised") > 0);
    assert!(
        report.pointer("/nodes/0/wire/from_members").unwrap().as_f64().is_some_and(|bytes| bytes > 0.0),
        "{report:#}"
    );
    assert!(report.pointer("/nodes/3/wire/from_members").unwrap().is_null(), "{report:#}");
}

#[test]
fn what_cannot_be_done_ends_with_2_and_says_why() {
    let nowhere = tempfile::tempdir().unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let missing = path(&nowhere.path().join("none"));
    let net = TestNet::new(1);
    for (args, expected) in [
        (&["--network", &missing][..], "devnet.json"),
        (&["--masternode", &missing], "--masternode"),
        (&["--in-flight", "0"], "--in-flight"),
        (&["--conflicts", "1"], "--conflicts"),
        (&["--chained", "--inputs", "3"], "--outputs"),
        (&["--network", &path(net.directory()), "--pids", "1,2"], "--pids"),
        (&["--rate", "5", "--in-flight", "5"], "--in-flight"),
        (&["--nodes", "0"], "1 to 256"),
    ] {
        let output = time_bench(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{args:?}: {}", stderr(&output));
    }
}
