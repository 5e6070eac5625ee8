//! Every segment of an open journal, and the questions asked about all of them together. No I/O here; the one mutex
//! around it is only ever held for a moment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::asleep::{Found, Sleeper};
use super::direct::SegmentFile;
use super::format::Marker;
use super::place::Place;
use super::segment::{Columns, Segment};
use super::state::{Evidence, Refusal, State};
use super::stats::{Counters, Trouble};
use super::unreadable::Unreadable;

/// A file made ready for the writer before it needs one.
#[derive(Debug)]
pub(super) struct Spare {
    pub(super) number: u64,
    pub(super) file: Arc<SegmentFile>,
    pub(super) path: PathBuf,
    /// Bytes reserved for it on disk.
    pub(super) capacity: u64,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) segments: BTreeMap<u64, Segment>,
    pub(super) spare: Option<Spare>,
    /// The active segment is half full and there is no spare.
    pub(super) spare_wanted: bool,
    /// The number that the next file gets. Never one that any file here has had.
    pub(super) next_number: u64,
    /// Bytes of files being made or removed.
    pub(super) reserved: u64,
    /// The keeper makes a spare.
    pub(super) making_spare: bool,
    /// Number of segments that are being removed.
    pub(super) being_removed: usize,
    /// Number of segments that the keeper is to seal. Each gives back what it does not need.
    pub(super) being_sealed: usize,
    /// Number of these that have ended.
    pub(super) space_given: u64,
    /// Bytes and number of files kept for people.
    pub(super) kept: (u64, usize),
    pub(super) trouble: Option<Trouble>,
    pub(super) counters: Counters,
    pub(super) unreadable: Unreadable,
}

/// What a reader needs to fetch one entry, without the table.
#[derive(Debug, Clone)]
pub(super) struct Located {
    pub(super) place: Place,
    pub(super) path: Arc<Path>,
    pub(super) marker: Marker,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) repeats: u8,
}

/// An entry with a sequence and without a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unconfirmed {
    /// Where it is in the journal.
    pub place: Place,
    /// The stream sequence that its PubAck named.
    pub sequence: u64,
    /// The ground on which it is taken to be there.
    pub evidence: Evidence,
    /// Bytes of its record.
    pub bytes: u64,
    /// How often it was published and then found missing from the stream; see [`super::Stored::repeats`].
    pub repeats: u8,
}

impl Table {
    /// The segment and the entry in it, if `place` speaks of one that is here.
    pub(super) fn entry(&mut self, place: Place) -> Option<(&mut Segment, usize)> {
        let segment = self.segments.get_mut(&place.segment)?;
        let index = place.index as usize;
        (segment.check == place.check && index < segment.entries()).then_some((segment, index))
    }

    /// A segment that was just taken out of the table is about to be removed. Its bytes count until that is done.
    pub(super) fn begin_removal(&mut self, segment: &Segment) {
        self.reserved += segment.on_disk;
        self.being_removed += 1;
    }

    pub(super) fn end_removal(&mut self, segment: &Segment) {
        self.reserved -= segment.on_disk;
        self.being_removed -= 1;
        self.space_given += 1;
    }

    pub(super) fn end_seal(&mut self) {
        self.being_sealed -= 1;
        self.space_given += 1;
    }

    /// Tells if bytes are about to be given back.
    pub(super) fn gets_room(&self) -> bool {
        self.being_removed + self.being_sealed > 0
    }

    /// The keeper has made a spare, or could not.
    pub(super) fn end_spare(&mut self, spare: Option<Spare>) {
        self.spare = spare;
        self.making_spare = false;
        self.space_given += 1;
    }

    /// Bytes that the journal's segments take on disk, or are about to.
    pub(super) fn on_disk(&self) -> u64 {
        let spare = self.spare.as_ref().map_or(0, |spare| spare.capacity);
        self.segments.values().map(|segment| segment.on_disk).sum::<u64>() + spare + self.reserved + self.kept.0
    }

    /// Where the entry at `place` is in its file; `None` where there is none, or its segment sleeps.
    pub(super) fn locate(&self, place: Place) -> Option<Located> {
        let segment = self.segments.get(&place.segment).filter(|segment| segment.check == place.check)?;
        let (columns, index) = (segment.columns()?, place.index as usize);
        let is_there = index < segment.entries() && segment.bits(index).state().is_some();
        is_there.then(|| Self::located(segment, columns, index))
    }

    /// `columns` are those of `segment`.
    pub(super) fn located(segment: &Segment, columns: &Columns, index: usize) -> Located {
        Located {
            place: segment.place(index),
            path: Arc::clone(&segment.path),
            marker: segment.marker,
            offset: u64::from(columns.offsets[index]),
            length: columns.length(index, segment.end),
            repeats: columns.repeats(index),
        }
    }

    /// The oldest entries that wait for a publisher: at most `entries` of them and `bytes` of records, but one at
    /// least. They are the caller's until marked or released.
    ///
    /// # Errors
    /// The segment that has to be woken before so many can be told. Nothing was taken.
    pub(super) fn take(&mut self, entries: usize, bytes: u64) -> Result<Vec<Located>, Sleeper> {
        let entries = entries.max(1);
        if let Some(sleeper) = self.first_to_wake(entries) {
            return Err(sleeper);
        }
        let mut taken = Vec::new();
        let mut room = bytes;
        for segment in self.segments.values_mut() {
            while let Some(length) = segment.next_length() {
                if taken.len() >= entries || (length > room && !taken.is_empty()) {
                    return Ok(taken);
                }
                let Some((index, columns)) = segment.take_next().zip(segment.columns()) else { break };
                room = room.saturating_sub(length);
                taken.push(Self::located(segment, columns, index));
            }
        }
        Ok(taken)
    }

    /// The first segment that sleeps and holds one of the oldest `entries` that wait.
    fn first_to_wake(&self, entries: usize) -> Option<Sleeper> {
        let mut before = 0;
        for segment in self.segments.values().filter(|segment| segment.waiting() > 0) {
            if before >= entries {
                return None;
            }
            if let Some(sleeper) = segment.sleeper() {
                return Some(sleeper);
            }
            before += segment.waiting();
        }
        None
    }

    /// The segment of the entry at `place`, if that is there and sleeps.
    pub(super) fn sleeper(&mut self, place: Place) -> Option<Sleeper> {
        self.entry(place)?.0.sleeper()
    }

    /// Wakes a segment with what its file says, unless it is awake or gone. Whether it was woken.
    pub(super) fn wake(&mut self, sleeper: &Sleeper, found: Found) -> bool {
        let Some(segment) = self.asleep(sleeper) else { return false };
        let lost = found.damage.map_or(0, |(lost, _)| lost);
        segment.wake(found);
        let first = segment.place(0);
        self.unreadable.forget(first);
        self.counters.damaged_records += u64::from(lost);
        true
    }

    /// The disk does not give what would wake this segment. Returns the wait before its entries are offered again, which is
    /// zero where none of them waits to be published. `None` when the segment is awake, or gone.
    pub(super) fn give_up(&mut self, sleeper: &Sleeper, error: &str) -> Option<Duration> {
        let segment = self.asleep(sleeper)?;
        // At first that is each of its entries; later it is the one that somebody wants to read nevertheless.
        let all = segment.entries() as u64;
        let refused = if segment.give_up() { all } else { 1 };
        let first = segment.place(0);
        let waits = segment.tally(State::Journalled).entries > 0;
        self.counters.unreadable_records += refused;
        Some(if waits { self.unreadable.refused(first, all, Instant::now(), error) } else { Duration::ZERO })
    }

    /// The disk does not give this entry. Returns the wait before it is offered again.
    pub(super) fn refused(&mut self, place: Place, error: &str) -> Duration {
        self.counters.unreadable_records += 1;
        self.unreadable.refused(place, 1, Instant::now(), error)
    }

    /// The disk gave this entry, or no reader needs it any more.
    pub(super) fn forget_unreadable(&mut self, place: Place) {
        if self.unreadable.entries() > 0 {
            self.unreadable.forget(place);
        }
    }

    /// Offers again what the disk did not give some time ago.
    pub(super) fn offer_unreadable(&mut self, now: Instant) {
        while let Some(place) = self.unreadable.take_due(now) {
            let offered = self.entry(place).is_some_and(|(segment, index)| segment.offer_again(index));
            if !offered {
                self.unreadable.forget(place); // it was confirmed, or its segment went
            }
        }
    }

    fn asleep(&mut self, sleeper: &Sleeper) -> Option<&mut Segment> {
        let segment = self.segments.get_mut(&sleeper.previous.number)?;
        (segment.marker == sleeper.marker && segment.columns().is_none()).then_some(segment)
    }

    /// Lets those fall asleep that are only kept for `redrive`.
    pub(super) fn let_settled_sleep(&mut self) {
        let settled = self.segments.values_mut().filter(|segment| !segment.active && segment.settled());
        settled.for_each(Segment::sleep);
    }

    /// The first segment from `number` on that holds unverified entries, or published ones where these are wanted.
    pub(super) fn next_with_unconfirmed(&self, number: u64, published: bool) -> Option<&Segment> {
        let mut segments = self.segments.range(number..).map(|(_, segment)| segment);
        let holds =
            |segment: &Segment| segment.unverified() > 0 || (published && segment.tally(State::Published).entries > 0);
        segments.find(|segment| holds(segment))
    }

    /// Lets the entries that were set aside for `refusal` be tried again. How many.
    pub(super) fn retry_set_aside(&mut self, refusal: Refusal) -> usize {
        let mut retried = 0;
        let holders = self.segments.values_mut().filter(|segment| segment.tally(State::SetAside).entries > 0);
        for segment in holders {
            for index in 0..segment.entries() {
                if segment.bits(index).refusal() == Some(refusal) {
                    retried += usize::from(segment.retry(index));
                }
            }
        }
        retried
    }

    /// The segment that makes room when there is none, or `None` where every one holds something that nobody else
    /// has. What is only kept for `redrive` goes first, then what the stream has, each oldest first.
    pub(super) fn expendable(&self) -> Option<u64> {
        let settled = self.all_expendable().find(|segment| segment.settled());
        settled.or_else(|| self.all_expendable().next()).map(|segment| segment.number)
    }

    /// How much room there is to be made.
    pub(super) fn expendable_bytes(&self) -> u64 {
        self.all_expendable().map(|segment| segment.on_disk).sum()
    }

    fn all_expendable(&self) -> impl Iterator<Item = &Segment> {
        // A damaged file is kept for people, so it makes no room.
        self.segments.values().filter(|segment| !segment.active && !segment.damaged && segment.expendable())
    }

    /// Segments with nothing left to do and no reason to stay: every entry is confirmed and was received before
    /// `kept_since` (Unix time, seconds).
    pub(super) fn finished(&self, kept_since: u32) -> Vec<u64> {
        let done = |segment: &&Segment| !segment.active && segment.settled() && segment.newest() < kept_since;
        self.segments.values().filter(done).map(|segment| segment.number).collect()
    }
}
