//! Ed25519: what signing costs, and checking, one by one and many together.
//!
//! A check is that of a value that came: the message is folded in, the key is decompressed,
//! the equation is checked. Batches are of as many keys as they have signatures, which is
//! what payments are like.

mod support;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use support::wallet;
use time_masternode::types::{PublicKey, Signature, SignatureItem, verify_batch};

fn main() {
    let mut criterion = support::criterion();
    single(&mut criterion);
    batched(&mut criterion);
    criterion.final_summary();
}

fn single(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("signatures");
    let (key, message) = (wallet(0), [7; 32]);
    let (public_key, signature) = (key.public_key(), key.sign(&message));
    group.bench_function("sign", |b| b.iter(|| key.sign(black_box(&message))));
    group.bench_function("verify", |b| b.iter(|| assert!(public_key.verify(black_box(&message), &signature))));
    group.finish();
}

fn batched(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("signatures/batch");
    for size in [8, 64, 256] {
        let signed = |number: u32| {
            let (key, message) = (wallet(number), [number.to_le_bytes()[0]; 32]);
            (key.public_key(), message, key.sign(&message))
        };
        let all: Vec<_> = (0..size).map(signed).collect();
        let item =
            |(key, message, signature): &(PublicKey, [u8; 32], Signature)| SignatureItem::new(key, message, signature);
        group.throughput(Throughput::Elements(size.into()));
        group.bench_function(BenchmarkId::from_parameter(size), |b| {
            b.iter(|| {
                let items: Vec<_> = all.iter().map(item).collect();
                assert!(verify_batch(black_box(&items)));
            });
        });
    }
    group.finish();
}
