//! The helper thread of one device: takes queues that a vCPU should not wait for, and waits for doorbells.
//!
//! It starts with the first such queue or doorbell, so a device that never needs it costs no thread.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use atoll_foundation::{EventFd, EventLoop, EventLoopHandle, Interest, threads};

use super::Core;
use crate::lock;

#[derive(Default)]
struct State {
    thread: Option<(JoinHandle<()>, EventLoopHandle)>,
    stopped: bool,
}

/// Starts and ends the thread.
#[derive(Default)]
pub(crate) struct Worker {
    state: Mutex<State>,
    /// Queues that wait for the thread.
    queued: Arc<Mutex<BTreeSet<u16>>>,
}

impl Worker {
    /// The thread's loop, which starts now if it has not yet. `None` once it has been stopped.
    fn running(&self, name: &str) -> io::Result<Option<EventLoopHandle>> {
        let mut state = lock(&self.state);
        if state.stopped {
            return Ok(None);
        }
        if let Some((_, handle)) = &state.thread {
            return Ok(Some(handle.clone()));
        }
        let mut events = EventLoop::new()?;
        let handle = events.handle();
        let run = move || {
            if let Err(error) = events.run() {
                atoll_foundation::log_limited!(error, "the thread of a virtio device ended: {error}");
            }
        };
        state.thread = Some((threads::spawn(name, run)?, handle.clone()));
        Ok(Some(handle))
    }

    /// Has the thread process queue `index` of `core`. Fails when the thread cannot be started.
    pub(crate) fn submit(&self, core: &Weak<Core>, name: &str, index: u16) -> io::Result<()> {
        let Some(events) = self.running(name)? else { return Ok(()) };
        if lock(&self.queued).insert(index) {
            let (core, queued) = (core.clone(), self.queued.clone());
            events.post(move || {
                lock(&queued).remove(&index);
                if let Some(core) = core.upgrade() {
                    core.run_through_gate(index);
                }
            });
        }
        Ok(())
    }

    /// Has the thread process queue `index` of `core` whenever `event` is signalled. Fails when the host lacks a
    /// thread or memory for it.
    pub(crate) fn watch(
        &self,
        core: &Weak<Core>,
        name: &str,
        index: u16,
        event: &Arc<EventFd>,
    ) -> io::Result<()> {
        let Some(events) = self.running(name)? else { return Ok(()) };
        let (core, signals) = (core.clone(), event.clone());
        events.register(event.clone(), Interest::READ, move |_| {
            // First take the signals, then look at the queue: what comes after is signalled again.
            signals.drain();
            if let Some(core) = core.upgrade() {
                core.rung(index);
            }
        })?;
        Ok(())
    }

    /// Ends the thread and waits for it, unless this is it.
    pub(crate) fn stop(&self) {
        let thread = {
            let mut state = lock(&self.state);
            state.stopped = true;
            state.thread.take()
        };
        if let Some((thread, events)) = thread {
            events.stop();
            if thread.thread().id() != std::thread::current().id() {
                // A panic of the thread was reported when it happened.
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}
