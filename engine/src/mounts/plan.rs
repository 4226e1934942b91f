//! What an activation will do, read from the types of its mounts. Pure.
//!
//! ```text
//! type := { TRANSFORM "/" } KIND        TRANSFORM := format | mkdir | mkfs
//! ```
//!
//! A mount with transforms needs what stands before it to be mounted, and is itself left to the client with its words
//! filled in. A `loop`, and everything in a temporary activation, is mounted by the engine. When neither is among the
//! mounts there is nothing to activate.

use crate::error::{Error, Result};

/// The most mounts of one activation.
const MOUNTS_MAX: usize = 512;
/// The kind that the engine attaches as a loop device.
const LOOP: &str = "loop";

/// What is done to a mount before it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transform {
    /// Fills in `{{ mount N }}` and the like.
    Format,
    /// Makes the folders that the options `X-containerd.mkdir.path=` name.
    Mkdir,
    /// Makes the image file that is the source, with the file system that the options `X-containerd.mkfs.*` describe.
    Mkfs,
}

/// One mount of an activation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) transforms: Vec<Transform>,
    /// What remains of its type.
    pub(super) kind: String,
}

impl Step {
    fn of(kind: &str) -> Self {
        let (mut transforms, mut rest) = (Vec::new(), kind);
        while let Some((first, after)) = rest.split_once('/') {
            transforms.push(match first {
                "format" => Transform::Format,
                "mkdir" => Transform::Mkdir,
                "mkfs" => Transform::Mkfs,
                // The kernel will say that it does not know such a type.
                _ => break,
            });
            rest = after;
        }
        Step { transforms, kind: rest.to_owned() }
    }

    /// Whether the engine attaches a device for it.
    pub(super) fn is_loop(&self) -> bool {
        self.kind == LOOP
    }
}

/// An activation: the engine mounts the steps before `own`, and tells the client of the rest.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    pub(super) own: usize,
}

/// Plans an activation of mounts of these types. Unimplemented when there is nothing for the engine to do: the client
/// mounts them itself.
pub(super) fn plan<'a>(kinds: impl Iterator<Item = &'a str>, temporary: bool) -> Result<Plan> {
    let steps: Vec<Step> = kinds.map(Step::of).collect();
    if steps.len() > MOUNTS_MAX {
        return Err(Error::invalid_argument(format!(
            "{} mounts are to be activated together; at most {MOUNTS_MAX} can be",
            steps.len()
        )));
    }
    let mut own = None;
    for (at, step) in steps.iter().enumerate() {
        if !step.transforms.is_empty() {
            own = Some(at);
        }
        if step.is_loop() || temporary {
            own = Some(at + 1);
        }
    }
    match own {
        Some(own) => Ok(Plan { steps, own }),
        None => Err(Error::unimplemented(
            "none of these mounts needs to be activated by the engine; mount them as they are",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(kinds: &[&str], temporary: bool) -> Option<usize> {
        plan(kinds.iter().copied(), temporary).ok().map(|plan| plan.own)
    }

    #[test]
    fn the_engine_does_what_the_client_cannot() {
        assert_eq!(own(&["overlay"], false), None);
        assert_eq!(own(&[], true), None);
        assert_eq!(own(&["loop"], false), Some(1));
        assert_eq!(own(&["loop", "ext4"], false), Some(1));
        assert_eq!(own(&["erofs", "erofs", "format/mkdir/overlay"], false), Some(2));
        assert_eq!(own(&["format/bind", "loop", "bind"], false), Some(2));
        assert_eq!(own(&["bind", "bind"], true), Some(2));
        assert_eq!(own(&["what/overlay"], false), None);
    }

    #[test]
    fn types_are_taken_apart() {
        let step = Step::of("format/mkdir/overlay");
        assert_eq!(
            (step.transforms, step.kind.as_str()),
            (vec![Transform::Format, Transform::Mkdir], "overlay")
        );
        assert_eq!(Step::of("mkfs/loop").kind, "loop");
        assert_eq!(Step::of("other/format/x").kind, "other/format/x");
    }

    #[test]
    fn there_is_a_limit() {
        let many = vec!["loop"; MOUNTS_MAX + 1];
        assert!(matches!(plan(many.into_iter(), false), Err(Error::InvalidArgument(_))));
    }
}
