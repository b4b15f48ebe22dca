//! `time-db`: the database of a stopped node, for its operator.
//!
//! - `cli` the arguments, `context` what all commands share, `report` what is printed
//! - `supervise` keeps a damaged database from taking the program down, `advice` says what
//!   an error means, `progress` shows how far long work is
//! - `look` and `stats` print what is there, `mend` verifies and repairs, `copy` makes
//!   backups and restores them, `transfer` exports, imports and migrates
//!
//! To look changes nothing that a node has said, and makes nothing that was not there. A
//! running node's directory is refused, for two programs cannot have one sled database open.
#![forbid(unsafe_code)]

mod advice;
mod cli;
mod context;
mod copy;
mod look;
mod mend;
mod progress;
mod report;
mod stats;
mod supervise;
mod transfer;

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use advice::Failure;
use cli::{Cli, Command};
use context::Context;
use supervise::{Outcome, supervise};

fn main() -> ExitCode {
    let Cli { target, format, command } = Cli::parse();
    let open_timeout = Duration::from_secs(target.open_timeout);
    let outcome = supervise(open_timeout, move |watchdog| {
        let context = Context::new(target, format, watchdog)?;
        let outcome = run(&context, command);
        context.progress.finish();
        outcome
    });
    match outcome {
        Ok(Outcome::Sound) => ExitCode::SUCCESS,
        Ok(Outcome::Findings) => ExitCode::from(1),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            Failure::of(&error).tell(format);
            ExitCode::from(2)
        }
    }
}

/// Whoever read the output has had enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

fn run(context: &Context<'_>, command: Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Dump(arguments) => look::dump(context, arguments),
        Command::Get(arguments) => look::get(context, arguments),
        Command::Stats => stats::stats(context),
        Command::Locks => look::locks(context),
        Command::Changes(arguments) => look::changes(context, &arguments),
        Command::Verify(arguments) => mend::verify(context, &arguments),
        Command::Repair(arguments) => mend::repair(context, &arguments),
        Command::Backup(arguments) => copy::backup(context, &arguments.to),
        Command::Restore(arguments) => copy::restore(context, &arguments.from),
        Command::Export(arguments) => transfer::export(context, &arguments.file),
        Command::Import(arguments) => transfer::import(context, &arguments.file),
        Command::Compact => copy::compact(context),
        Command::Migrate => transfer::migrate(context),
    }
}
