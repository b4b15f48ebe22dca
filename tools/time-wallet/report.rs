//! What the wallet says: results to standard output, remarks to standard error.
//!
//! Standard output carries results only, one line each (JSON: one object a line), so that
//! scripts can read it. What a node wrote passes through [`printable`] first: a node must
//! not be able to move a terminal's cursor. No secret is ever handed to this module.

use std::io::{self, Write};

use serde_json::Value;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// Where results go.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    format: Format,
}

impl Report {
    /// A report in this format.
    pub const fn new(format: Format) -> Self {
        Self { format }
    }

    /// Writes to standard error why nothing came of a command.
    pub fn failure(self, text: &str, refused: bool) {
        match self.format {
            Format::Text => remark(text),
            Format::Json => {
                let json = serde_json::json!({"error": text, "refused": refused});
                writeln!(io::stderr().lock(), "{json}").unwrap_or_default();
            }
        }
    }

    /// Writes one result in the chosen format; it has left the process on return.
    pub fn result(self, text: &str, json: &Value) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match self.format {
            Format::Text => writeln!(out, "{text}")?,
            Format::Json => writeln!(out, "{json}")?,
        }
        out.flush()
    }
}

/// Writes a remark. Nobody may be reading standard error, and that is no failure.
pub fn remark(text: &str) {
    writeln!(io::stderr().lock(), "time-wallet: {text}").unwrap_or_default();
}

/// A stranger's text without control characters, cut to a line's length.
pub fn printable(text: &str) -> String {
    const LONGEST: usize = 400;
    text.chars().take(LONGEST).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A time as RFC 3339 in UTC.
///
/// The date is computed by counting days from 0000-03-01, so that the leap day is the last
/// of its year and the months have a formula.
pub fn utc(unix_seconds: i64) -> String {
    let days = unix_seconds.div_euclid(86_400);
    let second = unix_seconds.rem_euclid(86_400);
    let shifted = days.saturating_add(719_468);
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3_600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_760_000_000, "2025-10-09T08:53:20Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
        // A node may send any number.
        assert!(!utc(i64::MAX).is_empty() && !utc(i64::MIN).is_empty());
    }

    #[test]
    fn a_node_cannot_drive_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\nc"), "a?[2Jb?c");
        assert_eq!(printable(&"x".repeat(1_000)).len(), 400);
    }
}
