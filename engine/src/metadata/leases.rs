//! Records of leases: `leases NAMESPACE ID`, and of what they hold: `lease-resources NAMESPACE LEASE TYPE ID`.

use proto::containerd::services::leases::v1::Lease;

use super::Record;

impl Record for Lease {
    const TABLE: &'static str = "leases";
}

/// That a lease holds a resource; the key says all.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseResource {}

impl Record for LeaseResource {
    const TABLE: &'static str = "lease-resources";
}
