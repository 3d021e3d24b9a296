//! A bounded pool of threads that start when there is work and end when there has been none for a while.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use atoll_foundation::sync::lock;
use atoll_foundation::threads;

/// Threads of one disk at most. Each waits in a system call most of its time, so the number bounds what the
/// device can have under way, not processors used.
const MAX_THREADS: usize = 16;

/// How long a thread without work stays.
const IDLE_TIME: Duration = Duration::from_secs(5);

pub(super) type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    stopping: bool,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    wake: Condvar,
}

/// The pool. Dropping it lets its threads finish what they were given and end.
#[derive(Default)]
pub(super) struct Pool {
    inner: Arc<Inner>,
}

impl Pool {
    /// Has a thread run `job`. Without any thread, which the host may refuse, the caller does.
    pub(super) fn run(&self, job: Job) {
        let mut state = lock(&self.inner.state);
        state.jobs.push_back(job);
        if state.idle < state.jobs.len() && state.threads < MAX_THREADS {
            let inner = self.inner.clone();
            match threads::spawn("disk-io", move || inner.work()) {
                Ok(_) => state.threads += 1,
                Err(error) if state.threads == 0 => {
                    let job = state.jobs.pop_back();
                    drop(state);
                    atoll_foundation::log_limited!(warn, "no thread for a disk, its user waits: {error}");
                    return job.into_iter().for_each(|job| job());
                }
                Err(_) => {}
            }
        }
        drop(state);
        self.inner.wake.notify_one();
    }
}

impl Inner {
    fn work(&self) {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = lock(&self.state);
                continue;
            }
            if state.stopping {
                break;
            }
            state.idle += 1;
            let (back, timeout) = self.wake.wait_timeout(state, IDLE_TIME).unwrap_or_else(|e| e.into_inner());
            state = back;
            state.idle -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.inner.state).stopping = true;
        self.inner.wake.notify_all();
    }
}
