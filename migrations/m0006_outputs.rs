//! Schema 6: the outputs of a transaction four in a row, with what is remembered of it; bodies
//! in `transactions`. Frozen: it spells out its own names and bytes.
//!
//! A row of `utxos` has the key `txid || vout u32 BE`, with the `vout` of its first output, a
//! multiple of four. Its value:
//!
//! - `0`, or `1 || settled [u8; 20] || number u64` in the first row of a settled transaction;
//! - `count u64`, then for each output `tag u32` and what belongs to it: 0, it was spent and is
//!   forgotten; 1, live: `output [u8; 33]`; 2, spent: `output [u8; 33] || the spender's txid`.
//!
//! A record of `transactions` stands under the number of its first body (`u64 BE`) and is a list:
//! `count u64`, then the bodies. It has as many as fit into a part, and at least one.
//!
//! A new row of `meta`, if there is a row `pruned`: `forgotten`, `u64`. What blocks up to this height
//! have spent may be forgotten: outputs are not pruned any more.
//!
//! In schema 5 there was a row for each output, `output || state`, until it was pruned;
//! `transactions` had a row `settled || number` under each txid; and the bodies stood in
//! `bodies`, each a record under its number.
//!
//! A record's rows have the keys `key || part u16 BE`, and values that begin with the number
//! of parts (`u16 BE`); a part has at most 7,168 bytes.
//!
//! All of it is one transaction, so it takes memory for all that it changes. No schema
//! before this one was released.

use std::collections::BTreeMap;

use crate::db::{FrozenRow, FrozenRows};

const OUTPUTS_IN_ROW: u32 = 4;
const TXID_BYTES: usize = 32;
const SETTLED_BYTES: usize = 8 + 4 + 8;
const NUMBER_BYTES: usize = 8;
const PART_BYTES: usize = 7 * 1024;
/// An outpoint, a key, a signature.
const INPUT_BYTES: usize = 32 + 4 + 32 + 64;
/// An amount, a network, an address payload.
const OUTPUT_BYTES: usize = 8 + 4 + 21;
/// Tags of an output's state in schema 5; a spender follows those but the first.
const UNSPENT: u32 = 0;
const SPENT_FINALIZED: u32 = 2;
const CONFIRMED: u32 = 3;

/// What stands in the place of an output.
const FORGOTTEN: [u8; 4] = 0_u32.to_le_bytes();
const LIVE: [u8; 4] = 1_u32.to_le_bytes();
const SPENT: [u8; 4] = 2_u32.to_le_bytes();

/// The rows of one transaction, or of what is none: what is remembered of it, and the outputs by
/// their place.
#[derive(Default)]
struct Made {
    settled: Option<Vec<u8>>,
    outputs: BTreeMap<u32, Vec<u8>>,
}

/// What it writes and removes, atomically with its stamp; `None` if a row is not what schema
/// 5 wrote. `read` gives all rows of a tree.
pub(crate) fn rows<E>(read: impl Fn(&'static str) -> Result<FrozenRows, E>) -> Result<Option<Vec<FrozenRow>>, E> {
    let (utxos, transactions, bodies) = (read("utxos")?, read("transactions")?, read("bodies")?);
    let pruned = read("meta")?.remove(b"pruned".as_slice());
    Ok(from(utxos, transactions, bodies, pruned.as_deref()))
}

fn from(
    utxos: FrozenRows,
    transactions: FrozenRows,
    bodies: FrozenRows,
    pruned: Option<&[u8]>,
) -> Option<Vec<FrozenRow>> {
    let mut made: BTreeMap<Vec<u8>, Made> = BTreeMap::new();
    for (txid, row) in &transactions {
        let (_, number) = row.split_at_checked(SETTLED_BYTES)?;
        let number = u64::from_le_bytes(number.try_into().ok()?).to_be_bytes();
        let outputs = outputs_of(&body_of(&bodies, &number)?)?;
        let forgotten = (0..outputs).map(|vout| (vout, FORGOTTEN.to_vec())).collect();
        made.insert(txid.clone(), Made { settled: Some(row.clone()), outputs: forgotten });
    }
    let mut out: Vec<FrozenRow> = Vec::new();
    for (key, row) in utxos {
        let (txid, vout) = key.split_at_checked(TXID_BYTES)?;
        let vout = u32::from_be_bytes(vout.try_into().ok()?);
        let (output, state) = row.split_at_checked(OUTPUT_BYTES)?;
        let (tag, rest) = state.split_first_chunk()?;
        let stored = match u32::from_le_bytes(*tag) {
            UNSPENT if rest.is_empty() => [&LIVE, output].concat(),
            SPENT_FINALIZED | CONFIRMED => [&SPENT, output, rest.get(..TXID_BYTES)?].concat(),
            _ => return None,
        };
        made.entry(txid.to_vec()).or_default().outputs.insert(vout, stored);
        out.push(("utxos", key, None));
    }
    let mut written = BTreeMap::new();
    for (txid, made) in made {
        written.extend(rows_of(&txid, &made)?);
    }
    // A key that is written is not removed.
    out.retain(|(_, key, _)| !written.contains_key(key));
    out.extend(written.into_iter().map(|(key, row)| ("utxos", key, Some(row))));
    out.extend(transactions.into_keys().map(|txid| ("transactions", txid, None)));
    out.extend(records_of(&bodies)?.into_iter().map(|(key, row)| ("transactions", key, Some(row))));
    out.extend(bodies.into_keys().map(|key| ("bodies", key, None)));
    if let Some(pruned) = pruned {
        let height = u64::from_le_bytes(*pruned.first_chunk()?).checked_add(1)?;
        out.push(("meta", b"forgotten".to_vec(), Some(height.to_le_bytes().to_vec())));
    }
    out.push(("meta", b"schema".to_vec(), Some(6_u32.to_le_bytes().to_vec())));
    Some(out)
}

/// The rows with the outputs of one txid.
fn rows_of(txid: &[u8], made: &Made) -> Option<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut rows: BTreeMap<u32, Vec<&[u8]>> = BTreeMap::new();
    if made.settled.is_some() {
        rows.insert(0, Vec::new());
    }
    for (vout, output) in &made.outputs {
        let (first, place) = (vout - vout % OUTPUTS_IN_ROW, usize::try_from(vout % OUTPUTS_IN_ROW).ok()?);
        let row = rows.entry(first).or_default();
        // Before it may be what was pruned.
        row.resize(place, &FORGOTTEN);
        row.push(output);
    }
    let mut out = BTreeMap::new();
    for (first, outputs) in rows {
        let mut row = match made.settled.as_ref().filter(|_| first == 0) {
            Some(settled) => [&[1], settled.as_slice()].concat(),
            None => vec![0],
        };
        row.extend(u64::try_from(outputs.len()).ok()?.to_le_bytes());
        row.extend(outputs.concat());
        out.insert([txid, &first.to_be_bytes()].concat(), row);
    }
    Some(out)
}

/// The body of a number, put together from its parts.
fn body_of(bodies: &FrozenRows, number: &[u8; NUMBER_BYTES]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    for (_, row) in bodies.range(number.to_vec()..).take_while(|(key, _)| key.starts_with(number)) {
        body.extend_from_slice(row.get(2..)?);
    }
    Some(body)
}

/// How many outputs a body has: after the inputs comes their count.
fn outputs_of(body: &[u8]) -> Option<u32> {
    let count = |bytes: &[u8]| Some(u64::from_le_bytes(*bytes.first_chunk()?));
    let inputs = usize::try_from(count(body)?).ok()?;
    let outputs = count(body.get(8..)?.get(inputs.checked_mul(INPUT_BYTES)?..)?)?;
    u32::try_from(outputs).ok().filter(|_| outputs <= (body.len() / OUTPUT_BYTES) as u64)
}

/// Bodies of one record: the number of the first, how many they are, and they.
#[derive(Default)]
struct Together {
    first: u64,
    count: u64,
    list: Vec<u8>,
}

/// The bodies, whose numbers have no gap, as many together as fit into a part.
fn records_of(bodies: &FrozenRows) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let (mut out, mut open) = (Vec::new(), Together::default());
    for key in bodies.keys().filter(|key| key.ends_with(&[0, 0])) {
        let number: [u8; NUMBER_BYTES] = key.get(..NUMBER_BYTES)?.try_into().ok()?;
        let body = body_of(bodies, &number)?;
        let number = u64::from_be_bytes(number);
        if open.count > 0 && 8 + open.list.len() + body.len() > PART_BYTES {
            out.extend(parts(&std::mem::take(&mut open))?);
        }
        if open.count == 0 {
            open.first = number;
        }
        if open.first.checked_add(open.count)? != number {
            return None;
        }
        open.count += 1;
        open.list.extend(body);
    }
    if open.count > 0 {
        out.extend(parts(&open)?);
    }
    Some(out)
}

/// The rows of one record.
fn parts(Together { first, count, list }: &Together) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let record = [&count.to_le_bytes(), list.as_slice()].concat();
    let parts = u16::try_from(record.len().div_ceil(PART_BYTES)).ok()?;
    let row = |(part, bytes): (u16, &[u8])| {
        ([first.to_be_bytes().as_slice(), &part.to_be_bytes()].concat(), [&parts.to_be_bytes(), bytes].concat())
    };
    Some((0..parts).zip(record.chunks(PART_BYTES)).map(row).collect())
}
