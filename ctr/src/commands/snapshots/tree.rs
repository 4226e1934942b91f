//! `ctr snapshots tree`.

use std::collections::BTreeMap;

use clap::Args;
use proto::containerd::services::snapshots::v1::Info;

use crate::client::Client;
use crate::output;

/// Show which snapshot is on top of which
#[derive(Debug, Args)]
pub(super) struct Tree;

impl Tree {
    pub(super) async fn run(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        output::print(&text(&super::all(&client, &snapshotter, Vec::new()).await?))
    }
}

/// A line per snapshot, beneath its parent and further in; in the order they were listed in otherwise.
fn text(snapshots: &[Info]) -> String {
    let mut children: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for snapshot in snapshots {
        children.entry(&snapshot.parent).or_default().push(&snapshot.name);
    }
    // A parent that was not listed, as it may have gone meanwhile, does not hide what is on it.
    let listed = |name: &str| snapshots.iter().any(|snapshot| snapshot.name == name);
    let tops = snapshots.iter().filter(|snapshot| !listed(&snapshot.parent));
    let mut pending: Vec<(&str, usize)> = tops.map(|snapshot| (snapshot.name.as_str(), 0)).collect();
    pending.reverse();
    let mut text = String::new();
    while let Some((name, level)) = pending.pop() {
        let drop = if level == 0 { "" } else { "\\_" };
        text.push_str(&format!("{}{drop} {name}\n", "  ".repeat(level)));
        let above = children.get(name).into_iter().flatten().rev();
        pending.extend(above.map(|child| (*child, level + 1)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_stand_beneath_their_parents() {
        let listed = [("b", "a"), ("a", ""), ("d", "gone"), ("c", "a"), ("e", "b")];
        let infos: Vec<Info> = listed
            .map(|(name, parent)| Info { name: name.into(), parent: parent.into(), ..Info::default() })
            .into();
        assert_eq!(text(&infos), " a\n  \\_ b\n    \\_ e\n  \\_ c\n d\n");
    }
}
