//! Transactions: their canonical bytes, their txid, and the rules that need no ledger.
//!
//! `txid` makes a transaction of its parts, which is what computes it; `form` makes one of
//! what came as JSON, addresses and all. Of 1 input and 2 outputs, and of 16 and 2.

mod support;

use criterion::{BatchSize, BenchmarkId, Criterion};
use support::{Setting, address};
use time_masternode::consensus::check_form;
use time_masternode::types::Transaction;

fn main() {
    let mut criterion = support::criterion();
    transactions(&mut criterion);
    criterion.final_summary();
}

fn transactions(criterion: &mut Criterion) {
    let setting = Setting::new(4, [0; 16]);
    let mut group = criterion.benchmark_group("transactions");
    for inputs in [1, 16] {
        let transaction = setting.pay(&setting.coins(inputs), address(1));
        let name = format!("{inputs} in, 2 out");
        group.bench_function(BenchmarkId::new("canonical bytes", &name), |b| b.iter(|| transaction.canonical_bytes()));
        group.bench_function(BenchmarkId::new("txid", &name), |b| {
            b.iter_batched(
                || (transaction.inputs().to_vec(), transaction.outputs().to_vec()),
                |(inputs, outputs)| Transaction::from_parts(inputs, outputs, transaction.timestamp()),
                BatchSize::SmallInput,
            );
        });
        let raw = transaction.to_raw();
        group.bench_function(BenchmarkId::new("form", &name), |b| {
            b.iter_batched(|| raw.clone(), |raw| check_form(raw, &setting.rules), BatchSize::SmallInput);
        });
        group.bench_function(BenchmarkId::new("to raw", &name), |b| b.iter(|| transaction.to_raw()));
    }
    group.finish();
}
