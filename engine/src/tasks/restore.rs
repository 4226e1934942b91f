//! After a restart: finding the tasks of an earlier engine, and ending those whose shim is dead.
//!
//! ```text
//! bundle --> where does the shim listen? --> connect --> is there a task in it? --> live
//!                 |  nowhere                   | refused       | no, and none is being made
//!                 v                            v               v
//!       its start was cut short          dead: clean up,     the shim ends
//!       what it left ends                exit and delete
//!       the bundle is removed            are published
//! ```
//!
//! Invariants: every bundle is looked at, all at once, each within a time limit; one that cannot be settled is logged
//! and keeps nobody else from coming back. A shim that listens and does not answer is taken for slow, not for dead:
//! its containers run.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::stream::{self, StreamExt as _};
use proto::containerd::events::{TaskDelete, TaskExit};
use proto::containerd::services::containers::v1::Container;
use proto::containerd::types::Sandbox;
use shim_api::bootstrap::Answer;
use shim_api::{Code, task as shim};

use super::Tasks;
use super::bundle::{Bundles, End, Of};
use super::launch::ShimLog;
use super::task::{Connect, Exit, Live, Phase, Task};
use crate::context::{Namespace, validate_identifier};
use crate::error::{Error, Result, blocking};
use crate::metadata::Read as _;

/// How long a shim may take to say what it has before the engine goes on without its answer.
const LOAD_LIMIT: Duration = Duration::from_secs(5);
/// How long a start or a create that the last engine began may take to come to its end.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at a shim that is about to settle.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How many bundles are looked at together.
const WIDTH: usize = 64;
/// The status of a container that was ended with its shim: 128 + SIGKILL.
const KILLED: u32 = 137;

impl Tasks {
    /// Brings back the tasks of an earlier engine. To be called once, before clients are served.
    pub async fn restore(&self) {
        let begun = Instant::now();
        let tasks: Vec<_> = self.tasks.lock().values().cloned().collect();
        let count = tasks.len();
        stream::iter(tasks)
            .for_each_concurrent(WIDTH, |task| async move {
                if let Err(error) = self.load(&task).await {
                    tracing::error!(%error, id = task.id, namespace = %task.namespace, "a bundle is set aside");
                    self.forget(&task);
                }
            })
            .await;
        let this = self.clone();
        let swept = blocking(move || {
            this.bundles.iter().for_each(remove_stray_work);
            Ok(())
        });
        if let Err(error) = swept.await {
            tracing::error!(%error, "looking for stray work folders");
        }
        if count > 0 {
            let live = self.tasks.lock().values().filter(|task| task.live().is_some()).count();
            tracing::info!(bundles = count, live, took = ?begun.elapsed(), "tasks restored");
        }
    }

    /// Takes the names of all bundles for their tasks. Removals that were cut short are ended here.
    pub(super) fn find_bundles(&self) {
        for bundles in &*self.bundles {
            self.find_bundles_of(bundles);
        }
    }

    fn find_bundles_of(&self, bundles: &Bundles) {
        for (namespace, id) in entries_of_entries(&bundles.state) {
            if let Some(id) = id.strip_prefix('.') {
                if let Ok(namespace) = Namespace::new(&namespace)
                    && let Err(error) = bundles.bundle(&namespace, id).remove_hidden()
                {
                    tracing::warn!(%error, id, %namespace, "what is left of a removed bundle stays");
                }
                continue;
            }
            let Ok(namespace) = Namespace::new(&namespace) else { continue };
            let bundle = bundles.bundle(&namespace, &id);
            if validate_identifier("container id", &id).is_err() || !bundle.path.is_dir() {
                tracing::warn!(path = %bundle.path.display(), "this is no bundle");
                continue;
            }
            let task = Task::new(bundles.of, namespace.clone(), id.clone(), bundle);
            // All before any: who shares a shim must be known before one is ended.
            if let Ok(answer) = task.bundle.shim_address() {
                task.note_address(&answer.address);
            }
            self.tasks.lock().insert((bundles.of, namespace, id), task);
        }
    }

    async fn load(&self, task: &Arc<Task>) -> Result<()> {
        match task.bundle.end() {
            Some(End::Deleted) => {
                // The last engine may have ended before it let the shim go.
                if let Ok(answer) = task.bundle.shim_address()
                    && let Ok(live) = Live::connect(&answer, &task.namespace).await
                {
                    self.end_shim(task, &live).await;
                }
                self.remove_bundle(task).await;
                self.forget(task);
                return Ok(());
            }
            Some(End::Dead(exit)) if self.is_recorded(task) => {
                task.claim_end();
                task.set(Phase::Dead { exit, clean: true });
                return Ok(());
            }
            Some(End::Dead(_)) | None => {}
        }
        if let Ok(log) = ShimLog::follow(&task.bundle, &task.namespace, &task.id) {
            task.follows(log);
        }
        let answer = match await_address(task).await {
            Ok(Some(answer)) => answer,
            Ok(None) => return self.discard(task).await,
            Err(error) if self.is_recorded(task) => {
                return self.keep_trying(task, &error);
            }
            Err(_) => return self.discard(task).await,
        };
        task.note_address(&answer.address);
        let live = match Live::connect(&answer, &task.namespace).await {
            Ok(live) => live,
            Err(Connect::Failed(error)) => return self.keep_trying(task, &error),
            Err(Connect::Dead(error)) => {
                tracing::info!(%error, id = task.id, namespace = %task.namespace, "a shim has died meanwhile");
                return self.settle_dead(task).await;
            }
        };
        let deadline = Instant::now() + SETTLE_LIMIT;
        loop {
            let asked = async {
                match task.of {
                    Of::Container => {
                        let request = shim::StateRequest { id: task.id.clone(), exec_id: String::new() };
                        live.client.state(request).await.map(|state| state.pid)
                    }
                    Of::Sandbox => self.sandbox_restored(task, &live).await,
                }
            };
            match tokio::time::timeout(LOAD_LIMIT, asked).await {
                Ok(Ok(pid)) => {
                    task.note_pid(pid);
                    break;
                }
                Ok(Err(error)) if error.code == Code::NotFound => {
                    // Its create was cut short, or goes on without its engine: then it will have a task soon.
                    let request = shim::ShutdownRequest { id: task.id.clone(), now: false };
                    let _ = tokio::time::timeout(LOAD_LIMIT, live.client.shutdown(request)).await;
                    let gone = tokio::time::timeout(LOOK_AGAIN, live.client.closed()).await.is_ok();
                    if gone || Instant::now() > deadline {
                        return self.discard(task).await;
                    }
                }
                // What it means for the shim is found out by those who keep the way to it.
                Ok(Err(error)) if error.code == Code::Closed => break,
                Ok(Err(error)) => {
                    tracing::warn!(%error, id = task.id, namespace = %task.namespace, "a shim does not know its task");
                    break;
                }
                Err(_) => {
                    tracing::warn!(id = task.id, namespace = %task.namespace, "a shim does not answer within {LOAD_LIMIT:?}; its task is kept");
                    break;
                }
            }
        }
        self.went_live(task, live);
        Ok(())
    }

    /// Keeps a task whose shim may be alive and cannot be reached now.
    fn keep_trying(&self, task: &Arc<Task>, error: &Error) -> Result<()> {
        task.set_reached(Phase::Unreachable(error.to_string().into()));
        tokio::spawn(self.clone().keep(task.clone(), None));
        Ok(())
    }

    /// Ends a task that never came to be: no client was told of it. When it cannot be ended its bundle stays, for the next
    /// start or create to try again.
    async fn discard(&self, task: &Arc<Task>) -> Result<()> {
        tracing::info!(id = task.id, namespace = %task.namespace, "what is left of an unfinished create is removed");
        self.kill_shim(task).await;
        self.run_delete(task).await?;
        self.remove_bundle(task).await;
        self.forget(task);
        Ok(())
    }

    /// Cleans up after a shim that was dead when the engine started. Without a container no client can ask for the
    /// task, so that it is removed at once.
    async fn settle_dead(&self, task: &Arc<Task>) -> Result<()> {
        task.claim_end();
        if !self.is_recorded(task) {
            return self.discard(task).await;
        }
        self.clean_up_dead(task).await;
        Ok(())
    }

    /// Ends what a dead shim has left: processes, mounts, control groups; and says what it can no longer say.
    pub(super) async fn clean_up_dead(&self, task: &Arc<Task>) {
        let (id, namespace) = (&task.id, &task.namespace);
        tracing::warn!(id, %namespace, "the shim is gone; cleaning up after it");
        sys::failpoint!("tasks.dead.found");
        let (exit, clean) = match self.run_delete(task).await {
            Ok(exit) => (exit, true),
            Err(error) => {
                tracing::error!(%error, id, %namespace, "the container of a dead shim may still run; deleting its task tries again");
                (Exit::of(0, KILLED, Some(SystemTime::now().into())), false)
            }
        };
        // Only now: the shim's last events may have come in meanwhile.
        let seen = task.seen_exit();
        let exit = seen.unwrap_or(exit);
        if task.of == Of::Sandbox {
            self.announce_end(task, exit).await;
            if clean {
                self.note_end(task, End::Dead(exit)).await;
            }
            task.set(Phase::Dead { exit, clean });
            return;
        }
        if seen.is_none() {
            let event = TaskExit {
                container_id: id.clone(),
                id: id.clone(),
                pid: exit.pid,
                exit_status: exit.status,
                exited_at: exit.at,
            };
            self.events.publish(namespace, "/tasks/exit", &event);
        }
        let event = TaskDelete {
            container_id: id.clone(),
            pid: exit.pid,
            exit_status: exit.status,
            exited_at: exit.at,
            id: String::new(),
        };
        self.events.publish(namespace, "/tasks/delete", &event);
        sys::failpoint!("tasks.dead.announced");
        // Once the end is noted nobody tells it again.
        if let Err(error) = self.events.settled().await {
            tracing::warn!(%error, id, %namespace, "the end of a task may be missing in the journal of events");
        }
        if clean {
            self.note_end(task, End::Dead(exit)).await;
        }
        task.set(Phase::Dead { exit, clean });
    }

    /// Whether clients know the container, or the sandbox.
    fn is_recorded(&self, task: &Task) -> bool {
        let key = [task.namespace.as_str(), task.id.as_str()];
        let view = self.metadata.view();
        let known = match task.of {
            Of::Container => view.has::<Container>(&key),
            Of::Sandbox => view.has::<Sandbox>(&key),
        };
        known.unwrap_or(false)
    }

    /// The runtime's name as clients set it; empty when they set none.
    fn recorded_runtime(&self, task: &Task) -> Result<String> {
        let key = [task.namespace.as_str(), task.id.as_str()];
        let view = self.metadata.view();
        let name = match task.of {
            Of::Container => {
                view.get::<Container>(&key)?.and_then(|of| of.runtime).map(|runtime| runtime.name)
            }
            Of::Sandbox => view.get::<Sandbox>(&key)?.and_then(|of| of.runtime).map(|runtime| runtime.name),
        };
        Ok(name.unwrap_or_default())
    }

    /// Runs the shim's `delete` and unmounts what is mounted in the bundle, whatever the shim did.
    pub(super) async fn run_delete(&self, task: &Task) -> Result<Exit> {
        // The noted one may have gone with an upgrade; its successor cleans up as well.
        let program = match task.bundle.program().filter(|program| program.exists()) {
            Some(program) => program,
            None => {
                let runtime = self.recorded_runtime(task)?;
                if runtime.is_empty() {
                    // Neither the bundle nor a record knows a shim: none was started.
                    return Ok(Exit::of(0, KILLED, Some(SystemTime::now().into())));
                }
                self.launcher.find(&runtime)?
            }
        };
        let answer = self.launcher.delete(&program, &task.bundle, &task.namespace, &task.id).await;
        // The root file system, and the namespaces of a sandbox.
        let bundle = task.bundle.path.clone();
        blocking(move || {
            sys::mount::unmount_all(&bundle).map_err(|error| Error::io("unmount", &bundle, &error))
        })
        .await?;
        let answer = answer?;
        Ok(Exit::of(answer.pid, answer.exit_status, answer.exited_at))
    }
}

/// Removes work folders of tasks that are no more, as after a reboot.
fn remove_stray_work(bundles: &Bundles) {
    for (namespace, id) in entries_of_entries(&bundles.work) {
        let Ok(namespace) = Namespace::new(&namespace) else { continue };
        if !bundles.state.join(namespace.as_str()).join(&id).exists() {
            let path = bundles.work.join(namespace.as_str()).join(&id);
            if let Err(error) = sys::fs::remove_tree(&path) {
                tracing::warn!(%error, path = %path.display(), "a stray work folder stays");
            }
        }
    }
}

/// Where the task's shim listens; None when it never said. A start that the last engine began may be about to say so.
async fn await_address(task: &Task) -> Result<Option<Answer>> {
    let deadline = Instant::now() + SETTLE_LIMIT;
    loop {
        match task.bundle.shim_address() {
            Err(Error::NotFound(_)) => {}
            known => return known.map(Some),
        }
        let path = task.bundle.path.clone();
        if Instant::now() > deadline || blocking(move || Ok(processes_in(&path))).await?.is_empty() {
            // It may have said so between the two looks.
            return Ok(task.bundle.shim_address().ok());
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// The processes whose working folder is this one: a shim and the runtimes it starts are started in the bundle, while
/// the processes of a container have working folders of another mount namespace.
pub(super) fn processes_in(folder: &Path) -> Vec<u32> {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == folder))
        .collect()
}

/// Kills a process; one that is gone is fine.
pub(super) fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// The names two levels down: `(folder, entry)`, sorted.
fn entries_of_entries(folder: &Path) -> Vec<(String, String)> {
    let names = |folder: &Path| -> Vec<String> {
        let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    let mut found = Vec::new();
    for outer in names(folder) {
        for inner in names(&folder.join(&outer)) {
            found.push((outer.clone(), inner));
        }
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_folder_and_killed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(processes_in(folder.path()).is_empty());
        let mut child =
            std::process::Command::new("sleep").arg("1000").current_dir(folder.path()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while processes_in(folder.path()) != [child.id()] {
            assert!(Instant::now() < deadline, "the child does not show");
        }
        kill(child.id());
        assert!(!child.wait().unwrap().success());
        assert!(processes_in(folder.path()).is_empty());
    }

    #[test]
    fn entries_two_levels_down() {
        let folder = tempfile::tempdir().unwrap();
        for path in ["a/x", "a/.y", "b/z"] {
            fs::create_dir_all(folder.path().join(path)).unwrap();
        }
        fs::write(folder.path().join("file"), "").unwrap();
        let pairs: Vec<_> = entries_of_entries(folder.path());
        assert_eq!(pairs.iter().map(|(a, b)| format!("{a}/{b}")).collect::<Vec<_>>(), ["a/.y", "a/x", "b/z"]);
        assert!(entries_of_entries(&folder.path().join("none")).is_empty());
    }
}
