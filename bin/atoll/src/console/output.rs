//! What the guest prints, on its way to a terminal that may be slow.
//!
//! vCPU threads append to a bounded buffer and one thread writes it out. While the buffer is full a vCPU that
//! prints waits, as a serial line makes a fast sender wait; a reader that went away makes nobody wait.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most bytes that wait to be written: a guest cannot make us hold more.
const MAX_BUFFERED: usize = 256 * 1024;

#[derive(Default)]
struct State {
    buffer: VecDeque<u8>,
    /// The writer holds bytes that it has not written yet.
    busy: bool,
    /// Nothing more is taken: the reader went away, or the run is over.
    closed: bool,
}

/// The buffer and its writer thread.
pub(crate) struct Output {
    state: Mutex<State>,
    /// Signalled on every change of the state.
    changed: Condvar,
}

impl Output {
    /// Starts a thread that writes to `target`.
    pub(crate) fn start(target: impl Write + Send + 'static) -> std::io::Result<Arc<Self>> {
        let output = Arc::new(Self { state: Mutex::default(), changed: Condvar::new() });
        let writer = output.clone();
        atoll_foundation::threads::spawn("console", move || writer.pump(target))?;
        Ok(output)
    }

    /// Appends `data`; waits while the buffer is full.
    pub(crate) fn write(&self, data: &[u8]) {
        let mut state = self.lock();
        for part in data.chunks(MAX_BUFFERED) {
            while !state.closed && state.buffer.len() + part.len() > MAX_BUFFERED {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closed {
                return;
            }
            state.buffer.extend(part);
            self.changed.notify_all();
        }
    }

    /// Waits until everything is written, at most `patience`, then closes.
    pub(crate) fn finish(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        while !state.closed && (state.busy || !state.buffer.is_empty()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.closed = true;
        self.changed.notify_all();
    }

    fn pump(&self, mut target: impl Write) {
        loop {
            let mut state = self.lock();
            while state.buffer.is_empty() {
                if state.closed {
                    return;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let batch: Vec<u8> = state.buffer.drain(..).collect();
            state.busy = true;
            drop(state);
            let result = target.write_all(&batch).and_then(|()| target.flush());
            let mut state = self.lock();
            state.busy = false;
            if result.is_err() {
                state.closed = true;
                state.buffer.clear();
            }
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Slow(Arc<Mutex<Vec<u8>>>);
    impl Write for Slow {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            std::thread::sleep(Duration::from_millis(1));
            let n = data.len().min(50_000);
            self.0.lock().unwrap().extend_from_slice(&data[..n]);
            Ok(n)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_is_written_in_order_through_a_slow_terminal() {
        let slow = Slow::default();
        let output = Output::start(slow.clone()).unwrap();
        let data: Vec<u8> = (0..3_000_000u32).map(|i| i as u8).collect();
        for part in data.chunks(999_983) {
            output.write(part);
        }
        output.finish(Duration::from_secs(30));
        assert!(*slow.0.lock().unwrap() == data);
    }

    #[test]
    fn a_reader_that_went_away_makes_nobody_wait() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _data: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let output = Output::start(Gone).unwrap();
        output.write(&vec![0; 10 * MAX_BUFFERED]);
        output.finish(Duration::from_secs(30));
    }
}
