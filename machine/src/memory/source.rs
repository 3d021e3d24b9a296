//! Stores that do not look at page flags: what a hypervisor's guest does, and how dirty logs learn of it.
//!
//! A guest on the software CPU looks at a page's flags after every store (see [`super::RamBlock`]). A guest that
//! runs on the processor itself does not: the host's kernel finds its stores out, by write protection or by a
//! hardware log, and only while somebody asks for it, because that slows the guest down. A backend of that kind
//! registers a [`DirtySource`] with every block that its guest can store to.
//!
//! ```text
//!                       first reader                    last reader dropped
//!     not logging ──────────────────────► logging ──────────────────────────► not logging
//!                    source.start()          │            source.stop()
//!                                            └─ DirtyReader::take ─► source.collect() ─► RamBlock::mark_stored
//! ```
//!
//! Without a reader no source does anything: the state in which a machine spends its life costs nothing.
//!
//! Lock order: the block's list of sources, then the source's own lock. A `take` calls `collect` without the
//! former, so that readers come and go while it takes its time.

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use super::RamBlock;

/// Finds out stores to [`RamBlock`]s that nobody notes. Implemented by backends.
///
/// What the source owes is one sentence: a store to a page of a block that is being logged, made after
/// [`DirtySource::start`] returned, is reported by [`RamBlock::mark_stored`] during the next
/// [`DirtySource::collect`] at the latest, if the thread that stored had left the guest before that call; and at
/// the latest by the first one after it left otherwise. A page that is reported must from then on be watched
/// again: watch first, report after, so that whoever reads the page after the report sees every store that will
/// not be reported again.
pub trait DirtySource: Send + Sync {
    /// The first reader of `block` is about to appear: log stores from now on.
    fn start(&self, block: &Arc<RamBlock>);
    /// The last reader of `block` is gone: nobody wants the stores any more.
    fn stop(&self, block: &Arc<RamBlock>);
    /// Reports what was stored to since the last report, of `block` and of any other block that comes to light.
    fn collect(&self, block: &Arc<RamBlock>);
}

#[derive(Default)]
struct State {
    list: Vec<Weak<dyn DirtySource>>,
    readers: usize,
}

impl State {
    fn alive(&self) -> Vec<Arc<dyn DirtySource>> {
        self.list.iter().filter_map(Weak::upgrade).collect()
    }
}

/// The sources of one block, and how many readers they work for.
#[derive(Default)]
pub(super) struct Sources(Mutex<State>);

impl Sources {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of a source leaves the list and the count as they were.
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Adds a source, which starts at once if there are readers. A second registration is ignored.
    pub(super) fn add(&self, block: &Arc<RamBlock>, source: &Arc<dyn DirtySource>) {
        let mut state = self.lock();
        state.list.retain(|s| s.strong_count() > 0);
        if state.list.iter().any(|s| std::ptr::addr_eq(s.as_ptr(), Arc::as_ptr(source))) {
            return;
        }
        state.list.push(Arc::downgrade(source));
        if state.readers > 0 {
            source.start(block);
        }
    }

    /// One more reader. The sources are logging before `publish` makes the reader known, and what they have found
    /// until then belongs to the other readers only.
    pub(super) fn reader_comes(&self, block: &Arc<RamBlock>, publish: impl FnOnce()) {
        let mut state = self.lock();
        match state.readers {
            0 => state.alive().iter().for_each(|s| s.start(block)),
            _ => state.alive().iter().for_each(|s| s.collect(block)),
        }
        state.readers += 1;
        publish();
    }

    /// One reader less; it is not known any more.
    pub(super) fn reader_goes(&self, block: &Arc<RamBlock>) {
        let mut state = self.lock();
        state.readers = state.readers.saturating_sub(1);
        if state.readers == 0 {
            state.alive().iter().for_each(|s| s.stop(block));
        }
    }

    /// Has every source report.
    pub(super) fn collect(&self, block: &Arc<RamBlock>) {
        let alive = self.lock().alive();
        alive.iter().for_each(|s| s.collect(block));
    }
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
