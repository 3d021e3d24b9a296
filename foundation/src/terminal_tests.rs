//! Raw mode on a pseudo terminal. Ways out that end the process are tried in a forked-off copy of this test
//! program, which runs the ignored test `child` and is told by an environment variable how to end.

use super::*;
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

const HOW: &str = "ATOLL_TEST_TERMINAL_CHILD";

/// Raw mode is one per process: tests take turns.
static TURN: Mutex<()> = Mutex::new(());

/// Both ends of a new pseudo terminal: controlling side, terminal side.
fn pseudo_terminal() -> (OwnedFd, File) {
    let (mut near, mut far) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: openpty fills both descriptors; name, settings and size are optional.
    let result = unsafe { libc::openpty(&mut near, &mut far, null, null.cast(), null.cast()) };
    assert_eq!(result, 0);
    // SAFETY: both descriptors are new and owned by nobody else.
    unsafe {
        use std::os::fd::FromRawFd;
        (OwnedFd::from_raw_fd(near), File::from_raw_fd(far))
    }
}

fn is_raw(terminal: &File) -> bool {
    let modes = rustix::termios::tcgetattr(terminal).unwrap();
    let (local, output) = (modes.local_modes, modes.output_modes);
    let cooked = local.contains(rustix::termios::LocalModes::ICANON);
    assert_eq!(cooked, output.contains(rustix::termios::OutputModes::OPOST), "half changed");
    !cooked
}

#[test]
fn dropping_the_guard_restores_and_it_can_be_entered_again() {
    let _turn = lock(&TURN);
    let (_near, terminal) = pseudo_terminal();
    assert!(is_terminal(&terminal) && !is_raw(&terminal));
    for _ in 0..2 {
        let guard = RawMode::enter(&terminal).unwrap();
        assert!(is_raw(&terminal));
        let busy = RawMode::enter(&terminal).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
        drop(guard);
        assert!(!is_raw(&terminal));
    }
}

#[test]
fn what_is_no_terminal_is_refused_and_leaves_no_trace() {
    let _turn = lock(&TURN);
    let file = tempfile::tempfile().unwrap();
    assert!(!is_terminal(&file));
    assert_eq!(RawMode::enter(&file).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    let (_near, terminal) = pseudo_terminal();
    drop(RawMode::enter(&terminal).unwrap());
}

#[test]
fn the_window_size_is_what_was_set() {
    let (near, terminal) = pseudo_terminal();
    assert_eq!(window_size(&terminal), None, "a new pseudo terminal has no size");
    let size = rustix::termios::Winsize { ws_row: 24, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&near, size).unwrap();
    assert_eq!(window_size(&terminal), Some(WindowSize { columns: 132, rows: 24 }));
    assert_eq!(window_size(tempfile::tempfile().unwrap()), None);
}

/// Runs this test program's `child` with a terminal as its standard input; returns how it ended and whether
/// the terminal was restored.
fn run_child(how: &str) -> (std::process::ExitStatus, bool) {
    let (_near, terminal) = pseudo_terminal();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "terminal::tests::child", "--ignored", "--nocapture"]).env(HOW, how);
    command.stdin(terminal.try_clone().unwrap()).stdout(Stdio::null()).stderr(Stdio::null());
    command.process_group(0);
    let status = command.status().unwrap();
    (status, !is_raw(&terminal))
}

#[test]
#[ignore = "the other half of the tests below, which run it in a process of its own"]
fn child() {
    let Ok(how) = std::env::var(HOW) else { return };
    // SAFETY: setrlimit reads a valid structure; no core file is wanted.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
    // A test runner in a shell's background has SIGINT and SIGQUIT ignored, and its children inherit that.
    let action = if how == "ignored" { libc::SIG_IGN } else { libc::SIG_DFL };
    for signal in [libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: sets a disposition without a handler.
        unsafe { libc::signal(signal, action) };
    }
    let guard = RawMode::enter(io::stdin()).unwrap();
    assert!(is_raw(&File::from(io::stdin().as_fd().try_clone_to_owned().unwrap())));
    match how.as_str() {
        "exit" => std::process::exit(7),
        "ignored" => {
            // SAFETY: sends a signal to this process.
            unsafe { libc::kill(libc::getpid(), libc::SIGINT) };
            drop(guard);
            std::process::exit(5);
        }
        "abort" => std::process::abort(),
        "panic" => {
            // The hook must do it, not the guard.
            std::mem::forget(guard);
            let _ = std::thread::spawn(|| panic!("on purpose")).join();
            // SAFETY: _exit ends the process at once, without atexit.
            unsafe { libc::_exit(9) };
        }
        "11" => {
            let guarded = crate::Mapping::anonymous(4096, crate::mapping::Protection::None).unwrap();
            // SAFETY: not memory that may be written: the fault is what this process is for.
            unsafe { guarded.as_ptr().write_volatile(1) };
        }
        "7" => {
            use crate::mapping::{Protection, Sharing};
            let file = tempfile::tempfile().unwrap();
            let empty = crate::Mapping::of_fd(file, 0, 4096, Sharing::Shared, Protection::ReadWrite).unwrap();
            // SAFETY: beyond the end of the file: the fault is what this process is for.
            unsafe { empty.as_ptr().write_volatile(1) };
        }
        number => {
            let signal: libc::c_int = number.parse().unwrap();
            // SAFETY: sends a signal to this process.
            unsafe { libc::kill(libc::getpid(), signal) };
            std::thread::sleep(std::time::Duration::from_secs(10));
        }
    }
}

#[test]
fn exit_restores() {
    let (status, restored) = run_child("exit");
    assert_eq!(status.code(), Some(7));
    assert!(restored);
}

#[test]
fn a_signal_that_was_ignored_stays_ignored() {
    let (status, restored) = run_child("ignored");
    assert_eq!((status.code(), restored), (Some(5), true));
}

#[test]
fn a_panic_restores_before_anything_is_dropped() {
    let (status, restored) = run_child("panic");
    assert_eq!(status.code(), Some(9));
    assert!(restored);
}

#[test]
fn fatal_signals_restore_and_still_kill_with_their_number() {
    for signal in FATAL_SIGNALS {
        let (status, restored) = run_child(&signal.to_string());
        assert_eq!(status.signal(), Some(signal));
        assert!(restored, "signal {signal}");
    }
    let (status, restored) = run_child("abort");
    assert_eq!((status.signal(), restored), (Some(libc::SIGABRT), true));
}
