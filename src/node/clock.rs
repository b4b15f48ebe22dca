//! The node's clocks.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::consensus::Now;
use crate::types::UnixSeconds;

/// Seconds since the Unix epoch; 0 on a clock before it.
pub(super) fn unix_now() -> UnixSeconds {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

/// The time, when the monotonic clock shows so many milliseconds.
pub(super) fn now_at(ms: u64) -> Now {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now {
        ms,
        unix: i64::try_from(unix.as_secs()).unwrap_or(i64::MAX),
        unix_ms: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX),
    }
}
