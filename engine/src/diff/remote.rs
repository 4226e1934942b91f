//! Differs in other processes: asked as containerd asks them, in the caller's namespace and under its lease, since they read
//! and write blobs by the engine's own API.

use proto::containerd::services::diff::v1::diff_client::DiffClient;
use proto::containerd::services::diff::v1::{ApplyRequest, DiffRequest};
use proto::containerd::types::{self, Descriptor};
use sys::mount::Mount;
use tonic::{Code, Request, Status};

use super::{Comparison, Layer};
use crate::context::{LEASE_HEADER, NAMESPACE_HEADER, RequestContext};
use crate::error::{Error, Result};
use crate::proxy::Proxy;

/// A differ behind a socket.
#[derive(Clone)]
pub(super) struct Remote {
    pub(super) name: String,
    pub(super) proxy: Proxy,
}

impl Remote {
    pub(super) async fn apply(&self, context: &RequestContext, layer: Layer) -> Result<Descriptor> {
        let message = ApplyRequest {
            diff: Some(layer.descriptor),
            mounts: mounts(layer.mounts),
            payloads: layer.payloads,
            sync_fs: layer.sync,
        };
        let request = of_caller(context, message)?;
        let mut client = DiffClient::new(self.proxy.channel());
        let answer = self.proxy.ask(client.apply(request)).await.map_err(|status| self.failure(&status))?;
        answer.applied.ok_or_else(|| Error::unknown(format!("differ {} answered no descriptor", self.name)))
    }

    pub(super) async fn compare(&self, context: &RequestContext, wanted: Comparison) -> Result<Descriptor> {
        let message = DiffRequest {
            left: mounts(wanted.left),
            right: mounts(wanted.right),
            media_type: wanted.media_type,
            r#ref: wanted.reference,
            labels: wanted.labels,
            source_date_epoch: wanted.epoch.map(Into::into),
        };
        let request = of_caller(context, message)?;
        let mut client = DiffClient::new(self.proxy.channel());
        let answer = self.proxy.ask(client.diff(request)).await.map_err(|status| self.failure(&status))?;
        answer.diff.ok_or_else(|| Error::unknown(format!("differ {} answered no descriptor", self.name)))
    }

    fn failure(&self, status: &Status) -> Error {
        let message = format!("differ {}: {}", self.name, status.message());
        match status.code() {
            Code::Unimplemented => Error::unimplemented(message),
            Code::NotFound => Error::not_found(message),
            Code::InvalidArgument => Error::invalid_argument(message),
            Code::FailedPrecondition => Error::failed_precondition(message),
            Code::Unavailable | Code::DeadlineExceeded => Error::unavailable(message),
            _ => Error::unknown(message),
        }
    }
}

fn of_caller<T>(context: &RequestContext, message: T) -> Result<Request<T>> {
    let mut request = Request::new(message);
    let headers = [(NAMESPACE_HEADER, Some(context.namespace()?.as_str())), (LEASE_HEADER, context.lease())];
    for (header, value) in headers {
        let Some(value) = value else { continue };
        let value = value
            .parse()
            .map_err(|_| Error::invalid_argument(format!("{header} {value:?} does not fit a header")))?;
        request.metadata_mut().insert(header, value);
    }
    Ok(request)
}

fn mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    let mounts = mounts.into_iter().map(|mount| types::Mount {
        r#type: mount.kind,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    });
    mounts.collect()
}
