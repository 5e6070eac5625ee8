//! What the journal promises, on real files.

mod asleep;
mod behaviour;
mod damage;
mod disk;
mod model;
mod receipts;

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;

use super::format::{BLOCK, FIRST_RECORD};
use super::segment::Segment;
use super::table::Table;
use super::{Entry, Journal, Limits, OpenError, Place, Recovered, Stored};

/// Segments with room for so many small entries that are appended one by one, each a batch; and a journal with room for
/// many segments.
fn limits(entries: u64) -> Limits {
    let segment_bytes = FIRST_RECORD + (entries + 1) * BLOCK; // the last is for zeros and index
    Limits { max_bytes_on_disk: 64 * segment_bytes, segment_bytes, max_bytes_waiting: 16 << 20, retain: Duration::ZERO }
}

/// An entry that names itself and can be told from every other.
fn entry(id: u32, body_length: usize) -> Entry {
    let mut body = format!("{{\"delivery\":{id}}}").into_bytes();
    body.resize(body.len().max(body_length), u8::try_from(id % 251).unwrap());
    let received_at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_000 + u64::from(id));
    Entry { received_at, meta: Bytes::from(format!("Delivery-Id: {id}")), body: Bytes::from(body) }
}

fn same(stored: &Stored, entry: &Entry) -> bool {
    stored.received_at == entry.received_at && stored.meta == entry.meta && stored.body == entry.body
}

/// Opens a journal; waits for the threads of a handle that was dropped to let go of it.
async fn open(dir: &Path, limits: Limits) -> (Journal, Recovered) {
    let mut opened = None;
    eventually(|| match Journal::open(dir, limits) {
        Ok(open) => {
            opened = Some(open);
            true
        }
        Err(OpenError::InUse { .. }) => false,
        Err(error) => panic!("{error}"),
    })
    .await;
    opened.unwrap()
}

/// Wakes every segment that sleeps.
fn wake_all(table: &mut Table) {
    let asleep: Vec<_> = table.segments.values().filter_map(Segment::sleeper).collect();
    for sleeper in asleep {
        let found = sleeper.read().unwrap();
        assert!(table.wake(&sleeper, found));
    }
}

async fn append_all(journal: &Journal, entries: &[Entry]) -> Vec<Place> {
    let mut places = Vec::new();
    for entry in entries {
        places.push(journal.append(entry.clone()).await.unwrap());
    }
    places
}

/// Waits for a condition that some other thread brings about.
async fn eventually(mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < give_up, "what was waited for did not happen");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Whether a future is still waiting after everything that was ready has run.
async fn is_waiting<T>(future: impl Future<Output = T>) -> bool {
    tokio::time::timeout(Duration::from_millis(20), future).await.is_err()
}
