//! A lexer that knows just enough Rust: what is code, what is a comment, what is a string.

/// One line of a source file, taken apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Line {
    /// The code, with the contents of strings and characters blanked.
    pub(super) code: String,
    /// The comment's text, without `//` (but with the `/` or `!` of a doc comment).
    pub(super) comment: String,
}

impl Line {
    /// Whether the line holds a comment and nothing else.
    pub(super) fn is_comment(&self) -> bool {
        self.code.trim().is_empty() && !self.comment.is_empty()
    }

    /// Whether the line holds an attribute and nothing else.
    pub(super) fn is_attribute(&self) -> bool {
        let code = self.code.trim();
        code.starts_with("#[") || code.starts_with("#![")
    }

    /// Whether `word` stands in the code by itself, not as a part of a longer name.
    pub(super) fn has_word(&self, word: &str) -> bool {
        word_positions(&self.code, word).next().is_some()
    }
}

/// Byte offsets at which `word` stands in `code` by itself.
pub(super) fn word_positions<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let before = code[..*at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(is_name) && !after.is_some_and(is_name)
    })
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Code,
    LineComment,
    /// Depth of nesting.
    BlockComment(u32),
    String,
    /// Number of `#` that end it.
    RawString(usize),
}

/// Takes `source` apart.
pub(super) fn lines(source: &str) -> Vec<Line> {
    let chars: Vec<char> = source.chars().collect();
    let mut lines = vec![Line::default()];
    let mut state = State::Code;
    let mut at = 0;
    while let Some(&c) = chars.get(at) {
        if c == '\n' {
            if state == State::LineComment {
                state = State::Code;
            }
            lines.push(Line::default());
            at += 1;
            continue;
        }
        let Some(line) = lines.last_mut() else { break };
        let (next, used) = step(&chars, at, state, line);
        state = next;
        at += used;
    }
    lines
}

/// Consumes what starts at `at`; gives the state after it and the number of characters.
fn step(chars: &[char], at: usize, state: State, line: &mut Line) -> (State, usize) {
    let c = chars[at];
    let next = chars.get(at + 1).copied();
    match state {
        State::Code => code(chars, at, line),
        State::LineComment => {
            line.comment.push(c);
            (state, 1)
        }
        State::BlockComment(depth) => match (c, next) {
            ('*', Some('/')) if depth == 1 => (State::Code, 2),
            ('*', Some('/')) => (State::BlockComment(depth - 1), 2),
            ('/', Some('*')) => (State::BlockComment(depth + 1), 2),
            _ => {
                line.comment.push(c);
                (state, 1)
            }
        },
        // An escaped line end must still be seen as a line end.
        State::String if c == '\\' && next != Some('\n') => (state, 2),
        State::String if c == '"' => {
            line.code.push('"');
            (State::Code, 1)
        }
        State::RawString(hashes) if c == '"' && (1..=hashes).all(|i| chars.get(at + i) == Some(&'#')) => {
            line.code.push('"');
            (State::Code, 1 + hashes)
        }
        State::String | State::RawString(_) => {
            line.code.push(' ');
            (state, 1)
        }
    }
}

fn code(chars: &[char], at: usize, line: &mut Line) -> (State, usize) {
    let c = chars[at];
    let next = chars.get(at + 1).copied();
    match (c, next) {
        ('/', Some('/')) => (State::LineComment, 2),
        ('/', Some('*')) => (State::BlockComment(1), 2),
        ('"', _) => {
            line.code.push('"');
            (State::String, 1)
        }
        ('r', Some('"' | '#')) if !ends_in_name(&line.code) => {
            let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
            if chars.get(at + 1 + hashes) == Some(&'"') {
                line.code.push('"');
                (State::RawString(hashes), 2 + hashes)
            } else {
                line.code.push(c); // a raw identifier
                (State::Code, 1)
            }
        }
        // A character, as opposed to a lifetime: `'x'` or `'\...'`.
        ('\'', Some('\\')) => {
            let length = chars[at + 3..].iter().take(10).position(|c| *c == '\'').map_or(1, |p| p + 4);
            line.code.push_str("' '");
            (State::Code, length)
        }
        ('\'', Some(_)) if chars.get(at + 2) == Some(&'\'') => {
            line.code.push_str("' '");
            (State::Code, 3)
        }
        _ => {
            line.code.push(c);
            (State::Code, 1)
        }
    }
}

/// Whether `code` ends inside a name, so that a following `r` belongs to it. A byte-string prefix does not count.
fn ends_in_name(code: &str) -> bool {
    let mut chars = code.chars().rev();
    match (chars.next(), chars.next()) {
        (Some('b'), before) => before.is_some_and(|c| c.is_alphanumeric() || c == '_'),
        (Some(c), _) => c.is_alphanumeric() || c == '_',
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code_of(source: &str) -> Vec<String> {
        lines(source).into_iter().map(|l| l.code.trim_end().to_owned()).collect()
    }

    #[test]
    fn strings_and_characters_are_blanked_and_comments_set_apart() {
        let source = "let a = \"unsafe // no\"; // unsafe here\nlet b = '\"'; let c: &'a str = x;";
        let lines = lines(source);
        assert!(!lines[0].has_word("unsafe"));
        assert_eq!(lines[0].comment, " unsafe here");
        assert!(lines[1].code.contains("&'a str = x;"), "{:?}", lines[1]);
    }

    #[test]
    fn raw_strings_end_at_their_own_mark() {
        assert_eq!(code_of("f(r#\"a \" unsafe \"#); g()")[0].matches("unsafe").count(), 0);
        assert!(code_of("f(br\"x\\\"); g()")[0].ends_with("g()"));
    }

    #[test]
    fn block_comments_nest_and_strings_may_span_lines() {
        let lines = code_of("a /* x /* y */ unsafe */ b\n\"one \\\n unsafe\" c");
        assert_eq!(lines[0].replace(' ', ""), "ab");
        assert!(lines[2].ends_with("\" c") && !lines[2].contains("unsafe"));
    }

    #[test]
    fn escaped_characters_do_not_open_strings() {
        assert!(code_of(r"let q = '\''; let s = '\u{22}'; unsafe {}")[0].ends_with("unsafe {}"));
    }

    #[test]
    fn words_are_whole() {
        let line = |code: &str| Line { code: code.to_owned(), comment: String::new() };
        assert!(line("x = unsafe { }").has_word("unsafe"));
        assert!(!line("#![allow(unsafe_code)]").has_word("unsafe"));
    }
}
