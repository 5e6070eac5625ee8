//! What was appended a moment ago, still in memory: a publisher that keeps up reads nothing from the disk.
//!
//! Bounded, and what is there stays: while it is full, new entries are not remembered. So it holds those that come next to
//! be published, and not the newest, of which a publisher that has fallen behind would find each just forgotten.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::place::Place;
use super::read::{self, Stored};
use super::table::Located;

/// Bytes of entries that are remembered: what waits for a publisher that keeps up. With half as much it would read some of
/// that from the disk, through memory of its own.
const MOST_BYTES: usize = 2 << 20;
/// A smaller body may lie in a connection's buffer, many times its size: it is copied out of that.
const SMALL: usize = 64 << 10;
/// What an entry takes beside its bytes.
const OVERHEAD: usize = 256;

/// Entries in the order in which they were appended.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    entries: VecDeque<Remembered>,
    bytes: usize,
}

#[derive(Debug)]
pub(super) struct Remembered {
    pub(super) place: Place,
    pub(super) received_ms: u64,
    pub(super) meta: Bytes,
    pub(super) body: Bytes,
}

impl Remembered {
    fn bytes(&self) -> usize {
        self.meta.len() + self.body.len() + OVERHEAD
    }
}

impl Recent {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // nothing that holds this can panic half-way
    }

    /// Remembers as many of these as there is room for. They are synced, come after all that were given before, and
    /// nobody knows of them yet.
    pub(super) fn remember(&self, entries: impl IntoIterator<Item = Remembered>) {
        let mut recent = self.lock();
        for mut entry in entries {
            if recent.bytes + entry.bytes() > MOST_BYTES {
                return;
            }
            if entry.body.len() < SMALL {
                entry.body = Bytes::copy_from_slice(&entry.body);
            }
            recent.bytes += entry.bytes();
            recent.entries.push_back(entry);
        }
    }

    /// As if a publisher had fallen behind.
    #[cfg(test)]
    pub(super) fn forget(&self) {
        *self.lock() = Entries::default();
    }

    /// Gives, and forgets, what is remembered of these entries, which are in order: for each the entry, or nothing.
    pub(super) fn take(&self, located: &[Located]) -> Vec<Option<Stored>> {
        let mut recent = self.lock();
        located.iter().map(|entry| recent.take(entry)).collect()
    }
}

impl Entries {
    fn take(&mut self, entry: &Located) -> Option<Stored> {
        // Whoever comes to an entry has passed those before it.
        while self.entries.front().is_some_and(|first| first.place < entry.place) {
            self.pop();
        }
        if self.entries.front()?.place != entry.place {
            return None;
        }
        let Remembered { place, received_ms, meta, body } = self.pop()?;
        let received_at = read::unix_time(received_ms);
        Some(Stored { place, received_at, meta, body, repeats: entry.repeats })
    }

    fn pop(&mut self) -> Option<Remembered> {
        let first = self.entries.pop_front()?;
        self.bytes -= first.bytes();
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::format::Marker;
    use super::*;

    fn remembered(index: u32, bytes: usize) -> Remembered {
        let place = Place { segment: 1, index, check: 0 };
        Remembered { place, received_ms: 7000 + u64::from(index), meta: Bytes::new(), body: vec![b'x'; bytes].into() }
    }

    fn take(recent: &Recent, indices: &[u32]) -> Vec<Option<u32>> {
        let located = |&index: &u32| {
            let place = Place { segment: 1, index, check: 0 };
            Located { place, path: Path::new("none").into(), marker: Marker([1; 8]), offset: 0, length: 0, repeats: 3 }
        };
        let taken = recent.take(&indices.iter().map(located).collect::<Vec<_>>());
        let check = |stored: Stored| {
            assert_eq!((stored.repeats, read::unix_ms(stored.received_at)), (3, 7000 + u64::from(stored.place.index)));
            stored.place.index
        };
        taken.into_iter().map(|stored| stored.map(check)).collect()
    }

    #[test]
    fn what_is_remembered_is_given_once_and_in_order() {
        let recent = Recent::default();
        recent.remember((5..10).map(|index| remembered(index, 10)));
        assert_eq!(take(&recent, &[3, 5, 6]), [None, Some(5), Some(6)]);
        assert_eq!(take(&recent, &[5, 8]), [None, Some(8)], "seven was passed over");
        assert_eq!(take(&recent, &[7, 9, 10]), [None, Some(9), None]);
        let left = recent.lock();
        assert_eq!((left.bytes, left.entries.len()), (0, 0));
    }

    #[test]
    fn what_is_full_keeps_what_comes_next() {
        let recent = Recent::default();
        let each = MOST_BYTES / 4;
        recent.remember((0..10).map(|index| remembered(index, each - OVERHEAD)));
        assert_eq!(take(&recent, &[0]), [Some(0)]);
        recent.remember((10..12).map(|index| remembered(index, each - OVERHEAD)));
        assert_eq!(take(&recent, &[1, 2, 3, 4, 9, 10, 11]), [Some(1), Some(2), Some(3), None, None, Some(10), None]);
        recent.remember([remembered(20, MOST_BYTES)]);
        assert_eq!(take(&recent, &[20]), [None]);
    }
}
