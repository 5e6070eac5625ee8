//! How much may be on its way to NATS at once: entries until each is settled, and bodies for as long as they are in memory.
//!
//! Entries that are tried again have room of their own. Large ones that a full stream refuses, say, leave the room for
//! reads to the small ones behind them, which may still fit. Only where [`RETRIES`] and nearly [`ENTRIES`] are tried again at
//! once, no others are read until one of them goes.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Entries on their way at once, those apart that are tried again.
const ENTRIES: usize = 512;
/// Entries that are tried again at once. Each takes some 2 KB of memory, and its tries take the broker's time.
const RETRIES: usize = 2048;
/// Bodies in memory at once, in KiB: a body's room is free again as soon as it is written to NATS. One that is larger than
/// all of it goes alone.
const KIB: u32 = 4 * 1024;
/// How many entries are read from the journal in one go.
pub(super) const READ_ENTRIES: u32 = 128;
/// How many KiB of them.
pub(super) const READ_KIB: u32 = 1024;

const OPEN: &str = "these semaphores are never closed";

/// The room that there is.
pub(crate) struct InFlight {
    entries: Arc<Semaphore>,
    retries: Arc<Semaphore>,
    kib: Arc<Semaphore>,
}

/// Some of it, for what is read in one go.
pub(super) struct Room {
    entries: OwnedSemaphorePermit,
    kib: OwnedSemaphorePermit,
}

/// The room of one entry, until it is settled.
pub(super) struct Slot {
    _permit: OwnedSemaphorePermit,
    /// It is in the room of entries that are tried again.
    apart: bool,
}

/// A body and its room, until the last who looks at it is done.
struct Held {
    body: Bytes,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

impl InFlight {
    pub(crate) fn new() -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        InFlight { entries: semaphore(ENTRIES), retries: semaphore(RETRIES), kib: semaphore(KIB as usize) }
    }

    /// Waits for room for what is read from the journal in one go. Only then is it read: what has been read and waits is
    /// memory that does nothing.
    pub(super) async fn for_a_read(&self) -> Room {
        let entries = self.entries.clone().acquire_many_owned(READ_ENTRIES).await.expect(OPEN);
        Room { entries, kib: self.kib(READ_KIB).await }
    }

    async fn kib(&self, kib: u32) -> OwnedSemaphorePermit {
        self.kib.clone().acquire_many_owned(kib).await.expect(OPEN)
    }

    /// Moves an entry whose try has failed to the room of those that are tried again. It stays where it is while there is
    /// none.
    pub(super) fn set_apart(&self, slot: &mut Slot) {
        if !slot.apart
            && let Ok(permit) = self.retries.clone().try_acquire_owned()
        {
            *slot = Slot { _permit: permit, apart: true };
        }
    }

    /// Returns `true` when no entry can be read before one that is tried again is settled.
    pub(super) fn is_full_of_retries(&self) -> bool {
        self.retries.available_permits() == 0 && self.entries.available_permits() < READ_ENTRIES as usize
    }

    /// Takes the share of one entry out of `room`, which is for a read with no more entries: its own room until it is
    /// settled, and the body, which brings its room with it. Waits where too little is left for the body.
    pub(super) async fn share(&self, room: &mut Room, body: Bytes) -> (Slot, Bytes) {
        let entry = room.entries.split(1).expect("a read has no more entries than there is room for");
        let kib = kib_of(body.len());
        let share = match room.kib.split(kib as usize) {
            Some(share) => share,
            None => {
                // Who waits has nothing: two that each held a part could wait for each other.
                drop(room.kib.split(room.kib.num_permits()));
                self.kib(kib).await
            }
        };
        (Slot { _permit: entry, apart: false }, Bytes::from_owner(Held { body, _room: share }))
    }

    /// What `read` gives, a body of that many bytes, with its room. It begins once there is room.
    pub(crate) async fn reread<E>(
        &self,
        bytes: usize,
        read: impl Future<Output = Result<Bytes, E>>,
    ) -> Result<Bytes, E> {
        let room = self.kib(kib_of(bytes)).await;
        Ok(Bytes::from_owner(Held { body: read.await?, _room: room }))
    }
}

fn kib_of(bytes: usize) -> u32 {
    u32::try_from(bytes / 1024 + 1).unwrap_or(KIB).min(KIB)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    impl InFlight {
        fn left(&self) -> (usize, usize) {
            (self.entries.available_permits(), self.kib.available_permits())
        }
    }

    fn body(bytes: usize) -> Bytes {
        vec![b'x'; bytes].into()
    }

    #[tokio::test]
    async fn what_a_read_did_not_need_is_given_back() {
        let in_flight = InFlight::new();
        let mut room = in_flight.for_a_read().await;
        let shares = [in_flight.share(&mut room, body(0)).await, in_flight.share(&mut room, body(10 * 1024)).await];
        drop(room);
        assert_eq!(in_flight.left(), (ENTRIES - 2, KIB as usize - 12));
        drop(shares);
        assert_eq!(in_flight.left(), (ENTRIES, KIB as usize));
    }

    #[tokio::test]
    async fn nothing_is_read_while_there_is_no_room_for_it() {
        let in_flight = InFlight::new();
        let mut rooms = vec![];
        while let Some(room) = in_flight.for_a_read().now_or_never() {
            rooms.push(room);
        }
        assert_eq!(rooms.len(), ENTRIES / READ_ENTRIES as usize);
        let one = in_flight.share(&mut rooms[0], body(1)).await;
        rooms.remove(0);
        assert!(in_flight.for_a_read().now_or_never().is_none(), "one is still on its way");
        drop(one);
        assert!(in_flight.for_a_read().now_or_never().is_some());
    }

    #[tokio::test]
    async fn what_is_tried_again_leaves_the_room_for_reads() {
        let in_flight = InFlight::new();
        let mut slots = Vec::new();
        for _ in 0..(RETRIES + ENTRIES) / READ_ENTRIES as usize {
            let mut room = in_flight.for_a_read().now_or_never().expect("room for a read");
            for _ in 0..READ_ENTRIES {
                let (mut slot, _) = in_flight.share(&mut room, body(0)).await;
                in_flight.set_apart(&mut slot);
                in_flight.set_apart(&mut slot); // each time that it fails
                slots.push(slot);
            }
        }
        assert!(in_flight.for_a_read().now_or_never().is_none() && in_flight.is_full_of_retries());
        slots.truncate(RETRIES + ENTRIES - READ_ENTRIES as usize);
        assert!(in_flight.for_a_read().now_or_never().is_some() && !in_flight.is_full_of_retries());
        drop(slots);
        assert_eq!((in_flight.left().0, in_flight.retries.available_permits()), (ENTRIES, RETRIES));
    }

    #[tokio::test]
    async fn a_body_has_its_room_until_nobody_looks_at_it_any_more() {
        let in_flight = InFlight::new();
        let mut room = in_flight.for_a_read().await;
        let (entry, body) = in_flight.share(&mut room, body(2000)).await;
        drop(room);
        let part = body.slice(1000..1010);
        drop(body);
        assert_eq!(in_flight.left(), (ENTRIES - 1, KIB as usize - 2));
        assert_eq!(&part[..], b"xxxxxxxxxx");
        drop(part);
        assert_eq!(in_flight.left(), (ENTRIES - 1, KIB as usize), "it is written, and waits to be settled");
        drop(entry);
        assert_eq!(in_flight.left(), (ENTRIES, KIB as usize));
    }

    #[tokio::test]
    async fn a_body_larger_than_all_of_it_goes_alone() {
        let in_flight = InFlight::new();
        let (mut before, mut room) = (in_flight.for_a_read().await, in_flight.for_a_read().await);
        let (_, other) = in_flight.share(&mut before, body(1)).await;
        drop(before);
        let large = body(8 << 20);
        assert!(in_flight.share(&mut room, large.clone()).now_or_never().is_none(), "another one is on its way");
        drop(other);
        let (_, large) = in_flight.share(&mut room, large).now_or_never().unwrap();
        assert_eq!(in_flight.left().1, 0);
        assert!(in_flight.share(&mut room, body(1)).now_or_never().is_none());
        drop(large);
        assert!(in_flight.share(&mut room, body(1)).now_or_never().is_some());
    }

    #[tokio::test]
    async fn two_that_need_all_of_it_do_not_wait_for_each_other() {
        let in_flight = InFlight::new();
        let mut room = in_flight.for_a_read().await;
        let large = body(8 << 20);
        let (mut begun, copy) = (false, large.clone());
        let mut again = Box::pin(in_flight.reread(large.len(), async {
            begun = true;
            Err::<Bytes, _>("nothing there")
        }));
        assert!((&mut again).now_or_never().is_none(), "a read has room");
        let mut share = Box::pin(in_flight.share(&mut room, copy));
        assert!((&mut share).now_or_never().is_none(), "the other one waited first");
        assert_eq!(again.now_or_never(), Some(Err("nothing there")));
        assert!(begun);
        assert!(share.now_or_never().is_some());
    }
}
