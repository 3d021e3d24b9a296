//! Eventfds that the kernel connects with the guest (api.rst, `KVM_IOEVENTFD` and `KVM_IRQFD`).
//!
//! ```text
//! guest write ──► doorbell (ioeventfd) ──► eventfd ──► a device's thread, or another process
//! guest   ◄── MSI ◄── route (Routing) ◄── GSI ◄── irqfd ◄── eventfd ◄── a device's thread, or another process
//! ```
//!
//! Neither passes through the run loop: a doorbell costs an exit to the kernel and no return from `KVM_RUN`, and an
//! interrupt reaches a running vCPU without waking anybody's thread. A doorbell of any width and value is the
//! cheapest kind: on Intel the kernel does not even look at the instruction.
//!
//! A doorbell takes effect wherever the guest's access leaves the guest, which is also where another device covers
//! the address; RAM and ROM of the address space come first. Two doorbells that cannot be told apart are refused
//! (EEXIST).
#![allow(unsafe_code)]
// UNSAFETY: the two requests have no safe form that takes any eventfd and a width without a value.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use atoll_foundation::log_limited;
use atoll_machine::backend::{Doorbell, EventRoutes, InterruptBinding};
use atoll_machine::interrupt::Msi;
use kvm_bindings::{
    KVM_IRQFD_FLAG_DEASSIGN, KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_irqfd,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::interrupts::Routing;

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);

/// The event routes of one virtual machine.
pub(crate) struct Events {
    vm: Arc<VmFd>,
    routing: Arc<Routing>,
}

impl Events {
    /// Routes of `vm`; interrupts take GSIs from `routing`.
    pub(crate) fn new(vm: Arc<VmFd>, routing: Arc<Routing>) -> Arc<Self> {
        Arc::new(Self { vm, routing })
    }

    fn doorbell(&self, doorbell: Doorbell, event: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
        let matching = if doorbell.value.is_some() { 1 << kvm_ioeventfd_flag_nr_datamatch } else { 0 };
        let request = kvm_ioeventfd {
            datamatch: doorbell.value.unwrap_or(0),
            addr: doorbell.address,
            len: doorbell.width.into(),
            fd: event.as_raw_fd(),
            flags: flags | matching,
            ..Default::default()
        };
        // SAFETY: the kernel only reads the request, and refuses what it does not like about it.
        check(unsafe { ioctl_with_ref(&*self.vm, KVM_IOEVENTFD(), &request) })
    }
}

impl EventRoutes for Events {
    fn bind_doorbell(&self, doorbell: Doorbell, event: BorrowedFd<'_>) -> io::Result<()> {
        self.doorbell(doorbell, event, 0)
    }

    fn unbind_doorbell(&self, doorbell: Doorbell, event: BorrowedFd<'_>) -> io::Result<()> {
        self.doorbell(doorbell, event, 1 << kvm_ioeventfd_flag_nr_deassign)
    }

    fn bind_interrupt(&self, event: BorrowedFd<'_>, msi: Msi) -> io::Result<Box<dyn InterruptBinding>> {
        let event = event.try_clone_to_owned()?;
        let gsi = self.routing.allocate()?;
        let bound = self.routing.set(gsi, Some(msi)).and_then(|()| irqfd(&self.vm, event.as_fd(), gsi, 0));
        if let Err(error) = bound {
            let _ = self.routing.free(gsi);
            return Err(error);
        }
        Ok(Box::new(Binding { vm: self.vm.clone(), routing: self.routing.clone(), event, gsi }))
    }
}

/// An eventfd that sends the message of one GSI.
struct Binding {
    vm: Arc<VmFd>,
    routing: Arc<Routing>,
    event: OwnedFd,
    gsi: u32,
}

impl InterruptBinding for Binding {
    fn set_message(&self, msi: Option<Msi>) -> io::Result<()> {
        self.routing.set(self.gsi, msi)
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        let unbound = irqfd(&self.vm, self.event.as_fd(), self.gsi, KVM_IRQFD_FLAG_DEASSIGN);
        // The GSI is given back only when nothing can signal it any more.
        if let Err(error) = unbound.and_then(|()| self.routing.free(self.gsi)) {
            log_limited!(warn, "KVM does not unbind the interrupt of GSI {}: {error}", self.gsi);
        }
    }
}

fn irqfd(vm: &VmFd, event: BorrowedFd<'_>, gsi: u32, flags: u32) -> io::Result<()> {
    let request = kvm_irqfd { fd: event.as_raw_fd() as u32, gsi, flags, ..Default::default() };
    // SAFETY: the kernel only reads the request, and refuses what it does not like about it.
    check(unsafe { ioctl_with_ref(vm, KVM_IRQFD(), &request) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use atoll_foundation::EventFd;
    use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
    use kvm_ioctls::{Kvm, VcpuFd};

    use super::*;
    use crate::memory::kvm_tests::Guest;

    const BELL: u64 = 0x4000;

    /// A guest that writes `width` bytes of value 0x31 to [`BELL`] and then a port, for ever.
    fn ringer(width: u8) -> Option<Guest> {
        let store: &[u8] = match width {
            1 => &[0xc6, 0x06, 0x00, 0x40, 0x31],
            _ => &[0xc7, 0x06, 0x00, 0x40, 0x31, 0x00],
        };
        let mut code = [store, &[0xe6, 1]].concat();
        let back = (code.len() as u8 + 2).wrapping_neg();
        code.extend([0xeb, back]);
        let guest = Guest::new(&code, false)?;
        guest.hole(BELL);
        Some(guest)
    }

    fn routes(guest: &Guest) -> Arc<Events> {
        Events::new(guest.vm.clone(), Routing::new(guest.vm.clone()))
    }

    #[test]
    fn a_doorbell_signals_its_event_instead_of_leaving_the_guest() {
        for (width, doorbell) in [
            (1, Doorbell { address: BELL, width: 0, value: None }),
            (2, Doorbell { address: BELL, width: 0, value: None }),
            (2, Doorbell { address: BELL, width: 2, value: None }),
            (2, Doorbell { address: BELL, width: 2, value: Some(0x31) }),
        ] {
            let Some(mut guest) = ringer(width) else { return };
            let (events, event) = (routes(&guest), EventFd::new().unwrap());
            guest.run();
            assert_eq!(guest.mmio.len(), 1);
            events.bind_doorbell(doorbell, event.as_fd()).unwrap();
            guest.run();
            guest.run();
            assert_eq!((guest.mmio.len(), event.drain()), (1, 2), "{doorbell:?}");
            events.unbind_doorbell(doorbell, event.as_fd()).unwrap();
            guest.run();
            assert_eq!((guest.mmio.len(), event.drain()), (2, 0), "{doorbell:?}");
        }
    }

    #[test]
    fn a_doorbell_of_another_width_or_value_leaves_the_write_alone() {
        let Some(mut guest) = ringer(2) else { return };
        let (events, event) = (routes(&guest), EventFd::new().unwrap());
        for (width, value) in [(1, None), (4, None), (2, Some(0x32))] {
            events.bind_doorbell(Doorbell { address: BELL, width, value }, event.as_fd()).unwrap();
        }
        guest.run();
        assert_eq!((guest.mmio.len(), event.drain()), (1, 0));
    }

    #[test]
    fn impossible_and_doubled_doorbells_are_refused() {
        let Some(guest) = ringer(1) else { return };
        let (events, event) = (routes(&guest), EventFd::new().unwrap());
        let bell = Doorbell { address: BELL, width: 0, value: None };
        assert!(events.unbind_doorbell(bell, event.as_fd()).is_err(), "never bound");
        assert!(events.bind_doorbell(Doorbell { value: Some(1), ..bell }, event.as_fd()).is_err());
        assert!(events.bind_doorbell(Doorbell { width: 3, ..bell }, event.as_fd()).is_err());
        events.bind_doorbell(bell, event.as_fd()).unwrap();
        let again = events.bind_doorbell(bell, event.as_fd()).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(libc::EEXIST));
    }

    /// A vCPU with a local APIC that is on. `None`, with a printed reason, without KVM.
    fn receiver() -> Option<(Arc<VmFd>, VcpuFd)> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                println!("skipped: /dev/kvm cannot be opened: {error}");
                return None;
            }
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = 24;
        vm.enable_cap(&split).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[0xf1] |= 1;
        vcpu.set_lapic(&lapic).unwrap();
        Some((vm, vcpu))
    }

    /// Whether `vector` waits in the local APIC, now or within `patience`.
    fn pending(vcpu: &VcpuFd, vector: usize, patience: Duration) -> bool {
        let start = Instant::now();
        loop {
            let lapic = vcpu.get_lapic().unwrap();
            let byte = lapic.regs[0x200 + vector / 32 * 16 + vector % 32 / 8];
            if byte as u8 >> (vector % 8) & 1 != 0 {
                return true;
            }
            if start.elapsed() > patience {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_event_sends_the_message_it_is_bound_to_until_the_binding_goes() {
        let Some((vm, vcpu)) = receiver() else { return };
        let events = Events::new(vm.clone(), Routing::new(vm));
        let (soon, never) = (Duration::from_secs(10), Duration::from_millis(50));
        let message = |vector| Msi { address: 0xfee0_0000, data: vector };
        let (one, two) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        let first = events.bind_interrupt(one.as_fd(), message(0x41)).unwrap();
        let second = events.bind_interrupt(two.as_fd(), message(0x42)).unwrap();
        one.signal();
        assert!(pending(&vcpu, 0x41, soon));
        assert!(!pending(&vcpu, 0x42, Duration::ZERO));
        first.set_message(None).unwrap();
        one.signal();
        // The kernel may look the route up on a thread of its own, a moment later.
        std::thread::sleep(never);
        first.set_message(Some(message(0x53))).unwrap();
        assert!(!pending(&vcpu, 0x53, never), "what comes while it is masked is lost");
        one.signal();
        assert!(pending(&vcpu, 0x53, soon));
        drop(second);
        two.signal();
        assert!(!pending(&vcpu, 0x42, never));
        let third = events.bind_interrupt(two.as_fd(), message(0x64)).unwrap();
        assert!(pending(&vcpu, 0x64, soon), "a signal that came before the binding is not lost");
        drop((first, third));
    }
}
