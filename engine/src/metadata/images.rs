//! Records of images: `images NAMESPACE NAME`, the API's own message.

use proto::containerd::services::images::v1::Image;

use super::Record;

impl Record for Image {
    const TABLE: &'static str = "images";
}
