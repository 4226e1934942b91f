//! gantryd: reads its configuration, builds the engine, serves until told to stop, drains, and goes.

use std::io::{BufReader, BufWriter};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use engine::config::{self, Config, Flags};
use engine::daemon::{Control, Daemon};
use engine::http::SetLevel;
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
    /// Look for what is lost or has no owner; gantryd must be stopped, containers may run
    ///
    /// Exits with 0 when nothing is lost or leaked, 1 when something is, and 2 when it cannot be checked. docs/reliability.md
    /// says what is looked at.
    Check(Check),
}

#[derive(Args)]
struct Check {
    /// Read every blob, and every file of unpacked layers
    #[arg(long)]
    deep: bool,
    /// Mend what can be mended, and say what was done
    #[arg(long)]
    repair: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
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
    let failure =
        if matches!(cli.command, Some(Command::Check(_))) { ExitCode::from(2) } else { ExitCode::FAILURE };
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("gantryd: {error:#}");
            failure
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    if cli.version {
        println!("gantryd github.com/gantry-project/gantry {} {}", engine::VERSION, engine::REVISION);
        return Ok(ExitCode::SUCCESS);
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
        Some(Command::Check(command)) => return check(&Config::resolve(&flags)?, &command),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn check(config: &Config, &Check { deep, repair, json }: &Check) -> anyhow::Result<ExitCode> {
    let report = engine::check::run(config, engine::check::Wanted { deep, repair })?;
    let text = if json { report.json()? } else { report.to_string() };
    print_text(&format!("{text}\n"))?;
    Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn serve(flags: &Flags) -> anyhow::Result<()> {
    shim_api::trace::this_is("engine");
    // Before there are threads. Each of them would have an arena of its own, in which what a pull needed stays.
    sys::process::keep_allocator_small(2, 128 * 1024);
    let config = &Config::resolve(flags)?;
    if !rustix::process::geteuid().is_root() {
        anyhow::bail!("gantryd must run as root: it makes mounts, namespaces and cgroups; try sudo gantryd");
    }
    let set_level = log_to_stderr(config);
    let set_level: SetLevel = Arc::new(set_level);
    let reload = || {
        let config = Config::resolve(flags)?;
        set_level(config.log_level)?;
        Ok(config)
    };
    let control = Control { reload: &reload, set_level: set_level.clone(), config: config::dump(flags)? };
    let runtime = runtime()?;
    let outcome = runtime.block_on(async { Daemon::build(config).await?.run(control).await });
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
fn log_to_stderr(config: &Config) -> impl Fn(tracing::Level) -> anyhow::Result<()> + Send + Sync + use<> {
    use tracing_subscriber::filter::Targets;
    use tracing_subscriber::prelude::*;
    // At debug and trace, the libraries below say too much for anyone but their authors.
    let targets = |level: tracing::Level| {
        Targets::new()
            .with_default(level.min(tracing::Level::INFO))
            .with_target("engine", level)
            .with_target("gantryd", level)
            .with_target("shim_api", level)
            .with_target("snapshotter", level)
    };
    let (ours, handle) = tracing_subscriber::reload::Layer::new(targets(config.log_level));
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let registry = tracing_subscriber::registry().with(ours);
    if config.log_json {
        registry.with(layer.json()).init();
    } else {
        registry.with(layer).init();
    }
    move |level| handle.reload(targets(level)).context("cannot change the log level")
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
