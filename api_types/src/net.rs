//! A machine's network interfaces.
//!
//! On the command line `--net KIND[,OPTION...]`; in a document the same words as fields.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits::{Limits, ParseLimitError};
use crate::net_address::{Ipv4Network, Ipv6Prefix, MacAddress, ParseAddressError};
use crate::port_forward::{ParseForwardError, PortForward};

/// Least MTU of an interface: what every IPv4 host takes (RFC 791).
pub const MIN_MTU: u16 = 576;
/// Least MTU of an interface with IPv6 (RFC 8200, section 5).
pub const MIN_MTU_IPV6: u16 = 1280;
/// Most: a larger IPv4 packet with its Ethernet header would not fit where lengths have 16 bits.
pub const MAX_MTU: u16 = 65_520;
/// Most pairs of queues of an interface.
pub const MAX_QUEUES: u16 = 64;

/// One network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Where it leads.
    #[serde(default)]
    pub kind: NetKind,
    /// Ethernet address; made from the machine's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Largest IP packet, in bytes; what the other side says when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Pairs of queues; as many as is good for this kind and number of processors when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// How much may pass, in each direction.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
}

/// Where an interface leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetKind {
    /// To the host's network through sockets of an unprivileged process.
    User(UserNet),
    /// To a tap device of the host.
    Tap(HostDevice),
    /// To a macvtap device of the host.
    Macvtap(HostDevice),
    /// To the host's network through the program passt.
    Passt(Passt),
}

impl Default for NetKind {
    fn default() -> Self {
        Self::User(UserNet::default())
    }
}

/// A network device of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostDevice {
    /// Its name, at most [`HostDevice::MAX_NAME`] bytes.
    pub name: String,
}

impl HostDevice {
    /// Longest name of a Linux network device, in bytes (IFNAMSIZ less its NUL).
    pub const MAX_NAME: usize = 15;
}

/// What user-mode NAT is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserNet {
    /// Ports of the host that lead into the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<PortForward>,
    /// The gateway's address reaches the host's loopback.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_loopback: bool,
    /// IPv4 is on.
    #[serde(default = "yes")]
    pub ipv4: bool,
    /// The IPv4 network as the guest sees it.
    #[serde(default)]
    pub network: Ipv4Network,
    /// The guest's IPv4 address; the network's 15th when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// IPv6 is on.
    #[serde(default = "yes")]
    pub ipv6: bool,
    /// The IPv6 prefix as the guest sees it; one of Atoll's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<Ipv6Prefix>,
    /// The network has a DNS server.
    #[serde(default = "yes")]
    pub dns: bool,
    /// The servers that it asks; the host's own when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns_servers: Vec<IpAddr>,
}

fn yes() -> bool {
    true
}

impl Default for UserNet {
    fn default() -> Self {
        Self {
            forward: Vec::new(),
            host_loopback: false,
            ipv4: true,
            network: Ipv4Network::default(),
            address: None,
            ipv6: true,
            prefix: None,
            dns: true,
            dns_servers: Vec::new(),
        }
    }
}

impl UserNet {
    /// Hosts of the network that are not the guest: network address, gateway, DNS server.
    const OWN_HOSTS: [u32; 3] = [0, 2, 3];

    /// The guest's IPv4 address.
    pub fn guest_address(&self) -> Ipv4Addr {
        self.address.unwrap_or_else(|| self.network.host(15))
    }

    /// Whether `address` may be the guest's.
    fn is_for_guest(&self, address: Ipv4Addr) -> bool {
        let own = Self::OWN_HOSTS.iter().any(|host| self.network.host(*host) == address);
        self.network.contains(address) && !own && address != self.network.broadcast()
    }
}

/// What passt is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Passt {
    /// Ports of the host that lead into the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<PortForward>,
    /// The gateway's address reaches the host's loopback.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_loopback: bool,
}

/// Text or a document that describes no network interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseNetError {
    /// A kind nobody knows.
    #[error("'{0}' is no kind of network; the kinds are: user, none, tap, macvtap, passt")]
    Kind(String),
    /// An option that this kind does not have.
    #[error("unknown option '{option}' of --net {kind}; its options are: {known}, {COMMON}, {limits}", limits = Limits::OPTIONS)]
    Unknown {
        /// The option.
        option: String,
        /// The kind.
        kind: &'static str,
        /// The kind's own options.
        known: &'static str,
    },
    /// An option given twice.
    #[error("network option '{0}' is given twice")]
    Twice(String),
    /// `none` has no options.
    #[error("--net none takes no options, got '{0}'")]
    NoneOption(String),
    /// `none` beside others.
    #[error("--net none means no network at all; remove it, or the other --net")]
    NoneAndOthers,
    /// A device without a name, or one that no device can have.
    #[error(
        "'{name}' cannot be the name of a {kind} device; write --net {kind},name=NAME with 1 to 15 letters"
    )]
    Name {
        /// The kind.
        kind: &'static str,
        /// What was given.
        name: String,
    },
    /// An MTU that cannot be.
    #[error("mtu={given}: expected {min} to {MAX_MTU} bytes")]
    Mtu {
        /// What was given.
        given: String,
        /// The least.
        min: u16,
    },
    /// A number of queues that cannot be.
    #[error("queues={0}: expected 1 to {MAX_QUEUES} pairs of queues")]
    Queues(String),
    /// An address that cannot be the guest's.
    #[error(
        "{address} cannot be the guest's: expected an address of {network} that is not its network address, gateway ({gateway}), DNS server ({dns}) or broadcast address"
    )]
    Outside {
        /// The address.
        address: Ipv4Addr,
        /// The network.
        network: Ipv4Network,
        /// The network's gateway.
        gateway: Ipv4Addr,
        /// The network's DNS server.
        dns: Ipv4Addr,
    },
    /// An IPv6 address that the guest cannot have.
    #[error("forward={forward}: {address} is outside the guest's network {network}")]
    Outside6 {
        /// The forward.
        forward: PortForward,
        /// The address.
        address: IpAddr,
        /// The network.
        network: String,
    },
    /// A forward to a family that is off.
    #[error("forward={forward}: {family} is switched off in this network")]
    FamilyOff {
        /// The forward.
        forward: PortForward,
        /// The family.
        family: &'static str,
    },
    /// Neither IPv4 nor IPv6.
    #[error("ipv4=off and ipv6=off leave nothing; write --net none for a machine without a network")]
    NothingLeft,
    /// A value other than on and off.
    #[error("{key}={value}: expected on or off")]
    Switch {
        /// The option.
        key: &'static str,
        /// What was given.
        value: String,
    },
    /// An address or a network that is none.
    #[error(transparent)]
    Address(#[from] ParseAddressError),
    /// A forward that is none.
    #[error(transparent)]
    Forward(#[from] ParseForwardError),
    /// The same port of the host twice.
    #[error("forward={0}: this port of the host is forwarded already")]
    ForwardTwice(PortForward),
    /// A limit that is none.
    #[error(transparent)]
    Limit(#[from] ParseLimitError),
}

/// Options that every kind has.
const COMMON: &str = "mac=ADDRESS, mtu=BYTES, queues=N";

/// What `--net` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetArgument {
    /// `none`: the machine has no network.
    None,
    /// An interface.
    Interface(Box<NetSpec>),
}

impl NetArgument {
    /// A machine's interfaces by what its command line says; user-mode NAT when it says nothing.
    ///
    /// # Errors
    /// `none` beside others.
    pub fn interfaces(arguments: Vec<Self>) -> Result<Vec<NetSpec>, ParseNetError> {
        match arguments.as_slice() {
            [] => Ok(vec![NetSpec::default()]),
            [Self::None] => Ok(Vec::new()),
            _ => arguments
                .into_iter()
                .map(|argument| match argument {
                    Self::Interface(spec) => Ok(*spec),
                    Self::None => Err(ParseNetError::NoneAndOthers),
                })
                .collect(),
        }
    }
}

impl FromStr for NetArgument {
    type Err = ParseNetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("none") {
            Some("") => Ok(Self::None),
            Some(rest) if rest.starts_with(',') => {
                Err(ParseNetError::NoneOption(rest.trim_start_matches(',').to_owned()))
            }
            _ => Ok(Self::Interface(Box::new(text.parse()?))),
        }
    }
}

impl FromStr for NetSpec {
    type Err = ParseNetError;

    /// `KIND[,OPTION...]`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(',');
        let kind = parts.next().unwrap_or_default();
        let mut spec = Self { kind: kind_named(kind)?, ..Self::default() };
        let mut seen: Vec<&str> = Vec::new();
        for part in parts {
            let (key, value) = part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value)));
            let many = matches!(key, "forward" | "dns");
            if !many && seen.contains(&key) {
                return Err(ParseNetError::Twice(key.to_owned()));
            }
            seen.push(key);
            let known = spec.common_option(key, value)? || spec.kind.option(key, value)?;
            if !known {
                return Err(ParseNetError::Unknown {
                    option: part.to_owned(),
                    kind: spec.kind.name(),
                    known: spec.kind.options(),
                });
            }
        }
        spec.check()?;
        Ok(spec)
    }
}

fn kind_named(name: &str) -> Result<NetKind, ParseNetError> {
    let device = || HostDevice { name: String::new() };
    Ok(match name {
        "user" => NetKind::User(UserNet::default()),
        "tap" => NetKind::Tap(device()),
        "macvtap" => NetKind::Macvtap(device()),
        "passt" => NetKind::Passt(Passt::default()),
        _ => return Err(ParseNetError::Kind(name.to_owned())),
    })
}

impl NetSpec {
    fn common_option(&mut self, key: &str, value: Option<&str>) -> Result<bool, ParseNetError> {
        match (key, value) {
            ("mac", Some(value)) => self.mac = Some(value.parse()?),
            ("mtu", Some(value)) => {
                let bad = |_| ParseNetError::Mtu { given: value.to_owned(), min: MIN_MTU };
                self.mtu = Some(value.parse().map_err(bad)?);
            }
            ("queues", Some(value)) => {
                self.queues = Some(value.parse().map_err(|_| ParseNetError::Queues(value.to_owned()))?);
            }
            (_, Some(value)) => return Ok(self.limits.option(key, value)?),
            (_, None) => return Ok(false),
        }
        Ok(true)
    }

    /// Whether the parts fit together: for documents, which no text was parsed for.
    ///
    /// # Errors
    /// What does not fit, by name.
    pub fn check(&self) -> Result<(), ParseNetError> {
        self.limits.check()?;
        let ipv6 = matches!(&self.kind, NetKind::User(user) if user.ipv6);
        let min = if ipv6 { MIN_MTU_IPV6 } else { MIN_MTU };
        if let Some(mtu) = self.mtu.filter(|mtu| !(min..=MAX_MTU).contains(mtu)) {
            return Err(ParseNetError::Mtu { given: mtu.to_string(), min });
        }
        if let Some(queues) = self.queues.filter(|queues| !(1..=MAX_QUEUES).contains(queues)) {
            return Err(ParseNetError::Queues(queues.to_string()));
        }
        self.kind.check()
    }
}

impl NetKind {
    /// The kind's word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::User(_) => "user",
            Self::Tap(_) => "tap",
            Self::Macvtap(_) => "macvtap",
            Self::Passt(_) => "passt",
        }
    }

    fn options(&self) -> &'static str {
        match self {
            Self::User(_) => {
                "forward=PROTOCOL:HOST:GUEST, host-loopback, ipv4=off, network=NETWORK, address=ADDRESS, ipv6=off, \
                 prefix=PREFIX, dns=off, dns=ADDRESS"
            }
            Self::Tap(_) | Self::Macvtap(_) => "name=NAME",
            Self::Passt(_) => "forward=PROTOCOL:HOST:GUEST, host-loopback",
        }
    }

    fn option(&mut self, key: &str, value: Option<&str>) -> Result<bool, ParseNetError> {
        match (self, key, value) {
            (Self::Tap(device) | Self::Macvtap(device), "name", Some(value)) => {
                value.clone_into(&mut device.name)
            }
            (
                Self::User(UserNet { forward, .. }) | Self::Passt(Passt { forward, .. }),
                "forward",
                Some(value),
            ) => {
                forward.push(value.parse()?);
            }
            (
                Self::User(UserNet { host_loopback, .. }) | Self::Passt(Passt { host_loopback, .. }),
                "host-loopback",
                None,
            ) => *host_loopback = true,
            (Self::User(user), key, Some(value)) => return user.option(key, value),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn check(&self) -> Result<(), ParseNetError> {
        match self {
            Self::User(user) => user.check(),
            Self::Passt(passt) => check_forwards(&passt.forward),
            Self::Tap(HostDevice { name }) | Self::Macvtap(HostDevice { name }) => {
                // What Linux takes for a name (dev_valid_name).
                let fits = (1..=HostDevice::MAX_NAME).contains(&name.len())
                    && name.bytes().all(|b| b.is_ascii_graphic() && !b"/:%".contains(&b))
                    && !matches!(name.as_str(), "." | "..");
                if fits {
                    Ok(())
                } else {
                    Err(ParseNetError::Name { kind: self.name(), name: name.escape_debug().to_string() })
                }
            }
        }
    }
}

impl UserNet {
    fn option(&mut self, key: &str, value: &str) -> Result<bool, ParseNetError> {
        let switch = |key| match value {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(ParseNetError::Switch { key, value: value.to_owned() }),
        };
        match key {
            "ipv4" => self.ipv4 = switch("ipv4")?,
            "ipv6" => self.ipv6 = switch("ipv6")?,
            "network" => self.network = value.parse()?,
            "prefix" => self.prefix = Some(value.parse()?),
            "address" => {
                let bad = |_| ParseAddressError::Ipv4(value.to_owned());
                self.address = Some(value.parse().map_err(bad)?);
            }
            "dns" if value == "off" => self.dns = false,
            "dns" => {
                let bad = |_| ParseAddressError::Ip(value.to_owned());
                self.dns_servers.push(value.parse().map_err(bad)?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn check(&self) -> Result<(), ParseNetError> {
        if !self.ipv4 && !self.ipv6 {
            return Err(ParseNetError::NothingLeft);
        }
        check_forwards(&self.forward)?;
        self.check_guest(self.guest_address())?;
        for forward in &self.forward {
            let off = |family| ParseNetError::FamilyOff { forward: *forward, family };
            match forward.guest {
                Some(IpAddr::V4(_)) if !self.ipv4 => return Err(off("IPv4")),
                Some(IpAddr::V6(_)) if !self.ipv6 => return Err(off("IPv6")),
                Some(IpAddr::V4(address)) => self.check_guest(address)?,
                Some(IpAddr::V6(address)) => {
                    if let Some(prefix) = self.prefix.filter(|prefix| !prefix.contains(address)) {
                        let (address, network) = (address.into(), prefix.to_string());
                        return Err(ParseNetError::Outside6 { forward: *forward, address, network });
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    fn check_guest(&self, address: Ipv4Addr) -> Result<(), ParseNetError> {
        if self.is_for_guest(address) {
            return Ok(());
        }
        let (network, gateway, dns) = (self.network, self.network.host(2), self.network.host(3));
        Err(ParseNetError::Outside { address, network, gateway, dns })
    }
}

fn check_forwards(forwards: &[PortForward]) -> Result<(), ParseNetError> {
    for (index, forward) in forwards.iter().enumerate() {
        if forwards.iter().take(index).any(|earlier| earlier.collides_with(forward)) {
            return Err(ParseNetError::ForwardTwice(*forward));
        }
    }
    Ok(())
}

impl fmt::Display for NetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        match &self.kind {
            NetKind::User(user) => user.fmt_options(f)?,
            NetKind::Tap(HostDevice { name }) | NetKind::Macvtap(HostDevice { name }) => {
                write!(f, ",name={name}")?
            }
            NetKind::Passt(passt) => fmt_ways_in(f, &passt.forward, passt.host_loopback)?,
        }
        if let Some(mac) = self.mac {
            write!(f, ",mac={mac}")?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, ",mtu={mtu}")?;
        }
        if let Some(queues) = self.queues {
            write!(f, ",queues={queues}")?;
        }
        self.limits.fmt(f)
    }
}

fn fmt_ways_in(f: &mut fmt::Formatter<'_>, forwards: &[PortForward], host_loopback: bool) -> fmt::Result {
    for forward in forwards {
        write!(f, ",forward={forward}")?;
    }
    if host_loopback { f.write_str(",host-loopback") } else { Ok(()) }
}

impl UserNet {
    fn fmt_options(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_ways_in(f, &self.forward, self.host_loopback)?;
        if !self.ipv4 {
            f.write_str(",ipv4=off")?;
        }
        if self.network != Ipv4Network::default() {
            write!(f, ",network={}", self.network)?;
        }
        if let Some(address) = self.address {
            write!(f, ",address={address}")?;
        }
        if !self.ipv6 {
            f.write_str(",ipv6=off")?;
        }
        if let Some(prefix) = self.prefix {
            write!(f, ",prefix={prefix}")?;
        }
        if !self.dns {
            f.write_str(",dns=off")?;
        }
        self.dns_servers.iter().try_for_each(|server| write!(f, ",dns={server}"))
    }
}

#[cfg(test)]
mod tests;
