//! The command line as a whole: global flags, and the tree of commands.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};

use crate::args::parse_duration;
use crate::client::Client;
use crate::commands;

/// Where gantryd listens unless told otherwise.
const DEFAULT_ADDRESS: &str = "/run/gantry/gantry.sock";

/// Command line client of gantryd, and of any other engine that speaks containerd's API.
///
/// Made for trying things out and for looking inside. Commands and flags follow containerd's ctr.
#[derive(Debug, Parser)]
#[command(name = "ctr", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    command: Command,
}

/// Flags that stand before the command.
#[derive(Debug, Args)]
pub(crate) struct Globals {
    /// Show the full cause of an error
    #[arg(long)]
    pub(crate) debug: bool,
    /// Socket of the engine [default: $GANTRY_ADDRESS, else /run/gantry/gantry.sock]
    #[arg(short, long, value_name = "SOCKET", env = "CONTAINERD_ADDRESS")]
    address: Option<String>,
    /// Time limit for the whole command, as 90s or 1m30s; 0 is none
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
    timeout: Duration,
    /// Time limit for connecting; 0 is none
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
    connect_timeout: Duration,
    /// Namespace to work in
    #[arg(short, long, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    namespace: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Manage containers
    #[command(subcommand, visible_aliases = ["c", "container"])]
    Containers(commands::containers::Command),
    /// Manage content
    #[command(subcommand)]
    Content(commands::content::Command),
    #[command(visible_alias = "event")]
    Events(commands::events::Events),
    Gc(commands::gc::Gc),
    /// Manage images
    #[command(subcommand, visible_aliases = ["image", "i"])]
    Images(commands::images::Command),
    Info(commands::info::Info),
    /// Manage leases
    #[command(subcommand)]
    Leases(commands::leases::Command),
    /// Manage namespaces
    #[command(subcommand, visible_aliases = ["namespace", "ns"])]
    Namespaces(commands::namespaces::Command),
    /// Show what the engine is made of
    #[command(subcommand, visible_alias = "plugin")]
    Plugins(commands::plugins::Command),
    Run(Box<commands::run::Run>),
    /// Manage snapshots
    #[command(visible_alias = "snapshot")]
    Snapshots(commands::snapshots::Snapshots),
    /// Manage tasks, the running side of containers
    #[command(subcommand, visible_aliases = ["t", "task"])]
    Tasks(commands::tasks::Command),
    Version(commands::version::Version),
}

impl Cli {
    /// Runs the command; the code is what ctr exits with.
    pub(crate) async fn run(self) -> anyhow::Result<ExitCode> {
        let timeout = self.globals.timeout;
        let work = self.dispatch();
        if timeout.is_zero() {
            return work.await;
        }
        match tokio::time::timeout(timeout, work).await {
            Ok(result) => result,
            Err(_) => bail!("not finished within the --timeout of {timeout:?}"),
        }
    }

    async fn dispatch(self) -> anyhow::Result<ExitCode> {
        let globals = self.globals;
        if let Command::Version(command) = self.command {
            return command.run(globals.connect()).await;
        }
        let client = globals.connect().await?;
        let done = match self.command {
            // These end with the code of a process.
            Command::Run(command) => return command.run(client).await,
            Command::Tasks(command) => return command.run(client).await,
            Command::Containers(command) => command.run(client).await,
            Command::Content(command) => command.run(client).await,
            Command::Events(command) => command.run(client).await,
            Command::Gc(command) => command.run(client).await,
            Command::Images(command) => command.run(client).await,
            Command::Info(command) => command.run(client).await,
            Command::Leases(command) => command.run(client).await,
            Command::Namespaces(command) => command.run(client).await,
            Command::Plugins(command) => command.run(client).await,
            Command::Snapshots(command) => command.run(client).await,
            Command::Version(_) => Ok(()),
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}

impl Globals {
    async fn connect(&self) -> anyhow::Result<Client> {
        let address = match &self.address {
            Some(address) => address.clone(),
            None => std::env::var("GANTRY_ADDRESS").unwrap_or_else(|_| DEFAULT_ADDRESS.to_owned()),
        };
        let connecting = Client::connect(&address, &self.namespace);
        if self.connect_timeout.is_zero() {
            return connecting.await;
        }
        tokio::time::timeout(self.connect_timeout, connecting)
            .await
            .with_context(|| format!("no answer from {address} within {:?}", self.connect_timeout))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn containerds_spellings_parse() {
        for line in [
            "ctr -a /x.sock -n k8s.io images ls -q",
            "ctr --address /x.sock --namespace n i ls name==a",
            "ctr image import --base-name foo/bar --digests --no-unpack --all-platforms -",
            "ctr images export out.tar a b --platform linux/arm64",
            "ctr images rm --sync a b",
            "ctr images tag --force a b",
            "ctr run --rm -t --env A=b --mount type=bind,src=/a,dst=/b,options=rbind:ro img id sh -c true --rm",
            "ctr run -d --net-host --memory-limit 1000000 --cpus 0.5 --cpu-shares 10 --privileged img id",
            "ctr run --cap-add CAP_SYS_ADMIN --cap-drop CAP_CHOWN --user 1:2 --cwd / --hostname h img id",
            "ctr run --config spec.json id",
            "ctr run --rootfs /r id -- -x",
            "ctr run --cgroup= --runtime io.containerd.runc.v2 --runc-binary crun --snapshotter native img id",
            "ctr c ls -q labels.a==b",
            "ctr container create img id cmd -x",
            "ctr containers delete --keep-snapshot a b",
            "ctr containers label a k=v k2=",
            "ctr t exec --exec-id e -t id sh -c x",
            "ctr tasks exec --exec-id e --user root --cwd /tmp id ls -l",
            "ctr task kill -s SIGKILL -a id",
            "ctr tasks kill --exec-id e --signal 9 id",
            "ctr tasks rm -f a b",
            "ctr tasks metrics --format json id",
            "ctr task start -d id",
            "ctr snapshots --snapshotter native ls",
            "ctr snapshot prepare --mounts k p",
            "ctr snapshots mounts /mnt k",
            "ctr snapshots usage -b k",
            "ctr content get DIGEST",
            "ctr content ingest --expected-digest DIGEST --expected-size 3 ref",
            "ctr events topic==/tasks/exit",
            "ctr gc --format json",
            "ctr gc --explain DIGEST",
            "ctr gc --explain key --snapshotter native",
            "ctr ns create n a=b",
            "ctr namespaces rm -c n",
            "ctr leases create --id x -x 1h a=b",
            "ctr plugins ls -d",
            "ctr plugin ls --format json",
            "ctr --timeout 1m30s --connect-timeout 5s version",
        ] {
            let line = line.replace("DIGEST", &format!("sha256:{}", "0".repeat(64)));
            if let Err(error) = parse(&line) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn flags_after_the_command_belong_to_the_process() {
        let cli = parse("ctr run img id ls --rm -t --help").unwrap();
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert!(!run.rm && run.spec.arguments == ["img", "id", "ls", "--rm", "-t", "--help"]);
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "ctr run --rm -d img id",
            "ctr run --memory-limit lots img id",
            "ctr --timeout soon version",
            "ctr images rm",
            "ctr gc --snapshotter native",
            "ctr tasks exec id ls",
            "ctr tasks kill --exec-id e -a id",
            "ctr nothing",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
