//! A shim that speaks gRPC, as some outside of containerd do: our own shim, with this program before it that passes each call
//! on. It is for the tests of the engine's side; no shim that Debian has speaks gRPC.
//!
//! `start` starts the shim beside this program and then this program again, as `serve SOCKET SHIM_ADDRESS`; `delete` is
//! the shim's own.

use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use proto::containerd::task::v3::task_server::{Task, TaskServer};
use shim_api::bootstrap::{Answer, Form};
use shim_api::task::*;
use tokio::net::UnixListener;
use tonic::{Request, Response, Status};

struct Bridge(TaskClient);

fn of_shim(error: shim_api::Error) -> Status {
    Status::new(tonic::Code::from_i32(error.code.number()), error.message)
}

macro_rules! bridge {
    ($($served:ident $called:ident $request:ident $answer:ty;)*) => {
        #[tonic::async_trait]
        impl Task for Bridge {
            $(async fn $served(&self, request: Request<$request>) -> Result<Response<$answer>, Status> {
                // What the engine says of itself must be on its calls.
                if request.metadata().get("containerd-namespace").is_none() {
                    return Err(Status::failed_precondition("the call has no namespace"));
                }
                match self.0.$called(request.into_inner()).await {
                    // As a shim that died: no answer, and soon no connection.
                    Err(error) if error.code == shim_api::Code::Closed => std::future::pending().await,
                    answer => answer.map(Response::new).map_err(of_shim),
                }
            })*
        }
    };
}

bridge! {
    state state StateRequest StateResponse;
    create create CreateTaskRequest CreateTaskResponse;
    start start StartRequest StartResponse;
    delete delete DeleteRequest DeleteResponse;
    pids pids PidsRequest PidsResponse;
    pause pause PauseRequest ();
    resume resume ResumeRequest ();
    checkpoint checkpoint CheckpointTaskRequest ();
    kill kill KillRequest ();
    exec exec ExecProcessRequest ();
    resize_pty resize_pty ResizePtyRequest ();
    close_io close_io CloseIoRequest ();
    update update UpdateTaskRequest ();
    wait wait WaitRequest WaitResponse;
    stats stats StatsRequest StatsResponse;
    connect connect_shim ConnectRequest ConnectResponse;
    shutdown shutdown ShutdownRequest ();
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let program = std::env::current_exe()?;
    let shim = program.with_file_name("containerd-shim-runc-v2");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [action, socket, address] = &arguments[..]
        && action == "serve"
    {
        return serve(Path::new(socket), address);
    }
    if arguments.last().map(String::as_str) != Some("start") {
        return Err(Command::new(shim).args(&arguments).exec().into());
    }
    let mut stdin = Vec::new();
    std::io::stdin().read_to_end(&mut stdin)?;
    let mut child =
        Command::new(shim).args(&arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().ok_or("no stdin")?.write_all(&stdin)?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err("the shim did not start".into());
    }
    let address = Answer::parse(&output.stdout)?.address;
    let socket = PathBuf::from(format!("{}.grpc", shim_api::transport::socket_path(&address)?.display()));
    let _ = std::fs::remove_file(&socket);
    let mut bridge = Command::new(program);
    bridge.arg("serve").arg(&socket).arg(&address).process_group(0);
    bridge.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    while !socket.exists() {
        std::thread::yield_now();
    }
    let mut answer = Answer::ttrpc(3, format!("unix://{}", socket.display()));
    answer.protocol = "grpc".into();
    std::io::stdout().write_all(&answer.encode(Form::Json))?;
    Ok(())
}

/// Passes calls on until the shim is gone.
#[tokio::main(flavor = "current_thread")]
async fn serve(socket: &Path, address: &str) -> Result<(), Box<dyn std::error::Error>> {
    let client = TaskClient::connect(address, 3).await?;
    // Bound under another name, so that it is served as soon as it is there.
    let early = socket.with_extension("early");
    let _ = std::fs::remove_file(&early);
    let listener = UnixListener::bind(&early)?;
    std::fs::rename(&early, socket)?;
    let incoming = futures::stream::unfold(listener, |listener| async move {
        let stream = listener.accept().await.map(|(stream, _)| stream);
        Some((stream, listener))
    });
    let server = tonic::transport::Server::builder().add_service(TaskServer::new(Bridge(client.clone())));
    tokio::select! {
        () = client.closed() => {}
        ended = server.serve_with_incoming(incoming) => ended?,
    }
    std::fs::remove_file(socket)?;
    Ok(())
}
