//! One Write stream: requests in, an answer for each, in order.
//!
//! ```text
//!  first request: open the ingest -> [ step ]*
//!  STAT    the state
//!  WRITE   offset == current: append | 0: begin anew, then append | other: OutOfRange
//!  COMMIT  as WRITE, then the ingest becomes a blob, and the stream ends
//! ```
//!
//! Invariant: whatever ends a session before its commit, the ingest stays and can be resumed.

use oci::Digest;
use proto::containerd::services::content::v1::{WriteAction, WriteContentRequest, WriteContentResponse};

use super::{Content, Writer, parse_digest};
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking};

/// The state of a Write stream between two requests.
pub struct Session {
    content: Content,
    context: RequestContext,
    /// None before the first request, after the commit, and after an error.
    writer: Option<Writer>,
    begun: bool,
    total: u64,
    expected: Option<Digest>,
}

impl Session {
    /// A session in which nothing was asked yet.
    pub fn new(content: Content, context: RequestContext) -> Self {
        Session { content, context, writer: None, begun: false, total: 0, expected: None }
    }

    /// Whether the session is over: after a commit, or an error.
    pub fn is_over(&self) -> bool {
        self.begun && self.writer.is_none()
    }

    /// Does what a request asks. After an error the session is over.
    pub async fn step(&mut self, request: WriteContentRequest) -> Result<WriteContentResponse> {
        let action = WriteAction::try_from(request.action)
            .map_err(|_| Error::invalid_argument(format!("write action {} is not known", request.action)))?;
        let unsigned = |name: &str, value: i64| {
            u64::try_from(value)
                .map_err(|_| Error::invalid_argument(format!("{name} of a write must not be {value}")))
        };
        let (offset, total) = (unsigned("offset", request.offset)?, unsigned("total", request.total)?);
        let expected = Some(&request.expected).filter(|text| !text.is_empty());
        let expected = expected.map(|text| parse_digest(text)).transpose()?;
        if total > 0 {
            self.total = total;
        }
        if !self.begun {
            self.begun = true;
            let reference = request.r#ref.clone();
            let writer = self.content.writer(&self.context, reference, total, expected.clone()).await?;
            self.writer = Some(writer);
            self.expected = expected;
        } else if let Some(expected) = expected {
            self.expect(expected).await?;
        }
        let Some(writer) = self.writer.take() else {
            return Err(Error::failed_precondition("this stream's ingest is closed; open a new stream"));
        };
        let status = writer.status();
        let mut answer = WriteContentResponse {
            action: request.action,
            started_at: status.started_at,
            updated_at: status.updated_at,
            offset: status.offset,
            total: i64::try_from(self.total).unwrap_or(i64::MAX),
            digest: String::new(),
        };
        if action == WriteAction::Stat {
            answer.digest = writer.digest().to_string();
            self.writer = Some(writer);
            return Ok(answer);
        }
        let (reference, key) = (writer.reference.clone(), writer.held.key.clone());
        let writer = match append(writer, offset, request.data).await {
            Err(error @ Error::ResourceExhausted(_)) => {
                // A disk is full: give back what this ingest has of it.
                self.abort(reference, key).await;
                return Err(error);
            }
            appended => appended?,
        };
        answer.offset = writer.status().offset;
        if action == WriteAction::Commit {
            let digest = writer.commit(self.total, self.expected.clone(), request.labels).await?;
            answer.digest = digest.to_string();
        } else {
            answer.digest = writer.digest().to_string();
            self.writer = Some(writer);
        }
        Ok(answer)
    }

    /// Takes a digest that came after the first request. A blob that is there meanwhile ends the ingest.
    async fn expect(&mut self, expected: Digest) -> Result<()> {
        if self.content.join(&self.context, &expected).await? {
            if let Some(writer) = self.writer.take() {
                let (reference, key) = (writer.reference.clone(), writer.held.key.clone());
                drop(writer);
                self.abort(reference, key).await;
            }
            return Err(Error::already_exists(format!("blob {expected} exists already")));
        }
        self.expected = Some(expected);
        Ok(())
    }

    async fn abort(&self, reference: String, key: String) {
        match self.content.abort_ingest(&self.context, reference, Some(key)).await {
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => tracing::warn!(%error, "an ingest that is of no use any more stays"),
        }
    }

    /// Ends the session; an ingest that was not committed stays, to be resumed.
    pub async fn end(mut self) {
        if let Some(writer) = self.writer.take() {
            let suspended = blocking(move || {
                writer.suspend();
                Ok(())
            });
            if let Err(error) = suspended.await {
                tracing::warn!(%error, "an ingest was not closed properly");
            }
        }
    }
}

async fn append(mut writer: Writer, offset: u64, data: bytes::Bytes) -> Result<Writer> {
    let current = writer.offset();
    if offset > 0 && offset != current {
        return Err(Error::out_of_range(format!(
            "write at {offset} to ingest {:?}, which stands at {current}: go on there, or at 0 to begin anew",
            writer.reference
        )));
    }
    if offset == current && data.is_empty() {
        return Ok(writer);
    }
    blocking(move || {
        if offset == 0 && current > 0 {
            writer.truncate()?;
        }
        writer.write(&data)?;
        Ok(writer)
    })
    .await
}
