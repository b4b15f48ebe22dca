//! The outputs of a transaction, four in a row, with what is remembered of the transaction in
//! the first of them.
//!
//! Rows under random keys are what a payment costs (ADR 0011). One that is settled writes one
//! row for what it makes and what is remembered of it, and rewrites one for each output that
//! it spends. Whatever else is known of an output is known of its spender: when that became
//! final, and in which block it is.

use serde::{Deserialize, Serialize};

use super::DatabaseError;
use super::codec::{RowChange, decode, encode};
use super::confirmed::{StoredConfirmed, confirmed_by_number};
use super::engine::Tree;
use super::finals::get_settled;
use super::schema::{StoredSettled, TreeId, outpoint_key, parse_outpoint_key};
use super::store::Trees;
use crate::consensus::Utxo;
use crate::types::{OutPoint, Output, Txid, UTXOState, UnixSeconds};

/// Outputs of one row.
pub(super) const OUTPUTS_IN_ROW: u32 = 4;

/// What a row says of one output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum StoredOutput {
    /// It was spent long ago, and by what is not known any more: a program of an earlier
    /// schema has pruned it.
    Forgotten,
    /// Nothing final has spent it. Whether it is locked follows from what is in flight.
    Live(Output),
    /// This transaction has spent it.
    Spent(Output, Txid),
}

impl StoredOutput {
    /// The output, as long as it is known.
    pub(super) const fn output(&self) -> Option<Output> {
        match self {
            Self::Forgotten => None,
            Self::Live(output) | Self::Spent(output, _) => Some(*output),
        }
    }

    /// What is to be written of an output in this state.
    pub(super) const fn of(utxo: &Utxo) -> Self {
        match utxo.state {
            UTXOState::Unspent | UTXOState::Locked { .. } => Self::Live(utxo.output),
            UTXOState::SpentFinalized { txid, .. } | UTXOState::Confirmed { txid, .. } => {
                Self::Spent(utxo.output, txid)
            }
        }
    }
}

/// A row of `utxos`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OutputRow {
    /// In the first row of a settled transaction. What the genesis and the fees of blocks
    /// have made is of none.
    pub(super) settled: Option<StoredSettled>,
    /// Those from the row's own `vout` on.
    pub(super) outputs: Vec<StoredOutput>,
}

impl OutputRow {
    pub(super) fn decode(row: &[u8]) -> Result<Self, DatabaseError> {
        let row: Self = decode(TreeId::Utxos, row)?;
        match row.outputs.len() <= OUTPUTS_IN_ROW as usize {
            true => Ok(row),
            false => Err(DatabaseError::corrupt(TreeId::Utxos.name(), "a row of too many outputs")),
        }
    }

    pub(super) fn get(&self, outpoint: &OutPoint) -> Option<&StoredOutput> {
        self.outputs.get((outpoint.vout % OUTPUTS_IN_ROW) as usize)
    }

    /// Puts an output into its place; what is not known of those before it is forgotten.
    pub(super) fn set(&mut self, outpoint: &OutPoint, output: StoredOutput) {
        let place = (outpoint.vout % OUTPUTS_IN_ROW) as usize;
        if self.outputs.len() <= place {
            self.outputs.resize(place + 1, StoredOutput::Forgotten);
        }
        self.outputs[place] = output;
    }

    pub(super) fn put(&self, rows: &mut Vec<RowChange>, first: &OutPoint) -> Result<(), DatabaseError> {
        let value = Some(encode(TreeId::Utxos, self)?);
        rows.push(RowChange { tree: TreeId::Utxos, key: outpoint_key(first).to_vec(), value });
        Ok(())
    }

    /// All of them with their places.
    pub(super) fn each(&self, first: OutPoint) -> impl Iterator<Item = (OutPoint, StoredOutput)> + use<'_> {
        let place = move |vout| OutPoint { vout, ..first };
        (first.vout..=u32::MAX).map(place).zip(self.outputs.iter().copied())
    }
}

/// The first output of the row that tells of this one.
pub(super) const fn row_of(outpoint: &OutPoint) -> OutPoint {
    OutPoint { txid: outpoint.txid, vout: outpoint.vout - outpoint.vout % OUTPUTS_IN_ROW }
}

/// The first output of the row with this key.
pub(super) fn parse_row_key(key: &[u8]) -> Result<OutPoint, DatabaseError> {
    let first = parse_outpoint_key(key).filter(|first| first.vout.is_multiple_of(OUTPUTS_IN_ROW));
    first.ok_or_else(|| DatabaseError::corrupt(TreeId::Utxos.name(), "a key that no row has"))
}

/// All rows, in order of key.
pub(super) fn output_rows(tree: &Tree) -> impl Iterator<Item = Result<(OutPoint, OutputRow), DatabaseError>> + use<> {
    tree.iter().map(|row| {
        let (key, row) = row?;
        Ok((parse_row_key(&key)?, OutputRow::decode(&row)?))
    })
}

/// The row that begins with this output.
pub(super) fn get_row(trees: &Trees, first: &OutPoint) -> Result<Option<OutputRow>, DatabaseError> {
    let row = trees.get(TreeId::Utxos).get(outpoint_key(first))?;
    row.map(|row| OutputRow::decode(&row)).transpose()
}

/// What the trees say of one output.
pub(super) fn get_output(trees: &Trees, outpoint: &OutPoint) -> Result<Option<StoredOutput>, DatabaseError> {
    Ok(get_row(trees, &row_of(outpoint))?.and_then(|row| row.get(outpoint).copied()))
}

/// An output where it stands, unless it is forgotten. `lock` says for what it is locked, if it
/// is live.
pub(super) fn utxo_of(
    trees: &Trees,
    stored: &StoredOutput,
    lock: Option<(Txid, UnixSeconds)>,
) -> Result<Option<Utxo>, DatabaseError> {
    let (output, state) = match *stored {
        StoredOutput::Forgotten => return Ok(None),
        StoredOutput::Live(output) => {
            let locked = |(txid, locked_at)| UTXOState::Locked { txid, locked_at };
            (output, lock.map_or(UTXOState::Unspent, locked))
        }
        StoredOutput::Spent(output, txid) => (output, spent_by(trees, txid)?),
    };
    Ok(Some(Utxo { output, state }))
}

/// Where an output stands that this transaction has spent.
fn spent_by(trees: &Trees, txid: Txid) -> Result<UTXOState, DatabaseError> {
    let unsettled = || DatabaseError::corrupt(TreeId::Utxos.name(), format!("{txid} spends, and is not settled here"));
    let StoredSettled { settled, number } = get_settled(trees, &txid)?.ok_or_else(unsettled)?;
    Ok(match confirmed_by_number(trees, number)? {
        Some(StoredConfirmed { height: block_height, confirmed_at }) => {
            UTXOState::Confirmed { txid, block_height, confirmed_at }
        }
        None => UTXOState::SpentFinalized { txid, finalized_at: settled.finalized_at, votes: settled.votes },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::Settled;
    use crate::db::samples::genesis;
    use crate::types::Amount;

    fn place(vout: u32) -> OutPoint {
        OutPoint { txid: Txid::from_bytes([3; 32]), vout }
    }

    /// Frozen: migrations and operators' scripts spell it out.
    #[test]
    fn a_row_is_what_schema_6_says() {
        let output = genesis().transaction().outputs()[0];
        let settled = Settled { finalized_at: 5, votes: 3, fee: Amount::from_units(7).unwrap() };
        let settled = StoredSettled { settled, number: 9 };
        let mut row = OutputRow { settled: Some(settled), outputs: Vec::new() };
        row.set(&place(1), StoredOutput::Live(output));
        row.set(&place(2), StoredOutput::Spent(output, Txid::from_bytes([4; 32])));
        let mut expected = vec![1];
        expected.extend([5_i64.to_le_bytes().as_slice(), &3_u32.to_le_bytes(), &7_u64.to_le_bytes()].concat());
        expected.extend(9_u64.to_le_bytes());
        expected.extend(3_u64.to_le_bytes());
        let money = [&output.amount.units().to_le_bytes(), &[2, 0, 0, 0][..], output.address.payload()].concat();
        expected.extend([&[0; 4], &[1, 0, 0, 0][..], &money, &[2, 0, 0, 0], &money, &[4; 32]].concat());
        let mut rows = Vec::new();
        row.put(&mut rows, &place(0)).unwrap();
        assert_eq!(hex::encode(rows[0].value.as_ref().unwrap()), hex::encode(&expected));
        assert_eq!(OutputRow::decode(&expected).unwrap(), row);
        let none = OutputRow::default();
        none.put(&mut rows, &place(0)).unwrap();
        assert_eq!(rows[1].value.as_deref(), Some(&[0; 9][..]));
    }

    #[test]
    fn each_output_is_found_in_the_row_that_tells_of_it() {
        let output = genesis().transaction().outputs()[0];
        assert_eq!([0, 3, 4, 255].map(|vout| row_of(&place(vout)).vout), [0, 0, 4, 252]);
        let mut row = OutputRow::default();
        row.set(&place(6), StoredOutput::Live(output));
        assert_eq!(row.get(&place(6)), Some(&StoredOutput::Live(output)));
        assert_eq!((row.get(&place(5)), row.get(&place(7))), (Some(&StoredOutput::Forgotten), None));
        let all: Vec<_> = row.each(place(4)).map(|(outpoint, _)| outpoint.vout).collect();
        assert_eq!(all, [4, 5, 6]);
        assert!(parse_row_key(&outpoint_key(&place(6))).is_err() && parse_row_key(&outpoint_key(&place(4))).is_ok());
        row.outputs.resize(5, StoredOutput::Forgotten);
        let mut rows = Vec::new();
        row.put(&mut rows, &place(4)).unwrap();
        assert!(OutputRow::decode(rows[0].value.as_ref().unwrap()).is_err(), "no row has five");
    }
}
