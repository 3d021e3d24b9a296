//! The architectural state of a vCPU, to and from KVM.
//!
//! ```text
//!            set, reset                      before_run
//!  CpuState ────────────► KVM + Held (Standing) ───────► KVM alone (Running)
//!           ◄────────────                       ◄───────
//!               get                             after_run
//! ```
//!
//! Most of the state is KVM's at all times. [`Held`] has what KVM has no place for, or what would go on by itself
//! while the vCPU stands: a start-up vector, the running timer, TSC and deadline.
//!
//! # Order of the requests, and why
//!
//! Reading:
//!
//! 1. KVM_GET_MP_STATE first: it carries out INIT and start-up IPIs that wait, which changes registers.
//! 2. KVM_GET_VCPU_EVENTS before CR2 and DR6 are taken over: the payload of a pending exception belongs there.
//! 3. The rest in any order. The TSC is calculated, never read: see [`crate::tsc`].
//!
//! Writing:
//!
//! 1. KVM_GET_MP_STATE: as above, so that an INIT that waits does not hit the new state.
//! 2. KVM_SET_SREGS: IA32_APIC_BASE decides how the APIC page is understood, EFER and CR4 decide what other
//!    registers may hold; all control registers at once, because KVM checks them together.
//! 3. KVM_SET_REGS, after SREGS (RFLAGS.VM goes with segments), before events (it drops a pending exception).
//! 4. KVM_SET_XCRS, then KVM_SET_XSAVE: the area's components must be enabled.
//! 5. KVM_SET_DEBUGREGS.
//! 6. KVM_SET_MSRS. TSC and its deadline are not among them.
//! 7. KVM_SET_LAPIC, after APIC_BASE; it has TPR and the timer's counts.
//! 8. KVM_SET_MP_STATE: SREGS makes a boot processor at the reset vector runnable.
//! 9. KVM_SET_VCPU_EVENTS last: everything above may drop or request events.
//! 10. Before the run: the TSC's offset, then IA32_TSC_DEADLINE, which is compared with the TSC at once.
//!
//! # The timer while the vCPU stands
//!
//! A deadline is taken out of KVM when the vCPU stops and put back, after the TSC was set right, when it runs again.
//! A count cannot be taken out without losing interrupts that arrive meanwhile; it runs on in KVM by the host's
//! time, so its interrupt may come early by the time that the vCPU stood.

mod convert;
mod events;
pub(crate) mod ioctls;
mod lapic;
mod quirk;
#[cfg(test)]
pub(crate) mod tests;
mod xsave;

use std::io;

use atoll_machine::backend::{BackendError, StateError};
use atoll_machine::cpu::msr::{MsrEntry, MsrKind, index as msr};
use atoll_machine::cpu::state::{Activity, CpuState, PendingEvent, Segment};
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;

use crate::cpuid;
use crate::msrs::{self, Bank};
use crate::partition::Shared;
use crate::tsc::VcpuTime;
use events::Abilities;
use lapic::{Mode, PAGE};

/// A deadline that is nearer than this when the vCPU stops is left to KVM, whose timer may be firing, ns.
const IMMINENT_NANOS: u64 = 20_000;
/// `triple_fault` of the events says that one is on its way.
const TRIPLE_FAULT: u32 = KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

/// What of one vCPU's state KVM does not keep.
pub(crate) struct VcpuState {
    apic_id: u32,
    bank: Bank,
    time: VcpuTime,
    /// Size of the area of KVM_GET_XSAVE2; 0: KVM_GET_XSAVE does.
    xsave_size: usize,
    /// How XCR0 is reached.
    xcr0: Xcr0,
    abilities: Abilities,
    held: Held,
}

/// What a host has for XCR0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Xcr0 {
    /// KVM_GET_XCRS.
    Kernel,
    /// As `Kernel`, with the quirk of [`quirk`].
    Quirk,
    /// No XSAVE.
    Absent,
}

/// What the last state said, as far as KVM does not say it too.
struct Held {
    /// ES to GS, LDTR, TR (see [`convert::recall_all`]).
    segments: [Segment; 8],
    /// XCR0 as set: KVM's where there is one.
    xcr0: u64,
    /// The wall-clock register as set, and KVM's at that time: it would write guest memory if it were given to KVM.
    wall_clock: (u64, u64),
    /// INITIAL_COUNT that KVM must not have (see [`lapic`]).
    idle_count: Option<u32>,
    /// While the vCPU stands.
    standing: Option<Standing>,
    /// It ran since the last state was set.
    ran: bool,
}

/// What goes on while a vCPU runs.
#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    expires: Option<u64>,
    deadline: u64,
    /// Only after a state was set: what it said of these, KVM having another form or none.
    event: Option<PendingEvent>,
    shadow: bool,
    nmi_blocked: bool,
    sipi: Option<u8>,
    /// Page-directory pointers are to be read again: memory may have come after the state.
    pdptes: bool,
}

/// Says which request failed.
fn at<T, E: Into<io::Error>>(what: &'static str, result: Result<T, E>) -> io::Result<T> {
    result.map_err(|error| {
        let error: io::Error = error.into();
        io::Error::new(error.kind(), format!("{what}: {error}"))
    })
}

impl VcpuState {
    /// Gives a new vCPU the model's CPUID, and the power-on state.
    pub(crate) fn new(fd: &VcpuFd, shared: &Shared, index: u32) -> Result<Self, BackendError> {
        Self::prepare(fd, shared, index)
            .map_err(|source| BackendError::Host { what: "preparing a vCPU", source })
    }

    fn prepare(fd: &VcpuFd, shared: &Shared, index: u32) -> io::Result<Self> {
        let (model, capabilities) = (&shared.model, shared.capabilities());
        let apic_id = shared.topology.apic_id(index);
        let entries = cpuid::entries(model, &shared.topology, apic_id);
        let entries = CpuId::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        at("KVM_SET_CPUID2", fd.set_cpuid2(&entries))?;
        let mut time = VcpuTime::default();
        at("KVM_VCPU_TSC_OFFSET", shared.time.prepare(&shared.vm, fd, &mut time))?;
        let bank = Bank::probe(model, fd);
        if let Some(promise) = model.msr(msr::ARCH_CAPABILITIES) {
            // For the kernel's own choice of work-arounds; the guest reads the bank's. Not every host has it.
            let _ = msrs::write_list(fd, &[(msr::ARCH_CAPABILITIES, promise.reset)]);
        }
        let xcr0 = match capabilities.xcrs {
            true if quirk::present() => Xcr0::Quirk,
            true => Xcr0::Kernel,
            false => Xcr0::Absent,
        };
        let xsave_size = capabilities.xsave2_size;
        let abilities = Abilities {
            payload: capabilities.exception_payload,
            triple_fault: capabilities.triple_fault_event,
        };
        let state = power_on(shared, index);
        let mut new = Self {
            apic_id,
            bank,
            time,
            xsave_size: if xsave_size > ioctls::XSAVE_SIZE { xsave_size } else { 0 },
            xcr0,
            abilities,
            held: Held {
                segments: convert::all_segments(&state),
                xcr0: 1,
                wall_clock: (0, 0),
                idle_count: None,
                standing: Some(Standing::default()),
                ran: false,
            },
        };
        new.apply(fd, shared, &state)?;
        Ok(new)
    }

    /// A copy of the whole state. The vCPU stands and no access waits for its completion.
    pub(crate) fn get(&mut self, fd: &VcpuFd, shared: &Shared) -> io::Result<CpuState> {
        let mp_state = at("KVM_GET_MP_STATE", fd.get_mp_state())?.mp_state;
        let events = at("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?;
        let mut s = CpuState::power_on(self.apic_id, false, 0);
        convert::take_regs(&mut s, &at("KVM_GET_REGS", fd.get_regs())?);
        convert::take_sregs(&mut s, &at("KVM_GET_SREGS", fd.get_sregs())?);
        convert::take_debug(&mut s, &at("KVM_GET_DEBUGREGS", fd.get_debug_regs())?);
        let (now, set) = (convert::all_segments(&s), self.held.segments);
        convert::put_segments(&mut s, convert::recall_all(&now, &set));
        self.get_vectors(fd, shared, &mut s)?;
        events::take_events(&mut s, &events);
        s.activity = activity(mp_state, events.flags & TRIPLE_FAULT != 0 && events.triple_fault.pending != 0);
        self.get_msrs(fd, shared, &mut s)?;
        s.tsc = shared.time.tsc().wrapping_add(self.time.adjust);
        self.get_lapic(fd, shared, &mut s)?;
        if let Some(standing) = self.held.standing {
            s.pending_event = standing.event.or(s.pending_event);
            s.interrupt_shadow |= standing.shadow;
            s.nmi_blocked |= standing.nmi_blocked;
            s.sipi_vector = standing.sipi.filter(|_| s.activity == Activity::WaitForSipi);
        }
        Ok(s)
    }

    fn get_vectors(&self, fd: &VcpuFd, shared: &Shared, s: &mut CpuState) -> io::Result<()> {
        let mask = shared.model.xcr0_mask();
        s.xcr0 = match self.xcr0 {
            Xcr0::Kernel => xcr0(&at("KVM_GET_XCRS", fd.get_xcrs())?),
            Xcr0::Quirk => quirk::seen(self.held.xcr0, mask, s.cr4, self.held.ran),
            Xcr0::Absent => self.held.xcr0,
        } & mask;
        let area = at("KVM_GET_XSAVE", ioctls::xsave(fd, self.xsave_size))?;
        s.xsave = xsave::from_kvm(&area, s.xcr0, mask);
        Ok(())
    }

    fn get_msrs(&self, fd: &VcpuFd, shared: &Shared, s: &mut CpuState) -> io::Result<()> {
        s.msrs = self.bank.saved().map(|(index, value)| (index, value.unwrap_or(0))).collect();
        let kernels: Vec<u32> = self.bank.saved().filter(|(_, v)| v.is_none()).map(|(i, _)| i).collect();
        let values = at("KVM_GET_MSRS", msrs::read_list(fd, &kernels))?;
        let mut read = kernels.iter().zip(values).peekable();
        for (index, value) in &mut s.msrs {
            let Some((_, kernels)) = read.next_if(|(i, _)| **i == *index) else { continue };
            *value = match *index {
                msr::KVM_WALL_CLOCK if kernels == self.held.wall_clock.1 => self.held.wall_clock.0,
                // A kernel that does not account for its threads has no value; the bank has it.
                msr::KVM_STEAL_TIME if kernels == 0 => self.bank.wanted(*index).unwrap_or(0),
                // It keeps all 64 bits, and so do processors of AMD with SYSENTER's addresses.
                msr::SFMASK => kernels & 0xffff_ffff,
                _ => shared.model.msr(*index).map_or(kernels, |entry| kept(entry, kernels)),
            };
        }
        Ok(())
    }

    fn get_lapic(&self, fd: &VcpuFd, shared: &Shared, s: &mut CpuState) -> io::Result<()> {
        let page = page(fd)?;
        let now = shared.clock.now();
        let standing = self.held.standing.unwrap_or_default();
        s.lapic.timer_expires_at = standing.expires;
        s.lapic.tsc_deadline = standing.deadline;
        s.lapic.registers = lapic::registers(&page, self.held.idle_count, standing.expires, now);
        Ok(())
    }

    /// Replaces the whole state. What cannot be is refused, and nothing is changed then.
    pub(crate) fn set(&mut self, fd: &VcpuFd, shared: &Shared, state: &CpuState) -> Result<(), StateError> {
        state.check(&shared.model)?;
        check(state)?;
        let refused = |error: io::Error| StateError::Invalid { field: "state", why: error.to_string() };
        let before = self.get(fd, shared).map_err(refused)?;
        self.apply(fd, shared, state).map_err(|error| {
            // What the host refuses beyond the model's rules. What was there can be set again.
            let _ = self.apply(fd, shared, &before);
            refused(error)
        })
    }

    /// Back to the power-on state. Time goes on: the TSC keeps counting, TSC_ADJUST is zero.
    pub(crate) fn reset(&mut self, fd: &VcpuFd, shared: &Shared) -> io::Result<()> {
        let index = (0..shared.topology.cpus()).find(|i| shared.topology.apic_id(*i) == self.apic_id);
        let state = CpuState { tsc: shared.time.tsc(), ..power_on(shared, index.unwrap_or(0)) };
        self.apply(fd, shared, &state)
    }

    /// Writes a state that was checked. For the order see the module's documentation.
    fn apply(&mut self, fd: &VcpuFd, shared: &Shared, s: &CpuState) -> io::Result<()> {
        at("KVM_GET_MP_STATE", fd.get_mp_state())?;
        at("KVM_SET_SREGS", fd.set_sregs(&convert::sregs(s)))?;
        at("KVM_SET_REGS", fd.set_regs(&convert::regs(s)))?;
        self.set_vectors(fd, shared, s)?;
        at("KVM_SET_DEBUGREGS", fd.set_debug_regs(&convert::debug(s)))?;
        self.set_msrs(fd, s)?;
        let adjust = s.msrs.iter().find(|(i, _)| *i == msr::TSC_ADJUST).map_or(0, |(_, v)| *v);
        shared.time.restore(&mut self.time, s.tsc, adjust);
        let for_kvm = lapic::to_kvm(&s.lapic, s.cr8, self.apic_id, shared.clock.now());
        at("KVM_SET_LAPIC", set_page(fd, &for_kvm.page))?;
        let mp_state = match s.activity {
            Activity::Active | Activity::Shutdown => KVM_MP_STATE_RUNNABLE,
            Activity::Halted => KVM_MP_STATE_HALTED,
            Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        };
        at("KVM_SET_MP_STATE", fd.set_mp_state(kvm_mp_state { mp_state }))?;
        at("KVM_SET_VCPU_EVENTS", fd.set_vcpu_events(&events::events(s, self.abilities)))?;
        self.held.segments = convert::all_segments(s);
        self.held.xcr0 = s.xcr0;
        self.held.idle_count = for_kvm.idle_count;
        self.held.ran = false;
        self.held.standing = Some(Standing {
            expires: s.lapic.timer_expires_at,
            deadline: s.lapic.tsc_deadline,
            event: s.pending_event,
            shadow: s.interrupt_shadow,
            nmi_blocked: s.nmi_blocked,
            sipi: s.sipi_vector,
            pdptes: convert::has_pdptes(s),
        });
        Ok(())
    }

    fn set_vectors(&self, fd: &VcpuFd, shared: &Shared, s: &CpuState) -> io::Result<()> {
        let mask = shared.model.xcr0_mask();
        let value = if self.xcr0 == Xcr0::Quirk { mask } else { s.xcr0 };
        if self.xcr0 != Xcr0::Absent {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
            xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value };
            at("KVM_SET_XCRS", fd.set_xcrs(&xcrs))?;
        }
        at("KVM_SET_XSAVE", ioctls::set_xsave(fd, self.xsave_size, &xsave::to_kvm(&s.xsave, mask)))
    }

    fn set_msrs(&mut self, fd: &VcpuFd, s: &CpuState) -> io::Result<()> {
        let mut list = self.bank.restore(&s.msrs);
        let wall_clock = self.bank.wanted(msr::KVM_WALL_CLOCK).unwrap_or(0);
        let kernels = msrs::read(fd, [msr::KVM_WALL_CLOCK]).map_or(0, |[v]| v);
        self.held.wall_clock = (wall_clock, kernels);
        list.retain(|(index, _)| *index != msr::KVM_WALL_CLOCK);
        // A kernel without accounting refuses it; the bank has the value.
        let steal =
            list.iter().position(|(index, _)| *index == msr::KVM_STEAL_TIME).map(|at| list.remove(at));
        if let Some(register) = steal {
            let _ = msrs::write_list(fd, &[register]);
        }
        at("KVM_SET_MSRS", msrs::write_list(fd, &list))?;
        // Nothing is armed while the vCPU stands.
        let _ = msrs::write_list(fd, &[(msr::TSC_DEADLINE, 0)]);
        Ok(())
    }

    /// RDMSR that KVM left to user space; `None` is #GP(0).
    pub(crate) fn read_msr(&mut self, index: u32) -> Option<u64> {
        self.bank.read(index)
    }

    /// WRMSR that KVM left to user space; false is #GP(0).
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> bool {
        self.bank.write(index, value)
    }

    /// To be called before the vCPU runs: gives KVM what it does not keep while the vCPU stands.
    pub(crate) fn before_run(&mut self, fd: &VcpuFd, shared: &Shared) -> io::Result<()> {
        at("KVM_VCPU_TSC_OFFSET", shared.time.enter(&shared.vm, fd, &mut self.time))?;
        let Some(standing) = self.held.standing.take() else { return Ok(()) };
        self.held.ran = true;
        if standing.pdptes {
            let sregs = at("KVM_GET_SREGS", fd.get_sregs())?;
            at("KVM_SET_SREGS", fd.set_sregs(&kvm_sregs { interrupt_bitmap: [0; 4], ..sregs }))?;
        }
        if let Some(vector) = standing.sipi {
            start_up(fd, vector)?;
        }
        if standing.deadline != 0 {
            at("IA32_TSC_DEADLINE", msrs::write_list(fd, &[(msr::TSC_DEADLINE, standing.deadline)]))?;
        }
        Ok(())
    }

    /// To be called after the vCPU ran: learns what the guest wrote to its TSC, and takes over the timer.
    pub(crate) fn after_run(&mut self, fd: &VcpuFd, shared: &Shared) -> io::Result<()> {
        let deadlines = shared.model.msr(msr::TSC_DEADLINE).is_some();
        let (deadline, adjust, tsc) = if deadlines {
            let [d, a, t] = msrs::read(fd, [msr::TSC_DEADLINE, msr::TSC_ADJUST, msr::TSC])?;
            (d, a, t)
        } else {
            let [a, t] = msrs::read(fd, [msr::TSC_ADJUST, msr::TSC])?;
            (0, a, t)
        };
        shared.time.leave(&shared.vm, &mut self.time, tsc, adjust);
        let mut standing = Standing::default();
        let page = page(fd)?;
        if lapic::mode(&page) == Mode::Deadline {
            let imminent = atoll_machine::time::nanos_to_tsc(IMMINENT_NANOS, shared.clock.tsc_khz());
            standing.deadline = deadline;
            if deadline > tsc.wrapping_add(imminent) {
                let _ = msrs::write_list(fd, &[(msr::TSC_DEADLINE, 0)]);
            }
        } else {
            standing.expires = lapic::expiry(&page, shared.clock.now());
        }
        self.held.standing = Some(standing);
        Ok(())
    }
}

/// The state of a vCPU after RESET.
fn power_on(shared: &Shared, index: u32) -> CpuState {
    let apic_id = shared.topology.apic_id(index);
    CpuState { tsc: shared.time.tsc(), ..CpuState::power_on(apic_id, index == 0, shared.model.signature()) }
}

fn activity(mp_state: u32, triple_fault: bool) -> Activity {
    match mp_state {
        _ if triple_fault => Activity::Shutdown,
        KVM_MP_STATE_HALTED => Activity::Halted,
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
            Activity::WaitForSipi
        }
        _ => Activity::Active,
    }
}

/// Lets a vCPU that waits start at `vector`.
fn start_up(fd: &VcpuFd, vector: u8) -> io::Result<()> {
    let mut events = at("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?;
    events.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    events.sipi_vector = vector.into();
    at("KVM_SET_VCPU_EVENTS", fd.set_vcpu_events(&events))?;
    at("KVM_SET_MP_STATE", fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_SIPI_RECEIVED }))
}

/// What of a value that the processor let the guest write the model's register keeps.
fn kept(entry: &MsrEntry, value: u64) -> u64 {
    match entry.kind {
        MsrKind::Masked { writable } => value & writable | entry.reset & !writable,
        _ => value,
    }
}

fn xcr0(xcrs: &kvm_xcrs) -> u64 {
    let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
    xcrs.xcrs[..count].iter().find(|x| x.xcr == 0).map_or(1, |x| x.value)
}

fn page(fd: &VcpuFd) -> io::Result<[u8; PAGE]> {
    Ok(at("KVM_GET_LAPIC", fd.get_lapic())?.regs.map(|byte| byte as u8))
}

fn set_page(fd: &VcpuFd, page: &[u8; PAGE]) -> io::Result<()> {
    Ok(fd.set_lapic(&kvm_lapic_state { regs: page.map(|byte| byte as libc::c_char) })?)
}

/// What KVM would refuse, or take and not be able to run, beyond the model's own rules.
fn check(s: &CpuState) -> Result<(), StateError> {
    let invalid = |field, why: &str| Err(StateError::Invalid { field, why: why.to_owned() });
    let base = s.lapic.apic_base;
    if base & 0xc00 == 0x400 || base & 0x2ff != 0 || base >> 40 != 0 {
        return invalid("lapic", "no processor can hold this IA32_APIC_BASE");
    }
    let long = s.efer >> 10 & 1 != 0;
    let cs = s.segments[atoll_machine::cpu::state::seg::CS].attributes;
    if long && cs & Segment::LONG != 0 && cs & Segment::DEFAULT_BIG != 0 {
        return invalid("segments", "CS has both L and D set");
    }
    if long && s.rflags >> 17 & 1 != 0 {
        return invalid("rflags", "virtual 8086 mode does not exist in long mode");
    }
    Ok(())
}
