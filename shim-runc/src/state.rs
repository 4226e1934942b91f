//! The life of a container's processes as a pure function: [`transition`] takes what happened and answers what to
//! do. No I/O, no clock, no text of a runtime; `container.rs` drives it.
//!
//! One type for the init and for execs (an exec has no process before it starts):
//!
//! ```text
//!             start            started              exited        nothing runs any more
//!   Created --------> Starting --------> Running ---------> Exiting ----------------> Stopped
//!     |  ^               |                                   (init waits for its        |
//!     |  `--- failed ----' init                               execs' exits)            |
//!     |                  `---- failed: an exec is Stopped                               |
//!     `------ delete ------> Deleting <--------------------------------- delete --------'
//!                               `--> gone; failed: back where it was
//! ```
//!
//! Invariants, property-tested below:
//! - a process's start is published before its exit, and each at most once;
//! - the init's exit is the last exit published: execs that run or are starting come first;
//! - nothing starts once the init has exited; every question is answered once.

use std::collections::BTreeMap;
use std::time::SystemTime;

use shim_api::Error;

/// Tells questions apart; the driver keeps who asked.
pub(crate) type Caller = u64;

/// Names a process of a container: empty for the init, else the exec's id; as on the wire.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ProcessKey(pub(crate) String);

impl ProcessKey {
    pub(crate) fn init() -> Self {
        Self(String::new())
    }

    pub(crate) fn is_init(&self) -> bool {
        self.0.is_empty()
    }
}

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 + signal.
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Created,
    /// The runtime is at it. The init may exit before the runtime says that it started.
    Starting {
        exited: Option<Exit>,
    },
    Running,
    /// The init has exited, its exit is not public yet.
    Exiting(Exit),
    Stopped(Exit),
    /// Being removed. Without an exit it was never started, and the runtime kills it; an init's exit then waits for
    /// its execs' exits like any other.
    Deleting {
        exit: Option<Exit>,
        exit_is_public: bool,
        removed_for: Option<Caller>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) phase: Phase,
    /// 0 until there is a process.
    pub(crate) pid: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freezer {
    Thawed,
    Pausing,
    Paused,
    Resuming,
}

/// A container: its init, its execs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) init: Process,
    pub(crate) execs: BTreeMap<ProcessKey, Process>,
    pub(crate) freezer: Freezer,
    /// Whether the init's end leaves processes behind: it has no PID namespace of its own.
    pub(crate) kill_rest_on_exit: bool,
}

/// What happened.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Start {
        caller: Caller,
        key: ProcessKey,
    },
    /// The runtime started it, or could not (at that time).
    Started {
        caller: Caller,
        key: ProcessKey,
        result: Result<u32, (Error, SystemTime)>,
    },
    Add {
        caller: Caller,
        key: ProcessKey,
    },
    Delete {
        caller: Caller,
        key: ProcessKey,
    },
    Deleted {
        caller: Caller,
        key: ProcessKey,
        result: Result<(), Error>,
    },
    Signal {
        caller: Caller,
        key: ProcessKey,
        signal: u32,
        all: bool,
    },
    Pause {
        caller: Caller,
    },
    Paused {
        caller: Caller,
        result: Result<(), Error>,
    },
    Resume {
        caller: Caller,
    },
    Resumed {
        caller: Caller,
        result: Result<(), Error>,
    },
    Exited {
        key: ProcessKey,
        exit: Exit,
    },
}

/// What to do about it, in this order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Effect {
    Reply {
        caller: Caller,
        result: Result<Answer, Error>,
    },
    Start {
        caller: Caller,
        key: ProcessKey,
    },
    Delete {
        caller: Caller,
        key: ProcessKey,
    },
    Signal {
        caller: Caller,
        key: ProcessKey,
        signal: u32,
        all: bool,
    },
    Pause {
        caller: Caller,
    },
    Resume {
        caller: Caller,
    },
    /// Kill what the init left behind.
    KillRest,
    Publish(Notice),
    /// The process is no more; for the init: neither is the container.
    Forget(ProcessKey),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    Started { pid: u32 },
    Deleted { pid: u32, exit: Option<Exit> },
}

/// An event for the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    Started { key: ProcessKey, pid: u32 },
    Exited { key: ProcessKey, pid: u32, exit: Exit },
    Added { key: ProcessKey },
    Deleted { pid: u32, exit: Option<Exit> },
    Paused,
    Resumed,
}

impl State {
    /// A container whose init was just made by the runtime, or, restored from a checkpoint, comes with its start
    /// (pid 0).
    pub(crate) fn created(pid: u32, kill_rest_on_exit: bool) -> Self {
        Self {
            init: Process { phase: Phase::Created, pid },
            execs: BTreeMap::new(),
            freezer: Freezer::Thawed,
            kill_rest_on_exit,
        }
    }

    pub(crate) fn process(&self, key: &ProcessKey) -> Option<&Process> {
        if key.is_init() { Some(&self.init) } else { self.execs.get(key) }
    }

    fn process_mut(&mut self, key: &ProcessKey) -> Option<&mut Process> {
        if key.is_init() { Some(&mut self.init) } else { self.execs.get_mut(key) }
    }

    /// Publishes the init's exit when no exec's exit is still to come, and ends a removal that waited for it.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        let (exit, removed_for) = match self.init.phase {
            Phase::Exiting(exit) => (exit, None),
            Phase::Deleting { exit: Some(exit), exit_is_public: false, removed_for } => (exit, removed_for),
            _ => return,
        };
        let busy = |process: &Process| matches!(process.phase, Phase::Starting { .. } | Phase::Running);
        if self.execs.values().any(busy) {
            return;
        }
        self.init.phase = match self.init.phase {
            Phase::Deleting { exit, removed_for, .. } => {
                Phase::Deleting { exit, exit_is_public: true, removed_for }
            }
            _ => Phase::Stopped(exit),
        };
        let key = ProcessKey::init();
        effects.push(Effect::Publish(Notice::Exited { key: key.clone(), pid: self.init.pid, exit }));
        if let Some(caller) = removed_for {
            remove(self, &key, caller, Some(exit), effects);
        }
    }

    fn init_exited(&mut self, exit: Exit, effects: &mut Vec<Effect>) {
        self.init.phase = match self.init.phase {
            Phase::Deleting { removed_for, .. } => {
                Phase::Deleting { exit: Some(exit), exit_is_public: false, removed_for }
            }
            _ => Phase::Exiting(exit),
        };
        self.freezer = Freezer::Thawed;
        if self.kill_rest_on_exit {
            effects.push(Effect::KillRest);
        }
        self.settle(effects);
    }
}

/// One step of a container's life.
pub(crate) fn transition(state: State, event: Event) -> (State, Vec<Effect>) {
    let mut state = state;
    let mut effects = Vec::new();
    let refuse = |effects: &mut Vec<Effect>, caller, error| {
        effects.push(Effect::Reply { caller, result: Err(error) });
    };
    match event {
        Event::Start { caller, key } => match start(&mut state, &key) {
            Ok(()) => effects.push(Effect::Start { caller, key }),
            Err(error) => refuse(&mut effects, caller, error),
        },
        Event::Started { caller, key, result } => started(&mut state, caller, &key, result, &mut effects),
        Event::Add { caller, key } => match add(&mut state, &key) {
            Ok(()) => {
                effects.push(Effect::Publish(Notice::Added { key }));
                effects.push(Effect::Reply { caller, result: Ok(Answer::Done) });
            }
            Err(error) => refuse(&mut effects, caller, error),
        },
        Event::Delete { caller, key } => match delete(&mut state, &key) {
            Ok(()) => effects.push(Effect::Delete { caller, key }),
            Err(error) => refuse(&mut effects, caller, error),
        },
        Event::Deleted { caller, key, result } => deleted(&mut state, caller, &key, result, &mut effects),
        Event::Signal { caller, key, signal, all } => match may_signal(&state, &key) {
            Ok(()) => effects.push(Effect::Signal { caller, key, signal, all }),
            Err(error) => refuse(&mut effects, caller, error),
        },
        Event::Pause { caller } => match (state.init.phase, state.freezer) {
            (Phase::Running, Freezer::Thawed) => {
                state.freezer = Freezer::Pausing;
                effects.push(Effect::Pause { caller });
            }
            (Phase::Running, Freezer::Paused) => {
                refuse(&mut effects, caller, unfit("pause a paused container"));
            }
            (phase, _) => refuse(&mut effects, caller, unfit_phase("pause", phase)),
        },
        Event::Paused { caller, result } => {
            // The container may have ended meanwhile.
            if state.freezer == Freezer::Pausing {
                state.freezer = if result.is_ok() { Freezer::Paused } else { Freezer::Thawed };
            }
            if result.is_ok() {
                effects.push(Effect::Publish(Notice::Paused));
            }
            effects.push(Effect::Reply { caller, result: result.map(|()| Answer::Done) });
        }
        Event::Resume { caller } => match state.freezer {
            Freezer::Paused => {
                state.freezer = Freezer::Resuming;
                effects.push(Effect::Resume { caller });
            }
            _ => refuse(&mut effects, caller, unfit("resume a container that is not paused")),
        },
        Event::Resumed { caller, result } => {
            if state.freezer == Freezer::Resuming {
                state.freezer = if result.is_ok() { Freezer::Thawed } else { Freezer::Paused };
            }
            if result.is_ok() {
                effects.push(Effect::Publish(Notice::Resumed));
            }
            effects.push(Effect::Reply { caller, result: result.map(|()| Answer::Done) });
        }
        Event::Exited { key, exit } => exited(&mut state, &key, exit, &mut effects),
    }
    (state, effects)
}

fn start(state: &mut State, key: &ProcessKey) -> Result<(), Error> {
    if !key.is_init() && state.execs.contains_key(key) {
        // Also true of a created init: a runtime can run a process beside it.
        if !matches!(state.init.phase, Phase::Created | Phase::Starting { .. } | Phase::Running) {
            return Err(Error::failed_precondition(
                "cannot start an exec: the container's init is not running",
            ));
        }
        if state.freezer != Freezer::Thawed {
            return Err(unfit("start an exec in a paused container"));
        }
    }
    let process = state.process_mut(key).ok_or_else(|| no_such(key))?;
    match process.phase {
        Phase::Created => {
            process.phase = Phase::Starting { exited: None };
            Ok(())
        }
        // Unclassed for clients: containerd answers Unknown here, and some look for exactly that.
        Phase::Starting { .. } | Phase::Running => Err(Error::unknown("cannot start a running process")),
        Phase::Exiting(_) | Phase::Stopped(_) => Err(Error::unknown("cannot start a stopped process")),
        Phase::Deleting { .. } => Err(unfit("start a process that is being deleted")),
    }
}

fn started(
    state: &mut State,
    caller: Caller,
    key: &ProcessKey,
    result: Result<u32, (Error, SystemTime)>,
    effects: &mut Vec<Effect>,
) {
    let Some(process) = state.process_mut(key) else { return };
    let Phase::Starting { exited } = process.phase else { return };
    match result {
        Ok(pid) => {
            process.pid = pid;
            process.phase = Phase::Running;
            effects.push(Effect::Publish(Notice::Started { key: key.clone(), pid }));
            effects.push(Effect::Reply { caller, result: Ok(Answer::Started { pid }) });
        }
        Err((error, at)) => {
            // An init that the runtime could not start can be tried again; an exec is spent.
            process.phase =
                if key.is_init() { Phase::Created } else { Phase::Stopped(Exit { status: 255, at }) };
            effects.push(Effect::Reply { caller, result: Err(error) });
        }
    }
    match exited {
        Some(exit) => self::exited(state, key, exit, effects),
        None => state.settle(effects),
    }
}

fn add(state: &mut State, key: &ProcessKey) -> Result<(), Error> {
    if key.is_init() {
        return Err(Error::invalid_argument("an exec needs an id"));
    }
    if state.execs.contains_key(key) {
        return Err(Error::already_exists(format!("exec {} exists already", key.0)));
    }
    match state.init.phase {
        Phase::Exiting(_) | Phase::Stopped(_) | Phase::Deleting { .. } => {
            Err(unfit("exec in a stopped container"))
        }
        _ if state.freezer != Freezer::Thawed => Err(unfit("exec in a paused container")),
        _ => {
            state.execs.insert(key.clone(), Process { phase: Phase::Created, pid: 0 });
            Ok(())
        }
    }
}

fn delete(state: &mut State, key: &ProcessKey) -> Result<(), Error> {
    let process = state.process_mut(key).ok_or_else(|| no_such(key))?;
    let exit = match process.phase {
        Phase::Created => None,
        Phase::Stopped(exit) => Some(exit),
        Phase::Deleting { .. } => return Err(unfit("delete a process that is being deleted")),
        Phase::Starting { .. } | Phase::Running | Phase::Exiting(_) => {
            return Err(unfit("delete a running process"));
        }
    };
    process.phase = Phase::Deleting { exit, exit_is_public: exit.is_some(), removed_for: None };
    Ok(())
}

fn deleted(
    state: &mut State,
    caller: Caller,
    key: &ProcessKey,
    result: Result<(), Error>,
    effects: &mut Vec<Effect>,
) {
    let Some(process) = state.process_mut(key) else { return };
    let Phase::Deleting { exit, exit_is_public, .. } = process.phase else { return };
    if let Err(error) = result {
        process.phase = match exit {
            None => Phase::Created,
            Some(exit) if exit_is_public => Phase::Stopped(exit),
            Some(exit) => Phase::Exiting(exit),
        };
        effects.push(Effect::Reply { caller, result: Err(error) });
        return;
    }
    if !exit_is_public && process.pid != 0 {
        // Killed by its removal: the exit is on its way, and belongs in the answer.
        process.phase = Phase::Deleting { exit, exit_is_public, removed_for: Some(caller) };
        return;
    }
    remove(state, key, caller, exit, effects);
}

fn remove(
    state: &mut State,
    key: &ProcessKey,
    caller: Caller,
    exit: Option<Exit>,
    effects: &mut Vec<Effect>,
) {
    let pid = state.process(key).map_or(0, |process| process.pid);
    if key.is_init() {
        effects.push(Effect::Publish(Notice::Deleted { pid, exit }));
    } else {
        state.execs.remove(key);
    }
    effects.push(Effect::Reply { caller, result: Ok(Answer::Deleted { pid, exit }) });
    effects.push(Effect::Forget(key.clone()));
}

fn may_signal(state: &State, key: &ProcessKey) -> Result<(), Error> {
    let process = state.process(key).ok_or_else(|| no_such(key))?;
    match process.phase {
        Phase::Exiting(_) | Phase::Stopped(_) | Phase::Deleting { .. } => {
            Err(Error::not_found("process already finished"))
        }
        Phase::Created | Phase::Starting { .. } if process.pid == 0 => {
            Err(Error::failed_precondition("process not created"))
        }
        _ => Ok(()),
    }
}

fn exited(state: &mut State, key: &ProcessKey, exit: Exit, effects: &mut Vec<Effect>) {
    let Some(process) = state.process_mut(key) else { return };
    let pid = process.pid;
    match process.phase {
        Phase::Starting { .. } => process.phase = Phase::Starting { exited: Some(exit) },
        Phase::Created | Phase::Running | Phase::Deleting { exit: None, .. } if key.is_init() => {
            state.init_exited(exit, effects);
        }
        Phase::Created | Phase::Running => {
            process.phase = Phase::Stopped(exit);
            effects.push(Effect::Publish(Notice::Exited { key: key.clone(), pid, exit }));
            state.settle(effects);
        }
        // A second exit of one process: its pid was another's by then. An exec that is deleted unstarted had none.
        Phase::Exiting(_) | Phase::Stopped(_) | Phase::Deleting { .. } => {}
    }
}

fn unfit(what: &str) -> Error {
    Error::failed_precondition(format!("cannot {what}"))
}

fn unfit_phase(verb: &str, phase: Phase) -> Error {
    let state = match phase {
        Phase::Created => "created",
        Phase::Starting { .. } => "starting",
        Phase::Running => "running",
        Phase::Exiting(_) | Phase::Stopped(_) => "stopped",
        Phase::Deleting { .. } => "deleted",
    };
    unfit(&format!("{verb} a {state} container"))
}

fn no_such(key: &ProcessKey) -> Error {
    Error::not_found(format!("process {} does not exist", key.0))
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
