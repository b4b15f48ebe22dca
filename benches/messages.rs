//! JSON of the messages that a payment costs: `net::parse` and `net::encode`, as every frame
//! goes through them.
//!
//! A payment has 1 input and 2 outputs; certificates are of a network of four (three votes),
//! and each vote stood in a batch of 32. The throughput is in bytes of JSON.

mod support;

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput};
use support::{NOW, Setting};
use time_masternode::consensus::VoteKind;
use time_masternode::net::{
    CertifiedTransaction, FinalityProof, NetworkMessage, TransactionStatus, TransactionStatusKind, Transactions,
    UTXOStateNotification, UTXOStateNotificationMessage, encode, parse,
};
use time_masternode::types::UTXOState;

fn main() {
    let mut criterion = support::criterion();
    let messages = messages();
    for (name, message) in &messages {
        let bytes = encode(message, None);
        assert_eq!(parse(&bytes).map(|incoming| incoming.message).as_ref(), Ok(message), "{name}");
    }
    code(&mut criterion, &messages);
    criterion.final_summary();
}

fn code(criterion: &mut Criterion, messages: &[(&str, NetworkMessage)]) {
    let mut group = criterion.benchmark_group("messages");
    for (name, message) in messages {
        let bytes = encode(message, None);
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(BenchmarkId::new("decode", name), |b| b.iter(|| parse(black_box(&bytes))));
        group.bench_function(BenchmarkId::new("encode", name), |b| b.iter(|| encode(black_box(message), None)));
    }
    group.finish();
}

/// The messages by name.
fn messages() -> Vec<(&'static str, NetworkMessage)> {
    let setting = Setting::new(4, [0; 256]);
    let payments = setting.payments(&setting.coins(256));
    let payment = &payments[0];
    let certificate = setting.certificate(VoteKind::Commit, &payments[..32], 0);
    let votes = |count: usize| {
        let batch = setting.batch(1, VoteKind::Approve, &payments[..count]);
        NetworkMessage::Votes(Arc::new(batch.get().wire().clone()))
    };
    let status = |status, finality_proof| {
        NetworkMessage::TransactionStatus(Box::new(TransactionStatus {
            txid: payment.txid(),
            status,
            rejection: None,
            approvals: 4,
            commits: 3,
            total_masternodes: 4,
            block_height: None,
            finality_proof,
        }))
    };
    let output = payment.outputs()[0];
    let spent = UTXOState::SpentFinalized { txid: payment.txid(), finalized_at: NOW.unix, votes: 3 };
    let notification = UTXOStateNotification {
        outpoint: payment.inputs()[0].previous_output,
        output,
        old_state: Some(UTXOState::Locked { txid: payment.txid(), locked_at: NOW.unix }),
        new_state: spent,
        timestamp: NOW.unix,
        originator: "masternode-1".into(),
    };
    let entry = CertifiedTransaction { transaction: payment.to_raw(), certificate: Some(certificate.clone()) };
    vec![
        ("TransactionBroadcast", NetworkMessage::TransactionBroadcast(payment.to_raw())),
        ("Votes of 1", votes(1)),
        ("Votes of 32", votes(32)),
        ("Votes of 256", votes(256)),
        ("TransactionStatus, pending", status(TransactionStatusKind::Pending, None)),
        (
            "TransactionStatus, final",
            status(TransactionStatusKind::Finalized, Some(FinalityProof::Commit(Arc::new(certificate)))),
        ),
        (
            "UTXOStateNotification",
            NetworkMessage::UTXOStateNotification(UTXOStateNotificationMessage { sequence: 12_345, notification }),
        ),
        ("Transactions of 1 with F(T)", NetworkMessage::Transactions(Transactions { transactions: vec![entry] })),
    ]
}
