//! What `gantryd check` says of an engine that has stopped.

use harness::host::Host;

/// Stops the engine and asks whether anything is lost or has no owner; starts it again where told to.
pub(crate) fn check(host: &mut Host, start: bool) {
    host.stop();
    // With the flags of the engine, which say where all is.
    let output = host.command().arg("check").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    // Control groups are the machine's: those of the kubelet's namespace may be another engine's, beside this one.
    let others = |line: &&str| line.starts_with("leaked control group ") && line.contains("/k8s.io/");
    let found = said.lines().filter(|line| line.starts_with("lost ") || line.starts_with("leaked "));
    let ours: Vec<&str> = found.filter(|line| !others(line)).collect();
    assert!(ours.is_empty(), "gantryd check: {}", ours.join("\n"));
    let judged = said.lines().any(|line| line.contains(" lost, "));
    assert!(output.status.success() || judged, "gantryd check: {said}{complained}");
    if start {
        host.start();
    }
}
