//! `ctr run --trace`: the time line of a command, from the spans that ctr, the engine, the shim and what they run have written.
//!
//! ```text
//!    start   length  process         what
//!     0.00    61.20  ctr             run                               |##################################|
//!     3.10    12.40  ctr               create the container            | #######                          |
//!     3.21     0.90  ctr                 Leases/Create                 | #                                |
//!     3.40     0.62  engine                Leases/Create               | #                                |
//! ```
//!
//! Invariant: the file of a trace goes with the command, however it ends.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use proto::containerd::services::introspection::v1::PluginsRequest;
use shim_api::trace::{self, Context, Span};

use crate::client::{Client, Tried};

/// Columns of a chart's bars.
const BAR: usize = 48;
/// The widest name of a span, with its indentation.
const NAME: usize = 44;
/// How often the floor is measured; the least counts.
const FLOORS: usize = 5;

/// A trace of this command.
pub(crate) struct Tracing {
    context: Context,
    /// Whether the engine takes part.
    engine: bool,
}

impl Tracing {
    /// Begins one where the engine looks for it; beside an engine that knows no traces, one of ctr alone.
    pub(crate) async fn begin(client: &Client) -> anyhow::Result<Tracing> {
        let filters = vec!["type==io.containerd.runtime.v2,id==task".to_owned()];
        let plugins =
            client.introspection().plugins(PluginsRequest { filters }).await.tried(|| "ask for traces")?;
        let folder =
            plugins.plugins.iter().find_map(|plugin| plugin.exports.get("traces")).map(PathBuf::from);
        let engine = folder.is_some();
        let folder = folder.unwrap_or_else(std::env::temp_dir);
        let context = Context::create(&folder)
            .map_err(|error| anyhow::anyhow!("cannot begin a trace in {}: {error}", folder.display()))?;
        Ok(Tracing { context, engine })
    }

    /// Does work as the root of the trace, from the beginning of this process on.
    pub(crate) async fn of<F: Future>(&self, work: F) -> F::Output {
        let began = trace::process_began();
        self.context.note("ctr", std::process::id(), "start and connect", began);
        trace::carry(Some(self.context.clone()), work).await
    }

    /// Prints it to stderr.
    pub(crate) fn print(&self) -> anyhow::Result<()> {
        let spans = trace::read(self.context.path())?;
        let floors = (0..FLOORS).map(|_| sys::floor::measure()).collect::<Result<Vec<_>, _>>();
        let floor = match floors {
            Ok(floors) => Ok(floors.into_iter().min().unwrap_or_default()),
            Err(error) => Err(error.to_string()),
        };
        let mut text = chart(&spans, trace::process_began());
        if !self.engine {
            text.push_str("The engine knows no traces: these are ctr's own spans.\n");
        }
        text.push_str(&summary(&spans, trace::process_began(), floor.as_ref().map_err(String::as_str)));
        eprint!("{text}");
        Ok(())
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.context.path());
    }
}

fn milliseconds(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// The spans as lines, each beneath the one that it is part of, in the order of their beginning.
fn chart(spans: &[Span], zero: u64) -> String {
    let end = spans.iter().map(|span| span.began + span.length).max().unwrap_or(zero);
    let total = end.saturating_sub(zero).max(1);
    let mut children: HashMap<u64, Vec<&Span>> = HashMap::new();
    let ids: HashMap<u64, ()> = spans.iter().map(|span| (span.id, ())).collect();
    for span in spans {
        // One whose parent was never written is shown all the same.
        let parent = if ids.contains_key(&span.parent) { span.parent } else { 0 };
        children.entry(parent).or_default().push(span);
    }
    let mut text = format!("{:>9} {:>9}  {:<10} {:<NAME$}\n", "start ms", "length", "process", "what");
    let mut open: Vec<(&Span, usize)> =
        children.get(&0).into_iter().flatten().rev().map(|span| (*span, 0)).collect();
    while let Some((span, depth)) = open.pop() {
        let start = span.began.saturating_sub(zero);
        let name: String = format!("{}{}", "  ".repeat(depth), span.name).chars().take(NAME).collect();
        let _ = writeln!(
            text,
            "{:>9.2} {:>9.2}  {:<10} {name:<NAME$} |{}|",
            milliseconds(start),
            milliseconds(span.length),
            span.process,
            bar(start, span.length, total)
        );
        open.extend(children.get(&span.id).into_iter().flatten().rev().map(|child| (*child, depth + 1)));
    }
    text
}

/// A bar at its place among [`BAR`] columns; what is shorter than one takes one.
fn bar(start: u64, length: u64, total: u64) -> String {
    let column = |at: u64| ((u128::from(at) * BAR as u128) / u128::from(total)) as usize;
    let from = column(start).min(BAR - 1);
    let to = column(start + length).clamp(from + 1, BAR);
    format!("{}{}{}", " ".repeat(from), "#".repeat(to - from), " ".repeat(BAR - to))
}

/// The way to the program in the container, and from its end to ctr's, beside the floor.
fn summary(spans: &[Span], zero: u64, floor: Result<&Duration, &str>) -> String {
    let ms = |at: u64| milliseconds(at.saturating_sub(zero));
    let mut text = String::new();
    let ran = spans.iter().find(|span| span.process == "shim" && span.name == trace::LET_RUN);
    let ended = spans.iter().find(|span| span.process == "container");
    let last = spans.iter().map(|span| span.began + span.length).max().unwrap_or(zero);
    if let Some(ran) = ran {
        let _ = write!(text, "The program runs after {:.2} ms", ms(ran.began + ran.length));
        if let Some(ended) = ended {
            let _ = write!(text, ", has ended after {:.2} ms", ms(ended.began + ended.length));
        }
        let _ = writeln!(text, "; all is done after {:.2} ms.", ms(last));
    }
    let _ = match floor {
        Ok(floor) => writeln!(
            text,
            "The floor, which nobody gets around (namespaces, an overlay, pivot_root, exec and end of a program): {:.2} ms.",
            floor.as_secs_f64() * 1e3
        ),
        Err(error) => writeln!(text, "The floor could not be measured: {error}"),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(id: u64, parent: u64, process: &str, name: &str, began: u64, length: u64) -> Span {
        let ms = 1_000_000;
        let (began, length) = ((1000 + began) * ms, length * ms);
        Span { id, parent, pid: 1, process: process.into(), name: name.into(), began, length }
    }

    #[test]
    fn spans_stand_beneath_what_they_are_part_of() {
        let spans = [
            span(1, 0, "ctr", "run", 0, 100),
            span(2, 1, "ctr", "Tasks/Create", 10, 40),
            span(5, 1, "ctr", "Tasks/Wait", 50, 45),
            span(3, 2, "engine", "Tasks/Create", 11, 38),
            span(4, 3, "runc", "create", 20, 20),
            span(6, 9, "shim", "orphan", 60, 1),
        ];
        let text = chart(&spans, 1_000_000_000);
        let lines: Vec<&str> = text.lines().collect();
        let starts: Vec<&str> =
            lines[1..].iter().map(|line| line.split_once('|').unwrap().0.trim_end()).collect();
        assert_eq!(
            starts,
            [
                "     0.00    100.00  ctr        run",
                "    10.00     40.00  ctr          Tasks/Create",
                "    11.00     38.00  engine         Tasks/Create",
                "    20.00     20.00  runc             create",
                "    50.00     45.00  ctr          Tasks/Wait",
                "    60.00      1.00  shim       orphan",
            ]
        );
        assert_eq!(lines[1].matches('#').count(), BAR);
        assert!(lines[6].contains(" # ") && lines.iter().skip(1).all(|line| line.ends_with('|')), "{text}");
    }

    #[test]
    fn a_bar_never_leaves_its_columns() {
        for (start, length) in [(0, 0), (0, 100), (100, 0), (99, 1), (50, 100)] {
            let bar = bar(start, length, 100);
            assert!(bar.len() == BAR && bar.contains('#'), "{start} {length} {bar:?}");
        }
    }

    #[test]
    fn the_summary_says_when_the_program_ran_and_what_is_the_least() {
        let spans = [
            span(1, 0, "shim", trace::LET_RUN, 30, 10),
            span(2, 0, "container", "process, until its end", 20, 25),
            span(3, 0, "ctr", "delete", 50, 10),
        ];
        let text = summary(&spans, 1_000_000_000, Ok(&Duration::from_micros(2150)));
        assert!(text.starts_with(
            "The program runs after 40.00 ms, has ended after 45.00 ms; all is done after 60.00 ms.\n"
        ));
        assert!(text.contains(": 2.15 ms.\n"), "{text}");
        assert!(summary(&[], 0, Err("no root")).contains("no root"));
    }
}
