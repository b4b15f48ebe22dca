//! The whole of the safety and liveness argument, played out by lot.
//!
//! The story: some members, of which up to a third of the weight lies, run the real core
//! over the real commit and recovery, on disks in memory. Wallets pay, chain payments and
//! spend coins several times at once. The network loses, delays, doubles and reorders;
//! links fall silent in one direction; members lag behind, crash between any two writes
//! and lose what they had not synced; disks are lost or come back at an older state and are
//! repaired behind the fence. After every commit all invariants are looked at: those of one
//! database (`book`), and those over all members' whole lives (`history`). In the end the
//! network heals, and everything that is open has to come to an end.
//!
//! There are no threads and no clock: the same seed gives the same run, message by message.
//!
//! `TIME_SEEDS=1000000` runs more seeds, `TIME_FIRST_SEED=17` begins elsewhere,
//! `TIME_TRACE=1` says what happens. A seed that fails prints how to replay it.

#![allow(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, but does not see that helpers here are tests too"
)]

#[expect(dead_code, reason = "the smaller network of tests/consensus_rules.rs has more than is used here")]
#[path = "../support/core_net.rs"]
mod core_net;

#[macro_use]
mod violation;
mod book;
mod coverage;
mod history;
mod liar;
mod member;
mod network;
mod planted;
mod reduced;
mod schedule;
mod setting;
mod wallets;
mod world;

use coverage::Coverage;
use planted::Planted;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Plays seeds on all cores; gives what went wrong, and what they came across.
fn play_all(first: u64, count: u64, trace: bool) -> (Vec<(u64, String)>, Coverage) {
    let workers = if trace { 1 } else { std::thread::available_parallelism().map_or(1, |n| n.get() as u64) };
    let work = |worker: u64| {
        let (mut failed, mut coverage) = (Vec::new(), Coverage::default());
        for seed in (first + worker..first + count).step_by(usize::try_from(workers).unwrap()) {
            match schedule::play(seed, Planted::Nothing, trace) {
                Ok(of) => coverage.add(&of),
                Err(violation) => {
                    eprintln!("seed {seed}: {}", violation.0);
                    failed.push((seed, violation.0));
                    if failed.len() >= 10 {
                        break;
                    }
                }
            }
        }
        (failed, coverage)
    };
    let (mut failed, mut coverage) = (Vec::new(), Coverage::default());
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..workers).map(|worker| scope.spawn(move || work(worker))).collect();
        for worker in running {
            let (more, of) = worker.join().unwrap();
            failed.extend(more);
            coverage.add(&of);
        }
    });
    failed.sort();
    (failed, coverage)
}

/// So many seeds meet every hard case.
const ENOUGH_SEEDS: u64 = 1_000;

/// Every rule at once.
#[test]
fn no_schedule_breaks_a_promise() {
    let first = number("TIME_FIRST_SEED").unwrap_or(0);
    let count = number("TIME_SEEDS").unwrap_or(2_000);
    let began = std::time::Instant::now();
    let (failed, coverage) = play_all(first, count, number("TIME_TRACE").is_some());
    println!("{count} seeds in {:?}: {coverage:?}", began.elapsed());
    if let Some((seed, what)) = failed.first() {
        panic!(
            "seed {seed}: {what}; replay it with TIME_FIRST_SEED={seed} TIME_SEEDS=1 TIME_TRACE=1 \
             cargo test --test simulation no_schedule -- --nocapture"
        );
    }
    assert!(count < ENOUGH_SEEDS || coverage.missed().is_empty(), "never met: {:?}", coverage.missed());
}

/// A seed that is found at night has to fail in the morning too.
#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..20 {
        assert_eq!(schedule::play(seed, Planted::Nothing, false), schedule::play(seed, Planted::Nothing, false));
    }
}

/// How many seeds a planted bug may survive.
const SEEDS_FOR_A_FLAW: u64 = 500;

/// A simulator that finds no bug that is there proves nothing by finding none: each of these
/// has to be found, and soon.
#[test]
fn every_planted_bug_is_found() {
    let count = number("TIME_FLAW_SEEDS").unwrap_or(SEEDS_FOR_A_FLAW);
    // What breaks without the bug too says nothing about it.
    let is_sound = |seed| schedule::play(seed, Planted::Nothing, false).is_ok();
    let found = |planted, seed| schedule::play(seed, planted, false).err().filter(|_| is_sound(seed));
    let find = |planted| (0..count).find_map(|seed| Some((seed, found(planted, seed)?)));
    let mut missed = Vec::new();
    for planted in Planted::ALL {
        match find(planted) {
            Some((seed, violation)) => println!("{planted:?}: seed {seed}: {}", violation.0),
            None => {
                println!("{planted:?}: not found");
                missed.push(planted);
            }
        }
    }
    assert!(missed.is_empty(), "not found in {count} seeds: {missed:?}");
}
