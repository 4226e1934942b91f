//! The fields of containerd's events, for filters: `event.container_id==web`.

use std::borrow::Cow;

use prost::{Message, Name};
use prost_types::Any;
use proto::containerd::events as e;
use proto::containerd::services::images::v1 as images;

/// The value of a field of an event; None for an unknown event or field, as for an absent one.
pub(super) fn of<'a>(event: &Any, path: &[&str]) -> Option<Cow<'a, str>> {
    macro_rules! table {
        ($($event:ty { $($field:ident),* $(; $labels:ident)? })*) => {
            $(
                if let Some(event) = decode::<$event>(event) {
                    return match path {
                        $([stringify!($field)] => Some(event.$field.to_string().into()),)*
                        $([stringify!($labels), rest @ ..] => event.$labels.get(&rest.join(".")).cloned().map(Into::into),)?
                        _ => None,
                    };
                }
            )*
        };
    }
    table! {
        e::TaskCreate { container_id, bundle, checkpoint, pid }
        e::TaskStart { container_id, pid }
        e::TaskExit { container_id, id, pid, exit_status }
        e::TaskDelete { container_id, id, pid, exit_status }
        e::TaskOom { container_id }
        e::TaskExecAdded { container_id, exec_id }
        e::TaskExecStarted { container_id, exec_id, pid }
        e::TaskPaused { container_id }
        e::TaskResumed { container_id }
        e::TaskCheckpointed { container_id, checkpoint }
        e::ContainerCreate { id, image }
        e::ContainerUpdate { id, image, snapshot_key; labels }
        e::ContainerDelete { id }
        images::ImageCreate { name; labels }
        images::ImageUpdate { name; labels }
        images::ImageDelete { name }
        e::NamespaceCreate { name; labels }
        e::NamespaceUpdate { name; labels }
        e::NamespaceDelete { name }
        e::SnapshotPrepare { key, parent, snapshotter }
        e::SnapshotCommit { key, name, snapshotter }
        e::SnapshotRemove { key, snapshotter }
        e::ContentCreate { digest, size }
        e::ContentDelete { digest }
        e::SandboxCreate { sandbox_id }
        e::SandboxStart { sandbox_id }
        e::SandboxExit { sandbox_id, exit_status }
    }
    None
}

fn decode<M: Message + Name + Default>(event: &Any) -> Option<M> {
    proto::any::is::<M>(event).then(|| proto::any::unpack(event).ok()).flatten()
}
