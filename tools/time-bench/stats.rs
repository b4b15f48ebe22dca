//! Latencies as figures.

use serde::Serialize;

use super::load::{Micros, Sample};

/// A distribution, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    pub count: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// Part of the run's time, from and up to a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub from: Micros,
    pub to: Micros,
}

impl Window {
    pub const fn contains(&self, at: Micros) -> bool {
        self.from <= at && at <= self.to
    }

    pub fn seconds(&self) -> f64 {
        (self.to - self.from) as f64 / 1e6
    }

    /// The latencies of the samples in it, in rising order.
    pub fn sorted(&self, samples: &[Sample]) -> Vec<Micros> {
        let inside = samples.iter().filter(|sample| self.contains(sample.at));
        let mut latencies: Vec<Micros> = inside.map(|sample| sample.latency).collect();
        latencies.sort_unstable();
        latencies
    }
}

/// The value below or at which so many of a thousand of the sorted ones are (nearest rank).
pub fn quantile(sorted: &[Micros], per_mille: usize) -> Option<Micros> {
    let rank = (sorted.len() * per_mille).div_ceil(1_000).max(1);
    sorted.get(rank - 1).copied()
}

impl Latency {
    /// Of the samples in a window; `None` if there are none.
    pub fn of(samples: &[Sample], window: Window) -> Option<Self> {
        let sorted = window.sorted(samples);
        let at = |per_mille| quantile(&sorted, per_mille).map(ms);
        let sum: f64 = sorted.iter().map(|latency| ms(*latency)).sum();
        Some(Self {
            count: sorted.len(),
            p50: at(500)?,
            p90: at(900)?,
            p99: at(990)?,
            max: at(1_000)?,
            mean: round(sum / sorted.len() as f64),
        })
    }
}

fn ms(micros: Micros) -> f64 {
    micros as f64 / 1e3
}

/// To a thousandth, which is more than any figure here is good for.
pub fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let sorted: Vec<Micros> = (1..=200).collect();
        let at = |per_mille| quantile(&sorted, per_mille).unwrap();
        assert_eq!((at(500), at(900), at(990), at(1_000)), (100, 180, 198, 200));
        assert_eq!((quantile(&[7], 500), quantile(&[7], 1_000), quantile(&[], 500)), (Some(7), Some(7), None));
    }

    #[test]
    fn only_the_window_counts() {
        let sample = |at, latency| Sample { at, latency };
        let samples = [sample(9, 1), sample(10, 3_000), sample(15, 1_000), sample(20, 2_000), sample(21, 9)];
        let window = Window { from: 10, to: 20 };
        let latency = Latency::of(&samples, window).unwrap();
        let expected = Latency { count: 3, mean: 2.0, p50: 2.0, p90: 3.0, p99: 3.0, max: 3.0 };
        assert_eq!(latency, expected);
        assert_eq!(Latency::of(&samples, Window { from: 30, to: 40 }), None);
    }
}
