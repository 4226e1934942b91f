//! The `delete` action: cleans up after a shim that died. It may run at any time and any number of times.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use prost::Message;
use shim_api::task::DeleteResponse;
use shim_api::{Error, Result};
use sys::reaper::Reaper;

use crate::args::Args;
use crate::options::Options;
use crate::rootfs;
use crate::runc::Runtime;
use crate::sandbox;

/// 128 + SIGKILL: nobody saw how the container ended.
const KILLED: u32 = 137;

/// Does it; answers the bytes for stdout. What cannot be cleaned up is a warning on stderr: there is nothing else
/// the engine could do about it.
pub(crate) fn delete(args: &Args) -> Result<Vec<u8>> {
    let bundle = bundle(args)?;
    let options = Options::read(&bundle);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::internal(format!("start tokio: {error}")))?;
    runtime.block_on(async {
        let reaper = Reaper::start().map_err(|error| Error::internal(format!("watch SIGCHLD: {error}")))?;
        let runc = Runtime::new(reaper, &args.namespace, &args.id, &bundle, &options);
        if let Err(error) = runc.delete(true).await {
            eprintln!("warning: {error}");
        }
        Ok::<_, Error>(())
    })?;
    sys::failpoint!("shim.cleanup.runtime");
    if let Err(error) = rootfs::unmount_now(&bundle.join("rootfs")) {
        eprintln!("warning: {error}");
    }
    sys::failpoint!("shim.cleanup.unmounted");
    if let Err(error) = sandbox::unmake(&bundle) {
        eprintln!("warning: take down the sandbox: {error}");
    }
    remove_dead_socket(&bundle);
    let pid = fs::read_to_string(bundle.join("init.pid")).ok().and_then(|text| text.trim().parse().ok());
    Ok(DeleteResponse {
        pid: pid.unwrap_or(0),
        exit_status: KILLED,
        exited_at: Some(SystemTime::now().into()),
    }
    .encode_to_vec())
}

/// The bundle as given; else the one beside the working folder that has the container's name.
fn bundle(args: &Args) -> Result<PathBuf> {
    if !args.bundle.as_os_str().is_empty() {
        return Ok(args.bundle.clone());
    }
    let here =
        std::env::current_dir().map_err(|error| Error::internal(format!("find the bundle: {error}")))?;
    Ok(here.parent().unwrap_or(&here).join(&args.id))
}

/// The shim's socket, unless a shim of other containers of the group serves it.
fn remove_dead_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else { return };
    if let Ok(path) = shim_api::transport::socket_path(address.trim()) {
        let dead = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
        if UnixStream::connect(path).is_err_and(dead) {
            let _ = fs::remove_file(path);
        }
    }
}
