//! The outputs of an export: together they have to be exactly those that the chain and what
//! is settled outside it leave, and each has to stand where it can.

use std::collections::BTreeMap;

use super::super::DatabaseError;
use super::super::confirmed::{StoredConfirmed, get_confirmed};
use super::super::outputs::{OutputRow, StoredOutput, get_row, row_of};
use super::super::schema::{TreeId, address_key};
use super::ImportFault;
use super::import::{Import, Stop};
use crate::consensus::Utxo;
use crate::types::{OutPoint, Output, Txid, UTXOState, UnixSeconds, UtxoDigest, UtxoEntry};

/// The outputs so far.
#[derive(Debug, Default)]
pub(super) struct Coins {
    last: Option<OutPoint>,
    /// How many there were.
    pub(super) listed: u64,
    /// Of those that the chain has made and not spent.
    digest: UtxoDigest,
    live: u64,
    /// Outputs that something final has spent and no block yet.
    spent: u64,
    /// Outputs that something final has made and no block yet.
    made: u64,
    maker: Option<(Txid, Maker)>,
    /// The row of those that come now, and its first.
    row: Option<(OutPoint, OutputRow)>,
    /// What is locked, for what and since when; bounded by what can be in flight.
    pub(super) locks: BTreeMap<OutPoint, (Txid, UnixSeconds)>,
}

/// Who made the outputs of one txid.
#[derive(Debug, Clone)]
enum Maker {
    /// The genesis or a transaction, which may be in the chain or not.
    Body { outputs: Vec<Output>, in_chain: bool },
    /// A block, or nobody.
    Other,
}

impl Import<'_> {
    pub(super) fn output(&mut self, entry: &UtxoEntry) -> Result<(), Stop> {
        let UtxoEntry { outpoint, output, state } = *entry;
        if self.coins.last.is_some_and(|last| last >= outpoint) {
            return Err(ImportFault::Unsorted.into());
        }
        self.coins.last = Some(outpoint);
        self.coins.listed += 1;
        let in_chain = self.is_made(&outpoint, &output, &state)?;
        self.check_state(&outpoint, &state)?;
        let confirmed = matches!(state, UTXOState::Confirmed { .. });
        if in_chain && !confirmed {
            self.coins.digest.add(&outpoint, &output);
        }
        if !in_chain {
            if confirmed {
                return Err(ImportFault::State("a block has spent it, and none has made it").into());
            }
            self.coins.made += 1;
        }
        if state.is_live() {
            self.coins.live = self.coins.live.saturating_add(output.amount.units());
            self.put(TreeId::Addresses, &address_key(&output.address, &outpoint), Vec::new());
        }
        self.coins.spent += u64::from(matches!(state, UTXOState::SpentFinalized { .. }));
        // That it is locked, and since when its spender is final or in the chain, stands elsewhere.
        if let UTXOState::Locked { txid, locked_at } = state {
            self.coins.locks.insert(outpoint, (txid, locked_at));
        }
        let first = row_of(&outpoint);
        if self.coins.row.as_ref().is_none_or(|(open, _)| *open != first) {
            self.end_row()?;
            let row = get_row(&self.storage.trees, &first)?.unwrap_or_default();
            self.coins.row = Some((first, row));
        }
        if let Some((_, row)) = &mut self.coins.row {
            row.set(&outpoint, StoredOutput::of(&Utxo { output, state }));
        }
        Ok(())
    }

    /// No more outputs of the row that was begun will come.
    pub(super) fn end_row(&mut self) -> Result<(), DatabaseError> {
        match self.coins.row.take() {
            Some((first, row)) => row.put(&mut self.rows, &first),
            None => Ok(()),
        }
    }

    /// Whether the chain has made it; if nothing has, it is refused.
    fn is_made(&mut self, outpoint: &OutPoint, output: &Output, state: &UTXOState) -> Result<bool, Stop> {
        let known = self.coins.maker.as_ref().is_some_and(|(txid, _)| *txid == outpoint.txid);
        if !known {
            let maker = self.maker(&outpoint.txid)?;
            self.coins.maker = Some((outpoint.txid, maker));
        }
        let (made, in_chain) = match &self.coins.maker {
            Some((_, Maker::Body { outputs, in_chain })) => {
                let at = usize::try_from(outpoint.vout).unwrap_or(usize::MAX);
                (outputs.get(at) == Some(output), *in_chain)
            }
            // A block's fees have a row as long as no block has spent them. Those that were
            // spent are nobody's money any more, and nothing else tells of them.
            _ => match self.utxo(outpoint)? {
                Some(fees) => (fees.output == *output, true),
                None => (outpoint.vout == 0 && matches!(state, UTXOState::Confirmed { .. }), true),
            },
        };
        if made { Ok(in_chain) } else { Err(ImportFault::NotMade.into()) }
    }

    fn maker(&self, txid: &Txid) -> Result<Maker, Stop> {
        let genesis = self.genesis.transaction();
        if genesis.txid() == *txid {
            return Ok(Maker::Body { outputs: genesis.outputs().to_vec(), in_chain: true });
        }
        let Some(transaction) = self.body(txid)? else { return Ok(Maker::Other) };
        let in_chain = self.confirmed(txid)?.is_some();
        Ok(Maker::Body { outputs: transaction.outputs().to_vec(), in_chain })
    }

    fn confirmed(&self, txid: &Txid) -> Result<Option<StoredConfirmed>, Stop> {
        Ok(get_confirmed(&self.storage.trees, txid)?)
    }

    fn check_state(&self, outpoint: &OutPoint, state: &UTXOState) -> Result<(), Stop> {
        let spends = |mut spends: Box<dyn Iterator<Item = OutPoint> + '_>| spends.any(|spent| spent == *outpoint);
        let wrong = match *state {
            UTXOState::Unspent => None,
            UTXOState::Locked { txid, locked_at } => {
                let flight = self.flights.get(&txid).filter(|flight| flight.locked_at == Some(locked_at));
                let held = flight.is_some_and(|flight| spends(Box::new(flight.transaction.spends())));
                (!held).then_some("what it is locked for is not in flight since then, or does not spend it")
            }
            UTXOState::SpentFinalized { txid, .. } => {
                let spent = self.body(&txid)?.is_some_and(|transaction| spends(Box::new(transaction.spends())));
                let open = self.confirmed(&txid)?.is_none();
                (!spent || !open).then_some("what has spent it is not settled outside the chain, or does not spend it")
            }
            UTXOState::Confirmed { txid, block_height: height, confirmed_at } => {
                let spent = self.body(&txid)?.is_some_and(|transaction| spends(Box::new(transaction.spends())));
                let there = self.confirmed(&txid)? == Some(StoredConfirmed { height, confirmed_at });
                (!spent || !there)
                    .then_some("what has spent it is not in that block at that time, or does not spend it")
            }
        };
        wrong.map_or(Ok(()), |wrong| Err(ImportFault::State(wrong).into()))
    }

    /// Whether what was locked for something in flight is locked for it, or spent by a rival.
    fn locks_are_held(&self) -> Result<bool, Stop> {
        for (txid, flight) in self.flights.iter().filter(|(_, flight)| flight.locked_at.is_some()) {
            for outpoint in flight.transaction.spends() {
                let held = match self.utxo(&outpoint)?.map(|utxo| utxo.state) {
                    Some(UTXOState::SpentFinalized { .. } | UTXOState::Confirmed { .. }) => true,
                    Some(UTXOState::Unspent | UTXOState::Locked { .. }) => {
                        self.coins.locks.get(&outpoint).is_some_and(|(holder, _)| holder == txid)
                    }
                    None => false,
                };
                if !held {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// What all of them together have to be.
    pub(super) fn check_sums(&self) -> Result<(), Stop> {
        let coins = &self.coins;
        let wrong = if coins.digest.digest() != self.tip.digest.digest() {
            Some("those of the chain have another digest")
        } else if coins.made != self.unconfirmed_outputs {
            Some("some that are final and in no block are missing")
        } else if coins.spent != self.unconfirmed_inputs {
            Some("some that are spent by what is final and in no block are missing, or not spent")
        } else if !self.locks_are_held()? {
            Some("some that are locked for what is in flight do not say so")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            return Err(ImportFault::Outputs(wrong).into());
        }
        let (live, fees, supply) = (coins.live, self.unpaid_fees, self.tip.supply.units());
        if live.saturating_add(fees) != supply {
            return Err(ImportFault::Supply { live, fees, supply }.into());
        }
        Ok(())
    }
}
