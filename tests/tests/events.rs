//! The journal of events with the whole engine: who was away misses nothing, and is told when something is gone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::BufRead as _;

use proto::containerd::events::TaskExit;
use proto::containerd::services::events::v1::events_client::EventsClient as LiveClient;
use proto::containerd::services::events::v1::{PublishRequest, SubscribeRequest as LiveRequest};
use proto::containerd::types::Envelope;
use proto::gantry::events::v1::events_client::EventsClient;
use proto::gantry::events::v1::subscribe_response::Entry;
use proto::gantry::events::v1::{InfoRequest, InfoResponse, SubscribeRequest, SubscribeResponse};
use tests::client::{channel, in_namespace};
use tests::host::{Host, Kind, RUNC, STOCK_CTR};
use tests::image::BUSYBOX;
use tests::{LIMIT, ready};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

const PROGRAMS: [&str; 3] = [STOCK_CTR, RUNC, BUSYBOX];

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// An engine that keeps so many bytes of events.
fn with_retention(bytes: u64) -> Host {
    let mut host = Host::new(Kind::Gantry);
    let config = host.folder().join("config.toml");
    fs::write(&config, format!("version = 2\n[events]\nretention_bytes = {bytes}\n")).unwrap();
    host.arguments = vec!["--config".into(), config.to_str().unwrap().into()];
    host.start();
    host
}

/// A subscription of the whole journal, which has no holes.
struct Journal {
    stream: Streaming<SubscribeResponse>,
    /// The number that comes next.
    next: u64,
}

async fn client(host: &Host) -> EventsClient<Channel> {
    EventsClient::new(channel(&host.address()).await).max_decoding_message_size(32 << 20)
}

impl Journal {
    async fn try_open(host: &Host, from: u64) -> Result<Self, Status> {
        let request = SubscribeRequest { from: Some(from), filters: Vec::new() };
        let stream = client(host).await.subscribe(request).await?.into_inner();
        Ok(Journal { stream, next: from })
    }

    async fn open(host: &Host, from: u64) -> Self {
        Journal::try_open(host, from).await.unwrap()
    }

    async fn entry(&mut self) -> Entry {
        let message = tokio::time::timeout(LIMIT, self.stream.message());
        let message = message.await.unwrap_or_else(|_| panic!("nothing came after {}", self.next));
        let entry = message.unwrap().expect("the stream ended").entry.unwrap();
        let (from, next) = match &entry {
            Entry::Event(event) => (event.sequence, event.sequence + 1),
            Entry::Gap(gap) => (gap.from, gap.next),
        };
        assert!(from == self.next && next > from, "{} was to come: {from} to {next}", self.next);
        self.next = next;
        entry
    }

    async fn event(&mut self) -> Envelope {
        match self.entry().await {
            Entry::Event(event) => event.envelope.unwrap(),
            Entry::Gap(gap) => panic!("{gap:?}"),
        }
    }
}

async fn info(host: &Host) -> InfoResponse {
    client(host).await.info(InfoRequest {}).await.unwrap().into_inner()
}

async fn publisher(host: &Host) -> LiveClient<Channel> {
    LiveClient::new(channel(&host.address()).await)
}

/// Publishes an event of this size, and waits for the answer.
async fn publish(publisher: &mut LiveClient<Channel>, namespace: &str, topic: &str, size: usize) {
    let event = Some(prost_types::Any { type_url: "test".into(), value: vec![7; size] });
    let request = PublishRequest { topic: topic.to_owned(), event };
    publisher.publish(in_namespace(namespace, request)).await.unwrap();
}

fn exit_of(envelope: &Envelope) -> TaskExit {
    proto::any::unpack(envelope.event.as_ref().unwrap()).unwrap()
}

/// The first lines of what a command of our `ctr` prints, which is then ended.
fn lines(host: &Host, arguments: &[&str], count: usize) -> Vec<String> {
    let mut child = host.ctr().spawn(arguments);
    let stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        stdout.lines().map_while(Result::ok).take(count).for_each(|line| sender.send(line).unwrap());
    });
    let lines = (0..count).map(|_| receiver.recv_timeout(LIMIT).expect("a line within the limit")).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    lines
}

#[test]
fn the_whole_life_of_a_container_is_there_afterwards() {
    if !ready(&PROGRAMS) {
        return;
    }
    let mut host = Host::gantry();
    let ctr = host.stock_ctr();
    let image = host.import();
    assert_eq!(ctr.run(&["run", "--rm", image, "c", "sh", "-c", "exit 3"]).code, 3);
    let runtime = runtime();
    let read = |host: &Host| {
        runtime.block_on(async {
            let mut journal = Journal::open(host, 1).await;
            let mut all = Vec::new();
            while all.last().is_none_or(|last: &Envelope| last.topic != "/containers/delete") {
                all.push(journal.event().await);
            }
            all
        })
    };
    let all = read(&host);
    assert!(all.iter().all(|event| event.timestamp.is_some() && event.namespace == host.namespace));
    let topics: Vec<&str> = all.iter().map(|event| event.topic.as_str()).collect();
    let at = |topic: &str| {
        let found: Vec<usize> = (0..topics.len()).filter(|at| topics[*at] == topic).collect();
        assert_eq!(found.len(), 1, "{topic}: {topics:?}");
        found[0]
    };
    let life = ["/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    let places: Vec<usize> = ["/images/create"].iter().chain(&life).map(|topic| at(topic)).collect();
    assert!(places.is_sorted(), "{topics:?}");
    assert_eq!(exit_of(&all[at("/tasks/exit")]).exit_status, 3);
    // The next engine of this root has the same.
    host.stop();
    host.start();
    assert_eq!(read(&host), all);
    // And our ctr shows it, with numbers.
    let exit = at("/tasks/exit");
    let shown =
        lines(&host, &["events", "--from", "0", r#"topic=="/tasks/start""#, r#"topic=="/tasks/exit""#], 2);
    assert!(shown[0].contains(" /tasks/start ") && shown[0].starts_with(&format!("{} ", exit)), "{shown:?}");
    assert!(
        shown[1].contains(" /tasks/exit ") && shown[1].starts_with(&format!("{} ", exit + 1)),
        "{shown:?}"
    );
    let from = (exit + 1).to_string();
    let shown = lines(&host, &["events", "--format", "json", "--from", &from], 1);
    let shown: serde_json::Value = serde_json::from_str(&shown[0]).unwrap();
    assert_eq!(
        (&shown["sequence"], &shown["envelope"]["topic"]),
        (&(exit + 1).into(), &"/tasks/exit".into())
    );
    let next = all.len() as u64 + 1;
    let refused = host.ctr().fails(&["events", "--from", &(next + 1).to_string()]);
    assert!(refused.contains("out of range") && refused.contains(&next.to_string()), "{refused}");
    let code = runtime.block_on(async { Journal::try_open(&host, next + 1).await.err().unwrap().code() });
    assert_eq!(code, Code::OutOfRange);
    host.assert_nothing_left();
}

/// The codes with which each container exited.
type Exits = BTreeMap<String, Vec<u32>>;

#[test]
fn who_comes_back_after_a_kill_has_each_exit_once() {
    if !ready(&PROGRAMS) {
        return;
    }
    const ROUNDS: usize = 4;
    const EACH: usize = 4;
    let mut host = Host::gantry();
    let ctr = host.stock_ctr();
    let image = host.import();
    let flags = host.folder().join("flags");
    fs::create_dir(&flags).unwrap();
    let mount = format!("type=bind,src={},dst=/flags,options=rbind:rw", flags.display());
    let script = "until [ -e /flags/$ROUND ]; do sleep 0.02; done; exit $CODE";
    let code = |round: usize, number: usize| round * EACH + number + 1;
    let id = |code: usize| format!("c{code}");
    for round in 0..ROUNDS {
        for number in 0..EACH {
            let code = code(round, number);
            let (go, exit) = (format!("ROUND={round}"), format!("CODE={code}"));
            let arguments = ["run", "-d", "--mount", &mount, "--env", &go, "--env", &exit, image, &id(code)];
            ctr.ok(&[&arguments[..], &["sh", "-c", script]].concat());
        }
    }
    let runtime = runtime();
    let mut exits = Exits::new();
    let mut deleted = 0;
    let mut next = 1;
    let mut read_until = |host: &Host, enough: &dyn Fn(&Exits, usize) -> bool| {
        runtime.block_on(async {
            let mut journal = Journal::open(host, next).await;
            while !enough(&exits, deleted) {
                // A gap is where a kill cut a write of the engine's own off; exits come again then.
                let Entry::Event(event) = journal.entry().await else { continue };
                let envelope = event.envelope.unwrap();
                if envelope.topic == "/tasks/exit" {
                    let exit = exit_of(&envelope);
                    exits.entry(exit.container_id).or_default().push(exit.exit_status);
                }
                deleted += usize::from(envelope.topic == "/tasks/delete");
            }
            next = journal.next;
        });
    };
    for round in 0..ROUNDS {
        fs::write(flags.join(round.to_string()), "").unwrap();
        // The others of the round exit around the kill.
        read_until(&host, &|exits, _| exits.len() > round * EACH);
        host.kill();
        host.start();
    }
    read_until(&host, &|exits, _| exits.len() == ROUNDS * EACH);
    for code in 1..=ROUNDS * EACH {
        ctr.run(&["tasks", "rm", &id(code)]);
        ctr.ok(&["containers", "rm", &id(code)]);
    }
    // Whatever a shim had to say of its exit is there before its delete.
    read_until(&host, &|_, deleted| deleted == ROUNDS * EACH);
    let expected: Exits = (1..=ROUNDS * EACH).map(|code| (id(code), vec![code as u32])).collect();
    assert_eq!(exits, expected);
    host.assert_nothing_left();
}

#[test]
fn who_fell_behind_the_retention_is_told_and_goes_on() {
    if !ready(&PROGRAMS) {
        return;
    }
    const COUNT: u64 = 3000;
    let host = with_retention(64 << 10);
    runtime().block_on(async {
        let mut slow = Journal::open(&host, 1).await;
        let mut publisher = publisher(&host).await;
        for _ in 0..COUNT {
            publish(&mut publisher, &host.namespace, "/test/one", 1024).await;
        }
        let now = info(&host).await;
        assert_eq!((now.next, now.retention_bytes), (COUNT + 1, 64 << 10));
        assert!(now.first > COUNT - 70 && now.bytes <= now.retention_bytes, "{now:?}");
        let files = fs::read_dir(host.root().join("events")).unwrap();
        let bytes: u64 = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert_eq!(bytes, now.bytes);
        // One that comes now, and one that was there from the beginning and did not read.
        let mut late = Journal::open(&host, 5).await;
        let Entry::Gap(gap) = late.entry().await else { panic!("{} was there", late.next) };
        assert_eq!((gap.from, gap.next), (5, now.first));
        while late.next <= COUNT {
            assert_eq!(late.event().await.topic, "/test/one");
        }
        let mut gaps = 0;
        while slow.next <= COUNT {
            gaps += usize::from(matches!(slow.entry().await, Entry::Gap(_)));
        }
        assert_eq!(gaps, 1);
        let mut oldest = Journal::open(&host, 0).await;
        oldest.next = now.first;
        oldest.event().await;
    });
}

#[test]
fn all_see_one_order() {
    if !ready(&PROGRAMS) {
        return;
    }
    const PUBLISHERS: usize = 8;
    const EACH: usize = 150;
    let host = Host::gantry();
    runtime().block_on(async {
        let live = publisher(&host).await.subscribe(LiveRequest::default()).await.unwrap();
        let mut live = live.into_inner();
        let mut tasks = Vec::new();
        for number in 0..PUBLISHERS {
            let (mut publisher, namespace) = (publisher(&host).await, host.namespace.clone());
            tasks.push(tokio::spawn(async move {
                for event in 0..EACH {
                    publish(&mut publisher, &namespace, &format!("/test/{number}/{event}"), event).await;
                }
            }));
        }
        let mut expected = Vec::new();
        for _ in 0..PUBLISHERS * EACH {
            expected.push(live.message().await.unwrap().unwrap());
        }
        let mut readers = Vec::new();
        for _ in 0..8 {
            readers.push(Journal::open(&host, 1).await);
        }
        for reader in &mut readers {
            for envelope in &expected {
                assert_eq!(reader.event().await, *envelope);
            }
        }
        // From here on they are along with what comes.
        let mut last = publisher(&host).await;
        publish(&mut last, &host.namespace, "/test/last", 4 << 20).await;
        for reader in &mut readers {
            assert_eq!(reader.event().await.topic, "/test/last");
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}

/// The memory of the engine, in KiB.
fn memory(host: &Host) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", host.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn slow_subscribers_cost_no_memory_and_stop_nobody() {
    if !ready(&PROGRAMS) {
        return;
    }
    const COUNT: u64 = 600;
    const SIZE: usize = 64 << 10;
    let host = Host::gantry();
    runtime().block_on(async {
        let mut publisher = publisher(&host).await;
        let mut quick = Journal::open(&host, 1).await;
        for _ in 0..100 {
            publish(&mut publisher, &host.namespace, "/test/one", SIZE).await;
            quick.event().await;
        }
        let before = memory(&host);
        let mut slow = Vec::new();
        for _ in 0..4 {
            slow.push(Journal::open(&host, 1).await);
        }
        for _ in 100..COUNT {
            publish(&mut publisher, &host.namespace, "/test/one", SIZE).await;
            quick.event().await;
        }
        let grown = memory(&host).saturating_sub(before);
        // Of the 32 MiB that passed, for each of the four.
        assert!(grown < 12 << 10, "{grown} KiB more");
        for journal in &mut slow {
            while journal.next <= COUNT {
                assert_eq!(journal.event().await.topic, "/test/one");
            }
        }
    });
}
