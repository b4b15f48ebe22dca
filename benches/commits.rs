//! Durable commits: `Database::commit` on sled's files, with both syncs, by the number of
//! payments in it.
//!
//! The three commits of a payment on one member of four: its inputs locked with the vote
//! `Approve`, C(T) with the vote `Commit`, and F(T) with the new outputs. What led to them is
//! not timed (see `machine`). The ledger grows while it is measured; the disk is the one that
//! the build lies on, and most of a small commit is waiting for it.

mod support;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use support::{Coin, FEE, Ledger, PAID, Setting, Stage, directory};
use time_masternode::types::OutPoint;

fn main() {
    let mut criterion = support::criterion();
    for stage in Stage::ALL {
        commits(&mut criterion, stage);
    }
    criterion.final_summary();
}

fn commits(criterion: &mut Criterion, stage: Stage) {
    let mut group = criterion.benchmark_group(format!("commits/{stage:?}"));
    group.sample_size(20).sampling_mode(SamplingMode::Flat);
    for size in [1, 8, 64, 256] {
        let directory = directory();
        let setting = Setting::new(4, vec![0; size as usize]);
        let mut ledger = Ledger::on_disk(&setting, directory.path());
        let mut coins = setting.coins(size);
        group.throughput(Throughput::Elements(size.into()));
        group.bench_function(BenchmarkId::from_parameter(size), |b| {
            b.iter_custom(|rounds| (0..rounds).map(|_| round(&mut ledger, &mut coins, stage)).sum());
        });
    }
    group.finish();
}

/// Pays each coin to finality, and goes on with the change; the time of one stage's commit.
fn round(ledger: &mut Ledger, coins: &mut [Coin], timed: Stage) -> Duration {
    let payments = ledger.setting.payments(coins);
    let mut took = Duration::ZERO;
    for stage in Stage::ALL {
        let changes = ledger.decide(stage.events(&ledger.setting, &payments));
        assert!(stage.is_done(&changes, payments.len()));
        let votes = changes.votes.clone();
        let began = Instant::now();
        ledger.commit(changes);
        if stage == timed {
            took = began.elapsed();
        }
        ledger.sign(votes);
    }
    for (coin, payment) in coins.iter_mut().zip(&payments) {
        *coin = Coin { outpoint: OutPoint { txid: payment.txid(), vout: 1 }, units: coin.units - PAID - FEE };
    }
    took
}
