//! The journal on real files: torn, damaged, full, and read while it is written.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// A folder for a journal, and what is noted elsewhere.
struct Bench {
    dir: TempDir,
    retention: u64,
    reserved: Arc<AtomicU64>,
}

impl Bench {
    fn new(retention: u64) -> Self {
        Bench { dir: tempfile::tempdir().unwrap(), retention, reserved: Arc::default() }
    }

    fn open(&self) -> Journal {
        self.open_in(self.dir.path())
    }

    fn open_in(&self, dir: &Path) -> Journal {
        let reserved = self.reserved.clone();
        let reserve = Box::new(move |number| {
            reserved.store(number, Ordering::SeqCst);
            Ok(())
        });
        Journal::open(dir, self.retention, self.reserved.load(Ordering::SeqCst), reserve, |_| {}).unwrap()
    }

    /// The segments, oldest first.
    fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    }
}

fn event(topic: &str, size: usize) -> Envelope {
    let value = vec![b'x'; size];
    let event = Some(prost_types::Any { type_url: "x".into(), value });
    Envelope { topic: topic.into(), event, ..Envelope::default() }
}

/// Appends and waits until that is on disk.
fn append(journal: &Journal, envelope: &Envelope) {
    let (done, answer) = oneshot::channel();
    journal.append(envelope.encode_to_vec(), Some(done));
    answer.blocking_recv().unwrap();
}

/// All there is from a number on.
fn read_from(journal: &Journal, from: u64) -> Vec<Entry> {
    let end = journal.range().next;
    let mut place = Place { next: from, hint: None };
    let mut all = Vec::new();
    while place.next < end {
        let before = place.next;
        all.extend(journal.shared.read(&mut place, end));
        assert!(place.next > before, "no way on from {before}");
    }
    assert_eq!(place.next, end.max(from));
    all
}

fn topics(entries: &[Entry]) -> Vec<(u64, &str)> {
    let topics = entries.iter().filter_map(|entry| match entry {
        Entry::Event(number, envelope) => Some((*number, envelope.topic.as_str())),
        Entry::Gap(..) => None,
    });
    topics.collect()
}

fn gaps(entries: &[Entry]) -> Vec<(u64, u64)> {
    let gaps = entries.iter().filter_map(|entry| match entry {
        Entry::Gap(from, next) => Some((*from, *next)),
        Entry::Event(..) => None,
    });
    gaps.collect()
}

/// Every number from the first to the next is that of one entry, in order.
fn assert_complete(journal: &Journal, from: u64) -> Vec<Entry> {
    let entries = read_from(journal, from);
    let mut next = from;
    for entry in &entries {
        let (at, after) = match entry {
            Entry::Event(number, _) => (*number, number + 1),
            Entry::Gap(from, next) => (*from, *next),
        };
        assert!(at == next && after > at, "{entries:?}");
        next = after;
    }
    assert_eq!(next, journal.range().next);
    entries
}

#[test]
fn numbers_go_on_after_a_restart() {
    let bench = Bench::new(1 << 20);
    for round in 0..3_u64 {
        let journal = bench.open();
        assert_eq!(journal.range().next, 1 + round * 2);
        append(&journal, &event(&format!("/a/{round}"), 10));
        append(&journal, &event(&format!("/b/{round}"), 0));
    }
    let journal = bench.open();
    let entries = assert_complete(&journal, 1);
    let expected = [(1, "/a/0"), (2, "/b/0"), (3, "/a/1"), (4, "/b/1"), (5, "/a/2"), (6, "/b/2")];
    assert_eq!(topics(&entries), expected);
    assert_eq!(topics(&read_from(&journal, 5)), expected[4..]);
    assert_eq!(bench.files().len(), 1);
    assert!(matches!(journal.reader(Some(8)), Err(Error::OutOfRange(_))));
    assert!(journal.reader(Some(7)).is_ok());
}

#[test]
fn a_write_cut_off_at_any_byte_loses_what_it_wrote_and_no_more() {
    let bench = Bench::new(1 << 20);
    {
        let journal = bench.open();
        for number in 1..=4 {
            append(&journal, &event(&format!("/e/{number}"), number * 7));
        }
    }
    let file = bench.files().remove(0);
    let bytes = fs::read(&file).unwrap();
    let mut ends = vec![MAGIC.len()];
    let (count, _) = scan(&bytes, 1, |payload| ends.push(ends.last().unwrap() + HEAD + payload.len()));
    assert_eq!((count, *ends.last().unwrap()), (5, bytes.len()));
    let reserved = bench.reserved.load(Ordering::SeqCst);
    for cut in 0..bytes.len() {
        let torn = Bench::new(1 << 20);
        torn.reserved.store(reserved, Ordering::SeqCst);
        fs::write(torn.dir.path().join(file.file_name().unwrap()), &bytes[..cut]).unwrap();
        let whole = ends.iter().filter(|end| **end <= cut).count().saturating_sub(1);
        {
            let journal = torn.open();
            append(&journal, &event("/new/one", 3));
        }
        let journal = torn.open();
        let entries = assert_complete(&journal, 1);
        let topics = topics(&entries);
        assert_eq!(topics.len(), whole + 1, "cut at {cut}: {entries:?}");
        for (index, (number, topic)) in topics[..whole].iter().enumerate() {
            assert_eq!((*number, *topic), (index as u64 + 1, format!("/e/{}", index + 1).as_str()));
        }
        let (number, topic) = topics[whole];
        assert_eq!(topic, "/new/one");
        // A number of which a part was there is not given again; without its first line nobody knows how many were.
        match cut {
            cut if cut < MAGIC.len() => assert_eq!(number, reserved),
            cut if ends.contains(&cut) => assert_eq!(number, whole as u64 + 1),
            _ => assert!(number > whole as u64 + 1 && number < reserved, "cut at {cut}: {number}"),
        }
    }
}

#[test]
fn a_damaged_byte_never_gives_a_wrong_event_nor_a_number_twice() {
    let bench = Bench::new(1 << 20);
    {
        let journal = bench.open();
        for number in 1..=5 {
            append(&journal, &event(&format!("/e/{number}"), 5));
        }
    }
    let file = bench.files().remove(0);
    let bytes = fs::read(&file).unwrap();
    for at in 0..bytes.len() {
        let damaged = Bench::new(1 << 20);
        damaged.reserved.store(bench.reserved.load(Ordering::SeqCst), Ordering::SeqCst);
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x41;
        fs::write(damaged.dir.path().join(file.file_name().unwrap()), &bytes).unwrap();
        let journal = damaged.open();
        append(&journal, &event("/new/one", 5));
        let entries = assert_complete(&journal, 1);
        for (number, topic) in topics(&entries) {
            let expected = if number > 5 { "/new/one".into() } else { format!("/e/{number}") };
            assert_eq!(topic, expected, "byte {at}: {entries:?}");
        }
        assert_eq!(gaps(&entries).len(), 1, "byte {at}: {entries:?}");
    }
}

#[test]
fn damage_in_the_middle_costs_the_rest_of_its_segment() {
    let bench = Bench::new(64 << 10);
    let journal = bench.open();
    for number in 1..=100 {
        append(&journal, &event(&format!("/e/{number}"), 400));
    }
    let files = bench.files();
    assert!(files.len() > 3, "{files:?}");
    let name = |file: &PathBuf| file.file_name().unwrap().to_str().unwrap().parse::<u64>().unwrap();
    let (second, third) = (name(&files[1]), name(&files[2]));
    let mut bytes = fs::read(&files[1]).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&files[1], bytes).unwrap();
    let check = |journal: &Journal| {
        let entries = assert_complete(journal, 1);
        let gaps = gaps(&entries);
        assert!(matches!(gaps[..], [(from, next)] if from > second && next == third), "{gaps:?}");
        assert_eq!(topics(&entries).len() as u64, 100 - (third - gaps[0].0));
    };
    check(&journal);
    drop(journal);
    check(&bench.open());
    // One that is gone whole.
    fs::remove_file(&files[1]).unwrap();
    assert_eq!(gaps(&assert_complete(&bench.open(), 1)), [(second, third)]);
}

#[test]
fn the_oldest_segments_go_and_who_fell_behind_is_told() {
    let bench = Bench::new(64 << 10);
    let journal = bench.open();
    for number in 1..=1000 {
        append(&journal, &event(&format!("/e/{number}"), 300));
        let bytes: u64 = bench.files().iter().map(|file| file.metadata().unwrap().len()).sum();
        assert!(bytes <= bench.retention, "{bytes}");
    }
    let range = journal.range();
    assert!(range.first > 700 && range.next == 1001 && range.bytes > 32 << 10, "{range:?}");
    let entries = assert_complete(&journal, 3);
    assert_eq!(gaps(&entries), [(3, range.first)]);
    assert_eq!(topics(&entries).len() as u64, 1001 - range.first);
    assert!(gaps(&assert_complete(&journal, range.first)).is_empty());
}

#[test]
fn no_number_is_given_again_when_segments_are_gone() {
    let bench = Bench::new(64 << 10);
    let journal = bench.open();
    for _ in 0..60 {
        append(&journal, &event("/a/b", 500));
    }
    drop(journal);
    let files = bench.files();
    assert!(files.len() > 2);
    fs::remove_file(files.last().unwrap()).unwrap();
    let journal = bench.open();
    let next = journal.range().next;
    assert!(next > 60);
    append(&journal, &event("/c/d", 1));
    let entries = assert_complete(&journal, 1);
    assert_eq!(topics(&entries).last(), Some(&(next, "/c/d")));
    assert_eq!(gaps(&entries).len(), 1);
    drop(journal);
    for file in bench.files() {
        fs::remove_file(file).unwrap();
    }
    let journal = bench.open();
    let range = journal.range();
    assert!(range.next > next && range.first == range.next, "{range:?}");
    append(&journal, &event("/e/f", 1));
    assert_eq!(assert_complete(&journal, 1).len(), 2);
}

#[test]
fn an_event_larger_than_a_segment_has_one_of_its_own() {
    let bench = Bench::new(64 << 10);
    let journal = bench.open();
    append(&journal, &event("/a/b", 10));
    append(&journal, &event("/large/one", 4 << 20));
    append(&journal, &event("/c/d", 10));
    let entries = assert_complete(&journal, 2);
    let Some(Entry::Event(3, last)) = entries.last() else { panic!("{}", entries.len()) };
    assert_eq!(last.topic, "/c/d");
    assert!(journal.range().bytes <= bench.retention);
    assert!(matches!(journal.room_for(PAYLOAD_MAX + 1), Err(Error::InvalidArgument(_))));
}

#[test]
fn a_full_disk_fails_nobody_and_is_told_to_readers() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: not root");
        return;
    }
    let bench = Bench::new(64 << 10);
    let tmpfs = sys::mount::Mount {
        kind: "tmpfs".into(),
        source: "tmpfs".into(),
        target: String::new(),
        options: vec!["size=128k".into()],
    };
    let mounted = sys::mount::Mounted::new(&[tmpfs], bench.dir.path()).unwrap();
    let disk = mounted.path();
    let dir = disk.join("events");
    let journal = bench.open_in(&dir);
    append(&journal, &event("/a/1", 100));
    let fill = |size: usize| fs::write(disk.join("filler"), vec![0; size]);
    assert!(fill(1 << 20).is_err(), "the disk should be full now");
    // The rest of its segment is taken already; then there is no other.
    for number in 2..=60 {
        append(&journal, &event(&format!("/a/{number}"), 500));
    }
    let full = assert_complete(&journal, 1);
    let count = topics(&full).len() as u64;
    assert!((5..60).contains(&count), "{count}");
    assert_eq!(gaps(&full), [(count + 1, count + 2)]);
    // A kill now leaves that in the journal.
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    assert_eq!(assert_complete(&bench.open_in(copy.path()), 1), full);
    fs::remove_file(disk.join("filler")).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while journal.range().next == count + 2 {
        assert!(Instant::now() < end, "it does not go on");
        append(&journal, &event("/b/b", 10));
    }
    append(&journal, &event("/c/c", 10));
    let entries = assert_complete(&journal, 1);
    assert_eq!(topics(&entries)[count as usize..], [(count + 2, "/b/b"), (count + 3, "/c/c")]);
    assert_eq!(gaps(&entries), [(count + 1, count + 2)]);
    drop(journal);
    assert_eq!(assert_complete(&bench.open_in(&dir), 1), entries);
}

#[test]
fn readers_go_from_what_was_to_what_comes_without_a_seam() {
    const COUNT: u64 = 3000;
    let bench = Bench::new(1 << 20);
    let journal = Arc::new(bench.open());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let mut readers = Vec::new();
        let writer = {
            let journal = journal.clone();
            tokio::task::spawn_blocking(move || {
                for number in 1..=COUNT {
                    let event = event(&format!("/e/{number}"), number as usize % 100);
                    // Some are waited for, the others are synced by and by.
                    let (done, answer) = oneshot::channel();
                    let done = (number % 50 == 0).then_some(done);
                    let waits = done.is_some();
                    journal.append(event.encode_to_vec(), done);
                    if waits {
                        answer.blocking_recv().unwrap();
                    }
                }
            })
        };
        for _ in 0..8 {
            let mut reader = journal.reader(Some(1)).unwrap();
            readers.push(tokio::spawn(async move {
                let mut expected = 1;
                while expected <= COUNT {
                    for entry in reader.next(|_| true).await.unwrap() {
                        let Entry::Event(number, envelope) = entry else { panic!("{entry:?}") };
                        assert_eq!((number, envelope.topic), (expected, format!("/e/{expected}")));
                        expected += 1;
                    }
                }
            }));
        }
        let mut some = journal.reader(Some(0)).unwrap();
        let mut seen = 0;
        while seen < COUNT / 1000 {
            seen += some.next(|envelope| envelope.topic.ends_with("000")).await.unwrap().len() as u64;
        }
        for reader in readers {
            reader.await.unwrap();
        }
        writer.await.unwrap();
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is written, reopened and cut off, every number is one right event or told to be missing.
    #[test]
    fn what_is_read_is_what_was_written(
        steps in proptest::collection::vec((0..4000_usize, 0..20_u8, 0..200_u64), 1..80),
    ) {
        let bench = Bench::new(64 << 10);
        let mut journal = Some(bench.open());
        let mut written = BTreeMap::new();
        for (index, (size, what, cut)) in steps.into_iter().enumerate() {
            match what {
                0 | 1 => {
                    drop(journal.take());
                    if what == 1 && let Some(newest) = bench.files().last() {
                        let file = File::options().write(true).open(newest).unwrap();
                        let length = file.metadata().unwrap().len();
                        file.set_len(length.saturating_sub(cut).max(MAGIC.len() as u64)).unwrap();
                        let (next, _) = scan(&fs::read(newest).unwrap(), newest.file_name().unwrap()
                            .to_str().unwrap().parse().unwrap(), |_| {});
                        written.split_off(&next);
                    }
                    journal = Some(bench.open());
                }
                _ => {
                    let journal = journal.as_ref().unwrap();
                    let number = journal.range().next;
                    let event = event(&format!("/e/{index}"), size);
                    append(journal, &event);
                    prop_assert!(written.insert(number, event).is_none());
                }
            }
        }
        let journal = journal.unwrap();
        let range = journal.range();
        for entry in assert_complete(&journal, 1) {
            match entry {
                Entry::Event(number, envelope) => prop_assert_eq!(Some(&envelope), written.get(&number)),
                Entry::Gap(from, next) => {
                    let missing = written.range(from.max(range.first)..next);
                    prop_assert!(missing.count() == 0, "{} to {}", from, next);
                }
            }
        }
        let bytes: u64 = bench.files().iter().map(|file| file.metadata().unwrap().len()).sum();
        prop_assert!(bytes <= bench.retention);
    }
}
