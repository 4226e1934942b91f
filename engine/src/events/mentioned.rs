//! Whom the journal speaks of: containers and sandboxes that there have been, also those that are gone.

use std::collections::BTreeSet;
use std::path::Path;

use prost::Message as _;
use proto::containerd::events::{ContainerCreate, SandboxCreate, TaskCreate};
use proto::containerd::types::Envelope;

use super::segment::scan;

/// The containers and sandboxes that the journal beneath `root` tells of, with their namespaces. What cannot be read is
/// passed over. Blocks.
pub fn mentioned(root: &Path) -> BTreeSet<(String, String)> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(root.join("events")).into_iter().flatten().flatten() {
        let Some(first) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(bytes) = std::fs::read(entry.path()) else { continue };
        scan(&bytes, first, |payload| found.extend(subject(payload)));
    }
    found
}

fn subject(payload: &[u8]) -> Option<(String, String)> {
    let envelope = Envelope::decode(payload).ok()?;
    let event = envelope.event.as_ref()?;
    let id = match envelope.topic.as_str() {
        "/tasks/create" => proto::any::unpack::<TaskCreate>(event).ok()?.container_id,
        "/containers/create" => proto::any::unpack::<ContainerCreate>(event).ok()?.id,
        "/sandboxes/create" => proto::any::unpack::<SandboxCreate>(event).ok()?.sandbox_id,
        _ => return None,
    };
    Some((envelope.namespace, id))
}
