//! The `start` action: finds the shim of the container's group or starts one, and answers where it listens.
//!
//! The socket is `<socket folder>/sha256hex(<engine's address>/<namespace>/<group>)`, bound here before the shim
//! runs, so that whoever gets the answer can connect at once. A folder lock keeps two starts apart: of two that find
//! the socket of a dead shim only one may replace it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use shim_api::bootstrap::{Answer, DEFAULT_SOCKET_DIR, Form, Generation, Launch};
use shim_api::{Error, Result};

use crate::args::Args;
use crate::bundle::{self, Config};
use crate::options::Options;

/// Does it; answers the bytes for stdout.
pub(crate) fn start(args: &Args, stdin: &[u8]) -> Result<Vec<u8>> {
    let (generation, launch) = Launch::read(stdin, &args.id, &args.namespace)?;
    let here =
        std::env::current_dir().map_err(|error| Error::internal(format!("find the bundle: {error}")))?;
    let config = Config::read_if_there(&here)?;
    let options = Options::from_any(launch.options.as_ref())?;
    let folder = launch.socket_dir.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET_DIR));
    let path = folder.join(socket_name(&args.address, &args.namespace, config.group(&args.id)));
    let address = format!("unix://{}", path.display());

    make_folder(&folder)?;
    let lock = sys::process::lock_folder(&folder)
        .map_err(|error| Error::internal(format!("lock {}: {error}", folder.display())))?;
    if let Some(listener) = bind_unless_served(&path)? {
        sys::failpoint!("shim.start.bound");
        let started = spawn(args, &launch, listener).and_then(|pid| {
            sys::failpoint!("shim.start.spawned");
            let settled = settle(pid, &options);
            // shim.pid is for people and for containerd 1.x.
            settled.and_then(|()| bundle::write(&here, "shim.pid", pid.to_string().as_bytes()))
        });
        if let Err(error) = started {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
    }
    drop(lock);
    // Engines 1.6 and 1.7 find the shim by this file after their restart.
    bundle::write(&here, "address", address.as_bytes())?;
    sys::failpoint!("shim.start.addressed");
    Ok(match generation {
        // Every engine that sends options takes a bare address, and version 2 with it; JSON only some.
        Generation::Options => Answer::ttrpc(2, address).encode(Form::Bare),
        Generation::Params => Answer::ttrpc(3, address).encode(Form::Protobuf),
    })
}

fn socket_name(engine: &str, namespace: &str, group: &str) -> String {
    let parts = [engine.trim_end_matches('/'), namespace, group];
    let key = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
    oci::Digest::sha256_of(key.as_bytes()).hex().to_owned()
}

fn make_folder(folder: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(folder)
        .map_err(|error| Error::internal(format!("make the socket folder {}: {error}", folder.display())))
}

/// Binds the socket; `None` when a live shim serves it.
fn bind_unless_served(path: &Path) -> Result<Option<UnixListener>> {
    let failed =
        |what: &str, error: &io::Error| Error::internal(format!("{what} {}: {error}", path.display()));
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            fs::remove_file(path).map_err(|error| failed("remove the dead socket", &error))?;
            UnixListener::bind(path)
        }
        other => other,
    };
    let listener = listener.map_err(|error| failed("listen on", &error))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(|error| failed("restrict", &error))?;
    Ok(Some(listener))
}

/// Starts this program as the shim: in a session of its own, with nothing open but the socket, as descriptor 3.
fn spawn(args: &Args, launch: &Launch, listener: UnixListener) -> Result<u32> {
    let program =
        std::env::current_exe().map_err(|error| Error::internal(format!("find myself: {error}")))?;
    let mut command = Command::new(&program);
    command.args(["-namespace", &args.namespace, "-id", &args.id, "-address", &args.address]);
    command.args(["-publish-binary", &args.publish_binary]);
    if args.debug || launch.log_level < 0 {
        command.arg("-debug");
    }
    if !launch.ttrpc_address.is_empty() {
        command.env("TTRPC_ADDRESS", &launch.ttrpc_address);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    sys::process::detach(&mut command);
    sys::process::pass_descriptors(&mut command, vec![listener.into()]);
    let child = command.spawn();
    let child = child.map_err(|error| Error::internal(format!("start {}: {error}", program.display())))?;
    // Not waited for: it outlives us.
    Ok(child.id())
}

/// Puts the shim into its cgroup, and makes it a little more killable than the engine.
fn settle(pid: u32, options: &Options) -> Result<()> {
    if !options.shim_cgroup.is_empty() {
        sys::cgroup::add_process(&options.shim_cgroup, pid).map_err(|error| {
            Error::internal(format!("put the shim into cgroup {}: {error}", options.shim_cgroup))
        })?;
    }
    let engine = std::os::unix::process::parent_id();
    let score = sys::process::oom_score_adj(Some(engine));
    score
        .and_then(|score| sys::process::set_oom_score_adj(Some(pid), score + 1))
        .map_err(|error| Error::internal(format!("set the shim's oom_score_adj: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_where_go_shims_put_it() {
        // printf %s /run/containerd/containerd.sock/default/web | sha256sum
        assert_eq!(
            socket_name("/run/containerd/containerd.sock", "default", "web"),
            "2cde4450fa38c74f53603e01d2afd903b315a27a596f12a151414cd59897d883"
        );
    }
}
