//! The suite that every backend passes, on the software CPU; and that the suite notices backends that do not.

use std::sync::Arc;

use atoll_backend_conformance::{run_all, run_matching};
use atoll_cpu_software::partition::{SoftwareBackend, SoftwarePartition};
use atoll_cpu_software::vcpu::SoftwareVcpu;
use atoll_machine::backend::{
    Backend, BackendError, Counting, CpuIo, EventRoutes, HaltReason, Partition, PartitionConfig, RunError,
    StateError, StopFlag, Vcpu,
};
use atoll_machine::cpu::model::BackendFeatures;
use atoll_machine::cpu::state::CpuState;
use atoll_machine::interrupt::{ExtIntSink, MsiSink};

/// `ATOLL_CONFORMANCE=interrupts::` runs only the cases whose name contains it.
#[test]
fn software_backend_conforms() {
    let filter = std::env::var("ATOLL_CONFORMANCE").unwrap_or_default();
    let report = run_matching(&SoftwareBackend, &[], &filter);
    println!("{report}");
    report.expect_success();
    assert!(!report.passed.is_empty(), "no case is named {filter}");
}

/// A mistake to plant in the software CPU.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    LosesUpperVectors,
    CountsOneMore,
    AcceptsAnything,
    SplitsEverything,
    ForgetsTimer,
}

/// The software CPU with a mistake.
struct Faulty(Fault);

struct FaultyPartition {
    inner: Arc<SoftwarePartition>,
    fault: Fault,
}

struct FaultyVcpu {
    inner: SoftwareVcpu,
    fault: Fault,
}

impl Backend for Faulty {
    type Partition = FaultyPartition;
    fn name(&self) -> &'static str {
        "faulty"
    }
    fn features(&self) -> BackendFeatures {
        SoftwareBackend.features()
    }
    fn fixed_tsc_khz(&self) -> Option<u32> {
        None
    }
    fn create_partition(&self, config: PartitionConfig) -> Result<Arc<FaultyPartition>, BackendError> {
        let inner = SoftwareBackend.create_partition(config)?;
        Ok(Arc::new(FaultyPartition { inner, fault: self.0 }))
    }
}

impl Partition for FaultyPartition {
    type Vcpu = FaultyVcpu;
    fn create_vcpu(self: &Arc<Self>, index: u32) -> Result<FaultyVcpu, BackendError> {
        Ok(FaultyVcpu { inner: self.inner.create_vcpu(index)?, fault: self.fault })
    }
    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        self.inner.msi_sink()
    }
    fn extint_sink(&self) -> Arc<dyn ExtIntSink> {
        self.inner.extint_sink()
    }
    fn inject_nmi(&self, index: u32) {
        self.inner.inject_nmi(index);
    }
    fn kick(&self, index: u32) {
        self.inner.kick(index);
    }
    fn counting(&self) -> Option<&dyn Counting> {
        Some(self)
    }
    fn event_routes(&self) -> Option<Arc<dyn EventRoutes>> {
        None
    }
}

impl Counting for FaultyPartition {
    fn retired(&self, index: u32) -> u64 {
        Counting::retired(&*self.inner, index)
    }
    fn set_budget(&self, index: u32, instructions: Option<u64>) {
        let more = u64::from(self.fault == Fault::CountsOneMore);
        self.inner.set_budget(index, instructions.map(|n| n + more));
    }
}

/// Passes accesses on, memory-mapped ones byte by byte.
struct Bytes<'a, I>(&'a I);

impl<I: CpuIo> CpuIo for Bytes<'_, I> {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.0.port_read(port, data);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        self.0.port_write(port, data);
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        for (at, byte) in (address..).zip(data) {
            self.0.mmio_read(at, std::slice::from_mut(byte));
        }
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        for (at, byte) in (address..).zip(data) {
            self.0.mmio_write(at, std::slice::from_ref(byte));
        }
    }
}

impl Vcpu for FaultyVcpu {
    fn run<I: CpuIo>(&mut self, stop: &StopFlag, io: &I) -> Result<HaltReason, RunError> {
        match self.fault {
            Fault::SplitsEverything => self.inner.run(stop, &Bytes(io)),
            _ => self.inner.run(stop, io),
        }
    }
    fn state(&mut self) -> CpuState {
        let mut state = self.inner.state();
        match self.fault {
            Fault::LosesUpperVectors if state.xsave.len() > 576 => state.xsave[576..].fill(0),
            Fault::ForgetsTimer => state.lapic.timer_expires_at = None,
            _ => {}
        }
        state
    }
    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        let result = self.inner.set_state(state);
        if self.fault == Fault::AcceptsAnything { Ok(()) } else { result }
    }
    fn reset(&mut self) {
        self.inner.reset();
    }
}

#[test]
fn the_suite_notices_planted_mistakes() {
    let planted = [
        (Fault::LosesUpperVectors, "registers::vector_state_round_trips"),
        (Fault::LosesUpperVectors, "moving::moved_at_every_budget_gives_the_same_result"),
        (Fault::CountsOneMore, "lifecycle::budget_is_exact"),
        (Fault::AcceptsAnything, "registers::impossible_states_are_refused_and_change_nothing"),
        (Fault::SplitsEverything, "io::mmio_widths_arrive_whole"),
        (Fault::ForgetsTimer, "registers::local_apic_round_trips"),
        (Fault::ForgetsTimer, "moving::moved_at_random_times_gives_the_same_result"),
    ];
    for (fault, case) in planted {
        let report = run_matching(&Faulty(fault), &[], case);
        let failed: Vec<&str> = report.failed.iter().map(|(name, _)| *name).collect();
        assert_eq!(failed, [case], "{report}");
    }
}

#[test]
fn skipped_cases_are_reported_and_unknown_names_are_refused() {
    let everything: Vec<&str> =
        atoll_backend_conformance::cases::<SoftwareBackend>().iter().map(|c| c.name).collect();
    let mut skip: Vec<(&str, &str)> = everything.iter().map(|name| (*name, "not now")).collect();
    let report = run_all(&SoftwareBackend, &skip);
    assert_eq!((report.skipped.len(), report.passed.len()), (everything.len(), 0));
    report.expect_success();
    skip.push(("io::no_such_case", "gone"));
    assert_eq!(run_all(&SoftwareBackend, &skip).unknown, ["io::no_such_case"]);
}
