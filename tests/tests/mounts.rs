//! Mounts that the engine keeps for clients: loop devices, formatted images, stacks for an overlay; kept over a kill of the
//! engine, and collected when nothing holds them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;

use proto::containerd::services::leases::v1::leases_client::LeasesClient;
use proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};
use proto::containerd::services::mounts::v1::mounts_client::MountsClient;
use proto::containerd::services::mounts::v1::{
    ActivateRequest, DeactivateRequest, InfoRequest, ListRequest, UpdateRequest,
};
use proto::containerd::types::{ActivationInfo, Mount};
use tests::client::{channel, in_namespace};
use tests::host::Host;
use tests::{left, ready};
use tonic::transport::Channel;
use tonic::{Code, Status};

const MKFS: &str = "/sbin/mkfs.ext4";

fn host() -> Option<Host> {
    ready(&[MKFS, "/dev/loop-control"]).then(Host::gantry)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

struct Client {
    channel: Channel,
    namespace: String,
}

impl Client {
    async fn of(host: &Host) -> Self {
        Client { channel: channel(&host.address()).await, namespace: host.namespace.clone() }
    }

    fn mounts(&self) -> MountsClient<Channel> {
        MountsClient::new(self.channel.clone())
    }

    async fn activate(
        &self,
        request: ActivateRequest,
        lease: Option<&str>,
    ) -> Result<ActivationInfo, Status> {
        let mut request = in_namespace(&self.namespace, request);
        if let Some(lease) = lease {
            request.metadata_mut().insert("containerd-lease", lease.parse().unwrap());
        }
        Ok(self.mounts().activate(request).await?.into_inner().info.unwrap())
    }

    async fn deactivate(&self, name: &str) -> Result<(), Status> {
        let request = in_namespace(&self.namespace, DeactivateRequest { name: name.into() });
        self.mounts().deactivate(request).await.map(|_| ())
    }

    async fn info(&self, name: &str) -> Result<ActivationInfo, Status> {
        let request = in_namespace(&self.namespace, InfoRequest { name: name.into() });
        Ok(self.mounts().info(request).await?.into_inner().info.unwrap())
    }

    async fn names(&self, filter: &str) -> Vec<String> {
        let request = in_namespace(&self.namespace, ListRequest { filters: vec![filter.into()] });
        let mut stream = self.mounts().list(request).await.unwrap().into_inner();
        let mut names = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            names.push(message.info.unwrap().name);
        }
        names
    }
}

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        r#type: kind.into(),
        source: source.into(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn activation(name: &str, mounts: Vec<Mount>) -> ActivateRequest {
    ActivateRequest { name: name.into(), mounts, ..ActivateRequest::default() }
}

/// The loop devices whose files lie in this folder.
fn loops(folder: &Path) -> Vec<String> {
    let devices = std::fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    let files = devices.filter_map(|device| std::fs::read_to_string(device.join("loop/backing_file")).ok());
    files.filter(|file| Path::new(file.trim()).starts_with(folder)).collect()
}

/// What the test mounts itself, as a client would.
fn mounted<T>(mounts: &[Mount], at: &Path, look: impl FnOnce(&Path) -> T) -> T {
    std::fs::create_dir_all(at).unwrap();
    for mount in mounts {
        let mut command = std::process::Command::new("mount");
        match mount.r#type.as_str() {
            "bind" => command.arg("--rbind"),
            kind => command.args(["-t", kind]),
        };
        if mount.r#type != "bind" && !mount.options.is_empty() {
            command.args(["-o", &mount.options.join(",")]);
        }
        assert!(command.arg(&mount.source).arg(at).status().unwrap().success(), "{mount:?}");
    }
    let seen = look(at);
    for _ in mounts {
        assert!(std::process::Command::new("umount").arg(at).status().unwrap().success());
    }
    seen
}

#[test]
fn an_image_file_is_made_attached_and_let_go() {
    let Some(mut host) = host() else { return };
    let image = host.root().join("disk.img").display().to_string();
    let mounts = vec![
        mount("mkfs/loop", &image, &["X-containerd.mkfs.size=16m", "X-containerd.mkfs.fs=ext4"]),
        mount("format/ext4", "{{ mount 0 }}", &[]),
    ];
    block_on(async {
        let client = Client::of(&host).await;
        let labels = BTreeMap::from([("containerd.io/gc.root".to_owned(), "x".to_owned())]);
        let request = ActivateRequest { labels, ..activation("disk", mounts.clone()) };
        let info = client.activate(request.clone(), None).await.unwrap();
        assert_eq!((info.active.len(), info.system.len()), (1, 1));
        assert_eq!(loops(host.folder()).len(), 1);
        mounted(&info.system, &host.folder().join("mnt"), |at| {
            std::fs::write(at.join("kept"), "data").unwrap();
        });
        assert_eq!(client.activate(request, None).await.unwrap_err().code(), Code::AlreadyExists);
        assert_eq!(client.info("disk").await.unwrap(), info);
    });
    // The device outlives the engine.
    host.kill();
    host.start();
    block_on(async {
        let client = Client::of(&host).await;
        let info = client.info("disk").await.unwrap();
        let kept =
            mounted(&info.system, &host.folder().join("mnt"), |at| std::fs::read(at.join("kept")).unwrap());
        assert_eq!(kept, b"data");
        client.deactivate("disk").await.unwrap();
        assert_eq!(loops(host.folder()), Vec::<String>::new());
        assert_eq!(client.deactivate("disk").await.unwrap_err().code(), Code::NotFound);
        // Activated again, the image is the same, and not made anew.
        let labels = BTreeMap::from([("containerd.io/gc.root".to_owned(), "x".to_owned())]);
        let request = ActivateRequest { labels, temporary: true, ..activation("again", mounts) };
        let info = client.activate(request, None).await.unwrap();
        assert_eq!((info.active.len(), info.system[0].r#type.as_str()), (2, "bind"));
        assert_eq!(std::fs::read(Path::new(&info.system[0].source).join("kept")).unwrap(), b"data");
        client.deactivate("again").await.unwrap();
    });
    assert_eq!((loops(host.folder()), left::mounts(&host.state())), (Vec::new(), Vec::new()));
}

#[test]
fn layers_are_mounted_for_an_overlay() {
    let Some(host) = host() else { return };
    for layer in ["a", "b"] {
        std::fs::create_dir(host.folder().join(layer)).unwrap();
        std::fs::write(host.folder().join(layer).join(layer), layer).unwrap();
    }
    let root = host.root().display().to_string();
    let layer = |name: &str| mount("bind", &host.folder().join(name).display().to_string(), &["bind", "ro"]);
    let mkdir = |name: &str| format!("X-containerd.mkdir.path={root}/{name}:0755");
    let overlay = mount(
        "format/mkdir/overlay",
        "overlay",
        &[
            &mkdir("upper"),
            &mkdir("work"),
            &format!("upperdir={root}/upper"),
            &format!("workdir={root}/work"),
            "lowerdir={{ overlay 0 1 }}",
        ],
    );
    block_on(async {
        let client = Client::of(&host).await;
        let labels = BTreeMap::from([("containerd.io/gc.root".to_owned(), "x".to_owned())]);
        let request =
            ActivateRequest { labels, ..activation("stack", vec![layer("a"), layer("b"), overlay]) };
        let info = client.activate(request, None).await.unwrap();
        assert_eq!(info.active.len(), 2);
        mounted(&info.system, &host.folder().join("mnt"), |at| {
            assert_eq!(
                (std::fs::read(at.join("a")).unwrap(), std::fs::read(at.join("b")).unwrap()),
                (b"a".into(), b"b".into())
            );
            std::fs::write(at.join("new"), "").unwrap();
        });
        assert!(host.root().join("upper/new").exists());
        client.deactivate("stack").await.unwrap();
    });
    assert_eq!(left::mounts(&host.state()), Vec::<String>::new());
}

#[test]
fn what_fails_leaves_nothing_and_what_needs_nothing_is_said() {
    let Some(host) = host() else { return };
    let missing = host.folder().join("missing").display().to_string();
    block_on(async {
        let client = Client::of(&host).await;
        let tmpfs = || mount("tmpfs", "tmpfs", &[]);
        for (mounts, temporary, code) in [
            (vec![], false, Code::Unimplemented),
            (vec![mount("overlay", "overlay", &["lowerdir=/a:/b"])], false, Code::Unimplemented),
            (vec![tmpfs(), mount("bind", &missing, &["bind"])], true, Code::NotFound),
            (vec![tmpfs(), mount("loop", &missing, &[])], false, Code::NotFound),
            (vec![tmpfs(), mount("format/bind", "{{ mount 7 }}", &[])], false, Code::InvalidArgument),
            (
                vec![tmpfs(), mount("mkdir/bind", "x", &["X-containerd.mkdir.path=/x"])],
                false,
                Code::InvalidArgument,
            ),
            (
                vec![tmpfs(), mount("mkfs/loop", "/x", &["X-containerd.mkfs.size=1m"])],
                false,
                Code::InvalidArgument,
            ),
        ] {
            let request = ActivateRequest { temporary, ..activation("m", mounts.clone()) };
            let error = client.activate(request, None).await.unwrap_err();
            assert_eq!(error.code(), code, "{mounts:?}: {error}");
            assert_eq!(client.info("m").await.unwrap_err().code(), Code::NotFound);
        }
        assert_eq!(
            client.activate(activation("", vec![]), None).await.unwrap_err().code(),
            Code::InvalidArgument
        );
        assert_eq!(client.names("").await, Vec::<String>::new());
    });
    assert_eq!((loops(host.folder()), left::mounts(&host.state())), (Vec::new(), Vec::new()));
}

#[test]
fn what_nothing_holds_is_collected() {
    let Some(host) = host() else { return };
    block_on(async {
        let client = Client::of(&host).await;
        let mut leases = LeasesClient::new(client.channel.clone());
        let create = CreateRequest { id: "l".into(), ..CreateRequest::default() };
        leases.create(in_namespace(&client.namespace, create)).await.unwrap();
        let request = || {
            let tmpfs = mount("tmpfs", "tmpfs", &[]);
            ActivateRequest { temporary: true, ..activation("held", vec![tmpfs]) }
        };
        client.activate(request(), Some("l")).await.unwrap();
        host.ctr().ok(&["gc"]);
        assert_eq!(client.names("name==held").await, ["held"]);
        let explained = host.ctr().ok(&["gc", "--explain", "held"]);
        assert!(explained.contains("lease") && explained.contains("mount"), "{explained}");

        let info = ActivationInfo {
            name: "held".into(),
            labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
            ..ActivationInfo::default()
        };
        let update = UpdateRequest { info: Some(info), update_mask: None };
        client.mounts().update(in_namespace(&client.namespace, update)).await.unwrap();
        assert_eq!(
            (client.names("labels.a==b").await.len(), client.names("labels.a==c").await.len()),
            (1, 0)
        );

        let delete = DeleteRequest { id: "l".into(), sync: true };
        leases.delete(in_namespace(&client.namespace, delete)).await.unwrap();
        assert_eq!(client.names("").await, Vec::<String>::new());
        assert_eq!(left::mounts(&host.state()), Vec::<String>::new());
    });
}
