//! User-mode NAT: what a guest sends becomes ordinary sockets of an unprivileged process, and what these receive
//! becomes packets again.
//!
//! The network is a process of its own, because it parses what a guest and the internet send and the machine's
//! process has no network at all. Between the two there is a ring in shared memory
//! ([`atoll_network::ring`]) and a control socket.
//!
//! ```text
//!   machine's process                       network's process (one thread, one epoll)
//!   ┌────────────┐  frames  ┌──────────────────────────────────────────────┐
//!   │ virtio-net ├──▶ring──▶│ engine ─▶ nat ─▶ neighbours, dhcp, dhcp6     │
//!   │  RingPort  │          │                  dns ────▶ resolvers         │──▶ the host's sockets,
//!   │            │◀──ring◀──│ sender ◀──────── udp, echo, tcp              │◀── as any user's
//!   └────────────┘          │                  forward ◀── listening ports │
//!   ┌────────────┐  JSON    │                                              │
//!   │ client     ├─control─▶│ process                                      │
//!   └────────────┘          └──────────────────────────────────────────────┘
//! ```
//!
//! * [`client::UserNet`] starts the process and gives the machine its port; [`process::run`] is what the started
//!   program calls.
//! * [`config`] has the addresses, [`policy`] says where a guest may go.
//! * [`nat`] is the whole without sockets of its own, for tests and fuzzing; [`engine`] adds the event loop.
//!
//! # What a hostile guest gets
//!
//! Frames are copied out of shared memory before they are parsed, without panics and with checked accesses.
//! Tables are bounded: flows (4,096 of UDP, as many of TCP, less than 2 KiB each), queries, leases, neighbours,
//! fragments. Whatever it floods displaces what is its own. It reaches nothing on the host's loopback but the
//! host's DNS resolver by the network's own DNS server, unless it was started with `host-loopback`.
//!
//! # Locks
//!
//! The network's process has one thread and none. [`client::UserNet`] has two, described there.

pub mod client;
pub mod config;
pub mod control;
pub mod dhcp;
pub mod dhcp6;
pub mod dns;
pub mod echo;
pub mod engine;
pub mod forward;
pub mod fragments;
pub mod host;
pub mod icmp;
pub mod leases;
pub mod lru;
pub mod nat;
pub mod neighbours;
pub mod output;
pub mod policy;
pub mod poller;
pub mod process;
pub mod sender;
pub mod socket;
pub mod stats;
pub mod tcp;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod udp;
pub mod wire;

pub use client::{UserNet, UserNetError};
pub use config::{ConfigError, Forward, Protocol, UserNetConfig};
pub use output::{Flow4Tuple, Output, TcpFlags, TcpHeader, TcpOptions, Unreachable};
pub use policy::Policy;
pub use poller::{Owner, Poller, Readiness};
