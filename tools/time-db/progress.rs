//! Progress of long work, on a terminal only.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

const KNOWN: &str = "{elapsed_precise} {msg} [{wide_bar}] {percent:>3} % ({eta})";
const STEPS: &str = "{elapsed_precise} [{bar:24}] {pos}/{len} {msg}";
const UNKNOWN: &str = "{elapsed_precise} {msg} {human_pos} {spinner}";

/// A bar on standard error, if that is a terminal.
#[derive(Debug, Default)]
pub struct Progress {
    bar: RefCell<Option<(String, ProgressBar)>>,
}

impl Progress {
    /// Says how far something is; with a total it is a bar, without one a count.
    pub fn tell(&self, what: &str, done: u64, total: Option<u64>) {
        let template = if total.is_some() { KNOWN } else { UNKNOWN };
        self.show(what, template, total, |bar| {
            bar.set_message(what.to_owned());
            bar.set_position(done);
        });
    }

    /// The same of the rows of one of several steps: a bar of the steps.
    pub fn step(&self, steps: &[&str], step: &str, rows: u64) {
        let begun = steps.iter().position(|name| *name == step).unwrap_or_default();
        self.show("steps", STEPS, Some(steps.len() as u64), |bar| {
            bar.set_message(format!("{step} {rows}"));
            bar.set_position(begun as u64);
        });
    }

    fn show(&self, key: &str, template: &str, total: Option<u64>, update: impl FnOnce(&ProgressBar)) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let mut bar = self.bar.borrow_mut();
        if bar.as_ref().is_none_or(|(shown, _)| shown != key) {
            if let Some((_, finished)) = bar.take() {
                finished.finish_and_clear();
            }
            *bar = Some((key.to_owned(), new_bar(template, total)));
        }
        if let Some((_, bar)) = bar.as_ref() {
            update(bar);
        }
    }

    /// Takes it away.
    pub fn finish(&self) {
        if let Some((_, bar)) = self.bar.borrow_mut().take() {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(template: &str, total: Option<u64>) -> ProgressBar {
    let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
