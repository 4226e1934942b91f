//! What a check has found, for people and for programs.
//!
//! ```text
//! CLASS KIND NAME: WHAT; --repair: ... | REMEDY           one line for each finding
//! mended: ... | not mended: ...                           with --repair, one line for each step, before them
//! not checked: ...
//! LOST lost, LEAKED leaked, PENDING pending; awaiting collection: ...; checked: ...
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use super::judge::Judgement;
use super::repair::Done;
use super::{Action, Class, Finding};

/// What came of a check.
#[derive(Debug)]
pub struct Report {
    findings: Vec<Finding>,
    awaiting: BTreeMap<&'static str, u64>,
    checked: BTreeMap<&'static str, u64>,
    not_checked: BTreeSet<String>,
    done: Option<Vec<Done>>,
}

#[derive(Serialize)]
struct Machine<'a> {
    lost: usize,
    leaked: usize,
    pending: usize,
    findings: Vec<MachineFinding<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repairs: Option<Vec<MachineRepair<'a>>>,
    awaiting_collection: &'a BTreeMap<&'static str, u64>,
    checked: &'a BTreeMap<&'static str, u64>,
    not_checked: &'a BTreeSet<String>,
}

#[derive(Serialize)]
struct MachineFinding<'a> {
    class: Class,
    kind: &'a str,
    name: &'a str,
    what: &'a str,
    repair: Option<String>,
    remedy: &'a str,
}

#[derive(Serialize)]
struct MachineRepair<'a> {
    mended: bool,
    what: &'a str,
}

impl Report {
    pub(super) fn new(judgement: Judgement, done: Option<Vec<Done>>) -> Self {
        let Judgement { findings, awaiting, checked, not_checked } = judgement;
        Report { findings, awaiting, checked, not_checked, done }
    }

    /// How many findings are of a class.
    pub fn count(&self, class: Class) -> usize {
        self.findings.iter().filter(|finding| finding.class == class).count()
    }

    /// Whether nothing is lost or leaked (any more).
    pub fn is_sound(&self) -> bool {
        self.count(Class::Lost) + self.count(Class::Leaked) == 0
    }

    /// For programs.
    pub fn json(&self) -> serde_json::Result<String> {
        let finding =
            |finding: &Finding| -> Option<String> { finding.repair.as_ref().map(ToString::to_string) };
        serde_json::to_string_pretty(&Machine {
            lost: self.count(Class::Lost),
            leaked: self.count(Class::Leaked),
            pending: self.count(Class::Pending),
            findings: self
                .findings
                .iter()
                .map(|of| MachineFinding {
                    class: of.class,
                    kind: of.kind,
                    name: &of.name,
                    what: &of.what,
                    repair: finding(of),
                    remedy: &of.remedy,
                })
                .collect(),
            repairs: self.done.as_deref().map(repairs),
            awaiting_collection: &self.awaiting,
            checked: &self.checked,
            not_checked: &self.not_checked,
        })
    }
}

fn repairs(done: &[Done]) -> Vec<MachineRepair<'_>> {
    done.iter().map(|done| MachineRepair { mended: done.outcome.is_ok(), what: text(done) }).collect()
}

fn text(done: &Done) -> &str {
    match &done.outcome {
        Ok(what) => what,
        Err(why) => why,
    }
}

/// Counts by kind, as `1 of this, 2 of that`.
fn counts(of: &BTreeMap<&'static str, u64>) -> String {
    if of.values().all(|count| *count == 0) {
        return "nothing".into();
    }
    let shown = of.iter().filter(|(_, count)| **count > 0).map(|(kind, count)| format!("{kind} {count}"));
    shown.collect::<Vec<_>>().join(", ")
}

/// On one line, whatever names hold.
fn line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Class::Lost => "lost",
            Class::Leaked => "leaked",
            Class::Pending => "pending",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}: {}", self.class, self.kind, line(&self.name), line(&self.what))?;
        if let Some(repair) = &self.repair {
            write!(f, "; --repair {}", line(&repair.to_string()))?;
        }
        if !self.remedy.is_empty() {
            let then = if self.repair.is_some() { ", then " } else { "; " };
            write!(f, "{then}{}", line(&self.remedy))?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for done in self.done.iter().flatten() {
            let what = if done.outcome.is_ok() { "mended" } else { "not mended" };
            writeln!(f, "{what}: {}", line(text(done)))?;
        }
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        for what in &self.not_checked {
            writeln!(f, "not checked: {}", line(what))?;
        }
        write!(
            f,
            "{} lost, {} leaked, {} pending; awaiting collection: {}; checked: {}",
            self.count(Class::Lost),
            self.count(Class::Leaked),
            self.count(Class::Pending),
            counts(&self.awaiting),
            counts(&self.checked)
        )
    }
}

/// What it does, after "a repair".
impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::KillShim { pid, .. } => write!(f, "kills process {pid}"),
            Action::DeleteContainer { root, id } => {
                write!(f, "runs `runc --root {} delete --force {id}`", root.display())
            }
            Action::Unmount { .. } => f.write_str("unmounts it"),
            Action::Detach { .. } => f.write_str("detaches it"),
            Action::RemoveGroup { .. } | Action::RemoveSocket { .. } | Action::RemoveTree { .. } => {
                f.write_str("removes it")
            }
            Action::SetAside { .. } => f.write_str("moves it to a file"),
            Action::NameNamespace { .. } | Action::NoteChild { .. } => f.write_str("records it"),
            Action::DeleteResource { .. } | Action::ForgetChild { .. } => f.write_str("deletes that record"),
            Action::ForgetSnapshots { names, .. } if names.len() > 1 => {
                write!(f, "removes it and the {} that are stacked on it", names.len() - 1)
            }
            Action::ForgetSnapshots { .. } => f.write_str("removes it"),
            Action::ForgetBlob { .. } => f.write_str("removes its record and its file"),
        }
    }
}
