//! `time-bench`: loads a network as wallets do and measures what they see.
//!
//! - `cli` the arguments and what they mean, `report` and `picture` the results
//! - `funding`, `plan`, `load`, `stats`, `heard` decide and compute, without I/O
//! - `network` starts nodes or finds them, `probe` looks at them through `/proc` and HTTP
//! - `prepare` makes the coins, `wire`, `subscribe`, `query` talk to nodes, `run` is the run
//!
//! This file joins them and turns errors into exit codes. The measuring shares the machine
//! with what it measures, so what can be done before the clock starts is done before.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "nothing here is a library; fields are named for the report that they stand in")]

mod cli;
mod funding;
mod heard;
mod load;
mod network;
mod picture;
mod plan;
mod prepare;
mod probe;
mod query;
mod report;
mod run;
mod stats;
mod subscribe;
mod wire;

use std::path::Path;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;

use cli::{Cli, Format};
use network::Network;
use plan::Planner;
use report::{Report, remark, result};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(&cli) {
        Ok(report) if report.broken.is_empty() => ExitCode::SUCCESS,
        Ok(report) => {
            report.broken.iter().for_each(|broken| remark(&format!("broken promise: {broken}")));
            ExitCode::from(1)
        }
        Err(error) => {
            remark(&told(&error));
            ExitCode::from(2)
        }
    }
}

/// An error with its causes, but for those whose words it has already.
fn told(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| match cause.to_string() {
        cause if text.contains(&cause) => text,
        cause if text.is_empty() => cause,
        cause => format!("{text}: {cause}"),
    })
}

fn start(cli: &Cli) -> anyhow::Result<Report> {
    if cli.network.network.is_none() && cli.load.to.is_empty() {
        // Before a network is started in vain.
        cli.load.settings(usize::from(cli.network.nodes))?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    LocalSet::new().block_on(&runtime, async {
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        tokio::select! {
            report = bench(cli) => report,
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
            _ = terminate.recv() => bail!("terminated"),
        }
    })
}

async fn bench(cli: &Cli) -> anyhow::Result<Report> {
    let mut network = Network::open(&cli.network).await?;
    let slots = network.chosen(&cli.load.to)?;
    let settings = cli.load.settings(slots.len())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let genesis = network.genesis.clone();
    let planner = Planner::new(&genesis, &settings, slots.len(), i64::try_from(now.as_secs())?);
    let mut leaves = planner.leaves();
    let idle: Vec<_> = leaves.iter().copied().cycle().take(cli.load.idle_coins).collect();
    leaves.extend(idle);
    let loaded = async {
        let (coins, prepared) = prepare::prepare(&network, &leaves).await?;
        remark(&format!("signing {} payments", settings.payments + 2 * settings.pairs));
        Ok((prepared, run::run(&network, &settings, &slots, planner.build(coins), cli.network.compacted).await?))
    };
    let (prepared, outcome) = match loaded.await {
        Ok(loaded) => loaded,
        Err(error) => {
            // A node that died says more about it than the connection that was lost with it.
            network.why_a_process_ended().await?;
            return Err(error);
        }
    };
    let report = Report::new(&network, &settings, &slots, prepared, cli.load.conflicts, &outcome);
    let json = serde_json::to_string_pretty(&report).context("writing the report")?;
    match cli.output.format {
        Format::Table => result(&report.table())?,
        Format::Json => result(&json)?,
    }
    if let Some(path) = &cli.output.json {
        write(path, &format!("{json}\n"))?;
    }
    if let Some(path) = &cli.output.picture {
        let title = format!("{:.0} payments a second became final", report.finalised_per_second);
        let svg = outcome.load.look(|load| picture::draw(load.samples().1, outcome.window, &title));
        write(path, &svg)?;
    }
    Ok(report)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
