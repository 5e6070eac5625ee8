//! Ports for servers that may be stopped and started again on the same one.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Mutex, PoisonError};

/// Below the range from which Linux (32768 up) and macOS (49152 up) give ports to outgoing connections and to those who
/// ask for any: while a server is down, nothing but another call of [`free`] takes its port.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// A port of 127.0.0.1 that nothing listens on now and that this process was not given before.
///
/// # Errors
/// When none is left.
pub fn free() -> anyhow::Result<u16> {
    static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let given = given.get_or_insert_default();
    // Begins anywhere, so that processes at the same time seldom try the same.
    let begin = u16::from_le_bytes(*uuid::Uuid::new_v4().as_bytes().first_chunk().unwrap_or(&[0, 0]));
    let count = RANGE.end - RANGE.start;
    let mut candidates = (0..count).map(|step| RANGE.start + (begin % count + step) % count);
    candidates
        .find(|port| is_free(*port) && given.insert(*port))
        .ok_or_else(|| anyhow::anyhow!("no free port between {} and {}", RANGE.start, RANGE.end))
}

/// Whether nothing listens on this port of 127.0.0.1 (nor on all addresses) now.
pub fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_given_once_and_never_while_something_listens() {
        let ports: HashSet<u16> = (0..200).map(|_| free().unwrap()).collect();
        assert_eq!(ports.len(), 200);
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, free().unwrap())).unwrap();
        assert!(!is_free(taken.local_addr().unwrap().port()));
    }
}
