//! What is known of one segment while the journal is open: for each entry where it begins, when it came, and its state
//! in one byte. Bodies stay on disk. No I/O here.

use std::fs::File;
use std::sync::Arc;

use super::format::{Marker, Previous};
use super::place::Place;

/// How far a delivery has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// On disk, and not known to be in the stream.
    Journalled,
    /// In the stream; not known to be stored.
    Published,
    /// Stored for good; nothing more to do.
    Confirmed,
    /// Refused by NATS for a reason that waiting does not mend.
    SetAside,
}

impl State {
    /// In the order in which a delivery goes through them.
    pub const ALL: [State; 4] = [State::Journalled, State::Published, State::Confirmed, State::SetAside];

    /// The name that metrics and `gateway journal status` use.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Journalled => "journalled",
            State::Published => "published",
            State::Confirmed => "confirmed",
            State::SetAside => "set_aside",
        }
    }
}

/// Why NATS will not take an entry as things are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Larger than the server's `max_payload` or the stream's `max_msg_size`.
    TooLarge,
    /// No stream listens on its subject, or the subject is not valid.
    Subject,
    /// The account may not publish there.
    Permission,
    /// Any other answer that says never.
    Other,
}

impl Refusal {
    /// In the order of their numbers in a marks file.
    pub const ALL: [Refusal; 4] = [Refusal::TooLarge, Refusal::Subject, Refusal::Permission, Refusal::Other];

    /// The name that metrics and `gateway journal status` use.
    pub fn as_str(self) -> &'static str {
        match self {
            Refusal::TooLarge => "too_large",
            Refusal::Subject => "subject",
            Refusal::Permission => "permission",
            Refusal::Other => "other",
        }
    }
}

/// The state of an entry, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bits(u8);

impl Bits {
    const PUBLISHED: u8 = 1;
    const CONFIRMED: u8 = 2;
    const SET_ASIDE: u8 = 4;
    /// Handed to a publisher. Not kept across a restart.
    const TAKEN: u8 = 8;
    /// No entry can be read here. Found out anew at each start.
    const HOLE: u8 = 16;
    /// The upper three bits: which [`Refusal`].
    const REFUSAL: u32 = 5;

    pub(super) const NEW: Bits = Bits(0);
    pub(super) const GONE: Bits = Bits(Bits::HOLE);

    /// From a byte of a marks file.
    pub(super) fn from_marks(byte: u8) -> Bits {
        Bits(byte)
    }

    fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }

    /// `None` where there is no entry.
    pub(super) fn state(self) -> Option<State> {
        if self.has(Bits::HOLE) {
            None
        } else if self.has(Bits::CONFIRMED) {
            Some(State::Confirmed)
        } else if self.has(Bits::SET_ASIDE) {
            Some(State::SetAside)
        } else if self.has(Bits::PUBLISHED) {
            Some(State::Published)
        } else {
            Some(State::Journalled)
        }
    }

    pub(super) fn refusal(self) -> Option<Refusal> {
        let number = usize::from(self.0 >> Bits::REFUSAL);
        (self.state() == Some(State::SetAside)).then(|| Refusal::ALL.get(number).copied().unwrap_or(Refusal::Other))
    }

    /// Whether a publisher may take it.
    fn waits(self) -> bool {
        self.state() == Some(State::Journalled) && !self.has(Bits::TAKEN)
    }

    fn set_aside(refusal: Refusal) -> Bits {
        let number = Refusal::ALL.iter().position(|&other| other == refusal).expect("ALL has every refusal");
        Bits(Bits::SET_ASIDE | u8::try_from(number).expect("there are at most eight refusals") << Bits::REFUSAL)
    }

    /// What of this is still true after a restart. A publish is not: the stream may have lost the message meanwhile,
    /// so what is not confirmed is published again.
    fn after_restart(self) -> Bits {
        match self.state() {
            Some(State::Confirmed) => Bits(Bits::CONFIRMED),
            Some(State::SetAside) => self,
            Some(State::Journalled | State::Published) | None => Bits::NEW,
        }
    }
}

/// A number of entries, and the bytes that their records take on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// How many.
    pub entries: u64,
    /// Their records' bytes.
    pub bytes: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.entries += other.entries;
        self.bytes += other.bytes;
    }
}

/// One more record, already synced.
#[derive(Debug, Clone, Copy)]
pub(super) struct Appended {
    pub(super) offset: u32,
    /// Unix time, seconds.
    pub(super) received: u32,
}

#[derive(Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) marker: Marker,
    pub(super) check: u32,
    pub(super) file: Arc<File>,
    /// Bytes the file takes on disk, what is only reserved included.
    pub(super) on_disk: u64,
    /// Still being written to.
    pub(super) active: bool,
    /// Something in it is lost. Its file is kept for people when its entries are done with.
    pub(super) damaged: bool,
    /// A state changed since the marks file was written.
    pub(super) marks_changed: bool,
    /// Where the last record ends.
    pub(super) end: u64,
    pub(super) offsets: Vec<u32>,
    /// Unix time, seconds: fine enough to say how old the oldest is.
    pub(super) received: Vec<u32>,
    bits: Vec<Bits>,
    // The columns below have no row for any entry until the first row is needed: a backlog that cannot be published
    // has no use for them.
    /// The stream sequence that JetStream promised.
    sequences: Vec<u64>,
    /// [`Ticks`] of the PubAck.
    published_at: Vec<Ticks>,
    /// How often the entry was found missing from the stream.
    repeats: Vec<u8>,
    tallies: [Tally; State::ALL.len()],
    waiting: u32,
    /// No entry before this one waits.
    first_waiting: usize,
}

/// Tenths of a second since the journal was opened.
pub(super) type Ticks = u32;

impl Segment {
    pub(super) fn new(number: u64, marker: Marker, file: Arc<File>, on_disk: u64, end: u64) -> Segment {
        Segment {
            number,
            marker,
            check: marker.check(),
            file,
            on_disk,
            active: false,
            damaged: false,
            marks_changed: false,
            end,
            offsets: Vec::new(),
            received: Vec::new(),
            bits: Vec::new(),
            sequences: Vec::new(),
            published_at: Vec::new(),
            repeats: Vec::new(),
            tallies: Default::default(),
            waiting: 0,
            first_waiting: 0,
        }
    }

    /// A segment found on disk: its columns, and the entries of them that cannot be read.
    pub(super) fn fill(&mut self, offsets: Vec<u32>, received: Vec<u32>, holes: &[u32]) {
        self.bits = vec![Bits::NEW; offsets.len()];
        for &hole in holes {
            self.bits[hole as usize] = Bits::GONE;
        }
        self.offsets = offsets;
        self.received = received;
        self.recount();
    }

    /// Takes over `states`, the content of a marks file, as they are: for somebody who only looks.
    pub(super) fn show_marks(&mut self, states: &[u8]) {
        for (bits, &byte) in self.bits.iter_mut().zip(states) {
            if *bits != Bits::GONE {
                *bits = Bits::from_marks(byte);
            }
        }
        self.recount();
    }

    /// Takes over what of `states`, the content of a marks file, holds after a restart. Entries appended after the
    /// marks were written are as new.
    pub(super) fn apply_marks(&mut self, states: &[u8]) {
        for (bits, &byte) in self.bits.iter_mut().zip(states) {
            if *bits != Bits::GONE {
                *bits = Bits::from_marks(byte).after_restart();
            }
        }
        self.recount();
    }

    fn recount(&mut self) {
        self.tallies = Default::default();
        self.waiting = 0;
        self.first_waiting = 0;
        for index in 0..self.bits.len() {
            self.count(index, true);
        }
    }

    /// Adds entry `index` to the tallies of its state, or takes it out.
    fn count(&mut self, index: usize, add: bool) {
        let Some(state) = self.bits[index].state() else { return };
        let bytes = self.length(index);
        let tally = &mut self.tallies[state as usize];
        let waits = u32::from(self.bits[index].waits());
        if add {
            *tally += Tally { entries: 1, bytes };
            self.waiting += waits;
        } else {
            tally.entries -= 1;
            tally.bytes -= bytes;
            self.waiting -= waits;
        }
    }

    fn change(&mut self, index: usize, to: Bits) {
        self.count(index, false);
        self.bits[index] = to;
        self.count(index, true);
        if to.waits() {
            self.first_waiting = self.first_waiting.min(index);
        }
        self.marks_changed = true;
    }

    /// The records of one batch, the last of which ends at `end`.
    pub(super) fn extend(&mut self, appended: &[Appended], end: u64) {
        let first = self.bits.len();
        self.offsets.extend(appended.iter().map(|record| record.offset));
        self.received.extend(appended.iter().map(|record| record.received));
        self.bits.resize(self.offsets.len(), Bits::NEW);
        self.end = end;
        for index in first..self.bits.len() {
            self.count(index, true);
        }
    }

    /// Nothing more will be written here.
    pub(super) fn close(&mut self, on_disk: u64) {
        self.active = false;
        self.on_disk = on_disk;
        self.offsets.shrink_to_fit();
        self.received.shrink_to_fit();
        self.bits.shrink_to_fit();
    }

    pub(super) fn entries(&self) -> usize {
        self.bits.len()
    }

    /// What the next segment's header says of this one.
    pub(super) fn as_previous(&self) -> Previous {
        let entries = u32::try_from(self.entries()).expect("an entry's index is 32 bits wide");
        Previous { number: self.number, end: self.end, entries }
    }

    /// Bytes of the record of entry `index`.
    pub(super) fn length(&self, index: usize) -> u64 {
        let end = self.offsets.get(index + 1).map_or(self.end, |&next| u64::from(next));
        end - u64::from(self.offsets[index])
    }

    pub(super) fn place(&self, index: usize) -> Place {
        let index = u32::try_from(index).expect("an entry's index is 32 bits wide");
        Place { segment: self.number, index, check: self.check }
    }

    pub(super) fn bits(&self, index: usize) -> Bits {
        self.bits[index]
    }

    pub(super) fn repeats(&self, index: usize) -> u8 {
        self.repeats.get(index).copied().unwrap_or(0)
    }

    pub(super) fn tally(&self, state: State) -> Tally {
        self.tallies[state as usize]
    }

    /// When the oldest entry in `state` was received. Unix time, seconds.
    pub(super) fn oldest(&self, state: State) -> Option<u32> {
        if self.tally(state).entries == 0 {
            return None;
        }
        let index = self.bits.iter().position(|bits| bits.state() == Some(state))?;
        Some(self.received[index])
    }

    /// When the newest entry was received. Unix time, seconds.
    pub(super) fn newest(&self) -> u32 {
        self.received.iter().copied().max().unwrap_or(0)
    }

    /// Every entry is confirmed (or cannot be read).
    pub(super) fn settled(&self) -> bool {
        self.tally(State::Published).entries == 0 && self.expendable()
    }

    /// Every entry is in the stream or confirmed: the segment may make room.
    pub(super) fn expendable(&self) -> bool {
        self.tally(State::Journalled).entries == 0 && self.tally(State::SetAside).entries == 0
    }

    /// The oldest entry that waits for a publisher, which gets it now.
    pub(super) fn take_next(&mut self) -> Option<usize> {
        if self.waiting == 0 {
            return None;
        }
        let waiting = self.bits[self.first_waiting..].iter().position(|bits| bits.waits());
        let index = self.first_waiting + waiting.expect("counted as waiting, and none before first_waiting does");
        self.first_waiting = index + 1;
        self.count(index, false);
        self.bits[index].0 |= Bits::TAKEN;
        self.count(index, true);
        Some(index)
    }

    /// How long the record is that [`Segment::take_next`] would give.
    pub(super) fn next_length(&self) -> Option<u64> {
        if self.waiting == 0 {
            return None;
        }
        let index = self.bits[self.first_waiting..].iter().position(|bits| bits.waits())?;
        Some(self.length(self.first_waiting + index))
    }

    /// Hands back what [`Segment::take_next`] gave, unless something became of it.
    pub(super) fn release(&mut self, index: usize) {
        if self.bits[index].state() == Some(State::Journalled) {
            self.change(index, Bits::NEW);
        }
    }

    pub(super) fn publish(&mut self, index: usize, sequence: u64, now: Ticks) {
        let state = self.bits[index].state();
        if state.is_none() || state == Some(State::Confirmed) {
            return;
        }
        if self.sequences.len() <= index {
            self.sequences.resize(self.bits.len(), 0);
            self.published_at.resize(self.bits.len(), 0);
        }
        self.sequences[index] = sequence;
        self.published_at[index] = now;
        self.change(index, Bits(Bits::PUBLISHED));
    }

    /// Whether that was news.
    pub(super) fn confirm(&mut self, index: usize) -> bool {
        let news = self.bits[index].state().is_some_and(|state| state != State::Confirmed);
        if news {
            self.change(index, Bits(Bits::CONFIRMED));
        }
        news
    }

    pub(super) fn set_aside(&mut self, index: usize, refusal: Refusal) {
        if self.bits[index].state().is_some_and(|state| state != State::Confirmed) {
            self.change(index, Bits::set_aside(refusal));
        }
    }

    /// Lets a set-aside entry be tried again. Whether it was one.
    pub(super) fn retry(&mut self, index: usize) -> bool {
        let was = self.bits[index].state() == Some(State::SetAside);
        if was {
            self.change(index, Bits::NEW);
        }
        was
    }

    /// A published entry that the stream does not have (any more): it waits again.
    pub(super) fn lose(&mut self, index: usize) {
        if self.bits[index].state() == Some(State::Published) {
            if self.repeats.len() <= index {
                self.repeats.resize(self.bits.len(), 0);
            }
            self.repeats[index] = self.repeats[index].saturating_add(1);
            self.change(index, Bits::NEW);
        }
    }

    /// No entry can be read at `index` after all. Whether that was news.
    pub(super) fn make_hole(&mut self, index: usize) -> bool {
        let news = self.bits[index].state().is_some();
        if news {
            self.damaged = true;
            self.change(index, Bits::GONE);
        }
        news
    }

    /// Entries from `from` on that were published at or before `until` and are not confirmed, each with the sequence
    /// it was promised.
    pub(super) fn unconfirmed(&self, from: usize, until: Ticks) -> impl Iterator<Item = (usize, u64)> {
        let overdue = move |&index: &usize| {
            self.bits[index].state() == Some(State::Published) && self.published_at[index] <= until
        };
        (from..self.bits.len()).filter(overdue).map(|index| (index, self.sequences[index]))
    }

    /// When the published entry at `index` was acknowledged.
    pub(super) fn published_at(&self, index: usize) -> Ticks {
        self.published_at[index]
    }

    /// The content of a marks file. Holes are left out: they are what the file says, not what happened to it.
    pub(super) fn marks(&self) -> Vec<u8> {
        self.bits.iter().map(|bits| if *bits == Bits::GONE { 0 } else { bits.0 & !Bits::TAKEN }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(entries: u32) -> Segment {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut segment = Segment::new(7, Marker([1; 8]), file, 1 << 20, 4096);
        let appended: Vec<_> = (0..entries).map(|n| Appended { offset: 4096 + 100 * n, received: 1000 + n }).collect();
        segment.extend(&appended, 4096 + 100 * u64::from(entries));
        segment
    }

    fn entries(segment: &Segment) -> [u64; 4] {
        State::ALL.map(|state| segment.tally(state).entries)
    }

    #[test]
    fn an_entry_goes_its_way_and_the_tallies_with_it() {
        let mut segment = segment(3);
        assert_eq!(entries(&segment), [3, 0, 0, 0]);
        assert_eq!(segment.take_next(), Some(0));
        assert_eq!(segment.take_next(), Some(1));
        segment.publish(0, 41, 5);
        assert_eq!(entries(&segment), [2, 1, 0, 0]);
        assert_eq!(segment.tally(State::Published).bytes, 100);
        segment.set_aside(1, Refusal::Permission);
        assert_eq!(segment.bits(1).refusal(), Some(Refusal::Permission));
        assert!(!segment.expendable());
        assert!(segment.retry(1) && !segment.retry(0));
        segment.release(0); // published meanwhile: stays so
        assert_eq!(entries(&segment), [2, 1, 0, 0]);
        assert_eq!([segment.take_next(), segment.take_next(), segment.take_next()], [Some(1), Some(2), None]);
        segment.publish(1, 42, 6);
        segment.publish(2, 43, 7);
        assert!(segment.expendable() && !segment.settled());
        assert!((0..3).all(|index| segment.confirm(index)) && !segment.confirm(0));
        assert!(segment.settled());
        assert_eq!(entries(&segment), [0, 0, 3, 0]);
    }

    #[test]
    fn a_confirmed_entry_stays_confirmed() {
        let mut segment = segment(1);
        segment.confirm(0);
        segment.publish(0, 9, 0);
        segment.set_aside(0, Refusal::TooLarge);
        segment.release(0);
        segment.lose(0);
        assert!(!segment.retry(0));
        assert_eq!(segment.bits(0).state(), Some(State::Confirmed));
        assert_eq!(segment.take_next(), None);
    }

    #[test]
    fn a_lost_entry_waits_again_and_counts_its_repeats() {
        let mut segment = segment(2);
        segment.take_next();
        segment.publish(0, 41, 5);
        let unconfirmed = |from, until| segment.unconfirmed(from, until).collect::<Vec<_>>();
        assert_eq!([unconfirmed(0, 4), unconfirmed(0, 5), unconfirmed(1, 5)], [vec![], vec![(0, 41)], vec![]]);
        segment.lose(0);
        segment.lose(0); // no longer published: not lost twice
        assert_eq!((segment.repeats(0), segment.repeats(1)), (1, 0));
        assert_eq!(segment.next_length(), Some(100));
        assert_eq!(segment.take_next(), Some(0));
    }

    #[test]
    fn marks_bring_back_what_still_holds() {
        let mut before = segment(5);
        before.take_next();
        before.publish(1, 1, 1);
        before.confirm(2);
        before.set_aside(3, Refusal::Subject);
        assert!(before.make_hole(4) && !before.make_hole(4) && before.damaged);
        let mut after = segment(6);
        after.apply_marks(&before.marks());
        assert_eq!(entries(&after), [4, 0, 1, 1]); // the hole's bytes are looked at again, the sixth entry is new
        assert_eq!(after.bits(3).refusal(), Some(Refusal::Subject));
    }
}
