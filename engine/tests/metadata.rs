//! The database against an in-memory model, and against kill -9.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::error::Error;
use engine::metadata::namespaces::NamespaceRecord;
use engine::metadata::{self, Metadata, OpenError, Read, Record, Transaction};
use proptest::prelude::*;

#[derive(Clone, PartialEq, prost::Message)]
struct Item {
    #[prost(string, tag = "1")]
    value: String,
}

impl Record for Item {
    const TABLE: &'static str = "items";
}

#[allow(clippy::needless_pass_by_value, reason = "callers have temporaries")]
fn item(value: impl ToString) -> Item {
    Item { value: value.to_string() }
}

#[derive(Debug, Clone)]
enum Step {
    Put(String, String, String),
    Delete(String, String),
    DeleteNamespace(String),
    /// Several writes of which none may stay.
    Failing(Vec<(String, String)>),
    Reopen,
    ExportImport,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = || "[ab]{1,2}";
    prop::collection::vec(
        prop_oneof![
            6 => (name(), name(), "[a-z]{0,300}").prop_map(|(ns, id, value)| Step::Put(ns, id, value)),
            3 => (name(), name()).prop_map(|(ns, id)| Step::Delete(ns, id)),
            1 => name().prop_map(Step::DeleteNamespace),
            1 => prop::collection::vec((name(), name()), 1..4).prop_map(Step::Failing),
            1 => Just(Step::Reopen),
            1 => Just(Step::ExportImport),
        ],
        1..25,
    )
}

type Model = BTreeMap<(String, String), String>;

fn contents(metadata: &Metadata) -> Model {
    metadata
        .view()
        .list::<Item>(&[])
        .into_iter()
        .map(|(parts, item)| ((parts[0].clone(), parts[1].clone()), item.value))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn behaves_as_a_map(steps in steps()) {
        let folder = tempfile::tempdir().unwrap();
        let mut dir = folder.path().join("0");
        let mut metadata = Metadata::open(&dir).unwrap();
        let mut model = Model::new();
        for (number, step) in steps.into_iter().enumerate() {
            let before = metadata.view();
            let old = model.clone();
            match step {
                Step::Put(ns, id, value) => {
                    model.insert((ns.clone(), id.clone()), value.clone());
                    metadata.commit_blocking(move |txn| txn.put(&[&ns, &id], &item(value))).unwrap();
                }
                Step::Delete(ns, id) => {
                    let existed = model.remove(&(ns.clone(), id.clone())).is_some();
                    let deleted = metadata.commit_blocking(move |txn| txn.delete::<Item>(&[&ns, &id])).unwrap();
                    prop_assert_eq!(deleted, existed);
                }
                Step::DeleteNamespace(ns) => {
                    model.retain(|(of, _), _| *of != ns);
                    metadata.commit_blocking(move |txn| txn.delete_all::<Item>(&[&ns])).unwrap();
                }
                Step::Failing(writes) => {
                    let result: Result<(), Error> = metadata.commit_blocking(move |txn| {
                        for (ns, id) in &writes {
                            txn.put(&[ns, id], &item("never"))?;
                            assert!(txn.has::<Item>(&[ns, id])?, "a transaction sees its own writes");
                        }
                        Err(Error::aborted("on purpose"))
                    });
                    prop_assert_eq!(result, Err(Error::aborted("on purpose")));
                }
                Step::Reopen => {
                    drop(metadata);
                    metadata = Metadata::open(&dir).unwrap();
                }
                Step::ExportImport => {
                    drop(metadata);
                    let mut file = Vec::new();
                    metadata::export(&dir, &mut file).unwrap();
                    dir = folder.path().join(format!("{}", number + 1));
                    metadata::import(&dir, &mut &file[..]).unwrap();
                    metadata = Metadata::open(&dir).unwrap();
                }
            }
            prop_assert_eq!(contents(&metadata), model.clone());
            for ((ns, id), value) in &model {
                prop_assert_eq!(metadata.view().get::<Item>(&[ns, id]).unwrap(), Some(item(value)));
                prop_assert!(metadata.view().has::<NamespaceRecord>(&[ns]).unwrap());
            }
            // A view taken before does not move.
            prop_assert_eq!(before.list::<Item>(&[]).len(), old.len());
        }
    }
}

/// What the child below writes for its writer `w`: item `(w, n)` and, in the same commit, the last number under `last`.
fn put_pair(txn: &mut Transaction, writer: &str, number: u64) -> Result<(), Error> {
    txn.put(&[writer, &format!("{number:012}")], &item(number))?;
    txn.put(&["last", writer], &item(number))
}

const CRASH_DIR: &str = "GANTRY_TEST_CRASH_DIR";

/// Not a test of its own: the process that [`kill_9_loses_nothing_acknowledged`] kills. Writes until it dies, and
/// tells on stdout what was acknowledged.
#[test]
fn crash_child() {
    let Some(dir) = std::env::var_os(CRASH_DIR) else { return };
    let metadata = Metadata::open(Path::new(&dir)).unwrap();
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let metadata = metadata.clone();
            std::thread::spawn(move || -> () {
                let name = format!("w{writer}");
                let mut number = metadata
                    .view()
                    .get::<Item>(&["last", &name])
                    .unwrap()
                    .map_or(0, |i| i.value.parse::<u64>().unwrap());
                loop {
                    number += 1;
                    let key = name.clone();
                    metadata.commit_blocking(move |txn| put_pair(txn, &key, number)).unwrap();
                    // One write call, so that lines of several threads do not mix.
                    std::io::stderr().write_all(format!("ack {name} {number}\n").as_bytes()).unwrap();
                }
            })
        })
        .collect();
    // They write until the process is killed.
    writers.into_iter().for_each(|writer| writer.join().unwrap());
}

#[test]
fn kill_9_loses_nothing_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("metadata");
    let mut acknowledged: BTreeMap<String, u64> = BTreeMap::new();
    for round in 0..12_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash_child", "--nocapture", "--test-threads=1"])
            .env(CRASH_DIR, &dir)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Killed after a number of acknowledgements that differs from round to round; in round 0 while it opens.
        let target = round * round * 7;
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut seen = 0;
        while seen < target {
            let line = lines.next().expect("the child ended by itself").unwrap();
            seen += u64::from(record_ack(&line, &mut acknowledged));
        }
        child.kill().unwrap();
        // What it said before it died counts, too.
        for line in lines.map_while(Result::ok) {
            record_ack(&line, &mut acknowledged);
        }
        child.wait().unwrap();

        let metadata = Metadata::open(&dir).unwrap();
        let view = metadata.view();
        for (writer, number) in &acknowledged {
            let last = view
                .get::<Item>(&["last", writer])
                .unwrap()
                .expect("acknowledged")
                .value
                .parse::<u64>()
                .unwrap();
            assert!(last >= *number, "round {round}: {writer} was at {number} and is at {last}");
            // Both halves of every commit, and nothing beyond the last.
            assert_eq!(
                view.list::<Item>(&[writer]).len() as u64,
                last,
                "round {round}: {writer} has a half commit"
            );
        }
    }
    assert!(acknowledged.values().sum::<u64>() > 1000, "{acknowledged:?}");
}

fn record_ack(line: &str, acknowledged: &mut BTreeMap<String, u64>) -> bool {
    let mut words = line.split(' ');
    let (Some("ack"), Some(writer), Some(number)) = (words.next(), words.next(), words.next()) else {
        return false;
    };
    // A line that the kill cut short has a number that is too small, which demands less and never too much.
    let Ok(number) = number.parse::<u64>() else { return false };
    let last = acknowledged.entry(writer.to_owned()).or_default();
    *last = number.max(*last);
    true
}

#[test]
fn a_half_written_sled_snapshot_does_not_keep_it_shut() {
    let folder = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(folder.path()).unwrap();
    metadata.commit_blocking(|txn| txn.put(&["a", "b"], &item("c"))).unwrap();
    drop(metadata);
    std::fs::write(folder.path().join("sled/snap.0000000000000999.generating"), "torn").unwrap();
    let metadata = Metadata::open(folder.path()).unwrap();
    assert_eq!(metadata.view().get::<Item>(&["a", "b"]).unwrap(), Some(item("c")));
}

#[test]
fn a_second_process_is_kept_out_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let _metadata = Metadata::open(folder.path()).unwrap();
    let Err(error) = Metadata::open(folder.path()) else { panic!("opened twice") };
    assert!(matches!(error, OpenError::InUse(_)));
    assert!(error.to_string().contains("--root"), "{error}");
}

#[test]
fn a_newer_schema_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(Metadata::open(folder.path()).unwrap());
    {
        let db = sled::open(folder.path().join("sled")).unwrap();
        db.insert("schema", &99_u32.to_le_bytes()).unwrap();
        db.flush().unwrap();
    }
    assert!(matches!(Metadata::open(folder.path()), Err(OpenError::TooNew { found: 99, .. })));
}

#[test]
fn a_damaged_record_is_set_aside_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(folder.path()).unwrap();
    metadata.commit_blocking(|txn| txn.put(&["a", "good"], &item("c"))).unwrap();
    drop(metadata);
    {
        let db = sled::open(folder.path().join("sled")).unwrap();
        db.insert(b"items\0a\0bad", &[0xff, 0xff, 0xff]).unwrap();
        db.flush().unwrap();
    }
    let metadata = Metadata::open(folder.path()).unwrap();
    assert_eq!(metadata.view().list::<Item>(&["a"]).len(), 1);
    let Err(Error::DataLoss(message)) = metadata.view().get::<Item>(&["a", "bad"]) else { panic!("decoded") };
    assert!(message.contains("items/a/bad"), "{message}");
}

#[test]
fn a_key_cannot_be_forged() {
    let folder = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(folder.path()).unwrap();
    let result = metadata.commit_blocking(|txn| txn.put(&["a\0b", "c"], &item("x")));
    assert!(matches!(result, Err(Error::InvalidArgument(_))));
    assert_eq!(contents(&metadata), Model::new());
}

#[test]
fn an_export_that_was_cut_short_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("a");
    let metadata = Metadata::open(&dir).unwrap();
    metadata.commit_blocking(|txn| txn.put(&["a", "b"], &item("c"))).unwrap();
    drop(metadata);
    let mut file = Vec::new();
    assert_eq!(metadata::export(&dir, &mut file).unwrap(), 2);
    let text = String::from_utf8(file).unwrap();
    let target = folder.path().join("b");
    for (cut, words) in [
        (text.lines().take(2).collect::<Vec<_>>().join("\n"), "cut short"),
        (String::new(), "empty"),
        ("{}".into(), "not the head"),
        (text.replace("\"records\":2", "\"records\":3"), "3 records"),
        (text.replace("\"schema\":1", "\"schema\":7"), "schema 7"),
        (format!("{text}more\n"), "after the file's end"),
    ] {
        let error = format!("{:#}", metadata::import(&target, &mut cut.as_bytes()).unwrap_err());
        assert!(error.contains(words), "{error}");
        assert!(!target.exists(), "{words}");
    }
    assert!(metadata::import(&dir, &mut text.as_bytes()).unwrap_err().to_string().contains("already"));
    assert!(metadata::export(&target, &mut Vec::new()).unwrap_err().to_string().contains("no metadata"));
}

/// Readers never see a commit in part, and never wait: they read on while the writers sync.
#[test]
fn readers_see_whole_commits_while_writers_write() {
    let folder = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(folder.path()).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let reader = {
        let (metadata, done) = (metadata.clone(), done.clone());
        std::thread::spawn(move || {
            let mut reads = 0_u64;
            while !done.load(Ordering::Acquire) || reads == 0 {
                let view = metadata.view();
                for writer in ["w0", "w1"] {
                    let last =
                        view.get::<Item>(&["last", writer]).unwrap().map_or(0, |i| i.value.parse().unwrap());
                    assert_eq!(view.list::<Item>(&[writer]).len(), last);
                }
                reads += 1;
            }
            reads
        })
    };
    let writers: Vec<_> = ["w0", "w1"]
        .map(|writer| {
            let metadata = metadata.clone();
            std::thread::spawn(move || {
                for number in 1..=100 {
                    metadata.commit_blocking(move |txn| put_pair(txn, writer, number)).unwrap();
                }
            })
        })
        .into();
    for writer in writers {
        writer.join().unwrap();
    }
    done.store(true, Ordering::Release);
    assert!(reader.join().unwrap() > 0);
    assert_eq!(metadata.view().list::<Item>(&["w1"]).len(), 100);
}

/// An error may come of what an earlier closure wrote, so it waits for that to be on disk, as a success does.
#[tokio::test]
async fn an_error_is_told_once_what_it_saw_is_on_disk() {
    use futures::poll;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_owned();
    let metadata = tokio::task::spawn_blocking(move || Metadata::open(&dir).unwrap()).await.unwrap();
    let (entered, mut inside) = tokio::sync::mpsc::unbounded_channel();
    let (leave, wait) = std::sync::mpsc::channel::<()>();
    let wait = Arc::new(std::sync::Mutex::new(wait));
    // Holds the writer thread until the test lets it go on.
    let hold = |entered: tokio::sync::mpsc::UnboundedSender<()>| {
        let wait = wait.clone();
        metadata.commit(move |_| {
            entered.send(()).unwrap();
            wait.lock().unwrap().recv().unwrap();
            Ok(())
        })
    };
    let mut begin = std::pin::pin!(hold(entered.clone()));
    let mut put = std::pin::pin!(metadata.commit(|txn| txn.put(&["a", "b"], &item("c"))));
    let mut fail = std::pin::pin!(metadata.commit(|txn| {
        assert!(txn.has::<Item>(&["a", "b"])? && !txn.durable().has::<Item>(&["a", "b"])?);
        Err::<(), _>(Error::already_exists("b"))
    }));
    let mut end = std::pin::pin!(hold(entered));
    // A commit is queued when it is first polled, so these four are one group.
    assert!(poll!(&mut begin).is_pending() && poll!(&mut put).is_pending());
    assert!(poll!(&mut fail).is_pending() && poll!(&mut end).is_pending());
    inside.recv().await.unwrap();
    leave.send(()).unwrap();
    inside.recv().await.unwrap();
    assert!(poll!(&mut fail).is_pending(), "it saw what is not on disk");
    leave.send(()).unwrap();
    assert_eq!(fail.await, Err(Error::already_exists("b")));
    assert!(metadata.view().has::<Item>(&["a", "b"]).unwrap());
    begin.await.unwrap();
    put.await.unwrap();
    end.await.unwrap();
}
