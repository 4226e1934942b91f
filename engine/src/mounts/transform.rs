//! What is done to a mount before it is used: words filled in, folders and image files made.
//!
//! ```text
//! {{ source N }}  {{ target N }}  {{ mount N }}      of the Nth mount: its source, its target, where it is mounted
//! {{ overlay A B }}                                  where those from A to B are mounted, joined by ":", also backwards
//! X-containerd.mkdir.path=PATH[:MODE[:UID:GID]]      MODE in octal, 0700 without
//! X-containerd.mkfs.size=BYTES[k|m|g|t]  .fs=ext4  .uuid=UUID
//! ```
//!
//! Invariant: what is made lies beneath one of the engine's own folders, whatever the names in the options are or become.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use proto::containerd::types::{ActiveMount, Mount};
use sys::beneath::{Place, Root};

use super::plan::Transform;
use crate::error::{Error, Result};

const MKDIR: &str = "X-containerd.mkdir.";
const MKFS: &str = "X-containerd.mkfs.";

/// Applies a transform. `active` is what is mounted before this mount, `roots` the folders beneath which things are made.
pub(super) fn apply(
    transform: Transform,
    mount: &mut Mount,
    active: &[ActiveMount],
    roots: &[PathBuf],
) -> Result<()> {
    match transform {
        Transform::Format => {
            for text in [&mut mount.source, &mut mount.target].into_iter().chain(&mut mount.options) {
                *text = format(text, active)?;
            }
            Ok(())
        }
        Transform::Mkdir => mkdir(mount, roots),
        Transform::Mkfs => mkfs(mount, roots),
    }
}

fn format(text: &str, active: &[ActiveMount]) -> Result<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        let (call, after) = after
            .split_once("}}")
            .ok_or_else(|| Error::invalid_argument(format!("mount: {text:?} has a {{{{ without its }}}}")))?;
        out.push_str(before);
        out.push_str(&value(call, active)?);
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// What one `{{ ... }}` stands for.
fn value(call: &str, active: &[ActiveMount]) -> Result<String> {
    let refused = |why: String| Error::invalid_argument(format!("mount: {{{{{call}}}}}: {why}"));
    let words: Vec<&str> = call.split_whitespace().collect();
    let nth = |word: &str| {
        let number: usize = word.parse().map_err(|_| refused(format!("{word:?} is not a number")))?;
        active.get(number).ok_or_else(|| {
            refused(format!("there is no mount {number}; {} are active before this one", active.len()))
        })
    };
    let original = |active: &ActiveMount| active.mount.clone().unwrap_or_default();
    match words[..] {
        ["source", n] => Ok(original(nth(n)?).source),
        ["target", n] => Ok(original(nth(n)?).target),
        ["mount", n] => Ok(nth(n)?.mount_point.clone()),
        ["overlay", a, b] => {
            nth(a)?;
            nth(b)?;
            let (a, b): (usize, usize) = (a.parse().unwrap_or_default(), b.parse().unwrap_or_default());
            let mut points: Vec<&str> =
                active[a.min(b)..=a.max(b)].iter().map(|active| active.mount_point.as_str()).collect();
            if a > b {
                points.reverse();
            }
            Ok(points.join(":"))
        }
        _ => Err(refused("use source N, target N, mount N or overlay A B".into())),
    }
}

/// Where a path lies beneath one of the roots, whose folder has to be there. InvalidArgument when it lies beneath none.
fn place(path: &str, roots: &[PathBuf]) -> Result<(Root, Place)> {
    if Path::new(path).components().any(|part| part == std::path::Component::ParentDir) {
        // Beneath a root it would mean another place than to who mounts it.
        return Err(Error::invalid_argument(format!("{path:?}: write the path without \"..\"")));
    }
    for root in roots {
        let Ok(inner) = Path::new(path).strip_prefix(root) else { continue };
        let mut opened = Root::open(root).map_err(|error| Error::io("open", root, &error))?;
        let place = opened.place(inner.as_os_str().as_bytes());
        return match place.map_err(|error| Error::io("find", path, &error))? {
            Some(place) => Ok((opened, place)),
            None => {
                Err(Error::invalid_argument(format!("{path:?} is one of the engine's own folders itself")))
            }
        };
    }
    let roots: Vec<String> = roots.iter().map(|root| root.display().to_string()).collect();
    Err(Error::invalid_argument(format!(
        "{path:?} is not beneath a folder in which mounts may make something: {}",
        roots.join(", ")
    )))
}

fn mkdir(mount: &mut Mount, roots: &[PathBuf]) -> Result<()> {
    let mut kept = Vec::new();
    for option in std::mem::take(&mut mount.options) {
        let Some(setting) = option.strip_prefix(MKDIR) else {
            kept.push(option);
            continue;
        };
        let refused = |why: &str| Error::invalid_argument(format!("mount option {option:?}: {why}"));
        let value = setting.strip_prefix("path=").ok_or_else(|| refused("only path=... is known"))?;
        let parts: Vec<&str> = value.split(':').collect();
        let id = |text: &str| text.parse::<u32>().map_err(|_| refused("an owner is two numbers, UID:GID"));
        let (path, mode, owner) = match parts[..] {
            [path] => (path, "700", None),
            [path, mode] => (path, mode, None),
            [path, mode, uid, gid] => (path, mode, Some((id(uid)?, id(gid)?))),
            _ => return Err(refused("use path=PATH[:MODE[:UID:GID]]")),
        };
        let mode = u32::from_str_radix(mode, 8)
            .ok()
            .filter(|mode| *mode <= 0o777)
            .ok_or_else(|| refused("the mode is octal, 0777 at most"))?;
        let (_, place) = place(path, roots)?;
        let failed = |what: &'static str| move |error: io::Error| Error::io(what, path, &error);
        match place.make_folder() {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                place.enter().map_err(|_| refused("there is something that is not a folder"))?;
            }
            Err(error) => return Err(failed("create the folder")(error)),
        }
        if let Some((uid, gid)) = owner {
            place.set_owner(uid, gid).map_err(failed("change the owner of"))?;
        }
        place.set_mode(mode).map_err(failed("change the mode of"))?;
    }
    mount.options = kept;
    Ok(())
}

fn mkfs(mount: &mut Mount, roots: &[PathBuf]) -> Result<()> {
    let (mut size, mut kind, mut uuid) = (None, "ext4".to_owned(), None);
    let mut kept = Vec::new();
    for option in std::mem::take(&mut mount.options) {
        let Some(setting) = option.strip_prefix(MKFS) else {
            kept.push(option);
            continue;
        };
        let refused = |why: &str| Error::invalid_argument(format!("mount option {option:?}: {why}"));
        match setting.split_once('=') {
            Some(("size", text)) => {
                size = Some(bytes(text).ok_or_else(|| refused("a size is a number with k, m, g or t"))?);
            }
            Some(("fs", text)) => kind = text.to_owned(),
            Some(("uuid", text)) => uuid = Some(text.to_owned()),
            _ => return Err(refused("only size=, fs= and uuid= are known")),
        }
    }
    mount.options = kept;
    let source = &mount.source;
    let (mut root, place) = place(source, roots)?;
    let failed = |what: &'static str| move |error: io::Error| Error::io(what, source, &error);
    if place.stat().map_err(failed("look at"))?.is_some() {
        // Made by an earlier activation, with data by now.
        return Ok(());
    }
    let size = size.filter(|size| *size > 0).ok_or_else(|| {
        Error::invalid_argument(format!("mount: {source:?} is to be made, and no {MKFS}size= says how big"))
    })?;
    let mut command = match kind.as_str() {
        "ext2" | "ext3" | "ext4" => {
            let mut command = Command::new(format!("mkfs.{kind}"));
            command.arg("-q").args(uuid.iter().flat_map(|uuid| ["-U", uuid]));
            command
        }
        "xfs" => {
            let mut command = Command::new("mkfs.xfs");
            command.arg("-q").args(uuid.iter().flat_map(|uuid| ["-m".to_owned(), format!("uuid={uuid}")]));
            command
        }
        _ => {
            return Err(Error::invalid_argument(format!(
                "mount: {MKFS}fs={kind}: use ext2, ext3, ext4 or xfs"
            )));
        }
    };
    let file = place.make_file().map_err(failed("create"))?;
    let made = file.set_len(size).map_err(failed("set the size of")).and_then(|()| {
        // By descriptor: the name could lead elsewhere by now.
        let output = command
            .arg(format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&file)))
            .stdin(std::process::Stdio::null())
            .output()
            .map_err(|error| {
                Error::failed_precondition(format!(
                    "cannot run mkfs.{kind} for {source:?}: {error}; install the programs of this file system"
                ))
            })?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::failed_precondition(format!(
            "mkfs.{kind} for {source:?} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )))
    });
    if made.is_err() {
        // A half-made image would pass for a good one the next time.
        let _ = root.remove(&place);
    }
    made
}

/// A size with a unit of 1024, `64m`; None when it is none.
fn bytes(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let text = text.strip_suffix("ib").or_else(|| text.strip_suffix('b')).unwrap_or(&text);
    let (digits, shift) = match text.char_indices().last()? {
        (at, 'k') => (&text[..at], 10),
        (at, 'm') => (&text[..at], 20),
        (at, 'g') => (&text[..at], 30),
        (at, 't') => (&text[..at], 40),
        _ => (text, 0),
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn active(point: &str) -> ActiveMount {
        let mount = Mount { source: format!("{point}-source"), target: "t".into(), ..Mount::default() };
        ActiveMount { mount: Some(mount), mount_point: point.into(), ..ActiveMount::default() }
    }

    #[test]
    fn words_are_filled_in() {
        let active = [active("/a"), active("/b"), active("/c")];
        for (text, filled) in [
            ("plain", "plain"),
            ("x={{ mount 0 }}/y", "x=/a/y"),
            ("{{source 1}}:{{ target 1 }}", "/b-source:t"),
            ("lowerdir={{ overlay 0 2 }}", "lowerdir=/a:/b:/c"),
            ("lowerdir={{ overlay 2 0 }}", "lowerdir=/c:/b:/a"),
            ("{{overlay 1 1}}", "/b"),
        ] {
            assert_eq!(format(text, &active).unwrap(), filled);
        }
        for text in
            ["{{ mount 3 }}", "{{ mount -1 }}", "{{ mount", "{{ }}", "{{ what 1 }}", "{{ overlay 0 9 }}"]
        {
            assert!(matches!(format(text, &active), Err(Error::InvalidArgument(_))), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, size) in
            [("512", 512), ("64k", 65536), ("1MiB", 1 << 20), ("2g", 2 << 30), ("1 mb", 1 << 20)]
        {
            assert_eq!(bytes(text), Some(size), "{text}");
        }
        for text in ["", "m", "-1", "1x", "99999999999t"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    #[test]
    fn folders_are_made_beneath_the_roots_alone() {
        let folder = tempfile::tempdir().unwrap();
        let roots = [folder.path().join("root")];
        std::fs::create_dir(&roots[0]).unwrap();
        std::os::unix::fs::symlink("/", roots[0].join("out")).unwrap();
        std::fs::write(roots[0].join("file"), "").unwrap();
        let run = |path: &str| {
            let mut mount =
                Mount { options: vec![format!("{MKDIR}path={path}"), "ro".into()], ..Mount::default() };
            mkdir(&mut mount, &roots).map(|()| mount.options)
        };
        let root = roots[0].display();
        assert_eq!(run(&format!("{root}/upper:750")).unwrap(), ["ro"]);
        assert_eq!(run(&format!("{root}/upper:750")).unwrap(), ["ro"]);
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(roots[0].join("upper")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o750);
        for path in [
            "/elsewhere/x".to_owned(),
            format!("{root}/../x"),
            format!("{root}/file"),
            format!("{root}/x:9"),
            format!("{root}/x:7777"),
            format!("{root}/x:700:0"),
            format!("{root}/x:700:a:b"),
            format!("{root}"),
        ] {
            assert!(matches!(run(&path), Err(Error::InvalidArgument(_))), "{path}: {:?}", run(&path));
        }
        // Beneath the root, wherever links lead.
        let _ = run(&format!("{root}/out/gantry-mkdir-test"));
        assert!(!Path::new("/gantry-mkdir-test").exists());
    }
}
