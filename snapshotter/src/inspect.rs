//! A look at a built-in snapshotter's folder while nobody has it open, and the removal of what is lost in it.
//!
//! Invariant: a look changes nothing: neither is a record that a crash cut short cut off, nor a mount taken down.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::folders::{CONTENT, Folders, Layout, PLAIN};
use crate::{Error, Info, Kind, Result, Usage, btrfs, erofs, io, store};

/// What is in a snapshotter's folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// The snapshots that are recorded, ordered by key.
    pub snapshots: Vec<StoredSnapshot>,
    /// The names in the folder of all snapshots' folders.
    pub folders: BTreeSet<String>,
    /// Bytes at the journal's end that a crash left half written.
    pub torn: u64,
}

/// A snapshot as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSnapshot {
    /// What is recorded of it.
    pub info: Info,
    /// The number of its folder.
    pub id: u64,
    /// What it took when it was committed.
    pub usage: Usage,
    /// Where its content is to be: a folder, or an image.
    pub content: PathBuf,
    /// Whether it is there.
    pub there: bool,
}

fn layout(name: &str) -> Layout {
    match name {
        erofs::NAME => erofs::IMAGES,
        btrfs::NAME => btrfs::SUBVOLUMES,
        _ => PLAIN,
    }
}

/// Looks at the folder of the built-in snapshotter of this name; None when it has never been used.
pub fn inspect(name: &str, root: &Path) -> Result<Option<Stored>> {
    let snapshots = root.join("snapshots");
    let entries = match fs::read_dir(&snapshots) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(io("list", &snapshots))?,
    };
    let mut stored = Stored::default();
    for entry in entries {
        let entry = entry.map_err(io("list", &snapshots))?;
        stored.folders.insert(entry.file_name().to_string_lossy().into_owned());
    }
    let Some((records, torn)) = store::read(root)? else {
        if stored.folders.is_empty() {
            return Ok(None);
        }
        return Err(store::missing(root));
    };
    stored.torn = torn;
    let layer = layout(name).layer;
    for (key, record) in records {
        let part = if record.kind == Kind::Committed { layer } else { CONTENT };
        let content = snapshots.join(record.id.to_string()).join(part);
        let there = match fs::symlink_metadata(&content) {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(io("look at", &content)(error)),
        };
        let (info, usage) = (record.info(&key), record.usage());
        stored.snapshots.push(StoredSnapshot { info, id: record.id, usage, content, there });
    }
    Ok(Some(stored))
}

/// Removes snapshots, those stacked on others first; one that is not there is no error.
pub fn forget(name: &str, root: &Path, keys: &[String]) -> Result<()> {
    let folders = Folders::open(root, layout(name))?;
    for key in keys {
        match folders.remove(key) {
            Ok(_) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Labels, Native, Snapshotter as _};

    #[test]
    fn a_look_shows_what_is_there_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(inspect("native", dir.path()).unwrap(), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let native = Native::open(dir.path()).unwrap();
        native.prepare("a", "", &Labels::new()).unwrap();
        native.commit("layer", "a", &Labels::new()).unwrap();
        native.prepare("top", "layer", &Labels::new()).unwrap();
        drop(native);
        let journal = dir.path().join("journal");
        let mut bytes = fs::read(&journal).unwrap();
        bytes.extend(b"torn");
        fs::write(&journal, &bytes).unwrap();
        fs::remove_dir_all(dir.path().join("snapshots/2")).unwrap();
        fs::create_dir(dir.path().join("snapshots/9")).unwrap();
        let stored = inspect("native", dir.path()).unwrap().unwrap();
        assert_eq!(fs::read(&journal).unwrap(), bytes);
        assert_eq!(stored.torn, 4);
        let seen: Vec<_> = stored
            .snapshots
            .iter()
            .map(|one| (one.info.key.as_str(), one.info.kind, one.id, one.there))
            .collect();
        assert_eq!(seen, [("layer", Kind::Committed, 1, true), ("top", Kind::Active, 2, false)]);
        assert_eq!(stored.folders.iter().collect::<Vec<_>>(), ["1", "9"]);
        forget("native", dir.path(), &["top".into(), "layer".into(), "none".into()]).unwrap();
        let stored = inspect("native", dir.path()).unwrap().unwrap();
        assert!(stored.snapshots.is_empty() && stored.torn == 0, "{stored:?}");
        fs::remove_file(&journal).unwrap();
        assert!(matches!(inspect("native", dir.path()), Err(Error::Lost(_))));
    }
}
