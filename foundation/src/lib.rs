//! The lowest layer: what the host offers, wrapped so that the layers above need no `unsafe`.
//!
//! Nothing here knows what a virtual machine is. The modules fall in these groups:
//!
//! * **waiting**: [`event_loop`] (epoll on one thread, callbacks, posted closures), [`eventfd`], [`timerfd`],
//!   [`signals`] (signals as a readable descriptor);
//! * **memory and files**: [`memfd`], [`mapping`], [`shared_memory`] (written to by two processes), [`file_lock`],
//!   [`volatile_io`] (vectored file transfers from and to memory that other threads may be changing meanwhile);
//! * **the process and its surroundings**: [`terminal`], [`threads`], [`host`], [`jail`], [`allocator`];
//! * **logging**: [`ratelimit`] and the macro [`log_limited!`];
//! * **locks**: [`sync`] (mutexes whose poison is ignored);
//! * **limits**: [`throttle`] (operations and bytes per second);
//! * **sockets**: [`tcp_socket`] (peeking, discarding and queue lengths of TCP sockets), [`tun`] (tap devices).
//!
//! # Lock order
//!
//! Few modules hold locks. `uring` and `throttle`: see there. `event_loop`: the source table, then one source's
//! callback; neither is held while the queue of posted closures is locked, and no lock but a source's own callback
//! is held while a callback runs. `terminal`: one lock serialising entry and exit of raw mode; nothing else is taken under it.
//!
//! # Unsafe code
//!
//! Denied except in the modules that call the kernel without a safe wrapper: `mapping`, `terminal`, `signals`,
//! `file_lock`, `shared_memory`, `tcp_socket`, `tun`, `volatile_io`, `allocator`, `host::kvm`, `host::rights` and
//! `jail`. Each says why at its top.

pub mod allocator;
pub mod event_loop;
pub mod eventfd;
pub mod file_lock;
pub mod host;
pub mod jail;
pub mod mapping;
pub mod memfd;
pub mod ratelimit;
pub mod shared_memory;
pub mod signals;
pub mod sync;
pub mod tcp_socket;
pub mod terminal;
pub mod threads;
pub mod throttle;
pub mod timerfd;
pub mod tun;
pub mod uring;
pub mod volatile_io;

pub use event_loop::{EventLoop, EventLoopHandle, Interest, Readiness, SourceToken};
pub use eventfd::EventFd;
pub use mapping::Mapping;
pub use memfd::Memfd;
pub use shared_memory::SharedMemory;
pub use throttle::Throttle;
pub use timerfd::TimerFd;

/// Re-exports for the expansion of [`log_limited!`]; not an interface.
#[doc(hidden)]
pub mod private {
    pub use tracing;
}
