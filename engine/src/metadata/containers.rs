//! Records of containers: `containers NAMESPACE ID`, the API's own message, the spec kept byte for byte.

use proto::containerd::services::containers::v1::Container;

use super::Record;

impl Record for Container {
    const TABLE: &'static str = "containers";
}
