//! Progress of what can take long, on standard error: a bar where that is a terminal, a line for
//! every tenth where it is not and the user asked with `-p`.
//!
//! Used by `check` and `publish`.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

/// Shows how far something is.
#[derive(Debug)]
pub enum Progress {
    /// A bar in a terminal.
    Bar(ProgressBar),
    /// Lines; how many tenths were shown.
    Lines(u64),
    /// Nothing.
    Silent,
}

impl Progress {
    /// Progress of something that the user knows as `what`.
    pub fn new(what: &str, wanted: bool, quiet: bool) -> Self {
        if quiet && !wanted {
            return Progress::Silent;
        }
        if !std::io::stderr().is_terminal() {
            return if wanted { Progress::Lines(0) } else { Progress::Silent };
        }
        let bar = ProgressBar::new(0).with_message(what.to_owned());
        let template = "{msg} [{bar:40}] {percent} % {bytes}/{total_bytes}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Progress::Bar(bar)
    }

    /// `done` bytes of `total`.
    pub fn show(&mut self, done: u64, total: u64) {
        match self {
            Progress::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Progress::Lines(shown) => {
                let tenths =
                    (u128::from(done) * 10).checked_div(u128::from(total)).unwrap_or(10) as u64;
                if tenths > *shown {
                    *shown = tenths;
                    // Nobody is there to read it.
                    let _ = writeln!(std::io::stderr(), "    ({} %)", tenths * 10);
                }
            }
            Progress::Silent => {}
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        if let Progress::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
