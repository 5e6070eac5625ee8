//! Receipts: which of them may confirm an entry.
//!
//! A receipt names an entry by its place and shows the tag under which the entry was handed to the publisher. The tag
//! follows from a key that never leaves the gateway, so a right tag proves that the entry went out. It does not prove
//! that the stream took it: NATS shows a message to every subscriber, also one that the stream refuses. So a receipt
//! counts only together with JetStream's ack, and one that comes before is remembered until the ack comes. An ack that
//! calls the entry a duplicate may be for another message: then the receipt waits until the stream has shown the entry's.

use super::segment::ReceiptVerdict;
use super::{Journal, Place};

/// A receipt as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    /// The entry that it names.
    pub place: Place,
    /// The tag that it shows.
    pub tag: u64,
}

/// The judgement on a message of receipts. A receipt for an entry that is confirmed already, or that is not of this
/// journal, is in none of these.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judged {
    /// Entries that may be confirmed.
    pub right: Vec<Place>,
    /// Receipts for entries that this process has not handed out: an earlier process may have.
    pub not_handed_out: Vec<Receipt>,
    /// Receipts that are remembered until JetStream acknowledges their entry.
    pub early: usize,
    /// Receipts with another tag than their entry's.
    pub wrong_tag: usize,
    /// Receipts for entries that NATS has refused.
    pub set_aside: usize,
}

impl Journal {
    /// The entry goes to the publisher under this tag (never 0), which its receipt must show.
    pub fn hand_out(&self, place: Place, tag: u64) {
        self.change(place, |segment, index| segment.hand_out(index, tag));
    }

    /// Judges receipts, and confirms nothing. Costs no I/O.
    pub fn judge(&self, receipts: &[Receipt]) -> Judged {
        let (mut judged, mut table) = (Judged::default(), self.0.shared.table());
        for receipt in receipts {
            if let Some((segment, index)) = table.entry(receipt.place) {
                judged.note(segment.judge_receipt(index, receipt.tag), receipt);
            }
        }
        judged
    }

    /// Judges receipts whose tags were found right, for entries that this process has not handed out. Their segments
    /// are awake: their header blocks have just been read.
    pub fn judge_earlier(&self, verified: &[Receipt]) -> Judged {
        let (mut judged, mut table) = (Judged::default(), self.0.shared.table());
        for receipt in verified {
            if let Some((segment, index)) = table.entry(receipt.place) {
                judged.note(segment.receipt_of_before(index), receipt);
            }
        }
        judged
    }
}

impl Judged {
    fn note(&mut self, verdict: ReceiptVerdict, receipt: &Receipt) {
        match verdict {
            ReceiptVerdict::Right => self.right.push(receipt.place),
            ReceiptVerdict::NotHandedOut => self.not_handed_out.push(*receipt),
            ReceiptVerdict::Early => self.early += 1,
            ReceiptVerdict::WrongTag => self.wrong_tag += 1,
            ReceiptVerdict::SetAside => self.set_aside += 1,
            ReceiptVerdict::Settled => {}
        }
    }
}
