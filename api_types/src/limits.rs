//! How much a disk or a network interface may do.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, ParseSizeError};

/// Limits of one device. What is absent is not limited.
///
/// A burst is what may pass at once after a quiet time; without one it is what passes in a tenth of a second, or what
/// one large operation needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<ByteSize>,
    /// Bytes that may pass at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<ByteSize>,
    /// Operations (requests of a disk, frames of a network interface) per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations_per_second: Option<u64>,
    /// Operations that may pass at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations_burst: Option<u64>,
}

/// Text or a document that describes no limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseLimitError {
    /// A number of bytes that is none.
    #[error(transparent)]
    Size(#[from] ParseSizeError),
    /// A number of operations that is none.
    #[error("'{0}' is not a number of operations; write operations-per-second=1000, for example")]
    Operations(String),
    /// Nothing could ever pass.
    #[error("{0}=0 would let nothing pass; leave the limit out, or choose at least 1")]
    Zero(&'static str),
    /// A burst of what is not limited.
    #[error("{burst} needs {rate} as well")]
    BurstAlone {
        /// The burst's name.
        burst: &'static str,
        /// The limit's name.
        rate: &'static str,
    },
}

const BYTES: &str = "bytes-per-second";
const BYTES_BURST: &str = "bytes-burst";
const OPERATIONS: &str = "operations-per-second";
const OPERATIONS_BURST: &str = "operations-burst";

impl Limits {
    /// The options that [`Limits::option`] knows, for messages.
    pub const OPTIONS: &str =
        "bytes-per-second=SIZE, bytes-burst=SIZE, operations-per-second=N, operations-burst=N";

    /// Takes `key=value` of a command line. `false`: it is no limit. [`Limits::check`] has to follow.
    ///
    /// # Errors
    /// The value is malformed or zero.
    pub fn option(&mut self, key: &str, value: &str) -> Result<bool, ParseLimitError> {
        let operations = || value.parse().map_err(|_| ParseLimitError::Operations(value.to_owned()));
        match key {
            BYTES => self.bytes_per_second = Some(value.parse()?),
            BYTES_BURST => self.bytes_burst = Some(value.parse()?),
            OPERATIONS => self.operations_per_second = Some(operations()?),
            OPERATIONS_BURST => self.operations_burst = Some(operations()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether the limits make sense together.
    ///
    /// # Errors
    /// A limit of zero, or a burst without its limit.
    pub fn check(&self) -> Result<(), ParseLimitError> {
        let pairs = [
            (BYTES, self.bytes_per_second.map(|b| b.0), BYTES_BURST, self.bytes_burst.map(|b| b.0)),
            (OPERATIONS, self.operations_per_second, OPERATIONS_BURST, self.operations_burst),
        ];
        for (rate, per_second, burst, at_once) in pairs {
            if per_second == Some(0) {
                return Err(ParseLimitError::Zero(rate));
            }
            if at_once == Some(0) {
                return Err(ParseLimitError::Zero(burst));
            }
            if at_once.is_some() && per_second.is_none() {
                return Err(ParseLimitError::BurstAlone { burst, rate });
            }
        }
        Ok(())
    }

    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Limits {
    /// As options of a command line, each after a comma.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (key, value) in [(BYTES, self.bytes_per_second), (BYTES_BURST, self.bytes_burst)] {
            if let Some(value) = value {
                write!(f, ",{key}={value}")?;
            }
        }
        for (key, value) in
            [(OPERATIONS, self.operations_per_second), (OPERATIONS_BURST, self.operations_burst)]
        {
            if let Some(value) = value {
                write!(f, ",{key}={value}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_option_by_option() {
        let mut limits = Limits::default();
        assert!(limits.is_none() && limits.check().is_ok());
        assert_eq!(limits.option("bytes-per-second", "10M"), Ok(true));
        assert_eq!(limits.option("bytes-burst", "20M"), Ok(true));
        assert_eq!(limits.option("operations-per-second", "500"), Ok(true));
        assert_eq!(limits.option("readonly", ""), Ok(false));
        assert!(limits.check().is_ok());
        assert_eq!(limits.bytes_per_second, Some(ByteSize(10 << 20)));
        assert_eq!(limits.to_string(), ",bytes-per-second=10M,bytes-burst=20M,operations-per-second=500");
    }

    #[test]
    fn limits_that_make_no_sense_are_refused() {
        let mut limits = Limits::default();
        assert!(matches!(limits.option("bytes-per-second", "fast"), Err(ParseLimitError::Size(_))));
        assert!(matches!(limits.option("operations-burst", "-1"), Err(ParseLimitError::Operations(_))));
        let zero = Limits { bytes_per_second: Some(ByteSize(0)), ..Limits::default() };
        assert_eq!(zero.check(), Err(ParseLimitError::Zero("bytes-per-second")));
        let alone = Limits { operations_burst: Some(5), ..Limits::default() };
        assert!(matches!(alone.check(), Err(ParseLimitError::BurstAlone { .. })));
    }
}
