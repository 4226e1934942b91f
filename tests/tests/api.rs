//! Methods that Debian's clients do not call, or not by themselves.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Read as _;
use std::time::Duration;

use proto::containerd::events::TaskOom;
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::content::v1::{StatusRequest, WriteAction, WriteContentRequest};
use proto::containerd::services::events::v1::events_client::EventsClient;
use proto::containerd::services::events::v1::{ForwardRequest, SubscribeRequest};
use proto::containerd::services::introspection::v1::PluginInfoRequest;
use proto::containerd::services::introspection::v1::introspection_client::IntrospectionClient;
use proto::containerd::services::leases::v1::leases_client::LeasesClient;
use proto::containerd::services::leases::v1::{
    AddResourceRequest, CreateRequest, DeleteResourceRequest, ListResourcesRequest, Resource,
};
use proto::containerd::services::snapshots::v1::CleanupRequest;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use proto::containerd::types::Envelope;
use tests::client::{channel, in_namespace};
use tests::host::{Host, RUNC, STOCK_CTR};
use tests::image::BUSYBOX;
use tests::ready;
use tonic::Code;

fn host() -> Option<Host> {
    ready(&[STOCK_CTR, RUNC, BUSYBOX]).then(Host::gantry)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// What of a program's code is mapped, in KiB.
fn code(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut lines = text.lines().skip_while(|line| !(line.contains(" r-xp ") && line.ends_with("/gantryd")));
    let size = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
    size.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn an_engine_that_nobody_calls_gives_memory_back() {
    let Some(host) = host() else { return };
    let ctr = host.stock_ctr();
    // After the start, and again after calls.
    for _ in 0..2 {
        // It may be unmapped before it is looked at, when the machine is busy: then there is another call.
        tests::wait_for("code to be unmapped after a call", || {
            ctr.ok(&["images", "ls"]);
            let busy = code(host.pid());
            tests::holds_within(Duration::from_secs(10), || code(host.pid()) < busy / 2)
        });
    }
}

#[test]
fn what_a_lease_holds() {
    let Some(host) = host() else { return };
    let namespace = host.namespace.clone();
    block_on(async {
        let mut leases = LeasesClient::new(channel(&host.address()).await);
        let create = CreateRequest { id: "l".into(), ..CreateRequest::default() };
        leases.create(in_namespace(&namespace, create)).await.unwrap();
        let resource = |kind: &str, id: &str| Some(Resource { id: id.into(), r#type: kind.into() });
        for (kind, id) in [("content", "sha256:ab"), ("snapshots/overlayfs", "key"), ("ingests", "ref")] {
            let add = AddResourceRequest { id: "l".into(), resource: resource(kind, id) };
            leases.add_resource(in_namespace(&namespace, add)).await.unwrap();
        }
        for (lease, kind, code) in
            [("l", "nonsense", Code::InvalidArgument), ("none", "content", Code::NotFound)]
        {
            let add = AddResourceRequest { id: lease.into(), resource: resource(kind, "x") };
            assert_eq!(leases.add_resource(in_namespace(&namespace, add)).await.unwrap_err().code(), code);
        }
        let remove = DeleteResourceRequest { id: "l".into(), resource: resource("ingests", "ref") };
        leases.delete_resource(in_namespace(&namespace, remove)).await.unwrap();
        let list = ListResourcesRequest { id: "l".into() };
        let list =
            leases.list_resources(in_namespace(&namespace, list)).await.unwrap().into_inner().resources;
        let list: Vec<_> = list.iter().map(|held| (held.r#type.as_str(), held.id.as_str())).collect();
        assert_eq!(list, [("content", "sha256:ab"), ("snapshots/overlayfs", "key")]);
        let list = ListResourcesRequest { id: "none".into() };
        let refused = leases.list_resources(in_namespace(&namespace, list)).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound);
    });
}

#[test]
fn an_ingest_is_resumed_where_it_was_left() {
    let Some(host) = host() else { return };
    let namespace = host.namespace.clone();
    block_on(async {
        let mut content = ContentClient::new(channel(&host.address()).await);
        let write = |offset: i64, data: &'static [u8], action: WriteAction| WriteContentRequest {
            action: action.into(),
            r#ref: "half".into(),
            total: 10,
            offset,
            data: data.into(),
            ..WriteContentRequest::default()
        };
        let first = futures::stream::iter([write(0, b"hello", WriteAction::Write)]);
        let mut answers = content.write(in_namespace(&namespace, first)).await.unwrap().into_inner();
        while let Some(answer) = answers.message().await.unwrap() {
            assert_eq!(answer.offset, 5);
        }
        let status = StatusRequest { r#ref: "half".into() };
        let status =
            content.status(in_namespace(&namespace, status)).await.unwrap().into_inner().status.unwrap();
        assert_eq!((status.r#ref.as_str(), status.offset, status.total), ("half", 5, 10));
        let wrong = futures::stream::iter([write(3, b"lo", WriteAction::Write)]);
        let mut answers = content.write(in_namespace(&namespace, wrong)).await.unwrap().into_inner();
        assert_eq!(answers.message().await.unwrap_err().code(), Code::OutOfRange);
        let rest = futures::stream::iter([write(5, b"world", WriteAction::Commit)]);
        let mut answers = content.write(in_namespace(&namespace, rest)).await.unwrap().into_inner();
        let mut digest = String::new();
        while let Some(answer) = answers.message().await.unwrap() {
            digest = answer.digest;
        }
        assert_eq!(digest, oci::Digest::sha256_of(b"helloworld").to_string());
        let gone = StatusRequest { r#ref: "half".into() };
        let refused = content.status(in_namespace(&namespace, gone)).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound);
    });
}

#[test]
fn the_difference_of_a_container_is_a_layer() {
    let Some(host) = host() else { return };
    let image = host.import();
    let ctr = host.stock_ctr();
    ctr.ok(&["run", image, "c", "sh", "-c", "echo made >/made; rm /bin/vi || rm /bin/ls"]);
    let layer = ctr.command(&["snapshots", "diff", "c"]).output().unwrap();
    assert!(layer.status.success(), "{}", String::from_utf8_lossy(&layer.stderr));
    let mut archive = tar::Archive::new(flate2::read::MultiGzDecoder::new(&layer.stdout[..]));
    let mut seen = std::collections::BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_string_lossy().into_owned();
        let mut text = String::new();
        let _ = entry.read_to_string(&mut text);
        seen.insert(path, text);
    }
    assert_eq!(seen.get("made").map(String::as_str), Some("made\n"), "{:?}", seen.keys());
    assert!(seen.keys().any(|path| path.starts_with("bin/.wh.")), "{:?}", seen.keys());
    ctr.ok(&["containers", "rm", "c"]);
}

#[test]
fn plugins_events_and_clean_ups() {
    let Some(host) = host() else { return };
    let namespace = host.namespace.clone();
    block_on(async {
        let channel = channel(&host.address()).await;
        let mut introspection = IntrospectionClient::new(channel.clone());
        let ask = |id: &str| PluginInfoRequest {
            r#type: "io.containerd.snapshotter.v1".into(),
            id: id.into(),
            options: None,
        };
        let plugin = introspection.plugin_info(ask("overlayfs")).await.unwrap().into_inner().plugin.unwrap();
        assert!(plugin.exports["root"].ends_with("io.containerd.snapshotter.v1.overlayfs"));
        assert_eq!(introspection.plugin_info(ask("none")).await.unwrap_err().code(), Code::NotFound);

        let mut snapshots = SnapshotsClient::new(channel.clone());
        let clean = |name: &str| in_namespace(&namespace, CleanupRequest { snapshotter: name.into() });
        snapshots.cleanup(clean("overlayfs")).await.unwrap();
        assert_eq!(snapshots.cleanup(clean("none")).await.unwrap_err().code(), Code::InvalidArgument);

        let mut events = EventsClient::new(channel);
        let filters = vec![r#"topic=="/test/forwarded""#.to_owned()];
        let mut heard = events.subscribe(SubscribeRequest { filters }).await.unwrap().into_inner();
        let envelope = Envelope {
            timestamp: Some(std::time::SystemTime::now().into()),
            namespace: "another".into(),
            topic: "/test/forwarded".into(),
            event: Some(proto::any::pack(&TaskOom { container_id: "c".into() })),
        };
        for incomplete in [
            Envelope { timestamp: None, ..envelope.clone() },
            Envelope { namespace: String::new(), ..envelope.clone() },
        ] {
            let refused = events.forward(ForwardRequest { envelope: Some(incomplete) }).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument);
        }
        events.forward(ForwardRequest { envelope: Some(envelope.clone()) }).await.unwrap();
        assert_eq!(heard.message().await.unwrap().unwrap(), envelope);
    });
}
