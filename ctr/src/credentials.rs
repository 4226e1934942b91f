//! Credentials for registries: from the command line, from docker's config.json, from docker's credential helpers.
//!
//! Invariants: those of the command line are for the image's own registry and for no other host, be it a mirror. A secret is
//! never shown, logged, or given to another program on its command line. Nobody is asked before a registry asks.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// The name that docker gives its own registry in config.json, from before the second version of the protocol.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// Hosts by which the same registry goes.
const DOCKER_HOSTS: [&str; 4] =
    ["docker.io", "index.docker.io", "registry-1.docker.io", "registry.docker.io"];
/// How long a helper may take: it may ask for the key of a keyring.
const HELPER: Duration = Duration::from_secs(60);
/// The longest answer of a helper, and the largest config.json.
const LIMIT: u64 = 1 << 20;
/// What a helper calls the user of an identity token.
const TOKEN_USER: &str = "<token>";

/// What a registry is shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    Anonymous,
    Password {
        username: String,
        secret: String,
    },
    /// A refresh (identity) token.
    Refresh(String),
    /// A bearer token, as it is.
    Bearer(String),
}

impl std::fmt::Debug for Credential {
    /// Without the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Credential::Anonymous => "Anonymous",
            Credential::Password { .. } => "Password",
            Credential::Refresh(_) => "Refresh",
            Credential::Bearer(_) => "Bearer",
        })
    }
}

/// Where credentials are to be had.
pub(crate) struct Keeper {
    /// Of the command line, for this host.
    given: Option<(String, Credential)>,
    config: Option<PathBuf>,
}

impl Keeper {
    /// Those of the command line for `registry`, and else those of docker's configuration.
    pub(crate) fn new(registry: &str, given: Option<Credential>) -> Keeper {
        Keeper { given: given.map(|given| (registry.to_owned(), given)), config: config_path() }
    }

    /// Those for a host.
    pub(crate) async fn ask(&self, host: &str) -> anyhow::Result<Credential> {
        if let Some((registry, given)) = &self.given {
            if same_registry(registry, host) {
                return Ok(given.clone());
            }
            eprintln!(
                "ctr: {host} asks for credentials; those of the command line are for {registry} alone and stay here"
            );
        }
        let Some(path) = &self.config else { return Ok(Credential::Anonymous) };
        let what = || format!("cannot read docker's configuration {}", path.display());
        let text = match std::fs::File::open(path) {
            Ok(file) => {
                let mut text = String::new();
                file.take(LIMIT).read_to_string(&mut text).with_context(what)?;
                text
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Credential::Anonymous),
            Err(error) => return Err(error).with_context(what),
        };
        // serde's messages would show what stands there.
        let config: Config = serde_json::from_str(&text).map_err(|error| {
            anyhow::anyhow!("{}: it is not right at line {}, column {}", what(), error.line(), error.column())
        })?;
        config.find(host).await
    }
}

/// docker's config.json, `$DOCKER_CONFIG` or ~/.docker.
fn config_path() -> Option<PathBuf> {
    let folder = std::env::var_os("DOCKER_CONFIG").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
    Some(folder.or_else(home)?.join("config.json"))
}

fn is_docker_hub(host: &str) -> bool {
    DOCKER_HOSTS.contains(&host)
}

/// Whether two hosts are the same registry.
fn same_registry(one: &str, other: &str) -> bool {
    one == other || is_docker_hub(one) && is_docker_hub(other)
}

/// The host of a key of config.json, which may be a URL.
fn host_of(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default()
}

/// config.json, as far as it matters.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: BTreeMap<String, Auth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "lowercase", default)]
struct Auth {
    /// Base64 of `user:password`.
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

impl Config {
    async fn find(&self, host: &str) -> anyhow::Result<Credential> {
        let server = if is_docker_hub(host) { DOCKER_HUB } else { host };
        let helper = self.cred_helpers.iter().find(|(key, _)| same_registry(host_of(key), host));
        if let Some((_, helper)) = helper {
            return Ok(ask_helper(helper, server).await?.unwrap_or(Credential::Anonymous));
        }
        if !self.creds_store.is_empty()
            && let Some(found) = ask_helper(&self.creds_store, server).await?
        {
            return Ok(found);
        }
        let exact = self.auths.get_key_value(server);
        let found = exact.or_else(|| self.auths.iter().find(|(key, _)| same_registry(host_of(key), host)));
        found.map_or(Ok(Credential::Anonymous), |(key, auth)| {
            auth.credential().with_context(|| format!("docker's config.json, entry {key:?}"))
        })
    }
}

impl Auth {
    fn credential(&self) -> anyhow::Result<Credential> {
        if !self.registrytoken.is_empty() {
            return Ok(Credential::Bearer(self.registrytoken.clone()));
        }
        if !self.identitytoken.is_empty() {
            return Ok(Credential::Refresh(self.identitytoken.clone()));
        }
        if !self.username.is_empty() {
            let (username, secret) = (self.username.clone(), self.password.clone());
            return Ok(Credential::Password { username, secret });
        }
        if self.auth.is_empty() {
            return Ok(Credential::Anonymous);
        }
        let decoded = STANDARD.decode(self.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let decoded = decoded.context("its auth is not base64; log in again with `docker login`")?;
        let (username, secret) =
            decoded.split_once(':').context("its auth is no user and password; log in again")?;
        // docker pads it with zeros.
        let secret = secret.trim_end_matches('\0').to_owned();
        Ok(Credential::Password { username: username.to_owned(), secret })
    }
}

/// What a helper says.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Asks `docker-credential-NAME`; None when it has nothing for the server.
async fn ask_helper(name: &str, server: &str) -> anyhow::Result<Option<Credential>> {
    let program = format!("docker-credential-{name}");
    ensure!(
        !name.is_empty() && !name.contains(['/', '\0']),
        "docker's config.json names the credential helper {name:?}, which is no name of a program"
    );
    let mut child = tokio::process::Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot run {program}, which docker's config.json names for {server}"))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let talk = async {
        if let Some(mut stdin) = stdin {
            // One that does not read says why in its answer.
            let _ = stdin.write_all(format!("{server}\n").as_bytes()).await;
        }
        let mut said = Vec::new();
        if let Some(stdout) = stdout {
            stdout.take(LIMIT).read_to_end(&mut said).await?;
        }
        Ok::<_, io::Error>((child.wait().await?, said))
    };
    let (status, said) = tokio::time::timeout(HELPER, talk)
        .await
        .with_context(|| format!("{program} has not answered for {HELPER:?} and was ended"))?
        .with_context(|| format!("cannot talk to {program}"))?;
    if !status.success() {
        // By the protocol an error's text is on stdout, and this one means that there is nothing.
        let said = String::from_utf8_lossy(&said);
        if said.contains("credentials not found") {
            return Ok(None);
        }
        let said: String = said.trim().chars().filter(|char| !char.is_control()).take(200).collect();
        bail!("{program} failed for {server}: {status}: {said}");
    }
    let answer: Answer = serde_json::from_slice(&said)
        .map_err(|_| anyhow::anyhow!("{program} answered for {server} with what are no credentials"))?;
    Ok(Some(match answer {
        Answer { username, secret } if username == TOKEN_USER => Credential::Refresh(secret),
        Answer { username, secret } if username.is_empty() && secret.is_empty() => Credential::Anonymous,
        Answer { username, secret } => Credential::Password { username, secret },
    }))
}

/// The credentials of `--user NAME[:SECRET]`; without a secret the terminal is asked for it. Blocks.
pub(crate) fn of_user(user: &str) -> anyhow::Result<Credential> {
    let (username, secret) = match user.split_once(':') {
        Some((username, secret)) => (username, secret.to_owned()),
        None => (user, prompt(&format!("Password of {user}: "))?),
    };
    ensure!(!username.is_empty(), "--user needs a name: NAME or NAME:SECRET");
    Ok(Credential::Password { username: username.to_owned(), secret })
}

/// The terminal without echo, put back as it was when this is dropped.
struct Silent {
    terminal: std::fs::File,
    before: Termios,
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

/// Asks for a secret on the terminal, which does not show it.
fn prompt(question: &str) -> anyhow::Result<String> {
    let terminal = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/tty")
        .context("--user without a secret needs a terminal to ask for it; give NAME:SECRET, or have it in docker's config.json")?;
    let before = rustix::termios::tcgetattr(&terminal).context("cannot ask on the terminal")?;
    let mut silent = before.clone();
    // Signals come as characters, so that the terminal is put back before ctr ends.
    silent.local_modes.remove(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG);
    silent.special_codes[SpecialCodeIndex::VMIN] = 1;
    silent.special_codes[SpecialCodeIndex::VTIME] = 0;
    let mut asked = Silent { terminal, before };
    rustix::termios::tcsetattr(&asked.terminal, OptionalActions::Flush, &silent)
        .context("cannot silence the terminal")?;
    asked.terminal.write_all(question.as_bytes())?;
    let mut secret: Vec<u8> = Vec::new();
    let answered = loop {
        let mut byte = [0];
        if asked.terminal.read(&mut byte)? == 0 {
            break false;
        }
        match byte[0] {
            b'\n' | b'\r' => break true,
            // Ctrl-C, Ctrl-\, and Ctrl-D where nothing was typed.
            0x03 | 0x1c => break false,
            0x04 if secret.is_empty() => break false,
            0x08 | 0x7f => drop(secret.pop()),
            // Ctrl-U
            0x15 => secret.clear(),
            byte => secret.push(byte),
        }
    };
    asked.terminal.write_all(b"\n")?;
    ensure!(answered, "no password was given");
    String::from_utf8(secret).map_err(|_| anyhow::anyhow!("the password is not UTF-8"))
}

/// A config.json: of any host an entry gives what it has, and neither that nor an error shows a secret. Helpers are not run.
#[cfg(fuzzing)]
pub(crate) fn fuzz(data: &[u8]) {
    let Ok(config) = serde_json::from_slice::<Config>(data) else { return };
    for (key, auth) in &config.auths {
        assert!(same_registry(host_of(key), host_of(key)) && !host_of(key).contains('/'));
        let secrets = [&auth.auth, &auth.password, &auth.identitytoken, &auth.registrytoken];
        let shown = match auth.credential() {
            Ok(found) => format!("{found:?}"),
            Err(error) => format!("{error:#}"),
        };
        assert!(
            secrets.iter().all(|secret| secret.len() < 12 || !shown.contains(secret.as_str())),
            "{shown}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(username: &str, secret: &str) -> Credential {
        Credential::Password { username: username.into(), secret: secret.into() }
    }

    /// Credentials say nothing of themselves in messages, so these do not either.
    async fn find(config: &str, host: &str) -> Credential {
        serde_json::from_str::<Config>(config).unwrap().find(host).await.unwrap()
    }

    #[tokio::test]
    async fn a_host_is_found_under_any_of_its_names() {
        let auth = STANDARD.encode("me:se:cret\0");
        let config = format!(
            r#"{{"auths": {{"{DOCKER_HUB}": {{"auth": "{auth}"}}, "https://r.example/v2/": {{"username": "u", "password": "p"}},
            "token.example:5000": {{"identitytoken": "t"}}, "b.example": {{"registrytoken": "b"}}, "none.example": {{}}}},
            "HttpHeaders": {{"x": "y"}}}}"#
        );
        for host in DOCKER_HOSTS {
            assert!(find(&config, host).await == password("me", "se:cret"), "{host}");
        }
        assert!(find(&config, "r.example").await == password("u", "p"));
        assert!(find(&config, "token.example:5000").await == Credential::Refresh("t".into()));
        assert!(find(&config, "b.example").await == Credential::Bearer("b".into()));
        for host in ["token.example", "none.example", "other.example", "example"] {
            assert!(find(&config, host).await == Credential::Anonymous, "{host}");
        }
        assert!(find("{}", "r.example").await == Credential::Anonymous);
    }

    #[tokio::test]
    async fn what_is_wrong_is_told_without_the_secret() {
        let bad = r#"{"auths": {"r.example": {"auth": "c2VjcmV0"}}}"#;
        let error =
            serde_json::from_str::<Config>(bad).unwrap().find("r.example").await.unwrap_err().to_string();
        assert!(error.contains("r.example") && !error.contains("secret"), "{error}");
        assert_eq!(format!("{:?}", password("u", "secret")), "Password");
        let keeper = |text: &str| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("config.json");
            std::fs::write(&path, text).unwrap();
            (folder, Keeper { given: None, config: Some(path) })
        };
        let (_folder, broken) = keeper(r#"{"auths": {"r.example": {"auth": ["secret"]}}}"#);
        let error = format!("{:#}", broken.ask("r.example").await.unwrap_err());
        assert!(error.contains("config.json") && !error.contains("secret"), "{error}");
        for name in ["../x", ""] {
            assert!(ask_helper(name, "r.example").await.is_err());
        }
        let error = ask_helper("no-such-helper-at-all", "r.example").await.unwrap_err().to_string();
        assert!(error.contains("docker-credential-no-such-helper-at-all"), "{error}");
    }

    #[tokio::test]
    async fn those_of_the_command_line_stay_with_their_registry() {
        let keeper = |registry: &str| Keeper {
            given: Some((registry.to_owned(), password("u", "p"))),
            config: Some("/nonexistent/config.json".into()),
        };
        assert!(keeper("r.example:5000").ask("r.example:5000").await.unwrap() == password("u", "p"));
        assert!(keeper("docker.io").ask("registry-1.docker.io").await.unwrap() == password("u", "p"));
        for host in ["r.example", "mirror.example", "r.example:5000.evil.example"] {
            assert!(keeper("r.example:5000").ask(host).await.unwrap() == Credential::Anonymous, "{host}");
        }
        assert!(of_user("u:p:q").unwrap() == password("u", "p:q"));
        assert!(of_user(":p").is_err());
    }
}
