//! The writer of canonical bytes (protocol §1).

/// Fixed-width little-endian integers, raw hashes and keys, counted lists and texts.
///
/// Only what is hashed or signed is written with it; nothing is ever parsed back.
#[derive(Debug, Default, Clone)]
pub struct CanonicalWriter(Vec<u8>);

impl CanonicalWriter {
    /// An empty writer with room for `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Eight bytes, little-endian two's complement.
    pub fn i64(&mut self, value: i64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// The count that stands before a list's items.
    ///
    /// Every list of the protocol has a bound far below `u32::MAX`.
    pub fn count(&mut self, items: usize) -> &mut Self {
        self.u32(u32::try_from(items).unwrap_or(u32::MAX))
    }

    /// Raw bytes without a length: hashes, keys, address payloads.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// A `u32` length, then UTF-8.
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.count(text.len()).raw(text.as_bytes())
    }

    /// What was written.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// What was written, by value.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}
