//! From the description of an interface to an open one.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use atoll_api_types::{HostDevice, NetKind, NetSpec, Passt, PortForward, Protocol, UserNet as UserSpec};
use atoll_foundation::sync::lock;
use atoll_network::passt::{PasstOptions, PasstPort};
use atoll_network::ring::{RingLink, RingPort};
use atoll_network::tap::TapPort;
use atoll_network::{MacAddress, Port};
use atoll_network_user::client::UserNet;
use atoll_network_user::{Forward, UserNetConfig};
use atoll_virtio::net::{MAX_QUEUE_PAIRS, NetLimits, NetOptions};

use super::{Interface, MAX_INTERFACES};
use crate::error::VmError;
use crate::limits::rate_limits;

/// What ends with an interface.
pub(super) enum Helper {
    /// The process of user-mode NAT, and what tells the port of its end.
    User(Mutex<UserNet>, RingLink),
    /// Nothing.
    None,
}

impl Helper {
    /// Has the end of the process noticed, from a thread of its own. Once.
    pub(super) fn supervise(&self) -> Result<(), VmError> {
        match self {
            Self::User(helper, link) => {
                let mut helper = lock(helper);
                helper.supervise(link.clone()).map_err(refused)
            }
            Self::None => Ok(()),
        }
    }
}

/// What every interface of a machine has to know of it.
pub(crate) struct Around<'a> {
    /// The machine's name.
    pub(crate) machine: &'a str,
    /// Its number of processors.
    pub(crate) cpus: u32,
    /// The program that becomes a helper process.
    pub(crate) helper: Option<&'a Path>,
}

/// Opens the interfaces that `specs` describe: from here on helper processes run and ports of the host are taken.
pub(crate) fn open(specs: &[NetSpec], around: &Around<'_>) -> Result<Vec<Arc<Interface>>, VmError> {
    if specs.len() > MAX_INTERFACES {
        return Err(VmError::Networks { asked: specs.len(), max: MAX_INTERFACES });
    }
    for spec in specs {
        spec.check().map_err(|error| VmError::Network(error.to_string()))?;
    }
    check_macs(specs, around.machine)?;
    specs.iter().enumerate().map(|(index, spec)| open_one(index, spec, around).map(Arc::new)).collect()
}

fn open_one(index: usize, spec: &NetSpec, around: &Around<'_>) -> Result<Interface, VmError> {
    let mut mac = mac_of(spec, around.machine, index);
    // More queues than processors gain nothing; one is enough where the other side has one thread.
    let wanted = spec.queues.unwrap_or(1);
    let queues = wanted.min(MAX_QUEUE_PAIRS);
    if u32::from(wanted) > around.cpus {
        let why =
            format!("queues={wanted}: the machine has {} CPUs, and more queues gain nothing", around.cpus);
        return Err(VmError::Network(why));
    }
    let (port, helper): (Arc<dyn Port>, Helper) = match &spec.kind {
        NetKind::User(user) => {
            let (helper, port) = open_user(index, spec, user, mac, queues, around)?;
            let link = port.link();
            (Arc::new(port), Helper::User(Mutex::new(helper), link))
        }
        NetKind::Tap(device) => (Arc::new(open_tap(&device.name, queues, false)?), Helper::None),
        NetKind::Macvtap(device) => {
            let tap = open_tap(&device.name, queues, true)?;
            if let Some(only) = tap.address() {
                mac = its_address(spec, device, only)?;
            }
            (Arc::new(tap), Helper::None)
        }
        NetKind::Passt(passt) => {
            let options = PasstOptions { arguments: passt_arguments(passt), ..PasstOptions::default() };
            let port = PasstPort::start(&options).map_err(refused)?;
            (Arc::new(port), Helper::None)
        }
    };
    let limits = rate_limits(&spec.limits);
    let options = NetOptions {
        mac,
        mtu: spec.mtu,
        queue_pairs: queues,
        limits: NetLimits { send: limits, receive: limits },
    };
    Ok(Interface::new(port, options, helper))
}

fn refused(error: impl std::fmt::Display) -> VmError {
    VmError::Network(error.to_string())
}

fn open_tap(name: &str, queues: u16, macvtap: bool) -> Result<TapPort, VmError> {
    let opened = if macvtap { TapPort::open_macvtap(name, queues) } else { TapPort::open_tap(name, queues) };
    opened.map_err(refused)
}

/// A macvtap device passes on what is for its own address, so that is the guest's.
fn its_address(spec: &NetSpec, device: &HostDevice, only: MacAddress) -> Result<MacAddress, VmError> {
    match spec.mac {
        Some(asked) if asked.bytes() != only.0 => Err(VmError::Network(format!(
            "mac={asked}: macvtap device {} has the address {only}, and the guest must have the same; leave mac= out",
            device.name
        ))),
        _ => Ok(only),
    }
}

/// What passt is told: nothing of the host's loopback and no port unless asked for.
fn passt_arguments(passt: &Passt) -> Vec<String> {
    let mut arguments = Vec::new();
    if !passt.host_loopback {
        arguments.push("--no-map-gw".to_owned());
    }
    for forward in &passt.forward {
        let flag = match forward.protocol {
            Protocol::Tcp => "-t",
            Protocol::Udp => "-u",
        };
        let text = format!("{}/{}:{}", forward.listen_address(), forward.host_port, forward.guest_port);
        arguments.extend([flag.to_owned(), text]);
    }
    arguments
}

fn open_user(
    index: usize,
    spec: &NetSpec,
    user: &UserSpec,
    mac: MacAddress,
    queues: u16,
    around: &Around<'_>,
) -> Result<(UserNet, RingPort), VmError> {
    let Some(program) = around.helper else {
        return Err(VmError::Network("user-mode NAT needs a helper program, and none was given".to_owned()));
    };
    let config = UserNetConfig {
        name: format!("net{index}"),
        ipv4: user.ipv4,
        network: user.network.address(),
        network_bits: user.network.length(),
        address: user.address,
        ipv6: user.ipv6,
        prefix: user.prefix.map(|prefix| prefix.address()),
        guest_mac: Some(mac.0),
        mtu: spec.mtu,
        dns: user.dns,
        dns_servers: user.dns_servers.clone(),
        host_loopback: user.host_loopback,
        forwards: user.forward.iter().map(forward).collect(),
        hostname: Some(around.machine.to_owned()),
        queue_pairs: queues,
        ..UserNetConfig::default()
    };
    UserNet::start_unsupervised(program, config).map_err(refused)
}

fn forward(spec: &PortForward) -> Forward {
    Forward {
        protocol: match spec.protocol {
            Protocol::Tcp => atoll_network_user::Protocol::Tcp,
            Protocol::Udp => atoll_network_user::Protocol::Udp,
        },
        host: SocketAddr::new(spec.listen_address(), spec.host_port),
        guest: spec.guest,
        guest_port: spec.guest_port,
    }
}

/// Two interfaces of a machine never have the same address.
fn check_macs(specs: &[NetSpec], machine: &str) -> Result<(), VmError> {
    let all: Vec<MacAddress> = specs.iter().enumerate().map(|(n, spec)| mac_of(spec, machine, n)).collect();
    for (index, mac) in all.iter().enumerate() {
        if all.iter().take(index).any(|earlier| earlier == mac) {
            return Err(VmError::Network(format!(
                "mac={mac}: two interfaces of this machine have this address"
            )));
        }
    }
    Ok(())
}

/// The address that was asked for, or one that the machine's name and the interface's number give at every start:
/// locally administered, with the first three bytes that people know from virtual machines.
fn mac_of(spec: &NetSpec, machine: &str, index: usize) -> MacAddress {
    if let Some(mac) = spec.mac {
        return MacAddress(mac.bytes());
    }
    // FNV-1a; identity, not security. The interface's number is added, so that interfaces differ for sure.
    let hash = machine.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let [.., a, b, c] = ((hash ^ hash >> 32) as u32).wrapping_add(index as u32).to_be_bytes();
    MacAddress([0x52, 0x54, 0x00, a, b, c])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(specs: &[&str], cpus: u32) -> String {
        let specs: Vec<NetSpec> = specs.iter().map(|text| text.parse().unwrap()).collect();
        match open(&specs, &Around { machine: "m", cpus, helper: None }) {
            Ok(_) => panic!("{specs:?} was opened"),
            Err(error) => {
                assert!(error.is_input(), "exit code 2: {error}");
                error.to_string()
            }
        }
    }

    #[test]
    fn addresses_are_stable_and_differ() {
        let spec = NetSpec::default();
        let mac = mac_of(&spec, "web", 0);
        assert_eq!(mac, mac_of(&spec, "web", 0));
        assert_ne!(mac, mac_of(&spec, "web", 1));
        assert_ne!(mac, mac_of(&spec, "db", 0));
        assert!(mac.to_string().starts_with("52:54:00:"), "{mac}");
        let own: NetSpec = "user,mac=02:00:00:00:00:07".parse().unwrap();
        assert_eq!(mac_of(&own, "web", 0).to_string(), "02:00:00:00:00:07");
    }

    #[test]
    fn what_cannot_be_opened_is_refused_in_one_line() {
        assert!(refused(&["user"], 1).contains("helper"));
        assert!(refused(&["user,queues=4"], 2).contains("2 CPUs"));
        assert!(refused(&["user"; 9], 1).contains("9 network interfaces"));
        let same = "user,mac=02:00:00:00:00:07";
        assert!(refused(&[same, same], 1).contains("02:00:00:00:00:07"));
    }

    #[test]
    fn a_forward_is_told_as_it_was_asked_for() {
        let told = forward(&"udp:[::1]:53:10.0.2.15:5353".parse().unwrap());
        assert_eq!(told.host, "[::1]:53".parse().unwrap());
        assert_eq!((told.guest, told.guest_port), (Some("10.0.2.15".parse().unwrap()), 5353));
        assert_eq!(forward(&"tcp:80:80".parse().unwrap()).host, "127.0.0.1:80".parse().unwrap());
    }
}
