//! A machine of one vCPU whose every run ends, and which notices stores outside the guest's memory.
//!
//! RAM and ROM are the middle parts of larger blocks; the rest of the blocks holds a known pattern. A run ends
//! by its instruction budget, after [`MAX_ACCESSES`] accesses to devices, when nothing can wake a halted
//! processor, or after [`PATIENCE`]: a processor may fault for ever without retiring anything.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use atoll_cpu_software::partition::{SoftwareBackend, SoftwarePartition};
use atoll_cpu_software::vcpu::SoftwareVcpu;
use atoll_machine::backend::{Backend, CpuIo, HaltReason, Partition, PartitionConfig, StopFlag, Vcpu};
use atoll_machine::cpu::host::HostCpu;
use atoll_machine::cpu::model::CpuModel;
use atoll_machine::cpu::state::CpuState;
use atoll_machine::cpu::topology::Topology;
use atoll_machine::inputs::{InputGate, InputKind, Recorder};
use atoll_machine::interrupt::{EoiSink, ExtIntSource, Msi};
use atoll_machine::memory::{AddressSpace, RamBlock};
use atoll_machine::time::{Clock, Nanos, nanos_to_tsc};

/// Bytes of RAM, from guest-physical 0.
pub const RAM: u64 = 0x4_0000;
/// Where the ROM is.
pub const ROM: u64 = 0xf_0000;
/// Bytes of ROM.
pub const ROM_SIZE: u64 = 0x4000;
/// Most device accesses of one run.
pub const MAX_ACCESSES: u32 = 10_000;
/// Most waits of a halted vCPU for a deadline that has passed.
pub const MAX_SPINS: u32 = 100;
/// Guest time that is never reached, in ns: the TSC would wrap.
const END: Nanos = 1 << 62;
/// Longest run, in host time.
pub const PATIENCE: Duration = Duration::from_millis(10);

const GUARD: u64 = 0x4000;
const TSC_KHZ: u32 = 2_000_000;

/// The models that are tried: the default one, and all that this host can.
pub fn model(host: bool) -> Arc<CpuModel> {
    static MODELS: OnceLock<[Arc<CpuModel>; 2]> = OnceLock::new();
    let make = |name| Arc::new(CpuModel::resolve(name, &HostCpu::detect(), TSC_KHZ).expect("the CPU model"));
    MODELS.get_or_init(|| ["atoll-base", "host"].map(make))[usize::from(host)].clone()
}

/// Guest time that passes with every look at it, and that leaps to the deadline that a halted vCPU waits for.
struct FuzzClock {
    now: AtomicU64,
    leapt: AtomicBool,
    /// Waits in a row for a deadline that had passed.
    spins: AtomicU32,
    stop: StopFlag,
    partition: OnceLock<Weak<SoftwarePartition>>,
}

impl Clock for FuzzClock {
    fn now(&self) -> Nanos {
        self.now.fetch_add(50, Ordering::SeqCst)
    }
    fn wall(&self) -> u64 {
        1_700_000_000_000_000_000 + self.now() % (1 << 60)
    }
    fn tsc_khz(&self) -> u32 {
        TSC_KHZ
    }
    fn tsc(&self) -> u64 {
        nanos_to_tsc(self.now(), TSC_KHZ)
    }
    fn host_delay(&self, at: Nanos) -> Option<Duration> {
        if (END..u64::MAX).contains(&at) {
            self.end();
            return None;
        }
        if at != u64::MAX {
            let before = self.now.fetch_max(at, Ordering::SeqCst);
            let spins = if before < at { 0 } else { self.spins.load(Ordering::SeqCst) + 1 };
            self.spins.store(spins, Ordering::SeqCst);
            assert!(spins < MAX_SPINS, "a halted vCPU spins: its timer is due and does not fire");
            self.leapt.store(true, Ordering::SeqCst);
            return Some(Duration::ZERO);
        }
        if !self.leapt.swap(false, Ordering::SeqCst) {
            self.end();
        }
        None
    }
}

impl FuzzClock {
    /// Ends the run: nothing will happen any more.
    fn end(&self) {
        self.stop.set();
        if let Some(partition) = self.partition.get().and_then(Weak::upgrade) {
            partition.kick(0);
        }
    }
}

/// Random numbers that are the same every time.
struct Fixed(AtomicU64);

impl Recorder for Fixed {
    fn deliver(&self, _kind: InputKind, delivery: Box<dyn FnOnce() + Send>) {
        delivery();
    }
    fn random(&self, bytes: &mut [u8]) {
        for byte in bytes {
            let x = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
            *byte = (x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes()[7];
        }
    }
}

/// The legacy interrupt controller: its vector is whatever the input says.
#[derive(Default)]
struct Pic(AtomicU32);

impl ExtIntSource for Pic {
    fn acknowledge(&self) -> u8 {
        self.0.load(Ordering::SeqCst) as u8
    }
}

impl EoiSink for Pic {
    fn end_of_interrupt(&self, _vector: u8) {}
}

/// Called for OUT with the port and the value.
type Hook<'a> = &'a dyn Fn(u16, u32);

/// Answers devices; checks how it is called.
struct Board<'a> {
    machine: &'a Machine,
    hook: Option<Hook<'a>>,
}

impl Board<'_> {
    fn note(&self) {
        if self.machine.accesses.fetch_add(1, Ordering::SeqCst) >= MAX_ACCESSES {
            self.machine.clock.end();
        }
    }

    fn check(&self, address: u64, len: usize) {
        self.note();
        assert!((1..=64).contains(&len), "an access of {len} bytes");
        assert!(address & 0xfff <= 0x1000 - len as u64, "{address:#x} + {len} crosses a page");
        assert!(address >> 52 == 0, "{address:#x} is no physical address");
    }
}

impl CpuIo for Board<'_> {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.note();
        assert!(matches!(data.len(), 1 | 2 | 4), "IN of {} bytes", data.len());
        data.fill(port as u8);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        self.note();
        assert!(matches!(data.len(), 1 | 2 | 4), "OUT of {} bytes", data.len());
        if let Some(hook) = self.hook {
            let mut value = [0; 4];
            value[..data.len()].copy_from_slice(data);
            hook(port, u32::from_le_bytes(value));
        }
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.check(address, data.len());
        // As a machine does it: this is also how ROM with a device is read.
        self.machine.memory.mmio_read(address, data);
        for byte in data {
            *byte = byte.wrapping_add(address as u8);
        }
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.check(address, data.len());
        self.machine.memory.mmio_write(address, data);
    }
}

/// The machine. Everything is new for every input, so that a failure can be repeated.
pub struct Machine {
    /// CPUID and MSR tables.
    pub model: Arc<CpuModel>,
    /// The only vCPU that runs, number 0 of two. Absent while it runs.
    vcpu: Option<SoftwareVcpu>,
    partition: Arc<SoftwarePartition>,
    memory: Arc<AddressSpace>,
    ram: Arc<RamBlock>,
    rom: Arc<RamBlock>,
    clock: Arc<FuzzClock>,
    pic: Arc<Pic>,
    stop: StopFlag,
    accesses: AtomicU32,
}

/// A block whose first and last `GUARD` bytes nobody may touch.
fn guarded(name: &str, size: u64) -> Arc<RamBlock> {
    let block = RamBlock::new_shared(name, size + 2 * GUARD).expect("guest memory");
    for at in [0, GUARD + size] {
        block.write(at, &[0xa5; GUARD as usize]).expect("inside");
    }
    block
}

fn read(block: &RamBlock, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    block.read(at, &mut bytes).expect("inside");
    bytes
}

/// What the ROM holds: something to execute in every mode.
fn rom_content() -> &'static [u8] {
    static CONTENT: OnceLock<Vec<u8>> = OnceLock::new();
    let make =
        || (0..ROM_SIZE).map(|i| [0x40, 0x01, 0xc8, 0x88, 0x03, 0x8b, 0x0b, 0x90][i as usize % 8]).collect();
    CONTENT.get_or_init(make)
}

impl Machine {
    /// A machine in its power-on state, RAM zeroed. `host`: with all features that this host can.
    ///
    /// # Panics
    /// If the host lacks memory.
    pub fn new(host: bool) -> Self {
        let (memory, model) = (AddressSpace::new(), model(host));
        let (ram, rom) = (guarded("fuzz-ram", RAM), guarded("fuzz-rom", ROM_SIZE));
        rom.write(GUARD, rom_content()).expect("inside");
        memory.map_ram(0, &ram, GUARD, RAM, 0).expect("mapping RAM");
        memory.map_rom(ROM, &rom, GUARD, ROM_SIZE, 0).expect("mapping ROM");
        let stop = StopFlag::new();
        let clock = Arc::new(FuzzClock {
            now: AtomicU64::new(1_000_000),
            leapt: AtomicBool::new(false),
            spins: AtomicU32::new(0),
            stop: stop.clone(),
            partition: OnceLock::new(),
        });
        let pic = Arc::new(Pic::default());
        let config = PartitionConfig {
            memory: memory.clone(),
            model: model.clone(),
            topology: Topology::flat(2),
            clock: clock.clone(),
            inputs: InputGate::recorded(Arc::new(Fixed(AtomicU64::new(1)))),
            extint: Some(pic.clone()),
            eoi: Some(pic.clone()),
        };
        let partition = SoftwareBackend.create_partition(config).expect("a partition");
        let _ = clock.partition.set(Arc::downgrade(&partition));
        let vcpu = Some(partition.create_vcpu(0).expect("a vCPU"));
        let accesses = AtomicU32::new(0);
        Self { model, vcpu, partition, memory, ram, rom, clock, pic, stop, accesses }
    }

    /// The vCPU, between runs.
    ///
    /// # Panics
    /// While it runs.
    pub fn vcpu(&mut self) -> &mut SoftwareVcpu {
        self.vcpu.as_mut().expect("the vCPU does not run")
    }

    /// Writes RAM; what lies outside is left out.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        let room = RAM.saturating_sub(address).min(bytes.len() as u64);
        if room > 0 {
            self.ram.write(GUARD + address, &bytes[..room as usize]).expect("inside");
        }
    }

    /// Writes eight bytes of RAM.
    pub fn write_u64(&self, address: u64, value: u64) {
        self.write(address, &value.to_le_bytes());
    }

    /// Sends a message-signalled interrupt.
    pub fn msi(&self, address: u64, data: u32) {
        self.partition.msi_sink().signal_msi(Msi { address, data });
    }

    /// Raises NMI.
    pub fn nmi(&self) {
        self.partition.inject_nmi(0);
    }

    /// Drives INTR, acknowledged with `vector`.
    pub fn extint(&self, high: bool, vector: u8) {
        self.pic.0.store(vector.into(), Ordering::SeqCst);
        self.partition.extint_sink().set_extint(high);
    }

    /// Lets guest time pass.
    pub fn advance(&self, by: Nanos) {
        self.clock.now.fetch_add(by, Ordering::SeqCst);
    }

    /// Runs at most `budget` instructions.
    pub fn run(&mut self, budget: u64) -> HaltReason {
        self.run_with(budget, |_, _, _| {})
    }

    /// Runs at most `budget` instructions; `hook` is called for OUT with the port and the value.
    ///
    /// # Panics
    /// If the vCPU cannot go on, does not count right, or touched memory that is not the guest's.
    pub fn run_with(&mut self, budget: u64, hook: impl Fn(&Machine, u16, u32)) -> HaltReason {
        let counting = self.partition.clone();
        let counting = counting.counting().expect("the software CPU counts");
        let before = counting.retired(0);
        self.stop.clear();
        self.accesses.store(0, Ordering::SeqCst);
        counting.set_budget(0, Some(budget));
        let mut vcpu = self.vcpu.take().expect("runs do not nest");
        watch(Some((self.stop.clone(), Arc::downgrade(&self.partition), Instant::now())));
        let call = |port, value| hook(self, port, value);
        let result = vcpu.run(&self.stop, &Board { machine: self, hook: Some(&call) });
        watch(None);
        self.vcpu = Some(vcpu);
        let reason = result.unwrap_or_else(|e| panic!("{e}"));
        let retired = counting.retired(0) - before;
        assert!(retired <= budget, "{retired} instructions where {budget} were allowed");
        if reason == HaltReason::BudgetSpent {
            assert_eq!(retired, budget, "the budget was not spent");
        }
        self.check_memory();
        reason
    }

    fn check_memory(&self) {
        for (block, size) in [(&self.ram, RAM), (&self.rom, ROM_SIZE)] {
            for at in [0, GUARD + size] {
                let intact = read(block, at, GUARD)[..] == [0xa5; GUARD as usize];
                assert!(intact, "{} was overrun at {at:#x}", block.name());
            }
        }
        assert!(read(&self.rom, GUARD, ROM_SIZE) == rom_content(), "ROM was written to");
    }

    /// The state, which must be one that can be saved and loaded again.
    ///
    /// # Panics
    /// If it is not.
    pub fn checked_state(&mut self) -> CpuState {
        let vcpu = self.vcpu();
        let state = vcpu.state();
        if let Err(error) = state.check(&self.model) {
            panic!("the state after a run is refused: {error}\n{state:x?}");
        }
        if let Err(error) = self.vcpu().set_state(&state) {
            panic!("the state after a run cannot be loaded: {error}\n{state:x?}");
        }
        state
    }
}

/// A run that is going on, and since when.
type Running = Option<(StopFlag, Weak<SoftwarePartition>, Instant)>;

/// Tells the watching thread about a run's start and end.
fn watch(running: Running) {
    static SLOT: OnceLock<Arc<Mutex<Running>>> = OnceLock::new();
    let slot = SLOT.get_or_init(|| {
        let slot = Arc::new(Mutex::new(None));
        let watched = slot.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(PATIENCE / 4);
                look(&watched);
            }
        });
        slot
    });
    *slot.lock().unwrap_or_else(|e| e.into_inner()) = running;
}

fn look(slot: &Mutex<Running>) {
    let slot = slot.lock().unwrap_or_else(|e| e.into_inner());
    if let Some((stop, partition, since)) = &*slot
        && since.elapsed() > PATIENCE
    {
        stop.set();
        if let Some(partition) = partition.upgrade() {
            partition.kick(0);
        }
    }
}
