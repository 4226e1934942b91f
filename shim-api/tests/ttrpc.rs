//! The transport and the publisher over real sockets.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use proto::containerd::events::TaskStart;
use proto::containerd::task::v3::{ConnectRequest, ConnectResponse, WaitRequest, WaitResponse};
use proto::containerd::types::Envelope;
use shim_api::events::EventsService;
use shim_api::publisher::{Publisher, TtrpcRoute};
use shim_api::transport::{Connection, OnHangUp, Server, Services};
use shim_api::{Code, Error};
use tokio::net::UnixListener;
use tokio::sync::Notify;

const SERVICE: &str = "test.Service";
const LIMIT: Duration = Duration::from_secs(10);

/// Counts the handlers that are no more, for whatever reason.
struct Ended(Arc<AtomicUsize>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct World {
    folder: tempfile::TempDir,
    release: Arc<Notify>,
    finished: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
    server: Server,
}

impl World {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (release, finished, ended) = <(Arc<Notify>, Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let mut services = Services::new();
        services.method(SERVICE, "Echo", OnHangUp::Finish, |request: ConnectRequest| async move {
            Ok(ConnectResponse { version: request.id, ..Default::default() })
        });
        services.method(SERVICE, "Panic", OnHangUp::Finish, |_: ConnectRequest| async move {
            if true {
                panic!("on purpose");
            }
            Ok(ConnectResponse::default())
        });
        for (name, on_hang_up) in [("Wait", OnHangUp::Drop), ("Change", OnHangUp::Finish)] {
            let (release, finished, ended) = (release.clone(), finished.clone(), ended.clone());
            services.method(SERVICE, name, on_hang_up, move |_: WaitRequest| {
                let (release, finished, ended) = (release.clone(), finished.clone(), Ended(ended.clone()));
                async move {
                    let _ended = ended;
                    release.notified().await;
                    finished.fetch_add(1, Ordering::SeqCst);
                    Ok(WaitResponse { exit_status: 3, exited_at: None })
                }
            });
        }
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let server = services.serve(listener).await.unwrap();
        Self { folder, release, finished, ended, server }
    }

    async fn connect(&self) -> Connection {
        let address = format!("unix://{}", self.folder.path().join("s").display());
        Connection::connect(&address).await.unwrap()
    }
}

async fn echo(connection: &Connection, text: &str) -> shim_api::Result<String> {
    let request = ConnectRequest { id: text.to_owned() };
    let answer: ConnectResponse = connection.call(SERVICE, "Echo", &request, Some(LIMIT)).await?;
    Ok(answer.version)
}

async fn wait(connection: Connection, method: &'static str) -> shim_api::Result<WaitResponse> {
    connection.call(SERVICE, method, &WaitRequest::default(), None).await
}

#[tokio::test]
async fn a_wait_holds_up_nothing_and_a_panic_is_an_answer() {
    let world = World::start().await;
    let connection = world.connect().await;
    let waiting = tokio::spawn(wait(connection.clone(), "Wait"));
    for n in 0..100 {
        assert_eq!(echo(&connection, &n.to_string()).await.unwrap(), n.to_string());
    }
    let panicked = connection
        .call::<_, ConnectResponse>(SERVICE, "Panic", &ConnectRequest::default(), Some(LIMIT))
        .await
        .unwrap_err();
    assert_eq!(panicked.code, Code::Internal);
    assert!(!waiting.is_finished());
    world.release.notify_waiters();
    assert_eq!(waiting.await.unwrap().unwrap().exit_status, 3);
    let late = connection
        .call::<_, WaitResponse>(SERVICE, "Wait", &WaitRequest::default(), Some(Duration::from_millis(20)))
        .await
        .unwrap_err();
    assert_eq!(late.code, Code::DeadlineExceeded);
}

#[tokio::test]
async fn four_mebibytes_and_no_more() {
    let world = World::start().await;
    let connection = world.connect().await;
    let long = "x".repeat((4 << 20) - 8192);
    assert_eq!(echo(&connection, &long).await.unwrap().len(), long.len());
    let longer = "x".repeat(5 << 20);
    assert_eq!(echo(&connection, &longer).await.unwrap_err().code, Code::ResourceExhausted);
    assert_eq!(echo(&connection, "short").await.unwrap(), "short");
}

#[tokio::test]
async fn a_change_goes_on_when_its_caller_hangs_up_and_a_wait_does_not() {
    let world = World::start().await;
    let connection = world.connect().await;
    let calls =
        [tokio::spawn(wait(connection.clone(), "Change")), tokio::spawn(wait(connection.clone(), "Wait"))];
    // Both handlers run when a call behind them is answered.
    echo(&connection, "both are there").await.unwrap();
    for call in calls {
        call.abort();
        let _ = call.await;
    }
    drop(connection);
    let until = |counter: Arc<AtomicUsize>, count| async move {
        while counter.load(Ordering::SeqCst) < count {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, until(world.ended.clone(), 1)).await.expect("the wait goes on for nobody");
    world.release.notify_waiters();
    tokio::time::timeout(LIMIT, until(world.finished.clone(), 1)).await.expect("the change was dropped");
    assert_eq!((world.ended.load(Ordering::SeqCst), world.finished.load(Ordering::SeqCst)), (2, 1));
    assert_eq!(echo(&world.connect().await, "the server lives").await.unwrap(), "the server lives");
}

#[tokio::test]
async fn the_end_of_a_connection_is_known_and_ends_its_calls() {
    let world = World::start().await;
    let connection = world.connect().await;
    let waiting = tokio::spawn(wait(connection.clone(), "Wait"));
    echo(&connection, "the wait is there").await.unwrap();
    assert!(!connection.is_closed());
    let stopping = tokio::spawn(world.server.stop());
    tokio::time::timeout(LIMIT, connection.closed()).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap_err().code, Code::Unavailable);
    assert_eq!(echo(&connection, "x").await.unwrap_err().code, Code::Closed);
    stopping.await.unwrap();
    assert_eq!(Connection::connect("unix:///nonexistent").await.err().unwrap().code, Code::Refused);
    assert_eq!(Connection::connect("unix://@abstract").await.err().unwrap().code, Code::InvalidArgument);
}

#[derive(Default)]
struct Inbox {
    seen: Mutex<Vec<u32>>,
    refuse: AtomicUsize,
}

#[async_trait]
impl EventsService for Inbox {
    async fn forward(&self, envelope: Envelope) -> shim_api::Result<()> {
        if self.refuse.load(Ordering::SeqCst) > 0 {
            self.refuse.fetch_sub(1, Ordering::SeqCst);
            return Err(Error::unavailable("not now"));
        }
        let event: TaskStart = proto::any::unpack(&envelope.event.unwrap()).unwrap();
        if event.container_id == "bad" {
            return Err(Error::invalid_argument("I do not like it"));
        }
        self.seen.lock().unwrap().push(event.pid);
        Ok(())
    }
}

#[tokio::test]
async fn events_keep_their_order_over_absences_and_refusals() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("engine.ttrpc");
    let publisher = Publisher::start("ns", Box::new(TtrpcRoute::new(path.to_str().unwrap())));
    let publish =
        |pid, id: &str| publisher.publish("/tasks/start", &TaskStart { container_id: id.into(), pid });
    for pid in 0..50 {
        publish(pid, "good");
    }
    let inbox = Arc::new(Inbox::default());
    inbox.refuse.store(2, Ordering::SeqCst);
    let serve = || {
        let _ = std::fs::remove_file(&path);
        let mut services = Services::new();
        shim_api::events::register(&mut services, &inbox);
        services.serve(UnixListener::bind(&path).unwrap())
    };
    let server = serve().await.unwrap();
    assert_eq!(publisher.drain(LIMIT).await, 0);
    server.stop().await;
    publish(50, "good");
    publish(999, "bad");
    publish(51, "good");
    assert_eq!(publisher.drain(Duration::from_millis(20)).await, 3);
    let server = serve().await.unwrap();
    assert_eq!(publisher.drain(LIMIT).await, 0);
    server.stop().await;
    assert_eq!(*inbox.seen.lock().unwrap(), (0..52).collect::<Vec<_>>());
}
