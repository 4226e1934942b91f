//! gantryd: reads its configuration, builds the engine, serves until told to stop, drains, and goes.

use std::io::{BufReader, BufWriter};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use engine::config::{self, Config, Flags};
use engine::daemon::Daemon;
use engine::{metadata, publish};

/// How long file operations under way may take when everything else has ended.
const SHUTDOWN_LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

/// The Gantry container engine.
#[derive(Parser)]
#[command(name = "gantryd", disable_version_flag = true)]
struct Cli {
    #[command(flatten)]
    flags: GlobalFlags,
    /// Print the version
    #[arg(short, long)]
    version: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Args)]
struct GlobalFlags {
    /// The configuration file [default: /etc/gantry/config.toml, if it is there]
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The gRPC socket [default: /run/gantry/gantry.sock]
    #[arg(short, long, global = true, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// The folder of durable state [default: /var/lib/gantry]
    #[arg(long, global = true, value_name = "FOLDER")]
    root: Option<PathBuf>,
    /// The folder of state that a reboot may clear [default: /run/gantry]
    #[arg(long, global = true, value_name = "FOLDER")]
    state: Option<PathBuf>,
    /// trace, debug, info, warn or error [default: info]
    #[arg(short, long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Print the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Publish an event, read as a protobuf Any from stdin (shims call this)
    Publish(publish::Publish),
    /// Move the metadata to or from a plain file; gantryd must be stopped
    #[command(subcommand)]
    Metadata(MetadataCommand),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// The defaults
    Default,
    /// What file and flags resolve to
    Dump,
    /// The file, in the newest version
    Migrate,
}

#[derive(Subcommand)]
enum MetadataCommand {
    /// Write all metadata to a file, one JSON object a line
    Export {
        /// The file, or - for stdout
        file: PathBuf,
    },
    /// Make new metadata from such a file, in a root that has none
    Import {
        /// The file, or - for stdin
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gantryd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if cli.version {
        println!("gantryd github.com/gantry-project/gantry {} {}", engine::VERSION, engine::REVISION);
        return Ok(());
    }
    let GlobalFlags { config, address, root, state, log_level } = cli.flags;
    let flags = Flags { config, address, root, state, log_level };
    match cli.command {
        None => serve(&flags),
        Some(Command::Config(ConfigCommand::Default)) => print_text(&config::default_file()?),
        Some(Command::Config(ConfigCommand::Dump)) => print_text(&config::dump(&flags)?),
        Some(Command::Config(ConfigCommand::Migrate)) => print_text(&config::migrate(&flags)?),
        Some(Command::Publish(command)) => {
            // Shims pass the address of their engine, which need not be the configured one.
            let address = match &flags.address {
                Some(address) => address.clone(),
                None => Config::resolve(&flags)?.grpc.path,
            };
            runtime()?.block_on(command.run(&address))
        }
        Some(Command::Metadata(command)) => move_metadata(&Config::resolve(&flags)?, &command),
    }
}

fn serve(flags: &Flags) -> anyhow::Result<()> {
    let config = &Config::resolve(flags)?;
    if !rustix::process::geteuid().is_root() {
        anyhow::bail!("gantryd must run as root: it makes mounts, namespaces and cgroups; try sudo gantryd");
    }
    let set_level = log_to_stderr(config);
    let reload = || {
        let config = Config::resolve(flags)?;
        set_level(&config)?;
        Ok(config)
    };
    let runtime = runtime()?;
    let outcome = runtime.block_on(async { Daemon::build(config).await?.run(&reload).await });
    // A disk that hangs is not to keep the engine from ending; what is acknowledged is on disk already.
    runtime.shutdown_timeout(SHUTDOWN_LIMIT);
    outcome
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |cores| cores.get().min(4)))
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}

/// Begins to log; what changes the level later.
fn log_to_stderr(config: &Config) -> impl Fn(&Config) -> anyhow::Result<()> + use<> {
    use tracing_subscriber::filter::Targets;
    use tracing_subscriber::prelude::*;
    // At debug and trace, the libraries below say too much for anyone but their authors.
    let targets = |config: &Config| {
        Targets::new()
            .with_default(config.log_level.min(tracing::Level::INFO))
            .with_target("engine", config.log_level)
            .with_target("gantryd", config.log_level)
            .with_target("shim_api", config.log_level)
            .with_target("snapshotter", config.log_level)
    };
    let (ours, handle) = tracing_subscriber::reload::Layer::new(targets(config));
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let registry = tracing_subscriber::registry().with(ours);
    if config.log_json {
        registry.with(layer.json()).init();
    } else {
        registry.with(layer).init();
    }
    move |config| handle.reload(targets(config)).context("cannot change the log level")
}

fn move_metadata(config: &Config, command: &MetadataCommand) -> anyhow::Result<()> {
    let dir = config.root.join(engine::daemon::METADATA_FOLDER);
    let dash = std::path::Path::new("-");
    let records = match command {
        MetadataCommand::Export { file } if file == dash => {
            metadata::export(&dir, &mut BufWriter::new(std::io::stdout().lock()))?
        }
        MetadataCommand::Export { file } => {
            let out = std::fs::File::create_new(file)
                .with_context(|| format!("cannot create {}", file.display()))?;
            let records = metadata::export(&dir, &mut BufWriter::new(&out)).inspect_err(|_| {
                let _ = std::fs::remove_file(file);
            })?;
            out.sync_all().with_context(|| format!("cannot sync {}", file.display()))?;
            records
        }
        MetadataCommand::Import { file } if file == dash => {
            metadata::import(&dir, &mut std::io::stdin().lock())?
        }
        MetadataCommand::Import { file } => {
            let file =
                std::fs::File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
            metadata::import(&dir, &mut BufReader::new(file))?
        }
    };
    eprintln!("{records} records");
    Ok(())
}

fn print_text(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to stdout")
}
