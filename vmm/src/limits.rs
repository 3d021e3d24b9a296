//! Limits of disks and network interfaces as the throttles take them.

use atoll_api_types::Limits;
use atoll_foundation::throttle::{Rate, RateLimits};

/// Least burst in bytes: the largest frame or a usual request passes in one piece.
const LEAST_BYTES: u64 = 64 << 10;
/// Least burst in operations: what a queue holds.
const LEAST_OPERATIONS: u64 = 32;

/// The same limits, with a burst where none is given.
pub(crate) fn rate_limits(limits: &Limits) -> RateLimits {
    let rate = |per_second: Option<u64>, burst: Option<u64>, least| {
        per_second.map(|per_second| match burst {
            Some(burst) => Rate { per_second, burst },
            None => Rate::with_default_burst(per_second, least),
        })
    };
    RateLimits {
        operations: rate(limits.operations_per_second, limits.operations_burst, LEAST_OPERATIONS),
        bytes: rate(limits.bytes_per_second.map(|b| b.0), limits.bytes_burst.map(|b| b.0), LEAST_BYTES),
    }
}

#[cfg(test)]
mod tests {
    use atoll_api_types::ByteSize;

    use super::*;

    #[test]
    fn a_burst_that_is_not_given_lets_a_frame_or_a_tenth_of_a_second_pass() {
        let limits = Limits { bytes_per_second: Some(ByteSize(1000)), ..Limits::default() };
        let rates = rate_limits(&limits);
        assert_eq!(rates.bytes, Some(Rate { per_second: 1000, burst: 64 << 10 }));
        assert_eq!(rates.operations, None);
        let limits = Limits { operations_per_second: Some(5), operations_burst: Some(9), ..limits };
        assert_eq!(rate_limits(&limits).operations, Some(Rate { per_second: 5, burst: 9 }));
    }
}
