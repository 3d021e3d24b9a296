//! A number of bytes as people write it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes: `512M`, `2GiB`, `4096`. Suffixes are powers of 1024, in either case, with an optional
/// `B` or `iB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ByteSize(pub u64);

const UNITS: [(char, u32); 5] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50)];

/// Text that is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSizeError {
    /// Not a number followed by a unit.
    #[error("'{0}' is not a size; write a number of bytes with an optional K, M, G, T or P, such as 512M")]
    Malformed(String),
    /// More than 2^64 - 1 bytes.
    #[error("'{0}' is more than 16 EiB")]
    TooLarge(String),
}

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || ParseSizeError::Malformed(text.to_owned());
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, suffix) = text.split_at(digits);
        if number.is_empty() {
            return Err(malformed());
        }
        let number: u64 = number.parse().map_err(|_| ParseSizeError::TooLarge(text.to_owned()))?;
        let shift = match suffix.to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            unit => {
                let mut chars = unit.chars();
                let letter = chars.next().ok_or_else(malformed)?;
                if !matches!(chars.as_str(), "" | "B" | "IB") {
                    return Err(malformed());
                }
                UNITS.iter().find(|(l, _)| *l == letter).ok_or_else(malformed)?.1
            }
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| ParseSizeError::TooLarge(text.to_owned()))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (letter, shift) in UNITS.iter().rev() {
            if self.0 != 0 && self.0.trailing_zeros() >= *shift {
                return write!(f, "{}{letter}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

impl TryFrom<String> for ByteSize {
    type Error = ParseSizeError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4096),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("512MB", 512 << 20),
            ("2GiB", 2 << 30),
            ("1T", 1 << 40),
            ("7B", 7),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "M", "12X", "1.5G", "-1", "1Mi", "1MM", "1 G", "5é"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(ParseSizeError::Malformed(_))), "{text}");
        }
        for text in ["99999999999999999999", "17179869184G"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(ParseSizeError::TooLarge(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn printed_sizes_read_back(bytes: u64) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }
        #[test]
        fn any_text_is_answered_without_a_panic(text in ".*") {
            let _ = text.parse::<ByteSize>();
        }
    }
}
