//! Host exceptions inside thunks.
//!
//! A guest instruction that runs with the guest's MXCSR may raise an unmasked numeric exception on the host:
//! SIGFPE. One that the host lacks raises SIGILL. The handler knows the address ranges of all arenas; when the
//! interrupted instruction lies in one, it writes the signal's number to ECX and continues at the arena's fault
//! exit, which leaves the thunk as a call returns. Anything else goes to the handler that was there before.
//!
//! The handler takes no lock and allocates nothing: ranges are a list of nodes that are never freed, only
//! reused. vCPU threads must not block SIGFPE and SIGILL (the kernel ends a process that does and faults).

// UNSAFETY: installs a signal handler and edits the interrupted context.
#![allow(unsafe_code)]

use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// The handled signals.
const SIGNALS: [libc::c_int; 2] = [libc::SIGFPE, libc::SIGILL];

struct Node {
    /// First address; 0 when the node is free.
    start: AtomicUsize,
    end: AtomicUsize,
    next: AtomicPtr<Node>,
}

static RANGES: AtomicPtr<Node> = AtomicPtr::new(ptr::null_mut());
static PREVIOUS: [OnceLock<libc::sigaction>; 2] = [OnceLock::new(), OnceLock::new()];
static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();

/// Keeps an address range in the handler's list.
pub(super) struct Registration(&'static Node);

impl Drop for Registration {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::Release);
        self.0.start.store(0, Ordering::Release);
    }
}

/// Has the handler treat `start..end` as an arena whose fault exit is at `start`.
pub(super) fn register(start: usize, end: usize) -> Registration {
    for node in nodes() {
        if node.start.compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            node.end.store(end, Ordering::Release);
            return Registration(node);
        }
    }
    let node: &'static Node = Box::leak(Box::new(Node {
        start: AtomicUsize::new(start),
        end: AtomicUsize::new(end),
        next: AtomicPtr::new(ptr::null_mut()),
    }));
    let raw = ptr::from_ref(node).cast_mut();
    let mut head = RANGES.load(Ordering::Acquire);
    loop {
        node.next.store(head, Ordering::Relaxed);
        match RANGES.compare_exchange_weak(head, raw, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Registration(node),
            Err(current) => head = current,
        }
    }
}

fn nodes() -> impl Iterator<Item = &'static Node> {
    // SAFETY: nodes are leaked, so any non-null pointer in the list stays valid.
    let get = |pointer: *mut Node| unsafe { pointer.as_ref() };
    std::iter::successors(get(RANGES.load(Ordering::Acquire)), move |node| {
        get(node.next.load(Ordering::Acquire))
    })
}

/// Installs the handler, once per process.
pub(super) fn install() -> io::Result<()> {
    match INSTALLED.get_or_init(|| try_install().err().map(|e| e.raw_os_error().unwrap_or(libc::EINVAL))) {
        None => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(*code)),
    }
}

fn try_install() -> io::Result<()> {
    type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS) {
        // SAFETY: all-zero is a valid sigaction; the calls only read and write the two local structures.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal, ptr::null(), &raw mut old) != 0 {
                return Err(io::Error::last_os_error());
            }
            let _ = previous.set(old);
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = handle as Handler as usize;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            if libc::sigaction(signal, &raw const new, ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext to an SA_SIGINFO handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as usize;
    for node in nodes() {
        let start = node.start.load(Ordering::Acquire);
        if start != 0 && (start..node.end.load(Ordering::Acquire)).contains(&rip) {
            registers[libc::REG_RIP as usize] = start as i64;
            registers[libc::REG_RCX as usize] = i64::from(signal);
            return;
        }
    }
    chain(signal, info, context);
}

/// Does what would have happened without this handler.
fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = SIGNALS.iter().position(|s| *s == signal).and_then(|i| PREVIOUS[i].get());
    let Some(previous) = previous else { return };
    match previous.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: resets the disposition; the instruction runs again on return and ends the process.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        address if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the previous owner registered this function with SA_SIGINFO, so it has this signature.
            let f: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(address) };
            f(signal, info, context);
        }
        address => {
            // SAFETY: the previous owner registered this function without SA_SIGINFO.
            let f: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(address) };
            f(signal);
        }
    }
}
