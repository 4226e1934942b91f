//! The connection to the engine: one channel over a unix socket, and a client of each service
//! that sends the namespace and, where there is one, the lease in its headers.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use anyhow::bail;
use proto::containerd::services::containers::v1::containers_client::ContainersClient;
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::diff::v1::diff_client::DiffClient;
use proto::containerd::services::events::v1::events_client::EventsClient;
use proto::containerd::services::images::v1::images_client::ImagesClient;
use proto::containerd::services::introspection::v1::introspection_client::IntrospectionClient;
use proto::containerd::services::leases::v1::leases_client::LeasesClient;
use proto::containerd::services::namespaces::v1::GetNamespaceRequest;
use proto::containerd::services::namespaces::v1::namespaces_client::NamespacesClient;
use proto::containerd::services::sandbox::v1::controller_client::ControllerClient;
use proto::containerd::services::sandbox::v1::store_client::StoreClient;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use proto::containerd::services::streaming::v1::streaming_client::StreamingClient;
use proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use proto::containerd::services::transfer::v1::transfer_client::TransferClient;
use proto::containerd::services::version::v1::version_client::VersionClient;
use proto::gantry::events::v1::events_client::EventsClient as JournalClient;
use proto::gantry::gc::v1::gc_client::GcClient;
use proto::gantry::images::v1::images_client::ImagesClient as ImageCareClient;
use proto::gantry::registry::v1::registry_client::RegistryClient;
use shim_api::trace;
use tokio::net::UnixStream;
use tonic::body::Body;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Largest answer that is taken: a long list must not fail.
const MESSAGE_LIMIT: usize = 256 << 20;

/// A service as the generated clients wrap it.
pub(crate) type Service = InterceptedService<Traced, Headers>;

/// A channel whose calls are spans of the trace that they are part of, if there is one.
#[derive(Clone, Debug)]
pub(crate) struct Traced(Channel);

impl tower::Service<http::Request<Body>> for Traced {
    type Response = http::Response<Body>;
    type Error = tonic::transport::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let span = trace::current().map(|trace| {
            let path = request.uri().path();
            trace.open(path.rsplit('.').next().unwrap_or(path))
        });
        if let Some(parent) = span.as_ref().and_then(|span| span.inside().parent().parse().ok()) {
            request.headers_mut().insert(trace::PARENT_HEADER, parent);
        }
        let call = self.0.call(request);
        Box::pin(async move {
            let answer = call.await;
            drop(span);
            answer
        })
    }
}

/// What every request carries.
#[derive(Clone, Debug)]
pub(crate) struct Headers {
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            metadata.insert("containerd-lease", lease.clone());
        }
        Ok(request)
    }
}

/// A connected engine, in one namespace. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    channel: Channel,
    headers: Headers,
    namespace: String,
}

macro_rules! services {
    ($($name:ident: $client:ident,)*) => {
        $(pub(crate) fn $name(&self) -> $client<Service> {
            $client::with_interceptor(Traced(self.channel.clone()), self.headers.clone())
                .max_decoding_message_size(MESSAGE_LIMIT)
        })*
    };
}

impl Client {
    services! {
        containers: ContainersClient,
        content: ContentClient,
        diff: DiffClient,
        events: EventsClient,
        gc: GcClient,
        image_care: ImageCareClient,
        images: ImagesClient,
        introspection: IntrospectionClient,
        journal: JournalClient,
        leases: LeasesClient,
        namespaces: NamespacesClient,
        registry: RegistryClient,
        sandbox_controller: ControllerClient,
        sandboxes: StoreClient,
        snapshots: SnapshotsClient,
        streaming: StreamingClient,
        tasks: TasksClient,
        transfer: TransferClient,
        version: VersionClient,
    }

    /// Connects to the socket at `address`, a path or `unix://` and a path.
    pub(crate) async fn connect(address: &str, namespace: &str) -> anyhow::Result<Client> {
        let path = PathBuf::from(address.strip_prefix("unix://").unwrap_or(address));
        let Ok(header) = namespace.parse() else {
            bail!("{namespace:?} cannot be a namespace: use letters, digits, '.', '_' and '-'");
        };
        // Connecting once by hand gives an error that can be explained; the channel's own is opaque.
        if let Err(error) = UnixStream::connect(&path).await {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => {
                    "is gantryd running? start it with `gantryd`, or name its socket with --address"
                }
                io::ErrorKind::ConnectionRefused => "nobody listens there; start the engine with `gantryd`",
                io::ErrorKind::PermissionDenied => "run ctr as root, or let your user use the socket",
                _ => "name the engine's socket with --address",
            };
            bail!("cannot connect to {}: {error} ({hint})", path.display());
        }
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
            }))
            .await?;
        Ok(Client {
            channel,
            headers: Headers { namespace: header, lease: None },
            namespace: namespace.to_owned(),
        })
    }

    /// The namespace requests are made in.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The same client with every request under the lease `id`.
    pub(crate) fn with_lease(&self, id: &str) -> anyhow::Result<Client> {
        let mut client = self.clone();
        client.headers.lease = Some(id.parse()?);
        Ok(client)
    }

    /// What the namespace's label `containerd.io/defaults/<what>` says, else `otherwise`.
    pub(crate) async fn default_of(&self, what: &str, otherwise: &str) -> anyhow::Result<String> {
        let request = GetNamespaceRequest { name: self.namespace.clone() };
        let labels = match self.namespaces().get(request).await {
            Ok(response) => response.into_inner().namespace.unwrap_or_default().labels,
            // A namespace that nobody made has no labels.
            Err(status) if status.code() == Code::NotFound => Default::default(),
            Err(status) => {
                return Err(Failure::new(format!("read namespace {}", self.namespace), status).into());
            }
        };
        Ok(labels
            .get(&format!("containerd.io/defaults/{what}"))
            .cloned()
            .unwrap_or_else(|| otherwise.to_owned()))
    }

    /// The snapshotter a command should use, given its `--snapshotter`.
    pub(crate) async fn snapshotter(&self, flag: &str) -> anyhow::Result<String> {
        if !flag.is_empty() {
            return Ok(flag.to_owned());
        }
        self.default_of("snapshotter", "overlayfs").await
    }
}

/// A call the engine refused: what was tried, and its answer.
#[derive(Debug)]
pub(crate) struct Failure {
    tried: String,
    status: Status,
    remedy: Option<String>,
}

impl Failure {
    /// `tried` completes "cannot …".
    pub(crate) fn new(tried: impl Into<String>, status: Status) -> Failure {
        Failure { tried: tried.into(), status, remedy: None }
    }

    /// The same, with what to do about it.
    pub(crate) fn with_remedy(self, remedy: String) -> Failure {
        Failure { remedy: Some(remedy), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.tried, self.status.message())?;
        let class = match self.status.code() {
            Code::NotFound => "not found",
            Code::AlreadyExists => "already exists",
            Code::FailedPrecondition => "failed precondition",
            Code::InvalidArgument => "invalid argument",
            Code::Unavailable => "unavailable",
            Code::Unimplemented => "not implemented by this engine",
            Code::PermissionDenied => "permission denied",
            Code::ResourceExhausted => "resource exhausted",
            Code::DeadlineExceeded => "deadline exceeded",
            Code::OutOfRange => "out of range",
            _ => "",
        };
        // Many messages end with their class already.
        if !self.status.message().ends_with(class) {
            write!(f, " ({class})")?;
        }
        self.remedy.iter().try_for_each(|remedy| write!(f, "; {remedy}"))
    }
}

impl std::error::Error for Failure {}

/// Says what a call was for when it fails.
pub(crate) trait Tried<T> {
    /// `what` completes "cannot …".
    fn tried<S: Into<String>>(self, what: impl FnOnce() -> S) -> anyhow::Result<T>;
}

impl<T> Tried<T> for Result<tonic::Response<T>, Status> {
    fn tried<S: Into<String>>(self, what: impl FnOnce() -> S) -> anyhow::Result<T> {
        match self {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err(Failure::new(what(), status).into()),
        }
    }
}

/// The gRPC code behind an error, if the engine gave one.
pub(crate) fn code_of(error: &anyhow::Error) -> Option<Code> {
    error.downcast_ref::<Failure>().map(|failure| failure.status.code())
}
