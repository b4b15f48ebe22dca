//! Whether the database is what it should be, and what to do if it is not: `verify` and
//! `repair`.

use serde::Serialize;
use time_masternode::db::{self, Check, Plan, Repaired, Report, VerifyOptions};
use time_masternode::types::Genesis;

use super::cli;
use super::context::Context;
use super::report::{Format, remark, result};
use super::supervise::Outcome;

/// What a check or a repair is made with.
fn with_options<T>(
    context: &Context<'_>,
    genesis: Option<&Genesis>,
    full: bool,
    run: impl FnOnce(VerifyOptions<'_>) -> Result<T, db::DatabaseError>,
) -> anyhow::Result<T> {
    let checks: Vec<&str> = db::check_names().collect();
    let progress = |what: &'static str, done: u64| {
        context.watchdog.opened();
        context.progress.step(&checks, what, done);
    };
    context.watchdog.opening();
    let outcome = run(VerifyOptions { genesis, full, progress: &progress });
    context.watchdog.opened();
    Ok(outcome?)
}

fn check_lines(check: &Check) -> String {
    let verdict = if check.wrong == 0 { "sound" } else { "WRONG" };
    let mut lines = format!("{verdict}  {:<14} {:>10}  {}", check.name, check.checked, check.holds);
    if let Some(left_out) = &check.left_out {
        lines.push_str(&format!("\n                                    not checked: {left_out}"));
    }
    for finding in &check.findings {
        lines.push_str(&format!("\n       {} ({:?}): {}", finding.place, finding.damage, finding.what));
    }
    let told = check.findings.len() as u64;
    if check.wrong > told {
        lines.push_str(&format!("\n       and {} more", check.wrong - told));
    }
    lines
}

fn report_lines(report: &Report) -> String {
    report.checks.iter().map(check_lines).collect::<Vec<_>>().join("\n")
}

fn verdict(report: &Report) -> Outcome {
    if report.is_sound() { Outcome::Sound } else { Outcome::Findings }
}

/// Checks every invariant.
pub fn verify(context: &Context<'_>, arguments: &cli::Verify) -> anyhow::Result<Outcome> {
    let genesis = context.genesis_if_given()?;
    let report = with_options(context, genesis.as_ref(), arguments.full, |options| {
        db::verify_data_dir(&context.data_dir, context.cache_bytes, options)
    })?;
    context.progress.finish();
    result(context.format, &report, report_lines)?;
    Ok(verdict(&report))
}

fn plan_lines(plan: &Plan) -> String {
    let mut lines = Vec::new();
    if let Some(why) = &plan.unopenable {
        lines.push(format!("the database cannot be opened: {why}"));
    }
    lines.extend(plan.report.iter().flat_map(|report| &report.checks).filter(|c| c.wrong > 0).map(check_lines));
    match &plan.set_aside {
        Some(kept) => lines.push(format!(
            "there is no database: it was set aside in {}. Start the node: it fetches the ledger from the other \
             members, behind the fence",
            kept.display()
        )),
        None if plan.steps.is_empty() => lines.push("there is nothing to repair".into()),
        None => {}
    }
    for step in &plan.steps {
        let because: Vec<&str> = step.because.iter().map(String::as_str).collect();
        lines.push(format!("would {}", step.what));
        lines.push(format!("  because of: {}", because.join(", ")));
        lines.push(format!("  safe, because {}", step.why));
    }
    lines.extend(plan.warning.map(|warning| format!("BUT {warning}")));
    lines.join("\n")
}

fn repaired_lines(repaired: &Repaired) -> String {
    let mut lines = vec![format!("what was there is kept in {}", repaired.kept.display())];
    if let Some(fenced) = repaired.fenced {
        lines.push(format!(
            "behind the fence: {fenced} outputs that this database knows of. The node asks the others for the rest"
        ));
    }
    for vote in &repaired.votes_taken_out {
        lines.push(format!("taken out: the vote {:?} on {}, which nothing supports", vote.kind, vote.txid));
    }
    match &repaired.report {
        Some(report) if report.is_sound() => lines.push("sound now".into()),
        Some(report) => lines.push(report_lines(report)),
        None => lines.push("start the node: it fetches the ledger from the other members, behind the fence".into()),
    }
    lines.join("\n")
}

/// What was planned, and how that went.
#[derive(Serialize)]
struct Done<'a> {
    plan: &'a Plan,
    #[serde(flatten)]
    repaired: &'a Repaired,
}

/// Says what would be done, or (`--apply`) does it.
pub fn repair(context: &Context<'_>, arguments: &cli::Repair) -> anyhow::Result<Outcome> {
    let genesis = context.genesis_if_given()?;
    let plan = with_options(context, genesis.as_ref(), false, |options| {
        db::plan(&context.data_dir, context.cache_bytes, options)
    })?;
    context.progress.finish();
    if plan.steps.is_empty() {
        result(context.format, &plan, plan_lines)?;
        return Ok(Outcome::Sound);
    }
    if !arguments.apply {
        result(context.format, &plan, plan_lines)?;
        remark("nothing was changed; --apply does it, and keeps a copy of what is there");
        return Ok(Outcome::Findings);
    }
    if context.format == Format::Table {
        remark(&plan_lines(&plan));
    }
    let repaired = with_options(context, genesis.as_ref(), false, |options| {
        db::repair(&context.data_dir, context.cache_bytes, &plan, options)
    })?;
    context.progress.finish();
    let done = Done { plan: &plan, repaired: &repaired };
    result(context.format, &done, |done| repaired_lines(done.repaired))?;
    Ok(repaired.report.as_ref().map_or(Outcome::Sound, verdict))
}
