//! Money.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An amount in base units; 1 TIME is 100,000,000 of them.
///
/// Never more than 2^53-1, so that it is exact as a JSON number in JavaScript.
/// Arithmetic is checked: there is no operator that could wrap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Amount(u64);

impl Amount {
    /// Nothing.
    pub const ZERO: Self = Self(0);
    /// The largest amount and the largest total: 2^53-1.
    pub const MAX: Self = Self((1 << 53) - 1);
    /// Base units in one TIME.
    pub const UNITS_PER_TIME: u64 = 100_000_000;

    /// The amount of so many base units; `None` above [`Amount::MAX`].
    pub const fn from_units(units: u64) -> Option<Self> {
        if units <= Self::MAX.0 { Some(Self(units)) } else { None }
    }

    /// The number of base units.
    pub const fn units(self) -> u64 {
        self.0
    }

    /// The sum; `None` above [`Amount::MAX`].
    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).and_then(Self::from_units)
    }

    /// The difference; `None` below zero.
    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    /// The sum of all; `None` above [`Amount::MAX`].
    pub fn checked_sum(amounts: impl IntoIterator<Item = Self>) -> Option<Self> {
        amounts.into_iter().try_fold(Self::ZERO, Self::checked_add)
    }

    /// Reads decimal TIME with at most eight places, as a person types it: `1`, `0.5`.
    pub fn parse_time(text: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 8 {
            return None;
        }
        if text.contains('.') && fraction.is_empty() {
            return None;
        }
        let whole: u64 = whole.parse().ok()?;
        let fraction: u64 = format!("{fraction:0<8}").parse().ok()?;
        whole.checked_mul(Self::UNITS_PER_TIME)?.checked_add(fraction).and_then(Self::from_units)
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let units = u64::deserialize(deserializer)?;
        Self::from_units(units).ok_or_else(|| serde::de::Error::custom("an amount is at most 2^53-1 base units"))
    }
}

/// Decimal TIME with eight places.
impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:08}", self.0 / Self::UNITS_PER_TIME, self.0 % Self::UNITS_PER_TIME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_stays_in_range() {
        let one = Amount::from_units(1).unwrap();
        assert_eq!(Amount::from_units(1 << 53), None);
        assert_eq!(Amount::MAX.checked_add(one), None);
        assert_eq!(Amount::ZERO.checked_sub(one), None);
        assert_eq!(Amount::checked_sum([Amount::MAX, Amount::ZERO]), Some(Amount::MAX));
        assert_eq!(Amount::checked_sum([Amount::MAX, one]), None);
    }

    #[test]
    fn text_is_decimal_time() {
        for (text, units) in [("1", 100_000_000), ("0.5", 50_000_000), ("12.00000001", 1_200_000_001), ("0", 0)] {
            assert_eq!(Amount::parse_time(text).map(Amount::units), Some(units), "{text}");
        }
        for text in ["", ".", ".5", "1.", "-1", "+1", "1e3", "1.123456789", "90071993", "99999999999999999999", "1,5"] {
            assert_eq!(Amount::parse_time(text), None, "{text}");
        }
        assert_eq!(Amount::from_units(150_000_000).unwrap().to_string(), "1.50000000");
    }
}
