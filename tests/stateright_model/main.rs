//! Every schedule of the finality rules (PROTOCOL §6), for four members of whom one lies:
//! a model of [`rules`], checked exhaustively, and seven mistakes planted in it, each of
//! which has to be found.
//!
//! It checks the rules, not the program: that the program follows them is for
//! `tests/consensus_rules.rs` and the tests on real networks. Not in it: children, lost
//! votes, the fence, changing clocks, and the agreement on blocks itself.
//!
//! stateright remembers states by 64-bit fingerprints. With two million of them the odds
//! that two collide somewhere, and that one is passed over, are about one in 10^7.
//!
//! `cargo test --test stateright_model -- --nocapture` prints the number of states and how
//! each mistake comes about.

mod rules;

use std::collections::BTreeSet;

use rules::{
    Bug, DECIDED, FINAL_STAYS, Finality, Liar, NO_LOCK_LEFT, NO_RIVALS_SETTLED, Reached, UNCONTRADICTED_STAYS, reached,
};
use stateright::{Checker, HasDiscoveries, Model};

/// Two transactions spend one coin, and when both have died a third one spends it. The
/// liar helps, and may stop at any moment.
const RIVALS: Finality = Finality {
    spends: &[0b1, 0b1, 0b1],
    fresh: 0b100,
    liar: Liar::MayLeave,
    second_line: true,
    lockstep: false,
    bug: None,
    reaches: &[
        ("final by votes", reached::by_votes),
        ("settled by a block alone", reached::by_a_block_alone),
        ("settled after its rival was aborted", reached::by_an_abort),
        ("both aborted", reached::both_aborted),
        ("spent afresh", reached::fresh_spend),
        ("a lock beaten by finality", reached::finality_beats_a_lock),
        ("a split that approvals do not mend", reached::split),
    ],
};

/// Three transactions in a row, each of which shares a coin with the next: when the chain
/// settles an outer one, the middle one dies, and the other outer one goes on.
const CHAINED: Finality = Finality {
    spends: &[0b01, 0b11, 0b10],
    fresh: 0,
    reaches: &[
        ("final by votes", reached::by_votes),
        ("both outer ones settled", reached::freed_by_the_chain),
        ("two aborted", reached::both_aborted),
    ],
    ..RIVALS
};

fn check(name: &str, model: Finality) {
    let checker = model.checker().spawn_bfs().join();
    println!("{name}: {} unique states, {} steps deep", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
}

#[test]
fn two_rivals_are_safe_and_live_in_every_schedule() {
    check("two rivals and a fresh spend", RIVALS);
}

/// The locks carry the proof: the rules that nobody commits to two rivals, and that blocks
/// are refused by those who committed to a rival, are a second line.
#[test]
fn the_locks_alone_are_safe_and_live() {
    check("the same without the second line", Finality { second_line: false, ..RIVALS });
}

#[test]
fn three_in_a_row_are_safe_and_live() {
    check("three in a row, a silent fourth member", Finality { liar: Liar::Silent, ..CHAINED });
    check("three in a row, a liar, blocks at once", Finality { liar: Liar::Stays, lockstep: true, ..CHAINED });
}

#[test]
fn what_nobody_contradicts_becomes_final_and_is_never_aborted() {
    let reaches: &[Reached] = &[("final by votes", reached::by_votes)];
    check("one alone", Finality { spends: &[0b11], fresh: 0, reaches, ..RIVALS });
}

/// Each mistake, and what it breaks. All are found with two rivals and a fresh spend; only
/// `DeadStillContradicts` needs the fresh spend, which is contradicted by nothing alive.
#[test]
fn every_planted_bug_is_found() {
    let planted = [
        (Bug::VotesFinal, FINAL_STAYS),
        (Bug::VotesFinal, NO_RIVALS_SETTLED),
        (Bug::CommitAfterAbort, FINAL_STAYS),
        (Bug::TimeoutUnlock, NO_RIVALS_SETTLED),
        (Bug::ApproveAborted, NO_LOCK_LEFT),
        (Bug::DeadStillContradicts, UNCONTRADICTED_STAYS),
        (Bug::AbortForbidsApprove, NO_LOCK_LEFT),
        (Bug::AbortForbidsApprove, DECIDED),
        (Bug::QuorumOneShort, NO_RIVALS_SETTLED),
        (Bug::QuorumOneShort, FINAL_STAYS),
    ];
    for (bug, property) in planted {
        let model = Finality { bug: Some(bug), reaches: &[], ..RIVALS };
        let found = HasDiscoveries::AllOf(BTreeSet::from([property]));
        let checker = model.checker().finish_when(found).spawn_bfs().join();
        let path = checker.discovery(property).unwrap_or_else(|| panic!("{bug:?} does not break: {property}"));
        println!("{bug:?} breaks \"{property}\": {:?}", path.into_actions());
    }
}
