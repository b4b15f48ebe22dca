//! `stats`: the whole database in numbers.

use time_masternode::db::{Stats, TREE_NAMES};

use super::context::Context;
use super::report::{bytes, remark, result, time};
use super::supervise::Outcome;

/// Counts and sums.
pub fn stats(context: &Context<'_>) -> anyhow::Result<Outcome> {
    let trees = context.inspect()?;
    let stats = trees.stats(&|tree, rows| context.progress.step(&TREE_NAMES, tree, rows))?;
    context.progress.finish();
    result(context.format, &stats, text)?;
    let findings = stats.findings();
    for finding in &findings {
        remark(finding);
    }
    Ok(if findings.is_empty() { Outcome::Sound } else { Outcome::Findings })
}

fn text(stats: &Stats) -> String {
    let some = |value: Option<String>, absent: &str| value.unwrap_or_else(|| absent.to_owned());
    let mut lines = vec![
        ("network", some(stats.network.map(|network| network.to_string()), "unknown: never filled to the end")),
        ("genesis", some(stats.genesis_hash.map(|hash| hash.to_string()), "unknown")),
        ("member", some(stats.public_key.map(|key| key.to_string()), "none: an observer")),
        ("schema", format!("{} of {}", some(stats.schema.map(|n| n.to_string()), "none"), stats.newest_schema)),
        ("last commit", stats.commit.to_string()),
        ("guard", guard(stats)),
        ("votes", stats.suspension.as_ref().map_or_else(|| "not suspended".into(), |why| format!("suspended: {why}"))),
        ("fence", fence(stats)),
        ("height", height(stats)),
        ("state digest", some(stats.state_digest.map(|digest| digest.to_string()), "none")),
        ("change log", format!("up to {}, log_id {}", stats.sequence, some(stats.log_id.clone(), "none"))),
        ("pruned", format!("blocks up to {}, changes up to {}", stats.pruned.height, stats.pruned.sequence)),
    ];
    for (state, outputs) in &stats.outputs {
        let amount = outputs.amount.map(|amount| format!(", {} TIME", time(amount)));
        lines.push(("outputs", format!("{state:<15} {}{}", outputs.count, amount.unwrap_or_default())));
    }
    if let Some(supply) = &stats.supply {
        let verdict = if supply.conserved { "as allocated" } else { "NOT as allocated" };
        let (live, fees, all) = (time(supply.live), time(supply.unpaid_fees), time(supply.allocated));
        lines.push(("supply", format!("{live} TIME and {fees} of unpaid fees, of {all}: {verdict}")));
    }
    for tree in &stats.trees {
        lines.push(("tree", format!("{:<15} {:>12} rows {:>12}", tree.name, tree.rows, bytes(tree.bytes))));
    }
    lines.push(("on disk", bytes(stats.bytes_on_disk)));
    let lines: Vec<String> = lines.into_iter().map(|(name, value)| format!("{name:<13} {value}")).collect();
    lines.join("\n")
}

fn guard(stats: &Stats) -> String {
    let seen = stats.guard.commit.map_or_else(|| "no commit".to_owned(), |commit| format!("commit {commit}"));
    let fits = match stats.guard.fits {
        "equal" => "fits",
        "one_ahead" => "one behind: an ordinary crash, which the next start settles",
        _ => "DOES NOT FIT: votes may be lost",
    };
    format!("{seen}, {fits}")
}

fn fence(stats: &Stats) -> String {
    let Some(fence) = &stats.fence else { return "none".into() };
    match fence.agrees_from {
        Some(height) => format!("{} outputs; takes part in blocks from height {height} on", fence.fenced),
        None => format!("{} outputs so far; the node asks the other members what else", fence.fenced),
    }
}

fn height(stats: &Stats) -> String {
    match stats.block_hash {
        Some(hash) => format!("{}, block {hash}", stats.height),
        None => "0: no block yet".into(),
    }
}
