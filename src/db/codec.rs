//! Records as rows: bincode, split where a value would become a blob.

use std::ops::Bound;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::DatabaseError;
use super::engine::Tree;
use super::schema::TreeId;
use crate::limits::MAX_ROW_BYTES;

/// One row to write (`Some`) or to remove (`None`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RowChange {
    pub(super) tree: TreeId,
    pub(super) key: Vec<u8>,
    pub(super) value: Option<Vec<u8>>,
}

/// Each row of a record begins with how many there are.
const PARTS_BYTES: usize = size_of::<u16>();
/// Room that a row mostly needs.
const ROW_CAPACITY: usize = 256;

pub(super) fn encode<T: Serialize>(tree: TreeId, value: &T) -> Result<Vec<u8>, DatabaseError> {
    let mut bytes = Vec::with_capacity(ROW_CAPACITY);
    append(tree, &mut bytes, value)?;
    Ok(bytes)
}

/// Writes a value behind what is there.
fn append<T: Serialize>(tree: TreeId, bytes: &mut Vec<u8>, value: &T) -> Result<(), DatabaseError> {
    bincode::serialize_into(bytes, value).map_err(|e| DatabaseError::corrupt(tree.name(), e))
}

pub(super) fn decode<T: DeserializeOwned>(tree: TreeId, bytes: &[u8]) -> Result<T, DatabaseError> {
    // Fixed-width integers, as `serialize` writes them; a hostile length in a damaged row
    // cannot make it allocate more than the row holds.
    use bincode::Options;
    bincode::DefaultOptions::new()
        .with_fixint_encoding()
        .with_limit(64 * 1024 * 1024)
        .deserialize(bytes)
        .map_err(|e| DatabaseError::corrupt(tree.name(), e))
}

fn part_key(key: &[u8], part: u16) -> Vec<u8> {
    let mut full = Vec::with_capacity(key.len() + 2);
    full.extend_from_slice(key);
    full.extend_from_slice(&part.to_be_bytes());
    full
}

fn part_count(bytes: usize) -> Result<u16, DatabaseError> {
    u16::try_from(bytes.div_ceil(MAX_ROW_BYTES).max(1)).map_err(|_| DatabaseError::corrupt("any", "record too long"))
}

/// Writes a record under `key`: each row begins with the number of rows.
pub(super) fn put_record<T: Serialize>(
    rows: &mut Vec<RowChange>,
    tree: TreeId,
    key: &[u8],
    value: &T,
) -> Result<(), DatabaseError> {
    let mut record = Vec::with_capacity(ROW_CAPACITY);
    record.extend_from_slice(&[0; PARTS_BYTES]);
    append(tree, &mut record, value)?;
    put_bytes(rows, tree, key, record)
}

/// Writes a record whose bytes stand behind the room for the number of rows. Mostly that is one,
/// and then nothing is written twice.
fn put_bytes(rows: &mut Vec<RowChange>, tree: TreeId, key: &[u8], mut record: Vec<u8>) -> Result<(), DatabaseError> {
    let parts = part_count(record.len() - PARTS_BYTES)?;
    if parts == 1 {
        record[..PARTS_BYTES].copy_from_slice(&parts.to_be_bytes());
        rows.push(RowChange { tree, key: part_key(key, 0), value: Some(record) });
        return Ok(());
    }
    for (part, chunk) in (0..parts).zip(record[PARTS_BYTES..].chunks(MAX_ROW_BYTES)) {
        let row = [&parts.to_be_bytes(), chunk].concat();
        rows.push(RowChange { tree, key: part_key(key, part), value: Some(row) });
    }
    Ok(())
}

/// Writes items that have consecutive numbers as rows of lists, each under the number of its first
/// item and with as many as fit into a row: how many, then each.
pub(super) fn put_lists<T: Serialize>(
    rows: &mut Vec<RowChange>,
    tree: TreeId,
    first: u64,
    items: impl Iterator<Item = T>,
) -> Result<(), DatabaseError> {
    gather(tree, 0, first, items, |first, row| {
        rows.push(RowChange { tree, key: first.to_be_bytes().to_vec(), value: Some(row) });
        Ok(())
    })
}

/// The same as records: an item that does not fit into a row has a record of its own.
pub(super) fn put_list_records<T: Serialize>(
    rows: &mut Vec<RowChange>,
    tree: TreeId,
    first: u64,
    items: impl Iterator<Item = T>,
) -> Result<(), DatabaseError> {
    gather(tree, PARTS_BYTES, first, items, |first, record| put_bytes(rows, tree, &first.to_be_bytes(), record))
}

/// Gathers items into lists behind so many bytes of room, and gives each with the number of its
/// first item.
fn gather<T: Serialize>(
    tree: TreeId,
    room: usize,
    mut first: u64,
    items: impl Iterator<Item = T>,
    mut put: impl FnMut(u64, Vec<u8>) -> Result<(), DatabaseError>,
) -> Result<(), DatabaseError> {
    let counted = room..room + size_of::<u64>();
    let (mut list, mut count) = (vec![0; counted.end], 0_u64);
    for item in items {
        let end = list.len();
        append(tree, &mut list, &item)?;
        if list.len() - room > MAX_ROW_BYTES && count > 0 {
            let next = [vec![0; counted.end].as_slice(), &list[end..]].concat();
            list.truncate(end);
            list[counted.clone()].copy_from_slice(&count.to_le_bytes());
            put(first, std::mem::replace(&mut list, next))?;
            (first, count) = (first + count, 0);
        }
        count += 1;
    }
    if count == 0 {
        return Ok(());
    }
    list[counted].copy_from_slice(&count.to_le_bytes());
    put(first, list)
}

/// Removes a record of `parts` rows.
pub(super) fn remove_record(rows: &mut Vec<RowChange>, tree: TreeId, key: &[u8], parts: u16) {
    rows.extend((0..parts).map(|part| RowChange { tree, key: part_key(key, part), value: None }));
}

/// The number of rows of the record at `key`; 0 if there is none.
pub(super) fn record_parts(tree: &Tree, id: TreeId, key: &[u8]) -> Result<u16, DatabaseError> {
    let Some(row) = tree.get(part_key(key, 0))? else { return Ok(0) };
    split_row(id, &row).map(|(parts, _)| parts)
}

fn split_row(tree: TreeId, row: &[u8]) -> Result<(u16, &[u8]), DatabaseError> {
    let (parts, rest) = row
        .split_first_chunk::<2>()
        .ok_or_else(|| DatabaseError::corrupt(tree.name(), "a row without its part count"))?;
    match u16::from_be_bytes(*parts) {
        0 => Err(DatabaseError::corrupt(tree.name(), "a record of no rows")),
        parts => Ok((parts, rest)),
    }
}

/// Reads the record at `key`.
pub(super) fn get_record<T: DeserializeOwned>(tree: &Tree, id: TreeId, key: &[u8]) -> Result<Option<T>, DatabaseError> {
    let Some(first) = tree.get(part_key(key, 0))? else { return Ok(None) };
    let (parts, bytes) = split_row(id, &first)?;
    if parts == 1 {
        return decode(id, bytes).map(Some);
    }
    let mut whole = bytes.to_vec();
    for part in 1..parts {
        let Some(row) = tree.get(part_key(key, part))? else {
            // The writer may have removed the record between two looks, all of it at once.
            let removed = tree.get(part_key(key, 0))?.is_none();
            let torn = || DatabaseError::corrupt(id.name(), "a record with a missing row");
            return if removed { Ok(None) } else { Err(torn()) };
        };
        whole.extend_from_slice(split_row(id, &row)?.1);
    }
    decode(id, &whole).map(Some)
}

/// A row's key taken apart: the record's key, and which of its rows it is.
pub(super) fn split_row_key(key: &[u8]) -> Option<(&[u8], u16)> {
    let (base, part) = key.split_last_chunk::<2>()?;
    Some((base, u16::from_be_bytes(*part)))
}

/// All records of a tree in order of key, without their part numbers.
pub(super) fn records<T: DeserializeOwned>(
    tree: &Tree,
    id: TreeId,
) -> impl Iterator<Item = Result<(Vec<u8>, T), DatabaseError>> + use<T> {
    records_within(tree, id, Bound::Unbounded, Bound::Unbounded)
}

/// Those whose first row is within these bounds.
pub(super) fn records_within<T: DeserializeOwned>(
    tree: &Tree,
    id: TreeId,
    from: Bound<Vec<u8>>,
    to: Bound<Vec<u8>>,
) -> impl Iterator<Item = Result<(Vec<u8>, T), DatabaseError>> + use<T> {
    let source = tree.clone();
    tree.range(from, to).filter_map(move |row| {
        let key = match row {
            Ok((key, _)) => key,
            Err(error) => return Some(Err(error)),
        };
        let (base, _) = split_row_key(&key).filter(|(_, part)| *part == 0)?;
        let record = get_record(&source, id, base).transpose()?;
        Some(record.map(|value| (base.to_vec(), value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::MemoryDisk;
    use crate::db::engine::Engine;

    #[test]
    fn records_of_every_length_come_back() {
        let disk = MemoryDisk::new();
        let (tree, engine) = (Tree::Memory(disk.clone(), TreeId::Locks), Engine::Memory(disk));
        for (i, len) in
            [0, 1, MAX_ROW_BYTES - 9, MAX_ROW_BYTES - 8, MAX_ROW_BYTES, 3 * MAX_ROW_BYTES + 1].iter().enumerate()
        {
            let key = [u8::try_from(i).unwrap(); 4];
            let value: Vec<u8> = (0..*len).map(|b| b.to_le_bytes()[0]).collect();
            let mut rows = Vec::new();
            put_record(&mut rows, TreeId::Locks, &key, &value).unwrap();
            assert!(rows.iter().all(|row| row.value.as_ref().unwrap().len() <= MAX_ROW_BYTES + 2));
            engine.apply(&rows).unwrap();
            assert_eq!(get_record::<Vec<u8>>(&tree, TreeId::Locks, &key).unwrap(), Some(value));
            assert_eq!(usize::from(record_parts(&tree, TreeId::Locks, &key).unwrap()), rows.len());
        }
        assert_eq!(records::<Vec<u8>>(&tree, TreeId::Locks).filter(Result::is_ok).count(), 6);
        engine.apply(&[RowChange { tree: TreeId::Locks, key: part_key(&[5; 4], 1), value: None }]).unwrap();
        assert!(get_record::<Vec<u8>>(&tree, TreeId::Locks, &[5; 4]).is_err());
    }

    #[test]
    fn a_hostile_length_is_an_error_and_no_allocation() {
        let mut bytes = u64::MAX.to_le_bytes().to_vec();
        bytes.extend([1, 2, 3]);
        assert!(decode::<Vec<u8>>(TreeId::Meta, &bytes).is_err());
        assert!(decode::<u32>(TreeId::Meta, &[0; 5]).is_err(), "trailing bytes");
    }
}
