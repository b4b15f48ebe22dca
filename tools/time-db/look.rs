//! What is there: `dump`, `get`, `locks`, `changes`.

use anyhow::Context as _;
use serde::Serialize;
use serde_json::Value;
use time_masternode::db::{Filter, Flight, InspectTrees, Row, Rows, TREE_NAMES, Thing};

use super::cli;
use super::context::Context;
use super::report::{Listing, ago, remark, time, unix_now};
use super::supervise::Outcome;

/// How often progress is shown.
const TELL_EVERY: u64 = 4_096;

fn line(row: &Row) -> String {
    format!("{:<13} {}  {}", row.tree, row.key, row.value)
}

/// The filters, if they can be of this network.
fn filter(trees: &InspectTrees, filters: cli::Filters) -> anyhow::Result<Filter> {
    if let Some(address) = filters.address.filter(|address| address.network() != trees.network()) {
        anyhow::bail!("{address} is an address of another network: the database is of {}", trees.network());
    }
    Ok(Filter {
        state: filters.state,
        address: filters.address,
        outpoint: filters.outpoint,
        txid: filters.txid,
        height: filters.height,
        sequence: filters.sequence,
    })
}

/// What could not be read is told, and read over.
fn readable<'a>(context: &'a Context<'_>, name: &'a str, rows: Rows, bad: &'a mut usize) -> impl Iterator<Item = Row> {
    let mut looked = 0_u64;
    rows.filter_map(move |row| {
        looked += 1;
        if looked.is_multiple_of(TELL_EVERY) {
            context.progress.step(&TREE_NAMES, name, looked);
        }
        row.inspect_err(|error| {
            remark(&format!("{name}: {error}"));
            *bad += 1;
        })
        .ok()
    })
}

fn verdict(unreadable: usize) -> Outcome {
    if unreadable == 0 {
        return Outcome::Sound;
    }
    remark(&format!("{unreadable} records could not be read"));
    Outcome::Findings
}

/// Prints records of trees.
pub fn dump(context: &Context<'_>, arguments: cli::Dump) -> anyhow::Result<Outcome> {
    let trees = context.inspect()?;
    let filter = filter(trees, arguments.filters)?;
    let limit = arguments.limit.unwrap_or(usize::MAX);
    let names: Vec<&str> = TREE_NAMES
        .into_iter()
        .filter(|name| arguments.tree.is_empty() || arguments.tree.iter().any(|wanted| wanted == name))
        .collect();
    let mut listing = Listing::new(context.format)?;
    let mut unreadable = 0;
    for name in names {
        let rows = trees.select(name, filter.clone())?.with_context(|| format!("there is no tree {name:?}"))?;
        for row in readable(context, name, rows, &mut unreadable).take(limit) {
            listing.add(&row, line)?;
        }
    }
    listing.finish()?;
    Ok(verdict(unreadable))
}

/// Prints every record about one thing.
pub fn get(context: &Context<'_>, arguments: cli::Get) -> anyhow::Result<Outcome> {
    let cli::Get { outpoint, txid, height, sequence, tree, key } = arguments;
    let outpoint = outpoint.map(Thing::OutPoint);
    let thing = outpoint
        .or(txid.map(Thing::Txid))
        .or(height.map(Thing::Height))
        .or(sequence.map(Thing::Sequence))
        .or(tree.zip(key).map(|(tree, key)| Thing::Row { tree, key }))
        .context("say what to get")?;
    let trees = context.inspect()?;
    context.progress.tell("reading", 0, None);
    let found = trees.about(&thing)??;
    let mut listing = Listing::new(context.format)?;
    for row in &found.rows {
        listing.add(row, line)?;
    }
    let printed = listing.printed();
    listing.finish()?;
    for error in &found.unreadable {
        remark(&error.to_string());
    }
    if printed == 0 {
        remark("there is nothing about it in this database");
        return Ok(Outcome::Findings);
    }
    Ok(verdict(found.unreadable.len()))
}

/// An entry of the change log.
#[derive(Debug, Serialize)]
struct Change {
    sequence: u64,
    change: Value,
}

/// Prints the change log.
pub fn changes(context: &Context<'_>, arguments: &cli::Changes) -> anyhow::Result<Outcome> {
    let trees = context.inspect()?;
    if let Some(first) = trees.log_begins()?.filter(|first| *first > arguments.from) {
        remark(&format!("the log begins with {first}: what was before is forgotten, or was another log's"));
    }
    let mut listing = Listing::new(context.format)?;
    let mut unreadable = 0;
    if arguments.from <= arguments.to {
        let sequence = Some(arguments.from..=arguments.to);
        let rows = trees.select("changes", Filter { sequence, ..Filter::default() })?;
        let rows = readable(context, "changes", rows.context("there is no change log")?, &mut unreadable);
        for row in rows.take(arguments.limit.unwrap_or(usize::MAX)) {
            let change = Change { sequence: row.key.parse()?, change: row.value };
            listing.add(&change, |change| format!("{:>10}  {}", change.sequence, change_text(&change.change)))?;
        }
    }
    listing.finish()?;
    Ok(verdict(unreadable))
}

fn change_text(change: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    if let Some(step) = change.get("Transition") {
        let amount = step["output"]["amount"].as_u64().unwrap_or(0);
        let place = format!("{}:{}", text(&step["outpoint"]["txid"]), step["outpoint"]["vout"]);
        let old = if step["old_state"].is_null() { "nothing".into() } else { text(&step["old_state"]) };
        let (new, owner) = (text(&step["new_state"]), text(&step["output"]["address"]));
        return format!("{place}  {old} -> {new}  {} TIME of {owner}  at {}", time(amount), step["timestamp"]);
    }
    text(change)
}

/// Prints what is in flight.
pub fn locks(context: &Context<'_>) -> anyhow::Result<Outcome> {
    let trees = context.inspect()?;
    let (mut listing, mut unreadable, now) = (Listing::new(context.format)?, 0, unix_now());
    for flight in trees.in_flight()? {
        match flight {
            Ok(flight) => listing.add(&flight, |flight| flight_text(flight, now))?,
            Err(error) => {
                remark(&format!("locks: {error}"));
                unreadable += 1;
            }
        }
    }
    listing.finish()?;
    Ok(verdict(unreadable))
}

fn flight_text(flight: &Flight, now: i64) -> String {
    let since = flight.locked_at.map_or_else(
        || "holds no locks".to_owned(),
        |locked_at| format!("locked at {locked_at} ({})", ago(locked_at, now)),
    );
    let names = |names: Vec<String>| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    let votes = names(flight.votes.iter().map(|kind| format!("{kind:?}")).collect());
    let certificates = names(flight.certificates.iter().map(|c| format!("{:?} of {}", c.kind, c.votes)).collect());
    let mut text = format!("{}  {since}\n  own votes: {votes}\n  certificates: {certificates}", flight.txid);
    for place in &flight.holds {
        let output = place
            .output
            .map_or_else(String::new, |output| format!("  {} TIME of {}", time(output.amount.units()), output.address));
        text.push_str(&format!("\n  holds {}{output}", place.outpoint));
    }
    for place in &flight.lacks {
        let state = place.state.map_or_else(|| "not here".to_owned(), |state| serde_json::json!(state).to_string());
        text.push_str(&format!("\n  lacks {}  {state}", place.outpoint));
    }
    text
}
