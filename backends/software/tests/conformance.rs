//! The suite that every backend passes, on the software CPU.

use atoll_backend_conformance::run_matching;
use atoll_cpu_software::partition::SoftwareBackend;

/// `ATOLL_CONFORMANCE=interrupts::` runs only the cases whose name contains it.
#[test]
fn software_backend_conforms() {
    let filter = std::env::var("ATOLL_CONFORMANCE").unwrap_or_default();
    let report = run_matching(&SoftwareBackend, &[], &filter);
    println!("{report}");
    report.expect_success();
}
