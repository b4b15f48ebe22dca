//! What is wrong with a database that cannot be used, and what to do next.

use serde::Serialize;
use time_masternode::db::{DatabaseError, ImportError};
use time_masternode::files::FileError;

use super::report::{Format, remark};
use super::supervise::Supervised;

/// A failure as an operator reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// What could not be done, and why.
    pub error: String,
    /// The same for scripts.
    pub kind: &'static str,
    /// What to do next.
    pub next: Option<&'static str>,
}

const DAMAGED: &str = "keep the directory as it is and do not start the node on it; restore a backup \
    (`time-db restore`), or set the directory aside and let the node fetch the ledger again behind its fence";

impl Failure {
    /// What an error means.
    pub fn of(error: &anyhow::Error) -> Self {
        let imported = error.downcast_ref::<ImportError>();
        let database = match imported {
            Some(ImportError::Database(database)) => Some(database),
            _ => error.downcast_ref::<DatabaseError>(),
        };
        let (kind, next) = match (database, error.downcast_ref::<Supervised>()) {
            (Some(database), _) => (database.kind(), Some(database.next_step())),
            (None, Some(Supervised::OpenTimeout(_))) => (
                "damaged",
                Some(
                    "if the database is very large and the disk slow, give it more time with --open-timeout; \
                      otherwise keep the directory as it is and restore a backup (`time-db restore`)",
                ),
            ),
            (None, Some(Supervised::Engine(_))) => ("damaged", Some(DAMAGED)),
            (None, Some(Supervised::Bug(_))) => ("bug", Some("please report it, with the command that you gave")),
            (None, None) if matches!(imported, Some(ImportError::Refused { .. })) => {
                ("refused", Some("nothing was changed; take another copy of the file, or make the export again"))
            }
            (None, None) => match error.downcast_ref::<FileError>() {
                Some(FileError::Exists(_)) => ("exists", Some("give a name that is not taken")),
                _ => ("failed", None),
            },
        };
        // Every message already says what caused it; the chain would say it twice.
        Self { error: error.to_string(), kind, next }
    }

    /// Tells it.
    pub fn tell(&self, format: Format) {
        match format {
            Format::Table => {
                remark(&self.error);
                if let Some(next) = self.next {
                    remark(&format!("next: {next}"));
                }
            }
            Format::Json | Format::Ndjson => eprintln_json(self),
        }
    }
}

fn eprintln_json(failure: &Failure) {
    use std::io::Write;
    let text = serde_json::to_string(failure).unwrap_or_else(|_| failure.error.clone());
    writeln!(std::io::stderr().lock(), "{text}").unwrap_or_default();
}
