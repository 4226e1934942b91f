//! Stream processors: programs that turn a blob of one media type into one of another, such as a decryption.
//!
//! ```text
//! blob (accepted media type) --stdin--> program --stdout--> blob (returned media type) --> the next, or the unpacking
//! ```
//!
//! A program finds its media type in STREAM_PROCESSOR_MEDIATYPE, and the payload that the client sent for it, if there is one,
//! at descriptor 3. Invariant: what a program wrote counts only when it ended well, and none is left running.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek as _};
use std::process::{Child, ChildStdout, Command, Stdio};

use prost::Message as _;
use prost_types::Any;

use crate::error::{Error, Result};

/// The variable that names the media type.
const MEDIA_TYPE: &str = "STREAM_PROCESSOR_MEDIATYPE";
/// How many programs may follow on each other.
const CHAIN_MAX: usize = 8;
/// What is quoted of what a program says, in bytes.
const QUOTED: u64 = 2000;

/// A program and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processor {
    /// The name of its section; payloads are sent to it by this name.
    pub name: String,
    /// The media types that it takes.
    pub accepts: Vec<String>,
    /// The media type that it makes.
    pub returns: String,
    /// The program.
    pub path: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Additions to its environment, `NAME=VALUE`.
    pub env: Vec<String>,
}

/// Runs a blob through the programs that its media type asks for; the stream, and its media type then.
pub(super) fn process(
    processors: &[Processor],
    payloads: &BTreeMap<String, Any>,
    blob: File,
    media_type: String,
) -> Result<(Box<dyn Read + Send>, String)> {
    let mut media_type = media_type;
    let mut running = Vec::new();
    let mut stdin = Some(Stdio::from(
        blob.try_clone()
            .map_err(|error| Error::unknown(format!("duplicate the descriptor of a blob: {error}")))?,
    ));
    let mut last: Option<ChildStdout> = None;
    while let Some(processor) = processors.iter().find(|of| of.accepts.contains(&media_type)) {
        if running.len() == CHAIN_MAX {
            return Err(Error::invalid_argument(format!(
                "more than {CHAIN_MAX} stream processors would follow on each other, up to {:?}; do two of them feed each other?",
                processor.name
            )));
        }
        let input = last.take().map(Stdio::from).or_else(|| stdin.take()).unwrap_or_else(Stdio::null);
        let (program, stdout) = Running::start(processor, &media_type, payloads.get(&processor.name), input)?;
        running.push(program);
        last = Some(stdout);
        media_type.clone_from(&processor.returns);
    }
    Ok(match last {
        Some(stdout) => (Box::new(Processed { stdout, running }), media_type),
        None => (Box::new(blob), media_type),
    })
}

/// A program that was started.
struct Running {
    name: String,
    child: Child,
    said: File,
}

impl Running {
    fn start(
        processor: &Processor,
        media_type: &str,
        payload: Option<&Any>,
        stdin: Stdio,
    ) -> Result<(Self, ChildStdout)> {
        let failed = |error: io::Error| {
            Error::failed_precondition(format!(
                "stream processor {:?} cannot be started: {}: {error}; see stream_processors in the configuration",
                processor.name, processor.path
            ))
        };
        let said = File::from(sys::process::memory_file("stream-processor").map_err(failed)?);
        let mut command = Command::new(&processor.path);
        command.args(&processor.args).env(MEDIA_TYPE, media_type).stdin(stdin).stdout(Stdio::piped());
        command.envs(processor.env.iter().filter_map(|pair| pair.split_once('=')));
        command.stderr(said.try_clone().map_err(failed)?);
        if let Some(payload) = payload {
            let payload = sys::process::memory_file_of(&payload.encode_to_vec()).map_err(failed)?;
            sys::process::pass_descriptors(&mut command, vec![payload.into()]);
        }
        let mut child = command.spawn().map_err(failed)?;
        let stdout = child.stdout.take().ok_or_else(|| failed(io::Error::other("it has no stdout")))?;
        Ok((Running { name: processor.name.clone(), child, said }, stdout))
    }

    /// How it ended, which it is about to.
    fn end(&mut self) -> io::Result<()> {
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        let mut said = String::new();
        self.said.rewind()?;
        (&mut self.said).take(QUOTED).read_to_string(&mut said)?;
        Err(io::Error::other(format!("stream processor {:?} failed ({status}): {}", self.name, said.trim())))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What the last program writes.
struct Processed {
    stdout: ChildStdout,
    running: Vec<Running>,
}

impl Read for Processed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.stdout.read(buffer)? {
            // The first that failed says why the others have nothing more.
            0 if !buffer.is_empty() => self.running.iter_mut().try_for_each(Running::end).map(|()| 0),
            count => Ok(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn processor(name: &str, accepts: &str, returns: &str, script: &str) -> Processor {
        Processor {
            name: name.into(),
            accepts: vec![accepts.into()],
            returns: returns.into(),
            path: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: vec!["WORD=more".into()],
        }
    }

    fn run(processors: &[Processor], payload: Option<&str>) -> Result<(String, String)> {
        let mut blob = tempfile::tempfile().unwrap();
        blob.write_all(b"blob ").unwrap();
        blob.rewind().unwrap();
        let payload = payload.map(|text| Any { type_url: "x".into(), value: text.as_bytes().to_vec() });
        let payloads = payload.into_iter().map(|payload| ("a".to_owned(), payload)).collect();
        let (mut stream, media_type) = process(processors, &payloads, blob, "one".into())?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map_err(|error| Error::unknown(error.to_string()))?;
        Ok((text, media_type))
    }

    #[test]
    fn programs_follow_on_each_other() {
        let both = [
            processor(
                "a",
                "one",
                "two",
                "cat; printf '%s %s ' $WORD $STREAM_PROCESSOR_MEDIATYPE; tr -d '\\n\\001\\022' <&3",
            ),
            processor("b", "two", "three", "cat; printf ' last'"),
        ];
        assert_eq!(
            run(&both, Some("payload")).unwrap(),
            ("blob more one \u{1}x\u{7}payload last".replace('\u{1}', ""), "three".into())
        );
        assert_eq!(run(&[], None).unwrap(), ("blob ".into(), "one".into()));
        assert_eq!(run(&both[1..], None).unwrap(), ("blob ".into(), "one".into()));
    }

    #[test]
    fn what_a_program_wrote_counts_only_when_it_ended_well() {
        let bad = [
            processor("a", "one", "two", "cat; echo why >&2; exit 3"),
            processor("b", "two", "three", "cat"),
        ];
        let error = run(&bad, None).unwrap_err().to_string();
        assert!(error.contains("\"a\"") && error.contains("why"), "{error}");
        let absent = [Processor { path: "/no/such".into(), ..processor("a", "one", "two", "") }];
        assert!(matches!(run(&absent, None), Err(Error::FailedPrecondition(_))));
        let circle = [processor("a", "one", "two", "cat"), processor("b", "two", "one", "cat")];
        assert!(matches!(run(&circle, None), Err(Error::InvalidArgument(_))));
        // One that is not read to its end is ended.
        let mut blob = tempfile::tempfile().unwrap();
        blob.write_all(b"x").unwrap();
        let endless = [processor("a", "one", "two", "exec cat /dev/zero")];
        let (mut stream, _) = process(&endless, &BTreeMap::new(), blob, "one".into()).unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
    }
}
