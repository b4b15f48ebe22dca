//! Values whose signatures have been checked.

use std::sync::Arc;

use super::block::CheckedBlock;
use super::certificate::CheckedCertificate;
use super::event::{Event, Source};
use super::validate::SignedTransaction;
use super::vote::MemberBatch;
use crate::types::{SignatureItem, verify_batch};

/// Something with signatures that can be checked without knowing the ledger.
pub trait Signed {
    /// Every signature that has to be valid.
    fn signature_items(&self) -> Vec<SignatureItem>;
}

/// A value all of whose signatures are valid (or were made by this node).
///
/// Only the functions of this module make one from what came from outside, so code that
/// takes a `Verified<T>` cannot be reached by a forgery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified<T>(T);

impl<T> Verified<T> {
    /// The value.
    pub const fn get(&self) -> &T {
        &self.0
    }

    /// The value, by value.
    pub fn into_inner(self) -> T {
        self.0
    }

    /// What this node signed itself, or verified before it stored it.
    pub(crate) const fn made_here(value: T) -> Self {
        Self(value)
    }
}

impl<T: Signed> Verified<T> {
    /// Checks one value; gives it back if a signature is bad.
    pub fn check(value: T) -> Result<Self, T> {
        if verify_batch(&value.signature_items()) { Ok(Self(value)) } else { Err(value) }
    }

    /// Checks many together. Only if the batch fails is each checked alone, so that one
    /// bad value costs its neighbours time and nothing else.
    pub fn check_all(values: Vec<T>) -> Vec<Result<Self, T>> {
        let items: Vec<Vec<SignatureItem>> = values.iter().map(Signed::signature_items).collect();
        if verify_batch(items.iter().flatten()) {
            return values.into_iter().map(|value| Ok(Self(value))).collect();
        }
        let check = |(value, items): (T, Vec<SignatureItem>)| {
            if verify_batch(&items) { Ok(Self(value)) } else { Err(value) }
        };
        values.into_iter().zip(items).map(check).collect()
    }
}

/// What comes from outside under signatures: all kinds, for checking them together.
#[derive(Debug, Clone)]
pub enum Signable {
    /// A transaction, signed by the owners of its inputs.
    Transaction(SignedTransaction),
    /// Votes of a member.
    Votes(MemberBatch),
    /// Votes of a quorum.
    Certificate(CheckedCertificate),
    /// Decided blocks, in order of height.
    Blocks(Vec<CheckedBlock>),
}

impl Signed for Signable {
    fn signature_items(&self) -> Vec<SignatureItem> {
        match self {
            Self::Transaction(transaction) => transaction.signature_items(),
            Self::Votes(batch) => batch.signature_items(),
            Self::Certificate(certificate) => certificate.signature_items(),
            Self::Blocks(blocks) => blocks.iter().flat_map(Signed::signature_items).collect(),
        }
    }
}

impl Verified<Signable> {
    /// The event that it is to the machine; `source` says who sent it. `None` for blocks
    /// that no member sent.
    pub fn into_event(self, source: Source) -> Option<Event> {
        Some(match self.0 {
            Signable::Transaction(transaction) => Event::Transaction { transaction: Verified(transaction), source },
            Signable::Votes(batch) => Event::Votes(Arc::new(Verified(batch))),
            Signable::Certificate(certificate) => Event::Certificate(Verified(certificate)),
            Signable::Blocks(blocks) => {
                let Source::Member(from) = source else { return None };
                Event::Blocks { from, blocks: blocks.iter().map(|block| Arc::clone(block.decided())).collect() }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::SecretKey;

    struct Note(u8, bool);

    impl Signed for Note {
        fn signature_items(&self) -> Vec<SignatureItem> {
            let key = SecretKey::from_seed([self.0; 32]);
            let message: &[u8] = if self.1 { b"note" } else { b"forged" };
            vec![SignatureItem::new(&key.public_key(), message, &key.sign(b"note"))]
        }
    }

    #[test]
    fn one_forgery_does_not_spoil_its_neighbours() {
        let results = Verified::check_all(vec![Note(1, true), Note(2, false), Note(3, true)]);
        let outcome: Vec<_> = results.iter().map(Result::is_ok).collect();
        assert_eq!(outcome, [true, false, true]);
        assert!(Verified::check_all(vec![Note(1, true), Note(2, true)]).iter().all(Result::is_ok));
        assert!(Verified::check(Note(1, false)).is_err());
    }
}
