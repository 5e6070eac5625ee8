//! Receipts: after COMMIT the worker tells each gateway which of its journal's entries are stored (dead letters included).
//!
//! A message carries the header `Receipt-To`: `<gateway id>.<place in its journal>`. The receipt is a core NATS message on
//! `receipts.<gateway id>` with the places, one a line. It is not acknowledged and may be lost, late or repeated: a gateway
//! that misses one looks after the entry itself, and the repeat that may cost brings another receipt.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use async_nats::HeaderMap;
use bytes::Bytes;

/// Message header: where the receipt goes.
pub const RECEIPT_TO: &str = "Receipt-To";

/// Most places in one message: at 64 bytes each 256 KiB, far below NATS's default `max_payload` of 1 MiB.
pub const PLACES_MAX: usize = 4096;

/// Where a receipt goes, and what it says there. The place is the gateway's own business; a worker hands it back as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiptTo {
    /// As the header has it.
    text: String,
    /// Bytes of it that are the gateway's id; a dot follows.
    gateway: usize,
}

impl ReceiptTo {
    /// For an entry at `place` in the journal of `gateway`.
    pub fn new(gateway: &str, place: impl fmt::Display) -> Self {
        let mut text = String::with_capacity(gateway.len() + 32); // enough for a place of our own
        write!(text, "{gateway}.{place}").expect("a string takes it");
        ReceiptTo { text, gateway: gateway.len() }
    }

    /// The header's value.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// What a message's headers say. None where they say nothing usable; then nobody waits for a receipt.
    pub fn of(headers: Option<&HeaderMap>) -> Option<Self> {
        let text = headers?.get(RECEIPT_TO)?.as_str();
        let (gateway, place) = text.split_once('.')?;
        let token = |text: &str, dots: bool| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || (dots && byte == b'.');
            (1..=64).contains(&text.len()) && text.bytes().all(allowed)
        };
        // The gateway becomes part of a subject: nothing that NATS reads as a wildcard or a separator may be in it.
        (token(gateway, false) && token(place, true))
            .then(|| ReceiptTo { text: text.to_owned(), gateway: gateway.len() })
    }

    fn gateway(&self) -> &str {
        &self.text[..self.gateway]
    }

    fn place(&self) -> &str {
        &self.text[self.gateway + 1..]
    }
}

/// The subject on which a gateway hears.
pub fn subject(gateway: &str) -> String {
    format!("receipts.{gateway}")
}

/// The messages that tell each gateway of its entries among `stored`: subject and payload.
pub fn messages(stored: impl IntoIterator<Item = ReceiptTo>) -> Vec<(String, Bytes)> {
    let stored: Vec<ReceiptTo> = stored.into_iter().collect();
    let mut by_gateway: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for to in &stored {
        by_gateway.entry(to.gateway()).or_default().push(to.place());
    }
    let message = |gateway: &str, places: &[&str]| (subject(gateway), Bytes::from(places.join("\n")));
    by_gateway
        .iter()
        .flat_map(|(gateway, places)| places.chunks(PLACES_MAX).map(move |some| message(gateway, some)))
        .collect()
}

/// The places that a receipt's payload names, as they are written there.
pub fn places(payload: &[u8]) -> impl Iterator<Item = &str> {
    payload.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(RECEIPT_TO, value);
        headers
    }

    #[test]
    fn a_receipt_finds_its_way_back() {
        let sent = [ReceiptTo::new("gwa", "1.2.3"), ReceiptTo::new("gwb", "7.0.9"), ReceiptTo::new("gwa", "1.3.3")];
        let read = sent.iter().map(|to| ReceiptTo::of(Some(&header(to.as_str()))).unwrap());
        let messages = messages(read);
        assert_eq!(messages[0], ("receipts.gwa".into(), Bytes::from("1.2.3\n1.3.3")));
        assert_eq!(messages[1], ("receipts.gwb".into(), Bytes::from("7.0.9")));
        assert_eq!(places(&messages[0].1).collect::<Vec<_>>(), ["1.2.3", "1.3.3"]);
    }

    #[test]
    fn a_header_that_could_reach_another_subject_is_none() {
        for bad in ["", "gw", ".1", "gw.", "*.1", ">.1", "g w.1", "gw.1 2", "gw.*"] {
            assert_eq!(ReceiptTo::of(Some(&header(bad))), None, "{bad}");
        }
        assert_eq!(ReceiptTo::of(None), None);
    }

    #[test]
    fn a_large_batch_is_several_messages() {
        let all = (0..10_000).map(|number| ReceiptTo::new("gw", number));
        let messages = messages(all);
        assert_eq!(messages.len(), 3);
        assert_eq!(messages.iter().flat_map(|(_, payload)| places(payload)).count(), 10_000);
    }
}
