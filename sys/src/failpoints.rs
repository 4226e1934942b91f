//! Failpoints: named places, passed at every step of every change, where a test ends or stops the process.
//!
//! ```text
//! $GANTRY_FAILPOINTS/trace    where it is there, each passed point is appended to it:  PID NAME
//!                   /armed    NAME COUNT ACTION TOKEN: the process that passes NAME for the COUNT-th time since it first
//!                             saw this text does ACTION: `kill` or `stop`, by a signal to itself that nothing can catch
//!                   /fired    what `armed` is called from then on
//! ```
//!
//! Invariants: without the feature `failpoints` a point is no code at all. With it, a point that is armed takes effect once: in
//! whichever process, and not again in the one that takes its place.

/// Passes a point, named as by `format!`.
#[macro_export]
macro_rules! failpoint {
    ($($name:tt)*) => {
        $crate::failpoints::pass(::core::format_args!($($name)*))
    };
}

/// Passes a point; [`failpoint!`](crate::failpoint) calls this.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub const fn pass(_: std::fmt::Arguments<'_>) {}

#[cfg(feature = "failpoints")]
pub use with::pass;

#[cfg(feature = "failpoints")]
mod with {
    use std::fmt::Arguments;
    use std::fs::{self, OpenOptions};
    use std::io::Write as _;
    use std::path::{Path, PathBuf};
    use std::sync::{Mutex, OnceLock, PoisonError};

    use rustix::process::{Signal, getpid, kill_process};

    /// Passes a point; [`failpoint!`](crate::failpoint) calls this.
    pub fn pass(name: Arguments<'_>) {
        static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
        let folder = FOLDER.get_or_init(|| std::env::var_os("GANTRY_FAILPOINTS").map(PathBuf::from));
        if let Some(folder) = folder {
            pass_in(folder, &name.to_string());
        }
    }

    fn pass_in(folder: &Path, name: &str) {
        /// What is armed, and how often it was passed since.
        static ARMED: Mutex<(String, u32)> = Mutex::new((String::new(), 0));
        if let Ok(mut trace) = OpenOptions::new().append(true).open(folder.join("trace")) {
            let _ = trace.write_all(format!("{} {name}\n", std::process::id()).as_bytes());
        }
        let file = folder.join("armed");
        let Ok(text) = fs::read_to_string(&file) else { return };
        let mut words = text.split_whitespace();
        let (Some(wanted), Some(count)) = (words.next(), words.next().and_then(|count| count.parse().ok()))
        else {
            return;
        };
        if wanted != name {
            return;
        }
        let signal = if words.next() == Some("stop") { Signal::STOP } else { Signal::KILL };
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        if armed.0 != text {
            *armed = (text, 0);
        }
        armed.1 += 1;
        // Of several at once, the one that takes it away.
        if armed.1 == count && fs::rename(&file, folder.join("fired")).is_ok() {
            let _ = kill_process(getpid(), signal);
        }
    }
}
