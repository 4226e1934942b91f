//! The file of a log: appended to, opened anew when it was renamed, and never a reason for a process to wait or to
//! end.
//!
//! Invariant: it holds whole lines. What cannot be written is dropped and counted, and when the file can be written
//! again the first line says how many lines are missing before it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A path that is not a file must not hold us up.
const O_NONBLOCK: i32 = 0o4000;
/// How often a file that could not be opened is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);

pub(super) struct LogFile {
    /// Without one nothing is written.
    path: Option<PathBuf>,
    file: Option<File>,
    tried: Option<Instant>,
    /// Whether the file ends in the middle of a line.
    torn: bool,
    lost: u64,
}

impl LogFile {
    pub(super) fn new(path: Option<PathBuf>) -> Self {
        Self { path, file: None, tried: None, torn: false, lost: 0 }
    }

    /// Opens the file at the path, which may be another than before; on failure the one that is open stays.
    pub(super) fn open(&mut self) -> io::Result<()> {
        self.tried = Some(Instant::now());
        let Some(path) = &self.path else { return Ok(()) };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o640).custom_flags(O_NONBLOCK);
        self.file = Some(options.open(path)?);
        self.torn = false;
        Ok(())
    }

    /// Whether anything is written at all.
    pub(super) fn is_wanted(&self) -> bool {
        self.path.is_some()
    }

    /// The path, for people.
    pub(super) fn name(&self) -> String {
        self.path.as_deref().map_or_else(String::new, |path| path.display().to_string())
    }

    /// Lines that were lost since the file could be written last.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Appends whole lines; those that cannot be written are lost.
    pub(super) fn append(&mut self, lines: &[u8]) {
        if let Err((written, error)) = self.write(lines) {
            self.lose(&lines[written..], &error);
        }
    }

    /// Appends the line that tells of what was lost; false when it cannot be told yet.
    pub(super) fn tell(&mut self, line: &[u8]) -> bool {
        let told = self.write(line).is_ok();
        if told {
            tracing::warn!(lines = self.lost, path = ?self.path, "the log is written again; lines of it are lost");
            self.lost = 0;
        }
        told
    }

    /// Writes whole lines; on failure, how many bytes of them are in the file.
    fn write(&mut self, lines: &[u8]) -> Result<(), (usize, io::Error)> {
        if self.path.is_none() {
            return Ok(());
        }
        if self.file.is_none() && self.tried.is_none_or(|tried| tried.elapsed() > TRY_AGAIN) {
            self.open().map_err(|error| (0, error))?;
        }
        let Some(file) = &mut self.file else { return Err((0, io::ErrorKind::NotFound.into())) };
        if self.torn {
            file.write_all(b"\n").map_err(|error| (0, error))?;
            self.torn = false;
        }
        let mut written = 0;
        let error = loop {
            if written == lines.len() {
                return Ok(());
            }
            match file.write(&lines[written..]) {
                Ok(0) => break io::ErrorKind::WriteZero.into(),
                Ok(length) => written += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break error,
            }
        };
        let whole = lines[..written].iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let begun = (written - whole) as u64;
        if begun > 0 {
            let length = file.metadata().map(|file| file.len().saturating_sub(begun));
            self.torn = length.and_then(|length| file.set_len(length)).is_err();
        }
        Err((whole, error))
    }

    /// Counts lines that could not be written.
    pub(super) fn lose(&mut self, lines: &[u8], error: &io::Error) {
        if self.lost == 0 {
            tracing::warn!(%error, path = ?self.path, "a container's log cannot be written; lines are lost");
        }
        self.lost += lines.iter().filter(|byte| **byte == b'\n').count() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_log_is_appended_to_and_follows_a_rename_only_when_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pod/0.log");
        let mut log = LogFile::new(Some(path.clone()));
        log.open().unwrap();
        log.append(b"one\n");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o137, 0);
        let old = folder.path().join("pod/0.log.1");
        std::fs::rename(&path, &old).unwrap();
        log.append(b"two\n");
        log.open().unwrap();
        log.append(b"three\n");
        assert_eq!(std::fs::read(&old).unwrap(), b"one\ntwo\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"three\n");
        // What cannot be opened leaves the log as it is.
        std::fs::remove_dir_all(folder.path().join("pod")).unwrap();
        std::fs::write(folder.path().join("pod"), b"").unwrap();
        assert!(log.open().is_err());
        log.append(b"four\n");
        assert_eq!(log.lost(), 0, "the file without a name is still there");
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_tried_again_and_what_is_lost_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let blocker = folder.path().join("pod");
        std::fs::write(&blocker, b"").unwrap();
        let mut log = LogFile::new(Some(blocker.join("0.log")));
        log.append(b"one\ntwo\n");
        assert!(!log.tell(b"two lines\n"), "what cannot be told is told later");
        log.append(b"three\n");
        assert_eq!(log.lost(), 3);
        std::fs::remove_file(&blocker).unwrap();
        log.tried = None;
        assert!(log.tell(b"three lines\n"));
        log.append(b"four\n");
        assert_eq!(std::fs::read(blocker.join("0.log")).unwrap(), b"three lines\nfour\n");
        assert_eq!(log.lost(), 0);
        let mut none = LogFile::new(None);
        none.append(b"x\n");
        assert_eq!(none.lost(), 0, "no path, no loss");
    }

    #[test]
    fn what_is_not_a_file_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        sys::fifo::create(&folder.path().join("fifo"), 0o600).unwrap();
        assert!(LogFile::new(Some(folder.path().join("fifo"))).open().is_err());
        assert!(LogFile::new(Some(folder.path().to_owned())).open().is_err());
    }

    #[test]
    fn a_full_file_keeps_whole_lines() {
        // Writes beyond this fail with EFBIG, after a part of them.
        let limited = "ulimit -f 1; trap '' XFSZ; exec \"$0\" --exact --ignored \"$1\" --nocapture";
        let me = std::env::current_exe().unwrap();
        let name = "io::cri_log::file::tests::in_a_process_with_a_limit";
        let ended =
            std::process::Command::new("bash").args(["-c", limited]).arg(me).arg(name).output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stdout));
        assert!(String::from_utf8_lossy(&ended.stdout).contains("1 passed"));
    }

    #[test]
    #[ignore = "needs a limit on the size of files"]
    fn in_a_process_with_a_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let mut log = LogFile::new(Some(path.clone()));
        let line = |number: u32| format!("{number:08}\n");
        let batch: String = (0..200).map(line).collect();
        log.append(batch.as_bytes());
        let kept = std::fs::read_to_string(&path).unwrap();
        assert_eq!(kept, (0..113).map(line).collect::<String>(), "1024 / 9 lines");
        assert_eq!(log.lost(), 87);
        log.append(b"eight of\n");
        assert_eq!(log.lost(), 88);
        std::fs::write(&path, b"").unwrap();
        log.append(b"again\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"again\n");
    }
}
