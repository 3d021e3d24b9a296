//! Guest programs: assembly, page tables, descriptor tables, handlers, and the state a program starts in.
//!
//! Guest-physical layout (everything below 1 GiB is mapped one to one in long mode, and 3 to 4 GiB):
//!
//! | address | what |
//! |---|---|
//! | 0x1000..0x5000 | PML4, PDPT, page directories of the first and the fourth GiB (2 MiB pages) |
//! | 0x5000 | GDT |
//! | 0x6000 | 16-bit programs |
//! | 0x8000 | TSS of every vCPU, 0x100 apart |
//! | 0x1_0000 | IDT of every vCPU, 4 KiB apart |
//! | 0x2_0000 | stacks, 8 KiB per vCPU |
//! | 0x4_0000 | what handlers record, 16 KiB per vCPU |
//! | 0x10_0000 | 64-bit programs, 64 KiB per vCPU |
//! | 0x20_0000 | data |

use std::ops::{Deref, DerefMut};

use atoll_machine::backend::Partition;
use atoll_machine::cpu::state::{CpuState, DescriptorTable, Segment, gpr, seg};
use atoll_machine::memory::RamBlock;
use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

use crate::fixture::{EXIT_PORT, Machine};

/// What a program's author returns: the labels whose addresses the case needs.
pub type Built = Result<Vec<CodeLabel>, IcedError>;

/// Top-level page table.
pub const PML4: u64 = 0x1000;
/// Global descriptor table.
pub const GDT: u64 = 0x5000;
/// 16-bit programs.
pub const REAL_CODE: u64 = 0x6000;
/// 64-bit programs.
pub const CODE: u64 = 0x10_0000;
/// Free for cases.
pub const DATA: u64 = 0x20_0000;
/// The local APIC.
pub const APIC: u64 = 0xfee0_0000;

/// Selectors of the GDT.
#[allow(missing_docs)]
pub mod selector {
    pub const CODE32: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE64: u16 = 0x18;
    pub const CODE16: u16 = 0x20;
    pub const DATA16: u16 = 0x28;
    /// SYSRET wants 32-bit code, data and 64-bit code of ring 3 in this order.
    pub const USER_CODE32: u16 = 0x30;
    pub const USER_DATA: u16 = 0x38;
    pub const USER_CODE64: u16 = 0x40;
    pub const TSS: u16 = 0x50;
}

const TABLE: [u64; 9] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x0000_9b00_0000_ffff,
    0x0000_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];

fn tss_of(index: u32) -> u64 {
    0x8000 + u64::from(index) * 0x100
}

fn idt_of(index: u32) -> u64 {
    0x1_0000 + u64::from(index) * 0x1000
}

/// First byte above the stack of vCPU `index`.
pub fn stack_of(index: u32) -> u64 {
    0x2_2000 + u64::from(index) * 0x2000
}

fn record_of(index: u32) -> u64 {
    0x4_0000 + u64::from(index) * 0x4000
}

/// Where the handler of `vector` on vCPU `index` counts, in 64 bits.
pub fn count_of(index: u32, vector: u8) -> u64 {
    record_of(index) + u64::from(vector) * 8
}

/// Where the handler of `vector` on vCPU `index` leaves the address it returns to.
pub fn return_of(index: u32, vector: u8) -> u64 {
    record_of(index) + 0x800 + u64::from(vector) * 8
}

/// Where handlers on vCPU `index` list their vectors: a 64-bit count, then one byte each.
pub fn order_of(index: u32) -> u64 {
    record_of(index) + 0x1000
}

/// Where fault handlers leave vector, error code, RIP and CR2 of the last fault, in 64 bits each.
pub fn fault_of(index: u32) -> u64 {
    record_of(index) + 0x3000
}

/// Where a program on vCPU `index` says at which address it continues after a fault.
pub fn resume_of(index: u32) -> u64 {
    record_of(index) + 0x3020
}

fn put(ram: &RamBlock, at: u64, values: &[u64]) {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    ram.write(at, &bytes).expect("tables fit in RAM");
}

/// Page tables, descriptor table and task segments of `cpus` vCPUs. Accessed and dirty bits are set, so that
/// walking these tables writes nothing.
pub(crate) fn write_tables(ram: &RamBlock, cpus: u32) {
    put(ram, PML4, &[0x2000 | 0x67]);
    put(ram, 0x2000, &[0x3000 | 0x67, 0, 0, 0x4000 | 0x67]);
    let large = |base: u64| (0..512).map(|i| (base + (i << 21)) | 0xe7).collect::<Vec<u64>>();
    put(ram, 0x3000, &large(0));
    put(ram, 0x4000, &large(0xc000_0000));
    put(ram, GDT, &TABLE);
    for index in 0..cpus {
        put(ram, tss_of(index) + 4, &[stack_of(index) - 0x1000]);
        ram.write(tss_of(index) + 0x66, &0x68u16.to_le_bytes()).expect("task segments fit in RAM");
    }
}

/// A flat segment of the GDT.
pub fn flat(selector: u16, attributes: u32) -> Segment {
    Segment { selector, base: 0, limit: 0xffff_ffff, attributes }
}

/// Sets a local APIC register of a state.
pub fn set_apic(state: &mut CpuState, offset: usize, value: u32) {
    state.lapic.registers[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// A local APIC register of a state.
pub fn apic(state: &CpuState, offset: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&state.lapic.registers[offset..offset + 4]);
    u32::from_le_bytes(bytes)
}

/// The state of vCPU `index` at the start of a program, before its mode is set: local APIC enabled, LINT0
/// wired to the legacy controller, x87 and SSE initialised.
fn ready<P: Partition>(machine: &Machine<P>, index: u32) -> CpuState {
    let mut s = CpuState::power_on(machine.topology.apic_id(index), index == 0, machine.model.signature());
    s.activity = Default::default();
    s.tsc = machine.clock.tsc();
    s.gpr = [0; 16];
    set_apic(&mut s, 0xf0, 0x1ff);
    set_apic(&mut s, 0xd0, 1 << (24 + index % 8));
    set_apic(&mut s, 0x350, if index == 0 { 0x700 } else { 0x1_0700 });
    s.xcr0 = machine.model.xcr0_mask();
    s.xsave = vec![0; 832];
    s.xsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    s.xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    // SSE does not depend on XCR0.
    s.xsave[512..520].copy_from_slice(&(s.xcr0 | 2).to_le_bytes());
    s
}

/// 64-bit mode in ring 0, interrupts off, at `rip`.
pub fn long_state<P: Partition>(machine: &Machine<P>, index: u32, rip: u64) -> CpuState {
    let mut s = ready(machine, index);
    s.cr0 = 0x8001_0033;
    s.cr4 = 0x4_0620 & machine.model.cr4_mask();
    s.efer = 0xd01;
    s.cr3 = PML4;
    s.segments = [flat(selector::DATA, 0xc093); 6];
    s.segments[seg::CS] = flat(selector::CODE64, 0xa09b);
    s.tr = Segment { selector: selector::TSS, base: tss_of(index), limit: 0x67, attributes: 0x8b };
    s.ldtr = Segment { selector: 0, base: 0, limit: 0, attributes: Segment::UNUSABLE };
    s.gdtr = DescriptorTable { base: GDT, limit: 0x5f };
    s.idtr = DescriptorTable { base: idt_of(index), limit: 0xfff };
    s.rip = rip;
    s.gpr[gpr::RSP] = stack_of(index);
    s
}

/// Real mode with all segments at zero, interrupts off, at `rip`.
pub fn real_state<P: Partition>(machine: &Machine<P>, index: u32, rip: u64) -> CpuState {
    let mut s = ready(machine, index);
    s.segments = [Segment::real_mode(0, 0x93); 6];
    s.segments[seg::CS] = Segment::real_mode(0, 0x9b);
    s.rip = rip;
    s.gpr[gpr::RSP] = REAL_CODE;
    s
}

/// What to do at a vector.
enum Handler {
    /// Count, list, end of interrupt, return.
    Interrupt(u8),
    /// Note the fault, continue where [`resume_of`] says.
    Fault(u8),
    /// The program's own code.
    Own(u8, CodeLabel),
}

/// A program under construction: an assembler with handlers.
pub struct Payload {
    assembler: CodeAssembler,
    /// The vCPU it is for.
    pub index: u32,
    /// Where it will be.
    at: u64,
    bits: u32,
    handlers: Vec<Handler>,
    labels: Vec<CodeLabel>,
    x2apic: bool,
}

impl Deref for Payload {
    type Target = CodeAssembler;
    fn deref(&self) -> &CodeAssembler {
        &self.assembler
    }
}

impl DerefMut for Payload {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.assembler
    }
}

impl Payload {
    fn build(index: u32, bits: u32, at: u64, program: impl FnOnce(&mut Self) -> Built) -> Self {
        let assembler = CodeAssembler::new(bits).expect("a valid bitness");
        let (handlers, labels) = (Vec::new(), Vec::new());
        let mut payload = Self { assembler, index, at, bits, handlers, labels, x2apic: false };
        payload.labels = program(&mut payload).expect("a program that assembles");
        payload
    }

    /// A 64-bit program for vCPU `index`.
    pub fn long(index: u32, program: impl FnOnce(&mut Self) -> Built) -> Self {
        Self::build(index, 64, CODE + u64::from(index) * 0x1_0000, program)
    }

    /// A 16-bit program for vCPU `index`.
    pub fn real(index: u32, program: impl FnOnce(&mut Self) -> Built) -> Self {
        Self::build(index, 16, REAL_CODE + u64::from(index) * 0x800, program)
    }

    /// Gives `vectors` the handler that counts, lists the vector, signals the end of the interrupt and returns.
    pub fn interrupts(&mut self, vectors: &[u8]) {
        self.handlers.extend(vectors.iter().map(|&v| Handler::Interrupt(v)));
    }

    /// Gives `vectors` the handler that notes the fault and continues where [`Payload::resume_at`] said.
    pub fn faults(&mut self, vectors: &[u8]) {
        self.handlers.extend(vectors.iter().map(|&v| Handler::Fault(v)));
    }

    /// Gives `vector` a handler of the program's own, whose label is already placed.
    pub fn own_handler(&mut self, vector: u8, label: CodeLabel) {
        self.handlers.push(Handler::Own(vector, label));
    }

    /// Makes handlers signal the end of interrupts through the x2APIC register.
    pub fn use_x2apic(&mut self) {
        self.x2apic = true;
    }

    /// Ends the program.
    pub fn exit(&mut self) -> Result<(), IcedError> {
        let mut end = self.create_label();
        self.out(i32::from(EXIT_PORT), al)?;
        self.cli()?;
        self.set_label(&mut end)?;
        self.hlt()?;
        self.jmp(end)
    }

    /// Writes `value` to hook port `port`; changes AL.
    pub fn hook(&mut self, port: u8, value: u8) -> Result<(), IcedError> {
        self.mov(al, u32::from(value))?;
        self.out(i32::from(port), al)
    }

    /// Loads RAX from the 64-bit value at `address`.
    pub fn load(&mut self, address: u64) -> Result<(), IcedError> {
        self.mov(rax, qword_ptr(address))
    }

    /// Waits until the 64-bit value at `address` is at least `value`; changes RAX.
    pub fn await_value(&mut self, address: u64, value: u32) -> Result<(), IcedError> {
        let mut again = self.create_label();
        self.set_label(&mut again)?;
        self.pause()?;
        self.mov(rax, qword_ptr(address))?;
        self.cmp(rax, value as i32)?;
        self.jb(again)
    }

    /// Waits until `vector` was handled `times` times; changes RAX.
    pub fn await_interrupt(&mut self, vector: u8, times: u32) -> Result<(), IcedError> {
        self.await_value(count_of(self.index, vector), times)
    }

    /// Waits until `vector` is pending in the local APIC; changes RAX.
    pub fn await_pending(&mut self, vector: u8) -> Result<(), IcedError> {
        let mut again = self.create_label();
        let register = 0x200 + u64::from(vector / 32) * 0x10;
        self.set_label(&mut again)?;
        self.pause()?;
        self.apic_read(register)?;
        self.bt(eax, u32::from(vector % 32))?;
        self.jae(again)
    }

    /// Reads a local APIC register into EAX.
    pub fn apic_read(&mut self, offset: u64) -> Result<(), IcedError> {
        self.mov(eax, (APIC + offset) as u32)?;
        self.mov(eax, dword_ptr(rax))
    }

    /// Writes a local APIC register; changes RAX.
    pub fn apic_write(&mut self, offset: u64, value: u32) -> Result<(), IcedError> {
        self.mov(eax, (APIC + offset) as u32)?;
        self.mov(dword_ptr(rax), value)
    }

    /// Reads the time-stamp counter into RAX; changes RDX.
    pub fn time(&mut self) -> Result<(), IcedError> {
        self.lfence()?;
        self.rdtsc()?;
        self.shl(rdx, 32)?;
        self.or(rax, rdx)
    }

    /// After the next fault the program continues at `label`; changes RAX.
    pub fn resume_at(&mut self, label: CodeLabel) -> Result<(), IcedError> {
        let at = resume_of(self.index);
        self.lea(rax, ptr(label))?;
        self.mov(qword_ptr(at), rax)
    }

    /// Writes MSR `index`; changes RAX, RCX, RDX.
    pub fn msr_write(&mut self, index: u32, value: u64) -> Result<(), IcedError> {
        self.mov(ecx, index)?;
        self.mov(eax, value as u32)?;
        self.mov(edx, (value >> 32) as u32)?;
        self.wrmsr()
    }

    /// Reads MSR `index` into RAX; changes RCX, RDX.
    pub fn msr_read(&mut self, index: u32) -> Result<(), IcedError> {
        self.mov(ecx, index)?;
        self.rdmsr()?;
        self.shl(rdx, 32)?;
        self.or(rax, rdx)
    }

    fn interrupt_handler(&mut self, vector: u8) -> Result<(), IcedError> {
        let index = self.index;
        self.push(rax)?;
        self.push(rcx)?;
        self.push(rdx)?;
        self.mov(rax, qword_ptr(rsp + 24))?;
        self.mov(qword_ptr(return_of(index, vector)), rax)?;
        self.mov(rax, qword_ptr(order_of(index)))?;
        self.and(eax, 0x3ff)?;
        self.mov(byte_ptr(rax + (order_of(index) + 8)), u32::from(vector))?;
        self.inc(qword_ptr(order_of(index)))?;
        self.inc(qword_ptr(count_of(index, vector)))?;
        if self.x2apic {
            self.msr_write(0x80b, 0)?;
        } else {
            self.apic_write(0xb0, 0)?;
        }
        self.pop(rdx)?;
        self.pop(rcx)?;
        self.pop(rax)?;
        self.iretq()
    }

    fn fault_handler(&mut self, vector: u8) -> Result<(), IcedError> {
        let (index, fault) = (self.index, fault_of(self.index));
        let has_code = matches!(vector, 8 | 10..=14 | 17 | 21);
        self.push(rax)?;
        self.mov(qword_ptr(fault), i32::from(vector))?;
        if has_code {
            self.mov(rax, qword_ptr(rsp + 8))?;
            self.mov(qword_ptr(fault + 8), rax)?;
            self.pop(rax)?;
            self.mov(qword_ptr(rsp), rax)?;
        } else {
            self.mov(qword_ptr(fault + 8), -1)?;
        }
        self.mov(rax, qword_ptr(rsp + 8))?;
        self.mov(qword_ptr(fault + 16), rax)?;
        self.mov(rax, cr2)?;
        self.mov(qword_ptr(fault + 24), rax)?;
        self.inc(qword_ptr(count_of(index, vector)))?;
        self.mov(rax, qword_ptr(resume_of(index)))?;
        self.mov(qword_ptr(rsp + 8), rax)?;
        self.pop(rax)?;
        self.iretq()
    }

    /// Emits the handlers. Returns each vector with the label of its handler.
    fn emit_handlers(&mut self) -> Result<Vec<(u8, CodeLabel)>, IcedError> {
        let mut gates = Vec::new();
        for handler in std::mem::take(&mut self.handlers) {
            let mut label = self.create_label();
            let vector = match handler {
                Handler::Own(vector, label) => {
                    gates.push((vector, label));
                    continue;
                }
                Handler::Interrupt(vector) => {
                    self.set_label(&mut label)?;
                    self.interrupt_handler(vector)?;
                    vector
                }
                Handler::Fault(vector) => {
                    self.set_label(&mut label)?;
                    self.fault_handler(vector)?;
                    vector
                }
            };
            gates.push((vector, label));
        }
        Ok(gates)
    }

    /// Puts the program and its interrupt table into RAM. Returns its start state and the labels' addresses.
    pub fn install<P: Partition>(mut self, machine: &Machine<P>) -> (CpuState, Vec<u64>) {
        let gates = self.emit_handlers().expect("handlers that assemble");
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let built = self.assembler.assemble_options(self.at, options).expect("a program that assembles");
        machine.write(self.at, &built.inner.code_buffer);
        let address = |label: &CodeLabel| built.label_ip(label).expect("a label that was placed");
        for (vector, label) in &gates {
            set_gate(&machine.ram, self.index, *vector, address(label));
        }
        let labels = self.labels.iter().map(address).collect();
        let state = if self.bits == 64 {
            long_state(machine, self.index, self.at)
        } else {
            real_state(machine, self.index, self.at)
        };
        (state, labels)
    }
}

/// Points the 64-bit interrupt gate of `vector` at `handler`. Gates can be called from ring 3.
pub fn set_gate(ram: &RamBlock, index: u32, vector: u8, handler: u64) {
    let low =
        handler & 0xffff | u64::from(selector::CODE64) << 16 | 0xee00 << 32 | (handler >> 16 & 0xffff) << 48;
    put(ram, idt_of(index) + u64::from(vector) * 16, &[low, handler >> 32]);
}

/// Assembles `program` for address `at`.
pub fn assemble(
    bits: u32,
    at: u64,
    program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).expect("a valid bitness");
    program(&mut assembler).expect("a program that assembles");
    assembler.assemble(at).expect("a program that assembles")
}
