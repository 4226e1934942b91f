//! The store through its domain calls, on a real disk.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;

use futures::TryStreamExt as _;
use proptest::prelude::*;
use proto::containerd::services::content::v1::{WriteAction, WriteContentRequest, WriteContentResponse};
use proto::containerd::services::leases::v1::Lease;

use super::*;

struct Bench {
    dir: tempfile::TempDir,
    metadata: Metadata,
    events: Exchange,
    content: Content,
}

impl Bench {
    fn new() -> Self {
        Bench::on(tempfile::tempdir().unwrap())
    }

    fn on(dir: tempfile::TempDir) -> Self {
        // Opening blocks, which the tests' own threads must not.
        let open = move || {
            let metadata = Metadata::open(&dir.path().join("metadata")).unwrap();
            let events = Exchange::default();
            let content = Content::open(&dir.path().join(FOLDER), metadata.clone(), events.clone()).unwrap();
            Bench { dir, metadata, events, content }
        };
        std::thread::spawn(open).join().unwrap()
    }

    /// The engine stops, whatever it was at, and starts again.
    fn restart(self) -> Self {
        let Bench { dir, metadata, events, content } = self;
        drop((metadata, events, content));
        Bench::on(dir)
    }

    fn session(&self, namespace: &str) -> Session {
        Session::new(self.content.clone(), context(namespace))
    }

    fn file(&self, digest: &Digest) -> PathBuf {
        self.dir.path().join(FOLDER).join("blobs/sha256").join(digest.hex())
    }

    fn ingests(&self) -> usize {
        std::fs::read_dir(self.dir.path().join(FOLDER).join("ingest")).unwrap().count()
    }

    async fn put(&self, namespace: &str, bytes: &[u8]) -> Result<Digest> {
        let request = write("put", 0, bytes, WriteAction::Commit);
        let mut session = self.session(namespace);
        let answer = session.step(request).await?;
        assert!(session.is_over());
        Ok(answer.digest.parse().unwrap())
    }

    async fn get(&self, namespace: &str, digest: &Digest, offset: u64, size: u64) -> Result<Vec<u8>> {
        let pieces = self.content.read(&context(namespace), digest.clone(), offset, size).await?;
        let mut at = offset;
        let mut bytes = Vec::new();
        for (offset, piece) in pieces.try_collect::<Vec<_>>().await? {
            assert_eq!(offset, at);
            assert!(!piece.is_empty() && piece.len() as u64 <= super::store::PIECE);
            at += piece.len() as u64;
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    async fn lease(&self, namespace: &str, id: &str) -> RequestContext {
        let (key, lease) = (namespace.to_owned(), Lease { id: id.into(), ..Lease::default() });
        self.metadata.commit(move |txn| txn.put(&[&key, &lease.id], &lease)).await.unwrap();
        context(namespace).with_lease(id)
    }

    fn leased(&self, namespace: &str, lease: &str) -> Vec<String> {
        let held = self.metadata.view().list::<LeaseResource>(&[namespace, lease]);
        held.into_iter().map(|(parts, _)| parts.join(" ")).collect()
    }
}

fn context(namespace: &str) -> RequestContext {
    RequestContext::internal(Namespace::new(namespace).unwrap())
}

fn write(reference: &str, offset: i64, data: &[u8], action: WriteAction) -> WriteContentRequest {
    WriteContentRequest {
        action: action.into(),
        r#ref: reference.into(),
        offset,
        data: data.to_vec().into(),
        ..WriteContentRequest::default()
    }
}

fn stat(reference: &str) -> WriteContentRequest {
    write(reference, 0, b"", WriteAction::Stat)
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::sha256_of(bytes)
}

fn class<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
    match result.unwrap_err() {
        Error::NotFound(_) => "not found",
        Error::AlreadyExists(_) => "already exists",
        Error::FailedPrecondition(_) => "failed precondition",
        Error::InvalidArgument(_) => "invalid argument",
        Error::Unavailable(_) => "unavailable",
        Error::OutOfRange(_) => "out of range",
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_blob_is_written_read_labelled_and_deleted() {
    let bench = Bench::new();
    let mut events = bench.events.subscribe(&[]).unwrap();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| i as u8).collect();
    let mut session = bench.session("a");
    let mut request = stat("ref");
    (request.total, request.expected) = (bytes.len() as i64, digest(&bytes).to_string());
    let answer = session.step(request).await.unwrap();
    assert_eq!((answer.offset, answer.total), (0, 3_000_000));
    let answer = session.step(write("ref", 0, &bytes[..1_000_000], WriteAction::Write)).await.unwrap();
    assert_eq!((answer.offset, answer.digest), (1_000_000, digest(&bytes[..1_000_000]).to_string()));
    let status = bench.content.status(&context("a"), "ref").await.unwrap();
    assert_eq!((status.offset, status.total, &status.r#ref[..]), (1_000_000, 3_000_000, "ref"));
    let mut last = write("", 1_000_000, &bytes[1_000_000..], WriteAction::Commit);
    last.labels = Labels::from([("k".into(), "v".into())]);
    let answer = session.step(last).await.unwrap();
    assert_eq!((answer.offset, &answer.digest), (3_000_000, &digest(&bytes).to_string()));

    let blob = digest(&bytes);
    let info = bench.content.info(&context("a"), &blob).unwrap();
    assert_eq!((info.size, info.labels["k"].as_str()), (3_000_000, "v"));
    assert_eq!(std::fs::metadata(bench.file(&blob)).unwrap().permissions().mode() & 0o7777, 0o444);
    assert_eq!(std::fs::metadata(bench.file(&blob)).unwrap().nlink(), 1);
    assert_eq!(bench.ingests(), 0);
    assert_eq!(bench.get("a", &blob, 0, 0).await.unwrap(), bytes);
    assert_eq!(bench.get("a", &blob, 999_999, 2).await.unwrap(), &bytes[999_999..1_000_001]);
    assert_eq!(bench.get("a", &blob, 2_999_999, 100).await.unwrap(), &bytes[2_999_999..]);
    assert!(bench.get("a", &blob, 3_000_000, 0).await.unwrap().is_empty());
    assert_eq!(class(bench.get("a", &blob, 3_000_001, 0).await), "out of range");
    assert_eq!(class(bench.get("b", &blob, 0, 0).await), "not found");

    let new = |labels: &[(&str, &str)]| Info {
        digest: blob.to_string(),
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        ..Info::default()
    };
    let update = |info, mask: &[&str]| {
        let mask = mask.iter().map(|path| (*path).to_owned()).collect();
        let (content, context) = (bench.content.clone(), context("a"));
        async move { content.update(&context, info, mask).await }
    };
    let info = update(new(&[("x.y", "1"), ("z", "2")]), &["labels.x.y"]).await.unwrap();
    assert_eq!(info.labels, new(&[("k", "v"), ("x.y", "1")]).labels);
    assert!(info.updated_at.unwrap().seconds > 0 && info.size == 3_000_000);
    let info = update(new(&[("k", "")]), &["labels.k"]).await.unwrap();
    assert_eq!(info.labels, new(&[("x.y", "1")]).labels);
    assert_eq!(class(update(new(&[]), &["size"]).await), "invalid argument");
    assert!(update(new(&[]), &[]).await.unwrap().labels.is_empty());
    assert_eq!(
        class(update(Info { digest: digest(b"no").to_string(), ..Info::default() }, &[]).await),
        "not found"
    );

    bench.content.delete(&context("a"), blob.clone()).await.unwrap();
    assert!(!bench.file(&blob).exists());
    assert_eq!(class(bench.content.delete(&context("a"), blob).await), "not found");
    let mut topics = Vec::new();
    for _ in 0..2 {
        topics.push(events.next().await.unwrap().unwrap().topic.clone());
    }
    assert_eq!(topics, ["/content/create", "/content/delete"]);
}

#[tokio::test]
async fn an_ingest_outlives_its_writer_and_the_engine() {
    let bench = Bench::new();
    let mut session = bench.session("a");
    session.step(write("ref", 0, b"hello ", WriteAction::Write)).await.unwrap();
    // The client is gone, without a word.
    session.end().await;
    let bench = bench.restart();
    let statuses = bench.content.list_statuses(&context("a"), &[]).await.unwrap();
    assert_eq!((statuses.len(), statuses[0].offset), (1, 6));
    assert!(bench.content.list_statuses(&context("a"), &["ref==x".into()]).await.unwrap().is_empty());
    assert!(bench.content.list_statuses(&context("b"), &[]).await.unwrap().is_empty());
    let mut session = bench.session("a");
    let answer = session.step(stat("ref")).await.unwrap();
    assert_eq!((answer.offset, answer.digest), (6, digest(b"hello ").to_string()));
    let answer = session.step(write("ref", 6, b"world", WriteAction::Commit)).await.unwrap();
    assert_eq!(answer.digest, digest(b"hello world").to_string());
    assert_eq!(class(bench.content.status(&context("a"), "ref").await), "not found");
}

#[tokio::test]
async fn one_writer_at_a_time() {
    let bench = Bench::new();
    let mut first = bench.session("a");
    first.step(stat("ref")).await.unwrap();
    assert_eq!(class(bench.session("a").step(stat("ref")).await), "unavailable");
    // Another namespace has refs of its own.
    bench.session("b").step(stat("ref")).await.unwrap();
    drop(first);
    bench.session("a").step(stat("ref")).await.unwrap();
}

#[tokio::test]
async fn wrong_requests() {
    let bench = Bench::new();
    assert_eq!(class(bench.session("a").step(stat("")).await), "invalid argument");
    let mut request = stat("ref");
    request.expected = "sha256:short".into();
    assert_eq!(class(bench.session("a").step(request).await), "invalid argument");
    let mut request = stat("ref");
    request.action = 9;
    assert_eq!(class(bench.session("a").step(request).await), "invalid argument");
    assert_eq!(
        class(bench.session("a").step(write("ref", -1, b"", WriteAction::Write)).await),
        "invalid argument"
    );
    assert_eq!(
        class(bench.session("a").step(write("ref", 5, b"x", WriteAction::Write)).await),
        "out of range"
    );
    let mut session = bench.session("a");
    session.step(write("ref", 0, b"abc", WriteAction::Write)).await.unwrap();
    // At 0 again: begin anew.
    let answer = session.step(write("ref", 0, b"xy", WriteAction::Write)).await.unwrap();
    assert_eq!((answer.offset, answer.digest), (2, digest(b"xy").to_string()));
    let mut request = write("ref", 2, b"z", WriteAction::Commit);
    request.total = 4;
    assert_eq!(class(session.step(request).await), "failed precondition");
    assert!(session.is_over());
    let mut session = bench.session("a");
    assert_eq!(session.step(stat("ref")).await.unwrap().offset, 3, "a failed commit keeps the ingest");
    let mut request = write("ref", 3, b"", WriteAction::Commit);
    request.expected = digest(b"other").to_string();
    assert_eq!(class(session.step(request).await), "failed precondition");
    assert_eq!(bench.content.list(&context("a"), &[]).unwrap().len(), 0);
    bench.content.abort(&context("a"), "ref".into()).await.unwrap();
    assert_eq!(class(bench.content.abort(&context("a"), "ref".into()).await), "not found");
    assert_eq!(bench.ingests(), 0);
    assert_eq!(class(bench.content.list(&context("a"), &["bad==".into()])), "invalid argument");
}

#[tokio::test]
async fn a_blob_that_is_there_joins_the_lease() {
    let bench = Bench::new();
    let blob = bench.put("a", b"data").await.unwrap();
    let leased = bench.lease("a", "l").await;
    let mut request = stat("again");
    request.expected = blob.to_string();
    let mut session = Session::new(bench.content.clone(), leased.clone());
    assert_eq!(class(session.step(request).await), "already exists");
    assert_eq!(bench.leased("a", "l"), [format!("content {blob}")]);
    assert_eq!(bench.ingests(), 0);

    // The digest comes late: with the commit.
    let mut session = Session::new(bench.content.clone(), leased.clone());
    session.step(write("late", 0, b"data", WriteAction::Write)).await.unwrap();
    assert_eq!(bench.leased("a", "l").len(), 2);
    let mut request = write("late", 4, b"", WriteAction::Commit);
    request.expected = blob.to_string();
    assert_eq!(class(session.step(request).await), "already exists");
    assert_eq!(bench.leased("a", "l"), [format!("content {blob}")]);
    assert_eq!(bench.ingests(), 0);

    // Nobody says it: found at the commit.
    let mut session = Session::new(bench.content.clone(), leased);
    assert_eq!(class(session.step(write("mute", 0, b"data", WriteAction::Commit)).await), "already exists");
    assert_eq!(bench.ingests(), 0);
    let nobody = context("a").with_lease("nobody");
    assert_eq!(class(bench.content.writer(&nobody, "r".into(), 0, None).await.map(drop)), "not found");
}

#[tokio::test]
async fn namespaces_share_bytes_and_nothing_else() {
    let bench = Bench::new();
    let blob = bench.put("a", b"data").await.unwrap();
    let inode = std::fs::metadata(bench.file(&blob)).unwrap().ino();
    let expecting = |reference: &str| {
        let mut request = stat(reference);
        (request.expected, request.total) = (blob.to_string(), 4);
        request
    };
    let mut session = bench.session("b");
    let answer = session.step(expecting("ref")).await.unwrap();
    assert_eq!((answer.offset, &answer.digest), (4, &blob.to_string()), "it need only be committed");
    // The other namespace lets go meanwhile: the bytes stay for this one.
    bench.content.delete(&context("a"), blob.clone()).await.unwrap();
    session.step(write("ref", 4, b"", WriteAction::Commit)).await.unwrap();
    assert_eq!(bench.get("b", &blob, 0, 0).await.unwrap(), b"data");
    assert_eq!(class(bench.content.info(&context("a"), &blob)), "not found");
    assert_eq!(std::fs::metadata(bench.file(&blob)).unwrap().ino(), inode);

    // A shared ingest that is written to is a copy.
    let mut session = bench.session("a");
    session.step(expecting("more")).await.unwrap();
    let answer = session.step(write("more", 4, b"more", WriteAction::Write)).await.unwrap();
    assert_eq!(answer.digest, digest(b"datamore").to_string());
    let answer = session.step(write("more", 0, b"anew", WriteAction::Write)).await.unwrap();
    assert_eq!(answer.digest, digest(b"anew").to_string());
    session.end().await;
    assert_eq!(bench.get("b", &blob, 0, 0).await.unwrap(), b"data");

    // The last record, and the last ingest that waits for it, take the file along.
    let mut session = bench.session("c");
    session.step(expecting("held")).await.unwrap();
    drop(session);
    bench.content.delete(&context("b"), blob.clone()).await.unwrap();
    assert!(bench.file(&blob).exists());
    bench.content.abort(&context("c"), "held".into()).await.unwrap();
    bench.content.abort(&context("a"), "more".into()).await.unwrap();
    assert!(!bench.file(&blob).exists());
}

#[tokio::test]
async fn clients_that_share_a_ref_and_a_blob_all_end_well() {
    let bench = Bench::new();
    let blob = bench.put("a", b"data").await.unwrap();
    let mut expecting = stat("ref");
    expecting.expected = blob.to_string();
    let leased = bench.lease("b", "l").await;
    let mut first = bench.session("b");
    let mut second = Session::new(bench.content.clone(), leased);
    let mut third = bench.session("b");
    for session in [&mut first, &mut second, &mut third] {
        session.step(expecting.clone()).await.unwrap();
    }
    // Who would write has to have it alone.
    assert_eq!(class(bench.session("b").step(stat("ref")).await), "unavailable");
    assert_eq!(class(third.step(write("ref", 4, b"more", WriteAction::Write)).await), "unavailable");
    let commit = write("ref", 4, b"", WriteAction::Commit);
    first.step(commit.clone()).await.unwrap();
    assert_eq!(class(second.step(commit).await), "already exists");
    assert!(bench.leased("b", "l").contains(&format!("content {blob}")));
    assert_eq!(bench.ingests(), 0);
}

#[tokio::test]
async fn what_is_written_is_not_opened_as_shared() {
    let bench = Bench::new();
    let blob = bench.put("a", b"data").await.unwrap();
    let mut expecting = stat("ref");
    expecting.expected = blob.to_string();
    let mut own = bench.session("b");
    own.step(write("ref", 0, b"part", WriteAction::Write)).await.unwrap();
    assert_eq!(class(bench.session("b").step(expecting.clone()).await), "unavailable");
    let record = bench.metadata.view().get::<IngestRecord>(&["b", "ref"]).unwrap().unwrap();
    assert_eq!(record.shared, "", "who is refused changes nothing");
    own.end().await;

    // Then it is, and what it had is of no use any more.
    let mut session = bench.session("b");
    assert_eq!(session.step(expecting).await.unwrap().offset, 4);
    session.step(write("ref", 4, b"", WriteAction::Commit)).await.unwrap();
    assert_eq!(bench.ingests(), 0);
    assert_eq!(bench.get("b", &blob, 0, 0).await.unwrap(), b"data");
}

#[tokio::test]
async fn a_shared_blob_goes_with_the_last_ingest_that_would_be_it() {
    let bench = Bench::new();
    for (reference, bytes) in [("reopened", b"1"), ("rewritten", b"2")] {
        let blob = bench.put("a", bytes).await.unwrap();
        let b = context("b");
        let open = |expected| bench.content.writer(&b, reference.into(), 0, expected);
        let mut writer = open(Some(blob.clone())).await.unwrap();
        bench.content.delete(&context("a"), blob.clone()).await.unwrap();
        assert!(bench.file(&blob).exists());
        if reference == "rewritten" {
            writer.write(b"!").unwrap();
            writer.commit(0, None, Labels::new()).await.unwrap();
        } else {
            drop(writer);
            open(None).await.unwrap();
        }
        assert!(!bench.file(&blob).exists(), "{reference}");
    }
}

#[tokio::test]
async fn a_writer_whose_ingest_was_aborted_leaves_the_next_one_alone() {
    let bench = Bench::new();
    let mut old = bench.session("a");
    old.step(write("ref", 0, b"old", WriteAction::Write)).await.unwrap();
    let mut full = bench.session("a");
    full.step(write("full", 0, b"old", WriteAction::Write)).await.unwrap();
    for reference in ["ref", "full"] {
        bench.content.abort(&context("a"), reference.into()).await.unwrap();
    }
    let mut new = bench.session("a");
    new.step(write("ref", 0, b"new", WriteAction::Write)).await.unwrap();
    bench.session("a").step(write("full", 0, b"new", WriteAction::Write)).await.unwrap();

    // Its data is there in another namespace, so that it gets as far as the record.
    bench.put("b", b"old").await.unwrap();
    assert_eq!(class(old.step(write("ref", 3, b"", WriteAction::Commit)).await), "not found");
    assert_eq!(bench.content.list(&context("a"), &[]).unwrap().len(), 0);
    new.step(write("ref", 3, b"", WriteAction::Commit)).await.unwrap();

    // It gives up its ingest, which is none any more.
    let mut request = stat("full");
    request.expected = digest(b"new").to_string();
    assert_eq!(class(full.step(request).await), "already exists");
    assert_eq!(bench.content.status(&context("a"), "full").await.unwrap().offset, 3);
}

#[tokio::test]
async fn racing_writers_of_one_blob_all_end_well() {
    let bench = Bench::new();
    let bytes = vec![7; 500_000];
    let tasks: Vec<_> = (0..16)
        .map(|number| {
            let mut session = bench.session(if number % 2 == 0 { "a" } else { "b" });
            let bytes = bytes.clone();
            tokio::spawn(async move {
                let reference = format!("r{number}");
                session.step(write(&reference, 0, &bytes, WriteAction::Write)).await?;
                session.step(write(&reference, 500_000, b"", WriteAction::Commit)).await
            })
        })
        .collect();
    let mut won = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(WriteContentResponse { digest: written, .. }) => {
                assert_eq!(written, digest(&bytes).to_string());
                won += 1;
            }
            Err(Error::AlreadyExists(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(won, 2, "one in each namespace");
    assert_eq!(bench.ingests(), 0);
    assert_eq!(bench.get("b", &digest(&bytes), 0, 0).await.unwrap(), bytes);
}

#[tokio::test]
async fn commits_and_deletes_of_one_blob_never_lose_its_bytes() {
    let bench = Bench::new();
    let bytes = vec![9; 10_000];
    let blob = digest(&bytes);
    let writer = {
        let (content, bytes) = (bench.content.clone(), bytes.clone());
        tokio::spawn(async move {
            for round in 0..60 {
                let mut session = Session::new(content.clone(), context("a"));
                let request = write(&format!("w{round}"), 0, &bytes, WriteAction::Commit);
                match session.step(request).await {
                    Ok(_) | Err(Error::AlreadyExists(_)) => {}
                    Err(other) => panic!("{other:?}"),
                }
                // Whoever has a record has the bytes.
                content.open_blob(&context("a"), &digest(&bytes)).unwrap();
                content.delete(&context("a"), digest(&bytes)).await.unwrap();
            }
        })
    };
    for round in 0..60 {
        let mut session = bench.session("b");
        session.step(write(&format!("v{round}"), 0, &bytes, WriteAction::Commit)).await.unwrap();
        bench.content.open_blob(&context("b"), &blob).unwrap();
        bench.content.delete(&context("b"), blob.clone()).await.unwrap();
    }
    writer.await.unwrap();
    assert!(!bench.file(&blob).exists());
    assert_eq!(bench.ingests(), 0);
}

/// Holds the metadata's writer thread; what is queued until the sender is used or dropped is one group with it.
fn hold(metadata: &Metadata) -> (std::sync::mpsc::Sender<()>, impl Future<Output = Result<()>>) {
    let (leave, wait) = std::sync::mpsc::channel();
    let held = metadata.commit(move |_| {
        let _ = wait.recv();
        Ok(())
    });
    (leave, held)
}

#[tokio::test]
async fn a_file_stays_until_its_last_record_is_gone_on_disk() {
    let bench = Bench::new();
    let blobs = [bench.put("a", b"one").await.unwrap(), bench.put("a", b"two").await.unwrap()];
    let other = bench.put("b", b"three").await.unwrap();
    let (leave, held) = hold(&bench.metadata);
    let gone = blobs.clone();
    let delete = bench.metadata.commit(move |txn| {
        gone.iter().try_for_each(|blob| txn.delete::<BlobRecord>(&["a", blob.as_str()]).map(drop))
    });
    let remove = bench.content.remove_unused(vec![blobs[0].clone(), blobs[1].clone(), other.clone()]);
    let files = blobs.clone().map(|blob| bench.file(&blob));
    // What a kill would find just before the deletion is on disk.
    let before = bench.metadata.commit({
        let files = files.clone();
        move |_| Ok(files.map(|file| file.exists()))
    });
    // Queued in this order, as one group.
    let go_on = async move { drop(leave) };
    let (held, deleted, (), before, ()) = tokio::join!(held, delete, remove, before, go_on);
    held.and(deleted).unwrap();
    assert_eq!(before.unwrap(), [true, true], "a record on disk names a file that is gone");
    assert_eq!(files.map(|file| file.exists()), [false, false]);
    assert!(bench.file(&other).exists());
}

#[tokio::test]
async fn a_blob_about_to_be_recorded_is_not_removed() {
    let bench = Bench::new();
    let mut writer = bench.content.writer(&context("a"), "ref".into(), 0, None).await.unwrap();
    writer.write(b"data").unwrap();
    let blob = digest(b"data");
    let (leave, held) = hold(&bench.metadata);
    let file = bench.file(&blob);
    let meddle = async {
        while !file.exists() {
            tokio::task::yield_now().await;
        }
        // A removal that had begun before, and one that finds the pin.
        std::fs::remove_file(&file).unwrap();
        drop(leave);
        bench.content.remove_unused(vec![blob.clone()]).await;
    };
    let (held, committed, ()) = tokio::join!(held, writer.commit(0, None, Labels::new()), meddle);
    held.unwrap();
    assert_eq!(committed.unwrap(), blob);
    assert_eq!(bench.get("a", &blob, 0, 0).await.unwrap(), b"data");

    // Without a record: the pin alone keeps it, for as long as it is there.
    let mut writer = bench.content.writer(&context("a"), "ref".into(), 0, None).await.unwrap();
    writer.write(b"more").unwrap();
    let Data::Own(ingest) = writer.data else { panic!("shared") };
    let finished = ingest.finish(0, None).unwrap();
    finished.publish().unwrap();
    let blob = finished.digest.clone();
    bench.content.remove_unused(vec![blob.clone()]).await;
    assert!(bench.file(&blob).exists());
    drop(finished);
    bench.content.remove_unused(vec![blob.clone()]).await;
    assert!(!bench.file(&blob).exists());
}

#[tokio::test]
async fn a_commit_cut_off_before_its_record_is_gone_on_with() {
    let bench = Bench::new();
    let mut session = bench.session("a");
    session.step(write("ref", 0, b"data", WriteAction::Write)).await.unwrap();
    session.end().await;
    // What a kill between link and record leaves.
    let folder = bench.content.store.ingests().unwrap().remove(0).0;
    let blob = digest(b"data");
    std::fs::hard_link(folder.join("data"), bench.file(&blob)).unwrap();
    let bench = bench.restart();
    let mut session = bench.session("a");
    assert_eq!(session.step(stat("ref")).await.unwrap().offset, 4);
    session.step(write("ref", 0, b"other", WriteAction::Write)).await.unwrap();
    assert_eq!(std::fs::read(bench.file(&blob)).unwrap(), b"data", "a blob's bytes never change");
    session.step(write("ref", 0, b"data", WriteAction::Commit)).await.unwrap();
    assert_eq!(bench.get("a", &blob, 0, 0).await.unwrap(), b"data");
}

#[tokio::test]
async fn a_damaged_blob_is_replaced() {
    let bench = Bench::new();
    std::fs::write(bench.file(&digest(b"data")), b"da").unwrap();
    let blob = bench.put("a", b"data").await.unwrap();
    assert_eq!(bench.get("a", &blob, 0, 0).await.unwrap(), b"data");
}

#[tokio::test]
async fn the_start_tidies_up() {
    let bench = Bench::new();
    for reference in ["old", "new", "lost"] {
        bench.session("a").step(write(reference, 0, b"x", WriteAction::Write)).await.unwrap();
    }
    let leased = bench.lease("a", "l").await;
    Session::new(bench.content.clone(), leased)
        .step(write("leased", 0, b"x", WriteAction::Write))
        .await
        .unwrap();
    bench
        .metadata
        .commit(|txn| {
            for reference in ["old", "leased"] {
                let mut record = txn.get::<IngestRecord>(&["a", reference])?.unwrap();
                record.expires_at = record.expires_at.map(|_| SystemTime::UNIX_EPOCH.into());
                txn.put(&["a", reference], &record)?;
            }
            txn.delete::<IngestRecord>(&["a", "lost"])
        })
        .await
        .unwrap();
    std::fs::create_dir(bench.dir.path().join(FOLDER).join("ingest/stray")).unwrap();
    std::fs::write(bench.dir.path().join(FOLDER).join("removed/half"), "x").unwrap();
    assert_eq!(bench.ingests(), 5);
    let bench = bench.restart();
    let left = bench.content.list_statuses(&context("a"), &[]).await.unwrap();
    assert_eq!(left.iter().map(|status| status.r#ref.as_str()).collect::<Vec<_>>(), ["leased", "new"]);
    assert_eq!(bench.ingests(), 2);
    assert!(!bench.dir.path().join(FOLDER).join("removed/half").exists());
}

#[tokio::test]
async fn the_start_goes_on_past_what_is_damaged() {
    let bench = Bench::new();
    bench.session("a").step(write("bad", 0, b"x", WriteAction::Write)).await.unwrap();
    bench.session("a").step(write("good", 0, b"x", WriteAction::Write)).await.unwrap();
    let shared = bench.put("b", b"data").await.unwrap();
    let mut expecting = stat("expired");
    expecting.expected = shared.to_string();
    bench.session("a").step(expecting).await.unwrap();
    bench.content.delete(&context("b"), shared.clone()).await.unwrap();
    bench
        .metadata
        .commit(|txn| {
            let mut record = txn.get::<IngestRecord>(&["a", "expired"])?.unwrap();
            record.expires_at = Some(SystemTime::UNIX_EPOCH.into());
            txn.put(&["a", "expired"], &record)
        })
        .await
        .unwrap();
    // Its data cannot be looked at: the link leads to itself.
    let bad = bench.metadata.view().get::<IngestRecord>(&["a", "bad"]).unwrap().unwrap();
    let data = bench.content.store.ingest_folder(&bad.key).join("data");
    std::fs::remove_file(&data).unwrap();
    std::os::unix::fs::symlink("data", &data).unwrap();
    let orphan = bench.file(&digest(b"orphan"));
    std::fs::write(&orphan, "orphan").unwrap();
    let bench = bench.restart();
    assert_eq!(bench.session("a").step(stat("good")).await.unwrap().offset, 1);
    assert!(orphan.exists(), "it may be containerd's");
    assert!(!bench.file(&shared).exists(), "it was kept for an ingest that is over");
    // It is there to be thrown away.
    bench.content.abort(&context("a"), "bad".into()).await.unwrap();
    assert_eq!(bench.ingests(), 1);
}

#[tokio::test]
async fn the_layout_is_containerds() {
    let bench = Bench::new();
    let mut request = write("layer/x", 0, b"abc", WriteAction::Write);
    request.total = 9;
    bench.session("a").step(request).await.unwrap();
    let record = bench.metadata.view().get::<IngestRecord>(&["a", "layer/x"]).unwrap().unwrap();
    let [namespace, number, reference] = record.key.splitn(3, '/').collect::<Vec<_>>()[..] else { panic!() };
    assert_eq!((namespace, reference), ("a", "layer/x"));
    number.parse::<u64>().unwrap();
    let folder = bench.dir.path().join(FOLDER).join("ingest").join(digest(record.key.as_bytes()).hex());
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    assert_eq!((text("ref"), text("data"), text("total")), (record.key, "abc".into(), "9".into()));
    for name in ["startedat", "updatedat"] {
        OffsetDateTimeText::check(&text(name));
    }
    let sha512 = {
        let mut hasher = Algorithm::Sha512.hasher();
        hasher.update(b"big");
        hasher.finish()
    };
    let mut request = write("other", 0, b"big", WriteAction::Commit);
    request.expected = sha512.to_string();
    bench.session("a").step(request).await.unwrap();
    assert_eq!(bench.get("a", &sha512, 0, 0).await.unwrap(), b"big");
}

/// What Go's time.UnmarshalText takes.
struct OffsetDateTimeText;

impl OffsetDateTimeText {
    fn check(text: &str) {
        time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).unwrap();
    }
}

#[tokio::test]
async fn lists_pass_filters() {
    let bench = Bench::new();
    let one = bench.put("a", b"1").await.unwrap();
    bench.put("a", b"22").await.unwrap();
    let list = |filter: String| bench.content.list(&context("a"), &[filter]).unwrap().len();
    assert_eq!(list(format!("digest=={one}")), 1);
    assert_eq!((list("size==2".into()), list("size~=.".into()), list("labels.x".into())), (1, 2, 0));
    assert_eq!(bench.content.list(&context("b"), &[]).unwrap().len(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any course of writes, new beginnings, suspensions and restarts ends as a plain vector would.
    #[test]
    fn writes_behave_as_on_a_vector(
        steps in prop::collection::vec((0_u8..10, prop::collection::vec(any::<u8>(), 0..2000)), 1..12)
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let mut bench = Bench::new();
            let mut model: Vec<u8> = Vec::new();
            let mut session = bench.session("a");
            session.step(stat("ref")).await.unwrap();
            for (kind, data) in steps {
                match kind {
                    0 => {
                        session.end().await;
                        bench = bench.restart();
                        session = bench.session("a");
                        let answer = session.step(stat("ref")).await.unwrap();
                        prop_assert_eq!(answer.offset as usize, model.len());
                    }
                    1 => {
                        session.step(write("ref", 0, &data, WriteAction::Write)).await.unwrap();
                        model = data;
                    }
                    2 => {
                        let wrong = model.len() as i64 + 1;
                        prop_assert_eq!(class(session.step(write("ref", wrong, &data, WriteAction::Write)).await), "out of range");
                        session = bench.session("a");
                        session.step(stat("ref")).await.unwrap();
                    }
                    _ => {
                        let answer = session.step(write("ref", model.len() as i64, &data, WriteAction::Write)).await.unwrap();
                        model.extend_from_slice(&data);
                        prop_assert_eq!(answer.offset as usize, model.len());
                        prop_assert_eq!(answer.digest, digest(&model).to_string());
                    }
                }
            }
            let answer = session.step(write("ref", model.len() as i64, b"", WriteAction::Commit)).await.unwrap();
            prop_assert_eq!(&answer.digest, &digest(&model).to_string());
            prop_assert_eq!(bench.get("a", &digest(&model), 0, 0).await.unwrap(), model);
            Ok(())
        })?;
    }
}
