//! Copies of a transaction under keys that own none of its coins.
//!
//! A txid covers neither keys nor signatures, so anybody can put somebody else's
//! transaction under a key of his own and sign it validly. Such a copy breaks a rule and
//! spends nothing. It must not take the place of the right one either, wherever a body is
//! kept before the rules can be applied to it: beside votes and certificates, in the room
//! of those that wait for their parents, and for decided blocks.

use std::sync::Arc;

use super::machine::{Machine, Step};
use super::view::View;
use crate::types::{Address, OutPoint, Transaction, Txid};

impl Machine {
    /// Whether a key of this copy is known not to own what it spends. Of what is not here
    /// nobody can tell, so the same copy has to be looked at again when its parents are.
    pub(super) fn is_foreign(&self, view: &impl View, copy: &Transaction) -> bool {
        let stolen = |owner: Address, key| !owner.is_owned_by(key);
        let mut inputs = copy.inputs().iter();
        inputs.any(|input| self.owner(view, &input.previous_output).is_some_and(|o| stolen(o, &input.public_key)))
    }

    /// Whose an output is, or will be: a parent's txid covers its outputs, under whatever
    /// keys it came.
    fn owner(&self, view: &impl View, outpoint: &OutPoint) -> Option<Address> {
        if let Some(utxo) = view.utxo(outpoint) {
            return Some(utxo.output.address);
        }
        let in_flight = self.pending.get(&outpoint.txid).and_then(|pending| pending.transaction.clone());
        let parent = in_flight.or_else(|| self.follow.body(&outpoint.txid))?;
        let vout = usize::try_from(outpoint.vout).ok()?;
        parent.outputs().get(vout).map(|output| output.address)
    }

    /// The body of a pending transaction, unless it is a copy under foreign keys.
    pub(super) fn own_body(&self, view: &impl View, txid: &Txid) -> Option<Arc<Transaction>> {
        let body = self.pending.get(txid).and_then(|pending| pending.transaction.clone());
        body.filter(|body| !self.is_foreign(view, body))
    }

    /// Something is to be done with a pending transaction whose inputs are all here: if its
    /// body is a copy under foreign keys, it is thrown away and the right one is asked for.
    /// Whether it was so.
    pub(super) fn throw_away_foreign<V: View>(&mut self, step: &mut Step<'_, V>, copy: &Transaction) -> bool {
        let foreign = self.is_foreign(&step.view(), copy);
        if foreign {
            let txid = copy.txid();
            tracing::warn!(%txid, "a body under keys that own nothing");
            self.pending.detach(&txid);
            self.find_body(step, txid);
        }
        foreign
    }
}
