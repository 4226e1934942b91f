//! The Transfer service: one call from one place to another, with its progress shown while it lasts.
//!
//! A transfer that is interrupted is given up by the engine, in order; ctr waits for that, so that whoever comes next finds
//! nothing half done, but a second signal ends it at once.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use oci::Platform;
use oci::image::{Descriptor, media_type};
use oci::platform::Matcher;
use prost_types::Any;
use proto::any;
use proto::containerd::services::transfer::v1::{TransferOptions, TransferRequest};
use proto::containerd::types;
use proto::containerd::types::transfer::Progress as Event;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::client::{Client, Failure};
use crate::display::Display;
use crate::lease::Interruption;
use crate::streams::Stream;
use crate::{content, image, output};

/// How long the engine may take to end a transfer that was given up, and to tell the last of one that is done.
const ORDERLY: Duration = Duration::from_secs(10);

/// An image that a transfer has given a name.
pub(crate) struct Saved {
    pub(crate) name: String,
    pub(crate) digest: String,
}

/// Somebody has ended ctr by a signal.
#[derive(Debug)]
pub(crate) struct Interrupted {
    /// The signal's number: the exit code is 128 more.
    pub(crate) signal: u8,
    /// What becomes of what was done.
    pub(crate) note: &'static str,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted{}", self.note)
    }
}

impl std::error::Error for Interrupted {}

/// One call of the service.
pub(crate) struct Transfer<'a> {
    pub(crate) source: Any,
    pub(crate) destination: Any,
    /// Completes "cannot …".
    pub(crate) what: String,
    /// What is said when it is interrupted.
    pub(crate) note: &'static str,
    pub(crate) display: &'a Display,
}

impl Transfer<'_> {
    /// Makes the call, and does what belongs to it (`beside`: sending or receiving an archive) at the same time. An error of
    /// that ends the call. What got a name is returned.
    pub(crate) async fn run(
        self,
        client: &Client,
        beside: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<Vec<Saved>> {
        let mut interruption = Interruption::listen()?;
        let saved: Arc<Mutex<Vec<Saved>>> = Arc::default();
        let mut telling: Option<JoinHandle<()>> = None;
        let work = async {
            let progress = Stream::open(client, "progress").await?;
            let request = TransferRequest {
                source: Some(self.source),
                destination: Some(self.destination),
                options: Some(TransferOptions { progress_stream: progress.id.clone() }),
            };
            telling = Some(tokio::spawn(tell_of(progress, self.display.clone(), saved.clone())));
            let mut service = client.transfer();
            let call = service.transfer(request);
            tokio::pin!(call, beside);
            tokio::select! {
                done = &mut call => {
                    done.map_err(|status| failed(&self.what, status))?;
                    // An archive that is received may still be on its last way.
                    beside.await
                }
                done = &mut beside => {
                    done?;
                    call.await.map(drop).map_err(|status| failed(&self.what, status))
                }
            }
        };
        let done = tokio::select! {
            done = self.display.during(work) => done,
            signal = interruption.next() => Err(Interrupted { signal, note: self.note }.into()),
        };
        if let Some(mut telling) = telling {
            // The engine closes the stream when it has ended in order.
            let ended = tokio::select! {
                ended = tokio::time::timeout(ORDERLY, &mut telling) => ended.is_ok(),
                _ = interruption.next() => false,
            };
            if !ended {
                telling.abort();
            }
        }
        done?;
        let mut saved = saved.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *saved))
    }
}

/// Shows what the engine tells, and keeps which images have names.
async fn tell_of(mut progress: Stream, display: Display, saved: Arc<Mutex<Vec<Saved>>>) {
    while let Some(message) = progress.message().await {
        let Ok(event) = any::unpack::<Event>(&message) else { continue };
        display.apply(&event);
        if event.event == "saved" {
            let digest = event.desc.unwrap_or_default().digest;
            saved.lock().unwrap_or_else(PoisonError::into_inner).push(Saved { name: event.name, digest });
        }
    }
}

/// The error of a call: an engine that has gone is told from one that refuses.
fn failed(what: &str, status: Status) -> anyhow::Error {
    let broken = std::error::Error::source(&status).is_some();
    if broken && matches!(status.code(), Code::Unknown | Code::Unavailable | Code::Internal | Code::Cancelled)
    {
        return anyhow::anyhow!(
            "cannot {what}: the engine has gone away ({}); see its log, start it again and repeat the command",
            status.message()
        );
    }
    let unimplemented = status.code() == Code::Unimplemented;
    let error = anyhow::Error::from(Failure::new(what, status));
    match unimplemented {
        true => error.context(
            "the engine's Transfer service is missing or does not do this (containerd has it since 1.7)",
        ),
        false => error,
    }
}

/// A platform as the API has it.
pub(crate) fn wire(platform: &Platform) -> types::Platform {
    types::Platform {
        os: platform.os.clone(),
        architecture: platform.architecture.clone(),
        variant: platform.variant.clone(),
        os_version: platform.os_version.clone(),
        os_features: platform.os_features.clone(),
    }
}

/// Says which images have names now.
pub(crate) fn tell(saved: &[Saved], quiet: bool) -> anyhow::Result<()> {
    saved.iter().try_for_each(|image| match quiet {
        true => output::line(&image.name),
        false => output::line(format!("saved {} ({})", image.name, image.digest)),
    })
}

/// Lets the layers' blobs of images go: their manifests hold them no more.
pub(crate) async fn discard_layers(client: &Client, saved: &[Saved]) -> anyhow::Result<()> {
    for Saved { name, .. } in saved {
        let target = image::target(&image::get(client, name).await?)?;
        let manifests = |blob: &Descriptor| media_type::is_manifest(&blob.media_type);
        for blob in image::survey(client, &target, &Matcher::all()).await?.blobs.into_iter().filter(manifests)
        {
            content::release_layers(client, &blob.digest)
                .await
                .with_context(|| format!("cannot let the layers of {name} go"))?;
        }
    }
    Ok(())
}
