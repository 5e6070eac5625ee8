//! How much may be on its way to NATS at once: in entries, and in bytes of their bodies.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Entries on their way at once.
const ENTRIES: usize = 512;
/// Bodies on their way at once, in KiB. One that is larger than all of it goes alone.
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

/// Some of it, taken until this is dropped.
pub(super) struct Room {
    entries: OwnedSemaphorePermit,
    kib: OwnedSemaphorePermit,
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

    /// Takes the share of one entry with a body of that many bytes out of `room`, which is for a read with no more entries.
    /// Waits where too little of it is left for the body.
    pub(super) async fn share(&self, room: &mut Room, body: usize) -> Room {
        let kib = u32::try_from(body / 1024 + 1).unwrap_or(KIB).min(KIB);
        let left = u32::try_from(room.kib.num_permits()).unwrap_or(KIB);
        if kib > left {
            room.kib.merge(self.kib(kib - left).await);
        }
        let entries = room.entries.split(1).expect("a read has no more entries than there is room for");
        Room { entries, kib: room.kib.split(kib as usize).expect("there is as much now") }
    }
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

    #[tokio::test]
    async fn what_a_read_did_not_need_is_given_back() {
        let in_flight = InFlight::new();
        let mut room = in_flight.for_a_read().await;
        let shares = [in_flight.share(&mut room, 0).await, in_flight.share(&mut room, 10 * 1024).await];
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
        let one = in_flight.share(&mut rooms[0], 1).await;
        rooms.remove(0);
        assert!(in_flight.for_a_read().now_or_never().is_none(), "one is still on its way");
        drop(one);
        assert!(in_flight.for_a_read().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_body_larger_than_all_of_it_goes_alone() {
        let in_flight = InFlight::new();
        let (mut before, mut room) = (in_flight.for_a_read().await, in_flight.for_a_read().await);
        let other = in_flight.share(&mut before, 1).await;
        drop(before);
        assert!(in_flight.share(&mut room, 64 << 20).now_or_never().is_none(), "another one is on its way");
        drop(other);
        let large = in_flight.share(&mut room, 64 << 20).now_or_never().unwrap();
        assert_eq!(in_flight.left(), (ENTRIES - READ_ENTRIES as usize, 0));
        assert!(in_flight.share(&mut room, 1).now_or_never().is_none());
        drop(large);
        assert!(in_flight.share(&mut room, 1).now_or_never().is_some());
    }
}
