//! Receipts: how the gateway hears from the workers that deliveries are stored.
//!
//! A receipt lets an entry of the journal go, so a forged one would lose a delivery that was answered 202. Whatever
//! comes on the subject is hostile input ([`shared::hostile`]):
//! - A message goes out with `Receipt-To: <gateway>.<place>.<tag>`. The tag is a MAC over place and delivery id, by a key
//!   in the journal's folder. A worker hands place and tag back as they are.
//! - A receipt counts where its tag is that of its entry, and JetStream has acknowledged the entry (see
//!   [`crate::journal::Judged`]). Any other is refused, counted, and told at most once a minute.
//! - A message larger than [`MESSAGE_MAX`] is dropped unread; few may wait, and other tasks run between two of them.
//!
//! Receipts may be lost, late or repeated, and may be meant for another journal: see [`crate::confirm`].

use std::fmt;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use shared::delivery::{Delivery, DeliveryId};
use shared::receipt::{self, PLACES_MAX, ReceiptTo};

use crate::journal::{Journal, Judged, Place, Receipt};
use crate::metrics::{Metrics, Refused};
use crate::publish::Publisher;

/// Most bytes in one message. A worker puts at most [`PLACES_MAX`] receipts of less than 64 bytes into one.
const MESSAGE_MAX: usize = 256 * 1024;
/// Most entries of one message that are looked up on disk. The others are published again, which brings a receipt.
const LOOK_UPS_MAX: usize = 256;
/// Refused receipts have at most one log line in this time.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// The key from which the tags of receipts follow. Never shown.
#[derive(Clone)]
pub struct ReceiptKey(Hmac<Sha256>);

impl fmt::Debug for ReceiptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReceiptKey(not shown)")
    }
}

impl ReceiptKey {
    /// From the bytes that the journal keeps.
    pub fn new(key: &[u8; 32]) -> Self {
        ReceiptKey(Hmac::new_from_slice(key).expect("HMAC takes a key of any length"))
    }

    /// The tag of this delivery at this place: 64 bits of an HMAC-SHA256, never 0.
    pub fn tag(&self, place: Place, id: &DeliveryId) -> u64 {
        let mac = self.0.clone().chain_update(place.to_bytes()).chain_update(id.as_str()).finalize();
        let first = mac.into_bytes()[..8].try_into().expect("HMAC-SHA256 has 32 bytes");
        u64::from_be_bytes(first).max(1)
    }

    /// The header `Receipt-To` of this delivery at this place.
    pub fn receipt_to(&self, gateway: &str, place: Place, id: &DeliveryId) -> ReceiptTo {
        to(gateway, place, self.tag(place, id))
    }
}

/// The header `Receipt-To` with this tag.
pub(crate) fn to(gateway: &str, place: Place, tag: u64) -> ReceiptTo {
    ReceiptTo::new(gateway, format_args!("{place}.{tag:016x}"))
}

/// A line of a receipt: a place and a tag, in the one spelling in which they are written.
pub fn parse(line: &str) -> Option<Receipt> {
    let (place, tag) = line.rsplit_once('.')?;
    let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let tag = (tag.len() == 16 && tag.bytes().all(hex)).then(|| u64::from_str_radix(tag, 16).ok())??;
    Some(Receipt { place: place.parse().ok()?, tag })
}

/// Takes receipts, without end.
pub async fn take(journal: &Journal, publisher: &Publisher, metrics: &Metrics) {
    let key = ReceiptKey::new(journal.receipt_key());
    let mut told = Told { since: None, refused: [0; Refused::ALL.len()] };
    loop {
        let linked = publisher.link().current();
        let mut succeeded = pin!(publisher.link().succeeded(&linked));
        // Fails only where the client has ended, and will be replaced.
        if let Ok(mut receipts) = linked.client.subscribe(receipt::subject(journal.gateway_id())).await {
            loop {
                let message = tokio::select! {
                    message = receipts.next() => message,
                    () = &mut succeeded => None, // another client hears them from now on
                };
                let Some(message) = message else { break };
                take_message(journal, &key, metrics, &message.payload, &mut told).await;
                told.tell();
                tokio::task::yield_now().await;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// One message of receipts.
async fn take_message(journal: &Journal, key: &ReceiptKey, metrics: &Metrics, payload: &[u8], told: &mut Told) {
    let mut refuse = |reason: Refused, count: usize| {
        metrics.receipts_refused(reason, count);
        told.refused[reason as usize] += count;
    };
    if payload.len() > MESSAGE_MAX {
        return refuse(Refused::TooLarge, 1);
    }
    let (mut receipts, mut malformed) = (Vec::new(), 0);
    for line in receipt::places(payload).take(PLACES_MAX) {
        match parse(line) {
            Some(receipt) => receipts.push(receipt),
            None => malformed += 1,
        }
    }
    refuse(Refused::Malformed, malformed);
    let mut judged = journal.judge(&receipts);
    let unknown = std::mem::take(&mut judged.not_handed_out);
    let earlier = judge_earlier(journal, key, &unknown).await;
    for Judged { wrong_tag, set_aside, .. } in [&judged, &earlier] {
        refuse(Refused::WrongTag, *wrong_tag);
        refuse(Refused::SetAside, *set_aside);
    }
    let news = journal.mark_confirmed(&[judged.right, earlier.right].concat()).await;
    metrics.confirmed(news);
    tracing::debug!(receipts = receipts.len(), news, early = judged.early + earlier.early, "receipts");
}

/// Judges receipts for entries that this process has not handed out: their delivery ids, and so their tags, stand on
/// disk.
async fn judge_earlier(journal: &Journal, key: &ReceiptKey, receipts: &[Receipt]) -> Judged {
    let (mut verified, mut wrong_tag) = (Vec::new(), 0);
    for receipt in receipts.iter().take(LOOK_UPS_MAX) {
        // An entry that the disk does not give is told when it is read to be published.
        let Ok(block) = journal.read_header_block(receipt.place).await else { continue };
        let Ok(delivery) = Delivery::from_journal(&block, bytes::Bytes::new()) else { continue };
        if key.tag(receipt.place, &delivery.id) == receipt.tag {
            verified.push(*receipt);
        } else {
            wrong_tag += 1;
        }
    }
    Judged { wrong_tag, ..journal.judge_earlier(&verified) }
}

/// Refused receipts that no log line has named yet.
struct Told {
    /// Time of the last log line.
    since: Option<Instant>,
    refused: [usize; Refused::ALL.len()],
}

impl Told {
    /// Logs the refused receipts, at most once a minute.
    fn tell(&mut self) {
        let due = self.since.is_none_or(|since| since.elapsed() >= TELL_EVERY);
        if !due || self.refused.iter().all(|count| *count == 0) {
            return;
        }
        let counts = Refused::ALL.map(|reason| (reason.as_str(), self.refused[reason as usize]));
        let counts = counts.iter().filter(|(_, count)| *count > 0).map(|(reason, count)| format!("{count} {reason}"));
        let counts = counts.collect::<Vec<_>>().join(", ");
        tracing::warn!(
            "refused receipts that do not fit the journal's entries ({counts}). Either another program publishes on this \
             gateway's subject, or the journal has a new key of receipts. No delivery is let go by them"
        );
        *self = Told { since: Some(Instant::now()), refused: [0; Refused::ALL.len()] };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_of_one_place_and_one_delivery() {
        let key = ReceiptKey::new(&[7; 32]);
        let (place, other): (Place, Place) = ("1.2.0000000a".parse().unwrap(), "1.3.0000000a".parse().unwrap());
        let id = |text: &str| DeliveryId::parse(text).unwrap();
        let tag = key.tag(place, &id("a"));
        assert_eq!(tag, key.tag(place, &id("a")));
        assert_ne!(tag, key.tag(other, &id("a")));
        assert_ne!(tag, key.tag(place, &id("b")));
        assert_ne!(tag, ReceiptKey::new(&[8; 32]).tag(place, &id("a")));
        let line = key.receipt_to("gw", place, &id("a"));
        let line = line.as_str().strip_prefix("gw.").unwrap();
        assert_eq!(parse(line), Some(Receipt { place, tag }));
    }

    #[test]
    fn a_line_that_is_no_receipt_is_none() {
        for line in
            ["", "1.2.0000000a", "1.2.0000000a.1", "1.2.0000000a.+00000000000000a", "x.2.0000000a.0000000000000001"]
        {
            assert_eq!(parse(line), None, "{line}");
        }
        assert!(parse(&format!("{}.{}.ffffffff.{:016x}", u64::MAX, u32::MAX, 1)).is_some());
    }
}
