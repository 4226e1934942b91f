//! What peers on the other side of the wire rely on: service and method names, and the bytes of a few messages
//! worked out by hand from the field numbers.

use std::collections::BTreeMap;

use prost::{Message, Name};
use prost_types::{FileDescriptorSet, Timestamp};
use proto::containerd::events::TaskExit;
use proto::containerd::runc::v1::Options;
use proto::containerd::runtime::bootstrap::v1::{BootstrapParams, BootstrapResult, LogLevel};
use proto::containerd::services::content::v1::{ReadContentResponse, WriteAction, WriteContentRequest};
use proto::containerd::services::events::v1::events_server;
use proto::containerd::services::images::v1::{DeleteImageRequest, ImageCreate};
use proto::containerd::task;
use proto::containerd::types::Mount;
use proto::io::containerd::cgroups;

/// All services of packages `containerd.*`, and our own. A trailing `>` marks a stream of answers, a leading one of requests.
const SERVICES: [(&str, &str); 24] = [
    ("containerd.runtime.sandbox.v1.Sandbox", SHIM_SANDBOX),
    ("containerd.services.containers.v1.Containers", "Get List ListStream> Create Update Delete"),
    (
        "containerd.services.content.v1.Content",
        "Info Update List> Delete Read> Status ListStatuses >Write> Abort",
    ),
    ("containerd.services.diff.v1.Diff", "Apply Diff"),
    ("containerd.services.events.ttrpc.v1.Events", "Forward"),
    ("containerd.services.events.v1.Events", "Publish Forward Subscribe>"),
    ("containerd.services.images.v1.Images", "Get List Create Update Delete"),
    ("containerd.services.introspection.v1.Introspection", "Plugins Server PluginInfo"),
    ("containerd.services.leases.v1.Leases", "Create Delete List AddResource DeleteResource ListResources"),
    ("containerd.services.mounts.v1.Mounts", "Activate Deactivate Info Update List>"),
    ("containerd.services.namespaces.v1.Namespaces", "Get List Create Update Delete"),
    (
        "containerd.services.sandbox.v1.Controller",
        "Create Start Platform Stop Wait Status Shutdown Metrics Update",
    ),
    ("containerd.services.sandbox.v1.Store", "Create Update Delete List Get"),
    (
        "containerd.services.snapshots.v1.Snapshots",
        "Prepare View Mounts Commit Remove Stat Update List> Usage Cleanup",
    ),
    ("containerd.services.streaming.v1.Streaming", ">Stream>"),
    (
        "containerd.services.tasks.v1.Tasks",
        "Create Start Delete DeleteProcess Get List Kill Exec ResizePty CloseIO Pause Resume ListPids \
         Checkpoint Update Metrics Wait",
    ),
    ("containerd.services.transfer.v1.Transfer", "Transfer"),
    ("containerd.services.version.v1.Version", "Version"),
    ("containerd.task.v2.Task", SHIM_TASK),
    ("containerd.task.v3.Task", SHIM_TASK),
    ("gantry.events.v1.Events", "Subscribe> Info"),
    ("gantry.gc.v1.GC", "Collect Explain"),
    ("gantry.images.v1.Images", "Verify> Convert> Usage DiskUsage Prune DropLayers"),
    ("gantry.registry.v1.Registry", "Fetch> Push"),
];

const SHIM_TASK: &str = "State Create Start Delete Pids Pause Resume Checkpoint Kill Exec ResizePty CloseIO Update \
                         Wait Stats Connect Shutdown";

const SHIM_SANDBOX: &str = "CreateSandbox StartSandbox Platform StopSandbox WaitSandbox SandboxStatus \
                            PingSandbox ShutdownSandbox SandboxMetrics";

fn descriptors() -> FileDescriptorSet {
    FileDescriptorSet::decode(proto::FILE_DESCRIPTOR_SET).expect("written by build.rs")
}

#[test]
fn every_service_and_method_is_there() {
    let mut found = BTreeMap::new();
    for file in descriptors().file {
        for service in &file.service {
            let name = format!("{}.{}", file.package(), service.name());
            let methods: Vec<String> = service
                .method
                .iter()
                .map(|method| {
                    let (before, after) = (method.client_streaming(), method.server_streaming());
                    format!("{}{}{}", mark(before), method.name(), mark(after))
                })
                .collect();
            if name.starts_with("containerd.") || name.starts_with("gantry.") {
                found.insert(name, methods.join(" "));
            }
        }
    }
    let expected: BTreeMap<String, String> =
        SERVICES.iter().map(|(name, methods)| ((*name).to_owned(), (*methods).to_owned())).collect();
    assert_eq!(found, expected);
}

fn mark(streaming: bool) -> &'static str {
    if streaming { ">" } else { "" }
}

#[test]
fn the_descriptor_set_is_complete_and_light() {
    let files = descriptors().file;
    let names: Vec<&str> = files.iter().map(|file| file.name()).collect();
    for file in &files {
        // Reflection answers with a file and what it imports; none may be missing.
        for import in &file.dependency {
            assert!(names.contains(&import.as_str()), "{} imports {import}", file.name());
        }
        assert!(file.source_code_info.is_none(), "{} carries comments", file.name());
        // A file lies in its package's folder. The well-known types come with the compiler.
        let folder = file.package().replace('.', "/");
        assert_eq!(file.name().rsplit_once('/').map(|(folder, _)| folder), Some(folder.as_str()));
    }
}

#[test]
fn names_are_the_ones_on_the_wire() {
    assert_eq!(events_server::SERVICE_NAME, "containerd.services.events.v1.Events");
    // The packages that do not follow the pattern of the rest.
    assert_eq!(ImageCreate::full_name(), "containerd.services.images.v1.ImageCreate");
    assert_eq!(proto::containerd::v1::types::Process::full_name(), "containerd.v1.types.Process");
    assert_eq!(cgroups::v2::Metrics::full_name(), "io.containerd.cgroups.v2.Metrics");
    assert_eq!(proto::runtimeoptions::v1::Options::full_name(), "runtimeoptions.v1.Options");
    assert_eq!(task::v2::CreateTaskRequest::full_name(), "containerd.task.v2.CreateTaskRequest");
    assert_eq!(
        proto::containerd::types::transfer::OciRegistry::full_name(),
        "containerd.types.transfer.OCIRegistry"
    );
}

/// Encodes to exactly these bytes, and back.
fn assert_wire<M: Message + Default + PartialEq + std::fmt::Debug>(message: &M, bytes: &[u8]) {
    assert_eq!(message.encode_to_vec(), bytes);
    assert_eq!(M::decode(bytes).as_ref(), Ok(message));
}

#[test]
fn scalars_strings_and_flags_stand_where_their_numbers_say() {
    let options = Options {
        io_uid: 1000,
        binary_name: "crun".into(),
        root: "/r".into(),
        systemd_cgroup: true,
        ..Options::default()
    };
    assert_wire(&options, b"\x20\xe8\x07\x32\x04crun\x3a\x02/r\x48\x01");

    let exit = TaskExit {
        container_id: "c".into(),
        id: "e".into(),
        pid: 300,
        exit_status: 137,
        exited_at: Some(Timestamp { seconds: 1, nanos: 2 }),
    };
    assert_wire(&exit, b"\x0a\x01c\x12\x01e\x18\xac\x02\x20\x89\x01\x2a\x04\x08\x01\x10\x02");

    let mount = Mount {
        r#type: "bind".into(),
        source: "/s".into(),
        target: String::new(),
        options: vec!["ro".into(), "rbind".into()],
    };
    assert_wire(&mount, b"\x0a\x04bind\x12\x02/s\x22\x02ro\x22\x05rbind");
}

#[test]
fn the_task_messages_of_both_versions_have_the_same_bytes() {
    let v3 = task::v3::CreateTaskRequest {
        id: "c".into(),
        bundle: "/b".into(),
        rootfs: vec![Mount { r#type: "x".into(), ..Mount::default() }],
        terminal: true,
        stdout: "/o".into(),
        options: Some(proto::any::wrap("t", [7])),
        ..Default::default()
    };
    let bytes = b"\x0a\x01c\x12\x02/b\x1a\x03\x0a\x01x\x20\x01\x32\x02/o\x52\x06\x0a\x01t\x12\x01\x07";
    assert_wire(&v3, bytes);
    let v2 = task::v2::CreateTaskRequest::decode(bytes.as_slice()).unwrap();
    assert_wire(&v2, bytes);
}

#[test]
fn bootstrap_levels_may_be_negative_and_its_socket_folder_absent() {
    let params = BootstrapParams {
        instance_id: "c".into(),
        log_level: LogLevel::Debug.into(),
        ..BootstrapParams::default()
    };
    // A negative enum value takes ten bytes.
    let bytes = b"\x0a\x01c\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01";
    assert_wire(&params, bytes);
    let with_folder = BootstrapParams { socket_dir: Some(String::new()), ..params };
    assert_wire(&with_folder, &[bytes.as_slice(), b"\x4a\x00"].concat());

    let result =
        BootstrapResult { version: 3, address: "a".into(), protocol: "ttrpc".into(), ..Default::default() };
    assert_wire(&result, b"\x08\x03\x12\x01a\x1a\x05ttrpc");
}

#[test]
fn blobs_travel_as_shared_bytes() {
    let data = bytes::Bytes::from_static(b"\x00\xff");
    let request = WriteContentRequest {
        action: WriteAction::Commit.into(),
        r#ref: "r".into(),
        offset: 5,
        data: data.clone(),
        labels: BTreeMap::from([("b".into(), "2".into()), ("a".into(), "1".into())]),
        ..WriteContentRequest::default()
    };
    // Labels come out sorted, whatever order they went in.
    let bytes =
        b"\x08\x02\x12\x01r\x28\x05\x32\x02\x00\xff\x3a\x06\x0a\x01a\x12\x011\x3a\x06\x0a\x01b\x12\x012";
    assert_wire(&request, bytes);

    // Decoding from a shared buffer points into it instead of copying.
    let frame = bytes::Bytes::from(ReadContentResponse { offset: 1, data }.encode_to_vec());
    let response = ReadContentResponse::decode(frame.clone()).unwrap();
    assert!(frame.as_ptr_range().contains(&response.data.as_ptr()));
}

#[test]
fn an_optional_message_is_absent_not_empty() {
    assert_wire(&DeleteImageRequest { name: "i".into(), sync: true, target: None }, b"\x0a\x01i\x10\x01");
    let target = Some(proto::containerd::types::Descriptor::default());
    assert_wire(&DeleteImageRequest { name: "i".into(), sync: false, target }, b"\x0a\x01i\x1a\x00");
}

#[test]
fn fields_that_we_do_not_know_are_no_error() {
    // An older client's criu_path, number 8.
    let options = Options::decode(b"\x42\x04criu\x48\x01".as_slice()).unwrap();
    assert_eq!(options, Options { systemd_cgroup: true, ..Options::default() });
}
