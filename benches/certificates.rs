//! Certificates: made of counted votes, and verified as a wallet does offline.
//!
//! Of networks of 4, 16 and 67 members, so of 3, 11 and 45 votes. Each vote stood in a batch
//! of 32, so each brings a path of five hashes. `batch` is what comes before: a member's
//! batch of votes as it came, to the point where it may be counted.

mod support;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use support::Setting;
use time_masternode::consensus::{Certificate, CountedVote, MemberBatch, Verified, VoteKind};

const BATCH: u8 = 32;

fn main() {
    let mut criterion = support::criterion();
    certificates(&mut criterion);
    batches(&mut criterion);
    criterion.final_summary();
}

fn certificates(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("certificates");
    for members in [4, 16, 67] {
        let setting = Setting::new(members, [0; BATCH as usize]);
        let payments = setting.payments(&setting.coins(BATCH.into()));
        let (kind, txid, epoch) = (VoteKind::Commit, payments[9].txid(), setting.committee.epoch());
        let counted = setting.counted(kind, &payments, 9);
        let make = || {
            let votes = counted.iter().map(CountedVote::to_signed).collect();
            Certificate { kind, txid, epoch, votes }
        };
        group.bench_function(BenchmarkId::new("make", members), |b| b.iter(make));
        let certificate = make();
        group.bench_function(BenchmarkId::new("verify", members), |b| {
            b.iter_batched(
                || certificate.clone(),
                |certificate| certificate.verify(&setting.committee).expect("a quorum signed it"),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn batches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("certificates/batch");
    let setting = Setting::new(4, [0; 256]);
    let payments = setting.payments(&setting.coins(256));
    for size in [1, 32, 256] {
        let batch = setting.batch(1, VoteKind::Approve, &payments[..size]).get().wire().clone();
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |b| {
            b.iter_batched(
                || batch.clone(),
                |batch| Verified::check(MemberBatch::new(batch, &setting.committee).expect("a member's")).ok(),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}
