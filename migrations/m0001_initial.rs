//! Schema 1: the first one. Frozen: it spells out its own names and bytes, so that later
//! changes of the program cannot change what it writes.
//!
//! Tree `utxos`: key `txid || vout (u32 BE)`, value bincode of
//! `(amount u64, (network u32, [u8; 21]), state u32 = 0)`. Tree `addresses`: key
//! `payload [u8; 21] || txid || vout (u32 BE)`, empty value. Tree `meta`: `network`
//! (given by the caller, its presence says that the filling is complete), `schema` = 1.

use crate::db::FrozenRow;
use crate::types::Genesis;

/// Outputs of the genesis that one transaction writes.
const CHUNK: usize = 2_000;

/// The genesis, in the parts in which it is written. Writing it again after a crash writes
/// the same rows again.
pub(crate) fn genesis(genesis: &Genesis) -> impl Iterator<Item = Vec<FrozenRow>> {
    let network = u32::from(genesis.network().byte());
    let mut outputs = genesis.transaction().creates();
    std::iter::from_fn(move || {
        let mut rows = Vec::new();
        for (outpoint, output) in outputs.by_ref().take(CHUNK) {
            let mut place = outpoint.txid.as_bytes().to_vec();
            place.extend_from_slice(&outpoint.vout.to_be_bytes());
            let mut row = output.amount.units().to_le_bytes().to_vec();
            row.extend_from_slice(&network.to_le_bytes());
            row.extend_from_slice(output.address.payload());
            row.extend_from_slice(&0_u32.to_le_bytes());
            let index = [output.address.payload().as_slice(), &place].concat();
            rows.push(("utxos", place, Some(row)));
            rows.push(("addresses", index, Some(Vec::new())));
        }
        (!rows.is_empty()).then_some(rows)
    })
}

/// Says, in one transaction, whose database it is and that it is whole. The caller has
/// made the genesis durable before.
///
/// The row `network` is bincode of `(network u32, genesis hash [u8; 32], Option<public key
/// [u8; 32]>, log_id [u8; 16])`.
pub(crate) fn stamp(genesis: &Genesis, public_key: Option<&[u8; 32]>, log_id: &[u8; 16]) -> Vec<FrozenRow> {
    let mut network_row = u32::from(genesis.network().byte()).to_le_bytes().to_vec();
    network_row.extend_from_slice(genesis.hash().as_bytes());
    network_row.push(u8::from(public_key.is_some()));
    network_row.extend_from_slice(public_key.map_or(&[][..], |key| key));
    network_row.extend_from_slice(log_id);
    let schema = 1_u32.to_le_bytes().to_vec();
    vec![("meta", b"schema".to_vec(), Some(schema)), ("meta", b"network".to_vec(), Some(network_row))]
}
