//! Which system calls a kind of process may make, and why.
//!
//! What is not listed is refused with EPERM, which the process's own code takes for a failure of the host. Calls
//! that would be refused anyway but are made by libraries in passing (`openat` for the time zone, for a backtrace)
//! are not listed either: their failure is harmless.

use libc::{
    AF_INET, AF_INET6, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_SETFD, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_IP,
    IPPROTO_IPV6, IPPROTO_TCP, IPPROTO_UDP, PROT_EXEC, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET,
};

/// `SOCK_TYPE_MASK`: the bits of a socket's type that are not flags (`linux/net.h`).
const SOCKET_TYPE: u64 = 0xf;
/// All of an argument's 32 bits.
const ALL: u64 = 0xffff_ffff;

// `asm-generic/socket.h`, `linux/in.h` and `linux/in6.h`.
const SO_PEEK_OFF: u64 = 42;
const SO_MEMINFO: u64 = 55;
const IP_MTU: u64 = 14;
const IPV6_MTU: u64 = 24;

/// A kind of process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// Translates packets into sockets of the internet protocols: one thread, an event loop, memory that is shared
    /// with the process that it serves.
    NetworkHelper,
}

/// What is asked of a call's arguments.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// Nothing.
    Any,
    /// One of these, of argument number 0 to 5, as 32 bits.
    OneOf(u8, &'static [u64]),
    /// One of these lists, of which every test must hold.
    AnyOf(&'static [&'static [Test]]),
    /// None of these bits in an argument.
    Without(u8, u64),
    /// The argument is this process's id.
    OwnProcess(u8),
}

/// What is asked of one argument (0 to 5), as 32 bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Test {
    pub(super) argument: u8,
    /// The bits that count.
    pub(super) mask: u64,
    /// What they may be.
    pub(super) values: &'static [u64],
}

const fn test(argument: u8, values: &'static [u64]) -> Test {
    Test { argument, mask: ALL, values }
}

const fn socket_type(kind: &'static [u64]) -> Test {
    Test { argument: 1, mask: SOCKET_TYPE, values: kind }
}

/// A call: its number, what its arguments must be, and why it is needed.
pub(super) struct Call {
    pub(super) number: i64,
    pub(super) rule: Rule,
    #[allow(dead_code, reason = "the reason is for who reads the list")]
    pub(super) why: &'static str,
}

const fn any(number: i64, why: &'static str) -> Call {
    Call { number, rule: Rule::Any, why }
}

const fn when(number: i64, rule: Rule, why: &'static str) -> Call {
    Call { number, rule, why }
}

impl Process {
    /// The calls of this kind of process.
    pub(super) fn calls(self) -> impl Iterator<Item = &'static Call> {
        let own = match self {
            Self::NetworkHelper => NETWORK_HELPER,
        };
        COMMON.iter().chain(own)
    }
}

/// What every process of ours does.
const COMMON: &[Call] = &[
    any(libc::SYS_read, "event counters, timers, the control socket"),
    any(libc::SYS_readv, "several buffers at once"),
    any(libc::SYS_write, "event counters, the log on standard error"),
    any(libc::SYS_writev, "several buffers at once"),
    any(libc::SYS_close, "flows end"),
    any(libc::SYS_dup, "descriptors shared between owners"),
    when(
        libc::SYS_fcntl,
        Rule::OneOf(
            1,
            &[
                F_DUPFD_CLOEXEC as u64,
                F_GETFD as u64,
                F_SETFD as u64,
                F_GETFL as u64,
                libc::F_GET_SEALS as u64,
            ],
        ),
        "flags of descriptors, seals of shared memory; no signals, no locks, no leases, and nothing that others who \
         have the same file (standard error) would notice",
    ),
    any(libc::SYS_fstat, "the size of shared memory before it is mapped"),
    any(libc::SYS_epoll_create1, "event loops"),
    any(libc::SYS_epoll_ctl, "event loops"),
    any(libc::SYS_epoll_wait, "event loops"),
    any(libc::SYS_epoll_pwait, "event loops"),
    any(libc::SYS_epoll_pwait2, "event loops"),
    any(libc::SYS_poll, "waiting for one descriptor"),
    any(libc::SYS_ppoll, "waiting for one descriptor"),
    any(libc::SYS_eventfd2, "event counters"),
    any(libc::SYS_timerfd_create, "timers"),
    any(libc::SYS_timerfd_settime, "timers"),
    any(libc::SYS_timerfd_gettime, "timers"),
    any(libc::SYS_clock_gettime, "time, where the kernel gives it by a call only"),
    any(libc::SYS_clock_nanosleep, "waiting"),
    any(libc::SYS_nanosleep, "waiting"),
    any(libc::SYS_getrandom, "keys of hash tables, sequence numbers, ports"),
    any(libc::SYS_futex, "locks"),
    any(libc::SYS_sched_yield, "locks"),
    any(libc::SYS_brk, "the allocator"),
    when(libc::SYS_mmap, Rule::Without(2, PROT_EXEC as u64), "memory; no code is ever added"),
    when(libc::SYS_mprotect, Rule::Without(2, PROT_EXEC as u64), "the allocator; no code is ever added"),
    any(libc::SYS_munmap, "the allocator"),
    any(libc::SYS_mremap, "the allocator"),
    any(libc::SYS_madvise, "the allocator gives memory back"),
    any(libc::SYS_getpid, "abort"),
    any(libc::SYS_gettid, "abort, the log"),
    when(libc::SYS_tgkill, Rule::OwnProcess(0), "abort raises a signal in this process"),
    any(libc::SYS_rt_sigaction, "abort, handlers of the standard library"),
    any(libc::SYS_rt_sigprocmask, "abort"),
    any(libc::SYS_rt_sigreturn, "coming back from a handler"),
    any(libc::SYS_sigaltstack, "the standard library's stack guard at a thread's end"),
    any(libc::SYS_restart_syscall, "a wait that was interrupted goes on"),
    any(libc::SYS_exit, "the end"),
    any(libc::SYS_exit_group, "the end"),
];

/// What the network helper does besides.
const NETWORK_HELPER: &[Call] = &[
    when(
        libc::SYS_socket,
        Rule::AnyOf(&[
            &[
                test(0, &[AF_INET as u64, AF_INET6 as u64]),
                socket_type(&[SOCK_STREAM as u64]),
                test(2, &[0, IPPROTO_TCP as u64]),
            ],
            &[
                test(0, &[AF_INET as u64, AF_INET6 as u64]),
                socket_type(&[SOCK_DGRAM as u64]),
                test(2, &[0, IPPROTO_UDP as u64, IPPROTO_ICMP as u64, IPPROTO_ICMPV6 as u64]),
            ],
        ]),
        "flows of the guest: TCP, UDP and ICMP echo; no sockets of the host itself, raw ones, of packets or of netlink",
    ),
    any(libc::SYS_connect, "flows of the guest"),
    any(libc::SYS_bind, "flows of the guest keep their port where that can be"),
    any(libc::SYS_listen, "forwards added while running"),
    any(libc::SYS_accept4, "forwards"),
    any(libc::SYS_getsockname, "the port that the host chose"),
    any(libc::SYS_getpeername, "who came in through a forward"),
    when(
        libc::SYS_getsockopt,
        Rule::AnyOf(&[
            &[test(1, &[SOL_SOCKET as u64]), test(2, &[libc::SO_ERROR as u64, SO_MEMINFO])],
            &[test(1, &[IPPROTO_IP as u64]), test(2, &[IP_MTU])],
            &[test(1, &[IPPROTO_IPV6 as u64]), test(2, &[IPV6_MTU])],
        ]),
        "errors of connecting, how full the send queue is, what the way carries",
    ),
    when(
        libc::SYS_setsockopt,
        Rule::AnyOf(&[
            &[
                test(1, &[SOL_SOCKET as u64]),
                test(
                    2,
                    &[
                        libc::SO_REUSEADDR as u64,
                        libc::SO_REUSEPORT as u64,
                        libc::SO_KEEPALIVE as u64,
                        libc::SO_LINGER as u64,
                        libc::SO_OOBINLINE as u64,
                        SO_PEEK_OFF,
                    ],
                ),
            ],
            &[
                test(1, &[IPPROTO_TCP as u64]),
                test(2, &[libc::TCP_NODELAY as u64, libc::TCP_KEEPIDLE as u64]),
            ],
            &[test(1, &[IPPROTO_IP as u64]), test(2, &[libc::IP_MTU_DISCOVER as u64])],
            &[
                test(1, &[IPPROTO_IPV6 as u64]),
                test(2, &[libc::IPV6_V6ONLY as u64, libc::IPV6_MTU_DISCOVER as u64]),
            ],
        ]),
        "reuse of addresses, keep-alive, resets, peeks, segments, fragments; no filters, groups, or protocols on top",
    ),
    any(libc::SYS_shutdown, "one direction of a flow ends"),
    any(libc::SYS_sendto, "flows"),
    any(libc::SYS_sendmsg, "flows; replies on the control socket"),
    any(libc::SYS_sendmmsg, "several datagrams at once"),
    any(libc::SYS_recvfrom, "flows, also looking without taking"),
    any(libc::SYS_recvmsg, "flows; requests on the control socket"),
    any(libc::SYS_recvmmsg, "several datagrams at once"),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_call_is_listed_once_and_has_a_reason() {
        let mut seen = BTreeSet::new();
        for call in Process::NetworkHelper.calls() {
            assert!(seen.insert(call.number), "call {} is listed twice", call.number);
            assert!(!call.why.is_empty());
        }
    }

    #[test]
    fn what_leads_out_is_not_listed() {
        let out = [
            libc::SYS_ioctl,
            libc::SYS_socketpair,
            libc::SYS_openat,
            libc::SYS_open,
            libc::SYS_execve,
            libc::SYS_fork,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_ptrace,
            libc::SYS_kill,
            libc::SYS_tkill,
            libc::SYS_process_vm_readv,
            libc::SYS_io_uring_setup,
            libc::SYS_bpf,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_mount,
            libc::SYS_prctl,
        ];
        assert!(Process::NetworkHelper.calls().all(|call| !out.contains(&call.number)));
    }
}
