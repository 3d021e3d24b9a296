//! The helper thread of one device: takes queues that a vCPU should not wait for.
//!
//! It starts with the first such queue, so a device that never needs it costs no thread.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::JoinHandle;

use atoll_foundation::threads;

use super::Core;
use crate::lock;

#[derive(Default)]
struct State {
    /// Queue numbers, each at most once.
    queues: VecDeque<u16>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

/// Starts and ends the thread.
#[derive(Default)]
pub(crate) struct Worker {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Worker {
    /// Has the thread process queue `index` of `core`. Fails when the thread cannot be started.
    pub(crate) fn submit(&self, core: &Weak<Core>, name: &str, index: u16) -> io::Result<()> {
        let mut thread = lock(&self.thread);
        let mut state = lock(&self.shared.state);
        if state.stop {
            return Ok(());
        }
        if thread.is_none() {
            let (core, shared) = (core.clone(), self.shared.clone());
            *thread = Some(threads::spawn(name, move || serve(&shared, &core))?);
        }
        if !state.queues.contains(&index) {
            state.queues.push_back(index);
            self.shared.wake.notify_one();
        }
        Ok(())
    }

    /// Ends the thread and waits for it, unless this is it.
    pub(crate) fn stop(&self) {
        lock(&self.shared.state).stop = true;
        self.shared.wake.notify_all();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve(shared: &Shared, core: &Weak<Core>) {
    while let Some(index) = next(shared) {
        match core.upgrade() {
            Some(core) => core.run_through_gate(index),
            None => return,
        }
    }
}

/// Waits for a queue; `None` to end.
fn next(shared: &Shared) -> Option<u16> {
    let mut state = lock(&shared.state);
    loop {
        if state.stop {
            return None;
        }
        if let Some(index) = state.queues.pop_front() {
            return Some(index);
        }
        state = shared.wake.wait(state).unwrap_or_else(|e| e.into_inner());
    }
}
