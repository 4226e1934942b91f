//! What a runtime's failure means. This is the one place that matches error text: runtimes have no codes, only a
//! log (a JSON object on each line) and what they print. The fixtures below are real lines.

use std::io;
use std::path::Path;

use serde::Deserialize;
use shim_api::{Code, Error};

/// Words of runc, crun and youki, in lower case, and the class they mean. The first that is found counts.
const MEANINGS: [(&str, Code); 16] = [
    ("container does not exist", Code::NotFound),
    ("does not exist", Code::NotFound),
    ("container not running", Code::NotFound),
    ("process already finished", Code::NotFound),
    ("no such process", Code::NotFound),
    ("container is not running", Code::NotFound),
    ("already exists", Code::AlreadyExists),
    ("cannot exec in a stopped container", Code::FailedPrecondition),
    ("cannot exec in a paused container", Code::FailedPrecondition),
    ("cannot exec a container that has stopped", Code::FailedPrecondition),
    ("cannot start a container that has stopped", Code::FailedPrecondition),
    ("cannot start an already running container", Code::FailedPrecondition),
    ("container is not paused", Code::FailedPrecondition),
    ("container not paused", Code::FailedPrecondition),
    ("is not stopped", Code::FailedPrecondition),
    ("criu", Code::FailedPrecondition),
];

#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// The runtime could not even be run.
pub(super) fn not_run(binary: &Path, error: &io::Error) -> Error {
    let what = format!("run the OCI runtime {}: {error}", binary.display());
    match error.kind() {
        io::ErrorKind::NotFound => Error::failed_precondition(format!(
            "{what}; install it, or name another by the runtime option BinaryName"
        )),
        io::ErrorKind::PermissionDenied => Error::permission_denied(what),
        _ => Error::unavailable(what),
    }
}

/// The runtime ran and failed.
pub(super) fn of_run(verb: &str, binary: &Path, status: u32, log: &[u8], output: &[u8]) -> Error {
    let logged = last_error(log).or_else(|| last_error(output));
    let cause = logged.or_else(|| last_line(output)).unwrap_or_else(|| {
        let how =
            if status > 128 { format!("signal {}", status - 128) } else { format!("exit status {status}") };
        format!("{} ended with {how} and no message", binary.display())
    });
    // Docker and others look for this beginning.
    Error::new(class(verb, &cause), format!("OCI runtime {verb} failed: {cause}"))
}

fn class(verb: &str, cause: &str) -> Code {
    // What these complain about may be anything the image or the spec names: a path that "does not exist" is
    // not the container.
    if matches!(verb, "create" | "restore" | "start") {
        let taken = cause.contains("container with given ID already exists")
            || cause.contains("container with id exists");
        return if taken { Code::AlreadyExists } else { Code::Unknown };
    }
    let cause = cause.to_lowercase();
    if verb == "exec" && !cause.contains("container") {
        return Code::Unknown;
    }
    MEANINGS.iter().find(|(words, _)| cause.contains(words)).map_or(Code::Unknown, |(_, code)| *code)
}

/// The message of the log's last error.
fn last_error(log: &[u8]) -> Option<String> {
    let lines = log.split(|byte| *byte == b'\n').rev();
    let mut errors = lines.filter_map(|line| serde_json::from_slice::<LogLine>(line).ok());
    errors.find(|line| line.level == "error").map(|line| line.msg.trim().to_owned())
}

fn last_line(output: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(output);
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Verb, log, output, and the class and message that follow. runc 1.1.5 unless said otherwise.
    const FIXTURES: [(&str, &str, &str, Code, &str); 9] = [
        (
            "kill",
            r#"{"level":"error","msg":"container not running","time":"2023-06-01T00:00:00Z"}"#,
            "",
            Code::NotFound,
            "container not running",
        ),
        (
            "delete",
            r#"{"level":"error","msg":"container does not exist","time":"2023-06-01T00:00:00Z"}"#,
            "",
            Code::NotFound,
            "container does not exist",
        ),
        (
            "create",
            r#"{"level":"error","msg":"runc create failed: unable to start container process: exec: \"nope\": executable file not found in $PATH","time":"x"}"#,
            "",
            Code::Unknown,
            "runc create failed: unable to start container process: exec: \"nope\": executable file not found in $PATH",
        ),
        (
            "create",
            r#"{"level":"warning","msg":"x","time":"x"}
{"level":"error","msg":"runc create failed: container with given ID already exists","time":"x"}"#,
            "",
            Code::AlreadyExists,
            "runc create failed: container with given ID already exists",
        ),
        (
            "exec",
            r#"{"level":"error","msg":"exec failed: unable to start container process: exec: \"/x\": stat /x: no such file or directory","time":"x"}"#,
            "",
            Code::Unknown,
            "exec failed: unable to start container process: exec: \"/x\": stat /x: no such file or directory",
        ),
        (
            "exec",
            r#"{"level":"error","msg":"cannot exec in a stopped container","time":"x"}"#,
            "",
            Code::FailedPrecondition,
            "cannot exec in a stopped container",
        ),
        // crun 1.8 prints and logs so.
        (
            "kill",
            r#"{"msg":"kill container `x`: No such process", "level":"error", "time":"x"}"#,
            "",
            Code::NotFound,
            "kill container `x`: No such process",
        ),
        // No log at all: the last line printed.
        ("pause", "", "a\nboom\n\n", Code::Unknown, "boom"),
        ("pause", "{not json", "", Code::Unknown, "runc ended with signal 9 and no message"),
    ];

    #[test]
    fn fixtures_keep_their_meaning() {
        for (verb, log, output, code, message) in FIXTURES {
            let error = of_run(verb, Path::new("runc"), 137, log.as_bytes(), output.as_bytes());
            assert_eq!(error.code, code, "{log}");
            assert_eq!(error.message, format!("OCI runtime {verb} failed: {message}"));
        }
    }

    #[test]
    fn a_missing_runtime_says_what_to_do() {
        let error = not_run(Path::new("runc"), &io::ErrorKind::NotFound.into());
        assert_eq!(error.code, Code::FailedPrecondition);
        assert!(error.message.contains("BinaryName"), "{error}");
    }
}
