//! Calls over gRPC: messages pass as the bytes that they are.
//!
//! Nothing here is reached by a program that only speaks ttrpc, so that the linker leaves it out of the shim.

use std::sync::Mutex;

use async_trait::async_trait;
use http::uri::PathAndQuery;
use prost::bytes::{Buf as _, BufMut as _};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::{WatchedStream, Wire};
use crate::{Code, Error, Result};

/// The gRPC header that carries the namespace.
const NAMESPACE_HEADER: &str = "containerd-namespace";

pub(super) struct Grpc(Channel);

/// Speaks gRPC over this stream, and over no other: when it ends, the connection has ended.
pub(super) async fn connect(address: &str, stream: WatchedStream) -> Result<Grpc> {
    let stream = Mutex::new(Some(stream));
    let connector = tower::service_fn(move |_: http::Uri| {
        let stream = stream.lock().ok().and_then(|mut stream| stream.take());
        std::future::ready(
            stream
                .map(hyper_util::rt::TokioIo::new)
                .ok_or_else(|| std::io::Error::other("the connection has ended")),
        )
    });
    let channel = Endpoint::from_static("http://shim").connect_with_connector(connector).await;
    let channel = channel.map_err(|error| Error::unavailable(format!("connect to {address}: {error}")))?;
    Ok(Grpc(channel))
}

#[async_trait]
impl Wire for Grpc {
    async fn exchange(
        &self,
        namespace: Option<&str>,
        service: &str,
        method: &str,
        payload: Vec<u8>,
    ) -> Result<Vec<u8>> {
        let path = PathAndQuery::from_maybe_shared(format!("/{service}/{method}"))
            .map_err(|error| Error::invalid_argument(format!("call {service}/{method}: {error}")))?;
        let mut request = Request::new(payload);
        if let Some(namespace) = namespace {
            let value = namespace.parse().map_err(|error| {
                Error::invalid_argument(format!("namespace {namespace:?} does not fit a header: {error}"))
            })?;
            request.metadata_mut().insert(NAMESPACE_HEADER, value);
        }
        let mut client = tonic::client::Grpc::new(self.0.clone());
        client
            .ready()
            .await
            .map_err(|error| Error::unavailable(format!("the channel is not ready: {error}")))?;
        let answer = client.unary(request, path, Raw).await.map_err(|status| of_status(&status))?;
        Ok(answer.into_inner())
    }
}

fn of_status(status: &Status) -> Error {
    // A status that this side made, of a connection that failed, says why.
    if std::error::Error::source(status).is_some() {
        return Error::closed(status.message());
    }
    Error::new(Code::of_number(status.code() as i32), status.message())
}

/// Bytes in, bytes out.
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> std::result::Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> std::result::Result<Option<Vec<u8>>, Status> {
        let mut item = vec![0; buffer.remaining()];
        buffer.copy_to_slice(&mut item);
        Ok(Some(item))
    }
}
