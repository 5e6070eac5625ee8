//! Entries that the disk has refused to give, and the moments at which they are read again.
//!
//! A disk that fails for a moment (a path that fails over, a controller that resets) is well again within seconds, so the
//! first wait is short. It doubles each time: a sector that is lost costs next to nothing.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use super::place::Place;

/// The first wait. Shorter than most faults of a disk last, and long enough for no busy loop.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(600);

/// Entries, and whole segments by their first entry.
#[derive(Debug, Default)]
pub(super) struct Unreadable {
    known: HashMap<Place, Refused>,
    /// When each of these is read again. Those that are being read are not in it.
    due: BTreeSet<(Instant, Place)>,
    entries: u64,
    /// The system's words on the last of them.
    error: String,
}

#[derive(Debug)]
struct Refused {
    entries: u64,
    /// The wait before the next time.
    wait: Duration,
    due: Option<Instant>,
}

impl Unreadable {
    /// Notes that the disk does not give the entry at `place`, or the segment of that many `entries` which begins there.
    /// Returns the wait before it is read again.
    pub(super) fn refused(&mut self, place: Place, entries: u64, now: Instant, error: &str) -> Duration {
        let known = self.known.entry(place).or_insert(Refused { entries, wait: FIRST, due: None });
        error.clone_into(&mut self.error);
        if let Some(due) = known.due {
            return due.saturating_duration_since(now); // another reader wants it meanwhile
        }
        if known.wait == FIRST {
            self.entries += entries;
        }
        let wait = known.wait;
        known.wait = LONGEST.min(wait * 2);
        known.due = Some(now + wait);
        self.due.insert((now + wait, place));
        wait
    }

    /// Forgets `place`: the disk gave it, or nothing is left to do there.
    pub(super) fn forget(&mut self, place: Place) {
        let Some(known) = self.known.remove(&place) else { return };
        self.entries -= known.entries;
        if let Some(due) = known.due {
            self.due.remove(&(due, place));
        }
    }

    /// One that is to be read again by now. It stays known until it is forgotten or refused again.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Place> {
        let (_, place) = self.due.first().copied().filter(|(due, _)| *due <= now)?;
        self.due.pop_first();
        if let Some(known) = self.known.get_mut(&place) {
            known.due = None;
        }
        Some(place)
    }

    /// The time at which the next is read again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// Number of entries that the disk has refused and not given since.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// The system's words on the last refusal; `None` while the disk gives everything.
    pub(super) fn error(&self) -> Option<&str> {
        (self.entries > 0).then_some(&self.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(index: u32) -> Place {
        Place { segment: 1, index, check: 0 }
    }

    #[test]
    fn each_is_read_again_after_a_wait_that_doubles() {
        let (mut unreadable, begin) = (Unreadable::default(), Instant::now());
        let mut now = begin;
        for seconds in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600] {
            let wait = Duration::from_secs(seconds);
            assert_eq!(unreadable.refused(place(1), 1, now, "EIO"), wait);
            assert_eq!(unreadable.refused(place(1), 1, now, "EIO"), wait, "while it waits, nothing changes");
            assert_eq!((unreadable.next(), unreadable.take_due(now)), (Some(now + wait), None));
            now += wait;
            assert_eq!((unreadable.take_due(now), unreadable.take_due(now)), (Some(place(1)), None));
            assert_eq!((unreadable.entries(), unreadable.error()), (1, Some("EIO")), "not given yet");
        }
        unreadable.forget(place(1));
        assert_eq!((unreadable.entries(), unreadable.error(), unreadable.next()), (0, None, None));
        assert_eq!(unreadable.refused(place(1), 1, now, "EIO"), FIRST, "a new fault");
    }

    #[test]
    fn the_one_that_is_due_first_comes_first_and_one_that_is_given_does_not_come() {
        let (mut unreadable, now) = (Unreadable::default(), Instant::now());
        unreadable.refused(place(2), 1, now, "");
        unreadable.refused(place(1), 1, now + FIRST / 2, "");
        unreadable.refused(place(3), 7, now, "");
        assert_eq!(unreadable.entries(), 9);
        unreadable.forget(place(3));
        unreadable.forget(place(3));
        assert_eq!((unreadable.entries(), unreadable.next()), (2, Some(now + FIRST)));
        let due = [(); 3].map(|()| unreadable.take_due(now + FIRST * 2));
        assert_eq!(due, [Some(place(2)), Some(place(1)), None]);
    }
}
