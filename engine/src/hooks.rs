//! Hooks that the machine's owner adds to containers: files in folders that the configuration names, and by default none.
//!
//! A file is `NAME.json` as oci-hooks(5) of the containers project describes it, version 1.0.0:
//!
//! ```text
//! { "version": "1.0.0",
//!   "hook":   { "path": "/usr/libexec/x", "args": [...], "env": [...], "timeout": seconds },
//!   "when":   { "always": bool, "annotations": { REGEX: REGEX }, "commands": [REGEX], "hasBindMounts": bool, "or": bool },
//!   "stages": [ "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop" ] }
//! ```
//!
//! All conditions of `when` must hold or, with `or`, one; with none, nothing matches. Of files with one name the last folder's
//! counts; hooks run in the order of the names, after those that the spec has.
//!
//! Invariants: the spec that a client stored is not changed, only the bundle's copy. A file that cannot be used is left out,
//! with a line in the log when it is first seen so; it keeps a container from being made only where the configuration says so.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use regex::Regex;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// The version of the files' form.
const VERSION: &str = "1.0.0";
/// The largest file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// Which hooks there are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The folders, absolute.
    pub dirs: Vec<PathBuf>,
    /// Whether a file that cannot be used keeps containers from being made.
    pub required: bool,
}

/// The hooks of the configured folders; cheap to clone.
#[derive(Clone, Default)]
pub struct Hooks {
    settings: Settings,
    /// Files as they were last read.
    read: Arc<Mutex<HashMap<PathBuf, Cached>>>,
}

/// A file, and what says that it is still the same.
type Cached = (Stamp, Arc<Result<File, String>>);
type Stamp = (u64, u64, u64, i64, i64);

/// A hooks file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "version")]
    _version: String,
    hook: Hook,
    when: When,
    stages: Vec<Stage>,
}

/// A hook, in the runtime spec's form.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Hook {
    path: PathBuf,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    args: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    env: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    timeout: Option<u32>,
}

/// The conditions.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct When {
    always: Option<bool>,
    #[serde(deserialize_with = "pairs")]
    annotations: Vec<(Pattern, Pattern)>,
    commands: Vec<Pattern>,
    has_bind_mounts: Option<bool>,
    or: bool,
}

/// A regular expression, found anywhere in a text.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
struct Pattern(Regex);

impl TryFrom<String> for Pattern {
    type Error = regex::Error;

    fn try_from(text: String) -> Result<Self, regex::Error> {
        Regex::new(&text).map(Pattern)
    }
}

/// Pairs of patterns, from an object.
fn pairs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(Pattern, Pattern)>, D::Error> {
    let texts = BTreeMap::<String, Pattern>::deserialize(deserializer)?;
    let pair = |(key, value): (String, Pattern)| Ok((Pattern::try_from(key)?, value));
    texts.into_iter().map(pair).collect::<Result<_, regex::Error>>().map_err(D::Error::custom)
}

/// When a hook runs; the names are the runtime spec's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Stage {
    Prestart,
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Stage::Prestart => "prestart",
            Stage::CreateRuntime => "createRuntime",
            Stage::CreateContainer => "createContainer",
            Stage::StartContainer => "startContainer",
            Stage::Poststart => "poststart",
            Stage::Poststop => "poststop",
        }
    }
}

/// What conditions are about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Facts {
    annotations: BTreeMap<String, String>,
    command: String,
    has_bind_mounts: bool,
}

impl Facts {
    fn of(spec: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let annotations = spec["annotations"].as_object().into_iter().flatten();
        let bound = |mount: &Value| {
            let options = mount["options"].as_array().into_iter().flatten();
            mount["type"] == "bind" || options.into_iter().any(|option| option == "bind" || option == "rbind")
        };
        Facts {
            annotations: annotations.map(|(key, value)| (key.clone(), text(value))).collect(),
            command: text(&spec["process"]["args"][0]),
            has_bind_mounts: spec["mounts"].as_array().is_some_and(|mounts| mounts.iter().any(bound)),
        }
    }
}

impl When {
    fn matches(&self, facts: &Facts) -> bool {
        let always = self.always.into_iter();
        let mounts = self.has_bind_mounts.map(|wanted| wanted && facts.has_bind_mounts).into_iter();
        let annotations = self.annotations.iter().map(|(key, value)| {
            let mut found = facts.annotations.iter();
            found.any(|(name, text)| key.0.is_match(name) && value.0.is_match(text))
        });
        let commands = (!self.commands.is_empty())
            .then(|| self.commands.iter().any(|command| command.0.is_match(&facts.command)));
        let mut conditions = always.chain(mounts).chain(annotations).chain(commands).peekable();
        if self.or {
            conditions.any(|holds| holds)
        } else {
            conditions.peek().is_some() && conditions.all(|holds| holds)
        }
    }
}

impl File {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        // Looked at first: of another version, everything else may be different.
        #[derive(Deserialize)]
        struct Versioned {
            version: String,
        }
        let Versioned { version } = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if version != VERSION {
            return Err(format!("version {version:?} is not known; {VERSION} is"));
        }
        let file: File = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if !file.hook.path.is_absolute() {
            return Err(format!("hook.path {:?} is not absolute", file.hook.path.display().to_string()));
        }
        if file.hook.timeout == Some(0) {
            return Err("hook.timeout is 0; leave it out for no limit".into());
        }
        if file.stages.is_empty() {
            return Err("it names no stages".into());
        }
        Ok(file)
    }
}

/// The spec with the hooks of those files whose conditions hold; None when there are none, so that it stays byte for byte.
fn add(spec: &[u8], files: &[Arc<Result<File, String>>]) -> Result<Option<Vec<u8>>> {
    // A spec that cannot be read is for the runtime to refuse, in its own words.
    let Ok(mut spec) = serde_json::from_slice::<Value>(spec) else { return Ok(None) };
    let facts = Facts::of(&spec);
    let mut changed = false;
    for file in files.iter().filter_map(|file| file.as_ref().as_ref().ok()) {
        if !spec.is_object() || !file.when.matches(&facts) {
            continue;
        }
        let hook = serde_json::to_value(&file.hook)
            .map_err(|error| Error::internal(format!("encode a hook: {error}")))?;
        changed = true;
        for (at, stage) in file.stages.iter().enumerate() {
            // Named twice, it is meant once.
            if file.stages[..at].contains(stage) {
                continue;
            }
            let hooks = &mut spec["hooks"];
            if !hooks.is_object() {
                *hooks = Value::Object(serde_json::Map::new());
            }
            match &mut hooks[stage.name()] {
                Value::Array(list) => list.push(hook.clone()),
                none => *none = Value::Array(vec![hook.clone()]),
            }
        }
    }
    if !changed {
        return Ok(None);
    }
    serde_json::to_vec(&spec).map(Some).map_err(|error| Error::internal(format!("encode a spec: {error}")))
}

impl Hooks {
    /// The hooks of these folders, which need not be there yet.
    pub fn new(settings: Settings) -> Self {
        Hooks { settings, read: Arc::default() }
    }

    /// A container's spec with what is to be added to it. FailedPrecondition when a file cannot be used and must not be left
    /// out. Blocks.
    pub fn add_to(&self, spec: Vec<u8>) -> Result<Vec<u8>> {
        if self.settings.dirs.is_empty() {
            return Ok(spec);
        }
        let files = self.files()?;
        Ok(add(&spec, &files)?.unwrap_or(spec))
    }

    fn files(&self) -> Result<Vec<Arc<Result<File, String>>>> {
        let mut paths = BTreeMap::new();
        for folder in &self.settings.dirs {
            match std::fs::read_dir(folder) {
                Ok(entries) => {
                    let found = entries.flatten().map(|entry| (entry.file_name(), entry.path()));
                    paths.extend(found.filter(|(_, path)| path.extension().is_some_and(|end| end == "json")));
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => self.unusable(folder, &error.to_string())?,
            }
        }
        let mut files = Vec::new();
        for path in paths.values() {
            let file = self.file(path);
            match &*file {
                Ok(_) => files.push(file),
                Err(why) if self.settings.required => return Err(unusable(path, why)),
                Err(_) => {}
            }
        }
        self.read.lock().retain(|path, _| paths.values().any(|there| there == path));
        Ok(files)
    }

    /// A file, read if it has changed.
    fn file(&self, path: &Path) -> Arc<Result<File, String>> {
        let stamp = std::fs::metadata(path)
            .map(|file| (file.dev(), file.ino(), file.size(), file.mtime(), file.mtime_nsec()));
        // What cannot be looked at is told of once, too.
        let stamp = stamp.unwrap_or_default();
        if let Some((before, file)) = self.read.lock().get(path)
            && *before == stamp
        {
            return file.clone();
        }
        let file = Arc::new(read(path).and_then(|bytes| File::parse(&bytes)));
        if let Err(why) = &*file {
            tracing::warn!(file = %path.display(), why, "this file of hooks is left out");
        }
        self.read.lock().insert(path.to_owned(), (stamp, file.clone()));
        file
    }

    fn unusable(&self, path: &Path, why: &str) -> Result<()> {
        if self.settings.required {
            return Err(unusable(path, why));
        }
        tracing::warn!(folder = %path.display(), why, "the hooks of this folder are left out");
        Ok(())
    }
}

fn unusable(path: &Path, why: &str) -> Error {
    Error::failed_precondition(format!(
        "hooks {}: {why}; mend or remove it, since the configuration requires all hooks",
        path.display()
    ))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    // Not one that waits for somebody to write it.
    if !std::fs::metadata(path).map_err(|error| error.to_string())?.is_file() {
        return Err("it is not a file".into());
    }
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > FILE_MAX { Err(format!("it is larger than {FILE_MAX} bytes")) } else { Ok(bytes) }
}

/// A file of hooks and, behind a zero byte, a container's spec: the spec has the hooks, and all else is as it was.
#[cfg(any(test, fuzzing))]
pub fn fuzz(data: &[u8]) {
    let at = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let (file, spec) = (&data[..at], data.get(at + 1..).unwrap_or_default());
    let Ok(file) = File::parse(file) else { return };
    assert!(file.hook.path.is_absolute() && !file.stages.is_empty());
    let stages: Vec<Stage> = file.stages.clone();
    let files = [Arc::new(Ok(file))];
    let Ok(Some(with)) = add(spec, &files) else { return };
    let mut before: Value = serde_json::from_slice(spec).expect("what was changed is a spec");
    let mut after: Value = serde_json::from_slice(&with).expect("a spec");
    assert!(
        stages
            .iter()
            .all(|stage| after["hooks"][stage.name()].as_array().is_some_and(|list| !list.is_empty()))
    );
    for spec in [&mut before, &mut after] {
        spec.as_object_mut().expect("an object").remove("hooks");
    }
    assert_eq!(before, after);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn file(when: &Value, stages: &[&str]) -> Arc<Result<File, String>> {
        let text = json!({
            "version": "1.0.0",
            "hook": {"path": "/h", "args": ["h", "x"], "timeout": 3},
            "when": when,
            "stages": stages,
        });
        Arc::new(File::parse(text.to_string().as_bytes()))
    }

    fn when(value: Value) -> When {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn conditions_are_joined_by_and_or_by_or() {
        let facts = Facts {
            annotations: BTreeMap::from([("com.x.gpu".into(), "yes".into()), ("b".into(), "2".into())]),
            command: "/bin/sh".into(),
            has_bind_mounts: false,
        };
        for (value, matches) in [
            (json!({}), false),
            (json!({"or": true}), false),
            (json!({"always": true}), true),
            (json!({"always": false}), false),
            (json!({"annotations": {"gpu$": "^y"}}), true),
            (json!({"annotations": {"gpu$": "^y", "b": "3"}}), false),
            (json!({"annotations": {"gpu$": "^y", "b": "3"}, "or": true}), true),
            // Key and value are of one annotation.
            (json!({"annotations": {"gpu": "2"}}), false),
            (json!({"commands": ["^/bin/ls$", "sh$"]}), true),
            (json!({"commands": ["^sh"]}), false),
            (json!({"hasBindMounts": true}), false),
            (json!({"hasBindMounts": false}), false),
            (json!({"hasBindMounts": true, "commands": ["sh"], "or": true}), true),
            (json!({"always": true, "hasBindMounts": true}), false),
        ] {
            assert_eq!(when(value.clone()).matches(&facts), matches, "{value}");
        }
    }

    #[test]
    fn mistakes_in_files_are_named() {
        let good = json!({"version": "1.0.0", "hook": {"path": "/h"}, "when": {"always": true}, "stages": ["prestart"]});
        assert!(File::parse(good.to_string().as_bytes()).is_ok());
        for (pointer, value, words) in [
            ("/version", json!("2.0.0"), "2.0.0"),
            ("/hook/path", json!("h"), "absolute"),
            ("/hook", json!({}), "path"),
            ("/hook", json!({"path": "/h", "timeout": 0}), "timeout"),
            ("/stages", json!([]), "no stages"),
            ("/stages", json!(["before"]), "before"),
            ("/when", json!({"annotations": {"(": "x"}}), "regex"),
            ("/when", json!({"sometimes": true}), "sometimes"),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(pointer).unwrap() = value;
            let why = File::parse(bad.to_string().as_bytes()).unwrap_err();
            assert!(why.contains(words), "{pointer}: {why}");
        }
        assert!(File::parse(b"{").is_err());
    }

    #[test]
    fn facts_of_a_spec() {
        let spec = json!({
            "process": {"args": ["/bin/sh", "-c"]},
            "annotations": {"a": "b"},
            "mounts": [{"type": "none", "options": ["ro", "rbind"]}],
        });
        let facts = Facts::of(&spec);
        assert_eq!((facts.command.as_str(), facts.has_bind_mounts), ("/bin/sh", true));
        assert_eq!(facts.annotations["a"], "b");
        assert_eq!(Facts::of(&json!({"mounts": [{"type": "proc"}]})), Facts::default());
        assert_eq!(Facts::of(&json!([])), Facts::default());
    }

    #[test]
    fn the_last_folder_counts_and_changes_are_seen() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |folder: &Path, name: &str, path: &str| {
            let text = json!({"version": "1.0.0", "hook": {"path": path}, "when": {"always": true}, "stages": ["poststop"]});
            std::fs::write(folder.join(name), text.to_string()).unwrap();
        };
        let dirs = vec![a.path().to_owned(), "/nonexistent/hooks.d".into(), b.path().to_owned()];
        let mut hooks = Hooks::new(Settings { dirs, required: false });
        let added = |hooks: &Hooks| {
            let spec: Value = serde_json::from_slice(&hooks.add_to(b"{ }".to_vec()).unwrap()).unwrap();
            let list = spec["hooks"]["poststop"].as_array().cloned().unwrap_or_default();
            list.iter().map(|hook| hook["path"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(hooks.add_to(b"{ }".to_vec()).unwrap(), b"{ }");
        write(a.path(), "20-x.json", "/one");
        write(a.path(), "10-y.json", "/two");
        write(a.path(), "30-z.txt", "/not");
        assert_eq!(added(&hooks), ["/two", "/one"]);
        write(b.path(), "20-x.json", "/three");
        assert_eq!(added(&hooks), ["/two", "/three"]);
        write(b.path(), "20-x.json", "/another");
        assert_eq!(added(&hooks), ["/two", "/another"]);
        // A bad one hides the good one of its name, and keeps none from its container.
        std::fs::write(b.path().join("20-x.json"), "{").unwrap();
        assert_eq!(added(&hooks), ["/two"]);
        hooks.settings.required = true;
        let error = hooks.add_to(b"{}".to_vec()).unwrap_err();
        assert!(matches!(&error, Error::FailedPrecondition(text) if text.contains("20-x.json")), "{error}");
        std::fs::remove_file(b.path().join("20-x.json")).unwrap();
        assert_eq!(added(&hooks), ["/two", "/one"]);
    }

    proptest! {
        #[test]
        fn all_or_any_of_the_conditions(
            always in any::<Option<bool>>(),
            mounts in any::<Option<bool>>(),
            command in any::<Option<bool>>(),
            annotations in prop::collection::vec(any::<bool>(), 0..4),
            or in any::<bool>(),
            bound in any::<bool>(),
        ) {
            let facts = Facts {
                annotations: BTreeMap::from([("key".to_owned(), "value".to_owned())]),
                command: "/bin/sh".into(),
                has_bind_mounts: bound,
            };
            let mut value = json!({"or": or});
            let mut conditions = Vec::new();
            if let Some(always) = always {
                value["always"] = always.into();
                conditions.push(always);
            }
            if let Some(mounts) = mounts {
                value["hasBindMounts"] = mounts.into();
                conditions.push(mounts && bound);
            }
            if let Some(command) = command {
                value["commands"] = json!([if command { "sh" } else { "ls" }, "^never$"]);
                conditions.push(command);
            }
            for (number, holds) in annotations.iter().enumerate() {
                let pattern = format!("^key{}", "$".repeat(number + 1));
                value["annotations"][pattern] = if *holds { "^value$".into() } else { "^other$".into() };
                conditions.push(*holds);
            }
            let wanted = if or {
                conditions.contains(&true)
            } else {
                !conditions.is_empty() && !conditions.contains(&false)
            };
            prop_assert_eq!(when(value).matches(&facts), wanted);
        }

        #[test]
        fn a_spec_keeps_all_it_had(
            own in 0_usize..3,
            matching in prop::collection::vec(any::<bool>(), 0..5),
        ) {
            let mut spec = json!({"ociVersion": "1.0.2", "linux": {"cgroupsPath": "/x"}, "process": {"args": ["a"]}});
            if own > 0 {
                spec["hooks"] = json!({"poststart": vec![json!({"path": "/own"}); own], "prestart": null});
            }
            let files: Vec<_> = matching
                .iter()
                .map(|matches| file(&json!({"always": matches}), &["poststart", "prestart", "poststart"]))
                .collect();
            let added = add(spec.to_string().as_bytes(), &files).unwrap();
            let count = matching.iter().filter(|matches| **matches).count();
            prop_assert_eq!(added.is_some(), count > 0);
            if let Some(added) = added {
                let mut added: Value = serde_json::from_slice(&added).unwrap();
                let started = added["hooks"]["poststart"].as_array().unwrap().clone();
                prop_assert_eq!(started.len(), own + count);
                prop_assert!(started[..own].iter().all(|hook| hook["path"] == "/own"));
                prop_assert!(started[own..].iter().all(|hook| hook["args"] == json!(["h", "x"]) && hook["timeout"] == 3));
                prop_assert_eq!(added["hooks"]["prestart"].as_array().unwrap().len(), count);
                for value in [&mut added, &mut spec] {
                    value.as_object_mut().unwrap().remove("hooks");
                }
                prop_assert_eq!(added, spec);
            }
        }
    }
}
