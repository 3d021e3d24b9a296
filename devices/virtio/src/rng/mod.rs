//! The entropy device (VIRTIO 1.2, section 5.4): one queue whose buffers are filled with random bytes.
//!
//! The bytes come through the machine's input gate, so that a recorded run can be repeated.

use std::sync::Arc;

use atoll_machine::inputs::InputGate;
use prost::Message;

use crate::device::{DeviceHandle, DeviceKind, RestoreError, VirtioDevice};
use crate::queue::{Progress, QueueError, QueueRun, Step};

pub mod metrics;
pub mod saved_state;
#[cfg(test)]
mod tests;

use metrics::RngMetrics;
use saved_state::RngStateV1;

/// Most bytes for one request. Drivers ask for tens to hundreds; the rest of a larger buffer stays as it is.
pub const MAX_REQUEST_BYTES: u64 = 64 << 10;
/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 64;
/// Bytes generated at once.
const CHUNK: usize = 1024;

/// An entropy device.
pub struct Rng {
    inputs: Arc<InputGate>,
    metrics: RngMetrics,
}

impl Rng {
    /// An entropy device that draws from `inputs`.
    pub fn new(inputs: Arc<InputGate>) -> Arc<Self> {
        Arc::new(Self { inputs, metrics: RngMetrics::default() })
    }

    /// Counters.
    pub fn metrics(&self) -> &RngMetrics {
        &self.metrics
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn config_write(&self, _offset: u64, _data: &[u8]) {}

    fn activate(&self, _features: u64, _handle: &DeviceHandle) {}

    fn reset(&self) {}

    fn process_queue(&self, _index: u16, run: &mut QueueRun<'_>) -> Result<Progress, QueueError> {
        run.pump(|chain, _inline| {
            // The driver must not offer readable buffers (5.4.6.1); they do no harm.
            let total = chain.writable.remaining().min(MAX_REQUEST_BYTES);
            let mut done = 0u64;
            while done < total {
                let n = (total - done).min(CHUNK as u64) as usize;
                let mut bytes = [0; CHUNK];
                self.inputs.random(&mut bytes[..n]);
                chain.writable.write(&bytes[..n]);
                done += n as u64;
            }
            self.metrics.count(total);
            Ok(Step::Done(total as u32))
        })
    }

    fn save(&self) -> Vec<u8> {
        RngStateV1 {}.encode_to_vec()
    }

    fn restore(&self, state: &[u8]) -> Result<(), RestoreError> {
        RngStateV1::decode(state)
            .map(|_| ())
            .map_err(|source| RestoreError::Decode { device: "virtio-rng", source })
    }
}
