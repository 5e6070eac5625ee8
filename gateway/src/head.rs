//! Checks of a request's head that hyper does not make (RFC 9112 sections 3.2 and 6.1). They come before path and method:
//! a proxy that reads such a head otherwise than this gateway may see another request in the same bytes.

use std::net::Ipv6Addr;

use hyper::Version;
use hyper::header::{HOST, HeaderMap, TRANSFER_ENCODING};
use hyper::http::request::Parts;

use crate::reject::Reject;

/// Checks `Host` and `Transfer-Encoding`.
///
/// # Errors
/// Fails with [`Reject::BrokenHeaders`] without one valid `Host` or with `chunked` twice. Fails with
/// [`Reject::UnknownCoding`] when another coding stands beside `chunked`.
pub fn check(head: &Parts) -> Result<(), Reject> {
    let mut hosts = head.headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) if is_host(host.as_bytes()) => {}
        (None, None) if head.version != Version::HTTP_11 => {}
        _ => return Err(Reject::BrokenHeaders),
    }
    check_codings(&head.headers)
}

/// Checks all codings of all `Transfer-Encoding` headers. hyper has made sure that the last is `chunked`.
fn check_codings(headers: &HeaderMap) -> Result<(), Reject> {
    let (mut chunked, mut others) = (0, 0);
    for value in headers.get_all(TRANSFER_ENCODING) {
        for coding in value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            match coding {
                b"" => {} // an empty element of a list is ignored (RFC 9110 section 5.6.1.2)
                coding if coding.eq_ignore_ascii_case(b"chunked") => chunked += 1,
                _ => others += 1,
            }
        }
    }
    match (chunked, others) {
        (0 | 1, 0) => Ok(()),
        (0 | 1, _) => Err(Reject::UnknownCoding),
        _ => Err(Reject::BrokenHeaders),
    }
}

/// Tells if this is `uri-host [ ":" port ]` (RFC 9110 section 7.2, RFC 3986 section 3.2.2). The host may be empty.
fn is_host(host: &[u8]) -> bool {
    let (is_name, port) = match host.strip_prefix(b"[") {
        Some(literal) => {
            let Some(end) = literal.iter().position(|byte| *byte == b']') else { return false };
            (is_address(&literal[..end]), &literal[end + 1..])
        }
        None => {
            let end = host.iter().position(|byte| *byte == b':').unwrap_or(host.len());
            (is_registered_name(&host[..end]), &host[end..])
        }
    };
    let is_port = match port {
        [] => true,
        [b':', digits @ ..] => digits.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    is_name && is_port
}

/// An `IPv6address` or an `IPvFuture`, without its brackets.
fn is_address(literal: &[u8]) -> bool {
    let is_future = || {
        let literal = literal.strip_prefix(b"v").or(literal.strip_prefix(b"V"))?;
        let (version, address) = literal.split_at(literal.iter().position(|byte| *byte == b'.')?);
        let is_version = !version.is_empty() && version.iter().all(u8::is_ascii_hexdigit);
        let is_address = address.len() > 1 && address.iter().all(|byte| is_plain(*byte) || *byte == b':');
        (is_version && is_address).then_some(())
    };
    std::str::from_utf8(literal).is_ok_and(|text| text.parse::<Ipv6Addr>().is_ok()) || is_future().is_some()
}

/// A `reg-name`, of which an IPv4 address is a special case.
fn is_registered_name(mut name: &[u8]) -> bool {
    loop {
        name = match name {
            [] => return true,
            [b'%', first, second, rest @ ..] if first.is_ascii_hexdigit() && second.is_ascii_hexdigit() => rest,
            [byte, rest @ ..] if is_plain(*byte) => rest,
            _ => return false,
        }
    }
}

/// `unreserved` or `sub-delims`.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address_and_perhaps_a_port() {
        for host in ["", ":", "x", "a_b.example:443", "127.0.0.1:8080", "[::1]", "[::1]:80", "[v1F.a:b]", "a%C3%A4;=~"]
        {
            assert!(is_host(host.as_bytes()), "{host}");
        }
        let broken =
            ["a b/c@d", "a/b", "a@b", "a:b", "a:1:2", "::1", "[::1", "[::1]x", "[", "[]", "[v.a]", "[v1.]", "a%2", "ä"];
        for host in broken {
            assert!(!is_host(host.as_bytes()), "{host}");
        }
    }
}
