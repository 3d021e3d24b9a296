//! User-mode NAT: what a guest sends becomes ordinary sockets of an unprivileged process, and what these receive
//! becomes packets again.

pub mod output;
pub mod policy;
pub mod poller;
pub mod socket;
pub mod tcp;

pub use output::{Flow4Tuple, Output, TcpFlags, TcpHeader, TcpOptions, Unreachable};
pub use policy::Policy;
pub use poller::{Owner, Poller, Readiness};
