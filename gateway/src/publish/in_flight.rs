//! How much may be on its way to NATS at once: entries until each is settled, and bodies for as long as they are in memory.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Entries on their way at once.
const ENTRIES: usize = 512;
/// Bodies in memory at once, in KiB: a body's room is free again as soon as it is written to NATS. One that is larger than
/// all of it goes alone.
const KIB: u32 = 4 * 1024;
/// How many entries are read from the journal in one go.
pub(super) const READ_ENTRIES: u32 = 128;
/// How many KiB of them.
pub(super) const READ_KIB: u32 = 1024;

const OPEN: &str = "these semaphores are never closed";

/// The room that there is.
pub(super) struct InFlight {
    entries: Arc<Semaphore>,
    kib: Arc<Semaphore>,
}

/// Some of it, for what is read in one go.
pub(super) struct Room {
    entries: OwnedSemaphorePermit,
    kib: OwnedSemaphorePermit,
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
    pub(super) fn new() -> Self {
        InFlight { entries: Arc::new(Semaphore::new(ENTRIES)), kib: Arc::new(Semaphore::new(KIB as usize)) }
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

    /// Takes the share of one entry out of `room`, which is for a read with no more entries: its own room until it is
    /// settled, and the body, which brings its room with it. Waits where too little is left for the body.
    pub(super) async fn share(&self, room: &mut Room, body: Bytes) -> (OwnedSemaphorePermit, Bytes) {
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
        (entry, Bytes::from_owner(Held { body, _room: share }))
    }

    /// What `read` gives, a body of that many bytes, with its room. It begins once there is room.
    pub(super) async fn reread<E>(
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
