//! Progress of long work, on a terminal only.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

const KNOWN: &str = "{elapsed_precise} {msg} [{wide_bar}] {percent:>3} % ({eta})";
const UNKNOWN: &str = "{elapsed_precise} {msg} {human_pos} {spinner}";

/// A bar on standard error, if that is a terminal.
#[derive(Debug, Default)]
pub struct Progress {
    bar: RefCell<Option<(String, ProgressBar)>>,
}

impl Progress {
    /// Says how far something is; with a total it is a bar, without one a count.
    pub fn tell(&self, what: &str, done: u64, total: Option<u64>) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let mut bar = self.bar.borrow_mut();
        if bar.as_ref().is_none_or(|(shown, _)| shown != what) {
            if let Some((_, finished)) = bar.take() {
                finished.finish_and_clear();
            }
            *bar = Some((what.to_owned(), new_bar(what, total)));
        }
        if let Some((_, bar)) = bar.as_ref() {
            bar.set_position(done);
        }
    }

    /// Takes it away.
    pub fn finish(&self) {
        if let Some((_, bar)) = self.bar.borrow_mut().take() {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(what: &str, total: Option<u64>) -> ProgressBar {
    let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    let template = if total.is_some() { KNOWN } else { UNKNOWN };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
