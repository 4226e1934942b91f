//! A transfer's registry: how its client says to reach it, and what the client is asked on the way.
//!
//! Invariants: the client of the stream is asked one thing at a time and has [`PATIENCE`] to answer. What it answers goes to
//! the registry's client alone. Lines of the log hold no secret, and a reader that does not read them holds nothing up.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use oci::Reference;
use proto::any;
use proto::containerd::types::transfer::{AuthRequest, AuthResponse, AuthType, HttpDebug, OciRegistry};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::Transfers;
use crate::context::RequestContext;
use crate::error::{Error, Result};
use crate::remotes::{Access, Credential, Credentials, Log, Repository};
use crate::streaming::End;
use crate::streaming::bytes::{Patience, Sender};

/// How long a client may take to answer: it may ask a person.
const PATIENCE: Duration = Duration::from_secs(300);
/// Lines of the log that wait for their reader.
const LINES: usize = 1024;

impl Transfers {
    /// The repository that a transfer names. To be called on the runtime.
    pub(super) fn repository(&self, context: &RequestContext, wanted: OciRegistry) -> Result<Repository> {
        let reference: Reference = wanted
            .reference
            .parse()
            .map_err(|error| Error::invalid_argument(format!("reference {:?}: {error}", wanted.reference)))?;
        let resolver = wanted.resolver.unwrap_or_default();
        let debug = resolver.http_debug() != HttpDebug::Disabled;
        let credentials = match resolver.auth_stream.as_str() {
            "" => None,
            name => {
                let client = Client::new(self.streams.take(context, name)?, wanted.reference);
                Some(Arc::new(client) as Arc<dyn Credentials>)
            }
        };
        let log = match (debug, resolver.logs_stream.as_str()) {
            (false, _) => None,
            (true, "") => Some(Arc::new(|line: &str| tracing::info!(registry = line)) as Log),
            (true, name) => Some(log_to(self.streams.take(context, name)?)),
        };
        self.remotes.repository(Access {
            reference,
            headers: resolver.headers.into_iter().collect(),
            hosts_dir: (!resolver.host_dir.is_empty()).then(|| resolver.host_dir.into()),
            scheme: (!resolver.default_scheme.is_empty()).then_some(resolver.default_scheme),
            credentials,
            log,
        })
    }
}

/// Lines, over a stream of bytes; those that the reader is too slow for are left out.
fn log_to(end: End) -> Log {
    let (lines, mut waiting) = mpsc::channel::<String>(LINES);
    let mut sender = Sender::new(end, Patience { idle: PATIENCE, stop: CancellationToken::new() });
    tokio::task::spawn_blocking(move || {
        while let Some(line) = waiting.blocking_recv() {
            if sender.write_all(line.as_bytes()).is_err() {
                return;
            }
        }
    });
    Arc::new(move |line: &str| {
        let _ = lines.try_send(format!("{line}\n"));
    })
}

/// The client of a transfer, who has credentials.
struct Client {
    questions: mpsc::Sender<(AuthRequest, oneshot::Sender<Result<Credential>>)>,
    reference: String,
}

impl Client {
    fn new(mut end: End, reference: String) -> Self {
        let (questions, mut waiting) = mpsc::channel::<(AuthRequest, oneshot::Sender<_>)>(1);
        tokio::spawn(async move {
            while let Some((question, answer)) = waiting.recv().await {
                let asked = tokio::time::timeout(PATIENCE, ask(&mut end, &question)).await;
                let _ = answer.send(asked.unwrap_or_else(|_| {
                    Err(Error::deadline_exceeded(format!(
                        "the client did not say which credentials to use for {} within {PATIENCE:?}",
                        question.host
                    )))
                }));
            }
        });
        Client { questions, reference }
    }
}

async fn ask(end: &mut End, question: &AuthRequest) -> Result<Credential> {
    end.send(any::pack(question)).await?;
    let Some(message) = end.recv().await? else {
        return Err(Error::cancelled("the client has closed the stream for credentials without an answer"));
    };
    // The message holds a secret, which no error may.
    let answer: AuthResponse = any::unpack(&message).map_err(|_| {
        Error::invalid_argument("what came over the stream for credentials is no AuthResponse")
    })?;
    Ok(match (answer.auth_type(), answer) {
        (AuthType::None, _) => Credential::Anonymous,
        (AuthType::Credentials, answer) if answer.username.is_empty() && answer.secret.is_empty() => {
            Credential::Anonymous
        }
        // containerd's clients say so of a token.
        (AuthType::Credentials, answer) if answer.username.is_empty() => Credential::Refresh(answer.secret),
        (AuthType::Credentials, answer) => {
            Credential::Password { username: answer.username, secret: answer.secret }
        }
        (_, answer) if answer.secret.is_empty() => Credential::Anonymous,
        (AuthType::Refresh, answer) => Credential::Refresh(answer.secret),
        (AuthType::Header, answer) => Credential::Header(answer.secret),
    })
}

#[async_trait]
impl Credentials for Client {
    async fn ask(&self, host: &str, challenges: &[String]) -> Result<Credential> {
        let question = AuthRequest {
            host: host.to_owned(),
            reference: self.reference.clone(),
            wwwauthenticate: challenges.to_vec(),
        };
        let gone = || Error::cancelled("the client's stream for credentials is over");
        let (answer, answered) = oneshot::channel();
        self.questions.send((question, answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streaming::Streams;
    use crate::streaming::tests::{client, context};

    #[tokio::test]
    async fn a_client_is_asked_over_its_stream() {
        let streams = Streams::default();
        let (requests, mut answers) = client(&streams, "auth");
        let asked = Client::new(streams.take(&context("a"), "auth").unwrap(), "r.io/x:1".into());
        let answering = tokio::spawn(async move {
            let mut seen = Vec::new();
            for (kind, username) in [
                (AuthType::Credentials, "me"),
                (AuthType::Refresh, ""),
                (AuthType::Header, ""),
                (AuthType::None, ""),
                (AuthType::Credentials, ""),
            ] {
                let message = answers.recv().await.unwrap().unwrap();
                seen.push(any::unpack::<AuthRequest>(&message).unwrap());
                let mut answer =
                    AuthResponse { secret: "s".into(), username: username.into(), ..AuthResponse::default() };
                answer.set_auth_type(kind);
                requests.send(Ok(any::pack(&answer))).await.unwrap();
            }
            // Kept open: who closes takes the last answer along.
            (seen, requests, answers)
        });
        let challenges = ["Basic realm=x".to_owned()];
        let mut given = Vec::new();
        for _ in 0..5 {
            given.push(asked.ask("r.io:5000", &challenges).await.unwrap());
        }
        let wanted = [
            Credential::Password { username: "me".into(), secret: "s".into() },
            Credential::Refresh("s".into()),
            Credential::Header("s".into()),
            Credential::Anonymous,
            Credential::Refresh("s".into()),
        ];
        assert!(given == wanted);
        let (seen, ..) = answering.await.unwrap();
        assert_eq!(
            seen[0],
            AuthRequest {
                host: "r.io:5000".into(),
                reference: "r.io/x:1".into(),
                wwwauthenticate: challenges.to_vec()
            }
        );
    }

    #[tokio::test]
    async fn a_client_that_goes_is_an_error_without_a_wait() {
        let streams = Streams::default();
        let (requests, answers) = client(&streams, "auth");
        let asked = Client::new(streams.take(&context("a"), "auth").unwrap(), "r.io/x:1".into());
        drop((requests, answers));
        assert!(matches!(asked.ask("r.io", &[]).await, Err(Error::Cancelled(_))));
    }
}
