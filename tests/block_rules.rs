//! One member's core against what a liar may put forward as a block, rule by rule.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

#[path = "support/core_member.rs"]
mod core_member;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use core_member::Member;
use core_member::core_net::{COIN, COINS, MIN_FEE};
use time_masternode::consensus::{Action, Event, MemberIndex, Progress, Rejection, Source, Ticket, Vote, VoteKind};
use time_masternode::limits::{MAX_TRANSACTIONS_PER_REQUEST, SYNC_ANSWER_MS, SYNC_CUT_MS};
use time_masternode::types::{Height, OutPoint, Transaction, Txid, UTXOState};

fn requests(actions: &[Action], wanted: Txid) -> usize {
    let of_one = actions.iter().filter(|action| matches!(action, Action::Request { txid, .. } if *txid == wanted));
    of_one.count() + lots(actions).iter().filter(|(_, txids)| txids.contains(&wanted)).count()
}

/// The questions for bodies that the chain needs: whom, and which.
fn lots(actions: &[Action]) -> Vec<(MemberIndex, Vec<Txid>)> {
    let lot = |action: &Action| match action {
        Action::RequestBodies { to, txids } => Some((*to, txids.clone())),
        _ => None,
    };
    actions.iter().filter_map(lot).collect()
}

/// A liar aborts in its block what has C(T) and no A(T). Every member asks for A(T), which
/// nobody has. Answers to that question bring C(T) again; they must not make the member
/// ask at once again, or the members' questions and answers go round as fast as they can.
#[test]
fn what_a_block_lacks_is_asked_for_now_and_then() {
    let mut member = Member::new();
    let transaction = member.pay(0, 1);
    let txid = transaction.txid();
    member.hear_transaction(&transaction, Source::Member(member.setting.member(2)));
    member.hear_certificate(VoteKind::Approve, txid);
    let first = member.hear_block(member.block(Vec::new(), vec![txid]));
    assert_eq!(requests(&first, txid), 1, "the proposer is asked");
    let mut again = 0;
    for _ in 0..100 {
        member.now_ms += 1;
        again += requests(&member.hear_certificate(VoteKind::Approve, txid), txid);
    }
    assert_eq!(again, 0, "nothing new has come, and no time has passed");
    member.now_ms += 1_000;
    assert_eq!(requests(&member.hear(Event::Tick), txid), 1, "now everybody is asked");
}

/// Whom a node asks for blocks.
fn asked(actions: &[Action]) -> Vec<(MemberIndex, Height)> {
    let asked = |action: &Action| match action {
        Action::RequestBlocks { to, from_height } => Some((*to, *from_height)),
        _ => None,
    };
    actions.iter().filter_map(asked).collect()
}

/// A member claims to have more blocks and answers each question with what does not begin
/// where it was asked to begin. That is no answer: it is not asked again at once.
#[test]
fn the_same_blocks_again_are_no_answer() {
    let mut member = Member::new();
    let liar = member.setting.member(3);
    member.hear(Event::Connected(liar));
    let first = member.hear(Event::Height { member: liar, height: 1_000 });
    assert_eq!(asked(&first), [(liar, 1)]);
    let mut block = member.block(Vec::new(), vec![Txid::from_bytes([1; 32])]);
    block.height = 7;
    for _ in 0..100 {
        let (_, actions) = member.hear_decided_from(liar, block.clone());
        assert_eq!(asked(&actions), []);
    }
    member.now_ms += SYNC_ANSWER_MS;
    assert_eq!(asked(&member.hear(Event::Tick)), [], "nor is it asked again for a while");
    let other = member.setting.member(2);
    member.hear(Event::Connected(other));
    assert_eq!(asked(&member.hear(Event::Height { member: other, height: 1 })), [(other, 1)]);
}

/// An observer is not done because one member says that there is nothing more: it may lie.
#[test]
fn one_members_word_does_not_end_an_observers_catching_up() {
    let mut observer = Member::observer();
    let setting = Arc::clone(&observer.setting);
    let mut actions = Vec::new();
    for place in 0..4 {
        actions.extend(observer.hear(Event::Connected(setting.member(place))));
    }
    for said in 1..=2 {
        let [(from, 1)] = asked(&actions)[..] else { panic!("somebody is asked: {actions:?}") };
        assert!(observer.machine.is_behind(), "{said} of four");
        actions = observer.hear(Event::Blocks { from, blocks: Vec::new() });
    }
    assert!(!observer.machine.is_behind(), "one of two is honest");
    assert_eq!(asked(&actions), [], "from now on it asks now and then");
}

/// A member that is behind by a block of `payments`, most of which spend what others in it made;
/// and what it asks for.
fn behind_by(payments: usize) -> (Member, Vec<Arc<Transaction>>, Vec<Action>) {
    let mut member = Member::new();
    let setting = Arc::clone(&member.setting);
    let mut coins: Vec<_> = (0..COINS).map(|wallet| (setting.coin(wallet), COIN, wallet)).collect();
    let mut chain = Vec::new();
    for i in 0..payments {
        let place = i % coins.len();
        let (coin, amount, wallet) = &mut coins[place];
        *amount -= MIN_FEE;
        let payment = setting.pay(&[(*coin, *wallet)], &[(*amount, *wallet)], 0);
        *coin = OutPoint { txid: payment.txid(), vout: 0 };
        chain.push(payment);
    }
    for other in 1..4 {
        member.hear(Event::Connected(setting.member(other)));
        member.hear(Event::Height { member: setting.member(other), height: 1 });
    }
    let block = member.block(chain.iter().map(|payment| payment.txid()).collect(), Vec::new());
    let (changes, actions) = member.hear_decided(block);
    assert!(changes.blocks.is_empty(), "its payments are unknown");
    (member, chain, actions)
}

/// Bodies that a decided block needs come with their certificates. Those must not make the node
/// ask for the bodies once more, of everybody: the answers would be in the way of the block.
#[test]
fn what_a_decided_block_needs_is_asked_for_once() {
    let (mut member, chain, first) = behind_by(300);
    let (last, others) = chain.split_last().unwrap();
    for payment in &chain {
        assert_eq!(requests(&first, payment.txid()), 1);
    }
    let mut actions = Vec::new();
    for payment in others {
        actions.extend(member.hear_transaction(payment, Source::Answer));
        actions.extend(member.hear_certificate(VoteKind::Commit, payment.txid()));
        // And votes on what comes after it, whose body is unknown as well.
        let votes = vec![Vote { kind: VoteKind::Commit, txid: last.txid() }];
        actions.extend(member.hear(Event::Votes(member.setting.batch(3, votes))));
    }
    for _ in 0..10 {
        member.now_ms += 200;
        actions.extend(member.hear(Event::Tick));
    }
    let storm = actions.iter().filter(|action| matches!(action, Action::Request { .. })).count();
    assert_eq!(storm, 0);
    // What the answer lacked is asked for again, once.
    let [(to, txids)] = &lots(&actions)[..] else { panic!("{:?}", lots(&actions)) };
    assert_eq!(txids[..], [last.txid()]);
    assert_ne!(*to, lots(&first)[0].0, "another member may have it");
    member.hear_transaction(last, Source::Answer);
    assert_eq!(member.machine.height(), 1);
}

/// It may be sent by a wallet as well, which is answered like everybody who asks.
#[test]
fn a_wallet_that_sends_what_a_decided_block_needs_is_told_to_ask_again() {
    let (mut member, chain, _) = behind_by(3);
    for (n, payment) in chain.iter().enumerate() {
        let ticket = Ticket(n as u64);
        let actions = member.hear_transaction(payment, Source::Wallet(ticket));
        let answers = actions.iter().filter(|action| {
            matches!(action, Action::Reply { ticket: to, txid, progress: Progress::Rejected(Rejection::Busy) }
                if *to == ticket && *txid == payment.txid())
        });
        assert_eq!(answers.count(), 1, "{actions:?}");
    }
    assert_eq!(member.machine.height(), 1, "it was what the block needed");
    let again = member.hear_transaction(&chain[0], Source::Wallet(Ticket(9)));
    let is_final = |progress: &Progress| matches!(progress, Progress::Finalized { .. } | Progress::Confirmed { .. });
    assert!(matches!(&again[..], [Action::Reply { progress, .. }] if is_final(progress)), "{again:?}");
}

/// An answer has an end where it becomes too long. What it lacks is asked for again soon, and whoever
/// gave it is as good as any.
#[test]
fn what_an_answer_lacks_is_asked_for_again_soon() {
    let (mut member, chain, first) = behind_by(300);
    let [(asked, txids)] = &lots(&first)[..] else { panic!("one lot: {first:?}") };
    let cut = txids.len() / 2;
    let bodies: BTreeMap<Txid, &Arc<Transaction>> = chain.iter().map(|payment| (payment.txid(), payment)).collect();
    for txid in &txids[..cut] {
        assert_eq!(lots(&member.hear_transaction(bodies[txid], Source::Answer)), []);
    }
    // Nobody else is there.
    let setting = Arc::clone(&member.setting);
    for other in (1..4).map(|other| setting.member(other)).filter(|other| other != asked) {
        member.hear(Event::Disconnected(other));
    }
    member.now_ms += SYNC_CUT_MS;
    let again = lots(&member.hear(Event::Tick));
    let [(to, rest)] = &again[..] else { panic!("one lot: {again:?}") };
    assert_eq!((to, rest.len()), (asked, txids.len() - cut));
    for txid in rest {
        member.hear_transaction(bodies[txid], Source::Answer);
    }
    assert_eq!(member.machine.height(), 1);
}

/// The bodies of a large block are asked for of all members, as many at a time as an answer
/// has; whoever has answered is asked for the next at once, and one that never answers holds
/// nothing up for long.
#[test]
fn a_large_block_comes_from_all_who_answer() {
    let (mut member, chain, first) = behind_by(4_000);
    let silent = member.setting.member(3);
    let bodies: BTreeMap<Txid, &Arc<Transaction>> = chain.iter().map(|payment| (payment.txid(), payment)).collect();
    let mut open: VecDeque<_> = lots(&first).into();
    let asked: BTreeSet<_> = open.iter().map(|(to, _)| *to).collect();
    assert_eq!(asked.len(), 3, "all are asked");
    let most = open.iter().map(|(_, txids)| txids.len()).max().unwrap();
    assert!(most < MAX_TRANSACTIONS_PER_REQUEST / 2, "{most} with their certificates in one answer");
    let (mut waits, mut left_to_silent) = (0, 0);
    while member.machine.height() == 0 {
        let Some((to, txids)) = open.pop_front() else {
            waits += 1;
            assert!(waits <= 2, "it waits for one that was silent before");
            member.now_ms += SYNC_ANSWER_MS;
            open.extend(lots(&member.hear(Event::Tick)));
            continue;
        };
        if to == silent {
            left_to_silent += txids.len();
            continue;
        }
        for txid in &txids {
            open.extend(lots(&member.hear_transaction(bodies[txid], Source::Answer)));
        }
    }
    assert!(left_to_silent <= 4 * most, "{left_to_silent} of the bodies were asked of one that is silent");
}

/// B contradicts A and C, which do not contradict each other. The chain settles A, which
/// kills B, and aborts C: its owner is told that it was B that contradicted it, although B
/// is gone by then.
#[test]
fn the_dead_are_told_what_they_contradicted() {
    let mut member = Member::new();
    let setting = Arc::clone(&member.setting);
    let spend = |wallets: &[u32], nonce| {
        let inputs: Vec<_> = wallets.iter().map(|wallet| (setting.coin(*wallet), *wallet)).collect();
        setting.pay(&inputs, &[(COIN, wallets[0])], nonce)
    };
    let [a, b, c] = [spend(&[0, 1], 1), spend(&[1, 2], 2), spend(&[2, 3], 3)];
    member.hear_transaction(&a, Source::Member(setting.member(1)));
    member.hear_transaction(&b, Source::Member(setting.member(2)));
    member.hear_transaction(&c, Source::Member(setting.member(3)));
    let block = member.block(vec![a.txid()], vec![c.txid()]);
    let (changes, _) = member.hear_decided(block);
    assert_eq!(changes.blocks.len(), 1, "it is executed");
    assert_eq!(changes.dead[&c.txid()].by, Some(b.txid()));
}

/// A liar votes on a transaction whose coin the chain has spent. Nothing of it stays: it
/// would be in flight for ever, and one of those that make the node too busy for wallets.
#[test]
fn what_the_chain_has_made_impossible_is_not_in_flight() {
    let mut member = Member::new();
    let late = member.pay(0, 1);
    let coin = member.setting.coin(0);
    let by = Txid::from_bytes([1; 32]);
    let state = UTXOState::Confirmed { txid: by, block_height: 1, confirmed_at: 0 };
    member.store.utxos.get_mut(&coin).unwrap().state = state;
    let votes = vec![Vote { kind: VoteKind::Approve, txid: late.txid() }];
    member.hear(Event::Votes(member.setting.batch(3, votes)));
    assert_eq!(member.machine.known(), 1, "its body may be anything");
    member.hear_transaction(&late, Source::Answer);
    assert_eq!((member.machine.in_flight(), member.machine.known()), (0, 0));
}
