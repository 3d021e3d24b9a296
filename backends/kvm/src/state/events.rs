//! Pending events, NMIs and the interrupt shadow: `CpuState` ⇄ `kvm_vcpu_events`. Pure.
//!
//! | CpuState | KVM | remark |
//! |---|---|---|
//! | exception | `exception.injected` | a `pending` one with its payload (CR2, DR6) not yet delivered counts too |
//! | external interrupt | `interrupt.injected` | |
//! | software interrupt | `interrupt.injected`, not `soft` | see below |
//! | NMI in delivery | `nmi.injected` | |
//! | `nmi_pending`, `nmi_blocked` | `nmi.pending`, `nmi.masked` | |
//! | `interrupt_shadow` | `interrupt.shadow` | by STI if IF is set, else by a load of SS, as Intel's entry checks want |
//!
//! A software interrupt whose delivery was cut short has RIP at its instruction in KVM, and behind it in `CpuState`.
//! So one that KVM reports is left out: the instruction executes again, as if it had not begun. One that a state
//! brings is delivered like an external interrupt: RIP is the return address, and privilege was checked.
//!
//! An NMI in delivery blocks others when it arrives. Intel's processors refuse to enter with both an NMI in delivery and
//! NMIs blocked, so only the former is handed over.
//!
//! KVM takes a shadow and an event together, but processors refuse to enter with both. An event that is in delivery
//! ends the shadow, so only the event is handed over.

use atoll_machine::cpu::state::{CpuState, EventKind, PendingEvent};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_vcpu_events,
};

const SHADOW_SS: u8 = 1;
const SHADOW_STI: u8 = 2;
const RFLAGS_IF: u64 = 1 << 9;
const PAGE_FAULT: u8 = 14;
const DEBUG: u8 = 1;
const NMI: u8 = 2;

/// What the host's `kvm_vcpu_events` has beyond the first version, as enabled for the VM.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Abilities {
    pub payload: bool,
    pub triple_fault: bool,
}

/// The events of a state.
pub(super) fn events(s: &CpuState, abilities: Abilities) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SIPI_VECTOR,
        sipi_vector: s.sipi_vector.unwrap_or(0).into(),
        ..kvm_vcpu_events::default()
    };
    // These flags also make the kernel forget what it had.
    if abilities.payload {
        e.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if abilities.triple_fault {
        e.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    }
    e.nmi.pending = s.nmi_pending.into();
    let nmi_arrives = s.pending_event.is_some_and(|event| event.kind == EventKind::Nmi);
    e.nmi.masked = (s.nmi_blocked && !nmi_arrives).into();
    match s.pending_event {
        Some(PendingEvent { kind: EventKind::Exception, vector, error_code }) => {
            e.exception.injected = 1;
            e.exception.nr = vector;
            e.exception.has_error_code = error_code.is_some().into();
            e.exception.error_code = error_code.unwrap_or(0);
        }
        Some(PendingEvent { kind: EventKind::Nmi, .. }) => e.nmi.injected = 1,
        Some(PendingEvent { vector, .. }) => (e.interrupt.injected, e.interrupt.nr) = (1, vector),
        None if s.interrupt_shadow && s.rflags & RFLAGS_IF != 0 => e.interrupt.shadow = SHADOW_STI,
        None if s.interrupt_shadow => e.interrupt.shadow = SHADOW_SS,
        None => {}
    }
    e
}

/// Takes events over into a state that has CR2, DR6 and the activity already.
pub(super) fn take_events(s: &mut CpuState, e: &kvm_vcpu_events) {
    s.interrupt_shadow = e.interrupt.shadow != 0;
    (s.nmi_pending, s.nmi_blocked) = (e.nmi.pending != 0, e.nmi.masked != 0);
    s.sipi_vector = None;
    s.pending_event = None;
    let x = &e.exception;
    if x.injected != 0 || x.pending != 0 {
        if x.pending != 0 && e.flags & KVM_VCPUEVENT_VALID_PAYLOAD != 0 && e.exception_has_payload != 0 {
            deliver_payload(s, x.nr, e.exception_payload);
        }
        let error_code = (x.has_error_code != 0).then_some(x.error_code);
        s.pending_event = Some(PendingEvent { vector: x.nr, kind: EventKind::Exception, error_code });
    } else if e.nmi.injected != 0 {
        s.pending_event = Some(PendingEvent { vector: NMI, kind: EventKind::Nmi, error_code: None });
    } else if e.interrupt.injected != 0 && e.interrupt.soft == 0 {
        let kind = EventKind::ExternalInterrupt;
        s.pending_event = Some(PendingEvent { vector: e.interrupt.nr, kind, error_code: None });
    }
}

/// What an exception puts into CR2 or DR6 when it is delivered.
fn deliver_payload(s: &mut CpuState, vector: u8, payload: u64) {
    match vector {
        PAGE_FAULT => s.cr2 = payload,
        // Bits 12 and above follow other rules; B0 to B3, BD, BS and BT are set where the payload has them.
        DEBUG => s.dr6 |= payload & 0xe00f,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOTH: Abilities = Abilities { payload: true, triple_fault: true };

    fn state() -> CpuState {
        CpuState::power_on(0, true, 0)
    }

    fn some_events() -> impl Strategy<Value = Option<PendingEvent>> {
        let event = |kind| move |(vector, error_code)| Some(PendingEvent { vector, kind, error_code });
        prop_oneof![
            Just(None),
            (32u8.., Just(None)).prop_map(event(EventKind::ExternalInterrupt)),
            (3u8..32, any::<Option<u16>>().prop_map(|c| c.map(u32::from)))
                .prop_map(event(EventKind::Exception)),
            (Just(2), Just(None)).prop_map(event(EventKind::Nmi)),
        ]
    }

    proptest! {
        #[test]
        fn events_come_back_as_they_were(event in some_events(), bits in any::<[bool; 4]>()) {
            let mut before = state();
            before.pending_event = event;
            [before.nmi_pending, before.nmi_blocked, before.interrupt_shadow, _] = bits;
            before.rflags |= u64::from(bits[3]) << 9;
            before.interrupt_shadow &= event.is_none();
            before.nmi_blocked &= event.is_none_or(|event| event.kind != EventKind::Nmi);
            let mut back = CpuState { rflags: before.rflags, ..state() };
            take_events(&mut back, &events(&before, BOTH));
            prop_assert_eq!(back, before);
        }
    }

    #[test]
    fn a_software_interrupt_is_delivered_once_and_restarted_if_kvm_has_it() {
        let event = PendingEvent { vector: 0x80, kind: EventKind::SoftwareInterrupt, error_code: None };
        let mut e = events(&CpuState { pending_event: Some(event), ..state() }, BOTH);
        assert_eq!((e.interrupt.injected, e.interrupt.nr, e.interrupt.soft), (1, 0x80, 0));
        e.interrupt.soft = 1;
        let mut back = state();
        take_events(&mut back, &e);
        assert_eq!(back.pending_event, None);
    }

    #[test]
    fn an_event_ends_the_shadow_and_if_decides_its_kind() {
        let shadow = CpuState { interrupt_shadow: true, ..state() };
        assert_eq!(events(&shadow, BOTH).interrupt.shadow, SHADOW_SS);
        let by_sti = CpuState { rflags: RFLAGS_IF | 2, ..shadow.clone() };
        assert_eq!(events(&by_sti, BOTH).interrupt.shadow, SHADOW_STI);
        let event = PendingEvent { vector: 32, kind: EventKind::ExternalInterrupt, error_code: None };
        let both = CpuState { pending_event: Some(event), ..by_sti };
        assert_eq!(events(&both, BOTH).interrupt.shadow, 0);
    }

    #[test]
    fn an_nmi_in_delivery_is_not_handed_over_with_nmis_blocked() {
        let event = PendingEvent { vector: 2, kind: EventKind::Nmi, error_code: None };
        let e = events(&CpuState { pending_event: Some(event), nmi_blocked: true, ..state() }, BOTH);
        assert_eq!((e.nmi.injected, e.nmi.masked), (1, 0));
    }

    #[test]
    fn payloads_reach_their_registers() {
        let mut e = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_PAYLOAD, ..kvm_vcpu_events::default() };
        (e.exception.pending, e.exception.nr) = (1, 14);
        (e.exception_has_payload, e.exception_payload) = (1, 0xdead_b000);
        let mut s = state();
        take_events(&mut s, &e);
        assert_eq!((s.cr2, s.pending_event.map(|p| p.vector)), (0xdead_b000, Some(14)));
        (e.exception.nr, e.exception_payload) = (1, 0x4001);
        take_events(&mut s, &e);
        assert_eq!(s.dr6, 0xffff_4ff1);
        e.exception.pending = 0;
        let mut untouched = state();
        take_events(&mut untouched, &e);
        assert_eq!(untouched, state());
    }

    #[test]
    fn flags_are_those_that_the_host_knows() {
        let none = events(&state(), Abilities::default());
        assert_eq!(none.flags & (KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT), 0);
        let all = KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        assert_eq!(events(&state(), BOTH).flags & all, all);
    }
}
