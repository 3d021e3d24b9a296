//! How many processors, and how they are arranged.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Processors as sockets × cores × threads: `4`, or `sockets=2,cores=4,threads=1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuTopology {
    /// Packages.
    pub sockets: u32,
    /// Cores per package.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
}

/// Text that is not a topology.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseTopologyError {
    /// Neither a number nor `key=value` pairs.
    #[error("'{0}' is not a number of CPUs; write a number, or sockets=S,cores=C,threads=T")]
    Malformed(String),
    /// Zero of something.
    #[error("a machine needs at least one CPU; '{0}' asks for none")]
    Zero(String),
    /// A key given twice.
    #[error("'{0}' is given twice in the CPU topology")]
    Twice(String),
}

impl CpuTopology {
    /// Number of processors.
    pub fn total(&self) -> u64 {
        u64::from(self.sockets) * u64::from(self.cores) * u64::from(self.threads)
    }
}

impl Default for CpuTopology {
    fn default() -> Self {
        Self { sockets: 1, cores: 1, threads: 1 }
    }
}

impl FromStr for CpuTopology {
    type Err = ParseTopologyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || ParseTopologyError::Malformed(text.to_owned());
        let mut given: [Option<u32>; 3] = [None; 3];
        if text.contains('=') {
            for pair in text.split(',') {
                let (key, value) = pair.split_once('=').ok_or_else(malformed)?;
                let slot = match key {
                    "sockets" => 0,
                    "cores" => 1,
                    "threads" => 2,
                    _ => return Err(malformed()),
                };
                let value = value.parse().map_err(|_| malformed())?;
                if given[slot].replace(value).is_some() {
                    return Err(ParseTopologyError::Twice(key.to_owned()));
                }
            }
        } else {
            given[1] = Some(text.parse().map_err(|_| malformed())?);
        }
        let [sockets, cores, threads] = given.map(|n| n.unwrap_or(1));
        if sockets == 0 || cores == 0 || threads == 0 {
            return Err(ParseTopologyError::Zero(text.to_owned()));
        }
        Ok(Self { sockets, cores, threads })
    }
}

impl fmt::Display for CpuTopology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sockets={},cores={},threads={}", self.sockets, self.cores, self.threads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_number_is_one_socket_of_that_many_cores() {
        assert_eq!("4".parse(), Ok(CpuTopology { sockets: 1, cores: 4, threads: 1 }));
        let t: CpuTopology = "sockets=2,threads=2".parse().unwrap();
        assert_eq!(t, CpuTopology { sockets: 2, cores: 1, threads: 2 });
        assert_eq!(t.total(), 4);
        assert_eq!(t.to_string().parse(), Ok(t));
    }

    #[test]
    fn bad_topologies_say_what_is_wrong() {
        assert!(matches!("0".parse::<CpuTopology>(), Err(ParseTopologyError::Zero(_))));
        assert!(matches!("cores=1,cores=2".parse::<CpuTopology>(), Err(ParseTopologyError::Twice(_))));
        for text in ["", "x", "-1", "cores=", "chips=2", "cores=1,2"] {
            assert!(matches!(text.parse::<CpuTopology>(), Err(ParseTopologyError::Malformed(_))), "{text}");
        }
    }
}
