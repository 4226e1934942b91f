//! A command under a pseudo terminal, as a person runs it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use nix::pty::{Winsize, openpty};

use crate::wait_for;

/// A command whose stdin, stdout and stderr are a terminal.
pub struct Terminal {
    master: File,
    child: Child,
    output: Arc<Mutex<String>>,
}

impl Terminal {
    /// Starts it in a terminal of this size.
    pub fn start(command: &Command, rows: u16, columns: u16) -> Self {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).unwrap();
        // setsid makes the terminal the controlling one, so that Ctrl-C and window changes are signalled.
        let mut session = Command::new("setsid");
        session.args(["--ctty", "--wait"]).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => session.env(key, value),
                None => session.env_remove(key),
            };
        }
        let slave = || Stdio::from(pty.slave.try_clone().unwrap());
        let child =
            session.env("TERM", "xterm").stdin(slave()).stdout(slave()).stderr(slave()).spawn().unwrap();
        let master = File::from(pty.master);
        let output = Arc::new(Mutex::new(String::new()));
        let (mut reader, sink) = (master.try_clone().unwrap(), output.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Ends with an error when the last holder of the other side has gone.
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                sink.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..read]));
            }
        });
        Terminal { master, child, output }
    }

    /// Types text.
    pub fn send(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Changes the size of the window.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&self.master, size).unwrap();
    }

    /// What has been shown so far.
    pub fn shown(&self) -> String {
        self.output.lock().unwrap().clone()
    }

    /// Waits until the text has been shown.
    pub fn expect(&self, text: &str) {
        let shown = || self.shown();
        wait_for(&format!("{text:?} in the terminal"), || shown().contains(text));
    }

    /// Waits until a shell in the terminal knows the size of its window, `ROWS COLUMNS`. Clients tell it after they have started
    /// the process, so that the first answer may be an older one.
    pub fn expect_size(&mut self, size: &str) {
        wait_for(&format!("a window of {size}"), || {
            self.send("stty size\n");
            self.shown().contains(size)
        });
    }

    /// Waits for the command's end; its exit code.
    pub fn wait(mut self) -> i32 {
        let mut code = None;
        wait_for("the command in the terminal to end", || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        code.unwrap().code().unwrap_or(-1)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
