//! Marking: what of a namespace something holds, and so what of it goes. Pure: a graph in, removals out.
//!
//! ```text
//!  container ---> snapshot ---> parent           lease ---> content, ingest, image, mount, snapshot
//!  image -------> content (its target)           ingest --> content (that another namespace has)
//!  gc.ref.*       of containers, content, images, mounts and snapshots: to content, images, mounts, snapshots
//!  gc.bref.*      of the same: the labelled one lives while the one that the label names does
//!  gc.cond.*      of content and images: to a snapshot, while that was used lately (or not)
//! ```
//!
//! Roots are containers, images and leases that have not expired, ingests whose time has not come, and content,
//! mounts and snapshots with gc.root. What a flat lease holds is marked flat: a flat image holds its target, a flat snapshot its
//! parents, and labels count for nothing. Something may be reached both ways; then the full one counts.
//!
//! Labels are read as containerd reads them, its suffixes included, except that where it matches any text after a label's
//! name, so do we: a label that was not understood must never cost what it was meant to keep.
//!
//! Invariant: marking never needs what a link names to be there. Links to what is not there, and back references from it,
//! are kept, since it may come to be between the marking and the removal.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What all labels that are read here begin with.
const PREFIX: &str = "containerd.io/gc.";
/// When a lease or an image ends, in RFC 3339.
const EXPIRE: &str = "containerd.io/gc.expire";
/// Whether a lease holds its resources alone, without what they refer to.
const FLAT: &str = "containerd.io/gc.flat";

/// The name of an object in its namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Node {
    Container(String),
    /// By digest.
    Content(String),
    Image(String),
    /// By ref.
    Ingest(String),
    Lease(String),
    /// By name.
    Mount(String),
    Sandbox(String),
    Snapshot {
        snapshotter: String,
        key: String,
    },
}

impl Node {
    pub(crate) fn snapshot(snapshotter: impl Into<String>, key: impl Into<String>) -> Self {
        Node::Snapshot { snapshotter: snapshotter.into(), key: key.into() }
    }

    /// What kind of object it is, in a word.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Node::Container(_) => "container",
            Node::Content(_) => "content",
            Node::Image(_) => "image",
            Node::Ingest(_) => "ingest",
            Node::Lease(_) => "lease",
            Node::Mount(_) => "mount",
            Node::Sandbox(_) => "sandbox",
            Node::Snapshot { .. } => "snapshot",
        }
    }

    /// Its name; that of a snapshot is `SNAPSHOTTER/KEY`.
    pub(crate) fn id(&self) -> String {
        match self {
            Node::Container(id)
            | Node::Content(id)
            | Node::Image(id)
            | Node::Ingest(id)
            | Node::Lease(id)
            | Node::Mount(id)
            | Node::Sandbox(id) => id.clone(),
            Node::Snapshot { snapshotter, key } => format!("{snapshotter}/{key}"),
        }
    }
}

/// Why an object is held: by itself, or by another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Why {
    /// It is of a kind that stays until it is deleted.
    Root,
    /// It stays until then.
    Until(SystemTime),
    /// It says so itself, by this label.
    Own(String),
    /// A container's root file system.
    Rootfs,
    /// A snapshot's parent.
    Parent,
    /// An image's target.
    Target,
    /// A resource of a lease.
    Leased,
    /// The blob that an ingest will be.
    Expected,
    /// The holder's label.
    Label(String),
    /// A label of its own, which names the holder.
    Back(String),
    /// It is not held.
    Nothing,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Root => f.write_str("stays until it is deleted"),
            Why::Until(time) => {
                write!(f, "stays until {}", OffsetDateTime::from(*time).format(&Rfc3339).unwrap_or_default())
            }
            Why::Own(label) => write!(f, "has the label {label}"),
            Why::Rootfs => f.write_str("root file system of the one before"),
            Why::Parent => f.write_str("parent of the one before"),
            Why::Target => f.write_str("target of the one before"),
            Why::Leased => f.write_str("resource of the one before"),
            Why::Expected => f.write_str("what the one before will be"),
            Why::Label(label) => write!(f, "the one before has the label {label}"),
            Why::Nothing => f.write_str("nothing holds it: it goes with the next collection"),
            Why::Back(label) => write!(f, "has the label {label}, which names the one before"),
        }
    }
}

/// An object, as the records say it is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Object {
    root: Option<Why>,
    links: Vec<Link<Node>>,
    holders: Vec<(Node, String)>,
    conditions: Vec<Condition>,
    used_at: Vec<SystemTime>,
}

#[derive(Debug, Clone)]
struct Link<T> {
    to: T,
    why: Why,
    /// Whether it is a part of the holder, which one that is held flat has too.
    part: bool,
    /// Whether it holds no more than the object alone.
    flat: bool,
}

/// A label gc.cond.snapshot.
#[derive(Debug, Clone)]
struct Condition {
    to: Node,
    label: String,
    /// Any of them will do.
    tests: Vec<Test>,
}

#[derive(Debug, Clone, Copy)]
enum Test {
    UsedWithin(Duration),
    UsedBefore(Duration),
}

type Labels = BTreeMap<String, String>;

impl Object {
    /// A container, with its snapshot if it has one: snapshotter and key.
    pub(crate) fn container(labels: &Labels, snapshot: Option<(String, String)>) -> Self {
        let mut object = Object { root: Some(Why::Root), ..Object::default() };
        if let Some((snapshotter, key)) = snapshot {
            object.link(Node::Snapshot { snapshotter, key }, Why::Rootfs);
        }
        object.read(labels, false, false);
        object
    }

    /// A sandbox.
    pub(crate) fn sandbox(labels: &Labels) -> Self {
        Object::container(labels, None)
    }

    /// A blob.
    pub(crate) fn content(labels: &Labels) -> Self {
        let mut object = Object::default();
        object.read(labels, true, true);
        object
    }

    /// A snapshot of this snapshotter, with its parent; empty for none.
    pub(crate) fn snapshot(snapshotter: &str, parent: String, labels: &Labels) -> Self {
        let mut object = Object::default();
        if !parent.is_empty() {
            object.link(Node::snapshot(snapshotter, parent), Why::Parent);
        }
        object.read(labels, true, false);
        object
    }

    /// An image, with the digest of its target.
    pub(crate) fn image(target: String, labels: &Labels, now: SystemTime) -> Self {
        let mut object = Object::until(expiry(labels), now);
        if !target.is_empty() {
            object.link(Node::Content(target), Why::Target);
        }
        object.read(labels, false, true);
        object
    }

    /// A mount that the engine keeps; one that is being made stays.
    pub(crate) fn mount(complete: bool, labels: &Labels) -> Self {
        let mut object = Object { root: (!complete).then_some(Why::Root), ..Object::default() };
        object.read(labels, true, false);
        object
    }

    /// A lease, with its resources.
    pub(crate) fn lease(resources: Vec<Node>, labels: &Labels, now: SystemTime) -> Self {
        let flat = labels.contains_key(FLAT);
        let mut object = Object::until(expiry(labels), now);
        for to in resources {
            // An ingest has nothing but itself to hold.
            let flat = flat && !matches!(to, Node::Ingest(_));
            object.links.push(Link { to, why: Why::Leased, part: true, flat });
        }
        object
    }

    /// An ingest: the digest of the blob that it shares, or nothing, and when it ends by itself, if it does. One that does
    /// not is kept by leases alone.
    pub(crate) fn ingest(shared: String, expires: Option<SystemTime>, now: SystemTime) -> Self {
        let mut object = match expires {
            Some(_) => Object::until(expires, now),
            None => Object::default(),
        };
        if !shared.is_empty() {
            object.link(Node::Content(shared), Why::Expected);
        }
        object
    }

    fn until(expires: Option<SystemTime>, now: SystemTime) -> Self {
        match expires {
            None => Object { root: Some(Why::Root), ..Object::default() },
            Some(time) if time < now => Object::default(),
            Some(time) => Object { root: Some(Why::Until(time)), ..Object::default() },
        }
    }

    fn link(&mut self, to: Node, why: Why) {
        self.links.push(Link { to, why, part: true, flat: false });
    }

    fn read(&mut self, labels: &Labels, may_be_root: bool, may_have_conditions: bool) {
        let ours = labels.range::<str, _>((std::ops::Bound::Included(PREFIX), std::ops::Bound::Unbounded));
        for (label, value) in ours {
            let Some(rest) = label.strip_prefix(PREFIX) else { break };
            if rest.starts_with("root") {
                if may_be_root {
                    self.root = Some(Why::Own(label.clone()));
                }
            } else if let Some(what) = rest.strip_prefix("ref.") {
                if let Some(to) = reference(what, value) {
                    self.links.push(Link { to, why: Why::Label(label.clone()), part: false, flat: false });
                }
            } else if let Some(what) = rest.strip_prefix("bref.") {
                if let Some(holder) = back_reference(what, value) {
                    self.holders.push((holder, label.clone()));
                }
            } else if rest.starts_with("cond.value-usedat") {
                self.used_at.extend(parse_time(value));
            } else if let Some(of) = rest.strip_prefix("cond.snapshot")
                && may_have_conditions
            {
                self.conditions.extend(condition(label, of, value));
            }
        }
    }
}

/// What follows `name` in a label, when it is nothing, or a suffix that tells labels of the same meaning apart.
fn is_named(what: &str, name: &str) -> bool {
    what.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '/']))
}

fn reference(what: &str, value: &str) -> Option<Node> {
    if let Some(snapshotter) = what.strip_prefix("snapshot.") {
        // Dots belong to the name of the snapshotter.
        let name = snapshotter.split_once('/').map_or(snapshotter, |(name, _)| name);
        return Some(Node::snapshot(name, value));
    }
    if is_named(what, "content") {
        return Some(Node::Content(value.to_owned()));
    }
    if is_named(what, "image") {
        return Some(Node::Image(value.to_owned()));
    }
    is_named(what, "mount").then(|| Node::Mount(value.to_owned()))
}

fn back_reference(what: &str, value: &str) -> Option<Node> {
    if is_named(what, "container") {
        return Some(Node::Container(value.to_owned()));
    }
    reference(what, value)
}

/// `gc.cond.snapshot.NAME` with `usedat<DURATION[,...]|KEY`: tests that are not known count for nothing.
fn condition(label: &str, of: &str, value: &str) -> Option<Condition> {
    let name = of.trim_start_matches(['.', '/']);
    let name = name.split_once('/').map_or(name, |(name, _)| name);
    let (tests, key) = value.split_once('|')?;
    let tests = tests.split(',').filter_map(|test| {
        let test = test.strip_prefix("usedat")?;
        match test.strip_prefix('<') {
            Some(age) => parse_duration(age).map(Test::UsedWithin),
            None => parse_duration(test.strip_prefix('>')?).map(Test::UsedBefore),
        }
    });
    Some(Condition { to: Node::snapshot(name, key), label: label.to_owned(), tests: tests.collect() })
}

/// When an image or a lease ends. What cannot be read ends nothing.
fn expiry(labels: &Labels) -> Option<SystemTime> {
    parse_time(labels.get(EXPIRE)?)
}

fn parse_time(text: &str) -> Option<SystemTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(SystemTime::from)
}

/// Go's form of a duration, `1h30m`, `1.5s`, `300ms`, without a sign; None when it is not one.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = Some(text).filter(|text| !text.is_empty())?;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let value: f64 = rest[..number].parse().ok()?;
        rest = &rest[number..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let seconds = match &rest[..unit] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(value * seconds).ok()?)?;
        rest = &rest[unit..];
    }
    Some(total)
}

/// The number of a node in its graph.
type Id = usize;

/// The objects of one namespace at one moment.
#[derive(Debug)]
pub(crate) struct Graph {
    now: SystemTime,
    ids: HashMap<Node, Id>,
    nodes: Vec<Node>,
    objects: Vec<Option<Object>>,
    /// By holder: whom it holds by their labels.
    back: HashMap<Id, Vec<(Id, String)>>,
    /// By holder: whom it holds.
    links: Vec<Vec<Link<Id>>>,
}

/// How far an object is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Reach {
    None,
    Flat,
    Full,
}

/// What a marking has reached, by the numbers of its graph.
#[derive(Debug, Default)]
pub(crate) struct Marks(Vec<Reach>);

/// One step of a chain from a root to an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) node: Node,
    pub(crate) why: Why,
}

/// A step of a walk: who was reached by whom, and how.
type Visit<'a> = &'a mut dyn FnMut((Id, Reach), Option<(Id, Reach)>, &Why);

impl Graph {
    /// A graph without objects; `now` decides what has expired.
    pub(crate) fn new(now: SystemTime) -> Self {
        Graph {
            now,
            ids: HashMap::new(),
            nodes: Vec::new(),
            objects: Vec::new(),
            back: HashMap::new(),
            links: Vec::new(),
        }
    }

    /// Adds an object, in the place of the one of this name.
    pub(crate) fn add(&mut self, node: Node, mut object: Object) -> Id {
        let id = self.id(node);
        let mut links = Vec::with_capacity(object.links.len());
        for Link { to, why, part, flat } in object.links.drain(..) {
            links.push(Link { to: self.id(to), why, part, flat });
        }
        for (holder, label) in object.holders.drain(..) {
            let holder = self.id(holder);
            self.back.entry(holder).or_default().push((id, label));
        }
        self.links[id] = links;
        self.objects[id] = Some(object);
        id
    }

    /// The number of a node, which need not be there.
    pub(crate) fn id(&mut self, node: Node) -> Id {
        if let Some(id) = self.ids.get(&node) {
            return *id;
        }
        let id = self.nodes.len();
        self.ids.insert(node.clone(), id);
        self.nodes.push(node);
        self.objects.push(None);
        self.links.push(Vec::new());
        id
    }

    /// The object of this name: of whatever kind, the first in the order of [`Node`]; or a snapshot of this snapshotter.
    pub(crate) fn find(&self, name: &str, of: &str) -> Option<Node> {
        let there = self.nodes.iter().zip(&self.objects).filter(|(_, object)| object.is_some());
        let named = there.map(|(node, _)| node).filter(|node| match node {
            Node::Container(id)
            | Node::Content(id)
            | Node::Image(id)
            | Node::Ingest(id)
            | Node::Lease(id)
            | Node::Mount(id)
            | Node::Sandbox(id) => of.is_empty() && id == name,
            Node::Snapshot { snapshotter, key } => key == name && (of.is_empty() || snapshotter == of),
        });
        named.min().cloned()
    }

    pub(crate) fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// Marks all that is held.
    pub(crate) fn mark(&self) -> Marks {
        let mut marks = Marks(vec![Reach::None; self.nodes.len()]);
        self.walk(&mut marks, self.roots(), &mut |_, _, _| {});
        marks
    }

    /// Marks these and all that they hold, whether or not anything holds them.
    pub(crate) fn spare(&self, marks: &mut Marks, ids: &[Id]) {
        marks.0.resize(self.nodes.len(), Reach::None);
        // They may have been reached before and hold others now, so that walking has to begin at each.
        for id in ids {
            marks.0[*id] = Reach::None;
        }
        self.walk(marks, ids.iter().map(|id| (*id, Why::Root)).collect(), &mut |_, _, _| {});
    }

    /// What is there and not marked.
    pub(crate) fn unmarked(&self, marks: &Marks) -> Vec<Id> {
        (0..self.nodes.len()).filter(|id| self.objects[*id].is_some() && !marks.has(*id)).collect()
    }

    /// Whether the object is there.
    fn is_there(&self, id: Id) -> bool {
        self.objects[id].is_some()
    }

    /// What an object holds, by itself and by what it holds, itself included, as far as it is there.
    pub(crate) fn reach(&self, node: &Node) -> Vec<&Node> {
        let Some(id) = self.ids.get(node) else { return Vec::new() };
        let mut marks = Marks(vec![Reach::None; self.nodes.len()]);
        self.walk(&mut marks, vec![(*id, Why::Root)], &mut |_, _, _| {});
        let reached = (0..self.nodes.len()).filter(|id| marks.has(*id) && self.is_there(*id));
        reached.map(|id| self.node(id)).collect()
    }

    /// What nothing would hold if these were not there, without these themselves.
    pub(crate) fn unheld_without(&mut self, nodes: &[Node]) -> Vec<Node> {
        let mut taken = Vec::new();
        for id in nodes.iter().filter_map(|node| self.ids.get(node).copied()) {
            taken.push((id, self.objects[id].take(), std::mem::take(&mut self.links[id])));
        }
        let unheld = self.unmarked(&self.mark()).into_iter().map(|id| self.node(id).clone()).collect();
        // Backwards, should one be named twice.
        for (id, object, links) in taken.into_iter().rev() {
            (self.objects[id], self.links[id]) = (object, links);
        }
        unheld
    }

    /// The shortest chain from a root to an object; None when nothing holds it.
    pub(crate) fn chain(&self, node: &Node) -> Option<Vec<Step>> {
        let target = *self.ids.get(node)?;
        let mut from = HashMap::new();
        let mut marks = Marks(vec![Reach::None; self.nodes.len()]);
        self.walk(&mut marks, self.roots(), &mut |at, before, why| {
            from.insert(at, (before, why.clone()));
        });
        // Held flat or in full; whichever there is.
        let mut at = [Reach::Full, Reach::Flat]
            .into_iter()
            .map(|reach| (target, reach))
            .find(|at| from.contains_key(at));
        let mut steps = Vec::new();
        while let Some((id, reach)) = at {
            let (before, why) = from.get(&(id, reach))?.clone();
            steps.push(Step { node: self.nodes[id].clone(), why });
            at = before;
        }
        steps.reverse();
        Some(steps).filter(|steps| !steps.is_empty())
    }

    /// The next moment at which something ends by itself.
    pub(crate) fn next_turn(&self) -> Option<SystemTime> {
        let expiry = |object: &Object| match object.root {
            Some(Why::Until(time)) => Some(time),
            _ => None,
        };
        self.objects.iter().flatten().filter_map(expiry).min()
    }

    fn roots(&self) -> Vec<(Id, Why)> {
        let objects = self.objects.iter().enumerate();
        objects.filter_map(|(id, object)| Some((id, object.as_ref()?.root.clone()?))).collect()
    }

    /// Goes from the roots, breadth first, along whatever holds another. What is marked as far already is not gone into.
    fn walk(&self, marks: &mut Marks, roots: Vec<(Id, Why)>, visit: Visit<'_>) {
        let mut queue = VecDeque::new();
        for (id, why) in roots {
            if marks.raise(id, Reach::Full) {
                visit((id, Reach::Full), None, &why);
                queue.push_back((id, Reach::Full));
            }
        }
        while let Some((id, reach)) = queue.pop_front() {
            let mut go = |to: Id, further: Reach, why: &Why| {
                if marks.raise(to, further) {
                    visit((to, further), Some((id, reach)), why);
                    queue.push_back((to, further));
                }
            };
            for link in &self.links[id] {
                match reach {
                    Reach::Full if !link.flat => go(link.to, Reach::Full, &link.why),
                    _ if link.part => go(link.to, Reach::Flat, &link.why),
                    _ => {}
                }
            }
            if reach != Reach::Full {
                continue;
            }
            for condition in self.objects[id].iter().flat_map(|object| &object.conditions) {
                if let Some(to) = self.ids.get(&condition.to)
                    && self.holds(condition, *to)
                {
                    go(*to, Reach::Full, &Why::Label(condition.label.clone()));
                }
            }
            for (to, label) in self.back.get(&id).into_iter().flatten() {
                go(*to, Reach::Full, &Why::Back(label.clone()));
            }
        }
    }

    fn holds(&self, condition: &Condition, to: Id) -> bool {
        let used_at = self.objects[to].as_ref().map(|object| &object.used_at[..]).unwrap_or_default();
        used_at.iter().any(|used| {
            // A use in the future is one of no age.
            let age = self.now.duration_since(*used).unwrap_or_default();
            condition.tests.iter().any(|test| match test {
                Test::UsedWithin(limit) => age < *limit,
                Test::UsedBefore(limit) => age > *limit,
            })
        })
    }
}

impl Marks {
    pub(crate) fn has(&self, id: Id) -> bool {
        self.0.get(id).is_some_and(|reach| *reach > Reach::None)
    }

    /// Whether this reaches further than what was reached before.
    fn raise(&mut self, id: Id, reach: Reach) -> bool {
        let further = reach > self.0[id];
        if further {
            self.0[id] = reach;
        }
        further
    }
}
