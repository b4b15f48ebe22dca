//! Copies and what is put in place of a database: `backup`, `restore`, `compact`.

use std::path::Path;

use serde_json::json;
use time_masternode::config::forget_first_start;
use time_masternode::db::guard::Agreement;
use time_masternode::db::{Condition, PutInPlace};
use time_masternode::{db, files};

use super::context::Context;
use super::report::{bytes, remark, result};
use super::supervise::Outcome;

fn log_id(condition: &Condition) -> Option<String> {
    condition.network.as_ref().map(|network| hex::encode(network.log_id))
}

/// Copies the database.
pub fn backup(context: &Context<'_>, to: &Path) -> anyhow::Result<Outcome> {
    if let Some(parent) = to.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        files::make_dir(parent)?;
    }
    let copied = db::backup(&context.data_dir, to, context.cache_bytes, context)?;
    context.progress.finish();
    let fits = copied.agreement != Agreement::Mismatch;
    let json = json!({
        "backup": to, "commit": copied.commit, "height": copied.height, "sequence": copied.sequence,
        "log_id": log_id(&copied), "schema": copied.schema, "fits_guard": fits,
    });
    let text = |_: &_| format!("{}: commit {}, height {}", to.display(), copied.commit, copied.height);
    result(context.format, &json, text)?;
    if !fits {
        remark("the database does not fit its guard: the backup may be older than what the node has said");
    }
    Ok(if fits { Outcome::Sound } else { Outcome::Findings })
}

/// Puts a backup in place of the database.
pub fn restore(context: &Context<'_>, from: &Path) -> anyhow::Result<Outcome> {
    let same = |a: &Path, b: &Path| a.canonicalize().ok().is_some_and(|a| b.canonicalize().ok() == Some(a));
    anyhow::ensure!(!same(from, &context.data_dir), "{} cannot be restored from itself", from.display());
    let genesis = context.genesis_if_given()?;
    let restored = db::restore(&context.data_dir, from, genesis.as_ref(), context.cache_bytes, context)?;
    put_in_place(context, "restored", &restored)
}

/// Puts a compact copy in place of the database.
pub fn compact(context: &Context<'_>) -> anyhow::Result<Outcome> {
    let compacted = db::compact(&context.data_dir, context.cache_bytes, context)?;
    context.progress.finish();
    result(context.format, &compacted, |compacted| {
        let (before, after) = (bytes(compacted.bytes_before), bytes(compacted.bytes_after));
        let mut text = format!("{}: {} rows, {before} before, {after} now", context.data_dir.display(), compacted.rows);
        if let Some(kept) = &compacted.set_aside {
            text.push_str(&format!("\nwhat was there before is kept in {}", kept.display()));
        }
        text
    })?;
    Ok(Outcome::Sound)
}

/// Says what the data directory holds now and what that means.
pub fn put_in_place(context: &Context<'_>, done: &'static str, put: &PutInPlace) -> anyhow::Result<Outcome> {
    // Its key has voted: a member that loses this database as well goes behind the fence.
    forget_first_start(&context.data_dir)?;
    context.progress.finish();
    let member = put.now.network.as_ref().and_then(|network| network.public_key);
    let warning = match (context.genesis_if_given()?, member) {
        (Some(genesis), Some(member)) => db::fence_warning(&genesis, &member),
        _ => None,
    };
    let json = json!({
        "data_dir": context.data_dir, "done": done, "commit": put.from.commit, "height": put.from.height,
        "sequence": put.now.sequence, "log_id": log_id(&put.now), "previous_log_id": log_id(&put.from),
        "public_key": member, "warning": warning,
        "fenced": put.fenced, "set_aside": put.set_aside,
    });
    result(context.format, &json, |_| {
        let mut text = format!(
            "{}: {done} as of commit {}, height {}",
            context.data_dir.display(),
            put.from.commit,
            put.from.height
        );
        if let Some(kept) = &put.set_aside {
            text.push_str(&format!("\nwhat was there before is kept in {}", kept.display()));
        }
        match put.fenced {
            Some(fenced) => text.push_str(&format!(
                "\nbehind the fence with {fenced} outputs: when the node starts, it asks the other members what it \
                 must not\nvote on, follows the chain, and votes on what comes into being after that"
            )),
            None => text.push_str("\nan observer's: it has no votes to lose"),
        }
        if let Some(warning) = warning {
            text.push_str(&format!("\nBUT {warning}"));
        }
        text.push_str("\nthe change log has a new name: wallets take a new snapshot");
        text
    })?;
    Ok(Outcome::Sound)
}
