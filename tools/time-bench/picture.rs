//! Latency and throughput over time, as SVG.
//!
//! One column for each slice of the run. Latency stands on a logarithmic scale, for what is
//! interesting about it is a thousand times as large as what is usual.

use std::fmt::Write;

use super::load::{Micros, Sample};
use super::stats::{Window, quantile};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 540.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
/// Where the upper part, the latencies, lies.
const LATENCY: (f64, f64) = (40.0, 350.0);
/// Where the lower part, the throughput, lies.
const THROUGHPUT: (f64, f64) = (390.0, 500.0);
/// Columns at most.
const MAX_SLICES: u64 = 240;
/// The shortest slice.
const MIN_SLICE: Micros = 100_000;
/// The lines of the upper part: label, per mille, colour.
const LINES: [(&str, usize, &str); 3] = [("p50", 500, "#2b6cb0"), ("p99", 990, "#d97706"), ("max", 1_000, "#b91c1c")];

/// A part of the run.
struct Slice {
    from: Micros,
    /// Final payments a second.
    rate: f64,
    /// By line, milliseconds.
    latency: Vec<Option<f64>>,
}

fn slices(samples: &[Sample], end: Micros) -> (Micros, Vec<Slice>) {
    let length = (end / MAX_SLICES).max(MIN_SLICE);
    let slice = |number: u64| {
        let from = number * length;
        let sorted = Window { from, to: from + length - 1 }.sorted(samples);
        let ms = |per_mille| quantile(&sorted, per_mille).map(|micros| micros as f64 / 1e3);
        Slice {
            from,
            rate: sorted.len() as f64 * 1e6 / length as f64,
            latency: LINES.iter().map(|line| ms(line.1)).collect(),
        }
    };
    (length, (0..=end / length).map(slice).collect())
}

/// The powers of ten around the values, at least one apart.
fn decades(values: impl Iterator<Item = f64>) -> (i32, i32) {
    #[allow(clippy::cast_possible_truncation, reason = "logarithms of milliseconds are small")]
    let logs: Vec<i32> = values.map(|value| value.max(0.01).log10().floor() as i32).collect();
    let low = logs.iter().copied().min().unwrap_or(0);
    (low, logs.iter().copied().max().unwrap_or(0) + 1)
}

/// Draws the run: `finalised` samples, and the window that was measured.
pub fn draw(finalised: &[Sample], window: Window, title: &str) -> String {
    let mut out = String::new();
    // Writing into a string does not fail.
    write_svg(&mut out, finalised, window, title).unwrap_or_default();
    out
}

fn write_svg(out: &mut String, finalised: &[Sample], window: Window, title: &str) -> std::fmt::Result {
    let end = finalised.iter().map(|sample| sample.at).max().unwrap_or(0).max(window.to).max(1);
    let (length, slices) = slices(finalised, end);
    let x = |at: Micros| LEFT + (WIDTH - LEFT - RIGHT) * at as f64 / (end + length) as f64;
    let (low, high) = decades(slices.iter().flat_map(|slice| slice.latency.iter().copied().flatten()));
    let y_ms = |ms: f64| {
        let share = (ms.max(0.01).log10() - f64::from(low)) / f64::from(high - low);
        LATENCY.1 - (LATENCY.1 - LATENCY.0) * share
    };
    let most = slices.iter().map(|slice| slice.rate).fold(1.0, f64::max);
    let y_rate = |rate: f64| THROUGHPUT.1 - (THROUGHPUT.1 - THROUGHPUT.0) * rate / most;

    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">"
    )?;
    writeln!(out, "<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>")?;
    let (from, to) = (x(window.from), x(window.to));
    for (top, bottom) in [LATENCY, THROUGHPUT] {
        let (width, height) = (to - from, bottom - top);
        writeln!(out, "<rect x=\"{from:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"{height}\" fill=\"#f1f5f9\"/>")?;
    }
    writeln!(out, "<text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{}</text>", escaped(title))?;
    for decade in low..=high {
        let (ms, y) = (10_f64.powi(decade), y_ms(10_f64.powi(decade)));
        rule(out, y, &format!("{ms} ms"))?;
    }
    for rate in [0.0, most] {
        rule(out, y_rate(rate), &format!("{rate:.0}/s"))?;
    }
    for (line, (label, _, colour)) in LINES.iter().enumerate() {
        let middle = |slice: &Slice| x(slice.from + length / 2);
        let point = |slice: &Slice| slice.latency[line].map(|ms| format!("{:.1},{:.1}", middle(slice), y_ms(ms)));
        let points: Vec<String> = slices.iter().filter_map(point).collect();
        writeln!(
            out,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{}\"/>",
            points.join(" ")
        )?;
        let at = WIDTH - 160.0 + 50.0 * line as f64;
        writeln!(out, "<text x=\"{at}\" y=\"20\" fill=\"{colour}\">{label}</text>")?;
    }
    for slice in &slices {
        let (left, width, top) = (x(slice.from), x(slice.from + length) - x(slice.from), y_rate(slice.rate));
        let height = THROUGHPUT.1 - top;
        writeln!(
            out,
            "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"#64748b\"/>",
            (width - 0.5).max(0.5)
        )?;
    }
    let seconds = end as f64 / 1e6;
    let step =
        [1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0].into_iter().find(|step| seconds / step <= 12.0).unwrap_or(3_600.0);
    let mut second = 0.0;
    while second <= seconds {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and the end")]
        let at = x((second * 1e6) as Micros);
        writeln!(out, "<text x=\"{at:.1}\" y=\"520\" text-anchor=\"middle\">{second} s</text>")?;
        second += step;
    }
    writeln!(out, "</svg>")
}

fn rule(out: &mut String, y: f64, label: &str) -> std::fmt::Result {
    let right = WIDTH - RIGHT;
    writeln!(out, "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#cbd5e1\"/>")?;
    writeln!(out, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 6.0, y + 4.0)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_becomes_columns() {
        let samples: Vec<Sample> = (0..1_000).map(|i| Sample { at: i * 10_000, latency: 1_000 + i }).collect();
        let (length, slices) = slices(&samples, 9_990_000);
        assert_eq!((length, slices.len()), (MIN_SLICE, 100));
        assert!(slices.iter().all(|slice| (slice.rate - 100.0).abs() < 1e-9));
        assert_eq!(slices[0].latency, [Some(1.004), Some(1.009), Some(1.009)]);
        assert_eq!(decades([0.9, 1.0, 30.0].into_iter()), (-1, 2));
    }

    #[test]
    fn whatever_happened_there_is_a_picture() {
        let window = Window { from: 0, to: 0 };
        for samples in [&[][..], &[Sample { at: 5, latency: 0 }], &[Sample { at: 5_000_000, latency: 1 << 40 }]] {
            let svg = draw(samples, window, "a < b");
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && svg.contains("a &lt; b"), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
