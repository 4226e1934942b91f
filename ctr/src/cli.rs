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
#[command(name = "ctr", version, disable_version_flag = true, max_term_width = 100)]
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
    /// Print ctr's version
    #[arg(short = 'v', short_alias = 'V', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
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
    /// Show what a later engine will not do
    #[command(subcommand)]
    Deprecations(commands::deprecations::Command),
    Df(commands::df::Df),
    #[command(visible_alias = "event")]
    Events(commands::events::Events),
    Gc(commands::gc::Gc),
    /// Manage images
    #[command(subcommand, visible_aliases = ["image", "i"])]
    Images(commands::images::Command),
    Info(commands::info::Info),
    Install(commands::install::Install),
    /// Manage leases
    #[command(subcommand)]
    Leases(commands::leases::Command),
    /// Manage namespaces
    #[command(subcommand, visible_aliases = ["namespace", "ns"])]
    Namespaces(commands::namespaces::Command),
    /// Tools around the OCI's formats
    #[command(subcommand)]
    Oci(commands::oci::Command),
    /// Show what the engine is made of
    #[command(subcommand, visible_alias = "plugin")]
    Plugins(commands::plugins::Command),
    Run(Box<commands::run::Run>),
    /// Manage sandboxes, the pods that containers share
    #[command(subcommand, visible_aliases = ["sandbox", "sb", "s"])]
    Sandboxes(commands::sandboxes::Command),
    Shim(Box<commands::shim::Shim>),
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
        // These ask no engine.
        if let Command::Oci(command) = self.command {
            return command.run(&globals.namespace).map(|()| ExitCode::SUCCESS);
        }
        if let Command::Shim(command) = self.command {
            return command.run(&globals.address(), &globals.namespace).await;
        }
        let client = globals.connect().await?;
        let done = match self.command {
            // These end with the code of a process.
            Command::Run(command) => return command.run(client).await,
            Command::Tasks(command) => return command.run(client).await,
            Command::Containers(command) => return command.run(client).await,
            Command::Content(command) => command.run(client).await,
            Command::Deprecations(command) => command.run(client).await,
            Command::Df(command) => command.run(client).await,
            Command::Events(command) => command.run(client).await,
            Command::Gc(command) => command.run(client).await,
            Command::Images(command) => command.run(client).await,
            Command::Info(command) => command.run(client).await,
            Command::Install(command) => command.run(client).await,
            Command::Leases(command) => command.run(client).await,
            Command::Namespaces(command) => command.run(client).await,
            Command::Plugins(command) => command.run(client).await,
            Command::Sandboxes(command) => command.run(client).await,
            Command::Snapshots(command) => command.run(client).await,
            Command::Oci(_) | Command::Shim(_) | Command::Version(_) => Ok(()),
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}

impl Globals {
    /// The engine's socket.
    fn address(&self) -> String {
        match &self.address {
            Some(address) => address.clone(),
            None => std::env::var("GANTRY_ADDRESS").unwrap_or_else(|_| DEFAULT_ADDRESS.to_owned()),
        }
    }

    async fn connect(&self) -> anyhow::Result<Client> {
        let address = self.address();
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
            "ctr run --uidmap 0:1000:10 --uidmap 10:5000:5 --gidmap 0:1000:10,10:5000:5 --remap-labels img id",
            "ctr run --cgroup= --runtime io.containerd.runc.v2 --runc-binary crun --snapshotter native img id",
            "ctr c ls -q labels.a==b",
            "ctr container create img id cmd -x",
            "ctr containers delete --keep-snapshot a b",
            "ctr containers label a k=v k2=",
            "ctr containers checkpoint --rw --image --task c example.org/saved:1",
            "ctr c restore --rw --live c example.org/saved:1",
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
            "ctr events --from 7 --format json namespace==x",
            "ctr gc --format json",
            "ctr gc --explain DIGEST",
            "ctr gc --explain key --snapshotter native",
            "ctr images check -q name==a",
            "ctr i convert --uncompress --oci --platform linux/amd64 --platform linux/arm64 a b",
            "ctr images mount --rw -x 5m img /mnt",
            "ctr images unmount --rm /mnt",
            "ctr images import --compress-blobs --sync-fs in.tar",
            "ctr i pull -k --user a:b --platform linux/arm64 --platform linux/amd64 --skip-unpack --label a=b img",
            "ctr images pull --plain-http --hosts-dir /d --http-dump --http-trace --max-concurrent-downloads 3 --local img",
            "ctr images pull --all-platforms --skip-metadata --refresh t --print-chainid --snapshotter native -q img",
            "ctr images push --tlscacert a --tlscert b --tlskey c --platform linux/arm64 remote local",
            "ctr images push --manifest DIGEST --manifest-type t --max-concurrent-uploaded-layers 2 remote",
            "ctr content fetch --all-platforms --all-metadata -u a img",
            "ctr content fetch --metadata-only img",
            "ctr content fetch-object --plain-http img DIGEST",
            "ctr content fetch-blob --media-type t -u a:b img DIGEST DIGEST",
            "ctr content push-object -k img DIGEST t",
            "ctr snapshots --snapshotter native diff --keep --media-type t --ref r --label a=b x y",
            "ctr snapshot tree",
            "ctr snapshots unpack DIGEST",
            "ctr content prune references --async --dry",
            "ctr content edit --editor vi DIGEST",
            "ctr sandboxes run --runtime r pod.json id",
            "ctr sb ls --filters labels.a==b",
            "ctr sandbox rm -f a b",
            "ctr shim --id c exec --attach -t --stdin a --stdout b --spec f e",
            "ctr shim --shim-address unix:///x state --api-version 2 -t c",
            "ctr install -l -r --path /opt img",
            "ctr oci spec --platform linux/arm64",
            "ctr deprecations list --format json",
            "ctr tasks checkpoint id",
            "ctr tasks checkpoint --exit --image-path a --work-path b id",
            "ctr plugins inspect-runtime --runtime r --runtime-config-path p",
            "ctr run --seccomp --seccomp-profile f --apparmor-profile p --rdt-class c img id",
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

    /// What `docs/ctr.md` lists: every command with its aliases and what it does.
    fn listed(command: &clap::Command, path: &str, text: &mut String) {
        for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
            let path = format!("{path} {}", command.get_name());
            let aliases: Vec<&str> = command.get_visible_aliases().collect();
            let aliases = match aliases.is_empty() {
                true => String::new(),
                false => format!(" ({})", aliases.join(", ")),
            };
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(!about.is_empty(), "{path} says nothing of itself");
            if !command.has_subcommands() {
                text.push_str(&format!("| `{path}`{aliases} | {} |\n", about.replace('|', "\\|")));
            }
            listed(command, &path, text);
        }
    }

    #[test]
    fn the_documentation_lists_every_command() {
        let mut table = String::new();
        listed(&Cli::command(), "ctr", &mut table);
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/ctr.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (before, rest) = text.split_once("|---|---|\n").unwrap();
        let (old, after) = rest.split_once("\n\n").unwrap();
        if std::env::var_os("GANTRY_WRITE_DOCS").is_some() {
            std::fs::write(path, format!("{before}|---|---|\n{table}\n{after}")).unwrap();
        } else {
            assert_eq!(
                old.trim(),
                table.trim(),
                "write it anew: GANTRY_WRITE_DOCS=1 cargo test -p gantry-ctr documentation"
            );
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
            "ctr run --uidmap 0:1000:10 img id",
            "ctr run --uidmap 0:1000 --gidmap 0:1000:1 img id",
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
