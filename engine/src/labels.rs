//! Labels: their limits, and how an update mask changes them.
//!
//! A key and its value are 4096 bytes together at most. A label set to the empty string by an update goes.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// Bytes of a key and its value together.
pub const LABEL_MAX: usize = 4096;

/// A set of labels, in the form the API's messages have.
pub type Labels = BTreeMap<String, String>;

/// Checks one label; InvalidArgument when it is too long or its key is empty.
pub fn validate(key: &str, value: &str) -> Result<()> {
    if key.is_empty() {
        return Err(Error::invalid_argument("a label's key must not be empty"));
    }
    let total = key.len() + value.len();
    if total > LABEL_MAX {
        let head: String = key.chars().take(64).collect();
        return Err(Error::invalid_argument(format!(
            "label {head:?} has {total} bytes of key and value; at most {LABEL_MAX} are allowed"
        )));
    }
    Ok(())
}

/// Checks every label of a set.
pub fn validate_all<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> Result<()> {
    labels.into_iter().try_for_each(|(key, value)| validate(key, value))
}

/// One path of an update mask, split at its first dot: `labels.a.b` is `("labels", Some("a.b"))`.
pub fn split_path(path: &str) -> (&str, Option<&str>) {
    match path.split_once('.') {
        Some((field, key)) => (field, Some(key)),
        None => (path, None),
    }
}

/// Applies a mask path to a map: the whole map is replaced (`key` None), or one key is set, or removed when its new
/// value is empty or absent.
pub fn update_map(current: &mut Labels, new: &Labels, key: Option<&str>) {
    match key {
        None => {
            *current = new
                .iter()
                .filter(|(_, value)| !value.is_empty())
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect();
        }
        Some(key) => match new.get(key).filter(|value| !value.is_empty()) {
            Some(value) => {
                current.insert(key.to_owned(), value.clone());
            }
            None => {
                current.remove(key);
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits() {
        assert!(validate("a", &"b".repeat(4095)).is_ok());
        assert!(matches!(validate("a", &"b".repeat(4096)), Err(Error::InvalidArgument(_))));
        assert!(matches!(validate("", "x"), Err(Error::InvalidArgument(_))));
    }

    #[test]
    fn masks() {
        let mut current = Labels::from([("a".into(), "1".into()), ("b.c".into(), "2".into())]);
        let new = Labels::from([("b.c".into(), String::new()), ("d".into(), "4".into())]);
        update_map(&mut current, &new, Some("b.c"));
        assert_eq!(current, Labels::from([("a".into(), "1".into())]));
        update_map(&mut current, &new, None);
        assert_eq!(current, Labels::from([("d".into(), "4".into())]));
        assert_eq!(split_path("labels.a.b/c"), ("labels", Some("a.b/c")));
        assert_eq!(split_path("labels"), ("labels", None));
    }
}
