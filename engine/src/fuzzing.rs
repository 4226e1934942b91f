//! What must hold of every parser of bytes from outside, for any bytes: one function each, which panics where it does not hold.
//!
//! `fuzz/` calls them with bytes that it makes up, built with `--cfg fuzzing`. The tests call them with what is in
//! `fuzz/corpus`: our seeds, and inputs that once broke something. Those for rooms' private parsers are in files `fuzz.rs` beside
//! these; here are those for what all may call. None of this is in a released program.

use std::borrow::Cow;

use oci::image::{self, ImageConfig, Index, Manifest};
use oci::platform::Matcher;
use oci::user::{Accounts, ID_LIMIT};
use oci::{Digest, Platform, Reference};

pub use crate::config::fuzz as config;
pub use crate::cri::cni::fuzz::cni;
pub use crate::cri::spec::cdi::fuzz as cdi;
pub use crate::cri::streaming::fuzz::{spdy, websocket};
pub use crate::diff::fuzz::layer;
pub use crate::events::fuzz as journal;
pub use crate::filters::Filter;
pub use crate::hooks::fuzz as hooks;
pub use crate::remotes::fuzz::{auth, hosts};
pub use crate::transfer::fuzz::archive;

/// The text that some bytes are; None for bytes that are none.
fn text(data: &[u8]) -> Option<&str> {
    std::str::from_utf8(data).ok()
}

/// Image references, digests and platforms: what is accepted is printed as what is read as the same, and is safe as a path.
pub fn reference(data: &[u8]) {
    let Some(text) = text(data) else { return };
    if let Ok(reference) = Reference::parse_normalized(text) {
        let printed = reference.to_string();
        assert_eq!(Reference::parse_normalized(&printed).as_ref(), Ok(&reference), "{printed:?}");
        assert_eq!(Reference::parse_normalized(&reference.familiar()).as_ref(), Ok(&reference));
        assert!(reference.name().len() <= 255);
        let parts = || reference.domain().split('/').chain(reference.path().split('/'));
        assert!(parts().all(|part| !part.is_empty() && part != "." && part != ".."), "{printed:?}");
        assert!(printed.bytes().all(|byte| byte.is_ascii_graphic()), "{printed:?}");
        let tagged = reference.clone().with_default_tag();
        assert!(tagged.tag().is_some() || tagged.digest().is_some());
        assert!(reference.tag().is_none_or(|tag| !tag.is_empty() && tag.len() <= 128 && !tag.contains('/')));
    }
    if let Ok(digest) = Digest::parse(text) {
        assert_eq!(digest.to_string(), text);
        assert!(digest.hex().bytes().all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase()));
        assert_eq!(digest.hex().len(), digest.algorithm().hex_len());
    }
    if let Ok(platform) = Platform::parse(text) {
        assert_eq!(platform.normalized(), platform);
        assert_eq!(Platform::parse(&platform.to_string()).as_ref(), Ok(&platform));
        assert!(Matcher::only(&platform).matches(&platform) && Matcher::strict(&platform).matches(&platform));
    }
    let _ = oci::signal::parse(text);
    if let Ok(mount) = oci::spec::parse_mount(text) {
        assert!(!mount.destination.is_empty());
    }
    let _ = oci::spec::parse_id_mapping(text);
}

/// Indexes, manifests and configs: a document is one of them alone, within its limits, and survives being written; the manifests that
/// are chosen for a platform are ones that it can run, the best first.
pub fn documents(data: &[u8]) {
    let kind = image::kind_of(data);
    let (index, manifest) = (Index::parse(data), Manifest::parse(data));
    assert!(index.is_err() || manifest.is_err(), "an index and a manifest in one");
    assert!(kind.is_ok() || (index.is_err() && manifest.is_err()));
    if let Ok(index) = &index {
        assert!(index.manifests.len() <= image::INDEX_LIMIT);
        let again = serde_json::to_vec(index).expect("an index can be written");
        assert_eq!(Index::parse(&again).expect("what was written can be read"), *index);
        for platform in
            [Platform::host(), Platform::new("linux", "arm", "v7"), Platform::new("linux", "arm64", "")]
        {
            let matcher = Matcher::only(&platform);
            let rank = |entry: &image::Descriptor| match &entry.platform {
                Some(of) => matcher.rank(of),
                None => Some(usize::MAX),
            };
            let chosen = index.select(&matcher);
            let ranks: Vec<_> = chosen.iter().map(|entry| rank(entry).expect("one that is wanted")).collect();
            assert!(ranks.is_sorted());
            assert_eq!(ranks.len(), index.manifests.iter().filter(|entry| rank(entry).is_some()).count());
            assert!(index.no_platform(&platform).to_string().len() < 64 << 10 || data.len() > 1 << 10);
        }
    }
    if let Ok(manifest) = &manifest {
        assert!(manifest.layers.len() <= image::LAYER_LIMIT);
        let again = serde_json::to_vec(manifest).expect("a manifest can be written");
        assert_eq!(Manifest::parse(&again).expect("what was written can be read"), *manifest);
    }
    if let Ok(config) = ImageConfig::parse(data) {
        let again = serde_json::to_vec(&config).expect("a config can be written");
        assert_eq!(ImageConfig::parse(&again).expect("what was written can be read"), config);
        let chain = image::chain_ids(&config.rootfs.diff_ids);
        assert_eq!(chain.len(), config.rootfs.diff_ids.len());
        if let Ok(manifest) = &manifest {
            assert_eq!(
                config.diff_ids_for(manifest).is_ok(),
                config.rootfs.diff_ids.len() == manifest.layers.len()
            );
        }
    }
}

/// The account files of an image: `user\0passwd\0group`. No id is out of range, and a number is never taken for a name.
pub fn users(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == 0);
    let Some(user) = parts.next().and_then(text) else { return };
    let (passwd, group) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let Ok(found) = oci::user::resolve(user, Accounts { passwd, group }) else { return };
    assert!(found.uid <= ID_LIMIT && found.gid <= ID_LIMIT);
    assert!(found.additional_gids.iter().all(|gid| *gid <= ID_LIMIT));
    assert_eq!(found.additional_gids.first(), Some(&found.gid));
    let (name, of) = user.split_once(':').map_or((user, None), |(name, of)| (name, Some(of)));
    if let Ok(number) = name.parse::<u64>() {
        assert_eq!(u64::from(found.uid), number);
    }
    if let Some(number) = of.and_then(|of| of.parse::<u64>().ok()) {
        assert_eq!(u64::from(found.gid), number);
    }
    if !oci::user::needs_accounts(user) && !user.is_empty() {
        let bare = oci::user::resolve(user, Accounts::default()).expect("numbers need no files");
        assert_eq!(bare.uid, found.uid);
    }
}

/// Filters, a line each: the list holds where one of it does, and any text in quotes is found as it is.
pub fn filters(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let lines: Vec<&str> = text.split('\n').collect();
    let object = |path: &[&str]| -> Option<Cow<'_, str>> {
        match path {
            ["name"] => Some("docker.io/library/busybox:latest".into()),
            ["labels", rest @ ..] => Some(rest.join(".").into()),
            _ => None,
        }
    };
    let one_by_one: Vec<_> = lines.iter().map(|line| Filter::parse_all(&[line])).collect();
    match Filter::parse_all(&lines) {
        Ok(all) => {
            let any = one_by_one.iter().any(|filter| filter.as_ref().expect("all of them").matches(object));
            assert_eq!(all.matches(object), any);
        }
        Err(error) => {
            assert!(matches!(error, crate::error::Error::InvalidArgument(_)), "{error:?}");
        }
    }
    let value: String = text.chars().take(2000).collect();
    let quoted: String = value.chars().map(|c| format!("\\U{:08x}", u32::from(c))).collect();
    if let Ok(filter) = Filter::parse_all(&[format!("f==\"{quoted}\"")]) {
        assert!(filter.matches(|path| (path == ["f"]).then_some(Cow::Borrowed(value.as_str()))));
        assert!(!filter.matches(|path| (path == ["f"]).then(|| Cow::Owned(format!("{value}x")))));
    }
}

/// The protocol of logs, whose client the engine is and whose server shims are; URIs of logs; and what a shim answers when it is
/// started.
pub fn logs(data: &[u8]) {
    use shim_api::logs::{LogSpec, Message, Reader};
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let mut reader = Reader::new(data);
        let (mut messages, mut written) = (Vec::new(), Vec::new());
        while let Ok(Some(message)) = reader.message().await {
            message.encode(&mut written);
            messages.push(message);
        }
        // Nothing with no bytes is written, so that it is not there again; nor is what is not text in an error the same.
        let said = |message: &Message| match message {
            Message::Stdin(bytes) | Message::Output(_, bytes) => !bytes.is_empty(),
            _ => true,
        };
        messages.retain(said);
        let mut reader = Reader::new(&written[..]);
        for message in messages {
            let again = reader.message().await.expect("what was written can be read");
            match (&message, &again) {
                (Message::Failed(one), Some(Message::Failed(other))) => assert_eq!(one.code, other.code),
                _ => assert_eq!(again.as_ref(), Some(&message)),
            }
        }
        assert_eq!(reader.message().await.expect("nothing follows"), None);
        let _ = Reader::new(data).request().await;
    });
    if let Ok(answer) = shim_api::bootstrap::Answer::parse(data) {
        assert!(matches!(answer.version, 2 | 3) && matches!(answer.protocol.as_str(), "ttrpc" | "grpc"));
    }
    let Some(text) = text(data) else { return };
    if let Ok(spec) = LogSpec::parse(text) {
        assert!(spec.socket.is_absolute() && spec.path.as_ref().is_none_or(|path| path.is_absolute()));
        assert_eq!(LogSpec::parse(&spec.to_uri()).expect("what was written can be read"), spec);
    }
    if let Ok(path) = shim_api::transport::socket_path(text) {
        assert!(path.is_absolute());
    }
}

/// A ttrpc connection on which a stranger speaks, first to a server and then to a client: both end, and neither is hurt.
pub fn ttrpc(data: &[u8]) {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use shim_api::transport::{Connection, OnHangUp, Services};
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let folder = std::env::temp_dir().join(format!("gantry-ttrpc-{}", std::process::id()));
        let _ = std::fs::remove_file(&folder);
        let listener = tokio::net::UnixListener::bind(&folder).expect("listen");
        let mut services = Services::new();
        let echo = |request: prost_types::Any| async move { Ok(request) };
        services.method("s", "m", OnHangUp::Finish, echo);
        let server = services.serve(listener).await.expect("serve");
        let bytes = data.to_vec();
        let path = folder.clone();
        let stranger = tokio::task::spawn_blocking(move || {
            let mut stream = UnixStream::connect(path).expect("connect");
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
            // Whoever has heard enough hangs up.
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            (&stream).take(64 << 20).read_to_end(&mut answer).is_err_and(|error| {
                matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
            })
        });
        assert!(!stranger.await.expect("the stranger"), "the server keeps a connection that has ended");
        // Others are served as before.
        let connection = Connection::connect(&folder.to_string_lossy()).await.expect("connect");
        let asked = prost_types::Any { type_url: "x".into(), value: vec![1] };
        let answered: prost_types::Any =
            connection.call("s", "m", &asked, Some(Duration::from_secs(20))).await.expect("an answer");
        assert_eq!(answered, asked);
        drop(connection);
        server.stop().await;
        let _ = std::fs::remove_file(&folder);
        // The other way round: what it says is no answer of ours.
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        ours.set_nonblocking(true).expect("set nonblocking");
        let connection = Connection::over(tokio::net::UnixStream::from_std(ours).expect("a stream"));
        let _ = theirs.write_all(data);
        let call = connection.call::<_, prost_types::Any>("s", "m", &asked, Some(Duration::from_secs(20)));
        let stranger = async {
            tokio::task::yield_now().await;
            drop(theirs);
        };
        let (answer, ()) = tokio::join!(call, stranger);
        assert!(
            answer.as_ref().is_ok_and(|_| !data.is_empty())
                || answer.is_err_and(|error| error.code != shim_api::Code::DeadlineExceeded),
            "a call outlives its connection"
        );
    });
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// What is run with each target's corpus; `scratch` is a folder of its own.
    type Target = (&'static str, fn(&[u8], &Path));
    const TARGETS: &[Target] = &[
        ("archive", |data, scratch| archive(data, scratch)),
        ("auth", |data, _| auth(data)),
        ("cdi", |data, _| cdi(data)),
        ("cni", |data, _| cni(data)),
        ("config", |data, _| config(data)),
        ("documents", |data, _| documents(data)),
        ("filters", |data, _| filters(data)),
        ("hooks", |data, _| hooks(data)),
        ("hosts", |data, _| hosts(data)),
        ("journal", |data, _| journal(data)),
        ("layer", |data, scratch| layer(data, scratch)),
        ("logs", |data, _| logs(data)),
        ("reference", |data, _| reference(data)),
        ("spdy", |data, _| spdy(data)),
        ("ttrpc", |data, _| ttrpc(data)),
        ("users", |data, _| users(data)),
        ("websocket", |data, _| websocket(data)),
    ];

    /// A target's seeds, in the order of their names.
    fn seeds(name: &str) -> Vec<(String, Vec<u8>)> {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
        let entries =
            std::fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        assert!(!paths.is_empty(), "{name} has no seeds");
        paths.into_iter().map(|path| (path.display().to_string(), std::fs::read(&path).unwrap())).collect()
    }

    #[test]
    fn everything_holds_of_the_corpus() {
        for (name, target) in TARGETS {
            let scratch = tempfile::tempdir().unwrap();
            for (seed, bytes) in seeds(name) {
                let held = std::panic::catch_unwind(|| target(&bytes, scratch.path()));
                assert!(held.is_ok(), "{seed}");
            }
        }
    }

    /// Without what measures coverage, and so only near the seeds. `GANTRY_FUZZ_ROUNDS` is how often each is changed,
    /// `GANTRY_FUZZ_TARGET` which target it is for.
    #[test]
    fn everything_holds_near_the_corpus() {
        let setting = |name: &str| std::env::var(format!("GANTRY_FUZZ_{name}")).ok();
        let rounds: u64 = setting("ROUNDS").map_or(3, |rounds| rounds.parse().unwrap());
        let only = setting("TARGET");
        for (name, target) in
            TARGETS.iter().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name))
        {
            let scratch = tempfile::tempdir().unwrap();
            let seeds = seeds(name);
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            let mut random = move |below: usize| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state % below.max(1) as u64) as usize
            };
            for _ in 0..rounds {
                for (seed, bytes) in &seeds {
                    let mut bytes = bytes.clone();
                    for _ in 0..=random(4) {
                        let (at, other) = (random(bytes.len()), &seeds[random(seeds.len())].1);
                        match random(6) {
                            _ if bytes.is_empty() => bytes.push(random(256) as u8),
                            0 => bytes[at] = random(256) as u8,
                            1 => bytes[at] ^= 1 << random(8),
                            2 => bytes.truncate(at),
                            3 => drop(bytes.remove(at)),
                            4 => bytes.insert(at, b"\0\xff\"'\\/.:{}[]09aZ \n"[random(18)]),
                            _ => {
                                let from = random(other.len());
                                let piece = &other[from..other.len().min(from + random(64))];
                                bytes.splice(at..at, piece.iter().copied());
                            }
                        }
                    }
                    let held = std::panic::catch_unwind(|| target(&bytes, scratch.path()));
                    if held.is_err() {
                        let kept = std::env::temp_dir().join(format!("gantry-fuzz-{name}"));
                        std::fs::write(&kept, &bytes).unwrap();
                        panic!("{name}: of {seed} came {}", kept.display());
                    }
                }
            }
        }
    }
}
