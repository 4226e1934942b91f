//! Random lives of a container against the invariants of `state.rs`: a model of the world plays runtime and
//! kernel, in any order they may answer in.

use std::collections::{BTreeSet, HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const AT: SystemTime = SystemTime::UNIX_EPOCH;

#[derive(Clone, Debug)]
enum Move {
    Ask(u8, u8),
    /// Finish the n-th runtime call under way, well or badly.
    Finish(u8, bool),
    /// Let the n-th living process exit.
    Exit(u8),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        4 => (0..7u8, 0..3u8).prop_map(|(what, who)| Move::Ask(what, who)),
        4 => (any::<u8>(), prop::bool::weighted(0.8)).prop_map(|(n, well)| Move::Finish(n, well)),
        2 => any::<u8>().prop_map(Move::Exit),
    ];
    prop::collection::vec(one, 0..120)
}

struct World {
    state: Option<State>,
    callers: u64,
    asked: HashSet<Caller>,
    calls: Vec<Effect>,
    alive: Vec<(ProcessKey, u32)>,
    next_pid: u32,
    incarnation: HashMap<ProcessKey, u32>,
    published: Vec<(Notice, u32)>,
}

impl World {
    fn new(kill_rest: bool) -> Self {
        Self {
            state: Some(State::created(1, kill_rest)),
            callers: 0,
            asked: HashSet::new(),
            calls: Vec::new(),
            alive: vec![(ProcessKey::init(), 1)],
            next_pid: 2,
            incarnation: HashMap::new(),
            published: Vec::new(),
        }
    }

    fn feed(&mut self, event: Event) {
        let Some(state) = self.state.take() else { return };
        let (state, effects) = transition(state, event);
        self.state = Some(state);
        for effect in effects {
            match effect {
                Effect::Reply { caller, .. } => {
                    assert!(self.asked.remove(&caller), "caller {caller} was answered twice");
                }
                Effect::Publish(notice) => {
                    let of = match &notice {
                        Notice::Started { key, .. } | Notice::Exited { key, .. } | Notice::Added { key } => {
                            self.incarnation.get(key).copied().unwrap_or(0)
                        }
                        _ => 0,
                    };
                    self.published.push((notice, of));
                }
                Effect::KillRest => {
                    let rest: Vec<_> = self.alive.drain(..).collect();
                    for (key, _) in rest {
                        self.feed(Event::Exited { key, exit: Exit { status: 137, at: AT } });
                    }
                }
                Effect::Forget(key) if key.is_init() => {
                    self.state = None;
                    // The driver ends, which answers whoever still waits that the container is gone.
                    self.asked.clear();
                }
                Effect::Forget(key) => *self.incarnation.entry(key).or_default() += 1,
                call => self.calls.push(call),
            }
        }
    }

    fn ask(&mut self, what: u8, who: u8) {
        let key = ProcessKey(["", "a", "b"][usize::from(who)].to_owned());
        self.callers += 1;
        let caller = self.callers;
        if self.state.is_some() {
            self.asked.insert(caller);
        }
        self.feed(match what {
            0 => Event::Start { caller, key },
            1 | 2 => Event::Add { caller, key },
            3 => Event::Delete { caller, key },
            4 => Event::Signal { caller, key, signal: 9, all: false },
            5 => Event::Pause { caller },
            _ => Event::Resume { caller },
        });
    }

    fn finish(&mut self, n: u8, well: bool) {
        if self.calls.is_empty() {
            return;
        }
        let call = self.calls.remove(usize::from(n) % self.calls.len());
        let error = || Error::unknown("the runtime says no");
        let result = if well { Ok(()) } else { Err(error()) };
        match call {
            Effect::Start { caller, key } => {
                let result = if !well {
                    Err((error(), AT))
                } else if key.is_init() {
                    Ok(1)
                } else {
                    self.next_pid += 1;
                    self.alive.push((key.clone(), self.next_pid));
                    Ok(self.next_pid)
                };
                self.feed(Event::Started { caller, key, result });
            }
            Effect::Delete { caller, key } => self.feed(Event::Deleted { caller, key, result }),
            // Once the container is gone its callers have their answer.
            Effect::Signal { caller, .. } => assert!(self.state.is_none() || self.asked.remove(&caller)),
            Effect::Pause { caller } => self.feed(Event::Paused { caller, result }),
            Effect::Resume { caller } => self.feed(Event::Resumed { caller, result }),
            other => unreachable!("{other:?}"),
        }
    }

    fn exit(&mut self, n: u8) {
        if !self.alive.is_empty() {
            let index = usize::from(n) % self.alive.len();
            let (key, _) = self.alive.remove(index);
            self.feed(Event::Exited { key, exit: Exit { status: 0, at: AT } });
        }
    }

    fn check(&self) {
        let mut started = BTreeSet::new();
        let mut exited = BTreeSet::new();
        let mut init_exited = false;
        for (notice, of) in &self.published {
            match notice {
                Notice::Started { key, .. } => {
                    assert!(!exited.contains(&(key.clone(), *of)), "{key:?} started after its exit");
                    assert!(started.insert((key.clone(), *of)), "{key:?} started twice");
                }
                Notice::Exited { key, .. } => {
                    assert!(exited.insert((key.clone(), *of)), "{key:?} exited twice");
                    assert!(!init_exited, "{key:?} exited after the init");
                    assert!(key.is_init() || started.contains(&(key.clone(), *of)));
                    init_exited |= key.is_init();
                }
                _ => {}
            }
        }
    }
}

proptest! {
    #[test]
    fn lives_keep_the_invariants(kill_rest: bool, moves in moves()) {
        let mut world = World::new(kill_rest);
        for step in moves {
            match step {
                Move::Ask(what, who) => world.ask(what, who),
                Move::Finish(n, well) => world.finish(n, well),
                Move::Exit(n) => world.exit(n),
            }
            world.check();
        }
        // When everything under way has ended, every question is answered and the init's exit is out.
        while !world.calls.is_empty() || !world.alive.is_empty() {
            world.finish(0, true);
            world.exit(0);
        }
        world.check();
        prop_assert!(world.asked.is_empty(), "unanswered: {:?}", world.asked);
        let out = world.published.iter().any(|(notice, _)| {
            matches!(notice, Notice::Exited { key, .. } if key.is_init())
        });
        prop_assert!(out);
    }
}

#[test]
fn an_early_exit_waits_for_the_start() {
    let key = ProcessKey::init;
    let exit = Exit { status: 3, at: AT };
    let (state, _) = transition(State::created(5, false), Event::Start { caller: 1, key: key() });
    let (state, effects) = transition(state, Event::Exited { key: key(), exit });
    assert!(effects.is_empty());
    let (state, effects) = transition(state, Event::Started { caller: 1, key: key(), result: Ok(5) });
    assert_eq!(
        effects,
        [
            Effect::Publish(Notice::Started { key: key(), pid: 5 }),
            Effect::Reply { caller: 1, result: Ok(Answer::Started { pid: 5 }) },
            Effect::Publish(Notice::Exited { key: key(), pid: 5, exit }),
        ]
    );
    let (_, effects) = transition(state, Event::Start { caller: 2, key: key() });
    assert!(
        matches!(&effects[..], [Effect::Reply { result: Err(error), .. }] if error.code == shim_api::Code::Unknown)
    );
}

/// A created container may run execs; its removal kills them with the init, whose exit still comes last.
#[test]
fn a_created_init_that_is_deleted_waits_for_its_execs() {
    let exec = || ProcessKey("a".to_owned());
    let exit = Exit { status: 137, at: AT };
    let mut state = State::created(5, false);
    let mut step = |event| {
        let (next, effects) = transition(state.clone(), event);
        state = next;
        effects
    };
    step(Event::Add { caller: 1, key: exec() });
    step(Event::Start { caller: 2, key: exec() });
    step(Event::Started { caller: 2, key: exec(), result: Ok(6) });
    step(Event::Delete { caller: 3, key: ProcessKey::init() });
    assert_eq!(step(Event::Exited { key: ProcessKey::init(), exit }), []);
    assert_eq!(step(Event::Deleted { caller: 3, key: ProcessKey::init(), result: Ok(()) }), []);
    assert_eq!(
        step(Event::Exited { key: exec(), exit }),
        [
            Effect::Publish(Notice::Exited { key: exec(), pid: 6, exit }),
            Effect::Publish(Notice::Exited { key: ProcessKey::init(), pid: 5, exit }),
            Effect::Publish(Notice::Deleted { pid: 5, exit: Some(exit) }),
            Effect::Reply { caller: 3, result: Ok(Answer::Deleted { pid: 5, exit: Some(exit) }) },
            Effect::Forget(ProcessKey::init()),
        ]
    );
}
