//! The kubelet's images, as a kubelet asks for them, from real registries.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proto::runtime::v1::image_service_client::ImageServiceClient;
use proto::runtime::v1::{
    AuthConfig, CreateContainerRequest, Image, ImageFilter, ImageFsInfoRequest, ImageSpec,
    ImageStatusRequest, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListImagesRequest, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PullImageRequest, RemoveImageRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopPodSandboxRequest,
    StreamImagesRequest,
};
use tests::client::{Ctr, channel};
use tests::host::{Host, Kind};
use tests::image;
use tests::registry::{Guard, PASSWORD, REGISTRY, Registry, USER};
use tests::{host::RUNC, ready};
use tonic::transport::Channel;
use tonic::{Code, Status};

struct Kubelet(ImageServiceClient<Channel>);

fn spec(image: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() })
}

impl Kubelet {
    async fn new(host: &Host) -> Self {
        Kubelet(ImageServiceClient::new(channel(&host.address()).await))
    }

    async fn pull(&mut self, image: &str) -> Result<String, Status> {
        self.pull_as(image, None).await
    }

    async fn pull_as(&mut self, image: &str, auth: Option<AuthConfig>) -> Result<String, Status> {
        let request = PullImageRequest { image: spec(image), auth, sandbox_config: None };
        self.0.pull_image(request).await.map(|answer| answer.into_inner().image_ref)
    }

    async fn status(&mut self, image: &str) -> Option<Image> {
        let request = ImageStatusRequest { image: spec(image), verbose: false };
        self.0.image_status(request).await.expect("status").into_inner().image
    }

    async fn list(&mut self) -> Vec<Image> {
        let request = ListImagesRequest { filter: None };
        let mut images = self.0.list_images(request).await.expect("list").into_inner().images;
        images.sort_by(|a, b| a.id.cmp(&b.id));
        images
    }

    async fn remove(&mut self, image: &str) {
        self.0.remove_image(RemoveImageRequest { image: spec(image) }).await.expect("remove");
    }

    /// Bytes and inodes of the default snapshotter's layers.
    async fn usage(&mut self) -> (u64, u64) {
        let usage = self.0.image_fs_info(ImageFsInfoRequest {}).await.expect("usage").into_inner();
        let first = &usage.image_filesystems[0];
        let mountpoint = &first.fs_id.as_ref().expect("a mountpoint").mountpoint;
        assert!(mountpoint.ends_with("io.containerd.snapshotter.v1.overlayfs"), "{mountpoint}");
        let (bytes, inodes) = (first.used_bytes.expect("bytes"), first.inodes_used.expect("inodes"));
        (bytes.value, inodes.value)
    }
}

/// ctr where the kubelet's objects are.
fn ctr(host: &Host) -> Ctr {
    let mut ctr = Ctr::ours(host);
    ctr.namespace = "k8s.io".into();
    ctr
}

#[tokio::test]
async fn an_image_is_one_under_all_its_names_until_it_is_removed_by_any() {
    if !ready(&[RUNC, REGISTRY]) {
        return;
    }
    let (host, registry) = (Host::gantry(), Registry::open());
    let digest = registry.push(&image::busybox(), "busybox:1");
    let mut kubelet = Kubelet::new(&host).await;
    assert_eq!(kubelet.list().await, []);
    let name = registry.name("busybox:1");
    assert_eq!(kubelet.status(&name).await, None);
    let before = kubelet.usage().await;

    let id = kubelet.pull(&name).await.unwrap();
    let image = kubelet.status(&name).await.unwrap();
    assert_eq!(image.id, id);
    let config: serde_json::Value = serde_json::from_str(&registry.inspect("busybox:1", &["--raw"])).unwrap();
    assert_eq!(config["config"]["digest"], id.as_str(), "the id is the config's digest");
    assert_eq!(image.repo_tags, std::slice::from_ref(&name));
    assert_eq!(image.repo_digests, [registry.name(&format!("busybox@{digest}"))]);
    assert!(image.size > 1000 && !image.pinned, "{image:?}");
    assert!(kubelet.usage().await.0 > before.0 + 100_000, "its layers are unpacked");

    // A second tag is another name of the same image; a pull by digest adds none.
    registry.push(&image::busybox(), "busybox:2");
    assert_eq!(kubelet.pull(&registry.name("busybox:2")).await.unwrap(), id);
    assert_eq!(kubelet.pull(&registry.name(&format!("busybox@{digest}"))).await.unwrap(), id);
    let [image] = &kubelet.list().await[..] else { panic!("{:?}", kubelet.list().await) };
    assert_eq!((image.repo_tags.len(), image.repo_digests.len()), (2, 1), "{image:?}");
    for name in [&id, id.trim_start_matches("sha256:"), &id[7..19], &image.repo_digests[0]] {
        assert_eq!(kubelet.status(name).await.map(|image| image.id), Some(id.clone()), "{name}");
        let filter = Some(ImageFilter { image: spec(name) });
        let listed = kubelet.0.list_images(ListImagesRequest { filter }).await.unwrap().into_inner().images;
        assert_eq!(listed.len(), 1, "{name}");
    }
    let mut stream =
        kubelet.0.stream_images(StreamImagesRequest { filter: None }).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().images.len(), 1);
    assert!(stream.message().await.unwrap().is_none());
    let verbose = ImageStatusRequest { image: spec(&id), verbose: true };
    let info = kubelet.0.image_status(verbose).await.unwrap().into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    assert!(info["chainID"].as_str().unwrap().starts_with("sha256:"), "{info}");
    assert_eq!(info["imageSpec"]["os"], "linux", "{info}");

    // What the engine's other clients see, and what they make is the kubelet's too.
    let ctr = ctr(&host);
    let names = ctr.ok(&["images", "ls", "-q"]);
    assert_eq!(names.lines().count(), 4, "{names}");
    assert_eq!(ctr.ok(&["run", "--rm", &name, "c1", "echo", "made of it"]), "made of it\n");
    ctr.ok(&["images", "tag", &name, "example.org/mine:1"]);
    assert_eq!(kubelet.status("example.org/mine:1").await.unwrap().id, id);

    // Two remove it at once; it is gone, with its space.
    let mut other = Kubelet::new(&host).await;
    tokio::join!(kubelet.remove(&id), other.remove(&name));
    assert_eq!(kubelet.list().await, []);
    assert_eq!(ctr.ok(&["images", "ls", "-q"]), "");
    assert_eq!(ctr.ok(&["content", "ls", "-q"]), "");
    assert_eq!(kubelet.usage().await, before);
    kubelet.remove(&id).await;
}

#[tokio::test]
async fn many_pulls_of_one_image_are_one() {
    if !ready(&[RUNC, REGISTRY]) {
        return;
    }
    let (host, registry) = (Host::gantry(), Registry::open());
    registry.push(&image::busybox(), "busybox:1");
    let name = registry.name("busybox:1");
    let before = registry.requests().len();
    let pulls = (0..8).map(|_| async {
        let mut kubelet = Kubelet::new(&host).await;
        kubelet.pull(&name).await.unwrap()
    });
    let ids = futures::future::join_all(pulls).await;
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let requests = registry.requests().split_off(before);
    let blobs: Vec<_> =
        requests.iter().filter(|line| line.contains("GET") && line.contains("/blobs/")).collect();
    let mut once = blobs.clone();
    once.sort();
    once.dedup();
    assert_eq!(blobs.len(), once.len(), "each blob is fetched once: {blobs:#?}");
}

#[tokio::test]
async fn credentials_open_what_is_theirs_alone() {
    if !ready(&[RUNC, REGISTRY]) {
        return;
    }
    let host = Host::gantry();
    let registry = Registry::start(Guard { basic: true, ..Guard::default() });
    registry.push(&image::busybox(), "busybox:1");
    let name = registry.name("busybox:1");
    let mut kubelet = Kubelet::new(&host).await;
    let auth = |password: &str, server: &str| {
        Some(AuthConfig {
            username: USER.into(),
            password: password.into(),
            server_address: server.into(),
            ..AuthConfig::default()
        })
    };
    for (what, auth) in [
        ("without any", None),
        ("with a wrong password", auth("sesame, open", "")),
        ("with another registry's", auth(PASSWORD, "registry.example")),
    ] {
        let error = kubelet.pull_as(&name, auth).await.expect_err(what);
        assert!(!error.message().contains("sesame"), "{what}: {error:?}");
        assert_ne!(error.code(), Code::Unknown, "{what}: {error:?}");
    }
    assert_eq!(kubelet.list().await, []);
    let id = kubelet.pull_as(&name, auth(PASSWORD, &registry.address.to_string())).await.unwrap();
    assert_eq!(kubelet.status(&name).await.unwrap().id, id);
    assert!(!host.log().contains(PASSWORD), "{}", host.log());
}

#[tokio::test]
async fn what_is_no_image_is_refused_and_what_runs_is_kept() {
    if !ready(&[RUNC, REGISTRY]) {
        return;
    }
    let (host, registry) = (Host::gantry(), Registry::open());
    let mut kubelet = Kubelet::new(&host).await;
    for (name, code) in [
        ("", Code::InvalidArgument),
        ("example.org/UPPER", Code::InvalidArgument),
        ("a b", Code::InvalidArgument),
        (&*registry.name("absent:1"), Code::NotFound),
        (&*registry.name(&format!("absent@sha256:{}", "0".repeat(64))), Code::NotFound),
    ] {
        let error = kubelet.pull(name).await.expect_err(name);
        assert_eq!(error.code(), code, "{name:?}: {error:?}");
    }
    assert_eq!(kubelet.list().await, []);
    for image in [None, spec("")] {
        let error = kubelet.0.image_status(ImageStatusRequest { image, verbose: false }).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
    }

    // Removing the image of a running container takes its names; what it runs on stays.
    registry.push(&image::busybox(), "busybox:1");
    let name = registry.name("busybox:1");
    let id = kubelet.pull(&name).await.unwrap();
    let ctr = ctr(&host);
    ctr.ok(&["run", "-d", &name, "c1", "sleep", "1000"]);
    kubelet.remove(&id).await;
    assert_eq!(kubelet.list().await, []);
    assert_eq!(ctr.ok(&["tasks", "exec", "--exec-id", "e1", "c1", "echo", "still here"]), "still here\n");
    ctr.ok(&["tasks", "rm", "--force", "c1"]);
    ctr.ok(&["containers", "rm", "c1"]);
}

#[tokio::test]
async fn what_pods_are_held_by_is_not_collected() {
    if !ready(&[RUNC, REGISTRY]) {
        return;
    }
    let registry = Registry::open();
    registry.push(&image::busybox(), "busybox:1");
    registry.push(&image::image("docker.io/library/pause:1", &["sleep"], &[image::base_layer()]), "pause:1");
    let (pause, other) = (registry.name("pause:1"), registry.name("busybox:1"));
    let mut host = Host::new(Kind::Gantry);
    host.settings = Some(format!("[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = '{pause}'\n"));
    host.start();
    let mut kubelet = Kubelet::new(&host).await;
    for (name, pinned) in [(&pause, true), (&other, false)] {
        kubelet.pull(name).await.unwrap();
        assert_eq!(kubelet.status(name).await.unwrap().pinned, pinned, "{name}");
    }
    // Other clients see that, too.
    let ctr = ctr(&host);
    assert!(
        ctr.ok(&["images", "ls"])
            .lines()
            .any(|line| line.contains(&pause) && line.contains("cri-containerd.pinned"))
    );
    // One that somebody brought in under the name is that image as well.
    kubelet.remove(&pause).await;
    ctr.ok(&["images", "tag", &other, &pause]);
    assert!(kubelet.status(&pause).await.unwrap().pinned);
}

#[tokio::test]
async fn an_image_is_unpacked_where_its_containers_are() {
    if !ready(&[RUNC, REGISTRY]) {
        return;
    }
    let registry = Registry::open();
    registry.push(&image::busybox(), "busybox:1");
    registry.push(&image::image("docker.io/library/other:1", &["sleep"], &[image::base_layer()]), "other:1");
    let mut host = Host::new(Kind::Gantry);
    host.settings = Some(
        "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n\
         [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.copies]\nsnapshotter = 'native'\n"
            .to_owned(),
    );
    host.start();
    let mut kubelet = Kubelet::new(&host).await;
    let ctr = ctr(&host);
    let layers = |name: &str| ctr.ok(&["snapshots", "--snapshotter", name, "ls"]).lines().count() - 1;
    let image =
        Some(ImageSpec { runtime_handler: "copies".into(), ..spec(&registry.name("busybox:1")).unwrap() });
    let request = PullImageRequest { image, ..PullImageRequest::default() };
    kubelet.0.pull_image(request).await.unwrap();
    assert_eq!((layers("native"), layers("overlayfs")), (2, 0));
    // An older client says it by the pod's annotation.
    let handler = [("io.containerd.cri.runtime-handler".to_owned(), "copies".to_owned())].into();
    let sandbox_config = Some(PodSandboxConfig { annotations: handler, ..PodSandboxConfig::default() });
    let request = PullImageRequest { image: spec(&registry.name("other:1")), sandbox_config, auth: None };
    kubelet.0.pull_image(request).await.unwrap();
    assert_eq!(layers("overlayfs"), 0);
    // A pull that says nothing is for the usual one.
    kubelet.pull(&registry.name("busybox:1")).await.unwrap();
    assert_eq!(layers("overlayfs"), 2);
    // A container of another handler than the image was pulled for has its files all the same.
    let mut runtime = tests::cri::runtime(&host.address()).await;
    let mut network = NamespaceOption::default();
    network.set_network(NamespaceMode::Node);
    let security_context =
        LinuxSandboxSecurityContext { namespace_options: Some(network.clone()), ..Default::default() };
    let metadata =
        PodSandboxMetadata { name: "p".into(), uid: "u".into(), namespace: "n".into(), attempt: 0 };
    let config = PodSandboxConfig {
        metadata: Some(metadata),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: format!("/{}", host.namespace),
            security_context: Some(security_context),
            ..Default::default()
        }),
        ..PodSandboxConfig::default()
    };
    let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: "runc".into() };
    let pod = runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
    let mut container = tests::cri::container("c1", &["true"]);
    container.image = spec(&registry.name("other:1"));
    tests::cri::security(&mut container).namespace_options = Some(network);
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(container),
        sandbox_config: Some(config),
    };
    let container = runtime.create_container(request).await.unwrap().into_inner().container_id;
    let request = StartContainerRequest { container_id: container };
    runtime.start_container(request).await.unwrap();
    runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: pod }).await.unwrap();
    host.assert_nothing_left();
}
