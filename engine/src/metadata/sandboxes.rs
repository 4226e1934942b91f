//! Records of sandboxes: `sandboxes NAMESPACE ID`, the API's own message.

use proto::containerd::types::Sandbox;

use super::Record;

impl Record for Sandbox {
    const TABLE: &'static str = "sandboxes";
}
