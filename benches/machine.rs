//! The core alone: what it takes to decide, with nothing written and nothing sent.
//!
//! A member of four over a database in memory, with 1, 32 or 256 payments in one batch. `Lock`
//! receives verified payments of wallets, locks their inputs and approves. `Certify` counts
//! this member's batch of approvals and those of two others, which is C(T) of each payment,
//! and commits. `Finalize` counts as many commits, which is F(T) of each.

mod support;

use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use support::{Ledger, Setting, Stage};
use time_masternode::types::Transaction;

fn main() {
    let mut criterion = support::criterion();
    for stage in Stage::ALL {
        steps(&mut criterion, stage);
    }
    criterion.final_summary();
}

fn steps(criterion: &mut Criterion, stage: Stage) {
    let mut group = criterion.benchmark_group(format!("machine/{stage:?}"));
    for size in [1, 32, 256] {
        let setting = Setting::new(4, vec![0; size as usize]);
        let payments = setting.payments(&setting.coins(size));
        group.throughput(Throughput::Elements(size.into()));
        group.bench_function(BenchmarkId::from_parameter(size), |b| {
            b.iter_batched(
                || (before(&setting, &payments, stage), stage.events(&setting, &payments)),
                |(mut ledger, events)| {
                    let changes = ledger.decide(events);
                    assert!(stage.is_done(&changes, payments.len()));
                    (ledger, changes)
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// A ledger on which everything before this stage has been done.
fn before(setting: &Arc<Setting>, payments: &[Transaction], stage: Stage) -> Ledger {
    let mut ledger = Ledger::in_memory(setting);
    for earlier in Stage::ALL.into_iter().take_while(|earlier| *earlier != stage) {
        ledger.process(earlier.events(setting, payments));
    }
    ledger
}
