//! Bringing a stopped node's database up to this program's schema, as the node itself does
//! when it starts, with a copy kept first.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::DatabaseError;
use super::inspect::Trees as InspectTrees;
use super::open::{copy_before_migration, open_migrated};
use super::schema::SCHEMA_VERSION;
use super::watcher::{Watcher, watched};
use crate::types::Genesis;

/// What a migration did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Migrated {
    /// The schema that it had.
    pub from: u32,
    /// The schema that it has.
    pub to: u32,
    /// The copy of what was before; `None` where there was nothing to do.
    pub copy: Option<PathBuf>,
}

/// Migrates the database in `data_dir`, which nobody may have open.
pub fn migrate(
    data_dir: &Path,
    genesis: &Genesis,
    cache_bytes: u64,
    watcher: &dyn Watcher,
) -> Result<Migrated, DatabaseError> {
    let trees = watched(watcher, || InspectTrees::open_with_cache(data_dir, cache_bytes))?;
    trees.belongs_to(genesis)?;
    let condition = trees.condition()?;
    drop(trees);
    let unfinished = || DatabaseError::corrupt("meta", "the database was never filled to the end");
    let from = condition.schema.filter(|_| condition.network.is_some()).ok_or_else(unfinished)?;
    if from == SCHEMA_VERSION {
        return Ok(Migrated { from, to: from, copy: None });
    }
    drop(watched(watcher, || open_migrated(data_dir, genesis, cache_bytes))?);
    let copy = Some(copy_before_migration(data_dir, from, condition.commit));
    Ok(Migrated { from, to: SCHEMA_VERSION, copy })
}
