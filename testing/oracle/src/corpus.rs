//! Code that once told the two sides apart, replayed with many states.
//!
//! One case a line: bits, code in hexadecimal, and after `#` why it is there. Empty lines and lines that begin
//! with `#` do not count.

use crate::case::Mode;

/// The corpus of this crate.
pub const CORPUS: &str = include_str!("../corpus/cases.txt");

/// Reads a corpus. Lines that do not parse are returned as errors with their number.
pub fn parse(text: &str) -> Result<Vec<(Mode, Vec<u8>)>, String> {
    let mut cases = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.split('#').next().unwrap_or_default().trim();
        if code.is_empty() {
            continue;
        }
        let bad = || format!("corpus line {}: expected `BITS HEX # why`, found `{line}`", number + 1);
        let (bits, hex) = code.split_once(' ').ok_or_else(bad)?;
        let mode = match bits {
            "64" => Mode::Long,
            "32" => Mode::Protected32,
            "16" => Mode::Protected16,
            _ => return Err(bad()),
        };
        let digits: Vec<u8> = hex.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
        let byte = |pair: &[u8]| {
            let text = std::str::from_utf8(pair).ok().filter(|_| pair.len() == 2);
            text.and_then(|t| u8::from_str_radix(t, 16).ok()).ok_or_else(bad)
        };
        cases.push((mode, digits.chunks(2).map(byte).collect::<Result<Vec<u8>, String>>()?));
    }
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_bad_ones_are_named() {
        let cases = parse("# nothing\n\n64 48 89 d8 # mov\n16 90").unwrap();
        assert_eq!(cases, [(Mode::Long, vec![0x48, 0x89, 0xd8]), (Mode::Protected16, vec![0x90])]);
        assert!(parse("64 4").unwrap_err().contains("line 1"));
        assert!(parse("12 90").is_err());
        assert!(!parse(CORPUS).unwrap().is_empty());
    }
}
