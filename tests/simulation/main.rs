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
mod history;
mod liar;
mod member;
mod network;
mod planted;
mod reduced;
mod schedule;
mod wallets;
mod world;

use planted::Planted;
use world::Coverage;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Every rule at once.
#[test]
fn no_schedule_breaks_a_promise() {
    let first = number("TIME_FIRST_SEED").unwrap_or(0);
    let count = number("TIME_SEEDS").unwrap_or(2_000);
    let trace = number("TIME_TRACE").is_some();
    let mut coverage = Coverage::default();
    let began = std::time::Instant::now();
    let mut failed = Vec::new();
    for seed in first..first + count {
        match schedule::play(seed, Planted::Nothing, trace) {
            Ok(of) => coverage.add(&of),
            Err(violation) => {
                eprintln!("seed {seed}: {}", violation.0);
                failed.push(seed);
                if failed.len() >= 20 {
                    break;
                }
            }
        }
    }
    println!("{count} seeds in {:?}: {coverage:#?}", began.elapsed());
    assert!(
        failed.is_empty(),
        "replay with TIME_FIRST_SEED={} TIME_SEEDS=1 TIME_TRACE=1 cargo test --test simulation no_schedule -- --nocapture",
        failed[0]
    );
}
