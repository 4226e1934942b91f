//! Hooks that the machine's owner adds, with the real runtime.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};
use tests::host::{Host, Kind, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, NAME};
use tests::ready;

#[test]
fn hooks_of_folders_run_and_fail_with_containers() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut host = Host::new(Kind::Gantry);
    let (first, second) = (host.folder().join("hooks.d"), host.folder().join("more.d"));
    let marks = host.folder().join("marks");
    for folder in [&first, &second, &marks] {
        fs::create_dir(folder).unwrap();
    }
    // Leaves what the runtime tells it of the container.
    let program = host.folder().join("hook");
    fs::write(&program, format!("#!/bin/sh\ncat > {}/$1\n", marks.display())).unwrap();
    let refusing = host.folder().join("refusing");
    fs::write(&refusing, "#!/bin/sh\necho this machine is closed >&2\nexit 3\n").unwrap();
    for file in [&program, &refusing] {
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let write = |folder: &std::path::Path, name: &str, hook: Value, when: Value, stages: &[&str]| {
        let file = json!({"version": "1.0.0", "hook": hook, "when": when, "stages": stages});
        fs::write(folder.join(name), file.to_string()).unwrap();
    };
    let stages = ["prestart", "createRuntime", "poststart", "poststop"];
    for stage in stages {
        let hook = json!({"path": program, "args": ["hook", stage]});
        write(&first, &format!("{stage}.json"), hook, json!({"commands": ["^echo$"]}), &[stage]);
    }
    // The later folder's counts.
    let hook = json!({"path": refusing});
    write(&first, "same.json", hook.clone(), json!({"always": true}), &["createRuntime"]);
    write(&second, "same.json", hook.clone(), json!({"commands": ["^false$"]}), &["createRuntime"]);
    fs::write(second.join("bad.json"), "{ \"version\": \"1.0.0\" }").unwrap();

    let config = host.folder().join("config.toml");
    let text = format!(
        "version = 3\n[plugins.'io.gantry.hooks.v1']\ndirs = ['{}', '{}']\n",
        first.display(),
        second.display()
    );
    fs::write(&config, &text).unwrap();
    host.arguments = vec!["--config".into(), config.display().to_string()];
    host.start();
    let stock = host.stock_ctr();
    let archive = host.folder().join("busybox.tar");
    image::busybox().write(&archive).unwrap();
    stock.ok(&["images", "import", archive.to_str().unwrap()]);

    stock.ok(&["containers", "create", NAME, "c", "echo", "x"]);
    let before = stock.ok(&["containers", "info", "c"]);
    // In the foreground, which deletes the task, too.
    assert_eq!(stock.ok(&["tasks", "start", "c"]), "x\n");
    for stage in stages {
        let state: Value = serde_json::from_slice(&fs::read(marks.join(stage)).unwrap()).unwrap();
        assert_eq!(state["id"], "c", "{stage}: {state}");
    }
    // What the client stored is as the client stored it.
    let spec = |info: &str| serde_json::from_str::<Value>(info).unwrap()["Spec"].clone();
    let after = stock.ok(&["containers", "info", "c"]);
    assert_eq!(spec(&after), spec(&before));
    assert!(spec(&after)["hooks"].is_null());
    stock.ok(&["containers", "rm", "c"]);
    let log = host.log();
    assert_eq!(log.matches("bad.json").count(), 1, "{log}");

    // One that refuses: the create fails in its words, and nothing is left of it.
    stock.ok(&["containers", "create", NAME, "d", "false"]);
    let refused = stock.fails(&["tasks", "start", "d"]);
    assert!(refused.contains("hook #0") && refused.contains("this machine is closed"), "{refused}");
    assert_eq!(stock.ok(&["tasks", "ls", "-q"]), "");
    let bundles = host.state().join("io.containerd.runtime.v2.task").join(&host.namespace);
    assert_eq!(fs::read_dir(bundles).map_or(0, Iterator::count), 0);
    assert_eq!(host.left().iter().filter(|line| !line.contains("gantryd")).count(), 0, "{:?}", host.left());
    // Files are looked at anew for each container.
    fs::remove_file(second.join("same.json")).unwrap();
    fs::remove_file(first.join("same.json")).unwrap();
    assert_eq!(stock.run(&["tasks", "start", "d"]).code, 1);

    // Where all are required, a bad one keeps containers from starting.
    fs::write(&config, format!("{text}required = true\n")).unwrap();
    host.stop();
    host.start();
    let required = stock.fails(&["tasks", "start", "d"]);
    assert!(required.contains("bad.json"), "{required}");
    fs::remove_file(second.join("bad.json")).unwrap();
    assert_eq!(stock.run(&["tasks", "start", "d"]).code, 1);
    stock.ok(&["containers", "rm", "d"]);
    host.assert_nothing_left();
}
