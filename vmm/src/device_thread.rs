//! The thread on which a machine's timers expire and its devices hear from the host.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use atoll_foundation::timerfd::TimerFd;
use atoll_foundation::{EventLoop, EventLoopHandle, Interest};
use atoll_machine::time::Timers;

use crate::error::VmError;

/// An event loop that also expires [`Timers`]. Dropping it stops and joins the thread.
pub(crate) struct DeviceThread {
    handle: EventLoopHandle,
    timers: Arc<Timers>,
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts the thread.
    pub(crate) fn start(timers: &Arc<Timers>) -> Result<Self, VmError> {
        let mut event_loop = EventLoop::new().map_err(VmError::host("cannot make the device event loop"))?;
        let handle = event_loop.handle();
        let timerfd = Arc::new(TimerFd::new().map_err(VmError::host("cannot make a host timer"))?);
        let expire = {
            // The timers own the function that wakes this thread, which owns this: a strong reference would keep all
            // of it, descriptors too, for ever.
            let (timers, timerfd) = (Arc::downgrade(timers), timerfd.clone());
            move || {
                let Some(timers) = timers.upgrade() else { return };
                let next = timers.expire();
                let delay = next.and_then(|at| timers.clock().host_delay(at));
                // Zero would disarm the host's timer.
                let armed = match delay {
                    Some(delay) => timerfd.arm_after(delay.max(Duration::from_nanos(1))),
                    None => timerfd.disarm(),
                };
                if let Err(error) = armed {
                    atoll_foundation::log_limited!(error, "cannot arm the device timer: {error}");
                }
            }
        };
        {
            let (expire, source) = (expire.clone(), timerfd.clone());
            handle
                .register(source, Interest::READ, move |_| {
                    timerfd.drain();
                    expire();
                })
                .map_err(VmError::host("cannot watch the device timer"))?;
        }
        {
            let handle = handle.clone();
            timers.set_wake(Arc::new(move || {
                let expire = expire.clone();
                handle.post(expire);
            }));
        }
        let thread = atoll_foundation::threads::spawn("devices", move || {
            if let Err(error) = event_loop.run() {
                tracing::error!("the device event loop ended: {error}");
            }
        })
        .map_err(VmError::host("cannot start the device thread"))?;
        Ok(Self { handle, timers: timers.clone(), thread: Some(thread) })
    }

    /// Waits until what the thread does at the moment is done.
    pub(crate) fn settle(&self) {
        self.handle.call(|| ());
    }

    /// Looks at the timers again: time runs again, or was set.
    pub(crate) fn look_again(&self) {
        self.timers.wake();
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
