//! `export`, `import`, `migrate`.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::Context as _;
use serde_json::json;
use time_masternode::{db, files};

use super::context::Context;
use super::copy::put_in_place;
use super::report::{bytes, remark, result, unix_now};
use super::supervise::Outcome;

/// Bytes that are read or written at once.
const BUFFER_BYTES: usize = 1024 * 1024;

/// Standard input or output.
fn is_stream(file: &Path) -> bool {
    file == Path::new("-")
}

/// Writes the whole ledger to a file.
pub fn export(context: &Context<'_>, file: &Path) -> anyhow::Result<Outcome> {
    let trees = context.inspect()?;
    let write = |out: &mut dyn Write| -> anyhow::Result<db::Exported> {
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, out);
        let exported = db::export(trees, &mut out, unix_now(), context)?;
        out.flush()?;
        Ok(exported)
    };
    if is_stream(file) {
        let exported = write(&mut std::io::stdout().lock())?;
        context.progress.finish();
        remark(&format!("{} records, BLAKE3 {}", exported.records, exported.blake3));
        return Ok(Outcome::Sound);
    }
    let exported = files::create_whole(file, |out| write(out))?;
    context.progress.finish();
    let json = json!({
        "export": file, "records": exported.records, "bytes": exported.bytes, "blake3": exported.blake3,
        "commit": exported.commit, "height": exported.height,
    });
    result(context.format, &json, |_| {
        let (records, size) = (exported.records, bytes(exported.bytes));
        format!(
            "{}: {records} records, {size}, commit {}, height {}\nBLAKE3 {}",
            file.display(),
            exported.commit,
            exported.height,
            exported.blake3
        )
    })?;
    Ok(Outcome::Sound)
}

/// Makes a new database of an export.
pub fn import(context: &Context<'_>, file: &Path) -> anyhow::Result<Outcome> {
    let genesis = context.genesis()?;
    let read = |input: &mut dyn BufRead, size: Option<u64>| {
        db::import(&context.data_dir, input, size, &genesis, context.cache_bytes, context)
    };
    let imported = if is_stream(file) {
        read(&mut std::io::stdin().lock(), None)?
    } else {
        let opened = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
        let size = opened.metadata().ok().map(|metadata| metadata.len());
        read(&mut BufReader::with_capacity(BUFFER_BYTES, opened), size)?
    };
    put_in_place(context, "imported", &imported)
}

/// Brings the database up to this program's schema.
pub fn migrate(context: &Context<'_>) -> anyhow::Result<Outcome> {
    let genesis = context.genesis()?;
    let migrated = db::migrate(&context.data_dir, &genesis, context.cache_bytes, context)?;
    context.progress.finish();
    result(context.format, &migrated, |migrated| match &migrated.copy {
        Some(copy) => format!(
            "migrated from schema {} to {}; what was before is kept in {}",
            migrated.from,
            migrated.to,
            copy.display()
        ),
        None => format!("nothing to do: the schema is {} already", migrated.to),
    })?;
    Ok(Outcome::Sound)
}
