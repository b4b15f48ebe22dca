//! `time-db`: looks into the database of a stopped node.
//!
//! It changes nothing that a node has said. A running node's directory is refused, for
//! two programs cannot have one sled database open; work on a copy, or stop the node.
#![forbid(unsafe_code)]

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use time_masternode::db::{InspectTrees, Row, TREE_NAMES};

/// Looks into the database of a stopped node.
///
/// Exit codes: 0 done, 1 a row could not be read, 2 could not be done.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    /// The node's data directory
    #[arg(long, env = "TIME_DATA_DIR", value_name = "DIR")]
    data_dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the records of every tree, decoded
    #[command(
        after_help = "A record is {tree, key, value}. Examples:\n  time-db --data-dir node/data dump --tree locks\n  time-db --data-dir node/data dump --format ndjson | jq 'select(.tree == \"utxos\")'"
    )]
    Dump {
        /// Only this tree
        #[arg(long, value_parser = TREE_NAMES)]
        tree: Option<String>,
        /// How to print
        #[arg(long, default_value = "table")]
        format: Format,
        /// Records of each tree at most
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people: one line a record
    Table,
    /// One JSON array
    Json,
    /// One JSON object a line
    Ndjson,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(unreadable) => {
            eprintln!("{unreadable} records could not be read");
            ExitCode::from(1)
        }
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whoever read the output has had enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

fn run(cli: &Cli) -> anyhow::Result<usize> {
    let trees = InspectTrees::open(&cli.data_dir)?;
    match &cli.command {
        Command::Dump { tree, format, limit } => {
            let names: Vec<&str> = match tree {
                Some(name) => vec![name],
                None => TREE_NAMES.to_vec(),
            };
            dump(&trees, &names, *format, limit.unwrap_or(usize::MAX))
        }
    }
}

/// Prints the records; gives the number of those that could not be read.
fn dump(trees: &InspectTrees, names: &[&str], format: Format, limit: usize) -> anyhow::Result<usize> {
    let mut out = BufWriter::new(io::stdout().lock());
    let (mut printed, mut unreadable) = (0_usize, 0);
    if format == Format::Json {
        out.write_all(b"[")?;
    }
    for name in names {
        let rows = trees.rows(name).with_context(|| format!("there is no tree {name:?}"))?;
        for row in rows.take(limit) {
            let row = match row {
                Ok(row) => row,
                Err(error) => {
                    eprintln!("{name}: {error}");
                    unreadable += 1;
                    continue;
                }
            };
            print(&mut out, format, &row, printed == 0)?;
            printed += 1;
        }
    }
    if format == Format::Json {
        out.write_all(b"\n]\n")?;
    }
    out.flush()?;
    Ok(unreadable)
}

fn print(out: &mut impl Write, format: Format, row: &Row, first: bool) -> anyhow::Result<()> {
    match format {
        Format::Table => writeln!(out, "{:<13} {}  {}", row.tree, row.key, row.value)?,
        Format::Ndjson => writeln!(out, "{}", serde_json::to_string(row)?)?,
        Format::Json => {
            out.write_all(if first { b"\n" } else { b",\n" })?;
            write!(out, "{}", serde_json::to_string(row)?)?;
        }
    }
    Ok(())
}
