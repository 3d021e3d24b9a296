//! The helper thread of one device: takes queues that a vCPU should not wait for, waits for doorbells, and looks
//! at queues again after a time.
//!
//! It starts with the first such queue or doorbell, so a device that never needs it costs no thread.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_foundation::{EventFd, EventLoop, EventLoopHandle, Interest, TimerFd, threads};

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
    alarm: Arc<Mutex<Alarm>>,
}

/// When which queue is to be looked at again; one host timer for all, armed for the earliest.
#[derive(Default)]
struct Alarm {
    timer: Option<Arc<TimerFd>>,
    due: BTreeMap<u16, Instant>,
}

impl Alarm {
    /// Arms the timer for the earliest of what is due.
    fn arm(&self) -> io::Result<()> {
        match (&self.timer, self.due.values().min()) {
            (Some(timer), Some(at)) => timer.arm_after(at.saturating_duration_since(Instant::now())),
            _ => Ok(()),
        }
    }

    /// Takes the queues whose time has come, and arms the timer for the rest.
    fn expire(&mut self) -> io::Result<Vec<u16>> {
        let now = Instant::now();
        let over: Vec<u16> = self.due.iter().filter(|(_, at)| **at <= now).map(|(index, _)| *index).collect();
        for index in &over {
            self.due.remove(index);
        }
        self.arm()?;
        Ok(over)
    }
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

    /// Has the thread look at queue `index` of `core` after `delay`, or at the time that was asked for before if
    /// that is earlier. Fails when the host lacks a thread or memory for it.
    pub(crate) fn wake_after(
        &self,
        core: &Weak<Core>,
        name: &str,
        index: u16,
        delay: Duration,
    ) -> io::Result<()> {
        let Some(events) = self.running(name)? else { return Ok(()) };
        let mut alarm = lock(&self.alarm);
        if alarm.timer.is_none() {
            let timer = Arc::new(TimerFd::new()?);
            let (core, shared, source) = (core.clone(), self.alarm.clone(), timer.clone());
            events.register(timer.clone(), Interest::READ, move |_| {
                source.drain();
                let over = lock(&shared).expire().unwrap_or_else(|error| {
                    atoll_foundation::log_limited!(error, "cannot arm the timer of a virtio device: {error}");
                    Vec::new()
                });
                for index in over {
                    if let Some(core) = core.upgrade() {
                        core.rung(index);
                    }
                }
            })?;
            alarm.timer = Some(timer);
        }
        // A delay that no clock can hold will not be waited for.
        let Some(at) = Instant::now().checked_add(delay) else { return Ok(()) };
        let due = alarm.due.entry(index).or_insert(at);
        *due = (*due).min(at);
        alarm.arm()
    }

    /// Forgets what [`Worker::wake_after`] was asked for.
    pub(crate) fn forget_alarms(&self) {
        lock(&self.alarm).due.clear();
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

#[cfg(test)]
#[path = "alarm_tests.rs"]
mod tests;
