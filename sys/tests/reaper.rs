//! The reaper takes every child of its process, so its test has a process of its own.

use std::path::Path;
use std::process::Command;

use sys::reaper::Reaper;

#[tokio::test]
async fn exits_reach_whoever_claims_them() {
    let reaper = Reaper::start().unwrap();
    let (pid, exit) = reaper.spawn(Command::new("sh").args(["-c", "exit 7"])).unwrap();
    let exit = exit.await.unwrap();
    assert_eq!((exit.pid, exit.status), (pid, 7));
    // A realtime signal, which most libraries have no name for.
    let (_, exit) = reaper.spawn(Command::new("sh").args(["-c", "kill -34 $$"])).unwrap();
    assert_eq!(exit.await.unwrap().status, 128 + 34);
    assert!(reaper.spawn(&mut Command::new("/nonexistent/program")).is_err());

    // A process of unknown pid that exits before it is claimed.
    let expectation = reaper.expect();
    let unclaimed = Command::new("sh").args(["-c", "exit 3"]).spawn().unwrap().id();
    while Path::new(&format!("/proc/{unclaimed}")).exists() {
        tokio::task::yield_now().await;
    }
    assert_eq!(reaper.claim(unclaimed).await.unwrap().status, 3);
    drop(expectation);
}
