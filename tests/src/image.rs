//! A small image, made of the system's static busybox: two layers, with all that a layer may hold.

use std::io::{self, Write as _};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use oci::Digest;
use serde_json::json;
use tar::{Builder, EntryType, Header};

/// The image's name.
pub const NAME: &str = "docker.io/library/busybox:latest";
/// The program it is made of.
pub const BUSYBOX: &str = "/bin/busybox";

/// Commands that the image has, as links to busybox.
const APPLETS: [&str; 44] = [
    "sh", "ash", "cat", "chmod", "cp", "cut", "date", "dd", "df", "echo", "env", "false", "grep", "head",
    "hostname", "id", "ip", "kill", "ln", "ls", "mkdir", "mkfifo", "mount", "mv", "nc", "ps", "pwd",
    "readlink", "rm", "sed", "seq", "sleep", "sort", "stat", "stty", "tail", "test", "touch", "tr", "true",
    "tty", "uname", "wc", "which",
];

/// An image as an OCI layout in memory.
pub struct Image {
    /// The blobs, by digest.
    pub blobs: Vec<(Digest, Vec<u8>)>,
    /// The layout's index.json.
    pub index: Vec<u8>,
}

impl Image {
    /// The image as a tar archive.
    pub fn archive(&self) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        let mut file = |path: &str, bytes: &[u8]| {
            let mut header = Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, bytes).unwrap();
        };
        file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        for (digest, bytes) in &self.blobs {
            file(&format!("blobs/sha256/{}", digest.hex()), bytes);
        }
        file("index.json", &self.index);
        builder.into_inner().unwrap()
    }

    /// Writes the archive to a file.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        std::fs::write(path, self.archive())
    }
}

/// A layer under construction.
pub struct Layer(Builder<Vec<u8>>);

impl Default for Layer {
    fn default() -> Self {
        Layer(Builder::new(Vec::new()))
    }
}

impl Layer {
    /// Appends an entry of any kind, with whatever path and link it is told.
    pub fn entry(mut self, kind: EntryType, path: &str, link: &str, mode: u32, bytes: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_size(bytes.len() as u64);
        // Straight into the header: the builder refuses what a hostile image would hold.
        let header_bytes = header.as_mut_bytes();
        header_bytes[..path.len()].copy_from_slice(path.as_bytes());
        header_bytes[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, bytes).unwrap();
        self
    }

    /// A folder.
    pub fn folder(self, path: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, path, "", mode, b"")
    }

    /// A file.
    pub fn file(self, path: &str, mode: u32, bytes: &[u8]) -> Self {
        self.entry(EntryType::Regular, path, "", mode, bytes)
    }

    /// A symlink.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, target, 0o777, b"")
    }

    /// A file with an extended attribute.
    pub fn file_with_xattr(mut self, path: &str, name: &str, value: &str) -> Self {
        let key = format!("SCHILY.xattr.{name}");
        self.0.append_pax_extensions([(key.as_str(), value.as_bytes())]).unwrap();
        self.file(path, 0o644, b"with an attribute\n")
    }

    /// The finished archive.
    pub fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// An image of these layers (uncompressed archives), named `name`, that runs `command`.
pub fn image(name: &str, command: &[&str], layers: &[Vec<u8>]) -> Image {
    image_with(name, command, layers, &json!({}))
}

/// The same, with these further fields of its config's `config`.
pub fn image_with(name: &str, command: &[&str], layers: &[Vec<u8>], further: &serde_json::Value) -> Image {
    let mut blobs = Vec::new();
    let mut add = |bytes: Vec<u8>| {
        let digest = Digest::sha256_of(&bytes);
        let size = bytes.len();
        blobs.push((digest.clone(), bytes));
        (digest.to_string(), size)
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| Digest::sha256_of(layer).to_string()).collect();
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
            gzip.write_all(layer).unwrap();
            let (digest, size) = add(gzip.finish().unwrap());
            json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": size})
        })
        .collect();
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let mut config = json!({
        "architecture": architecture,
        "os": "linux",
        "created": "2020-09-13T12:26:40Z",
        "config": {
            "Env": ["PATH=/bin:/usr/bin", "FROM_IMAGE=yes"],
            "Cmd": command,
            "WorkingDir": "/",
            "Labels": {"org.example.made-by": "gantry"},
            "StopSignal": "SIGTERM",
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [],
    });
    for (key, value) in further.as_object().into_iter().flatten() {
        config["config"][key] = value.clone();
    }
    let (config_digest, config_size) = add(config.to_string().into_bytes());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config_digest,
            "size": config_size,
        },
        "layers": layers,
    });
    let (manifest_digest, manifest_size) = add(manifest.to_string().into_bytes());
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest_digest,
            "size": manifest_size,
            "platform": {"os": "linux", "architecture": architecture},
            "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest"},
        }],
    });
    Image { blobs, index: index.to_string().into_bytes() }
}

/// The layer with busybox and the folders that a container needs.
pub fn base_layer() -> Vec<u8> {
    let busybox = std::fs::read(BUSYBOX)
        .unwrap_or_else(|error| panic!("{BUSYBOX}: {error}; install the package busybox-static"));
    let mut layer = Layer::default();
    for (path, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("run", 0o755),
        ("sys", 0o555),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("var", 0o755),
    ] {
        layer = layer.folder(path, mode);
    }
    layer = layer.file("bin/busybox", 0o755, &busybox);
    for applet in APPLETS {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    layer
        .file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/:/bin/sh\n")
        .file("etc/group", 0o644, b"root:x:0:\napp:x:1001:\nextra:x:2000:app\n")
        .file("etc/removed-above", 0o644, b"gone\n")
        .file("etc/replaced-above", 0o644, b"old\n")
        .folder("var/opaque", 0o755)
        .file("var/opaque/hidden", 0o644, b"gone\n")
        .finish()
}

/// The layer that changes what is below it: a whiteout, an opaque folder, a replaced file, a hard link, an attribute.
pub fn top_layer() -> Vec<u8> {
    Layer::default()
        .folder("etc", 0o755)
        .file("etc/.wh.removed-above", 0o644, b"")
        .file("etc/replaced-above", 0o644, b"new\n")
        .folder("var/opaque", 0o755)
        .file("var/opaque/.wh..wh..opq", 0o644, b"")
        .file("var/opaque/shown", 0o644, b"here\n")
        .file("var/first", 0o640, b"linked\n")
        .entry(EntryType::Link, "var/second", "var/first", 0o640, b"")
        .file_with_xattr("var/attribute", "user.gantry", "value")
        .finish()
}

/// The image that most tests use.
pub fn busybox() -> Image {
    image(NAME, &["sh"], &[base_layer(), top_layer()])
}
