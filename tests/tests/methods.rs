//! Every method of the API that we describe answers, or this file says why it does not.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::time::Duration;

use prost::Message as _;
use prost_types::FileDescriptorSet;
use tests::client::{Raw, channel, in_namespace};
use tests::host::{Host, RUNC};
use tests::ready;
use tonic::Code;

/// The services that do not answer, and why.
const ABSENT: [(&str, &str); 2] = [
    ("runtime.v1.RuntimeService/CheckpointPod", "newer than Kubernetes 1.36"),
    ("runtime.v1.RuntimeService/RestorePod", "newer than Kubernetes 1.36"),
];
/// Served by shims and for them over ttrpc, and not by the engine over gRPC.
const TTRPC: [&str; 5] = [
    "containerd.task.v2.Task",
    "containerd.task.v3.Task",
    "containerd.runtime.sandbox.v1.Sandbox",
    "containerd.services.events.ttrpc.v1.Events",
    "containerd.task.v1.Shim",
];

/// The code that an empty message gets; Ok for a stream that stays open.
async fn code_of(host: &Host, method: &str) -> Code {
    let mut client = tonic::client::Grpc::new(channel(&host.address()).await);
    client.ready().await.unwrap();
    let path = format!("/{method}").parse().unwrap();
    let request = in_namespace(&host.namespace, futures::stream::iter([Vec::new()]));
    let answer = tokio::time::timeout(Duration::from_secs(2), async {
        let mut stream = client.streaming(request, path, Raw).await?.into_inner();
        stream.message().await
    });
    match answer.await {
        Ok(Ok(_)) | Err(_) => Code::Ok,
        Ok(Err(status)) => status.code(),
    }
}

#[test]
fn every_method_answers_or_is_listed() {
    if !ready(&[RUNC]) {
        return;
    }
    let host = Host::gantry();
    let described = FileDescriptorSet::decode(proto::FILE_DESCRIPTOR_SET).unwrap();
    let mut methods = Vec::new();
    for file in &described.file {
        for service in &file.service {
            let name = format!("{}.{}", file.package(), service.name());
            if !TTRPC.contains(&name.as_str()) {
                methods.extend(service.method.iter().map(|method| (name.clone(), method.name().to_owned())));
            }
        }
    }
    assert!(methods.len() > 100, "{methods:?}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut silent, mut answered) = (BTreeSet::new(), BTreeSet::new());
    for (service, method) in &methods {
        let full = format!("{service}/{method}");
        match runtime.block_on(code_of(&host, &full)) {
            Code::Unimplemented => silent.insert((service.clone(), full)),
            _ => answered.insert((service.clone(), full)),
        };
    }
    let listed =
        |(service, full): &&(String, String)| ABSENT.iter().any(|(name, _)| name == service || name == full);
    let unlisted: Vec<_> = silent.iter().filter(|method| !listed(method)).collect();
    assert!(unlisted.is_empty(), "these do not answer, and nothing says why: {unlisted:?}");
    let outdated: Vec<_> = answered.iter().filter(listed).collect();
    assert!(outdated.is_empty(), "these answer, and are listed as absent: {outdated:?}");
    for (name, why) in ABSENT {
        println!("absent: {name}: {why}");
    }
    println!("{} methods answer", answered.len());
}
