//! The change log against the states, and the subscriptions that read it.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use super::super::DatabaseError;
use super::super::codec::{decode, records};
use super::super::schema::{Subscription, SubscriptionKey, TreeId};
use super::super::store::sequence_of;
use super::{Check, Damage, Subject};
use crate::consensus::{LogEntry, Utxo};
use crate::types::{OutPoint, UTXOState};

/// Outputs whose steps are followed at once; more take more passes.
const OUTPUTS_PER_PASS: u64 = 250_000;

/// The log is walked once for its numbers and blocks. Then each output's steps are followed
/// from the first to the state that it is in; outputs are divided among so many passes that
/// those of one pass fit into bounded memory.
pub(super) fn changes(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let (entries, from_start) = walk(subject, check)?;
    let passes = entries.div_ceil(OUTPUTS_PER_PASS).max(1);
    let hasher = RandomState::new();
    for pass in 0..passes {
        let mut last: HashMap<OutPoint, Utxo> = HashMap::new();
        for row in subject.reader.tree(TreeId::Changes).iter() {
            let (_, value) = row?;
            let Ok(row) = decode::<Vec<LogEntry>>(TreeId::Changes, &value) else { continue };
            for entry in row {
                let LogEntry::Transition(step) = entry else { continue };
                if passes > 1 && hasher.hash_one(step.outpoint) % passes != pass {
                    continue;
                }
                subject.tell(check);
                let place = || format!("changes/{}", step.outpoint);
                let legal = UTXOState::may_follow(step.old_state.as_ref(), &step.new_state);
                check.ensure(legal, Damage::Ledger, place, "a step that no output can take");
                let now = Utxo { output: step.output, state: step.new_state };
                let before = last.insert(step.outpoint, now);
                let same = before.is_none_or(|before| before.output == step.output);
                check.ensure(same, Damage::Ledger, place, "a step of another amount or owner than the one before");
                let follows = before.map_or_else(
                    // The log of before may be gone; what the genesis made was never logged.
                    || !from_start || step.old_state.is_none_or(|state| state == UTXOState::Unspent),
                    |before| step.old_state == Some(before.state),
                );
                check.ensure(follows, Damage::Ledger, place, "a step that does not begin where the last one ended");
            }
        }
        compare_states(subject, check, &last)?;
    }
    Ok(())
}

/// Where the steps of an output end is where it stands.
fn compare_states(
    subject: &Subject<'_>,
    check: &mut Check,
    last: &HashMap<OutPoint, Utxo>,
) -> Result<(), DatabaseError> {
    let forgotten = subject.reader.forgotten()?;
    for (outpoint, Utxo { output, state }) in last {
        let stands = match subject.reader.utxo(outpoint) {
            Ok(Some(utxo)) => {
                let place = || format!("changes/{outpoint}");
                let what = "its steps are of another amount or owner than it is";
                check.ensure(utxo.output == *output, Damage::Ledger, place, what);
                Some(utxo.state)
            }
            // A program of an earlier schema forgot it before it forgot the log.
            Ok(None) => match state {
                UTXOState::Confirmed { block_height, .. } if *block_height <= forgotten => continue,
                _ => None,
            },
            Err(error) if error.is_damage() => None,
            Err(error) => return Err(error),
        };
        if stands == Some(*state) {
            continue;
        }
        // A lock that is gone, or one too many, may be a vote that is gone.
        let live = state.is_live() && stands.is_some_and(|stands| stands.is_live());
        let damage = if live { Damage::Votes } else { Damage::Ledger };
        let place = format!("changes/{outpoint}");
        check.find(damage, place, "its last step does not lead to the state that it is in");
    }
    Ok(())
}

/// Gives the number of entries and whether they begin with the first one.
fn walk(subject: &Subject<'_>, check: &mut Check) -> Result<(u64, bool), DatabaseError> {
    let (mut entries, mut expected, mut first) = (0, None, 1);
    let mut height = None;
    for row in subject.reader.tree(TreeId::Changes).iter() {
        let (key, value) = row?;
        let sequence = sequence_of(&key)?;
        let place = || format!("changes/{sequence}");
        first = if expected.is_none() { sequence } else { first };
        let dense = expected.is_none_or(|expected| expected == sequence);
        check.ensure(dense, Damage::Ledger, place, "numbers are missing before it");
        let row: Vec<LogEntry> = match decode(TreeId::Changes, &value) {
            Ok(row) => row,
            Err(error) => {
                check.unreadable(Damage::Ledger, place(), error)?;
                expected = None;
                continue;
            }
        };
        for entry in &row {
            let LogEntry::Block { height: at, block_hash, .. } = entry else { continue };
            let follows = height.is_none_or(|height: u64| height.checked_add(1) == Some(*at));
            check.ensure(follows, Damage::Ledger, place, "a block that does not follow the one before");
            let decided = subject.reader.block(*at)?;
            let known = decided.is_some_and(|decided| decided.certificate.block_hash == *block_hash);
            check.ensure(known, Damage::Ledger, place, "a block that is not here");
            height = Some(*at);
        }
        entries += row.len() as u64;
        expected = Some(sequence.saturating_add(row.len() as u64));
    }
    let end = expected.unwrap_or(1);
    let pruned = subject.reader.pruned()?.sequence;
    let whole = end == subject.head.sequence.saturating_add(1) || (entries == 0 && pruned == subject.head.sequence);
    check.ensure(whole, Damage::Ledger, || "changes".into(), "it does not end where the last commit says");
    let begins = entries == 0 || first == pruned.saturating_add(1);
    check.ensure(begins, Damage::Ledger, || "changes".into(), "it does not begin where it was pruned");
    let reaches = height.is_none_or(|height| height == subject.tip.height);
    check.ensure(reaches, Damage::Ledger, || "changes".into(), "its last block is not the tip");
    Ok((entries, first == 1))
}

pub(super) fn subscriptions(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    for record in records::<Subscription>(subject.reader.tree(TreeId::Subscriptions), TreeId::Subscriptions) {
        subject.tell(check);
        match record {
            Ok((key, subscription)) => {
                let place = || format!("subscriptions/{}", subscription.subscriber_id);
                let named = key == SubscriptionKey::of(&subscription.subscriber_id).as_bytes();
                check.ensure(named, Damage::Derived, place, "it stands under another name's hash");
            }
            Err(error) => check.unreadable(Damage::Derived, "subscriptions", error)?,
        }
    }
    Ok(())
}
