//! `kill -9` at any moment: under load, while opening, while being repaired.
//!
//! Every node of a network runs under a shim that writes down what leaves its sockets, so
//! there is a record of each vote, status, notification and consensus message that any of
//! them ever sent, also of those that reached nobody. Wallets pay without pause, and spend
//! one coin in eight twice. After each kill a copy of the directory is looked into before the
//! node starts on it again: it opens, is sound in every invariant, and holds all that was
//! said. And whatever was said before and after any number of kills, no member has said two
//! things: `Commit` and `Abort` of one transaction, `Commit` of two that spend one coin and
//! live, or different words in one turn of one round of a block.
//!
//! `TIME_KILLS=500` kills more often than CI does, `TIME_SEED=17` repeats the choices.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

#[path = "support/faults/mod.rs"]
mod faults;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use faults::disk::{Image, image_of, put_image};
use faults::said::Said;
use faults::trace::{Record, read_trace};
use faults::traffic::Traffic;
use faults::{Dice, Member, Outcome, PATIENCE, Process, Watch, copy, number, seed, wait_ready};
use support::TestNet;
use time_masternode::consensus::{ConsensusMessage, ConsensusVote, Vote, VoteKind, sign_batch};
use time_masternode::net::{NetworkMessage, encode};
use time_masternode::types::{BlockHash, ConsensusStep, OutPoint, Transaction, Txid};

const NODES: usize = 4;
/// Kills of one network.
const KILLS_PER_NETWORK: u64 = 50;

/// A network that is killed again and again, and all that its nodes have said.
struct Killed {
    net: TestNet,
    nodes: Vec<Option<Process>>,
    said: Vec<Said>,
    /// How far the traces have been read.
    read: Vec<u64>,
}

impl Killed {
    fn new(interval_ms: u64) -> Self {
        let net = TestNet::with_interval(4, interval_ms);
        let said = (0..NODES).map(|node| Member::of(&net, node).said_nothing()).collect();
        let mut killed = Self { nodes: (0..NODES).map(|_| None).collect(), said, read: vec![0; NODES], net };
        (0..NODES).for_each(|node| killed.start(node));
        wait_ready(&mut killed.nodes);
        killed
    }

    fn trace(&self, node: usize) -> PathBuf {
        self.net.directory().join(format!("trace-{node}"))
    }

    fn start(&mut self, node: usize) {
        let data_dir = self.net.data_dir(node);
        let watch = Watch::words(&data_dir, &self.trace(node));
        self.nodes[node] = Some(Process::start(&self.net, node, &data_dir, &watch));
    }

    /// Takes in what a node that is not running has said since the last time.
    fn hear(&mut self, node: usize) {
        let (records, end) = read_trace(&self.trace(node), self.read[node]);
        self.said[node].hear(&records);
        self.read[node] = end;
        // A record that was cut off with its process would swallow those of the next one.
        let trace = std::fs::OpenOptions::new().write(true).open(self.trace(node)).unwrap();
        trace.set_len(end).unwrap();
    }

    /// What is wrong with the directory of a node that is not running, and with what the node
    /// has said.
    fn faults_of(&mut self, node: usize, bodies: &BTreeMap<Txid, Transaction>) -> Vec<String> {
        self.hear(node);
        let (member, directory) = (Member::of(&self.net, node), self.net.directory().join("looked-into"));
        copy(&self.net.data_dir(node), &directory);
        let mut faults = member.faults_of(&directory, &self.said[node], usize::MAX);
        if faults.is_empty() {
            let opened = member.open(&directory).unwrap();
            let reader = opened.database.reader();
            faults = self.said[node].contradictions(bodies, |txid| reader.dead(txid).unwrap().is_some());
        }
        faults
    }

    /// No two of what any node ever called final spend one coin, and none of it was called
    /// dead by another.
    fn assert_one_history(&self, bodies: &BTreeMap<Txid, Transaction>) {
        let finals: BTreeSet<Txid> = self.said.iter().flat_map(Said::finals).collect();
        let mut spent: BTreeMap<OutPoint, Txid> = BTreeMap::new();
        for txid in &finals {
            for outpoint in bodies[txid].spends() {
                let other = spent.insert(outpoint, *txid);
                assert_eq!(other, None, "{txid} and another are final and spend {outpoint}");
            }
        }
        let aborted: BTreeSet<Txid> = self.said.iter().flat_map(Said::aborted).collect();
        assert_eq!(finals.intersection(&aborted).collect::<Vec<_>>(), Vec::<&Txid>::new(), "final here, dead there");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_kill_takes_back_what_was_said_or_makes_a_member_contradict_itself() {
    let kills = number("TIME_KILLS").unwrap_or(8);
    let seed = seed("kills");
    let began = Instant::now();
    let (mut made, mut while_opening, mut words) = (0, 0, 0);
    while made < kills {
        let mut dice = Dice::new(seed.wrapping_add(made));
        let mut killed = Killed::new(200 + dice.below(800));
        let mut traffic = Traffic::begin(&killed.net, NODES, 250, dice.another()).await;
        let goal = kills.min(made + KILLS_PER_NETWORK);
        while made < goal {
            let until = Instant::now() + Duration::from_millis(dice.below(700));
            traffic.run(&killed.net, || Instant::now() >= until).await;
            let victims: Vec<usize> = if dice.below(4) == 0 { (0..NODES).collect() } else { vec![dice.index(NODES)] };
            victims.iter().for_each(|victim| killed.nodes[*victim].as_mut().unwrap().kill());
            for victim in victims {
                made += 1;
                killed.nodes[victim] = None;
                let faults = killed.faults_of(victim, &traffic.bodies);
                assert!(faults.is_empty(), "kill {made}, node {victim}: {faults:#?}");
                // It may be killed again before it serves, and again.
                while dice.below(3) == 0 {
                    killed.start(victim);
                    std::thread::sleep(Duration::from_millis(dice.below(60)));
                    killed.nodes[victim].take().unwrap().kill();
                    while_opening += 1;
                    let faults = killed.faults_of(victim, &traffic.bodies);
                    assert!(faults.is_empty(), "killed while opening, node {victim}: {faults:#?}");
                }
                killed.start(victim);
            }
            wait_ready(&mut killed.nodes);
        }
        for node in 0..NODES {
            let ended = killed.nodes[node].as_mut().unwrap().stop().unwrap();
            assert!(ended.success(), "node {node}: {}", killed.nodes[node].as_ref().unwrap().log());
            let faults = killed.faults_of(node, &traffic.bodies);
            assert!(faults.is_empty(), "node {node} at the end: {faults:#?}");
        }
        killed.assert_one_history(&traffic.bodies);
        words += killed.said.iter().map(Said::len).sum::<usize>();
        eprintln!("{made} kills and {while_opening} while opening, {words} words, {:?}", began.elapsed());
    }
}

/// A member's directory under load, and what the member has said.
async fn used(dice: &mut Dice) -> (TestNet, Image, Image, Said) {
    let mut killed = Killed::new(300);
    let mut traffic = Traffic::begin(&killed.net, NODES, 250, dice.another()).await;
    traffic.most = 8;
    traffic.run_times(&killed.net, 60).await;
    killed.nodes[0].as_mut().unwrap().kill();
    killed.hear(0);
    let older = image_of(&killed.net.data_dir(0));
    killed.start(0);
    wait_ready(&mut killed.nodes);
    traffic.run_times(&killed.net, 60).await;
    (killed.nodes[2], killed.nodes[3]) = (None, None);
    traffic.run_times(&killed.net, 30).await;
    killed.nodes[0].as_mut().unwrap().kill();
    killed.hear(0);
    let Killed { net, said, nodes, .. } = killed;
    drop(nodes);
    let image = image_of(&net.data_dir(0));
    (net, older, image, said.into_iter().next().unwrap())
}

/// Killed at each of the first calls on its directory, again and again on the same directory.
#[tokio::test]
async fn no_crash_while_opening_harms_a_database() {
    let mut dice = Dice::new(seed("openings"));
    let crashes = number("TIME_KILLS").unwrap_or(8);
    let (net, _, image, said) = used(&mut dice).await;
    let directory = net.directory().join("opening");
    put_image(&directory, &image);
    let member = Member::of(&net, 0);
    let mut cut_short = 0;
    for crash in 0..crashes {
        let trace = net.directory().join("trace-of-opening");
        let at = if crashes > 100 { 1 + crash % 120 } else { 1 + dice.below(60) };
        let watch = Watch::words(&directory, &trace).failing(at, "kill", false);
        let mut process = Process::start(&net, 0, &directory, &watch);
        let began = Instant::now();
        while process.ended().is_none() && process.status().is_none() && began.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
        }
        cut_short += u64::from(process.ended().is_some());
        process.kill();
        let looked_into = net.directory().join("looked-into");
        copy(&directory, &looked_into);
        let faults = member.faults_of(&looked_into, &said, usize::MAX);
        assert!(faults.is_empty(), "killed at call {at} of opening: {faults:#?}");
    }
    eprintln!("{cut_short} of {crashes} openings were cut short");
    assert!(cut_short > 0);
}

/// Killed, or given an error of the disk, at any call while it makes its database compact.
#[tokio::test]
async fn no_crash_while_the_database_is_made_compact_harms_it() {
    let mut dice = Dice::new(seed("compactions"));
    let crashes = number("TIME_KILLS").unwrap_or(6);
    let (net, _, image, said) = used(&mut dice).await;
    let directory = net.directory().join("compacting");
    let member = Member::of(&net, 0);
    let (mut cut_short, mut made) = (0, 0);
    for crash in 0..crashes {
        put_image(&directory, &image);
        let kind = ["kill", "kill", "eio", "enospc"][dice.index(4)];
        // About so many calls does it make from the beginning of the start to the removal of the old
        // files; fewer of them need room on the disk.
        let at = match kind {
            _ if crash == 0 => u64::MAX,
            "enospc" => 60 + dice.below(200),
            _ => 650 + dice.below(350),
        };
        let watch = Watch::words(&directory, &net.directory().join("trace-of-compacting")).failing(at, kind, false);
        let mut process = Process::start_with(&net, 0, &directory, &watch, &["--compact-above-mb", "1"]);
        let began = Instant::now();
        let ends = ["was given up", "could not be made", "did not take its place"];
        let given_up = |process: &Process| ends.iter().any(|end| process.log().contains(end));
        while process.ended().is_none() && process.compactions().unwrap_or(0) == 0 && !given_up(&process) {
            assert!(began.elapsed() < PATIENCE, "{kind} at {at}: {}", process.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        match process.ended() {
            Some(_) if kind == "kill" => {}
            Some(status) => drop(process.refusal(status).unwrap()),
            None => {}
        }
        made += u64::from(process.compactions() == Some(1));
        process.kill();
        cut_short += u64::from(directory.join("unfinished").exists());
        let looked_into = net.directory().join("looked-into");
        copy(&directory, &looked_into);
        let faults = member.faults_of(&looked_into, &said, usize::MAX);
        assert!(faults.is_empty(), "{kind} at call {at}: {faults:#?}");
        assert!(!looked_into.join("unfinished").exists());
    }
    eprintln!("{made} of {crashes} copies took the place, {cut_short} were cut short");
    assert!(made > 0);
    // Of a few, chance may put all before it or behind it.
    assert!(crashes < 20 || cut_short > 0, "no fault came while a copy was made");
}

fn repair(net: &TestNet, directory: &Path, watch: &Watch) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_time-db"));
    command.arg("--data-dir").arg(directory).arg("--genesis").arg(net.directory().join(&net.devnet.genesis_file));
    watch.apply(command.args(["repair", "--apply"])).output().unwrap()
}

/// An older database with the newer guard has lost votes. Its repair is killed at any call:
/// the node never votes on what is half repaired, and the next repair brings it to an end.
#[tokio::test]
async fn no_crash_while_repairing_makes_a_member_vote() {
    let mut dice = Dice::new(seed("repairs"));
    let crashes = number("TIME_KILLS").unwrap_or(8).min(200);
    let (net, older, newer, _) = used(&mut dice).await;
    let mut image = older;
    let guard = Path::new("guard");
    image.insert(guard.to_path_buf(), newer[guard].clone());
    let directory = net.directory().join("repairing");
    let mut cut_short = 0;
    for _ in 0..crashes {
        put_image(&directory, &image);
        let at = 1 + dice.below(250);
        let trace = net.directory().join("trace-of-repair");
        let first = repair(&net, &directory, &Watch::words(&directory, &trace).failing(at, "kill", false));
        cut_short += u64::from(!first.status.success());
        let mut process = Process::start(&net, 0, &directory, &Watch::nothing());
        match process.outcome().unwrap() {
            Outcome::Up { voting } => assert_ne!(voting, "Active", "killed at call {at} of a repair"),
            Outcome::Refused { error } => assert!(!error.is_empty()),
        }
        process.kill();
        let second = repair(&net, &directory, &Watch::nothing());
        assert!(second.status.success(), "repaired again: {}", String::from_utf8_lossy(&second.stderr));
        let mut process = Process::start(&net, 0, &directory, &Watch::nothing());
        assert_eq!(process.outcome(), Ok(Outcome::Up { voting: "Fencing".into() }), "after call {at}");
        assert!(process.stop().unwrap().success());
    }
    eprintln!("{cut_short} of {crashes} repairs were cut short");
    assert!(cut_short > 0);
}

/// The record of what was said notices a member that says two things, by any of the ways in
/// which it can.
#[test]
fn two_words_are_noticed() {
    let net = TestNet::with_interval(4, 1_000);
    let key = net.member_key(0);
    let coin = net.coins().remove(0);
    let [a, b] = [1, 2].map(|amount| net.pay(&coin, &net.address(&key), amount));
    let bodies: BTreeMap<_, _> = [&a, &b].map(|payment| (payment.txid(), payment.clone())).into();
    let votes = |votes: Vec<Vote>| {
        NetworkMessage::Votes(Arc::new(sign_batch(&key, &net.committee(), votes).unwrap().get().wire().clone()))
    };
    let prevote = |hash: Option<BlockHash>| {
        let (step, signature) = (ConsensusStep::Prevote, key.sign(b"not looked at"));
        let (height, round, voter) = (7, 0, key.public_key());
        let vote = ConsensusVote { step, height, round, block_hash: hash, voter, signature };
        NetworkMessage::Consensus(Arc::new(ConsensusMessage::Vote(vote)))
    };
    let vote = |kind, payment: &Transaction| Vote { kind, txid: payment.txid() };
    let commit_a = votes(vec![vote(VoteKind::Commit, &a)]);
    let contradicts = |first: &NetworkMessage, second: NetworkMessage, dead: Option<Txid>| {
        let mut said = Member::of(&net, 0).said_nothing();
        for message in [first, &second] {
            let bytes = encode(message, None);
            let frame = [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], &bytes].concat();
            said.hear(&[Record::Start, Record::Send { fd: 9, bytes: frame }]);
        }
        !said.contradictions(&bodies, |txid| Some(*txid) == dead).is_empty()
    };
    assert!(!contradicts(&commit_a, commit_a.clone(), None), "the same again");
    assert!(!contradicts(&commit_a, votes(vec![vote(VoteKind::Approve, &b)]), None), "approving is no promise");
    assert!(contradicts(&commit_a, votes(vec![vote(VoteKind::Abort, &a)]), None));
    let commit_b = votes(vec![vote(VoteKind::Approve, &a), vote(VoteKind::Commit, &b)]);
    assert!(contradicts(&commit_a, commit_b.clone(), None), "both spend one coin");
    assert!(!contradicts(&commit_a, commit_b, Some(a.txid())), "the first has died");
    let hash = BlockHash::from_bytes([7; 32]);
    assert!(!contradicts(&prevote(None), prevote(None), None));
    assert!(contradicts(&prevote(None), prevote(Some(hash)), None));
}
