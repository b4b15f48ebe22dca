//! Questions of wallets to the database: a coin, an address, a stretch of the change log.
//!
//! A ledger of 10,000 unspent outputs on sled's files: 1 of wallet 1, 100 of wallet 2, the
//! rest of wallet 3. Each answer is read as one that may leave: through `Reader::read`, which
//! waits for the commit that wrote it (here there is none under way).

mod support;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use support::{Ledger, Setting, Stage, address, directory};
use time_masternode::db::Reader;
use time_masternode::limits::MAX_UTXOS_PER_PAGE;
use time_masternode::types::OutPoint;

fn main() {
    let mut criterion = support::criterion();
    queries(&mut criterion);
    criterion.final_summary();
}

fn queries(criterion: &mut Criterion) {
    const PAYMENTS: u32 = 256;
    let owners = (0..PAYMENTS).map(|_| 0).chain([1]).chain([2; 100]).chain([3; 9_643]);
    let setting = Setting::new(4, owners);
    let directory = directory();
    let mut ledger = Ledger::on_disk(&setting, directory.path());
    let reader = ledger.database.reader();
    let txid = setting.genesis.transaction().txid();
    let mut group = criterion.benchmark_group("queries");

    let mut vout = 0;
    group.bench_function("coin", |b| {
        b.iter(|| {
            vout = (vout + 4_099) % 10_000;
            read(&reader, |reader| reader.utxo(&OutPoint { txid, vout }))
        });
    });
    for (owner, coins) in [(1, 1), (2, 100), (3, 9_643)] {
        let addresses = [address(owner)];
        group.bench_function(BenchmarkId::new("coins of an address", coins), |b| {
            b.iter(|| read(&reader, |reader| reader.address_page(&addresses, None, MAX_UTXOS_PER_PAGE)));
        });
    }

    // The log holds 256 payments by now: what the feed reads when it wakes.
    let payments = setting.payments(&setting.coins(PAYMENTS));
    Stage::ALL.into_iter().for_each(|stage| ledger.process(stage.events(&setting, &payments)));
    let last = reader.durable_head().sequence;
    for entries in [1, 256] {
        group.throughput(Throughput::Elements(entries));
        group.bench_function(BenchmarkId::new("changes", entries), |b| {
            b.iter(|| read(&reader, |reader| reader.changes(last - entries, last, usize::MAX)));
        });
    }
    group.finish();
}

fn read<T>(reader: &Reader, f: impl FnOnce(&Reader) -> Result<T, time_masternode::db::DatabaseError>) -> T {
    reader.read(|reader| f(black_box(reader))).expect("the database reads").into_inner()
}
