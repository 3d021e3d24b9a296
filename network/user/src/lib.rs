//! User-mode NAT: what a guest sends becomes ordinary sockets of an unprivileged process, and what these receive
//! becomes packets again.
