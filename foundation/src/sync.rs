//! Locks without poison.
//!
//! A mutex of the standard library is *poisoned* when a thread panics while it holds it, and every later `lock`
//! answers with an error that its caller has to do something about. The product ignores poison, for two reasons:
//!
//! * What the mutexes here guard is plain values: registers, queues, tables of descriptors. Each is valid after
//!   every single assignment, so that a holder who stopped half-way leaves a state that the guest or the next
//!   caller could have made too, not a broken invariant that memory safety hangs on.
//! * The other answer, a panic, would spread: one device's fault would take down each thread that comes by
//!   afterwards, in the end the machine with all its other devices, and would hide the first panic behind many.
//!
//! Data whose halves must change together does not belong behind [`lock`]: build the new value first and assign it
//! whole, or handle the poison where it shows.
//!
//! Neighbours: every layer above uses it. It takes one lock and calls nothing while holding it; each module that
//! keeps several writes down their order itself.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, waiting for its holder; see the module's documentation for why poison is ignored.
///
/// Like [`Mutex::lock`] it may panic or never return if the calling thread holds the lock already.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_panicking_holder_left_is_still_there() {
        let mutex = Mutex::new(1);
        let holder = || {
            let mut value = lock(&mutex);
            *value = 2;
            panic!("with the lock held");
        };
        assert!(std::thread::scope(|scope| scope.spawn(holder).join()).is_err());
        assert!(mutex.is_poisoned());
        assert_eq!(*lock(&mutex), 2);
    }
}
