//! A repository path in prose exists.
//!
//! Prose is the Markdown files and the module documentation (`//!`). A backticked word is taken for a path of
//! this repository when it starts with one of the house's folders, or when it is the name of a Markdown file.
//! In Markdown also the targets of relative links count.

use super::{Tree, Violation};

/// First components that make a backticked word a path of this repository: the folders of the house, those that
/// are planned included, so that prose cannot speak of a folder as if it were there already.
const FOLDERS: [&str; 19] = [
    ".cargo",
    ".ci",
    "api_types",
    "backends",
    "bin",
    "devices",
    "docs",
    "firmware",
    "foundation",
    "fuzz",
    "machine",
    "manager",
    "network",
    "storage",
    "testing",
    "vmm",
    "web",
    "xtask",
    "src",
];

/// What is written, not kept: build products and fuzzing's own folders.
const PRODUCTS: [&str; 2] = ["fuzz/artifacts", "fuzz/corpus"];

pub(super) fn check(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in &tree.files {
        if path.ends_with(".md") {
            let mut fenced = false;
            for (index, line) in text.lines().enumerate() {
                if line.trim_start().starts_with("```") {
                    fenced = !fenced;
                } else if !fenced {
                    check_line(tree, path, index, line, &mut violations);
                }
            }
        } else if path.ends_with(".rs") {
            for (index, line) in text.lines().enumerate() {
                if let Some(prose) = line.trim_start().strip_prefix("//!") {
                    check_line(tree, path, index, prose, &mut violations);
                }
            }
        }
    }
    violations
}

fn check_line(tree: &Tree, path: &str, index: usize, line: &str, violations: &mut Vec<Violation>) {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut report = |what: &str| {
        violations.push(Violation::new(path, index + 1, format!("names `{what}`, which does not exist")));
    };
    for word in line.split('`').skip(1).step_by(2) {
        if is_repository_path(word) && !resolves(tree, folder, word) {
            report(word);
        }
    }
    if path.ends_with(".md") {
        for link in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if !target.is_empty() && !target.contains(':') && !tree.exists(&join(folder, target)) {
                report(target);
            }
        }
    }
}

fn is_repository_path(word: &str) -> bool {
    let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    let (first, rest) = word.split_once('/').unwrap_or((word, ""));
    let in_folder =
        FOLDERS.contains(&first) && !rest.is_empty() || FOLDERS.contains(&first) && word.ends_with('/');
    let product = PRODUCTS.iter().any(|p| word.starts_with(p));
    plain && !product && (in_folder || (word.ends_with(".md") && word.len() > 3))
}

/// Relative to the root, to the file's own folder, or (for `src/...`) to a crate that the file is in.
fn resolves(tree: &Tree, folder: &str, word: &str) -> bool {
    let mut base = folder;
    loop {
        if tree.exists(&join(base, word)) {
            return true;
        }
        if base.is_empty() {
            return false;
        }
        base = base.rsplit_once('/').map_or("", |(parent, _)| parent);
    }
}

/// `folder/relative` with `.` and `..` worked out.
fn join(folder: &str, relative: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|p| !p.is_empty()).collect();
    for part in relative.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let tree = Tree::of(&[(path, text), ("machine/src/bus.rs", ""), ("docs/run.md", "")]);
        check(&tree).into_iter().map(|v| v.message).collect()
    }

    #[test]
    fn a_path_that_does_not_exist_is_caught() {
        assert_eq!(found("README.md", "See `machine/src/bsu.rs`.\n").len(), 1);
        assert_eq!(found("README.md", "See `network/` and `GONE.md`.\n").len(), 2);
        assert_eq!(found("machine/src/lib.rs", "//! See `machine/src/bsu.rs`.\n").len(), 1);
        assert_eq!(found("README.md", "[run](docs/rnu.md)\n").len(), 1);
    }

    #[test]
    fn existing_paths_and_other_words_are_left_alone() {
        let text = "`machine/src/bus.rs`, `machine/`, `docs/run.md`, `/dev/kvm`, `a/b`, `machine/src/*.rs`, `x.rs`, \
                    [run](docs/run.md#top), [site](https://example.org/x), `target/bench.json`, `fuzz/artifacts/`\n";
        assert_eq!(found("README.md", text), Vec::<String>::new());
    }

    #[test]
    fn paths_may_be_relative_to_the_file_or_its_crate() {
        assert!(found("machine/src/lib.rs", "//! `src/bus.rs`\n").is_empty());
        assert!(found("docs/other.md", "[run](run.md) and [bus](../machine/src/bus.rs)\n").is_empty());
    }

    #[test]
    fn examples_in_fences_and_code_comments_are_not_prose() {
        assert!(found("README.md", "```\n`machine/none`\n```\n").is_empty());
        assert!(found("machine/src/lib.rs", "// `machine/none`\n").is_empty());
    }
}
