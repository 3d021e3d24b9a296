//! The DHCP server (RFC 2131, options of RFC 2132, RFC 3397 and RFC 2563's neighbours).
//!
//! ```text
//!   DISCOVER ─▶ OFFER        REQUEST for our address ─▶ ACK       INFORM ─▶ ACK without a lease
//!                            REQUEST for another     ─▶ NAK       DECLINE, RELEASE: nothing
//! ```
//!
//! A REQUEST that names another server is not for us. Every answer carries everything that there is to tell,
//! whatever the client lists: it is short.

use std::net::Ipv4Addr;

use crate::config::{Addresses, Addresses4};
use crate::leases::{LEASE_SECONDS, Leases};
use crate::wire::{BROADCAST, Mac, array, be16};

/// UDP port of servers.
pub const SERVER_PORT: u16 = 67;
/// UDP port of clients.
pub const CLIENT_PORT: u16 = 68;

const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Bytes before the options.
const FIXED: usize = 240;
/// Least bytes of a BOOTP message (RFC 1542, section 2.1).
const MIN_MESSAGE: usize = 300;

mod kind {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const INFORM: u8 = 8;
}

mod option {
    pub(super) const PAD: u8 = 0;
    pub(super) const MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const DNS: u8 = 6;
    pub(super) const HOST_NAME: u8 = 12;
    pub(super) const MTU: u8 = 26;
    pub(super) const BROADCAST: u8 = 28;
    pub(super) const REQUESTED: u8 = 50;
    pub(super) const LEASE: u8 = 51;
    pub(super) const KIND: u8 = 53;
    pub(super) const SERVER: u8 = 54;
    pub(super) const RENEWAL: u8 = 58;
    pub(super) const REBINDING: u8 = 59;
    pub(super) const CLIENT: u8 = 61;
    pub(super) const SEARCH: u8 = 119;
    pub(super) const END: u8 = 255;
}

/// What the network tells besides addresses.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Domains to search, as `resolv.conf` has them.
    pub search: Vec<String>,
    /// The guest's host name.
    pub hostname: Option<String>,
}

/// An answer, and where it goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The Ethernet address.
    pub mac: Mac,
    /// The address.
    pub to: Ipv4Addr,
    /// The UDP payload.
    pub message: Vec<u8>,
}

/// A client's message, as far as it matters.
struct Message {
    flags: u16,
    transaction: [u8; 4],
    client: Ipv4Addr,
    mac: Mac,
    kind: u8,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    identifier: Option<Vec<u8>>,
}

impl Message {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let [operation, hardware, length, ..] = *bytes else { return None };
        if (operation, hardware, length) != (REQUEST, 1, 6) || array::<4>(bytes, 236)? != COOKIE {
            return None;
        }
        let mut message = Self {
            transaction: array(bytes, 4)?,
            flags: be16(bytes, 10)?,
            client: array::<4>(bytes, 12)?.into(),
            mac: array(bytes, 28)?,
            kind: 0,
            requested: None,
            server: None,
            identifier: None,
        };
        let mut options = bytes.get(FIXED..)?;
        loop {
            match *options {
                [option::PAD, ..] => options = options.get(1..)?,
                [option::END, ..] | [] | [_] => break,
                [code, length, ..] => {
                    let end = 2 + usize::from(length);
                    message.take(code, options.get(2..end)?);
                    options = options.get(end..)?;
                }
            }
        }
        Some(message)
    }

    fn take(&mut self, code: u8, value: &[u8]) {
        match (code, value) {
            (option::KIND, [kind]) => self.kind = *kind,
            (option::REQUESTED, [a, b, c, d]) => self.requested = Some([*a, *b, *c, *d].into()),
            (option::SERVER, [a, b, c, d]) => self.server = Some([*a, *b, *c, *d].into()),
            (option::CLIENT, value) => self.identifier = Some(value.to_vec()),
            _ => {}
        }
    }
}

/// Options being written.
struct Options(Vec<u8>);

impl Options {
    /// Adds an option; one longer than 255 bytes is left out.
    fn add(&mut self, code: u8, value: &[u8]) {
        if let Ok(length) = u8::try_from(value.len()) {
            self.0.extend_from_slice(&[code, length]);
            self.0.extend_from_slice(value);
        }
    }
}

/// A list of domains as labels (RFC 1035, section 3.1), without compression. Names that are none are left out, as
/// is what does not fit into `limit` bytes.
pub fn encode_domains(domains: &[String], limit: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for domain in domains {
        let mut name = Vec::new();
        let labels = domain.trim_end_matches('.').split('.');
        let valid = labels.clone().all(|label| (1..=63).contains(&label.len()));
        for label in labels {
            name.push(label.len() as u8);
            name.extend_from_slice(label.as_bytes());
        }
        name.push(0);
        if valid && name.len() <= 255 && bytes.len() + name.len() <= limit {
            bytes.extend_from_slice(&name);
        }
    }
    bytes
}

/// Answers a client's message. `None`: there is nothing to say.
pub fn answer(bytes: &[u8], addresses: &Addresses, told: &Told, leases: &mut Leases) -> Option<Answer> {
    let own = addresses.v4?;
    let message = Message::parse(bytes)?;
    if message.server.is_some_and(|server| server != own.gateway) {
        return None;
    }
    match message.kind {
        kind::DISCOVER => {
            let lease = leases.v4(addresses, message.mac)?;
            Some(reply(&message, kind::OFFER, Some(lease), addresses, own, told))
        }
        kind::REQUEST => {
            let lease = leases.v4(addresses, message.mac)?;
            let wanted = message.requested.unwrap_or(message.client);
            if wanted == lease {
                Some(reply(&message, kind::ACK, Some(lease), addresses, own, told))
            } else {
                Some(refusal(&message, own))
            }
        }
        kind::INFORM => Some(reply(&message, kind::ACK, None, addresses, own, told)),
        _ => None,
    }
}

fn head(message: &Message, kind: u8, client: Ipv4Addr, yours: Ipv4Addr, own: Addresses4) -> Options {
    let mut bytes = vec![0; FIXED];
    let fields: [(usize, &[u8]); 8] = [
        (0, &[REPLY, 1, 6, 0]),
        (4, &message.transaction),
        (10, &message.flags.to_be_bytes()),
        (12, &client.octets()),
        (16, &yours.octets()),
        (20, &own.gateway.octets()),
        (28, &message.mac),
        (236, &COOKIE),
    ];
    for (at, value) in fields {
        if let Some(place) = bytes.get_mut(at..at + value.len()) {
            place.copy_from_slice(value);
        }
    }
    let mut options = Options(bytes);
    options.add(option::KIND, &[kind]);
    options.add(option::SERVER, &own.gateway.octets());
    options
}

fn finish(mut options: Options, message: &Message) -> Vec<u8> {
    if let Some(identifier) = &message.identifier {
        // RFC 6842: the client's identifier comes back.
        options.add(option::CLIENT, identifier);
    }
    options.0.push(option::END);
    if options.0.len() < MIN_MESSAGE {
        options.0.resize(MIN_MESSAGE, option::PAD);
    }
    options.0
}

fn reply(
    message: &Message,
    kind: u8,
    lease: Option<Ipv4Addr>,
    addresses: &Addresses,
    own: Addresses4,
    told: &Told,
) -> Answer {
    let mut options = head(message, kind, message.client, lease.unwrap_or(Ipv4Addr::UNSPECIFIED), own);
    if lease.is_some() {
        options.add(option::LEASE, &LEASE_SECONDS.to_be_bytes());
        options.add(option::RENEWAL, &(LEASE_SECONDS / 2).to_be_bytes());
        options.add(option::REBINDING, &(LEASE_SECONDS / 8 * 7).to_be_bytes());
    }
    options.add(option::MASK, &own.mask().octets());
    options.add(option::BROADCAST, &own.broadcast().octets());
    options.add(option::ROUTER, &own.gateway.octets());
    options.add(option::MTU, &addresses.mtu.to_be_bytes());
    if addresses.dns {
        options.add(option::DNS, &own.dns.octets());
    }
    if let Some(hostname) = told.hostname.as_ref().filter(|name| !name.is_empty()) {
        options.add(option::HOST_NAME, hostname.as_bytes());
    }
    let search = encode_domains(&told.search, 255);
    if addresses.dns && !search.is_empty() {
        options.add(option::SEARCH, &search);
    }
    let (mac, to) = destination(message);
    Answer { mac, to, message: finish(options, message) }
}

/// Where an answer goes (RFC 2131, section 4.1): to the address that the client has already, else to everybody,
/// by Ethernet to the client alone unless it asked otherwise.
fn destination(message: &Message) -> (Mac, Ipv4Addr) {
    if !message.client.is_unspecified() {
        (message.mac, message.client)
    } else if message.flags & 0x8000 != 0 {
        (BROADCAST, Ipv4Addr::BROADCAST)
    } else {
        (message.mac, Ipv4Addr::BROADCAST)
    }
}

fn refusal(message: &Message, own: Addresses4) -> Answer {
    let any = Ipv4Addr::UNSPECIFIED;
    let options = head(message, kind::NAK, any, any, own);
    Answer { mac: BROADCAST, to: Ipv4Addr::BROADCAST, message: finish(options, message) }
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress};

    use super::*;
    use crate::config::UserNetConfig;

    const MAC: Mac = [0x52, 0x54, 0, 1, 2, 3];

    fn request(kind: DhcpMessageType) -> DhcpRepr<'static> {
        DhcpRepr {
            message_type: kind,
            transaction_id: 0x1234_5678,
            secs: 0,
            client_hardware_address: EthernetAddress(MAC),
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip: None,
            client_identifier: Some(EthernetAddress(MAC)),
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        }
    }

    fn ask(repr: &DhcpRepr<'_>, leases: &mut Leases) -> Option<Answer> {
        let mut bytes = vec![0; repr.buffer_len()];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).unwrap();
        let addresses = UserNetConfig::default().check().unwrap();
        let told = Told { search: vec!["example.org".into()], hostname: Some("island".into()) };
        answer(&bytes, &addresses, &told, leases)
    }

    #[test]
    fn a_client_of_another_hand_understands_offer_and_acknowledgement() {
        let mut leases = Leases::new(None);
        let guest = Ipv4Addr::new(10, 0, 2, 15);
        let wanted = DhcpRepr { requested_ip: Some(guest), ..request(DhcpMessageType::Request) };
        for (request, kind) in
            [(request(DhcpMessageType::Discover), DhcpMessageType::Offer), (wanted, DhcpMessageType::Ack)]
        {
            let answer = ask(&request, &mut leases).unwrap();
            assert_eq!((answer.mac, answer.to), (MAC, Ipv4Addr::BROADCAST));
            let packet = DhcpPacket::new_checked(&answer.message[..]).unwrap();
            let repr = DhcpRepr::parse(&packet).unwrap();
            assert_eq!(repr.message_type, kind);
            assert_eq!((repr.your_ip, repr.transaction_id), (guest, 0x1234_5678));
            assert_eq!(repr.router, Some(Ipv4Addr::new(10, 0, 2, 2)));
            assert_eq!(repr.subnet_mask, Some(Ipv4Addr::new(255, 255, 255, 0)));
            assert_eq!(repr.dns_servers.unwrap()[..], [Ipv4Addr::new(10, 0, 2, 3)]);
            assert_eq!(repr.lease_duration, Some(LEASE_SECONDS));
            let value = |kind| packet.options().find(|option| option.kind == kind).map(|option| option.data);
            assert_eq!(value(26), Some(&[5, 220][..]), "MTU 1500");
            assert_eq!(value(12), Some(&b"island"[..]));
            assert_eq!(value(119), Some(&b"\x07example\x03org\x00"[..]));
        }
    }

    #[test]
    fn another_address_is_refused_and_another_server_is_left_alone() {
        let mut leases = Leases::new(None);
        let wrong = DhcpRepr {
            requested_ip: Some(Ipv4Addr::new(192, 168, 1, 5)),
            ..request(DhcpMessageType::Request)
        };
        let answer = ask(&wrong, &mut leases).unwrap();
        let packet = DhcpPacket::new_checked(&answer.message[..]).unwrap();
        assert_eq!(DhcpRepr::parse(&packet).unwrap().message_type, DhcpMessageType::Nak);
        let other = DhcpRepr { server_identifier: Some(Ipv4Addr::new(10, 0, 2, 9)), ..wrong };
        assert_eq!(ask(&other, &mut leases), None);
        assert_eq!(ask(&request(DhcpMessageType::Release), &mut leases), None);
    }

    #[test]
    fn renewal_is_answered_to_the_clients_address() {
        let guest = Ipv4Addr::new(10, 0, 2, 15);
        let renew = DhcpRepr { client_ip: guest, ..request(DhcpMessageType::Request) };
        let answer = ask(&renew, &mut Leases::new(Some(MAC))).unwrap();
        assert_eq!((answer.mac, answer.to), (MAC, guest));
    }

    #[test]
    fn domains_that_are_none_are_left_out() {
        let domains = ["a..b", "", "ok.", &"x".repeat(64)].map(str::to_owned);
        assert_eq!(encode_domains(&domains, 255), b"\x02ok\x00");
        assert_eq!(encode_domains(&domains, 3), b"");
    }
}
