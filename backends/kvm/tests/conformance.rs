//! The suite that every backend passes, on KVM. Without `/dev/kvm` there is nothing to test: it says so and passes.
//!
//! `ATOLL_CONFORMANCE=interrupts::` runs only the cases whose name contains it.

use atoll_backend_conformance::run_matching;
use atoll_kvm::KvmBackend;

#[test]
fn kvm_conforms() {
    let backend = match KvmBackend::open() {
        Ok(backend) => backend,
        Err(error) => return println!("skipped: {error}"),
    };
    let filter = std::env::var("ATOLL_CONFORMANCE").unwrap_or_default();
    let report = run_matching(&backend, &[], &filter);
    println!("{report}");
    report.expect_success();
    assert!(!report.passed.is_empty(), "no case is named {filter}");
}
