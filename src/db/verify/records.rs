//! Records whose rows are all there.

use super::super::DatabaseError;
use super::super::schema::TreeId;
use super::{Check, Damage, Subject};

/// The trees whose records are split into rows, and what a missing row means.
const SPLIT: [(TreeId, Damage); 8] = [
    (TreeId::Locks, Damage::Votes),
    (TreeId::Votes, Damage::Votes),
    (TreeId::Certificates, Damage::Votes),
    (TreeId::Agreement, Damage::Votes),
    (TreeId::Transactions, Damage::Ledger),
    (TreeId::Proofs, Damage::Ledger),
    (TreeId::Blocks, Damage::Ledger),
    (TreeId::Subscriptions, Damage::Derived),
];

/// A row's key ends in its number, and its value begins with how many there are.
pub(super) fn whole(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    for id in TreeId::OF_THIS_SCHEMA {
        let tree = subject.reader.tree(*id);
        let backwards = tree.iter().rev().try_fold(0, |rows, row| row.map(|_| rows + 1_u64));
        let same = backwards? == tree.count()?;
        check.ensure(same, Damage::Ledger, || id.name().into(), "rows are passed over: a page of it has gone back");
    }
    for (tree, damage) in SPLIT {
        let mut open: Option<(Vec<u8>, u16, u16)> = None;
        for row in subject.reader.tree(tree).iter() {
            subject.tell(check);
            let (key, value) = row?;
            let place = || format!("{}/{}", tree.name(), hex::encode(&key));
            let (Some((base, part)), Some((parts, _))) = (key.split_last_chunk::<2>(), value.split_first_chunk::<2>())
            else {
                check.find(damage, place(), "it is no row of a record");
                continue;
            };
            let (part, parts) = (u16::from_be_bytes(*part), u16::from_be_bytes(*parts));
            let expected = match open.take() {
                Some((record, next, of)) if record == base => (next, of),
                Some(_) => {
                    check.find(damage, place(), "the record before it is cut off");
                    (0, parts)
                }
                None => (0, parts),
            };
            check.ensure((part, parts) == expected && parts > 0, damage, place, "a row before it is missing");
            if part.saturating_add(1) < parts {
                open = Some((base.to_vec(), part + 1, parts));
            }
        }
        check.ensure(open.is_none(), damage, || tree.name().into(), "its last record is cut off");
    }
    Ok(())
}
