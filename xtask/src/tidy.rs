//! `cargo xtask tidy`: the house rules that the compiler does not know.
//!
//! | rule | in |
//! |---|---|
//! | a lower layer never names a higher one | [`layers`] |
//! | every `unsafe` has its reason; only the listed modules may have any | [`unsafety`] |
//! | a repository path in prose exists | [`prose`] |
//! | file length, ignored tests, unfinished code, words that do not belong here | [`text`] |
//!
//! Every rule is a function from a [`Tree`] (paths and texts) to [`Violation`]s, so that the tests can plant a
//! violation in a tree of their own. Which files there are is git's answer: tracked, or new and not ignored.

mod layers;
mod lexer;
mod prose;
mod text;
mod unsafety;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process::root;

/// The files that the rules read, by path relative to the repository's root.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    /// Text files and their contents.
    files: BTreeMap<String, String>,
    /// Every file, text or not.
    paths: std::collections::BTreeSet<String>,
}

/// A broken rule, with the place and what to do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Violation {
    path: String,
    /// Counted from 1; 0 for the whole file.
    line: usize,
    message: String,
}

impl Violation {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, message: message.into() }
    }
}

impl Tree {
    /// The repository at `root`, as git sees it.
    fn read(root: &Path) -> Result<Self> {
        let output = Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
            .current_dir(root)
            .output()
            .context("cannot start git")?;
        ensure!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr).trim());
        let mut tree = Self::default();
        for path in String::from_utf8_lossy(&output.stdout).split('\0').filter(|p| !p.is_empty()) {
            let full = root.join(path);
            if !full.is_file() {
                continue; // removed, and not committed yet
            }
            tree.paths.insert(path.to_owned());
            if let Ok(text) = std::fs::read_to_string(&full) {
                tree.files.insert(path.to_owned(), text);
            }
        }
        Ok(tree)
    }

    /// Rust sources, fuzz targets included.
    fn sources(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().filter(|(p, _)| p.ends_with(".rs")).map(|(p, t)| (p.as_str(), t.as_str()))
    }

    /// Whether `path` is a file or a folder that holds one.
    fn exists(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        let below = format!("{path}/");
        self.paths.contains(path)
            || self.paths.range(below.clone()..).next().is_some_and(|p| p.starts_with(&below))
    }

    #[cfg(test)]
    fn of(files: &[(&str, &str)]) -> Self {
        let mut tree = Self::default();
        for (path, text) in files {
            tree.paths.insert((*path).to_owned());
            tree.files.insert((*path).to_owned(), (*text).to_owned());
        }
        tree
    }
}

/// Checks the repository.
///
/// # Errors
/// If any rule is broken; every broken one has been printed then.
pub(crate) fn run() -> Result<()> {
    let tree = Tree::read(&root())?;
    let violations = check(&tree);
    for violation in &violations {
        println!("{}:{}: {}", violation.path, violation.line, violation.message);
    }
    if !violations.is_empty() {
        bail!("tidy: {} violations", violations.len());
    }
    println!("tidy: {} files, every rule kept", tree.paths.len());
    Ok(())
}

fn check(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for rule in [layers::check, unsafety::check, prose::check, text::check] {
        violations.extend(rule(tree));
    }
    violations.sort();
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_exist_when_a_file_is_below_them() {
        let tree = Tree::of(&[("a/b/c.rs", ""), ("a/bc.rs", "")]);
        assert!(tree.exists("a/b") && tree.exists("a/b/") && tree.exists("a/b/c.rs") && tree.exists("a"));
        assert!(!tree.exists("a/c") && !tree.exists("a/b/c"));
    }

    #[test]
    fn a_clean_tree_has_no_violations() {
        let tree = Tree::of(&[
            ("README.md", "See `foundation/src/lib.rs`.\n"),
            ("foundation/Cargo.toml", "[package]\nname = \"atoll-foundation\"\n"),
            ("foundation/src/lib.rs", "//! Nothing.\nfn f() {}\n"),
        ]);
        assert_eq!(check(&tree), []);
    }
}
