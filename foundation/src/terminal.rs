//! The terminal: raw mode that is undone on every way out, and the window's size.
//!
//! [`RawMode`] switches a terminal so that every key reaches the program at once and unchanged (no echo, no line
//! editing, no signals from Ctrl-C, no output processing: a new line must be written as `\r\n`). The settings
//! from before come back when
//!
//! * the guard is dropped;
//! * a thread panics (a hook restores before the panic message is printed; needed because a release build
//!   aborts and drops nothing);
//! * `exit` is called anywhere (`atexit`);
//! * one of SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGABRT, SIGSEGV, SIGBUS, SIGILL or SIGFPE is about to end the
//!   process. The handler restores the terminal and the signal's earlier action, then lets the signal happen
//!   again (a fault by running the faulting instruction again), so that the exit status and an earlier
//!   handler's work stay what they were. A component that handles faults as part of its ordinary work must
//!   install its handler after raw mode is entered.
//!
//! SIGKILL cannot be caught; nothing helps there. Signals that are blocked and read through
//! [`signals`](crate::signals) never reach the handler; whoever reads them drops the guard.
//!
//! # States
//!
//! ```text
//!            enter: save settings, install handlers
//!   IDLE ------------------------------------------> ACTIVE
//!    ^                                                 |
//!    +-------------------------------------------------+
//!        drop, panic hook, atexit or signal handler: whoever changes
//!        the state to IDLE restores, so it happens exactly once
//! ```
//!
//! The saved settings are written only in IDLE under the entry lock and read only by who moved ACTIVE to IDLE.

#![allow(unsafe_code)]
// UNSAFETY: signal handlers and `atexit` have no safe form, and what they call must be async-signal-safe.

use std::cell::UnsafeCell;
use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, Once};

use crate::sync::lock;

/// Signals that end the process and before which the terminal is restored.
const FATAL_SIGNALS: [libc::c_int; 9] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGABRT,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
];

/// Columns and rows of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// The size of the terminal behind `fd`; `None` when it is no terminal or does not know its size.
pub fn window_size(fd: impl AsFd) -> Option<WindowSize> {
    let size = rustix::termios::tcgetwinsize(fd).ok()?;
    if size.ws_col == 0 || size.ws_row == 0 {
        return None;
    }
    Some(WindowSize { columns: size.ws_col, rows: size.ws_row })
}

/// Whether `fd` is a terminal.
pub fn is_terminal(fd: &impl AsFd) -> bool {
    fd.as_fd().is_terminal()
}

/// Plain memory that a signal handler reads.
struct Slot<T>(UnsafeCell<MaybeUninit<T>>);

// SAFETY: access follows the state machine in the module's documentation: written while IDLE under ENTRY, read
// only by the one who won the change from ACTIVE to IDLE (SETTINGS), or after INSTALLED was published (ACTIONS).
unsafe impl<T> Sync for Slot<T> {}

impl<T> Slot<T> {
    const fn empty() -> Self {
        Self(UnsafeCell::new(MaybeUninit::uninit()))
    }
}

/// Serialises entering and leaving.
static ENTRY: Mutex<()> = Mutex::new(());
/// ACTIVE or IDLE.
static ACTIVE: AtomicBool = AtomicBool::new(false);
/// The descriptor to restore; open while ACTIVE.
static TERMINAL: AtomicI32 = AtomicI32::new(-1);
/// The settings to restore.
static SETTINGS: Slot<libc::termios> = Slot::empty();
/// The actions of [`FATAL_SIGNALS`] from before, valid while INSTALLED.
static ACTIONS: Slot<[libc::sigaction; FATAL_SIGNALS.len()]> = Slot::empty();
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// A terminal in raw mode; see the module's documentation. One at a time in a process.
#[derive(Debug)]
pub struct RawMode {
    /// Keeps open what TERMINAL names.
    _terminal: OwnedFd,
}

impl RawMode {
    /// Puts the terminal behind `fd` into raw mode. Fails with `ResourceBusy` when another guard is alive and
    /// with the kernel's error (`ENOTTY`) when `fd` is no terminal; nothing is changed then.
    pub fn enter(fd: impl AsFd) -> io::Result<Self> {
        let _entry = lock(&ENTRY);
        if TERMINAL.load(Ordering::Acquire) != -1 {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "a terminal is in raw mode already"));
        }
        let terminal = fd.as_fd().try_clone_to_owned()?;
        let mut settings = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the descriptor is open and the pointer is to writable memory of the right type.
        if unsafe { libc::tcgetattr(terminal.as_raw_fd(), settings.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: tcgetattr succeeded, so it filled the structure.
        let settings = unsafe { settings.assume_init() };
        let mut raw = settings;
        // SAFETY: cfmakeraw only changes the structure it is given.
        unsafe { libc::cfmakeraw(&mut raw) };

        install_process_hooks();
        // SAFETY: the state is IDLE and ENTRY is held, so nobody reads the slot.
        unsafe { (*SETTINGS.0.get()).write(settings) };
        TERMINAL.store(terminal.as_raw_fd(), Ordering::Release);
        install_handlers();
        ACTIVE.store(true, Ordering::Release);
        // From here on whatever happens restores; setting comes last so that no moment is unprotected.
        if let Err(error) = set_attributes(terminal.as_raw_fd(), &raw) {
            leave();
            return Err(error);
        }
        Ok(Self { _terminal: terminal })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _entry = lock(&ENTRY);
        leave();
    }
}

/// ACTIVE to IDLE in the ordinary way. ENTRY is held.
fn leave() {
    restore();
    remove_handlers();
    TERMINAL.store(-1, Ordering::Release);
}

/// Restores the settings if the state is ACTIVE. Async-signal-safe.
fn restore() {
    if ACTIVE.swap(false, Ordering::AcqRel) {
        // SAFETY: this call won the change to IDLE; the slot was written before ACTIVE was published, and is
        // not written again before TERMINAL is -1, which happens after this on every path that goes on.
        let settings = unsafe { (*SETTINGS.0.get()).assume_init_ref() };
        let _ = set_attributes(TERMINAL.load(Ordering::Acquire), settings);
    }
}

/// Sets the terminal's settings at once, also from the background, where the kernel would otherwise stop the
/// process with SIGTTOU. Async-signal-safe.
fn set_attributes(terminal: libc::c_int, settings: &libc::termios) -> io::Result<()> {
    let mut block = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the sets are writable memory of the right type and sigemptyset initialises `block`; all calls are
    // async-signal-safe; pthread_sigmask fills `before` (it cannot fail with SIG_BLOCK and valid pointers).
    let result = unsafe {
        libc::sigemptyset(block.as_mut_ptr());
        libc::sigaddset(block.as_mut_ptr(), libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, block.as_ptr(), before.as_mut_ptr());
        let result = libc::tcsetattr(terminal, libc::TCSANOW, settings);
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
        result
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Once in a process: the panic hook and `atexit`. They do nothing in IDLE.
fn install_process_hooks() {
    static HOOKS: Once = Once::new();
    extern "C" fn at_exit() {
        restore();
    }
    HOOKS.call_once(|| {
        // SAFETY: `at_exit` is a function without preconditions that does not unwind.
        unsafe { libc::atexit(at_exit) };
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
    });
}

/// Signals that an instruction causes; the kernel's come again when the handler returns to that instruction.
fn is_fault(signal: libc::c_int, info: &libc::siginfo_t) -> bool {
    matches!(signal, libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE) && info.si_code > 0
}

extern "C" fn on_fatal_signal(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    restore();
    if !INSTALLED.load(Ordering::Acquire) {
        return;
    }
    for (index, number) in FATAL_SIGNALS.iter().enumerate() {
        if *number == signal {
            // SAFETY: INSTALLED was published after the slot was written. sigaction and raise are
            // async-signal-safe. The kernel gives a valid `info` to a handler with SA_SIGINFO. The signal is
            // blocked inside its handler, so the raised one arrives, with its earlier action, when this
            // handler returns.
            unsafe {
                let actions = (*ACTIONS.0.get()).assume_init_ref();
                libc::sigaction(signal, &actions[index], std::ptr::null_mut());
                if !is_fault(signal, &*info) {
                    libc::raise(signal);
                }
            }
        }
    }
}

/// The handler as the number that the kernel wants.
fn handler() -> libc::sighandler_t {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fatal_signal;
    handler as libc::sighandler_t
}

/// Installs the handler for signals that would otherwise end the process. ENTRY is held.
fn install_handlers() {
    // SAFETY: a zeroed sigaction is a valid value (default action, empty mask, no flags).
    let mut actions: [libc::sigaction; FATAL_SIGNALS.len()] = unsafe { std::mem::zeroed() };
    for (signal, before) in FATAL_SIGNALS.iter().zip(actions.iter_mut()) {
        // SAFETY: querying an action writes only to the structure given.
        unsafe { libc::sigaction(*signal, std::ptr::null(), before) };
    }
    // SAFETY: ENTRY is held and INSTALLED is false, so nobody reads the slot.
    unsafe { (*ACTIONS.0.get()).write(actions) };
    INSTALLED.store(true, Ordering::Release);
    for (signal, before) in FATAL_SIGNALS.iter().zip(actions.iter()) {
        // An ignored signal (nohup) stays ignored.
        if before.sa_sigaction == libc::SIG_IGN {
            continue;
        }
        // SAFETY: a zeroed sigaction is a valid value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler();
        // The alternate stack, where there is one, keeps a stack overflow's handler working.
        action.sa_flags = libc::SA_ONSTACK | libc::SA_SIGINFO;
        // SAFETY: the handler only calls async-signal-safe functions.
        unsafe { libc::sigaction(*signal, &action, std::ptr::null_mut()) };
    }
}

/// Puts the earlier actions back where the handler is still ours. ENTRY is held.
fn remove_handlers() {
    // SAFETY: install_handlers wrote the slot; ENTRY is held, so nobody writes it.
    let actions = unsafe { *(*ACTIONS.0.get()).assume_init_ref() };
    for (signal, before) in FATAL_SIGNALS.iter().zip(actions.iter()) {
        // SAFETY: a zeroed sigaction is a valid value, and the calls only read and write the given structures.
        unsafe {
            let mut now: libc::sigaction = std::mem::zeroed();
            libc::sigaction(*signal, std::ptr::null(), &mut now);
            if now.sa_sigaction == handler() {
                libc::sigaction(*signal, before, std::ptr::null_mut());
            }
        }
    }
    INSTALLED.store(false, Ordering::Release);
}

#[cfg(test)]
#[path = "terminal_tests.rs"]
mod tests;
