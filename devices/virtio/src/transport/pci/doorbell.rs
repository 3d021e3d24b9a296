//! Doorbells: notifications that reach the device's thread without the vCPU leaving `run`.
//!
//! Where the backend has [`EventRoutes`], the notification register of every enabled queue is bound to an eventfd
//! while three things hold: the driver is ready, the BAR is mapped, and the device has a thread that waits. Each
//! may change at any time; after every change the bindings are brought in line:
//!
//! ```text
//! DRIVER_OK, reset ──► set_queues ──┐
//!                                   ├──► bound == queues × address? otherwise unbind, bind
//! BAR mapped, moved, unmapped ──► BellMapper ──┘
//!        eventfd ──► device's thread ──► drain, then `pending`, then the queue (see `core`)
//! ```
//!
//! A notification before DRIVER_OK means nothing, so a guest that never starts the driver costs no binding. What
//! cannot be bound stays as it was: the write leaves the guest and the vCPU looks at the queue itself.
//!
//! No notification is lost. One that is still in its eventfd when the binding goes or the device is paused is
//! drained by the thread as ever and leaves `pending` behind, which a resume looks at; and a restored device looks
//! at every queue.
//!
//! Lock order: the transport's register lock or the PCI function's lock, then this state's, then the routes' and
//! the worker's own.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use atoll_foundation::{EventFd, log_limited};
use atoll_machine::backend::{Doorbell, EventRoutes};
use atoll_machine::bus::MmioDevice;
use atoll_pci::{BarMapper, BarMapping, BarTarget};

use super::{NOTIFY, NOTIFY_MULTIPLIER};
use crate::lock;

/// Has the device's thread wait for an event, as the doorbell of a queue.
pub(crate) type Watch<'a> = &'a dyn Fn(u16, &Arc<EventFd>) -> std::io::Result<()>;

#[derive(Default)]
struct State {
    /// By queue, from its first use on; the device's thread waits for each.
    events: Vec<Option<Arc<EventFd>>>,
    /// Queues that a ready driver may notify.
    queues: Vec<u16>,
    /// Address of the BAR's notification registers while it is mapped.
    address: Option<u64>,
    bound: Vec<(u16, Doorbell)>,
}

/// The doorbells of one device.
pub(crate) struct Doorbells {
    routes: Arc<dyn EventRoutes>,
    /// What the BAR with the registers maps: how the mapper recognises it.
    registers: OnceLock<Weak<dyn MmioDevice>>,
    state: Mutex<State>,
}

impl Doorbells {
    pub(crate) fn new(routes: Arc<dyn EventRoutes>) -> Arc<Self> {
        Arc::new(Self { routes, registers: OnceLock::new(), state: Mutex::default() })
    }

    /// Says which mapping is the BAR with the registers. The first call counts.
    pub(crate) fn set_registers(&self, registers: &Arc<dyn MmioDevice>) {
        let _ = self.registers.set(Arc::downgrade(registers));
    }

    /// The driver is ready and uses `queues`; none after a reset.
    pub(crate) fn set_queues(&self, queues: &[u16], watch: Watch<'_>) {
        let mut state = lock(&self.state);
        state.queues = queues.iter().copied().filter(|queue| state.has_event(*queue, watch)).collect();
        self.follow(&mut state);
    }

    /// The BAR's registers are at `bar`, or nowhere.
    fn place(&self, bar: Option<u64>) {
        let mut state = lock(&self.state);
        state.address = bar.map(|at| at + NOTIFY);
        self.follow(&mut state);
    }

    /// Brings the bindings in line.
    fn follow(&self, state: &mut State) {
        let wanted: Vec<(u16, Doorbell)> = match state.address {
            Some(address) => state.queues.iter().map(|queue| (*queue, bell(address, *queue))).collect(),
            None => Vec::new(),
        };
        let State { events, bound, .. } = state;
        let event = |queue: u16| events.get(usize::from(queue)).and_then(Option::as_ref);
        bound.retain(|(queue, doorbell)| {
            let keep = wanted.contains(&(*queue, *doorbell));
            if !keep
                && let Some(event) = event(*queue)
                && let Err(error) = self.routes.unbind_doorbell(*doorbell, event.as_fd())
            {
                log_limited!(error, queue, "the doorbell at {:#x} stays bound: {error}", doorbell.address);
            }
            keep
        });
        for (queue, doorbell) in wanted {
            if bound.contains(&(queue, doorbell)) {
                continue;
            }
            let Some(event) = event(queue) else { continue };
            match self.routes.bind_doorbell(doorbell, event.as_fd()) {
                Ok(()) => bound.push((queue, doorbell)),
                Err(error) => {
                    log_limited!(debug, queue, "no doorbell at {:#x}: {error}", doorbell.address);
                }
            }
        }
    }
}

impl State {
    /// Whether the thread waits for the event of `queue`, from now on if it did not before.
    fn has_event(&mut self, queue: u16, watch: Watch<'_>) -> bool {
        let at = usize::from(queue);
        if self.events.len() <= at {
            self.events.resize(at + 1, None);
        }
        if self.events[at].is_none() {
            let made = EventFd::new().map(Arc::new).and_then(|event| watch(queue, &event).map(|()| event));
            match made {
                Ok(event) => self.events[at] = Some(event),
                Err(error) => log_limited!(warn, queue, "no doorbell, a vCPU does the work: {error}"),
            }
        }
        self.events[at].is_some()
    }
}

/// A write of any width to the queue's register; the value says nothing that the address does not.
fn bell(address: u64, queue: u16) -> Doorbell {
    Doorbell { address: address + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER), width: 0, value: None }
}

/// Maps BARs, and tells the doorbells where the one with the registers is.
pub(crate) struct BellMapper {
    pub(crate) inner: Arc<dyn BarMapper>,
    pub(crate) bells: Arc<Doorbells>,
}

/// The mapped BAR with the registers.
struct Placed {
    bells: Arc<Doorbells>,
    _mapping: BarMapping,
}

impl BarMapper for BellMapper {
    fn map(&self, address: u64, size: u64, target: &BarTarget) -> Option<BarMapping> {
        let mapping = self.inner.map(address, size, target)?;
        let registers = match (target, self.bells.registers.get()) {
            (BarTarget::Mmio(device), Some(registers)) => {
                std::ptr::addr_eq(Arc::as_ptr(device), registers.as_ptr())
            }
            _ => false,
        };
        if !registers {
            return Some(mapping);
        }
        self.bells.place(Some(address));
        Some(Box::new(Placed { bells: self.bells.clone(), _mapping: mapping }))
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        self.bells.place(None);
    }
}

#[cfg(test)]
#[path = "doorbell_tests.rs"]
mod tests;
