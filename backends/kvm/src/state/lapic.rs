//! The local APIC: `LapicState` ⇄ KVM's register page. Pure.
//!
//! KVM's page has the layout of `LapicState::registers`, x2APIC ids and the 64-bit ICR included (the VM has
//! KVM_CAP_X2APIC_API with 32-bit ids). Different are:
//!
//! * **Timer.** `LapicState` says when it expires, KVM's CURRENT_COUNT how much is left. A one-shot timer that
//!   is done looks in KVM like one that is about to fire, and KVM fires it when the page is set. So one that
//!   is done is set with INITIAL_COUNT zero, and the real count is remembered for reading.
//! * **Version.** KVM offers suppression of EOI broadcasts where the IOAPIC is not its own. The models do not.
//! * **Id.** Fixed by the topology; KVM's vCPU id is the APIC id.
//!
//! Between two words of the page KVM keeps working data. They are left out, but for the errors that no write to ESR
//! has revealed (0x284), which are kept there by the software CPU too.

use atoll_machine::cpu::state::LapicState;

const ID: usize = 0x20;
const VERSION: usize = 0x30;
const TPR: usize = 0x80;
const ISR: usize = 0x100;
const IRR: usize = 0x200;
const HIDDEN_ERRORS: usize = 0x284;
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;
/// What every model's local APIC says: version 0x14, six LVT entries.
const VERSION_VALUE: u32 = 0x0005_0014;
const BASE_X2APIC: u64 = 1 << 10;
const LVT_MASKED: u32 = 1 << 16;

/// Bytes of the page.
pub(super) const PAGE: usize = 1024;

/// Mode of the timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    Deadline,
}

pub(super) fn word(page: &[u8; PAGE], at: usize) -> u32 {
    let bytes = page.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_le_bytes(bytes.unwrap_or_default())
}

fn put(page: &mut [u8; PAGE], at: usize, value: u32) {
    if let Some(bytes) = page.get_mut(at..at + 4) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

/// Mode of the timer by its LVT entry; the reserved encoding counts once.
pub(super) fn mode(page: &[u8; PAGE]) -> Mode {
    match word(page, LVT_TIMER) >> 17 & 3 {
        1 => Mode::Periodic,
        2 => Mode::Deadline,
        _ => Mode::OneShot,
    }
}

/// Nanoseconds of guest time per tick of the count: the bus runs at 1 GHz.
fn divisor(page: &[u8; PAGE]) -> u64 {
    let register = word(page, DIVIDE);
    match register & 3 | register >> 1 & 4 {
        7 => 1,
        n => 2 << n,
    }
}

/// CURRENT_COUNT at guest time `now` of a timer that expires at `at`.
fn count(page: &[u8; PAGE], at: Option<u64>, now: u64) -> u32 {
    let left = at.map_or(0, |at| at.saturating_sub(now));
    u32::try_from(left.div_ceil(divisor(page))).unwrap_or(u32::MAX)
}

fn vector_in(page: &[u8; PAGE], file: usize, vector: u32) -> bool {
    let at = file + (vector as usize / 32) * 0x10;
    word(page, at) >> (vector % 32) & 1 != 0
}

/// INITIAL_COUNT that KVM must not have (see the module's documentation), and the page that it gets.
pub(super) struct ToKvm {
    pub page: [u8; PAGE],
    pub idle_count: Option<u32>,
}

/// The page for KVM at guest time `now`.
pub(super) fn to_kvm(lapic: &LapicState, cr8: u64, apic_id: u32, now: u64) -> ToKvm {
    let mut page = canonical(&lapic.registers);
    let x2apic = lapic.apic_base & BASE_X2APIC != 0;
    put(&mut page, ID, if x2apic { apic_id } else { apic_id << 24 });
    put(&mut page, VERSION, VERSION_VALUE);
    // CR8 is the upper half of TPR; where the two disagree CR8 counts, as on the software CPU.
    if u64::from(word(&page, TPR) >> 4 & 15) != cr8 & 15 {
        put(&mut page, TPR, (cr8 as u32 & 15) << 4);
    }
    let initial = word(&page, INITIAL_COUNT);
    let mut idle_count = None;
    match lapic.timer_expires_at {
        Some(at) if mode(&page) != Mode::Deadline => {
            // KVM takes no more than a whole period.
            let left = count(&page, Some(at), now).min(initial);
            put(&mut page, CURRENT_COUNT, left);
        }
        _ => {
            put(&mut page, CURRENT_COUNT, 0);
            if initial != 0 {
                put(&mut page, INITIAL_COUNT, 0);
                idle_count = Some(initial);
            }
        }
    }
    ToKvm { page, idle_count }
}

/// The first word of every register, and the hidden errors.
fn canonical(registers: &[u8; PAGE]) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for at in (0..PAGE).step_by(16).chain([HIDDEN_ERRORS]) {
        put(&mut page, at, word(registers, at));
    }
    page
}

/// When the timer of KVM's page expires, at guest time `now`.
///
/// A one-shot timer with nothing left is done, or it is due and KVM has not requested the interrupt yet. It counts as
/// due unless the interrupt is there: one too many is harmless, a lost one is not.
pub(super) fn expiry(page: &[u8; PAGE], now: u64) -> Option<u64> {
    let (initial, current) = (word(page, INITIAL_COUNT), word(page, CURRENT_COUNT));
    if initial == 0 {
        return None;
    }
    let at = now.saturating_add(u64::from(current) * divisor(page));
    match mode(page) {
        Mode::Deadline => None,
        Mode::Periodic => Some(at),
        Mode::OneShot if current != 0 => Some(at),
        Mode::OneShot => {
            let lvt = word(page, LVT_TIMER);
            let vector = lvt & 0xff;
            let there = vector_in(page, IRR, vector) || vector_in(page, ISR, vector);
            (lvt & LVT_MASKED == 0 && !there).then_some(now)
        }
    }
}

/// `LapicState::registers` from KVM's page: of a timer that expires at `expires`, at guest time `now`.
pub(super) fn registers(
    page: &[u8; PAGE],
    idle_count: Option<u32>,
    expires: Option<u64>,
    now: u64,
) -> [u8; PAGE] {
    let mut registers = canonical(page);
    put(&mut registers, VERSION, VERSION_VALUE);
    if let Some(initial) = idle_count
        && word(page, INITIAL_COUNT) == 0
        && mode(page) != Mode::Deadline
    {
        put(&mut registers, INITIAL_COUNT, initial);
    }
    put(&mut registers, CURRENT_COUNT, count(page, expires, now));
    registers
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_machine::cpu::state::CpuState;
    use proptest::prelude::*;

    fn lapic(change: impl Fn(&mut [u8; PAGE])) -> LapicState {
        let mut lapic = CpuState::power_on(3, false, 0).lapic;
        change(&mut lapic.registers);
        lapic
    }

    fn timer(lvt: u32, initial: u32, divide: u32, expires: Option<u64>) -> LapicState {
        let mut lapic = lapic(|page| {
            put(page, LVT_TIMER, lvt);
            put(page, INITIAL_COUNT, initial);
            put(page, DIVIDE, divide);
        });
        lapic.timer_expires_at = expires;
        lapic
    }

    fn back(kvm: &ToKvm, now: u64) -> LapicState {
        let expires = expiry(&kvm.page, now);
        LapicState {
            apic_base: 0xfee0_0800,
            registers: registers(&kvm.page, kvm.idle_count, expires, now),
            timer_expires_at: expires,
            tsc_deadline: 0,
        }
    }

    proptest! {
        #[test]
        fn registers_and_running_timers_come_back(
            words in proptest::collection::vec(any::<u32>(), 64),
            left in 1u32..,
            now in 0u64..1 << 60,
        ) {
            let mut before = lapic(|page| {
                for (n, value) in words.iter().enumerate() {
                    put(page, n * 16, *value);
                }
                put(page, ID, 3 << 24);
                put(page, VERSION, VERSION_VALUE);
                put(page, LVT_TIMER, words[0x32] & 0x3_00ff);
                put(page, INITIAL_COUNT, u32::MAX);
            });
            before.timer_expires_at = Some(now + u64::from(left) * divisor(&before.registers));
            put(&mut before.registers, CURRENT_COUNT, left);
            let cr8 = u64::from(word(&before.registers, TPR) >> 4 & 15);
            let kvm = to_kvm(&before, cr8, 3, now);
            prop_assert_eq!(back(&kvm, now), before);
        }
    }

    #[test]
    fn a_timer_that_is_done_does_not_fire_again_and_reads_as_before() {
        let done = timer(0x50, 1000, 0xb, None);
        let kvm = to_kvm(&done, 0, 3, 99);
        assert_eq!((word(&kvm.page, INITIAL_COUNT), kvm.idle_count), (0, Some(1000)));
        assert_eq!(back(&kvm, 500), done);
    }

    #[test]
    fn an_overdue_timer_is_due_at_once_and_a_far_one_waits_a_period() {
        let overdue = to_kvm(&timer(0x50, 1000, 0xb, Some(10)), 0, 3, 99);
        assert_eq!((word(&overdue.page, INITIAL_COUNT), word(&overdue.page, CURRENT_COUNT)), (1000, 0));
        assert_eq!(expiry(&overdue.page, 99), Some(99));
        let far = to_kvm(&timer(0x50, 1000, 0xb, Some(u64::MAX)), 0, 3, 99);
        assert_eq!(word(&far.page, CURRENT_COUNT), 1000);
    }

    #[test]
    fn a_one_shot_at_zero_is_due_unless_its_interrupt_is_there() {
        let mut page = timer(0x51, 1000, 0xb, None).registers;
        assert_eq!(expiry(&page, 7), Some(7));
        for file in [IRR, ISR] {
            let mut taken = page;
            put(&mut taken, file + 0x20, 1 << 17);
            assert_eq!(expiry(&taken, 7), None);
        }
        put(&mut page, LVT_TIMER, 0x1_0051);
        assert_eq!(expiry(&page, 7), None, "masked");
        put(&mut page, LVT_TIMER, 0x4_0051);
        assert_eq!(expiry(&page, 7), None, "deadline mode");
    }

    #[test]
    fn task_priority_follows_cr8_and_ids_the_mode() {
        let mut state = lapic(|page| put(page, TPR, 0x95));
        assert_eq!(word(&to_kvm(&state, 9, 3, 0).page, TPR), 0x95);
        assert_eq!(word(&to_kvm(&state, 4, 3, 0).page, TPR), 0x40);
        assert_eq!(word(&to_kvm(&state, 9, 3, 0).page, ID), 3 << 24);
        state.apic_base |= BASE_X2APIC;
        assert_eq!(word(&to_kvm(&state, 9, 300, 0).page, ID), 300);
    }

    #[test]
    fn working_data_between_registers_is_left_out_but_hidden_errors_stay() {
        let mut page = lapic(|_| {}).registers;
        put(&mut page, 0x304, 5);
        put(&mut page, HIDDEN_ERRORS, 0x40);
        put(&mut page, VERSION, 0x0105_0014);
        let seen = registers(&page, None, None, 0);
        assert_eq!((word(&seen, 0x304), word(&seen, HIDDEN_ERRORS)), (0, 0x40));
        assert_eq!(word(&seen, VERSION), VERSION_VALUE);
    }
}
