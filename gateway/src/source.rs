//! The source of a request: the address that log lines and warnings name.
//!
//! - The source is the peer's address. If the peer is a trusted proxy (`GATEWAY_TRUSTED_PROXIES`), it is the right-most
//!   address of `Forwarded` (RFC 7239, `for=`) or `X-Forwarded-For` that is not itself a trusted proxy.
//! - Each proxy appends the address that it was reached from. So the list is read from its right end, and an entry counts
//!   only where a trusted proxy wrote it. Everything further left is the sender's.
//! - An entry that is no address ends the reading. The source is then the last address before it.
//! - If a request has both headers and they name two addresses, the source is the peer. One of the headers is the
//!   sender's then, and the gateway cannot tell which.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use hyper::HeaderMap;

const FORWARDED: &str = "forwarded";
const X_FORWARDED_FOR: &str = "x-forwarded-for";

/// The proxies whose word on a request's source counts: `GATEWAY_TRUSTED_PROXIES`.
#[derive(Debug, Clone, Default)]
pub struct TrustedProxies(Vec<RangeInclusive<IpAddr>>);

impl TrustedProxies {
    /// Reads addresses and CIDR blocks, separated by commas. Returns `None` when an entry is neither.
    pub fn parse(text: &str) -> Option<Self> {
        text.split(',').map(|entry| block(entry.trim())).collect::<Option<_>>().map(TrustedProxies)
    }

    /// The source of a request with these headers that came from `peer`. An IPv4 address written as IPv6
    /// (`::ffff:192.0.2.1`) is the IPv4 address.
    pub fn source(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let peer = peer.to_canonical();
        let read = |name, entry| headers.contains_key(name).then(|| self.last_untrusted(peer, headers, name, entry));
        match (read(FORWARDED, forwarded), read(X_FORWARDED_FOR, address)) {
            (Some(one), Some(other)) if one != other => peer,
            (Some(source), _) | (None, Some(source)) => source,
            (None, None) => peer,
        }
    }

    /// Goes from `peer` to the left through all values of header `name`, for as long as a trusted proxy wrote the entry.
    fn last_untrusted(
        &self,
        peer: IpAddr,
        headers: &HeaderMap,
        name: &str,
        address_of: fn(&str) -> Option<IpAddr>,
    ) -> IpAddr {
        let mut source = peer;
        for value in headers.get_all(name).iter().rev() {
            for entry in from_right(&String::from_utf8_lossy(value.as_bytes()), ',') {
                if !self.trusts(source) {
                    return source;
                }
                let Some(address) = address_of(entry) else { return source };
                source = address;
            }
        }
        source
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|block| block.contains(&address))
    }
}

/// An address, or a CIDR block such as `10.0.0.0/8`. Bits beyond the prefix do not matter.
fn block(text: &str) -> Option<RangeInclusive<IpAddr>> {
    let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    let address: IpAddr = address.parse().ok()?;
    let width: u32 = if address.is_ipv4() { 32 } else { 128 };
    let free = width.checked_sub(prefix.map_or(Ok(width), str::parse).ok()?)?;
    Some(match address.to_canonical() {
        IpAddr::V4(address) => {
            let host = u32::MAX.checked_shr(32_u32.checked_sub(free)?).unwrap_or(0);
            let bits = address.to_bits();
            IpAddr::V4((bits & !host).into())..=IpAddr::V4((bits | host).into())
        }
        IpAddr::V6(address) => {
            let host = u128::MAX.checked_shr(128 - free).unwrap_or(0);
            let bits = address.to_bits();
            IpAddr::V6((bits & !host).into())..=IpAddr::V6((bits | host).into())
        }
    })
}

/// The parts of a list, the last first. A separator between quotes separates nothing. Quotes pair up from the right, so an
/// open quote on the left, which may be the sender's, cannot swallow what a proxy appended.
fn from_right(list: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut rest = Some(list);
    std::iter::from_fn(move || {
        let text = rest?;
        let mut quoted = false;
        let cut = text.rfind(|character| {
            quoted ^= character == '"';
            character == separator && !quoted
        });
        rest = cut.map(|cut| &text[..cut]);
        Some(cut.map_or(text, |cut| &text[cut + separator.len_utf8()..]).trim())
    })
}

/// The address of a `Forwarded` element such as `for="[2001:db8::1]:4711";proto=https`. `None` when it has no `for`, or
/// two. No address needs a backslash: an element with one may be cut at a quote that is none.
fn forwarded(element: &str) -> Option<IpAddr> {
    let for_node = |pair: &str| {
        let (name, node) = pair.split_once('=')?;
        name.eq_ignore_ascii_case("for").then(|| address(node.trim_matches('"')))
    };
    let addresses: Vec<_> = from_right(element, ';').filter_map(for_node).collect();
    match addresses[..] {
        [address] if !element.contains('\\') => address,
        _ => None,
    }
}

/// An address with or without a port; IPv6 with or without brackets.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().ok().or_else(|| Some(text.parse::<SocketAddr>().ok()?.ip()));
    address.map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn blocks_hold_their_addresses_and_no_others() {
        let table = [
            ("192.0.2.1", &["192.0.2.1"][..], &["192.0.2.2", "::c000:201"][..]),
            ("10.1.2.3/8", &["10.0.0.0", "10.255.255.255"], &["9.255.255.255", "11.0.0.0"]),
            ("0.0.0.0/0", &["0.0.0.0", "255.255.255.255"], &["::1"]),
            ("::/0", &["::", "ffff:ffff::1"], &["127.0.0.1"]),
            ("2001:db8:1::/48", &["2001:db8:1::", "2001:db8:1:ffff::1"], &["2001:db8:2::", "2001:db8::1"]),
            ("2001:db8::1", &["2001:db8::1"], &["2001:db8::2"]),
            ("::ffff:10.0.0.0/104", &["10.1.2.3"], &["11.0.0.0"]),
        ];
        for (text, inside, outside) in table {
            let proxies = TrustedProxies::parse(text).unwrap();
            assert!(inside.iter().all(|address| proxies.trusts(ip(address))), "{text}");
            assert!(!outside.iter().any(|address| proxies.trusts(ip(address))), "{text}");
        }
        let several = TrustedProxies::parse("10.0.0.0/8, 2001:db8::1 ,127.0.0.1").unwrap();
        assert!(["10.0.0.1", "2001:db8::1", "127.0.0.1"].iter().all(|address| several.trusts(ip(address))));
        for bad in [
            "",
            ",",
            "10.0.0.1,",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/-1",
            "::/129",
            "::ffff:10.0.0.0/95",
            "10.0",
            "proxy",
        ] {
            assert!(TrustedProxies::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn an_address_is_read_in_every_form_that_proxies_write() {
        for text in ["192.0.2.1", "192.0.2.1:80", "::ffff:192.0.2.1", "[::ffff:192.0.2.1]", "[::ffff:192.0.2.1]:80"] {
            assert_eq!(address(text), Some(ip("192.0.2.1")), "{text}");
        }
        for text in ["2001:db8::1", "[2001:db8::1]", "[2001:db8::1]:80"] {
            assert_eq!(address(text), Some(ip("2001:db8::1")), "{text}");
        }
        for bad in
            ["", "unknown", "_hidden", "192.0.2.1:", "192.0.2.256", "[2001:db8::1", "2001:db8::1]", "192.0.2.1 x"]
        {
            assert_eq!(address(bad), None, "{bad}");
        }
    }

    fn source(peer: &str, headers: &[(&str, &str)]) -> IpAddr {
        let proxies = TrustedProxies::parse("10.0.0.0/8,2001:db8:1::/48").unwrap();
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name: hyper::header::HeaderName = name.parse().unwrap();
            map.append(name, hyper::header::HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        proxies.source(ip(peer), &map)
    }

    #[test]
    fn the_source_is_the_last_address_that_a_trusted_proxy_vouches_for() {
        let (forwarded, list) = ("Forwarded", "X-Forwarded-For");
        type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
        let table: &[Case<'_>] = &[
            ("192.0.2.9", &[(list, "203.0.113.1")], "192.0.2.9"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("::ffff:10.0.0.1", &[(list, "203.0.113.1")], "203.0.113.1"),
            ("10.0.0.1", &[(list, "198.51.100.1, 203.0.113.1, 10.0.0.2")], "203.0.113.1"),
            ("10.0.0.1", &[(list, "198.51.100.1"), (list, "203.0.113.1"), (list, "10.0.0.2")], "203.0.113.1"),
            ("10.0.0.1", &[(list, "203.0.113.1, é, 10.0.0.2")], "10.0.0.2"),
            ("10.0.0.1", &[(list, "é, 203.0.113.1")], "203.0.113.1"),
            ("10.0.0.1", &[(list, "\", 203.0.113.1")], "203.0.113.1"),
            ("10.0.0.1", &[(list, "10.0.0.3, 10.0.0.2")], "10.0.0.3"),
            ("10.0.0.1", &[(list, "")], "10.0.0.1"),
            ("2001:db8:1::1", &[(forwarded, "for=203.0.113.1")], "203.0.113.1"),
            ("10.0.0.1", &[(forwarded, "For=\"[2001:db8::7]:4711\";proto=https;by=10.0.0.1")], "2001:db8::7"),
            ("10.0.0.1", &[(forwarded, "for=198.51.100.1, by=\"a,b\";for=203.0.113.1")], "203.0.113.1"),
            ("10.0.0.1", &[(forwarded, "for=203.0.113.1;host=\"a;for=198.51.100.1\"")], "203.0.113.1"),
            ("10.0.0.1", &[(forwarded, "for=203.0.113.1;host=\"a\\\", for=198.51.100.1\"")], "10.0.0.1"),
            ("10.0.0.1", &[(forwarded, "for=203.0.113.1;host=\"\\\", for=198.51.100.1, x=\\\"\"")], "10.0.0.1"),
            ("10.0.0.1", &[(forwarded, "for=\", for=203.0.113.1")], "203.0.113.1"),
            ("10.0.0.1", &[(forwarded, "for=198.51.100.1;for=203.0.113.1")], "10.0.0.1"),
            ("10.0.0.1", &[(forwarded, "for=203.0.113.1, proto=https")], "10.0.0.1"),
            ("10.0.0.1", &[(forwarded, "for=_hidden")], "10.0.0.1"),
            ("10.0.0.1", &[(forwarded, "for=203.0.113.1"), (list, "203.0.113.1")], "203.0.113.1"),
            ("10.0.0.1", &[(forwarded, "for=203.0.113.1"), (list, "203.0.113.2")], "10.0.0.1"),
        ];
        for (peer, headers, expected) in table {
            assert_eq!(source(peer, headers), ip(expected), "{peer} {headers:?}");
        }
    }
}
