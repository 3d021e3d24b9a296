//! Behaviour that every backend shows, as one suite of cases.
//!
//! ```text
//! a backend's tests ──► run_all(&backend, skip) ──► cases ──► fixture (RAM, devices, clock, a board that records)
//!                                                      └────► payload (guest code, tables, handlers)
//! ```
//!
//! A case makes a partition through [`atoll_machine::backend`] alone, runs a small guest program and looks at
//! what the program, its memory, the devices and the state show. A backend that lacks something names the cases
//! it skips, each with the reason. A case ends its guest after [`fixture::TIME_LIMIT`], so that a hang is a
//! failure with a name.

mod dirty;
mod events;
pub mod fixture;
mod interrupts;
mod io;
mod lifecycle;
mod memory;
mod modes;
mod moving;
pub mod payload;
mod registers;
mod smp;
mod timers;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use atoll_machine::backend::Backend;

/// One behaviour.
pub struct Case<B: Backend> {
    /// `area::behaviour`.
    pub name: &'static str,
    /// Panics when the backend behaves otherwise.
    pub run: fn(&B),
}

macro_rules! list {
    ($($area:ident: $($name:ident)*;)*) => {
        vec![$($(Case { name: concat!(stringify!($area), "::", stringify!($name)), run: $area::$name::<B> }),*),*]
    };
}

/// Every case, in the order in which a new backend is best brought up.
pub fn cases<B: Backend>() -> Vec<Case<B>> {
    list! {
        registers:
            power_on_is_the_architectural_reset_state reset_returns_to_power_on_and_runs_from_the_reset_vector
            general_registers_and_flags_round_trip segments_and_tables_round_trip control_and_debug_registers_round_trip
            vector_state_round_trips msrs_round_trip local_apic_round_trips events_and_activity_round_trip
            guests_see_the_state_that_was_set impossible_states_are_refused_and_change_nothing
            state_at_a_stop_is_a_boundary saved_form_round_trips;
        io:
            port_widths_reach_the_board_in_order string_output_and_input_keep_order
            mmio_widths_arrive_whole mmio_of_16_bytes_arrives mmio_of_32_bytes_arrives mmio_across_a_page_is_split mmio_read_modify_write_reads_once_and_writes_once
            mmio_string_move_accesses_each_element port_access_in_real_mode
            a_stop_during_an_access_leaves_a_boundary
            a_stop_during_a_string_access_leaves_an_element_boundary;
        memory:
            rom_ignores_writes rom_device_takes_writes unmapped_reads_are_all_ones
            region_mapped_while_running_is_seen region_moved_away_is_gone code_changed_by_the_guest_runs_changed
            code_changed_by_a_device_runs_changed;
        modes:
            real_to_protected_to_pae_to_long_and_back page_faults_carry_address_and_error_code
            reserved_bits_in_tables_fault_with_their_code stack_references_fault_as_such
            exceptions_reach_their_handlers sse_avx_and_x87_compute system_calls_enter_and_leave_the_kernel;
        interrupts:
            message_reaches_the_addressed_vector interrupt_flag_holds_interrupts_back sti_holds_one_instruction_longer
            task_priority_masks_lower_classes higher_vectors_go_first level_triggered_end_is_told
            every_pin_is_told_of_its_end level_triggered_end_is_told_wherever_it_is_sent
            nmi_ignores_the_interrupt_flag nmi_waits_for_the_end_of_the_handler nmi_ends_a_halt
            legacy_interrupt_is_acknowledged_once masked_legacy_interrupt_waits
            legacy_interrupt_waits_for_the_window periodic_legacy_interrupts_lose_no_tick
            stops_lose_no_legacy_interrupt halt_ends_with_an_interrupt
            x2apic_registers_and_self_ipi;
        timers:
            one_shot_fires_once_and_not_early periodic_fires_again tsc_deadline_fires_and_disarms
            timer_follows_the_machines_clock time_counter_follows_the_clock;
        smp:
            messages_reach_every_destination_mode lowest_priority_takes_one ipi_ping_pong
            second_processor_starts_by_init_and_sipi locked_increments_are_atomic nmi_by_ipi;
        dirty:
            two_readers_see_exactly_the_pages_written page_table_updates_are_seen
            log_is_complete_while_another_vcpu_writes;
        events:
            doorbell_signals_instead_of_an_access doorbell_with_a_value_takes_that_value_only
            unbound_doorbell_is_an_access_again bound_event_sends_its_message dropped_binding_sends_nothing;
        lifecycle:
            kick_stops_a_tight_loop kick_stops_a_halt_without_interrupts kick_stops_a_wait_for_sipi
            a_stop_asked_for_before_the_run_is_seen kicks_without_a_stop_change_nothing stopped_vcpu_continues_where_it_was
            triple_fault_is_reported budget_is_exact indices_out_of_range_are_refused;
        moving:
            moved_at_every_budget_gives_the_same_result moved_at_random_times_gives_the_same_result;
    }
}

/// What became of the cases.
#[derive(Debug, Default)]
pub struct Report {
    /// Names of the cases that passed.
    pub passed: Vec<&'static str>,
    /// Cases that were skipped, with the reason.
    pub skipped: Vec<(&'static str, String)>,
    /// Cases that failed, with what they said.
    pub failed: Vec<(&'static str, String)>,
    /// Names in the skip list that are no case: a list that has rotted.
    pub unknown: Vec<String>,
}

impl Report {
    /// Panics with the whole report unless every case passed or was skipped, and the skip list is right.
    pub fn expect_success(&self) {
        assert!(self.failed.is_empty() && self.unknown.is_empty(), "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (passed, failed, skipped) = (self.passed.len(), self.failed.len(), self.skipped.len());
        writeln!(f, "{passed} passed, {failed} failed, {skipped} skipped")?;
        for (name, why) in &self.skipped {
            writeln!(f, "skipped {name}: {why}")?;
        }
        for (name, why) in &self.failed {
            writeln!(f, "FAILED {name}: {why}")?;
        }
        for name in &self.unknown {
            writeln!(f, "the skip list names {name}, which is no case")?;
        }
        Ok(())
    }
}

/// Runs every case but those of `skip`, which names cases and says why each cannot pass.
pub fn run_all<B: Backend>(backend: &B, skip: &[(&str, &str)]) -> Report {
    run_matching(backend, skip, "")
}

/// As [`run_all`], but only the cases whose name contains `filter`.
pub fn run_matching<B: Backend>(backend: &B, skip: &[(&str, &str)], filter: &str) -> Report {
    let cases = cases::<B>();
    let mut report = Report::default();
    for (name, _) in skip {
        if !cases.iter().any(|c| c.name == *name) {
            report.unknown.push((*name).to_owned());
        }
    }
    for case in cases.iter().filter(|c| c.name.contains(filter)) {
        if let Some((_, why)) = skip.iter().find(|(name, _)| *name == case.name) {
            report.skipped.push((case.name, (*why).to_owned()));
            continue;
        }
        // Told as it goes, so that a suite that hangs says where.
        println!("{} ...", case.name);
        let start = std::time::Instant::now();
        match catch_unwind(AssertUnwindSafe(|| (case.run)(backend))) {
            Ok(()) => report.passed.push(case.name),
            Err(payload) => report.failed.push((case.name, words(&*payload))),
        }
        println!("{} took {:?}", case.name, start.elapsed());
    }
    report
}

/// What a panic said.
fn words(payload: &(dyn std::any::Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else {
        "panicked without words".to_owned()
    }
}
