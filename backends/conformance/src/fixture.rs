//! A machine small enough to reason about: RAM, a boot ROM, a board that records every access, a legacy
//! interrupt controller of one line, and a clock.
//!
//! ```text
//! Machine ── memory, ram, rom, clock, pic, eoi, partition
//!    └─ run(&mut Guest) ── Board (CpuIo) ── log of accesses, hook on ports 0xe0..=0xef, exit on port 0xf4
//! ```

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::Duration;

use atoll_foundation::sync::lock;
use atoll_machine::backend::{Backend, CpuIo, HaltReason, Partition, PartitionConfig, StopFlag, Vcpu};
use atoll_machine::bus::MmioDevice;
use atoll_machine::cpu::host::HostCpu;
use atoll_machine::cpu::model::{CpuModel, DEFAULT_MODEL};
use atoll_machine::cpu::state::CpuState;
use atoll_machine::cpu::topology::Topology;
use atoll_machine::inputs::InputGate;
use atoll_machine::interrupt::{EoiSink, ExtIntSink, ExtIntSource, Msi};
use atoll_machine::memory::{AddressSpace, RamBlock};
use atoll_machine::time::{Clock, HostClock};

use crate::payload::{self, Payload};

/// How long a guest program may take before the case fails.
pub const TIME_LIMIT: Duration = Duration::from_secs(20);
/// Size of RAM at address zero, in bytes.
pub const RAM_SIZE: u64 = 4 << 20;
/// Where the boot ROM is: the last 64 KiB below 4 GiB.
pub const ROM: u64 = 0xffff_0000;
/// Size of the boot ROM, in bytes.
pub const ROM_SIZE: u64 = 0x1_0000;
/// A place for device regions. Nothing is mapped there at first.
pub const DEVICE: u64 = 0xd000_0000;
/// Writing this port ends the program.
pub const EXIT_PORT: u16 = 0xf4;
/// Writes to these ports call the machine's hook.
pub const HOOK_PORTS: std::ops::RangeInclusive<u16> = 0xe0..=0xef;

/// One access that left the vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// IN of so many bytes.
    PortRead(u16, usize),
    /// OUT of these bytes.
    PortWrite(u16, Vec<u8>),
    /// Memory-mapped read of so many bytes.
    Read(u64, usize),
    /// Memory-mapped write of these bytes.
    Write(u64, Vec<u8>),
}

/// Called with the vCPU's index, the port and the value.
type Hook = Box<dyn Fn(u32, u16, u32) + Send + Sync>;

/// What all vCPUs' accesses reach.
struct Board {
    memory: Arc<AddressSpace>,
    log: Mutex<Vec<Access>>,
    reads: AtomicU32,
    hook: OnceLock<Hook>,
}

/// The default model, or what the backend can give of it.
fn model<B: Backend>(backend: &B, tsc_khz: u32) -> CpuModel {
    let resolve = |name| CpuModel::resolve_for(name, &HostCpu::detect(), &backend.features(), tsc_khz);
    resolve(DEFAULT_MODEL).or_else(|_| resolve("host")).expect("a model")
}

/// The bytes that the board answers to its `count`th port read.
pub fn port_answer(count: u32, port: u16, len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (count * 16 + i) as u8 ^ port as u8).collect()
}

/// One vCPU's way to the board.
struct Seat<'a, P: Partition> {
    machine: &'a Machine<P>,
    index: u32,
}

impl<P: Partition> CpuIo for Seat<'_, P> {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        let board = &self.machine.board;
        lock(&board.log).push(Access::PortRead(port, data.len()));
        let count = board.reads.fetch_add(1, Ordering::SeqCst);
        data.copy_from_slice(&port_answer(count, port, data.len()));
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        let board = &self.machine.board;
        if port == EXIT_PORT {
            self.machine.stop(self.index);
            return;
        }
        lock(&board.log).push(Access::PortWrite(port, data.to_vec()));
        if HOOK_PORTS.contains(&port)
            && let Some(hook) = board.hook.get()
        {
            let mut value = [0; 4];
            value[..data.len()].copy_from_slice(data);
            hook(self.index, port, u32::from_le_bytes(value));
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        lock(&self.machine.board.log).push(Access::Read(address, data.len()));
        self.machine.board.memory.mmio_read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        lock(&self.machine.board.log).push(Access::Write(address, data.to_vec()));
        self.machine.board.memory.mmio_write(address, data);
    }
}

/// A legacy interrupt controller with one line. Requests count: each is acknowledged once.
#[derive(Default)]
pub struct OneLinePic {
    requests: Mutex<Requests>,
    acknowledged: AtomicU32,
    /// Weak, because what it leads to holds this controller.
    sink: OnceLock<Weak<dyn ExtIntSink>>,
}

#[derive(Default)]
struct Requests {
    waiting: u32,
    vector: u8,
}

impl OneLinePic {
    /// Requests an interrupt with `vector`.
    pub fn raise(&self, vector: u8) {
        let mut requests = lock(&self.requests);
        requests.vector = vector;
        requests.waiting += 1;
        self.drive(true);
    }

    /// How many acknowledge cycles there were.
    pub fn acknowledged(&self) -> u32 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    fn drive(&self, high: bool) {
        if let Some(sink) = self.sink.get().and_then(Weak::upgrade) {
            sink.set_extint(high);
        }
    }
}

impl ExtIntSource for OneLinePic {
    fn acknowledge(&self) -> u8 {
        self.acknowledged.fetch_add(1, Ordering::SeqCst);
        let mut requests = lock(&self.requests);
        requests.waiting = requests.waiting.saturating_sub(1);
        if requests.waiting == 0 {
            self.drive(false);
        } else {
            // As a controller's output falls during the acknowledge cycle and rises for the next request.
            self.drive(false);
            self.drive(true);
        }
        requests.vector
    }
}

/// Remembers the ends of level-triggered interrupts.
#[derive(Default)]
pub struct EoiLog(Mutex<Vec<u8>>);

impl EoiLog {
    /// The vectors that ended, in order.
    pub fn vectors(&self) -> Vec<u8> {
        lock(&self.0).clone()
    }
}

impl EoiSink for EoiLog {
    fn end_of_interrupt(&self, vector: u8) {
        lock(&self.0).push(vector);
    }
}

/// A device of plain bytes that remembers its accesses; `Access` addresses count from the region's start.
pub struct Cells {
    bytes: Mutex<Vec<u8>>,
    log: Mutex<Vec<Access>>,
}

impl Cells {
    /// `len` bytes, each the low byte of its offset plus `first`.
    pub fn new(len: usize, first: u8) -> Arc<Self> {
        let bytes = (0..len).map(|i| (i as u8).wrapping_add(first)).collect();
        Arc::new(Self { bytes: Mutex::new(bytes), log: Mutex::default() })
    }

    /// The bytes as they are now.
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }

    /// The accesses since the last call.
    pub fn take_log(&self) -> Vec<Access> {
        std::mem::take(&mut lock(&self.log))
    }
}

impl MmioDevice for Cells {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.log).push(Access::Read(offset, data.len()));
        let at = offset as usize;
        data.copy_from_slice(&lock(&self.bytes)[at..at + data.len()]);
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        lock(&self.log).push(Access::Write(offset, data.to_vec()));
        let at = offset as usize;
        lock(&self.bytes)[at..at + data.len()].copy_from_slice(data);
    }
}

/// A vCPU with its index.
pub struct Guest<P: Partition> {
    /// Which vCPU.
    pub index: u32,
    /// The vCPU.
    pub vcpu: P::Vcpu,
    /// Addresses of the labels that the program named.
    pub labels: Vec<u64>,
}

impl<P: Partition> Deref for Guest<P> {
    type Target = P::Vcpu;
    fn deref(&self) -> &P::Vcpu {
        &self.vcpu
    }
}

impl<P: Partition> DerefMut for Guest<P> {
    fn deref_mut(&mut self) -> &mut P::Vcpu {
        &mut self.vcpu
    }
}

/// The machine of one case.
pub struct Machine<P: Partition> {
    /// Guest-physical memory.
    pub memory: Arc<AddressSpace>,
    /// RAM at address zero.
    pub ram: Arc<RamBlock>,
    /// The boot ROM.
    pub rom: Arc<RamBlock>,
    /// CPUID and MSR tables.
    pub model: Arc<CpuModel>,
    /// How vCPUs are numbered.
    pub topology: Topology,
    /// The machine's time.
    pub clock: Arc<dyn Clock>,
    /// The legacy interrupt controller.
    pub pic: Arc<OneLinePic>,
    /// Ends of level-triggered interrupts.
    pub eoi: Arc<EoiLog>,
    /// What is tested.
    pub partition: Arc<P>,
    _extint: Arc<dyn ExtIntSink>,
    board: Board,
    stops: Vec<StopFlag>,
}

impl<P: Partition> Machine<P> {
    /// A machine with `cpus` vCPUs in real time.
    pub fn new<B: Backend<Partition = P>>(backend: &B, cpus: u32) -> Self {
        let khz = backend.fixed_tsc_khz().unwrap_or_else(|| HostClock::nominal_tsc_khz(&HostCpu::detect()));
        Self::with_clock(backend, cpus, HostClock::started(khz))
    }

    /// A machine with `cpus` vCPUs whose time is `clock`.
    pub fn with_clock<B: Backend<Partition = P>>(backend: &B, cpus: u32, clock: Arc<dyn Clock>) -> Self {
        let memory = AddressSpace::new();
        let ram = RamBlock::new_shared("conformance-ram", RAM_SIZE).expect("RAM");
        let rom = RamBlock::new_shared("conformance-rom", ROM_SIZE).expect("ROM");
        memory.map_ram(0, &ram, 0, RAM_SIZE, 0).expect("mapping RAM");
        memory.map_rom(ROM, &rom, 0, ROM_SIZE, 0).expect("mapping ROM");
        let model = model(backend, clock.tsc_khz());
        let (model, topology) = (Arc::new(model), Topology::flat(cpus));
        let (pic, eoi) = (Arc::new(OneLinePic::default()), Arc::new(EoiLog::default()));
        let config = PartitionConfig {
            memory: memory.clone(),
            model: model.clone(),
            topology,
            clock: clock.clone(),
            inputs: InputGate::live(),
            extint: Some(pic.clone()),
            eoi: Some(eoi.clone()),
        };
        let partition = backend.create_partition(config).expect("a partition");
        let extint = partition.extint_sink();
        let _ = pic.sink.set(Arc::downgrade(&extint));
        let board = Board {
            memory: memory.clone(),
            log: Mutex::default(),
            reads: AtomicU32::new(0),
            hook: OnceLock::new(),
        };
        payload::write_tables(&ram, cpus);
        let stops = (0..cpus).map(|_| StopFlag::new()).collect();
        Self { memory, ram, rom, model, topology, clock, pic, eoi, partition, _extint: extint, board, stops }
    }

    /// vCPU `index` in its power-on state.
    pub fn vcpu(&self, index: u32) -> Guest<P> {
        let vcpu = self.partition.create_vcpu(index).expect("a vCPU");
        Guest { index, vcpu, labels: Vec::new() }
    }

    /// vCPU `index` at the start of a 64-bit program (see [`Payload::long`]).
    pub fn long(&self, index: u32, program: impl FnOnce(&mut Payload) -> payload::Built) -> Guest<P> {
        let (state, labels) = Payload::long(index, program).install(self);
        self.guest(index, &state, labels)
    }

    /// vCPU `index` at the start of a 16-bit program.
    pub fn real(&self, index: u32, program: impl FnOnce(&mut Payload) -> payload::Built) -> Guest<P> {
        let (state, labels) = Payload::real(index, program).install(self);
        self.guest(index, &state, labels)
    }

    fn guest(&self, index: u32, state: &CpuState, labels: Vec<u64>) -> Guest<P> {
        let mut guest = Guest { labels, ..self.vcpu(index) };
        guest.set_state(state).expect("the start state of a program");
        guest
    }

    /// Calls `hook` for every write to [`HOOK_PORTS`]; once per machine.
    pub fn on_hook(&self, hook: impl Fn(u32, u16, u32) + Send + Sync + 'static) {
        assert!(self.board.hook.set(Box::new(hook)).is_ok(), "one hook per machine");
    }

    /// The accesses that left the vCPUs since the last call, but those that ended a program.
    pub fn take_log(&self) -> Vec<Access> {
        std::mem::take(&mut lock(&self.board.log))
    }

    /// The stop flag of vCPU `index`.
    pub fn stop_flag(&self, index: u32) -> &StopFlag {
        &self.stops[index as usize]
    }

    /// Asks vCPU `index` to leave its run.
    pub fn stop(&self, index: u32) {
        self.stop_flag(index).set();
        self.partition.kick(index);
    }

    /// Runs until the program ends, or until there is another reason, which must come within [`TIME_LIMIT`].
    /// Leaves the stop flag clear.
    pub fn run(&self, guest: &mut Guest<P>) -> HaltReason {
        let flag = self.stop_flag(guest.index).clone();
        let ended = (Mutex::new(false), Condvar::new());
        let (seat, index) = (Seat { machine: self, index: guest.index }, guest.index);
        let (reason, late) = std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let waited = ended.1.wait_timeout_while(lock(&ended.0), TIME_LIMIT, |ended| !*ended);
                let late = waited.is_ok_and(|(_, timeout)| timeout.timed_out());
                if late {
                    self.stop(index);
                }
                late
            });
            let reason = guest.vcpu.run(&flag, &seat);
            *lock(&ended.0) = true;
            ended.1.notify_all();
            (reason, watch.join().unwrap_or(true))
        });
        flag.clear();
        if late {
            let s = guest.vcpu.state();
            let at = (s.rip, s.rflags, s.activity);
            let words = |file: usize| (0..8).map(|n| payload::apic(&s, file + n * 0x10)).collect::<Vec<_>>();
            let (service, request) = (words(0x100), words(0x200));
            let event = (s.pending_event, s.interrupt_shadow, s.cr8, payload::apic(&s, 0xa0));
            panic!(
                "vCPU {index} did not end its program in {TIME_LIMIT:?}: {at:x?}, in service {service:x?}, \
                 requested {request:x?}, pending {event:x?}"
            );
        }
        reason.expect("the run of a vCPU")
    }

    /// Runs a program to its end.
    pub fn finish(&self, guest: &mut Guest<P>) -> CpuState {
        let reason = self.run(guest);
        let state = guest.vcpu.state();
        assert_eq!(reason, HaltReason::Stopped, "rip {:#x}, rax {:#x}", state.rip, state.gpr[0]);
        state
    }

    /// Reads a 64-bit value of RAM.
    pub fn u64_at(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.ram.read(address, &mut bytes).expect("an address in RAM");
        u64::from_le_bytes(bytes)
    }

    /// Writes RAM as a device does.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.ram.write(address, bytes).expect("an address in RAM");
    }

    /// How often the handler of `vector` ran on vCPU `index`.
    pub fn handled(&self, index: u32, vector: u8) -> u64 {
        self.u64_at(payload::count_of(index, vector))
    }

    /// The vectors that were handled on vCPU `index`, in order.
    pub fn order(&self, index: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.u64_at(payload::order_of(index)).min(1024) as usize];
        self.ram.read(payload::order_of(index) + 8, &mut bytes).expect("an address in RAM");
        bytes
    }

    /// Sends a message-signalled interrupt.
    pub fn msi(&self, address: u64, data: u32) {
        self.partition.msi_sink().signal_msi(Msi { address, data });
    }

    /// Announces that pin `pin` of an IOAPIC is level-triggered and sends this message, where the backend asks for it.
    pub fn level_route(&self, pin: u32, address: u64, data: u32) {
        if let Some(routes) = self.partition.ioapic_routes() {
            routes.set_route(pin, Some(Msi { address, data }));
        }
    }

    /// Waits until `happened`, at most [`TIME_LIMIT`].
    pub fn wait_for(&self, what: &str, happened: impl Fn() -> bool) {
        let start = std::time::Instant::now();
        while !happened() {
            assert!(start.elapsed() < TIME_LIMIT, "{what} did not happen in {TIME_LIMIT:?}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}
