//! Schema 1: the first one. Frozen: it spells out its own names and bytes, so that later
//! changes of the program cannot change what it writes.
//!
//! Tree `utxos`: key `txid || vout (u32 BE)`, value bincode of
//! `(amount u64, (network u32, [u8; 21]), state u32 = 0)`. Tree `addresses`: key
//! `payload [u8; 21] || txid || vout (u32 BE)`, empty value. Tree `meta`: `network`
//! (given by the caller, its presence says that the filling is complete), `schema` = 1.

use sled::Transactional;
use sled::transaction::ConflictableTransactionError;

use crate::db::DatabaseError;
use crate::types::Genesis;

/// Outputs of the genesis that one transaction writes.
const CHUNK: usize = 2_000;

/// Writes the genesis. Running it again after a crash writes the same rows again.
pub(crate) fn fill(db: &sled::Db, genesis: &Genesis) -> Result<(), DatabaseError> {
    let utxos = db.open_tree("utxos")?;
    let addresses = db.open_tree("addresses")?;
    let network = u32::from(genesis.network().byte());
    let outputs: Vec<_> = genesis.transaction().creates().collect();
    for chunk in outputs.chunks(CHUNK) {
        (&utxos, &addresses)
            .transaction(|(utxos, addresses)| {
                for (outpoint, output) in chunk {
                    let mut place = outpoint.txid.as_bytes().to_vec();
                    place.extend_from_slice(&outpoint.vout.to_be_bytes());
                    let mut row = output.amount.units().to_le_bytes().to_vec();
                    row.extend_from_slice(&network.to_le_bytes());
                    row.extend_from_slice(output.address.payload());
                    row.extend_from_slice(&0_u32.to_le_bytes());
                    utxos.insert(place.as_slice(), row)?;
                    let index = [output.address.payload().as_slice(), &place].concat();
                    addresses.insert(index, Vec::new())?;
                }
                Ok::<(), ConflictableTransactionError<()>>(())
            })
            .map_err(storage)?;
    }
    Ok(())
}

/// Says, in one transaction, whose database it is and that it is whole. The caller has
/// made the genesis durable before.
pub(crate) fn stamp(db: &sled::Db, network_row: &[u8]) -> Result<(), DatabaseError> {
    let meta = db.open_tree("meta")?;
    meta.transaction(|meta| {
        meta.insert(b"schema".as_slice(), 1_u32.to_le_bytes().to_vec())?;
        meta.insert(b"network".as_slice(), network_row)?;
        Ok::<(), ConflictableTransactionError<()>>(())
    })
    .map_err(storage)
}

fn storage(error: sled::transaction::TransactionError<()>) -> DatabaseError {
    match error {
        sled::transaction::TransactionError::Storage(error) => DatabaseError::Sled(error),
        sled::transaction::TransactionError::Abort(()) => DatabaseError::corrupt("meta", "the transaction was aborted"),
    }
}
