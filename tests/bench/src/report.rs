//! The report: what was measured, as a page with tables and plots, and as lines of JSON.
//!
//! It is made from the records alone, so that a run can be looked at again.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::cases::{Against, Case, Limit, Mark, Point};
use crate::image::About;
use crate::measure::Measure;
use crate::plot::{self, Growth, Panel, number};
use crate::stats::{ratio_range, summary};

/// Ours, in the records.
pub(crate) const OURS: &str = "gantryd";
/// The floor, in the records.
pub(crate) const FLOOR: &str = "floor";
/// What the marks are compared with, in the records.
pub(crate) const THEIRS: &str = "containerd";

/// One number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) case: String,
    pub(crate) peer: String,
    pub(crate) round: usize,
    pub(crate) measure: Measure,
    /// How large the work was, where sizes vary.
    #[serde(default)]
    pub(crate) size: usize,
    pub(crate) value: f64,
}

impl Record {
    fn point(&self) -> Point {
        Point { measure: self.measure, size: self.size }
    }
}

/// All that a run has found out.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Results {
    /// When, in words.
    pub(crate) date: String,
    pub(crate) machine: Vec<(String, String)>,
    /// The engines and their versions, in the order of the runs.
    pub(crate) peers: Vec<(String, String)>,
    pub(crate) image: Option<About>,
    pub(crate) records: Vec<Record>,
    /// Runs that failed: case, engine, why.
    pub(crate) failures: Vec<(String, String, String)>,
}

/// A mark, and what was reached of it.
pub(crate) struct Outcome {
    pub(crate) mark: Mark,
    pub(crate) ours: f64,
    pub(crate) theirs: f64,
}

impl Outcome {
    /// What the mark looks at: the ratio, or the figure itself.
    pub(crate) fn ratio(&self) -> f64 {
        match self.mark.against {
            Against::Itself => self.ours,
            Against::Containerd | Against::Floor => self.ours / self.theirs,
        }
    }

    pub(crate) fn reached(&self) -> bool {
        match self.mark.limit {
            Limit::AtMost(most) => self.ratio() <= most,
            Limit::AtLeast(least) => self.ratio() >= least,
        }
    }

    /// The mark in words.
    pub(crate) fn asks(&self) -> String {
        match self.mark.limit {
            Limit::AtMost(most) => format!("at most {most}"),
            Limit::AtLeast(least) => format!("at least {least}"),
        }
    }
}

impl Results {
    pub(crate) fn samples(&self, case: &str, peer: &str, point: Point) -> Vec<f64> {
        let wanted = |record: &&Record| record.case == case && record.peer == peer && record.point() == point;
        self.records.iter().filter(wanted).map(|record| record.value).collect()
    }

    fn median(&self, case: &str, peer: &str, point: Point) -> Option<f64> {
        summary(&self.samples(case, peer, point)).map(|summary| summary.median)
    }

    /// What was measured in a case.
    fn points(&self, case: &str) -> Vec<Point> {
        let of_it = self.records.iter().filter(|record| record.case == case).map(Record::point);
        of_it.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The medians of a round, of both.
    fn pairs(&self, case: &str, one: &str, other: &str, point: Point) -> Vec<(f64, f64)> {
        let last = self.records.iter().map(|record| record.round).max().unwrap_or(0);
        let of = |peer: &str, round: usize| {
            let wanted = |record: &&Record| {
                record.case == case && record.peer == peer && record.point() == point && record.round == round
            };
            let values: Vec<f64> = self.records.iter().filter(wanted).map(|record| record.value).collect();
            summary(&values).map(|summary| summary.median)
        };
        (0..=last).filter_map(|round| Some((of(one, round)?, of(other, round)?))).collect()
    }

    /// What was reached of a case's marks; nothing of those that lack a side.
    pub(crate) fn outcomes(&self, case: &Case) -> Vec<Outcome> {
        let outcome = |mark: &Mark| {
            let ours = self.median(case.name, OURS, mark.point)?;
            let theirs = self.median(case.name, side(mark.against), mark.point)?;
            Some(Outcome { mark: *mark, ours, theirs })
        };
        case.marks.iter().filter_map(outcome).collect()
    }

    /// The last line: how much of it went well.
    pub(crate) fn line(&self, cases: &[&Case]) -> String {
        let ran =
            cases.iter().filter(|case| self.records.iter().any(|record| record.case == case.name)).count();
        let outcomes: Vec<Outcome> = cases.iter().flat_map(|case| self.outcomes(case)).collect();
        let reached = outcomes.iter().filter(|outcome| outcome.reached()).count();
        let marks: usize = cases.iter().map(|case| case.marks.len()).sum();
        format!(
            "{} cases, {ran} measured; {marks} marks: {reached} reached, {} not reached, {} not measured; {} runs failed",
            cases.len(),
            outcomes.len() - reached,
            marks - outcomes.len(),
            self.failures.len()
        )
    }
}

fn side(against: Against) -> &'static str {
    match against {
        Against::Containerd => THEIRS,
        Against::Floor => FLOOR,
        Against::Itself => OURS,
    }
}

/// Writes `folder/benchmarks.md`, its plots in `folder/benchmarks`, and the page's text.
pub(crate) fn write(results: &Results, cases: &[&Case], folder: &Path) -> Result<()> {
    let plots = folder.join("benchmarks");
    fs::create_dir_all(&plots).with_context(|| format!("cannot make {}", plots.display()))?;
    for case in cases {
        let path = plots.join(format!("{}.svg", case.name));
        if case.sizes.is_empty() {
            let panels = panels(results, case);
            if !panels.is_empty() {
                plot::draw(&path, &panels)?;
            }
        } else {
            let growths = growths(results, case);
            if !growths.is_empty() {
                plot::draw_growth(&path, &growths)?;
            }
        }
    }
    fs::write(folder.join("benchmarks.md"), page(results, cases)?)?;
    Ok(())
}

fn panels(results: &Results, case: &Case) -> Vec<Panel> {
    let synced = case.marks.iter().any(|mark| mark.point.measure == Measure::Synced);
    let wall = if synced { Measure::Synced } else { Measure::Wall };
    let panel = |measure: Measure| {
        let rows = rows(results, case, Point { measure, size: 0 });
        let mark = results.outcomes(case).into_iter().find(|outcome| outcome.mark.point.measure == measure);
        let mark = mark.and_then(|outcome| match (outcome.mark.limit, outcome.mark.against) {
            (_, Against::Itself) => None,
            (Limit::AtMost(ratio) | Limit::AtLeast(ratio), _) => Some(outcome.theirs * ratio),
        });
        (!rows.is_empty()).then(|| Panel { title: titled(measure), rows, mark })
    };
    [wall, Measure::Start, Measure::End, Measure::Cpu, Measure::Peak].into_iter().filter_map(panel).collect()
}

fn titled(measure: Measure) -> String {
    match measure.unit() {
        "" => measure.title().to_owned(),
        unit => format!("{} ({unit})", measure.title()),
    }
}

/// How the measures of a case grow with its size: of each the medians, by engine. Those that have a mark come first.
fn growths(results: &Results, case: &Case) -> Vec<Growth> {
    const MOST: usize = 4;
    let points = results.points(case.name);
    let marked = case.marks.iter().map(|mark| mark.point.measure);
    let mut measures: Vec<Measure> = Vec::new();
    for measure in marked.chain(points.iter().map(|point| point.measure)) {
        if !measures.contains(&measure) && points.iter().any(|point| point.measure == measure) {
            measures.push(measure);
        }
    }
    let growth = |measure: Measure| {
        let sizes: Vec<usize> =
            points.iter().filter(|point| point.measure == measure).map(|point| point.size).collect();
        let medians = |name: &str| {
            let of = |size: &usize| results.median(case.name, name, Point { measure, size: *size });
            sizes.iter().map(of).collect::<Vec<_>>()
        };
        let rows = results.peers.iter().map(|(name, _)| (name.clone(), medians(name)));
        let rows = rows.filter(|(_, medians)| medians.iter().any(Option::is_some)).collect();
        Growth { title: titled(measure), of: case.sizes, sizes, rows }
    };
    measures.into_iter().take(MOST).map(growth).collect()
}

/// Who has samples of a figure, ours first.
fn rows(results: &Results, case: &Case, point: Point) -> Vec<(String, Vec<f64>)> {
    let names = results.peers.iter().map(|(name, _)| name.as_str()).chain([FLOOR]);
    names
        .map(|name| (name.to_owned(), results.samples(case.name, name, point)))
        .filter(|(_, samples)| !samples.is_empty())
        .collect()
}

/// The page.
fn page(results: &Results, cases: &[&Case]) -> Result<String> {
    let mut page = String::from(concat!(
        "# Benchmarks\n\n",
        "Made by `make bench`, which measures gantryd beside containerd in one run and writes this page; not edited by hand.\n",
        "A ratio is gantryd's median by the other's: below 1, gantryd needs less. The marks are those that the project has set\n",
        "itself.\n\n",
    ));
    writeln!(page, "{}, {}.\n", results.date, results.line(cases))?;
    marks(&mut page, results, cases)?;
    page.push_str("## How\n\n");
    page.push_str(concat!(
        "- Both engines have the same disk, runc and image, and their defaults otherwise; no CRI in either. They run one at a\n",
        "  time, in turn (A B A B), each run with a new engine on a new file system of its own (ext4\n",
        "  in a file, over a loop device: on one that is kept, a run would pay for the files that the one before it had, as ext4\n",
        "  does not give out inodes again within minutes of their deletion). The first of each is not counted (`--quick` has\n",
        "  none such).\n",
        "- What a restart of the machine may clear (/run: bundles, sockets, the runtime's state) is in memory, as it is wherever\n",
        "  systemd runs; where /run is on a disk, the suite has one of its own.\n",
        "- Each has its own client: gantryd this project's `ctr`, containerd the `ctr` that comes with it. A client does part of\n",
        "  the work (with containerd 1.6, it fetches), so its time and memory count.\n",
        "- Before a run everything earlier is synced to disk, and what the run reads (the registry's files, the archive) is in the\n",
        "  page cache, as it has just been read. Caches are not dropped.\n",
        "- CPU time is user and system time of the engine's control group (with shims and helpers, without containers and without\n",
        "  the registry) and of the client. Writing back to disk is the kernel's and in nobody's. Peak memory of the engine is the\n",
        "  kernel's high-water mark (VmHWM), set back before the run; that of the client and the PSS are read every 20 ms,\n",
        "  or less often where that would take more than a fiftieth of a processor.\n",
        "- \"Until on disk\" adds the time of a sync of the file system after the client has ended. containerd 1.6 answers before an\n",
        "  unpacked image is on disk; gantryd answers after.\n",
        "- Least and greatest stand beside each median; the 99th percentile where there are 100 samples or more. A ratio's range is\n",
        "  that of the rounds, each a pair of runs one after the other.\n\n",
    ));
    for (what, which) in &results.machine {
        writeln!(page, "- {what}: {which}")?;
    }
    for (name, version) in &results.peers {
        writeln!(page, "- {name}: {version}")?;
    }
    if let Some(image) = &results.image {
        image_table(&mut page, image)?;
    }
    for case in cases {
        case_part(&mut page, results, case)?;
    }
    page.push_str(concat!(
        "\n## What this does not show\n\n",
        "One machine, a registry on loopback (no network to wait for), few rounds, files that compress as a system's own do.\n",
        "containerd is Debian's; a newer one joins by `--containerd PATH`. The client has the engines' processors: what it needs to\n",
        "read a thousand streams or ten thousand records, the engines lack. Containers of busybox, without a network of their own\n",
        "but for pods; one size of everything that is not said to vary.\n",
    ));
    Ok(page)
}

fn marks(page: &mut String, results: &Results, cases: &[&Case]) -> Result<()> {
    page.push_str("| case | measure | gantryd | beside | its figure | ratio | mark | |\n|---|---|---|---|---|---|---|---|\n");
    for case in cases {
        for outcome in results.outcomes(case) {
            let (beside, theirs) = match outcome.mark.against {
                Against::Itself => ("", String::new()),
                against => (side(against), figure(outcome.theirs, outcome.mark.point.measure)),
            };
            writeln!(
                page,
                "| {} | {} | {} | {beside} | {theirs} | {:.2} | {} | {} |",
                case.title,
                case.name_of(outcome.mark.point),
                figure(outcome.ours, outcome.mark.point.measure),
                outcome.ratio(),
                outcome.asks(),
                if outcome.reached() { "reached" } else { "**not reached**" },
            )?;
        }
    }
    for (case, peer, why) in &results.failures {
        writeln!(page, "\nFailed: {case} on {peer}: {}", why.replace('\n', " "))?;
    }
    page.push('\n');
    Ok(())
}

fn image_table(page: &mut String, image: &About) -> Result<()> {
    page.push_str("\nThe image has five layers of this system's own files:\n\n");
    page.push_str("| files of | entries | MB | MB in gzip | MB in zstd |\n|---|---|---|---|---|\n");
    let megabytes = |size: u64| number(size as f64 / 1e6);
    for layer in &image.layers {
        let (size, gzip, zstd) = (megabytes(layer.size), megabytes(layer.gzip), megabytes(layer.zstd));
        writeln!(page, "| {} | {} | {size} | {gzip} | {zstd} |", layer.source, layer.entries)?;
    }
    let sum = |of: fn(&crate::image::LayerAbout) -> u64| megabytes(image.layers.iter().map(of).sum());
    let entries: usize = image.layers.iter().map(|layer| layer.entries).sum();
    let (size, gzip, zstd) = (sum(|layer| layer.size), sum(|layer| layer.gzip), sum(|layer| layer.zstd));
    writeln!(page, "| all | {entries} | {size} | {gzip} | {zstd} |")?;
    Ok(())
}

/// A number with its unit.
fn figure(value: f64, measure: Measure) -> String {
    format!("{} {}", number(value), measure.unit()).trim_end().to_owned()
}

fn case_part(page: &mut String, results: &Results, case: &Case) -> Result<()> {
    if results.records.iter().all(|record| record.case != case.name) {
        return Ok(());
    }
    writeln!(page, "\n## {}\n\n{}\n", case.title, wrap(case.about))?;
    writeln!(page, "![{}](benchmarks/{}.svg)\n", case.title, case.name)?;
    page.push_str("| measure | engine | samples | median | least to greatest | p99 | gantryd's ratio | of the rounds |\n");
    page.push_str("|---|---|---|---|---|---|---|---|\n");
    for point in results.points(case.name) {
        for (peer, samples) in rows(results, case, point) {
            let Some(found) = summary(&samples) else { continue };
            let ours = results.median(case.name, OURS, point).filter(|_| peer != OURS);
            let ratio = ours.filter(|_| found.median != 0.0);
            let ratio = ratio.map(|ours| format!("{:.2}", ours / found.median)).unwrap_or_default();
            let range = ratio_range(&results.pairs(case.name, OURS, &peer, point)).filter(|_| peer != OURS);
            let range = range.map(|(least, most)| format!("{least:.2} to {most:.2}")).unwrap_or_default();
            writeln!(
                page,
                "| {} | {peer} | {} | {} | {} to {} | {} | {ratio} | {range} |",
                case.name_of(point),
                found.count,
                figure(found.median, point.measure),
                number(found.least),
                number(found.most),
                found.p99.map(number).unwrap_or_default(),
            )?;
        }
    }
    Ok(())
}

/// A paragraph in lines of a page's width.
fn wrap(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let fits = lines.last().is_some_and(|line| line.len() + word.len() < 125);
        if !fits {
            lines.push(String::new());
        }
        let Some(line) = lines.last_mut() else { continue };
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::ALL;

    fn results(ours: &[f64], theirs: &[f64]) -> Results {
        let record = |peer: &str, round: usize, value: f64| Record {
            case: "pull-gzip".into(),
            peer: peer.into(),
            round,
            measure: Measure::Wall,
            size: 0,
            value,
        };
        let ours = ours.iter().enumerate().map(|(round, value)| record(OURS, round, *value));
        let theirs = theirs.iter().enumerate().map(|(round, value)| record(THEIRS, round, *value));
        Results {
            peers: vec![(OURS.into(), "1".into()), (THEIRS.into(), "2".into())],
            records: ours.chain(theirs).collect(),
            ..Results::default()
        }
    }

    #[test]
    fn a_mark_is_reached_by_the_ratio_of_medians() {
        let case = &ALL[0];
        let outcomes = results(&[1.0, 9.0, 2.0], &[4.0, 4.1, 3.9]).outcomes(case);
        assert_eq!(outcomes.len(), 1);
        assert!(outcomes[0].reached() && outcomes[0].ratio() == 0.5);
        let results = results(&[2.1], &[4.0]);
        assert!(!results.outcomes(case)[0].reached());
        let line = "1 cases, 1 measured; 4 marks: 0 reached, 1 not reached, 3 not measured; 0 runs failed";
        assert_eq!(results.line(&[case]), line);
    }

    #[test]
    fn a_mark_may_ask_for_more_and_for_a_figure_itself() {
        let outcome = |against: Against, limit: Limit| Outcome {
            mark: Mark { point: Point { measure: Measure::Rate, size: 8 }, against, limit },
            ours: 10.0,
            theirs: 2.0,
        };
        for (against, limit, reached) in [
            (Against::Containerd, Limit::AtLeast(5.0), true),
            (Against::Containerd, Limit::AtLeast(5.1), false),
            (Against::Itself, Limit::AtMost(10.0), true),
            (Against::Itself, Limit::AtMost(9.0), false),
        ] {
            assert_eq!(outcome(against, limit).reached(), reached, "{against:?} {limit:?}");
        }
    }

    #[test]
    fn sizes_have_rows_of_their_own_and_a_plot_of_their_growth() {
        let folder = tempfile::tempdir().unwrap();
        let case = ALL.iter().find(|case| case.name == "writes").unwrap();
        let record = |peer: &str, size: usize, value: f64| Record {
            case: case.name.into(),
            peer: peer.into(),
            round: 0,
            measure: Measure::Rate,
            size,
            value,
        };
        let results = Results {
            peers: vec![(OURS.into(), "1".into()), (THEIRS.into(), "2".into())],
            records: vec![
                record(OURS, 1, 500.0),
                record(OURS, 8, 3000.0),
                record(THEIRS, 1, 400.0),
                record(THEIRS, 8, 420.0),
            ],
            ..Results::default()
        };
        write(&results, &[case], folder.path()).unwrap();
        let page = fs::read_to_string(folder.path().join("benchmarks.md")).unwrap();
        for row in [
            "| operations in a second at 1 writers | gantryd | 1 | 500 /s |",
            "| operations in a second at 8 writers | containerd | 1 | 420 /s |",
            "| 7.14 | at least 5 | reached |",
        ] {
            assert!(page.contains(row), "{row}: {page}");
        }
        let plot = fs::read_to_string(folder.path().join("benchmarks/writes.svg")).unwrap();
        assert_eq!(plot.matches("<circle").count(), 4, "{plot}");
    }

    #[test]
    fn the_page_has_each_case_with_its_plot_and_says_what_failed() {
        let folder = tempfile::tempdir().unwrap();
        let mut results = results(&[1.0, 1.1], &[4.0, 4.4]);
        results.failures.push(("push".into(), OURS.into(), "no\nanswer".into()));
        let cases: Vec<&Case> = ALL.iter().collect();
        write(&results, &cases, folder.path()).unwrap();
        let page = fs::read_to_string(folder.path().join("benchmarks.md")).unwrap();
        for words in [
            "(benchmarks/pull-gzip.svg)",
            "| 0.25 | at most 0.5 | reached |",
            "Failed: push on gantryd: no answer",
        ] {
            assert!(page.contains(words), "{words}: {page}");
        }
        assert!(folder.path().join("benchmarks/pull-gzip.svg").exists());
        assert!(!page.contains("push.svg"));
    }
}
