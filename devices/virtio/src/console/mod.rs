//! The console (VIRTIO 1.2, section 5.3): one port, `hvc0` in Linux.
//!
//! ```text
//! guest --queue 1--> output sink            host --receive()--> backlog (4 KiB) --queue 0--> guest
//! resize() --> cols, rows --> configuration interrupt
//! ```
//!
//! Input that the guest has no buffers for waits in the backlog. When that is full [`Console::receive`] takes
//! nothing more, and the function given to [`Console::on_space`] is called once there is room again.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use atoll_machine::inputs::{InputGate, InputKind};
use prost::Message;

use crate::device::{DeviceHandle, DeviceKind, RestoreError, VirtioDevice, read_bytes_at};
use crate::lock;
use crate::queue::{Progress, QueueError, QueueRun, Step};

pub mod metrics;
pub mod saved_state;
#[cfg(test)]
mod tests;

use metrics::ConsoleMetrics;
use saved_state::ConsoleStateV1;

/// Bytes of input that wait for the guest.
pub const BACKLOG_BYTES: usize = 4096;
/// Most bytes of output in one buffer; Linux sends at most a few pages. The rest is dropped and counted, so that
/// overlapping descriptors cannot make one request last for seconds.
pub const MAX_OUTPUT_BYTES: u64 = 1 << 20;
/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 64;

/// Queue with buffers for input.
const RECEIVE: u16 = 0;
/// Queue with output.
const TRANSMIT: u16 = 1;
/// Bytes copied at once.
const CHUNK: usize = 4096;

/// Feature: the configuration has the window size.
const F_SIZE: u64 = 1 << 0;
/// Feature: single bytes can be written through the configuration space.
const F_EMERG_WRITE: u64 = 1 << 2;
/// Offset of `emerg_wr` in the configuration space.
const EMERG_WR: u64 = 8;

/// Takes the guest's output. It must not block for long: a vCPU waits for it.
pub type OutputSink = Arc<dyn Fn(&[u8]) + Send + Sync>;
/// Called when the backlog was full and has room again.
pub type SpaceCallback = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct State {
    backlog: VecDeque<u8>,
    columns: u16,
    rows: u16,
    /// Set while the driver is there.
    handle: DeviceHandle,
    /// The driver has been told the size since it started.
    size_announced: bool,
    /// Somebody was refused and waits for room.
    refused: bool,
    on_space: Option<SpaceCallback>,
}

struct Inner {
    state: Mutex<State>,
    /// Bytes in the backlog and on their way through the input gate.
    claimed: AtomicUsize,
    metrics: ConsoleMetrics,
}

/// A console with one port.
pub struct Console {
    inner: Arc<Inner>,
    output: OutputSink,
    inputs: Arc<InputGate>,
}

impl Console {
    /// A console whose output goes to `output`. `size` is the window: columns, rows; zeros if unknown.
    pub fn new(output: OutputSink, size: (u16, u16), inputs: Arc<InputGate>) -> Arc<Self> {
        let state = State { columns: size.0, rows: size.1, ..State::default() };
        let inner = Inner {
            state: Mutex::new(state),
            claimed: AtomicUsize::new(0),
            metrics: ConsoleMetrics::default(),
        };
        Arc::new(Self { inner: Arc::new(inner), output, inputs })
    }

    /// Sets the function that is called when [`Console::receive`] refused bytes and there is room again. It runs
    /// on a thread of the guest, so it should only wake somebody.
    pub fn on_space(&self, callback: SpaceCallback) {
        lock(&self.inner.state).on_space = Some(callback);
    }

    /// Takes input for the guest. Returns how many bytes were taken; offer the rest again later.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let claim = |claimed: usize| Some(claimed + bytes.len().min(BACKLOG_BYTES.saturating_sub(claimed)));
        let Ok(before) = self.inner.claimed.try_update(Ordering::SeqCst, Ordering::SeqCst, claim) else {
            return 0;
        };
        let taken = bytes.len().min(BACKLOG_BYTES.saturating_sub(before));
        if taken < bytes.len() {
            lock(&self.inner.state).refused = true;
            // Room may have come between the claim and the mark: then nobody else will tell.
            self.inner.tell_space();
        }
        if taken > 0 {
            let (inner, bytes) = (self.inner.clone(), bytes[..taken].to_vec());
            self.inputs.deliver(InputKind::Console, move || inner.push(&bytes));
        }
        taken
    }

    /// Bytes that [`Console::receive`] would take now.
    pub fn space(&self) -> usize {
        BACKLOG_BYTES.saturating_sub(self.inner.claimed.load(Ordering::SeqCst))
    }

    /// Tells the guest that its window has another size, in characters.
    pub fn resize(&self, columns: u16, rows: u16) {
        let inner = self.inner.clone();
        self.inputs.deliver(InputKind::Console, move || {
            let mut state = lock(&inner.state);
            if (state.columns, state.rows) == (columns, rows) {
                return;
            }
            (state.columns, state.rows) = (columns, rows);
            let handle = state.handle.clone();
            drop(state);
            ConsoleMetrics::add(&inner.metrics.resizes, 1);
            handle.config_changed();
        });
    }

    /// Counters.
    pub fn metrics(&self) -> &ConsoleMetrics {
        &self.inner.metrics
    }

    /// Gives the guest what waits, as far as it has buffers.
    fn process_receive(&self, run: &mut QueueRun<'_>) -> Result<Progress, QueueError> {
        loop {
            if lock(&self.inner.state).backlog.is_empty() {
                // Buffers that the driver adds now are of no interest until there is input.
                run.disable_notification()?;
                return Ok(Progress::Done);
            }
            if run.exhausted() {
                return Ok(Progress::More);
            }
            let Some(mut chain) = run.pop()? else {
                if run.enable_notification()? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            let written = self.inner.fill(&mut chain.writable);
            run.push_used(chain.head(), written)?;
            self.inner.tell_space();
        }
    }

    fn process_transmit(&self, run: &mut QueueRun<'_>) -> Result<Progress, QueueError> {
        run.pump(|chain, _inline| {
            self.inner.announce_size();
            let total = chain.readable.remaining();
            let mut rest = total.min(MAX_OUTPUT_BYTES);
            ConsoleMetrics::add(&self.inner.metrics.output_bytes, rest);
            ConsoleMetrics::add(&self.inner.metrics.dropped_output_bytes, total - rest);
            let mut bytes = [0; CHUNK];
            while rest > 0 {
                let n = rest.min(CHUNK as u64) as usize;
                chain.readable.read(&mut bytes[..n]);
                (self.output)(&bytes[..n]);
                rest -= n as u64;
            }
            Ok(Step::Done(0))
        })
    }
}

impl Inner {
    /// Linux reads the size of a console without multiport only when the configuration changes, and forgets a
    /// change from before its console exists. The first output shows that it does.
    fn announce_size(&self) {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.size_announced, true) || (state.columns, state.rows) == (0, 0) {
            return;
        }
        let handle = state.handle.clone();
        drop(state);
        handle.config_changed();
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        state.backlog.extend(bytes);
        let handle = state.handle.clone();
        drop(state);
        handle.kick(RECEIVE);
    }

    /// Moves input from the backlog into `to`. Returns the number of bytes.
    fn fill(&self, to: &mut crate::queue::Buffers<'_>) -> u32 {
        let mut state = lock(&self.state);
        let (front, back) = state.backlog.as_slices();
        let mut written = to.write(front);
        if written == front.len() {
            written += to.write(back);
        }
        state.backlog.drain(..written);
        self.claimed.fetch_sub(written, Ordering::SeqCst);
        ConsoleMetrics::add(&self.metrics.input_bytes, written as u64);
        written as u32
    }

    /// Tells whoever was refused that there is room.
    fn tell_space(&self) {
        let callback = {
            let mut state = lock(&self.state);
            if !state.refused || self.claimed.load(Ordering::SeqCst) >= BACKLOG_BYTES {
                return;
            }
            state.refused = false;
            state.on_space.clone()
        };
        if let Some(callback) = callback {
            callback();
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_SIZE | F_EMERG_WRITE
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        let state = lock(&self.inner.state);
        config[..2].copy_from_slice(&state.columns.to_le_bytes());
        config[2..4].copy_from_slice(&state.rows.to_le_bytes());
        config[4..8].copy_from_slice(&1u32.to_le_bytes());
        drop(state);
        read_bytes_at(&config, offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        if offset == EMERG_WR
            && let Some(byte) = data.first()
        {
            ConsoleMetrics::add(&self.inner.metrics.output_bytes, 1);
            (self.output)(&[*byte]);
        }
    }

    fn activate(&self, _features: u64, handle: &DeviceHandle) {
        let mut state = lock(&self.inner.state);
        state.handle = handle.clone();
        state.size_announced = false;
    }

    fn reset(&self) {
        // The backlog stays: what was typed while a kernel starts is for whoever opens the console next.
        lock(&self.inner.state).handle = DeviceHandle::default();
    }

    fn process_queue(&self, index: u16, run: &mut QueueRun<'_>) -> Result<Progress, QueueError> {
        match index {
            RECEIVE => self.process_receive(run),
            TRANSMIT => self.process_transmit(run),
            _ => Ok(Progress::Done),
        }
    }

    fn save(&self) -> Vec<u8> {
        let state = lock(&self.inner.state);
        let saved = ConsoleStateV1 {
            columns: Some(u32::from(state.columns)),
            rows: Some(u32::from(state.rows)),
            backlog: Some(state.backlog.iter().copied().collect()),
        };
        saved.encode_to_vec()
    }

    fn restore(&self, state: &[u8]) -> Result<(), RestoreError> {
        let saved = ConsoleStateV1::decode(state)
            .map_err(|source| RestoreError::Decode { device: "virtio-console", source })?;
        let mut state = lock(&self.inner.state);
        state.columns = saved.columns.unwrap_or(0) as u16;
        state.rows = saved.rows.unwrap_or(0) as u16;
        let before = state.backlog.len();
        state.backlog = saved.backlog.unwrap_or_default().into_iter().take(BACKLOG_BYTES).collect();
        let claimed = self.inner.claimed.load(Ordering::SeqCst) - before + state.backlog.len();
        self.inner.claimed.store(claimed, Ordering::SeqCst);
        Ok(())
    }
}
