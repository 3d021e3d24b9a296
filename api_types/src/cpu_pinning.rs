//! Which processors of the host execute which processors of a machine.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Highest number of a host processor that can be named.
pub const MAX_HOST_CPU: u32 = 65_535;

/// The host processors on which a machine's CPUs run: `0-3,8` for all of them alike, or one such list per CPU,
/// separated by colons: `0:1:4-5`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct CpuPinning {
    /// One set for all CPUs, or one per CPU; never empty, and no set is.
    sets: Vec<BTreeSet<u32>>,
}

/// Text that does not say which host processors to use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParsePinningError {
    /// Not a list.
    #[error(
        "'{0}' is not a list of host CPUs; write 0-3,8 for every CPU alike, or a list per CPU such as 0:1:4-5"
    )]
    Malformed(String),
    /// A number that no host has.
    #[error("host CPU {0} is more than the highest that can be, {MAX_HOST_CPU}")]
    TooLarge(u64),
}

impl CpuPinning {
    /// The host processors for CPU `index`, ascending; `None` when there are lists per CPU and none for this one.
    pub fn of_cpu(&self, index: u32) -> Option<Vec<u32>> {
        let set = match self.sets.as_slice() {
            [all] => Some(all),
            each => each.get(index as usize),
        };
        set.map(|set| set.iter().copied().collect())
    }

    /// How many CPUs have a list of their own; `None` when one list counts for all.
    pub fn lists(&self) -> Option<usize> {
        (self.sets.len() > 1).then_some(self.sets.len())
    }

    /// Every host processor that is named, ascending.
    pub fn named(&self) -> BTreeSet<u32> {
        self.sets.iter().flatten().copied().collect()
    }
}

impl FromStr for CpuPinning {
    type Err = ParsePinningError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let sets = text.split(':').map(|list| parse_list(text, list)).collect::<Result<_, _>>()?;
        Ok(Self { sets })
    }
}

/// `0-3,8` as numbers. `whole` is what a refusal shows.
fn parse_list(whole: &str, list: &str) -> Result<BTreeSet<u32>, ParsePinningError> {
    let malformed = || ParsePinningError::Malformed(whole.to_owned());
    let number = |text: &str| match text.parse::<u64>() {
        Ok(n) if text.bytes().all(|b| b.is_ascii_digit()) => match u32::try_from(n) {
            Ok(n) if n <= MAX_HOST_CPU => Ok(n),
            _ => Err(ParsePinningError::TooLarge(n)),
        },
        _ => Err(malformed()),
    };
    let mut set = BTreeSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(malformed());
        }
        set.extend(first..=last);
    }
    Ok(set)
}

impl fmt::Display for CpuPinning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, set) in self.sets.iter().enumerate() {
            if index > 0 {
                f.write_str(":")?;
            }
            write_list(f, set)?;
        }
        Ok(())
    }
}

/// Consecutive numbers as ranges.
fn write_list(f: &mut fmt::Formatter<'_>, set: &BTreeSet<u32>) -> fmt::Result {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &cpu in set {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    for (index, (first, last)) in ranges.iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        match first == last {
            true => write!(f, "{comma}{first}")?,
            false => write!(f, "{comma}{first}-{last}")?,
        }
    }
    Ok(())
}

impl From<CpuPinning> for String {
    fn from(pinning: CpuPinning) -> Self {
        pinning.to_string()
    }
}

impl TryFrom<String> for CpuPinning {
    type Error = ParsePinningError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<CpuPinning, ParsePinningError> {
        text.parse()
    }

    #[test]
    fn one_list_counts_for_every_cpu() {
        let pinning = parse("0-2,8").unwrap();
        assert_eq!(pinning.lists(), None);
        assert_eq!(pinning.of_cpu(0), Some(vec![0, 1, 2, 8]));
        assert_eq!(pinning.of_cpu(7), pinning.of_cpu(0));
        assert_eq!(pinning.to_string(), "0-2,8");
    }

    #[test]
    fn lists_per_cpu_are_separated_by_colons() {
        let pinning = parse("3:0:4-5").unwrap();
        assert_eq!(pinning.lists(), Some(3));
        assert_eq!(pinning.of_cpu(0), Some(vec![3]));
        assert_eq!(pinning.of_cpu(2), Some(vec![4, 5]));
        assert_eq!(pinning.of_cpu(3), None);
        assert_eq!(pinning.named().into_iter().collect::<Vec<_>>(), [0, 3, 4, 5]);
    }

    #[test]
    fn bad_lists_say_what_is_wrong() {
        for text in ["", "a", "1-", "-1", "3-1", "0,", "0::1", "+1", "0 1", "1.5"] {
            assert!(matches!(parse(text), Err(ParsePinningError::Malformed(_))), "{text}");
        }
        assert_eq!(parse("65536"), Err(ParsePinningError::TooLarge(65536)));
        assert_eq!(parse("0-4294967296"), Err(ParsePinningError::TooLarge(1 << 32)));
    }

    proptest! {
        #[test]
        fn printed_lists_read_back(
            sets in prop::collection::vec(prop::collection::btree_set(0..40u32, 1..12), 1..5)
        ) {
            let pinning = CpuPinning { sets };
            prop_assert_eq!(parse(&pinning.to_string()), Ok(pinning));
        }
        #[test]
        fn any_text_is_answered_without_a_panic(text in "[0-9,:-]{0,12}") {
            let _ = parse(&text);
        }
    }
}
