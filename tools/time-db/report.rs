//! What is said: results to standard output, remarks and progress to standard error.
//!
//! Standard output carries results only, so that scripts can read it: lines for people, one
//! JSON array (or object), or one JSON object a line.

use std::io::{self, BufWriter, StdoutLock, Write};

use serde::Serialize;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// One JSON array, or one object where there is one result
    Json,
    /// One JSON object a line
    Ndjson,
}

/// Results of which there are many.
#[derive(Debug)]
pub struct Listing {
    out: BufWriter<StdoutLock<'static>>,
    format: Format,
    printed: usize,
}

impl Listing {
    /// A listing with nothing in it.
    pub fn new(format: Format) -> io::Result<Self> {
        let mut out = BufWriter::new(io::stdout().lock());
        if format == Format::Json {
            out.write_all(b"[")?;
        }
        Ok(Self { out, format, printed: 0 })
    }

    /// The next result; `text` makes it readable for people.
    pub fn add<T: Serialize>(&mut self, result: &T, text: impl FnOnce(&T) -> String) -> io::Result<()> {
        match self.format {
            Format::Table => writeln!(self.out, "{}", text(result))?,
            Format::Ndjson => writeln!(self.out, "{}", serde_json::to_string(result)?)?,
            Format::Json => {
                self.out.write_all(if self.printed == 0 { b"\n" } else { b",\n" })?;
                self.out.write_all(serde_json::to_string(result)?.as_bytes())?;
            }
        }
        self.printed += 1;
        Ok(())
    }

    /// How many there were.
    pub const fn printed(&self) -> usize {
        self.printed
    }

    /// Ends it.
    pub fn finish(mut self) -> io::Result<()> {
        if self.format == Format::Json {
            self.out.write_all(b"\n]\n")?;
        }
        self.out.flush()
    }
}

/// Prints the one result of a command. What it is stays so if nobody reads it.
pub fn result<T: Serialize>(format: Format, result: &T, text: impl FnOnce(&T) -> String) -> io::Result<()> {
    let line = match format {
        Format::Table => text(result),
        Format::Json | Format::Ndjson => serde_json::to_string(result)?,
    };
    let mut out = io::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes a remark. Nobody may be reading standard error, and that is no failure.
pub fn remark(text: &str) {
    writeln!(io::stderr().lock(), "time-db: {text}").unwrap_or_default();
}

/// Seconds since the Unix epoch; 0 on a clock before it.
pub fn unix_now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

/// How long ago a time was, roughly.
pub fn ago(unix_seconds: i64, now: i64) -> String {
    let seconds = now.saturating_sub(unix_seconds);
    match seconds {
        ..0 => format!("{} s ahead of this clock", seconds.unsigned_abs()),
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// Base units as TIME.
pub fn time(units: u64) -> String {
    format!("{}.{:08}", units / 100_000_000, units % 100_000_000)
}

/// Bytes for people.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut shown, mut unit) = (bytes, 0);
    while shown >= 10 * 1024 && unit + 1 < UNITS.len() {
        (shown, unit) = (shown / 1024, unit + 1);
    }
    format!("{shown} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_readable() {
        assert_eq!(time(150_000_000), "1.50000000");
        assert_eq!(bytes(10_239), "10239 B");
        assert_eq!(bytes(10_240), "10 KiB");
        assert_eq!(bytes(u64::MAX), "16777215 TiB");
        assert_eq!(ago(100, 101), "1 s ago");
        assert_eq!(ago(100, 99), "1 s ahead of this clock");
        assert_eq!(ago(0, 7_200), "2 h ago");
        assert_eq!(ago(i64::MIN, i64::MAX), format!("{} days ago", i64::MAX / 86_400));
    }
}
