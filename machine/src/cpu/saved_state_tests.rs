//! Tests of [`super`].

use proptest::prelude::*;
use prost::Message;

use super::*;

fn any_segment() -> impl Strategy<Value = Segment> {
    (any::<u16>(), any::<u64>(), any::<u32>(), 0u32..0x20000)
        .prop_map(|(selector, base, limit, attributes)| Segment { selector, base, limit, attributes })
}

fn any_table() -> impl Strategy<Value = DescriptorTable> {
    (any::<u64>(), any::<u16>()).prop_map(|(base, limit)| DescriptorTable { base, limit })
}

fn any_event() -> impl Strategy<Value = PendingEvent> {
    let kind = prop_oneof![
        Just(EventKind::ExternalInterrupt),
        Just(EventKind::Nmi),
        Just(EventKind::Exception),
        Just(EventKind::SoftwareInterrupt)
    ];
    (any::<u8>(), kind, any::<Option<u32>>()).prop_map(|(vector, kind, error_code)| PendingEvent {
        vector,
        kind,
        error_code,
    })
}

fn any_lapic() -> impl Strategy<Value = LapicState> {
    (any::<u64>(), prop::collection::vec(any::<u8>(), 1024), any::<Option<u64>>(), any::<u64>()).prop_map(
        |(apic_base, registers, timer_expires_at, tsc_deadline)| LapicState {
            apic_base,
            registers: registers.try_into().unwrap(),
            timer_expires_at,
            tsc_deadline,
        },
    )
}

prop_compose! {
    fn any_state()(
        gpr in any::<[u64; GPR_COUNT]>(),
        plain in any::<[u64; 14]>(),
        segments in prop::array::uniform6(any_segment()),
        (ldtr, tr) in (any_segment(), any_segment()),
        (gdtr, idtr) in (any_table(), any_table()),
        dr in any::<[u64; 4]>(),
        xsave in prop::collection::vec(any::<u8>(), 576..900),
        msrs in prop::collection::btree_map(any::<u32>(), any::<u64>(), 0..50),
        lapic in any_lapic(),
        activity in prop_oneof![
            Just(Activity::Active),
            Just(Activity::Halted),
            Just(Activity::Shutdown),
            Just(Activity::WaitForSipi)
        ],
        flags in any::<[bool; 3]>(),
        sipi_vector in any::<Option<u8>>(),
        pending_event in prop::option::of(any_event()),
    ) -> CpuState {
        let [rip, rflags, cr0, cr2, cr3, cr4, cr8, dr6, dr7, efer, xcr0, tsc, ..] = plain;
        let [interrupt_shadow, nmi_blocked, nmi_pending] = flags;
        CpuState {
            gpr, rip, rflags, segments, ldtr, tr, gdtr, idtr, cr0, cr2, cr3, cr4, cr8, dr, dr6, dr7, efer, xcr0,
            xsave, msrs: msrs.into_iter().collect(), tsc, lapic, activity, interrupt_shadow, nmi_blocked,
            nmi_pending, sipi_vector, pending_event,
        }
    }
}

proptest! {
    #[test]
    fn any_state_comes_back_as_it_was(state in any_state()) {
        let bytes = CpuStateV1::from(&state).encode_to_vec();
        let saved = CpuStateV1::decode(&*bytes).unwrap();
        prop_assert_eq!(CpuState::try_from(&saved).unwrap(), state);
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(saved) = CpuStateV1::decode(&*bytes) {
            let _ = CpuState::try_from(&saved);
        }
    }
}

#[test]
fn missing_fields_have_their_documented_defaults() {
    let state = CpuState::try_from(&CpuStateV1::default()).unwrap();
    let reset = CpuState::power_on(0, true, 0);
    assert_eq!((state.rflags, state.cr0, state.dr6, state.dr7), (2, 0x6000_0010, 0xffff_0ff0, 0x400));
    assert_eq!((state.xcr0, state.xsave), (1, reset.xsave));
    assert!(state.segments.iter().all(Segment::unusable) && state.tr.unusable());
    assert_eq!((state.lapic, state.activity), (LapicState::default(), Activity::Active));
    assert_eq!((state.sipi_vector, state.pending_event), (None, None));
}

#[test]
fn impossible_values_are_refused_by_the_fields_name() {
    let field = |change: fn(&mut CpuStateV1)| {
        let mut saved = CpuStateV1::from(&CpuState::power_on(0, true, 0));
        change(&mut saved);
        match CpuState::try_from(&saved) {
            Err(StateError::Invalid { field, .. }) => field,
            Ok(_) => "accepted",
        }
    };
    assert_eq!(field(|_| {}), "accepted");
    assert_eq!(field(|s| s.gpr.push(0)), "gpr");
    assert_eq!(field(|s| s.dr.push(0)), "dr");
    assert_eq!(field(|s| s.segments.push(SegmentV1::default())), "segments");
    assert_eq!(field(|s| s.segments[0].selector = Some(0x10000)), "segments");
    assert_eq!(field(|s| s.gdtr.as_mut().unwrap().limit = Some(0x10000)), "gdtr");
    assert_eq!(field(|s| s.xsave = Some(vec![0; 575])), "xsave");
    assert_eq!(field(|s| s.xsave = Some(vec![0; MAX_XSAVE + 1])), "xsave");
    assert_eq!(field(|s| s.msrs = vec![MsrV1::default(); 2]), "msrs");
    assert_eq!(field(|s| s.msrs = vec![MsrV1::default(); MAX_MSRS + 1]), "msrs");
    assert_eq!(field(|s| s.lapic.as_mut().unwrap().registers = Some(vec![0; 1025])), "lapic");
    assert_eq!(field(|s| s.activity = Some(4)), "activity");
    assert_eq!(field(|s| s.sipi_vector = Some(256)), "sipi_vector");
    assert_eq!(
        field(|s| s.pending_event = Some(PendingEventV1 { kind: Some(4), ..Default::default() })),
        "pending_event"
    );
}
