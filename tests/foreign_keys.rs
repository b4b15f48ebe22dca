//! A txid covers neither keys nor signatures, so anybody can put somebody else's
//! transaction under a key of his own and sign it validly. Such a copy spends nothing; it
//! must not take the place of the right one either, whenever and however it comes.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

#[path = "support/core_member.rs"]
mod core_member;

use std::sync::Arc;

use core_member::Member;
use core_member::core_net::{COIN, MIN_FEE};
use time_masternode::consensus::{
    Action, ConsensusMessage, Event, Progress, Rejection, Source, Ticket, Vote, VoteKind, check_form,
};
use time_masternode::types::{ConsensusStep, OutPoint, SecretKey, Transaction, UTXOState, sighash};

/// The same transaction under a key that owns none of its coins.
fn forged(member: &Member, transaction: &Transaction) -> Transaction {
    let thief = SecretKey::from_seed([7; 32]);
    let mut raw = transaction.to_raw();
    for input in &mut raw.inputs {
        input.public_key = thief.public_key();
        input.signature = thief.sign(&sighash(&member.setting.genesis.hash(), &raw.txid));
    }
    let copy = check_form(raw, &member.setting.rules).unwrap();
    assert_eq!(copy.txid(), transaction.txid());
    assert_ne!(copy, *transaction);
    copy
}

/// A child of `parent`'s first output, which is wallet 0's.
fn child_of(member: &Member, parent: &Transaction) -> Arc<Transaction> {
    let coin = OutPoint { txid: parent.txid(), vout: 0 };
    member.setting.pay(&[(coin, 0)], &[(COIN - 3 * MIN_FEE, 0)], 9)
}

fn spent_by(member: &Member, transaction: &Transaction) -> bool {
    let coin = transaction.inputs()[0].previous_output;
    matches!(member.store.state(&coin), Some(UTXOState::SpentFinalized { txid, .. }) if txid == transaction.txid())
}

#[test]
fn a_proof_of_finality_waits_for_the_right_body() {
    let mut member = Member::new();
    let payment = member.pay(0, 1);
    member.hear_certificate(VoteKind::Commit, payment.txid());
    for _ in 0..3 {
        member.hear_transaction(&forged(&member, &payment), Source::Answer);
        assert!(!spent_by(&member, &payment));
    }
    member.hear_transaction(&payment, Source::Answer);
    assert!(spent_by(&member, &payment));
    assert_eq!(member.store.finalized[&payment.txid()].transaction, payment);
}

/// The same where the parent is not here when the body comes, so nobody can tell whose
/// the coin is.
#[test]
fn a_proof_of_finality_finds_a_wrong_body_out_when_the_parent_comes() {
    let mut member = Member::new();
    let parent = member.pay(0, 1);
    let child = child_of(&member, &parent);
    member.hear_certificate(VoteKind::Commit, child.txid());
    member.hear_transaction(&forged(&member, &child), Source::Answer);
    member.hear_certificate(VoteKind::Commit, parent.txid());
    let asked = member.hear_transaction(&parent, Source::Answer);
    assert!(spent_by(&member, &parent) && !spent_by(&member, &child));
    let again = |action: &Action| matches!(action, Action::Request { txid, .. } if *txid == child.txid());
    assert!(asked.iter().any(again), "the right body is asked for");
    member.hear_transaction(&child, Source::Answer);
    assert!(spent_by(&member, &child));
    assert_eq!(member.store.finalized[&child.txid()].transaction, child);
}

#[test]
fn a_commit_is_written_down_with_the_right_body() {
    let mut member = Member::new();
    let (rival, payment) = (member.pay(0, 1), member.pay(0, 2));
    let commit = Vote { kind: VoteKind::Commit, txid: payment.txid() };
    member.hear_transaction(&rival, Source::Wallet(Ticket(1)));
    member.hear_certificate(VoteKind::Approve, payment.txid());
    member.hear_transaction(&forged(&member, &payment), Source::Answer);
    assert!(!member.store.has_vote(&commit));
    member.hear_transaction(&payment, Source::Answer);
    assert!(member.store.has_vote(&commit));
    assert_eq!(member.store.in_flight[&payment.txid()].transaction, payment);
    member.hear_certificate(VoteKind::Commit, payment.txid());
    assert!(spent_by(&member, &payment));
}

/// Somebody sends a child under his own key before its parent is settled. The owner's copy,
/// which comes later, is taken as soon as the parent is here.
#[test]
fn a_child_that_waits_is_each_senders_own() {
    let mut member = Member::new();
    let parent = member.pay(0, 1);
    let child = child_of(&member, &parent);
    member.hear_transaction(&forged(&member, &child), Source::Wallet(Ticket(1)));
    member.hear_transaction(&child, Source::Wallet(Ticket(2)));
    member.hear_transaction(&parent, Source::Wallet(Ticket(3)));
    let answers = member.hear_certificate(VoteKind::Commit, parent.txid());
    let answer = |wanted: u64| {
        let reply = |action: &Action| match action {
            Action::Reply { ticket, progress, .. } if *ticket == Ticket(wanted) => Some(progress.clone()),
            _ => None,
        };
        answers.iter().find_map(reply).unwrap()
    };
    assert!(matches!(answer(1), Progress::Rejected(Rejection::WrongOwner(0))), "{:?}", answer(1));
    assert!(matches!(answer(2), Progress::Pending { .. }), "{:?}", answer(2));
    assert_eq!(member.store.in_flight[&child.txid()].transaction, child);
}

#[test]
fn a_decided_block_is_executed_with_the_right_bodies() {
    let mut member = Member::new();
    let parent = member.pay(0, 1);
    let child = child_of(&member, &parent);
    let (changes, _) = member.hear_decided(member.block(vec![parent.txid(), child.txid()], Vec::new()));
    assert!(changes.blocks.is_empty(), "the bodies are not here");
    // The child's parent is not here, so nobody can tell yet.
    for copy in [forged(&member, &child), forged(&member, &parent), forged(&member, &child)] {
        member.hear_transaction(&copy, Source::Answer);
    }
    member.hear_transaction(&parent, Source::Answer);
    member.hear_transaction(&forged(&member, &child), Source::Answer);
    let right = member.setting.signed(&child);
    let (changes, _) = member.decide(|machine, step| {
        let event = Event::Transaction { transaction: right, source: Source::Answer };
        machine.handle(step, event);
    });
    assert_eq!(changes.blocks.len(), 1, "now it is executed");
    for transaction in [parent, child] {
        assert_eq!(changes.finalized[&transaction.txid()].transaction, transaction);
    }
}

/// The copy is in flight already when the block is decided, beside a proof that came before it.
#[test]
fn a_decided_block_asks_for_what_is_in_flight_under_foreign_keys() {
    let mut member = Member::new();
    let parent = member.pay(0, 1);
    let child = child_of(&member, &parent);
    member.hear_certificate(VoteKind::Commit, child.txid());
    member.hear_transaction(&forged(&member, &child), Source::Answer);
    for other in 1..4 {
        member.hear(Event::Connected(member.setting.member(other)));
    }
    let asks_for = |actions: &[Action], wanted: &Transaction| {
        let asks =
            |action: &Action| matches!(action, Action::RequestBodies { txids, .. } if txids.contains(&wanted.txid()));
        actions.iter().any(asks)
    };
    let (_, actions) = member.hear_decided(member.block(vec![parent.txid(), child.txid()], Vec::new()));
    assert!(asks_for(&actions, &parent) && !asks_for(&actions, &child), "nobody can tell yet");
    let actions = member.hear_transaction(&parent, Source::Answer);
    assert!(asks_for(&actions, &child), "now everybody can: {actions:?}");
    member.hear_transaction(&child, Source::Answer);
    assert_eq!(member.machine.height(), 1);
    assert_eq!(member.store.finalized[&child.txid()].transaction, child);
}

/// What a proposed block lacks comes under another key first. The block is not refused for
/// that, and is voted for when the right body is here.
#[test]
fn a_proposed_block_waits_for_the_right_bodies() {
    let mut member = Member::new();
    let payment = member.pay(0, 1);
    let block = member.block(vec![payment.txid()], Vec::new());
    let hash = block.hash(&member.setting.genesis.hash());
    let prevotes = |actions: &[Action]| -> Vec<_> {
        let prevote = |action: &Action| match action {
            Action::Consensus(message) => match message.as_ref() {
                ConsensusMessage::Vote(vote) if vote.step == ConsensusStep::Prevote => Some(vote.block_hash),
                _ => None,
            },
            _ => None,
        };
        actions.iter().filter_map(prevote).collect()
    };
    let mut said = prevotes(&member.hear_block(block));
    said.extend(prevotes(&member.hear_transaction(&forged(&member, &payment), Source::Answer)));
    said.extend(prevotes(&member.hear_certificate(VoteKind::Approve, payment.txid())));
    assert_eq!(said, [], "no vote yet");
    assert_eq!(prevotes(&member.hear_transaction(&payment, Source::Answer)), [Some(hash)]);
}
