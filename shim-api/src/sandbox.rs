//! The sandbox service of a shim: what containers of one pod share, made and ended by itself.
//!
//! ```text
//! (none) --create--> created --start--> ready --stop--> stopped --shutdown--> the shim ends
//! ```
//!
//! A shim need not offer it; one that does not answers Unimplemented.

use std::time::Duration;

use crate::service::define_service;
use crate::transport::Connection;

pub use proto::containerd::runtime::sandbox::v1::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};

/// The service's name on the wire.
pub const SERVICE_NAME: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// A connection to one shim's sandbox service; clones share it.
#[derive(Clone)]
pub struct SandboxClient {
    connection: Connection,
    service: &'static str,
    deadline: Duration,
}

impl SandboxClient {
    pub(crate) fn over(connection: Connection, deadline: Duration) -> Self {
        SandboxClient { connection, service: SERVICE_NAME, deadline }
    }
}

define_service! {
    /// What a shim does for its engine about the sandbox that it is.
    trait SandboxService, client SandboxClient, names [SERVICE_NAME];

    /// Takes over what the sandbox is to be; nothing of it runs yet.
    create_sandbox "CreateSandbox" CreateSandboxRequest CreateSandboxResponse, limited Finish;
    /// Makes the sandbox.
    start_sandbox "StartSandbox" StartSandboxRequest StartSandboxResponse, limited Finish;
    /// What the sandbox's containers will run on.
    platform "Platform" PlatformRequest PlatformResponse, limited Finish;
    /// Ends the sandbox; the shim stays.
    stop_sandbox "StopSandbox" StopSandboxRequest StopSandboxResponse, limited Finish;
    /// Answers when the sandbox has ended.
    wait_sandbox "WaitSandbox" WaitSandboxRequest WaitSandboxResponse, unlimited Drop;
    /// What the sandbox is now.
    sandbox_status "SandboxStatus" SandboxStatusRequest SandboxStatusResponse, limited Finish;
    /// Answers while the sandbox lives.
    ping_sandbox "PingSandbox" PingRequest PingResponse, limited Finish;
    /// Ends the shim, and the sandbox if it has not ended.
    shutdown_sandbox "ShutdownSandbox" ShutdownSandboxRequest ShutdownSandboxResponse, limited Finish;
    /// Resource use of the sandbox itself.
    sandbox_metrics "SandboxMetrics" SandboxMetricsRequest SandboxMetricsResponse, limited Finish;
}
