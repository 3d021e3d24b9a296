//! The whole state through a real /dev/kvm. Skipped, in words, where it cannot be opened.

use std::sync::Arc;

use atoll_machine::backend::{
    Backend, BackendError, CpuIo, HaltReason, Partition, PartitionConfig, StopFlag, Vcpu,
};
use atoll_machine::cpu::host::HostCpu;
use atoll_machine::cpu::model::{Assurances, CpuModel, Feature, MsrKind};
use atoll_machine::cpu::msr::{MsrEntry, index as msr};
use atoll_machine::cpu::state::{Activity, CpuState};
use atoll_machine::cpu::topology::Topology;
use atoll_machine::inputs::InputGate;
use atoll_machine::memory::{AddressSpace, RamBlock};
use atoll_machine::time::{Clock, HostClock};

use crate::{KvmBackend, KvmPartition, KvmVcpu};

struct Machine {
    ram: Arc<RamBlock>,
    clock: Arc<HostClock>,
    model: Arc<CpuModel>,
    partition: Arc<KvmPartition>,
}

fn machine(cpus: u32) -> Option<Machine> {
    machine_with(cpus, |model| model)
}

fn machine_with(cpus: u32, change: impl Fn(CpuModel) -> CpuModel) -> Option<Machine> {
    let backend = match KvmBackend::open() {
        Ok(backend) => backend,
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    let khz = backend.fixed_tsc_khz().unwrap_or_else(|| HostClock::nominal_tsc_khz(&HostCpu::detect()));
    let clock = HostClock::started(khz);
    let resolve = |name| CpuModel::resolve_for(name, &HostCpu::detect(), &backend.features(), khz);
    let model = Arc::new(change(resolve("atoll-base").or_else(|_| resolve("host")).unwrap()));
    let memory = AddressSpace::new();
    let ram = RamBlock::new_shared("ram", 1 << 20).unwrap();
    memory.map_ram(0, &ram, 0, 1 << 20, 0).unwrap();
    let config = PartitionConfig {
        memory,
        model: model.clone(),
        topology: Topology::flat(cpus),
        clock: clock.clone(),
        inputs: InputGate::live(),
        extint: None,
        eoi: None,
    };
    let partition = backend.create_partition(config).unwrap();
    Some(Machine { ram, clock, model, partition })
}

/// Whether the processor virtualizes. `kvm_pvm` runs without: its guests have the host's CPUID and TSC.
pub(crate) fn virtualizes() -> bool {
    let yes = crate::host::virtualizes();
    if !yes {
        println!("skipped: this host's KVM works without the processor's virtualization");
    }
    yes
}

/// Ends the run at any port write.
struct Stop<'a>(&'a StopFlag);

impl CpuIo for Stop<'_> {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }
    fn port_write(&self, _: u16, _: &[u8]) {
        self.0.set();
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

impl Machine {
    /// A vCPU in real mode at 0x1000 with this code there.
    fn guest(&self, index: u32, code: &[u8]) -> KvmVcpu {
        let mut vcpu = self.partition.create_vcpu(index).unwrap();
        self.ram.write(0x1000, code).unwrap();
        let mut state = vcpu.state();
        start(&mut state);
        vcpu.set_state(&state).unwrap();
        vcpu
    }

    fn run(&self, vcpu: &mut KvmVcpu) -> CpuState {
        let stop = StopFlag::new();
        assert_eq!(vcpu.run(&stop, &Stop(&stop)).unwrap(), HaltReason::Stopped);
        vcpu.state()
    }
}

/// Real mode at 0x1000.
fn start(state: &mut CpuState) {
    state.activity = Activity::Active;
    state.segments = [atoll_machine::cpu::state::Segment::real_mode(0, 0x93); 6];
    state.segments[1].attributes = 0x9b;
    state.rip = 0x1000;
}

#[test]
fn power_on_state_is_architectural_and_valid() {
    let Some(machine) = machine(2) else { return };
    for index in 0..2 {
        let mut vcpu = machine.partition.create_vcpu(index).unwrap();
        let state = vcpu.state();
        state.check(&machine.model).unwrap();
        let expected = CpuState::power_on(index, index == 0, machine.model.signature());
        let plain = CpuState { tsc: 0, msrs: Vec::new(), xsave: expected.xsave.clone(), ..state.clone() };
        assert_eq!(plain, expected);
        assert_eq!(state.xsave[..28], expected.xsave[..28], "FCW to MXCSR");
        for (index, value) in &state.msrs {
            let entry = machine.model.msr(*index).unwrap();
            assert!(matches!(entry.kind, MsrKind::Engine) || *value == entry.reset, "{index:#x}: {value:#x}");
        }
    }
}

#[test]
fn a_state_that_was_given_is_accepted_and_the_same_again() {
    let Some(machine) = machine(1) else { return };
    // MOV EAX, 0x12345678; OUT 0xf4, AL
    let mut vcpu = machine.guest(0, &[0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, 0xe6, 0xf4, 0xf4]);
    let state = machine.run(&mut vcpu);
    assert_eq!((state.gpr[0], state.rip), (0x1234_5678, 0x1008));
    vcpu.set_state(&state).unwrap();
    assert_eq!(CpuState { tsc: state.tsc, ..vcpu.state() }, state);
}

#[test]
fn impossible_states_change_nothing() {
    let Some(machine) = machine(1) else { return };
    let mut vcpu = machine.guest(0, &[0xf4]);
    let before = vcpu.state();
    for change in [
        |s: &mut CpuState| s.lapic.apic_base = 0x400,
        |s: &mut CpuState| s.cr4 = 1 << 30,
        |s: &mut CpuState| s.cr0 = 1 << 31,
        |s: &mut CpuState| s.msrs.push((0xdead_beef, 0)),
        |s: &mut CpuState| s.xcr0 = 5,
    ] {
        let mut bad = CpuState { rip: 77, ..before.clone() };
        change(&mut bad);
        assert!(vcpu.set_state(&bad).is_err());
        assert_eq!(CpuState { tsc: before.tsc, ..vcpu.state() }, before);
    }
}

#[test]
fn what_the_host_refuses_beyond_the_model_changes_nothing() {
    // The software CPU's promises: this host may lack IBRS.
    let Some(machine) = machine_with(1, |model| model.with_assurances(Assurances::ALL)) else { return };
    if !virtualizes() {
        return;
    }
    let mut vcpu = machine.guest(0, &[0xf4]);
    let before = vcpu.state();
    let mut wanted = CpuState { rip: 77, ..before.clone() };
    wanted.msrs.iter_mut().find(|(i, _)| *i == msr::SPEC_CTRL).unwrap().1 = 1;
    wanted.check(&machine.model).unwrap();
    let expected = match vcpu.set_state(&wanted) {
        Ok(()) => wanted,
        Err(error) => {
            assert!(error.to_string().contains("0x48"), "{error}");
            before.clone()
        }
    };
    assert_eq!(CpuState { tsc: expected.tsc, ..vcpu.state() }, expected);
}

#[test]
fn vcpus_are_made_once_and_within_the_topology() {
    let Some(machine) = machine(1) else { return };
    let _first = machine.partition.create_vcpu(0).unwrap();
    assert!(matches!(machine.partition.create_vcpu(1), Err(BackendError::Config(_))));
}

/// RDMSR of ECX = `index` after a WRMSR of `write`; both in real mode. Ends with OUT.
fn msr_code(index: u32, write: Option<u32>) -> Vec<u8> {
    let mut code = vec![0x66, 0xb9];
    code.extend(index.to_le_bytes());
    if let Some(value) = write {
        code.extend([0x66, 0xb8]);
        code.extend(value.to_le_bytes());
        code.extend([0x66, 0x31, 0xd2, 0x0f, 0x30]);
    }
    code.extend([0x0f, 0x32, 0xe6, 0xf4, 0xf4]);
    code
}

#[test]
fn guests_reach_the_banks_registers_and_find_the_models_values() {
    for (index, write, expected) in [
        (msr::MTRR_CAP, None, 0x508),
        (msr::MTRR_DEF_TYPE, Some(0x806), 0x806),
        (msr::BIOS_SIGN_ID, Some(5), 0),
        (msr::STAR, Some(0x1234), 0x1234),
        (msr::PAT, Some(0x0106_0106), 0x0106_0106),
    ] {
        let Some(machine) = machine(1) else { return };
        let mut vcpu = machine.guest(0, &msr_code(index, write));
        let state = machine.run(&mut vcpu);
        let entry = machine.model.msr(index).unwrap();
        let expected = if index == msr::BIOS_SIGN_ID { entry.reset & 0xffff_ffff } else { expected };
        assert_eq!(state.gpr[0], expected, "register {index:#x}");
        let saved = state.msrs.iter().find(|(i, _)| *i == index).unwrap().1;
        assert_eq!(saved & 0xffff_ffff, expected, "register {index:#x}");
    }
}

#[test]
fn registers_that_do_not_exist_fault() {
    for index in [0x3a, 0x480, 0xc001_0114, 0xdead_beef, 0x186] {
        let Some(machine) = machine(1) else { return };
        // The handler of vector 13 ends the program elsewhere.
        let mut vcpu = machine.guest(0, &msr_code(index, None));
        machine.ram.write(13 * 4, &[0, 0x20, 0, 0]).unwrap();
        machine.ram.write(0x2000, &[0xe6, 0xf5, 0xf4]).unwrap();
        let state = machine.run(&mut vcpu);
        assert_eq!(state.rip, 0x2002, "register {index:#x} exists");
    }
}

/// RDTSC; OUT.
const READ_TSC: [u8; 5] = [0x0f, 0x31, 0xe6, 0xf4, 0xf4];

fn read_tsc(machine: &Machine, vcpu: &mut KvmVcpu) -> u64 {
    let mut state = vcpu.state();
    state.rip = 0x1000;
    vcpu.set_state(&state).unwrap();
    let state = machine.run(vcpu);
    state.gpr[2] << 32 | state.gpr[0]
}

#[test]
fn the_guests_counter_follows_the_clock_through_a_pause_and_is_one_for_all() {
    let Some(machine) = machine(2) else { return };
    if !virtualizes() {
        return;
    }
    let mut vcpus = [machine.guest(0, &READ_TSC), machine.guest(1, &READ_TSC)];
    let mut last = 0;
    for pause in [false, true, true] {
        if pause {
            machine.clock.pause();
            std::thread::sleep(std::time::Duration::from_millis(50));
            let standing = vcpus[0].state().tsc;
            assert_eq!(vcpus[0].state().tsc, standing, "time stands still");
            machine.clock.resume();
        }
        for vcpu in &mut vcpus {
            let before = machine.clock.tsc();
            let seen = read_tsc(&machine, vcpu);
            let after = machine.clock.tsc();
            // 5 ms: far less than the pause, enough for a slow host.
            let slack = u64::from(machine.clock.tsc_khz()) * 5;
            assert!(seen + slack > before && seen < after + slack, "{before} {seen} {after}");
            assert!(seen > last, "the counter went back: {seen} after {last}");
            last = seen;
        }
    }
}

#[test]
fn what_guests_write_to_their_counter_is_learnt_and_kept() {
    let Some(machine) = machine(1) else { return };
    if !virtualizes() {
        return;
    }
    if !machine.model.has(Feature::TscAdjust) {
        return println!("skipped: this host has no IA32_TSC_ADJUST");
    }
    // WRMSR TSC_ADJUST = 0x7000_0000 in EDX:EAX = 0:…; RDMSR; OUT.
    let mut vcpu = machine.guest(0, &msr_code(msr::TSC_ADJUST, Some(0x7000_0000)));
    let before = machine.clock.tsc();
    let state = machine.run(&mut vcpu);
    let adjust = |s: &CpuState| s.msrs.iter().find(|(i, _)| *i == msr::TSC_ADJUST).unwrap().1;
    assert_eq!((state.gpr[0], adjust(&state)), (0x7000_0000, 0x7000_0000));
    assert!(state.tsc > before + 0x7000_0000);
    machine.ram.write(0x1000, &READ_TSC).unwrap();
    assert!(read_tsc(&machine, &mut vcpu) > before + 0x7000_0000, "the next run has it");
    vcpu.reset();
    let state = vcpu.state();
    assert_eq!(adjust(&state), 0);
    assert!(state.tsc < machine.clock.tsc() + 0x1000_0000, "RESET takes the adjustment back");
}

#[test]
fn a_deadline_does_not_pass_while_the_vcpu_stands() {
    let Some(machine) = machine(1) else { return };
    if !virtualizes() {
        return;
    }
    if !machine.model.has(Feature::TscDeadline) {
        return println!("skipped: this host has no TSC deadline");
    }
    let mut vcpu = machine.guest(0, &READ_TSC);
    let mut state = vcpu.state();
    state.lapic.registers[0xf0..0xf4].copy_from_slice(&0x1ffu32.to_le_bytes());
    state.lapic.registers[0x320..0x324].copy_from_slice(&0x4_0050u32.to_le_bytes());
    state.lapic.tsc_deadline = state.tsc + u64::from(machine.clock.tsc_khz()) * 1000;
    vcpu.set_state(&state).unwrap();
    let after = machine.run(&mut vcpu);
    assert_eq!(after.lapic.tsc_deadline, state.lapic.tsc_deadline, "armed in the run, and still there");
    machine.clock.pause();
    std::thread::sleep(std::time::Duration::from_millis(1200));
    let standing = vcpu.state();
    assert_eq!(standing.lapic.tsc_deadline, state.lapic.tsc_deadline);
    assert_eq!(standing.lapic.registers[0x220..0x230], [0; 16], "no interrupt is requested");
    assert_eq!(standing.lapic.registers[0x250..0x254], [0; 4]);
}

#[test]
fn values_wider_than_the_models_registers_are_cut() {
    let entry = |kind| MsrEntry { index: msr::SYSENTER_ESP, reset: 0, kind };
    let address = 0xffff_fe00_0000_3000;
    assert_eq!(super::kept(&entry(MsrKind::Masked { writable: 0xffff_ffff }), address), 0x3000);
    assert_eq!(super::kept(&entry(MsrKind::Canonical), address), address);
}
