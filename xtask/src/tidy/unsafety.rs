//! `unsafe` is rare, listed and explained.
//!
//! * A module that lifts the workspace's ban (`allow(unsafe_code)`) must be in [`OPT_IN`] and carry a
//!   `// UNSAFETY: reason` line.
//! * Every `unsafe` block and `unsafe impl` has a `// SAFETY:` comment directly above it (or above the statement
//!   it is part of), every `unsafe fn` a `# Safety` section in its documentation or a `// SAFETY:` comment.

use super::lexer::{self, Line};
use super::{Tree, Violation};

/// The modules that may hold `unsafe`: a file, or a folder with everything below it. `ARCHITECTURE.md` says what
/// each of them needs it for.
const OPT_IN: &[&str] = &[
    // Host operating system wrappers.
    "foundation/src/",
    // Guest memory.
    "machine/src/memory/",
    // The interpreter's fast path to guest memory.
    "backends/software/src/mmu/raw.rs",
    // The interpreter's host-arithmetic shim, and its tests, which run the same instructions natively.
    "backends/software/src/host/",
    "backends/software/src/fpu/tests.rs",
    "backends/software/src/fpu/tests/",
    // The KVM backend.
    "backends/kvm/src/",
    // The host-processor test oracle.
    "testing/oracle/src/guest.rs",
    "testing/oracle/src/native.rs",
    "testing/oracle/src/progress.rs",
];

/// How far above an `unsafe` the beginning of its statement may be.
const MAX_STATEMENT_LINES: usize = 12;

pub(super) fn check(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    // Fuzz targets are entered through generated code outside the workspace; they hold none themselves.
    for (path, text) in tree.sources() {
        let lines = lexer::lines(text);
        violations.extend(check_opt_in(path, &lines));
        for (index, line) in lines.iter().enumerate() {
            if let Some(message) = unexplained(&lines, index, line) {
                violations.push(Violation::new(path, index + 1, message));
            }
        }
    }
    violations
}

fn check_opt_in(path: &str, lines: &[Line]) -> Option<Violation> {
    let lifts = |l: &Line| {
        ["allow(", "expect(", "warn("].iter().any(|w| l.code.contains(w)) && l.has_word("unsafe_code")
    };
    let index = lines.iter().position(lifts)?;
    if !OPT_IN.iter().any(|entry| path == *entry || (entry.ends_with('/') && path.starts_with(entry))) {
        return Some(Violation::new(path, index + 1, "allows unsafe code and is not in tidy's opt-in list"));
    }
    let reason = lines.iter().any(|l| l.comment.trim_start().starts_with("UNSAFETY: "));
    (!reason)
        .then(|| Violation::new(path, index + 1, "allows unsafe code without a `// UNSAFETY: reason` line"))
}

/// What is missing at an `unsafe` in `line`; `None` if there is none, or it is explained.
fn unexplained(lines: &[Line], index: usize, line: &Line) -> Option<&'static str> {
    for at in lexer::word_positions(&line.code, "unsafe") {
        let rest = line.code[at + "unsafe".len()..].trim_start();
        // The brace or the keyword may stand on the next line.
        let rest = if rest.is_empty() { lines.get(index + 1).map_or("", |l| l.code.trim()) } else { rest };
        if rest.starts_with('{') || rest.starts_with("impl") {
            if !has_reason(lines, index, &["SAFETY:"]) {
                return Some("`unsafe` without a `// SAFETY:` comment above it");
            }
        } else if is_function(rest) && !has_reason(lines, index, &["SAFETY:", "# Safety"]) {
            return Some("`unsafe fn` without a `# Safety` section in its documentation");
        } else if rest.starts_with("trait") && !has_reason(lines, index, &["SAFETY:", "# Safety"]) {
            return Some("`unsafe trait` without a `# Safety` section in its documentation");
        }
    }
    None
}

/// `fn name(`, `extern "C" fn name(`, but not the type `unsafe fn(...)`.
fn is_function(rest: &str) -> bool {
    let Some(at) = lexer::word_positions(rest, "fn").next() else { return false };
    let is_start = rest[..at].trim().is_empty() || rest.trim_start().starts_with("extern");
    is_start && rest[at + 2..].trim_start().starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Whether one of `marks` begins a comment on the line itself or directly above its statement.
fn has_reason(lines: &[Line], index: usize, marks: &[&str]) -> bool {
    let marked = |line: &Line| {
        let comment = line.comment.trim_start_matches(['/', '!']).trim_start();
        marks.iter().any(|mark| comment.starts_with(mark))
    };
    if lines.get(index).is_some_and(marked) {
        return true;
    }
    let mut at = index;
    let mut statement = 0;
    while at > 0 {
        at -= 1;
        let Some(line) = lines.get(at) else { return false };
        if line.is_comment() || line.is_attribute() {
            if marked(line) {
                return true;
            }
        } else {
            // Still inside the statement that the `unsafe` belongs to?
            let code = line.code.trim_end();
            let above_ends = code.trim().is_empty() || code.ends_with([';', '{', '}', ',']);
            statement += 1;
            if above_ends || statement > MAX_STATEMENT_LINES {
                return false;
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<usize> {
        check(&Tree::of(&[(path, text)])).into_iter().map(|v| v.line).collect()
    }

    fn in_code(text: &str) -> Vec<usize> {
        found("foundation/src/x.rs", text)
    }

    #[test]
    fn a_block_without_a_reason_is_caught() {
        assert_eq!(in_code("fn f() {\n    unsafe { g() }\n}\n"), [2]);
        assert_eq!(in_code("fn f() {\n    // because\n    let x =\n        unsafe { g() };\n}\n"), [4]);
        assert_eq!(in_code("fn f() {\n    let x = unsafe\n    {\n    g() };\n}\n"), [2]);
    }

    #[test]
    fn a_reason_above_the_statement_or_on_the_line_is_enough() {
        assert!(in_code("// SAFETY: it is.\nunsafe { g() }\n").is_empty());
        assert!(in_code("// SAFETY: it is,\n// really.\nlet x =\n    y(unsafe { g() });\n").is_empty());
        assert!(in_code("let x = unsafe { g() }; // SAFETY: it is.\n").is_empty());
        assert!(in_code("// SAFETY: it is.\n#[inline]\nunsafe impl Send for X {}\n").is_empty());
    }

    #[test]
    fn a_reason_of_another_statement_does_not_count() {
        assert_eq!(in_code("// SAFETY: a.\nunsafe { a() };\nunsafe { b() };\n"), [3]);
    }

    #[test]
    fn an_impl_and_a_function_need_one_too() {
        assert_eq!(in_code("unsafe impl Send for X {}\n"), [1]);
        assert_eq!(in_code("/// Does it.\npub unsafe fn f() {}\n"), [2]);
        assert_eq!(in_code("unsafe extern \"C\" fn f() {}\n"), [1]);
        assert!(
            in_code("/// Does it.\n///\n/// # Safety\n/// Be careful.\npub unsafe fn f() {}\n").is_empty()
        );
    }

    #[test]
    fn function_pointer_types_strings_and_comments_are_not_unsafe_code() {
        assert!(in_code("type F = unsafe fn(u8);\n// unsafe { }\nlet s = \"unsafe { }\";\n").is_empty());
        assert!(in_code("type F = unsafe extern \"C\" fn(u8);\n").is_empty());
    }

    #[test]
    fn opting_in_needs_a_place_in_the_list_and_a_reason() {
        let text = "#![allow(unsafe_code)]\n";
        assert_eq!(found("storage/src/lib.rs", text), [1]);
        assert_eq!(in_code(text), [1]);
        assert!(in_code("// UNSAFETY: wraps mmap.\n#![allow(unsafe_code)]\n").is_empty());
        assert_eq!(
            found("storage/src/lib.rs", "// UNSAFETY: no.\n#[allow(dead_code, unsafe_code)]\nmod x;\n"),
            [2]
        );
    }
}
