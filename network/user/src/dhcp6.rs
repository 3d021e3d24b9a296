//! The DHCPv6 server (RFC 8415): one address per guest, DNS, and DNS alone for who asks for no more.
//!
//! ```text
//!   SOLICIT ─▶ ADVERTISE (REPLY with rapid commit)      REQUEST, RENEW, REBIND ─▶ REPLY with the address
//!   CONFIRM ─▶ REPLY with a status                      RELEASE, DECLINE       ─▶ REPLY "success"
//!   INFORMATION-REQUEST ─▶ REPLY without address
//! ```

use std::net::Ipv6Addr;

use crate::config::{Addresses, Addresses6, GATEWAY_MAC};
use crate::dhcp::{Told, encode_domains};
use crate::leases::{LEASE_SECONDS, Leases};
use crate::wire::{Mac, array, be16};

/// UDP port of servers.
pub const SERVER_PORT: u16 = 547;
/// UDP port of clients.
pub const CLIENT_PORT: u16 = 546;
/// The group that clients send to.
pub const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

mod kind {
    pub(super) const SOLICIT: u8 = 1;
    pub(super) const ADVERTISE: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const CONFIRM: u8 = 4;
    pub(super) const RENEW: u8 = 5;
    pub(super) const REBIND: u8 = 6;
    pub(super) const REPLY: u8 = 7;
    pub(super) const RELEASE: u8 = 8;
    pub(super) const DECLINE: u8 = 9;
    pub(super) const INFORMATION_REQUEST: u8 = 11;
}

mod option {
    pub(super) const CLIENT: u16 = 1;
    pub(super) const SERVER: u16 = 2;
    pub(super) const IA_NA: u16 = 3;
    pub(super) const ADDRESS: u16 = 5;
    pub(super) const STATUS: u16 = 13;
    pub(super) const RAPID_COMMIT: u16 = 14;
    pub(super) const DNS: u16 = 23;
    pub(super) const DOMAINS: u16 = 24;
}

const SUCCESS: u16 = 0;
const NO_ADDRESSES: u16 = 2;
const NOT_ON_LINK: u16 = 4;

/// Longest identifier of a client (RFC 8415, section 11.1).
const MAX_IDENTIFIER: usize = 130;
/// Identity associations answered in one message; clients have one.
const MAX_ASSOCIATIONS: usize = 4;

/// This server's identifier: DUID-LL (type 3) of an Ethernet address.
fn server_identifier() -> [u8; 10] {
    let [a, b, c, d, e, f] = GATEWAY_MAC;
    [0, 3, 0, 1, a, b, c, d, e, f]
}

#[derive(Default)]
struct Message<'a> {
    kind: u8,
    transaction: [u8; 3],
    client: Option<&'a [u8]>,
    server: Option<&'a [u8]>,
    /// Identifiers of identity associations, with the addresses in them all on this link.
    associations: Vec<([u8; 4], bool)>,
    rapid: bool,
}

/// Walks options; false when they are malformed.
fn walk<'a>(mut bytes: &'a [u8], mut each: impl FnMut(u16, &'a [u8])) -> bool {
    while !bytes.is_empty() {
        let (Some(code), Some(length)) = (be16(bytes, 0), be16(bytes, 2)) else { return false };
        let end = 4 + usize::from(length);
        let Some(value) = bytes.get(4..end) else { return false };
        each(code, value);
        bytes = bytes.get(end..).unwrap_or_default();
    }
    true
}

impl<'a> Message<'a> {
    fn parse(bytes: &'a [u8], own: &Addresses6) -> Option<Self> {
        let mut message = Self { kind: *bytes.first()?, transaction: array(bytes, 1)?, ..Self::default() };
        let well_formed = walk(bytes.get(4..)?, |code, value| match code {
            option::CLIENT if value.len() <= MAX_IDENTIFIER => message.client = Some(value),
            option::SERVER => message.server = Some(value),
            option::RAPID_COMMIT => message.rapid = true,
            option::IA_NA if message.associations.len() < MAX_ASSOCIATIONS => {
                let Some(id) = array(value, 0) else { return };
                let mut on_link = true;
                walk(value.get(12..).unwrap_or_default(), |code, value| {
                    if let (option::ADDRESS, Some(address)) = (code, array::<16>(value, 0)) {
                        on_link &= own.contains(address.into());
                    }
                });
                message.associations.push((id, on_link));
            }
            _ => {}
        });
        well_formed.then_some(message)
    }
}

fn add(bytes: &mut Vec<u8>, code: u16, value: &[u8]) {
    bytes.extend_from_slice(&code.to_be_bytes());
    bytes.extend_from_slice(&(value.len() as u16).to_be_bytes());
    bytes.extend_from_slice(value);
}

fn association(id: [u8; 4], address: Option<Ipv6Addr>) -> Vec<u8> {
    let mut value = id.to_vec();
    value.extend_from_slice(&(LEASE_SECONDS / 2).to_be_bytes());
    value.extend_from_slice(&(LEASE_SECONDS / 5 * 4).to_be_bytes());
    match address {
        Some(address) => {
            let lifetime = LEASE_SECONDS.to_be_bytes();
            add(&mut value, option::ADDRESS, &[&address.octets()[..], &lifetime, &lifetime].concat());
        }
        None => add(&mut value, option::STATUS, &NO_ADDRESSES.to_be_bytes()),
    }
    value
}

/// Answers a client's message that came from `mac`. `None`: there is nothing to say.
pub fn answer(
    bytes: &[u8],
    mac: Mac,
    addresses: &Addresses,
    told: &Told,
    leases: &mut Leases,
) -> Option<Vec<u8>> {
    let own = addresses.v6?;
    let message = Message::parse(bytes, &own)?;
    let ours = message.server.map(|server| server == server_identifier());
    let must_name_us = matches!(message.kind, kind::REQUEST | kind::RENEW | kind::RELEASE | kind::DECLINE);
    if ours == Some(false) || (must_name_us && ours.is_none()) {
        return None;
    }
    if message.client.is_none() && message.kind != kind::INFORMATION_REQUEST {
        return None;
    }
    let kind = match message.kind {
        kind::SOLICIT if !message.rapid => kind::ADVERTISE,
        kind::SOLICIT | kind::REQUEST | kind::CONFIRM | kind::RENEW | kind::REBIND => kind::REPLY,
        kind::RELEASE | kind::DECLINE | kind::INFORMATION_REQUEST => kind::REPLY,
        _ => return None,
    };
    let [a, b, c] = message.transaction;
    let mut reply = vec![kind, a, b, c];
    add(&mut reply, option::SERVER, &server_identifier());
    if let Some(client) = message.client {
        add(&mut reply, option::CLIENT, client);
    }
    match message.kind {
        kind::CONFIRM => {
            let on_link = message.associations.iter().all(|(_, on_link)| *on_link);
            let status = if on_link { SUCCESS } else { NOT_ON_LINK };
            add(&mut reply, option::STATUS, &status.to_be_bytes());
        }
        kind::RELEASE | kind::DECLINE => add(&mut reply, option::STATUS, &SUCCESS.to_be_bytes()),
        kind::INFORMATION_REQUEST => {}
        _ => {
            if message.kind == kind::SOLICIT && message.rapid {
                add(&mut reply, option::RAPID_COMMIT, &[]);
            }
            for (n, (id, _)) in message.associations.iter().enumerate() {
                // One address per guest: further associations have none.
                let address = if n == 0 { leases.v6(addresses, mac) } else { None };
                add(&mut reply, option::IA_NA, &association(*id, address));
            }
        }
    }
    if addresses.dns {
        add(&mut reply, option::DNS, &own.dns.octets());
        let domains = encode_domains(&told.search, 512);
        if !domains.is_empty() {
            add(&mut reply, option::DOMAINS, &domains);
        }
    }
    Some(reply)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::UserNetConfig;

    fn ask(kind: u8, options: &[(u16, &[u8])]) -> Option<Vec<(u16, Vec<u8>)>> {
        let mut bytes = vec![kind, 1, 2, 3];
        for (code, value) in options {
            add(&mut bytes, *code, value);
        }
        let addresses = UserNetConfig::default().check().unwrap();
        let told = Told { search: vec!["example.org".into()], hostname: None };
        let reply = answer(&bytes, [2; 6], &addresses, &told, &mut Leases::new(None))?;
        assert_eq!(reply[1..4], [1, 2, 3]);
        let mut got = vec![(u16::from(reply[0]), Vec::new())];
        assert!(walk(&reply[4..], |code, value| got.push((code, value.to_vec()))));
        Some(got)
    }

    fn value(reply: &[(u16, Vec<u8>)], code: u16) -> Option<&[u8]> {
        reply.iter().skip(1).find(|(c, _)| *c == code).map(|(_, value)| &value[..])
    }

    const CLIENT: (u16, &[u8]) = (option::CLIENT, b"\0\x01client");
    const IA: (u16, &[u8]) = (option::IA_NA, b"\0\0\0\x07\0\0\0\0\0\0\0\0");

    #[test]
    fn a_guest_gets_its_address_by_four_messages_or_two() {
        let guest: Ipv6Addr = "fd61:746f:6c6c::15".parse().unwrap();
        let own = server_identifier();
        let server = (option::SERVER, &own[..]);
        let rapid = (option::RAPID_COMMIT, &[][..]);
        for (kind, options, reply) in [
            (kind::SOLICIT, vec![CLIENT, IA], kind::ADVERTISE),
            (kind::SOLICIT, vec![CLIENT, IA, rapid], kind::REPLY),
            (kind::REQUEST, vec![CLIENT, IA, server], kind::REPLY),
            (kind::RENEW, vec![CLIENT, IA, server], kind::REPLY),
            (kind::REBIND, vec![CLIENT, IA], kind::REPLY),
        ] {
            let got = ask(kind, &options).unwrap();
            assert_eq!(got[0].0, u16::from(reply));
            assert_eq!(value(&got, option::CLIENT), Some(CLIENT.1));
            assert_eq!(value(&got, option::SERVER), Some(&own[..]));
            let association = value(&got, option::IA_NA).unwrap();
            assert_eq!(association[..4], [0, 0, 0, 7]);
            assert_eq!(association[12..16], [0, 5, 0, 24]);
            assert_eq!(association[16..32], guest.octets());
            assert_eq!(value(&got, option::RAPID_COMMIT).is_some(), options.contains(&rapid));
            assert_eq!(value(&got, option::DOMAINS), Some(&b"\x07example\x03org\x00"[..]));
        }
    }

    #[test]
    fn information_alone_needs_no_identity() {
        let got = ask(kind::INFORMATION_REQUEST, &[]).unwrap();
        let dns: Ipv6Addr = "fd61:746f:6c6c::3".parse().unwrap();
        assert_eq!(value(&got, option::DNS), Some(&dns.octets()[..]));
        assert!(value(&got, option::IA_NA).is_none());
    }

    #[test]
    fn what_is_not_for_us_or_malformed_is_left_alone() {
        assert!(ask(kind::REQUEST, &[CLIENT, IA]).is_none(), "names no server");
        assert!(ask(kind::REQUEST, &[CLIENT, IA, (option::SERVER, b"other")]).is_none());
        assert!(ask(kind::SOLICIT, &[IA]).is_none(), "names no client");
        assert!(ask(kind::ADVERTISE, &[CLIENT]).is_none());
        let addresses = UserNetConfig::default().check().unwrap();
        let mut leases = Leases::new(None);
        let cut = [kind::SOLICIT, 1, 2, 3, 0, 1, 0, 9, 1];
        assert!(answer(&cut, [2; 6], &addresses, &Told::default(), &mut leases).is_none());
    }

    #[test]
    fn an_address_of_another_link_is_not_confirmed() {
        let mut inner = IA.1.to_vec();
        add(&mut inner, option::ADDRESS, &[0x20; 24]);
        let got = ask(kind::CONFIRM, &[CLIENT, (option::IA_NA, &inner)]).unwrap();
        assert_eq!(value(&got, option::STATUS), Some(&NOT_ON_LINK.to_be_bytes()[..]));
    }
}
