//! Making a vCPU leave `KVM_RUN` soon, from any thread, without a lost wake-up.
//!
//! ```text
//!   kicking thread                        vCPU's thread
//!   1. what is wanted (stop flag, NMI)    a. immediate_exit = 0
//!   2. immediate_exit = 1                 b. looks at everything that can be wanted
//!   3. if inside != 0: signal it          c. inside = thread id
//!                                         d. KVM_RUN: returns at once if immediate_exit is set, or when a signal comes
//!                                         e. inside = 0
//! ```
//!
//! All four words are accessed in one total order. If (2) comes before (a), then (1) is seen at (b). If it
//! comes after (a), then either KVM reads it at (d), or it came too late for that; then (c) was before (3), so
//! the signal is sent, and it finds the thread in the kernel or on its way there, where it ends `KVM_RUN` too.
//! The signal's handler does nothing: that it arrives is the message. One that arrives outside `KVM_RUN`
//! interrupts nothing (`SA_RESTART`), and `immediate_exit` still stands.
//!
//! The entry's mutex keeps the mapped `kvm_run` page from going away under the kicking thread.

// UNSAFETY: signal handlers and thread-directed signals have no safe wrapper; `immediate_exit` lies in a page that is
// shared with the kernel.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once};

/// NMIs that a processor remembers: one in its handler, one latched (Intel SDM vol. 3, 6.7.1).
const MAX_NMIS: u32 = 2;

/// The signal that kicks. Not a real-time signal: those are queued, and refused when the user's queue (RLIMIT_SIGPENDING)
/// is full, so that a kick would be lost. Of the others this one is ignored where it has no handler, and nobody uses it
/// but for sockets with urgent data.
pub(crate) const SIGNAL: i32 = libc::SIGURG;

/// The byte in the `kvm_run` page that makes `KVM_RUN` return at once.
pub(crate) struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte is only ever accessed atomically, by this process as by the kernel.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    /// # Safety
    ///
    /// `byte` is valid for atomic access as long as this value exists.
    pub(crate) unsafe fn new(byte: *mut u8) -> Self {
        Self(byte.cast_const().cast())
    }

    pub(crate) fn set(&self, on: bool) {
        // SAFETY: the caller of `new` keeps the byte valid; u8 has no alignment.
        unsafe { (*self.0).store(u8::from(on), Ordering::SeqCst) };
    }
}

/// What other threads can ask of one vCPU.
#[derive(Default)]
pub(crate) struct Kick {
    /// `None` while there is no vCPU.
    page: Mutex<Option<ImmediateExit>>,
    /// Id of the thread that is in `KVM_RUN`, or 0.
    inside: AtomicI32,
    nmis: AtomicU32,
}

impl Kick {
    fn page(&self) -> MutexGuard<'_, Option<ImmediateExit>> {
        self.page.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A vCPU exists from now on. False: there is one already.
    pub(crate) fn attach(&self, page: ImmediateExit) -> bool {
        let mut entry = self.page();
        if entry.is_some() {
            return false;
        }
        *entry = Some(page);
        true
    }

    /// The vCPU goes away; its page may be unmapped afterwards.
    pub(crate) fn detach(&self) {
        *self.page() = None;
    }

    /// Makes the vCPU's next or current `KVM_RUN` return.
    pub(crate) fn kick(&self) {
        let entry = self.page();
        let Some(page) = &*entry else { return };
        page.set(true);
        let thread = self.inside.load(Ordering::SeqCst);
        if thread != 0 {
            send_signal(thread);
        }
    }

    /// The thread is about to enter `KVM_RUN`.
    pub(crate) fn enter(&self, thread: i32) {
        self.inside.store(thread, Ordering::SeqCst);
    }

    /// `KVM_RUN` returned.
    pub(crate) fn leave(&self) {
        self.inside.store(0, Ordering::SeqCst);
    }

    /// Asks for an NMI.
    pub(crate) fn request_nmi(&self) {
        let more = |n: u32| (n < MAX_NMIS).then_some(n + 1);
        let _ = self.nmis.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        self.kick();
    }

    /// NMIs that were asked for since the last call.
    pub(crate) fn take_nmis(&self) -> u32 {
        if self.nmis.load(Ordering::Relaxed) == 0 { 0 } else { self.nmis.swap(0, Ordering::SeqCst) }
    }
}

/// Sends the kick signal to a thread of this process. A thread that ended meanwhile is no error.
pub(crate) fn send_signal(thread: i32) {
    // SAFETY: a system call without pointers. The handler exists since a thread ran `prepare_thread`.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGNAL) };
}

extern "C" fn ignore(_signal: i32) {}

/// Makes the calling thread one that can be kicked. Returns its id.
pub(crate) fn prepare_thread() -> io::Result<i32> {
    static INSTALL: Once = Once::new();
    let mut result = Ok(());
    INSTALL.call_once(|| result = install_handler());
    result?;
    set_blocked(false)?;
    Ok(rustix::thread::gettid().as_raw_nonzero().get())
}

fn install_handler() -> io::Result<()> {
    let handler: extern "C" fn(i32) = ignore;
    // SAFETY: all zeroes is a valid sigaction: no mask, no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: `action` outlives the call; the handler only returns, which any thread may do at any time.
    let result = unsafe { libc::sigaction(SIGNAL, &action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Blocks the kick signal for the calling thread, or lets it through.
pub(crate) fn set_blocked(blocked: bool) -> io::Result<()> {
    let how = if blocked { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: all zeroes is a valid (empty) set, which outlives the calls.
    let result = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, SIGNAL);
        libc::pthread_sigmask(how, &set, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_remembers_two_nmis() {
        let kick = Kick::default();
        for _ in 0..5 {
            kick.request_nmi();
        }
        assert_eq!((kick.take_nmis(), kick.take_nmis()), (2, 0));
    }

    #[test]
    fn one_vcpu_at_a_time_and_kicks_without_one_are_harmless() {
        let kick = Kick::default();
        kick.kick();
        let mut byte = 0u8;
        let at = &raw mut byte;
        // SAFETY: `byte` outlives both values.
        let (first, second) = unsafe { (ImmediateExit::new(at), ImmediateExit::new(at)) };
        assert!(kick.attach(first));
        assert!(!kick.attach(second), "it has a vCPU");
        kick.kick();
        kick.detach();
        assert_eq!(byte, 1);
    }

    #[test]
    fn a_kick_needs_no_room_in_the_queue_of_signals() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let before = getrlimit(Resource::Sigpending);
        setrlimit(Resource::Sigpending, Rlimit { current: Some(0), ..before }).unwrap();
        a_signal_ends_a_wait_of_the_thread_inside();
        setrlimit(Resource::Sigpending, before).unwrap();
    }

    #[test]
    fn a_signal_ends_a_wait_of_the_thread_inside() {
        let kick = Kick::default();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                sender.send(prepare_thread().unwrap()).unwrap();
                // Unlike most system calls, nanosleep is interrupted even with SA_RESTART.
                let second = libc::timespec { tv_sec: 10, tv_nsec: 0 };
                // SAFETY: the timespec outlives the call.
                unsafe { libc::nanosleep(&second, std::ptr::null_mut()) }
            });
            kick.enter(receiver.recv().unwrap());
            let mut byte = 0u8;
            // SAFETY: detached before `byte` ends.
            assert!(kick.attach(unsafe { ImmediateExit::new(&raw mut byte) }));
            std::thread::sleep(std::time::Duration::from_millis(50));
            kick.kick();
            kick.detach();
            assert_eq!(waiter.join().unwrap(), -1, "woken before its time");
            assert_eq!(byte, 1);
        });
    }
}
