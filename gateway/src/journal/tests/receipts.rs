//! Receipts: none lets an entry go that JetStream has not acknowledged.

use tempfile::tempdir;

use super::super::{Judged, Receipt, Refusal, State};
use super::*;

const MIB: u64 = 1 << 20;
const TAG: u64 = 7;

fn receipts(places: &[Place], tag: u64) -> Vec<Receipt> {
    places.iter().map(|&place| Receipt { place, tag }).collect()
}

fn states(journal: &Journal) -> [u64; 4] {
    journal.stats().shares.map(|share| share.tally.entries)
}

/// A journal with so many entries, all of them with a publisher under [`TAG`].
async fn handed_out(dir: &Path, entries: u32) -> (Journal, Vec<Place>) {
    let (journal, _) = open(dir, limits(100)).await;
    let places = append_all(&journal, &(0..entries).map(|id| entry(id, 10)).collect::<Vec<_>>()).await;
    assert_eq!(journal.take(100, MIB).await.len(), places.len());
    places.iter().for_each(|place| journal.hand_out(*place, TAG));
    (journal, places)
}

#[tokio::test]
async fn a_receipt_before_jetstreams_ack_counts_when_the_ack_comes() {
    let dir = tempdir().unwrap();
    let (journal, places) = handed_out(dir.path(), 2).await;
    let early = Judged { early: 1, ..Judged::default() };
    assert_eq!(journal.judge(&receipts(&places[..1], TAG)), early);
    assert_eq!(states(&journal), [2, 0, 0, 0], "nothing is let go");
    assert!(journal.mark_published(places[0], 1));
    assert!(!journal.mark_published(places[1], 2));
    assert_eq!(states(&journal), [0, 1, 1, 0]);
    let right = Judged { right: vec![places[1]], ..Judged::default() };
    assert_eq!(journal.judge(&receipts(&places, TAG)), right, "the first is settled");
}

#[tokio::test]
async fn a_receipt_with_another_tag_is_wrong_whatever_the_entrys_state() {
    let dir = tempdir().unwrap();
    let (journal, places) = handed_out(dir.path(), 3).await;
    journal.mark_published(places[1], 1);
    journal.mark_set_aside(places[2], Refusal::TooLarge);
    let wrong = Judged { wrong_tag: 3, ..Judged::default() };
    assert_eq!(journal.judge(&receipts(&places, TAG + 1)), wrong);
    assert_eq!(journal.judge(&receipts(&places, 0)), wrong, "0 is no tag");
    let foreign: Vec<_> = places.iter().map(|place| Place { check: !place.check, ..*place }).collect();
    assert_eq!(journal.judge(&receipts(&foreign, TAG)), Judged::default(), "not of this journal");
}

#[tokio::test]
async fn what_nats_refused_is_not_settled_by_the_right_tag_either() {
    let dir = tempdir().unwrap();
    let (journal, places) = handed_out(dir.path(), 2).await;
    journal.judge(&receipts(&places[..1], TAG)); // remembered, then refused
    places.iter().for_each(|place| journal.mark_set_aside(*place, Refusal::TooLarge));
    let refused = Judged { set_aside: 2, ..Judged::default() };
    assert_eq!(journal.judge(&receipts(&places, TAG)), refused);
    assert_eq!(states(&journal)[State::SetAside as usize], 2);
    // Tried again and taken, it is as any other.
    assert_eq!(journal.retry_set_aside(Refusal::TooLarge), 2);
    assert!(!journal.mark_published(places[0], 1));
    assert_eq!(journal.judge(&receipts(&places[..1], TAG)).right, places[..1]);
}

#[tokio::test]
async fn after_a_restart_a_receipt_counts_for_what_was_published_before() {
    let dir = tempdir().unwrap();
    let (journal, places) = handed_out(dir.path(), 3).await;
    journal.mark_published(places[0], 1);
    journal.mark_set_aside(places[2], Refusal::Subject);
    journal.close().await;
    drop(journal);
    let (journal, recovered) = open(dir.path(), limits(100)).await;
    assert_eq!((recovered.unpublished, recovered.unverified, recovered.set_aside), (1, 1, 1));
    let judged = journal.judge(&receipts(&places, TAG));
    assert_eq!(judged.not_handed_out, receipts(&places[..2], TAG), "their tags stand on disk");
    assert_eq!(judged.set_aside, 1);
    for (place, id) in places.iter().zip(0..) {
        assert_eq!(journal.read_header_block(*place).await.unwrap(), entry(id, 10).meta);
    }
    let judged = journal.judge_earlier(&judged.not_handed_out);
    assert_eq!((judged.right, judged.early), (places[..1].to_vec(), 1), "the second had no ack");
    // The second is published again, and then its receipt counts.
    assert_eq!(journal.mark_confirmed(&places[..1]).await, 1);
    assert_eq!(journal.take(100, MIB).await.len(), 1);
    assert!(journal.mark_published(places[1], 9));
    assert_eq!(states(&journal), [0, 0, 2, 1]);
}

#[tokio::test]
async fn a_header_block_longer_than_a_block_is_read_whole() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(100)).await;
    let long = Entry { meta: Bytes::from(vec![b'm'; 10_000]), ..entry(1, 20_000) };
    let place = journal.append(long.clone()).await.unwrap();
    assert_eq!(journal.read_header_block(place).await.unwrap(), long.meta);
}
