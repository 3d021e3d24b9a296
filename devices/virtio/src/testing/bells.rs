//! Event routes of a machine without a hypervisor: writes signal eventfds by looking them up.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use atoll_foundation::EventFd;
use atoll_machine::backend::{Doorbell, EventRoutes, InterruptBinding};
use atoll_machine::interrupt::Msi;

/// Doorbells that are bound.
#[derive(Default)]
pub struct Bells {
    bound: Mutex<Vec<(Doorbell, EventFd)>>,
    /// Refuse to bind.
    pub refuse: AtomicBool,
    /// Calls of bind and unbind.
    pub changes: AtomicUsize,
    /// Hold signals back: they count in [`Bells::held`].
    pub hold: AtomicBool,
    held: Mutex<Vec<EventFd>>,
}

impl Bells {
    /// The addresses that are bound, ascending.
    pub fn addresses(&self) -> Vec<u64> {
        let mut all: Vec<u64> = crate::lock(&self.bound).iter().map(|(bell, _)| bell.address).collect();
        all.sort_unstable();
        all
    }

    /// A guest's write. Whether it was a doorbell, and so is no MMIO access.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let bound = crate::lock(&self.bound);
        let hit = bound.iter().find(|(bell, _)| {
            bell.address == address
                && (bell.width == 0 || usize::from(bell.width) == data.len())
                && bell.value.is_none_or(|v| v == value)
        });
        let Some((_, event)) = hit else { return false };
        if self.hold.load(Ordering::SeqCst) {
            crate::lock(&self.held).push(event.try_clone().expect("a descriptor"));
        } else {
            event.signal();
        }
        true
    }

    /// Signals what was held back.
    pub fn release(&self) {
        self.hold.store(false, Ordering::SeqCst);
        crate::lock(&self.held).drain(..).for_each(|event| event.signal());
    }
}

fn own(event: BorrowedFd<'_>) -> io::Result<EventFd> {
    let fd: OwnedFd = event.try_clone_to_owned()?;
    Ok(EventFd::from_owned_fd(fd))
}

impl EventRoutes for Bells {
    fn bind_doorbell(&self, doorbell: Doorbell, event: BorrowedFd<'_>) -> io::Result<()> {
        self.changes.fetch_add(1, Ordering::SeqCst);
        let mut bound = crate::lock(&self.bound);
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if bound.iter().any(|(bell, _)| *bell == doorbell) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        bound.push((doorbell, own(event)?));
        Ok(())
    }

    fn unbind_doorbell(&self, doorbell: Doorbell, _event: BorrowedFd<'_>) -> io::Result<()> {
        self.changes.fetch_add(1, Ordering::SeqCst);
        let mut bound = crate::lock(&self.bound);
        let before = bound.len();
        bound.retain(|(bell, _)| *bell != doorbell);
        if bound.len() == before { Err(io::ErrorKind::NotFound.into()) } else { Ok(()) }
    }

    fn bind_interrupt(&self, _event: BorrowedFd<'_>, _msi: Msi) -> io::Result<Box<dyn InterruptBinding>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
