//! Reading an export: whole lines, in bounded memory, with the checksum of what was read.

use std::io::{BufRead, Read};

use serde::de::DeserializeOwned;

use super::{FORMAT, Header, ImportError, ImportFault, MAX_LINE_BYTES, Record, Trailer, VERSION};

/// The lines of an export.
pub(super) struct Lines<'a> {
    input: &'a mut dyn BufRead,
    hasher: blake3::Hasher,
    line: Vec<u8>,
    number: u64,
    records: u64,
    /// Bytes that were read.
    pub(super) bytes: u64,
}

/// A record, or the end, which has been checked.
pub(super) enum Next {
    Record(Record),
    End,
}

/// What is looked at first in the header: another version may look otherwise.
#[derive(serde::Deserialize)]
struct Preamble {
    format: String,
    version: u32,
}

impl<'a> Lines<'a> {
    pub(super) fn new(input: &'a mut dyn BufRead) -> Self {
        Self { input, hasher: blake3::Hasher::new(), line: Vec::new(), number: 0, records: 0, bytes: 0 }
    }

    /// The number of the line that was read last.
    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    pub(super) const fn refuse(&self, fault: ImportFault) -> ImportError {
        ImportError::Refused { line: self.number, fault }
    }

    /// The checksum of everything up to the last line that was taken in.
    pub(super) fn checksum(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }

    pub(super) fn header(&mut self) -> Result<Header, ImportError> {
        if !self.read()? {
            self.number = 1;
            return Err(self.refuse(ImportFault::NotAnExport));
        }
        let Ok(Preamble { format, version }) = serde_json::from_slice(&self.line) else {
            return Err(self.refuse(ImportFault::NotAnExport));
        };
        if format != FORMAT {
            return Err(self.refuse(ImportFault::NotAnExport));
        }
        if version != VERSION {
            return Err(self.refuse(ImportFault::UnknownVersion(version)));
        }
        let header = self.parse()?;
        self.hasher.update(&self.line);
        Ok(header)
    }

    /// The next record; at the end, that the file is whole.
    pub(super) fn next(&mut self) -> Result<Next, ImportError> {
        if !self.read()? {
            self.number += 1;
            return Err(self.refuse(ImportFault::Incomplete));
        }
        if self.line.starts_with(b"{\"End\"") {
            let Trailer::End { records, blake3 } = self.parse()?;
            return self.end(records, &blake3);
        }
        let record = self.parse()?;
        self.hasher.update(&self.line);
        self.records += 1;
        Ok(Next::Record(record))
    }

    fn end(&mut self, records: u64, blake3: &str) -> Result<Next, ImportError> {
        if hex::encode(self.checksum()) != blake3 {
            return Err(self.refuse(ImportFault::Checksum));
        }
        if records != self.records {
            return Err(self.refuse(ImportFault::Count { expected: records, found: self.records }));
        }
        if self.read()? {
            return Err(self.refuse(ImportFault::AfterTheEnd));
        }
        Ok(Next::End)
    }

    /// Reads a line with its end; `false` where the file is at its end.
    fn read(&mut self) -> Result<bool, ImportError> {
        self.line.clear();
        let read = Read::take(&mut *self.input, MAX_LINE_BYTES).read_until(b'\n', &mut self.line)?;
        if read == 0 {
            return Ok(false);
        }
        self.number += 1;
        self.bytes += read as u64;
        match self.line.last() {
            Some(b'\n') => Ok(true),
            _ if read as u64 >= MAX_LINE_BYTES => Err(self.refuse(ImportFault::TooLong)),
            _ => Err(self.refuse(ImportFault::Incomplete)),
        }
    }

    fn parse<T: DeserializeOwned>(&self) -> Result<T, ImportError> {
        serde_json::from_slice(&self.line).map_err(|error| self.refuse(ImportFault::NotARecord(error.to_string())))
    }
}
