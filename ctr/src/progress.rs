//! Progress of what is no transfer, on stderr: a bar per blob or layer on a terminal, a line each when it is done otherwise.
//! Transfers are shown by `display`.

use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// All bars of one command.
#[derive(Clone)]
pub(crate) struct Progress {
    bars: Option<MultiProgress>,
}

/// One blob or layer.
pub(crate) struct Item {
    bar: Option<ProgressBar>,
    name: String,
}

impl Progress {
    /// Bars when stderr is a terminal.
    pub(crate) fn new() -> Progress {
        Progress { bars: std::io::stderr().is_terminal().then(MultiProgress::new) }
    }

    /// Begins an item of `total` bytes; without a total it only spins.
    pub(crate) fn start(&self, verb: &str, name: &str, total: Option<u64>) -> Item {
        let bar = self.bars.as_ref().map(|bars| {
            let (bar, style) = match total {
                Some(total) => (
                    ProgressBar::new(total),
                    "{prefix:10} {msg:24} {bar:30} {binary_bytes}/{binary_total_bytes}",
                ),
                None => (ProgressBar::new_spinner(), "{prefix:10} {msg:24} {spinner} {elapsed}"),
            };
            let bar = bars.add(bar);
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            bar.set_prefix(verb.to_owned());
            bar.set_message(name.to_owned());
            if total.is_none() {
                bar.enable_steady_tick(std::time::Duration::from_millis(120));
            }
            bar
        });
        Item { bar, name: name.to_owned() }
    }
}

impl Item {
    /// Counts more bytes as done.
    pub(crate) fn advance(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    /// Ends the item; `outcome` says how.
    pub(crate) fn finish(self, outcome: &str) {
        match self.bar {
            Some(bar) => {
                bar.set_prefix(outcome.to_owned());
                bar.finish();
            }
            None => eprintln!("{outcome} {}", self.name),
        }
    }
}

/// A digest short enough for a line: algorithm and twelve characters.
pub(crate) fn short(digest: &str) -> &str {
    match digest.split_once(':') {
        Some((algorithm, hex)) => &digest[..(algorithm.len() + 1 + hex.len().min(12))],
        None => digest,
    }
}
