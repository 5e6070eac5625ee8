//! What is known of one segment while the journal is open. No I/O here.
//!
//! A segment that is *awake* has a row in memory for each entry: where it begins, when it came, its state in a byte,
//! and what a publisher learnt. One that is *asleep* has none: all its entries are alike, and the rest is in the index
//! at the end of its file, from which it is woken (see [`super::asleep`]). Bodies stay on disk in any case.

use std::path::Path;
use std::sync::Arc;

use subtle::ConstantTimeEq as _;

use super::asleep::{Found, Sleeper};
use super::format::{Marker, Marks, Previous};
use super::place::Place;
use super::state::{Bits, Refusal, State, Tally};

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
    /// Its file. That is opened when it is needed: a journal may have more segments than a process may have files open.
    pub(super) path: Arc<Path>,
    /// Bytes the file takes on disk, what is only reserved included.
    pub(super) on_disk: u64,
    /// Still being written to.
    pub(super) active: bool,
    /// The file ends with an index that says where each entry begins and when it came.
    pub(super) sealed: bool,
    /// Something in it is lost. Its file is kept for people when its entries are done with.
    pub(super) damaged: bool,
    /// A state changed since the marks file was written.
    pub(super) marks_changed: bool,
    /// Where the last record ends.
    pub(super) end: u64,
    entries: usize,
    /// When the first entry was received, and the newest. Unix time, seconds.
    first: u32,
    newest: u32,
    counts: Counts,
    rows: Rows,
}

/// The rows of a segment.
#[derive(Debug)]
enum Rows {
    Awake(Columns),
    /// Every entry is in this state.
    Asleep(Bits),
}

/// What is known of each entry of a segment.
#[derive(Debug, Default)]
pub(super) struct Columns {
    pub(super) offsets: Vec<u32>,
    /// Unix time, seconds: fine enough to say how old the oldest is.
    pub(super) received: Vec<u32>,
    bits: Vec<Bits>,
    // The columns below have no row for any entry until the first row is needed: a backlog that cannot be published
    // has no use for them.
    /// The stream sequence that JetStream promised, to this process or an earlier one; 0 for none.
    sequences: Vec<u64>,
    /// [`Ticks`] of the PubAck.
    published_at: Vec<Ticks>,
    /// How often the entry was found missing from the stream.
    repeats: Vec<u8>,
    /// The tag that the entry's receipt must show; 0 where this process has not handed the entry out.
    tags: Vec<u64>,
    /// No entry before this one waits.
    first_waiting: usize,
}

impl Columns {
    /// Bytes of the record of entry `index`, where the last record ends at `end`.
    pub(super) fn length(&self, index: usize, end: u64) -> u64 {
        let end = self.offsets.get(index + 1).map_or(end, |&next| u64::from(next));
        end - u64::from(self.offsets[index])
    }

    pub(super) fn repeats(&self, index: usize) -> u8 {
        self.repeats.get(index).copied().unwrap_or(0)
    }

    fn sequence(&self, index: usize) -> u64 {
        self.sequences.get(index).copied().unwrap_or(0)
    }

    fn set_sequence(&mut self, index: usize, sequence: u64) {
        if self.sequences.len() <= index {
            self.sequences.resize(self.bits.len(), 0);
        }
        self.sequences[index] = sequence;
    }

    fn next_waiting(&self) -> Option<usize> {
        let waiting = self.bits[self.first_waiting..].iter().position(|bits| bits.waits())?;
        Some(self.first_waiting + waiting)
    }
}

/// How many entries are in which state.
#[derive(Debug, Default)]
struct Counts {
    tallies: [Tally; State::ALL.len()],
    waiting: usize,
    unverified: usize,
}

impl Counts {
    fn add(&mut self, bits: Bits, bytes: u64) {
        let Some(state) = bits.state() else { return };
        self.tallies[state as usize] += Tally { entries: 1, bytes };
        self.waiting += usize::from(bits.waits());
        self.unverified += usize::from(bits.is_unverified());
    }

    fn remove(&mut self, bits: Bits, bytes: u64) {
        let Some(state) = bits.state() else { return };
        let tally = &mut self.tallies[state as usize];
        tally.entries -= 1;
        tally.bytes -= bytes;
        self.waiting -= usize::from(bits.waits());
        self.unverified -= usize::from(bits.is_unverified());
    }
}

/// Tenths of a second since the journal was opened.
pub(super) type Ticks = u32;

/// The judgement on one receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReceiptVerdict {
    /// The entry may be confirmed.
    Right,
    /// JetStream has not acknowledged the entry yet: the receipt is remembered until it does.
    Early,
    /// The entry is confirmed already, or there is none.
    Settled,
    /// This process has not handed the entry out.
    NotHandedOut,
    /// The tag is not the entry's.
    WrongTag,
    /// The entry is set aside, and JetStream never acknowledged it.
    SetAside,
}

impl Segment {
    pub(super) fn new(number: u64, marker: Marker, path: Arc<Path>, on_disk: u64, end: u64) -> Segment {
        Segment {
            number,
            marker,
            check: marker.check(),
            path,
            on_disk,
            active: false,
            sealed: false,
            damaged: false,
            marks_changed: false,
            end,
            entries: 0,
            first: 0,
            newest: 0,
            counts: Counts::default(),
            rows: Rows::Awake(Columns::default()),
        }
    }

    /// A segment found on disk: its columns, and the entries of them that cannot be read.
    pub(super) fn fill(&mut self, offsets: Vec<u32>, received: Vec<u32>, holes: &[u32]) {
        let mut bits = vec![Bits::NEW; offsets.len()];
        for &hole in holes {
            bits[hole as usize] = Bits::GONE;
        }
        self.entries = offsets.len();
        self.first = received.first().copied().unwrap_or(0);
        self.newest = received.iter().copied().max().unwrap_or(0);
        self.rows = Rows::Awake(Columns { offsets, received, bits, ..Columns::default() });
        self.recount();
    }

    /// Takes over the content of a marks file as it is: for a reader that changes nothing.
    pub(super) fn show_marks(&mut self, marks: &Marks) {
        self.take_over(marks, |marked, _| marked);
    }

    /// Takes over what of the content of a marks file holds after a restart. Entries appended after the marks were
    /// written are as new.
    pub(super) fn apply_marks(&mut self, marks: &Marks) {
        self.take_over(marks, Bits::after_restart);
    }

    fn take_over(&mut self, marks: &Marks, what: impl Fn(Bits, u64) -> Bits) {
        let Rows::Awake(columns) = &mut self.rows else { return };
        let mut sequences = marks.sequences.iter();
        for (index, &byte) in marks.states.iter().enumerate().take(columns.bits.len()) {
            let marked = Bits::from_marks(byte);
            let sequence = if marked.has_sequence() { sequences.next().copied().unwrap_or(0) } else { 0 };
            if columns.bits[index] == Bits::GONE {
                continue;
            }
            columns.bits[index] = what(marked, sequence);
            if columns.bits[index].is_unverified() {
                columns.set_sequence(index, sequence);
            }
        }
        self.recount();
    }

    fn recount(&mut self) {
        let Rows::Awake(columns) = &mut self.rows else { return };
        columns.first_waiting = 0;
        self.counts = Counts::default();
        for (index, &bits) in columns.bits.iter().enumerate() {
            self.counts.add(bits, columns.length(index, self.end));
        }
    }

    /// Nothing in a segment that sleeps can change: what is marked was taken before, which wakes it.
    fn change(&mut self, index: usize, to: Bits) {
        let Rows::Awake(columns) = &mut self.rows else { return };
        let length = columns.length(index, self.end);
        self.counts.remove(columns.bits[index], length);
        self.counts.add(to, length);
        columns.bits[index] = to;
        if to.waits() {
            columns.first_waiting = columns.first_waiting.min(index);
        }
        self.marks_changed = true;
    }

    /// The records of one batch, the last of which ends at `end`.
    pub(super) fn extend(&mut self, appended: &[Appended], end: u64) {
        let Rows::Awake(columns) = &mut self.rows else { unreachable!("only a sealed segment sleeps") };
        let before = self.entries;
        columns.offsets.extend(appended.iter().map(|record| record.offset));
        columns.received.extend(appended.iter().map(|record| record.received));
        columns.bits.resize(columns.offsets.len(), Bits::NEW);
        self.end = end;
        self.entries = columns.offsets.len();
        self.first = columns.received.first().copied().unwrap_or(0);
        self.newest = appended.iter().map(|record| record.received).fold(self.newest, u32::max);
        for index in before..self.entries {
            self.counts.add(Bits::NEW, columns.length(index, end));
        }
    }

    /// Nothing more will be written here.
    pub(super) fn close(&mut self, on_disk: u64) {
        self.active = false;
        self.on_disk = on_disk;
        if let Rows::Awake(columns) = &mut self.rows {
            columns.offsets.shrink_to_fit();
            columns.received.shrink_to_fit();
            columns.bits.shrink_to_fit();
        }
    }

    /// Falls asleep, if it may: its index is on disk, and its entries are all as new, all published by an earlier
    /// process, or all confirmed.
    pub(super) fn sleep(&mut self) {
        let Rows::Awake(columns) = &self.rows else { return };
        let confirmed = self.tally(State::Confirmed).entries == self.entries as u64;
        let new = self.counts.waiting == self.entries && columns.repeats.is_empty();
        let first = columns.bits.first().copied().unwrap_or(Bits::NEW);
        if self.sealed && (new || confirmed) && columns.bits.iter().all(|bits| *bits == first) {
            self.rows = Rows::Asleep(first);
        }
    }

    /// What it takes to wake this segment; `None` for one that is awake.
    pub(super) fn sleeper(&self) -> Option<Sleeper> {
        let Rows::Asleep(_) = self.rows else { return None };
        Some(Sleeper { previous: self.as_previous(), marker: self.marker, path: Arc::clone(&self.path) })
    }

    /// Wakes it with what its file says.
    pub(super) fn wake(&mut self, found: Found) {
        let Rows::Asleep(alike) = self.rows else { return };
        self.end = found.end;
        self.sealed = found.by_index;
        self.damaged |= found.damage.is_some();
        self.fill(found.offsets, found.received, &found.holes);
        // `HELD` says that the disk did not give this segment before; now its entries wait.
        if let Rows::Awake(columns) = &mut self.rows
            && alike != Bits::HELD
        {
            columns.bits.iter_mut().filter(|bits| **bits == Bits::NEW).for_each(|bits| *bits = alike);
            self.recount();
        }
    }

    /// The disk does not give what would wake it. The publisher gets none of its entries until [`Segment::offer_again`].
    /// Returns `true` when that is news.
    pub(super) fn give_up(&mut self) -> bool {
        let news = self.counts.waiting > 0;
        if let Rows::Asleep(alike) = &mut self.rows
            && news
        {
            *alike = Bits::HELD;
            self.counts.waiting = 0;
        }
        news
    }

    /// Offers an entry again that was taken and that the disk did not give; all of them while the segment sleeps. Returns
    /// `false` where nothing waits for that any more.
    pub(super) fn offer_again(&mut self, index: usize) -> bool {
        let waited = self.counts.waiting;
        match &mut self.rows {
            Rows::Awake(_) => self.release(index),
            Rows::Asleep(alike) if *alike == Bits::HELD => {
                *alike = Bits::NEW;
                self.counts.waiting = self.entries;
            }
            Rows::Asleep(_) => {}
        }
        self.counts.waiting > waited
    }

    /// What is known of each entry; `None` while it sleeps.
    pub(super) fn columns(&self) -> Option<&Columns> {
        match &self.rows {
            Rows::Awake(columns) => Some(columns),
            Rows::Asleep(_) => None,
        }
    }

    pub(super) fn entries(&self) -> usize {
        self.entries
    }

    /// Entries that wait for a publisher.
    pub(super) fn waiting(&self) -> usize {
        self.counts.waiting
    }

    /// Entries that the stream is to be asked for.
    pub(super) fn unverified(&self) -> usize {
        self.counts.unverified
    }

    /// What the next segment's header says of this one.
    pub(super) fn as_previous(&self) -> Previous {
        let entries = u32::try_from(self.entries).expect("an entry's index is 32 bits wide");
        Previous { number: self.number, end: self.end, entries }
    }

    pub(super) fn place(&self, index: usize) -> Place {
        let index = u32::try_from(index).expect("an entry's index is 32 bits wide");
        Place { segment: self.number, index, check: self.check }
    }

    pub(super) fn bits(&self, index: usize) -> Bits {
        match &self.rows {
            Rows::Awake(columns) => columns.bits[index],
            Rows::Asleep(alike) => *alike,
        }
    }

    pub(super) fn tally(&self, state: State) -> Tally {
        self.counts.tallies[state as usize]
    }

    /// When the oldest entry in `state` was received. Unix time, seconds.
    pub(super) fn oldest(&self, state: State) -> Option<u32> {
        if self.tally(state).entries == 0 {
            return None;
        }
        let Rows::Awake(columns) = &self.rows else { return Some(self.first) };
        let index = columns.bits.iter().position(|bits| bits.state() == Some(state))?;
        Some(columns.received[index])
    }

    /// When the newest entry was received. Unix time, seconds.
    pub(super) fn newest(&self) -> u32 {
        self.newest
    }

    /// Every entry is confirmed (or cannot be read).
    pub(super) fn settled(&self) -> bool {
        self.tally(State::Published).entries == 0 && self.expendable()
    }

    /// Every entry is in the stream or confirmed: the segment may make room.
    pub(super) fn expendable(&self) -> bool {
        self.tally(State::Journalled).entries == 0 && self.tally(State::SetAside).entries == 0
    }

    /// The oldest entry that waits for a publisher, which gets it now. None while the segment sleeps.
    pub(super) fn take_next(&mut self) -> Option<usize> {
        let Rows::Awake(columns) = &mut self.rows else { return None };
        let index = if self.counts.waiting == 0 { None } else { columns.next_waiting() }?;
        columns.first_waiting = index + 1;
        columns.bits[index] = columns.bits[index].taken();
        self.counts.waiting -= 1;
        Some(index)
    }

    /// How long the record is that [`Segment::take_next`] would give.
    pub(super) fn next_length(&self) -> Option<u64> {
        let columns = self.columns().filter(|_| self.counts.waiting > 0)?;
        Some(columns.length(columns.next_waiting()?, self.end))
    }

    /// Hands back what [`Segment::take_next`] gave, unless something became of it.
    pub(super) fn release(&mut self, index: usize) {
        if self.bits(index).state() == Some(State::Journalled) {
            self.change(index, Bits::NEW);
        }
    }

    /// The entry goes out under this tag, which its receipt must show. A tag of 0 stands for none.
    pub(super) fn hand_out(&mut self, index: usize, tag: u64) {
        let Rows::Awake(columns) = &mut self.rows else { return };
        if columns.tags.len() <= index {
            columns.tags.resize(columns.bits.len(), 0);
        }
        columns.tags[index] = tag;
    }

    /// Judges a receipt. One that comes before JetStream's ack is remembered.
    pub(super) fn judge_receipt(&mut self, index: usize, tag: u64) -> ReceiptVerdict {
        let bits = self.bits(index);
        let columns = match &self.rows {
            Rows::Awake(columns) => columns,
            Rows::Asleep(Bits::STORED) => return ReceiptVerdict::Settled,
            Rows::Asleep(_) => return ReceiptVerdict::NotHandedOut,
        };
        let own = columns.tags.get(index).copied().unwrap_or(0);
        let acknowledged = columns.sequence(index) != 0 && !bits.is_unverified();
        match bits.state() {
            None | Some(State::Confirmed) => ReceiptVerdict::Settled,
            Some(State::SetAside) if own == 0 => ReceiptVerdict::SetAside,
            _ if own == 0 => ReceiptVerdict::NotHandedOut,
            _ if !bool::from(own.ct_eq(&tag)) => ReceiptVerdict::WrongTag,
            _ if acknowledged => ReceiptVerdict::Right,
            Some(State::SetAside) => ReceiptVerdict::SetAside,
            Some(State::Journalled | State::Published) => {
                self.change(index, bits.receipted());
                ReceiptVerdict::Early
            }
        }
    }

    /// A receipt with the right tag, for an entry that only an earlier process handed out: right where that one had
    /// JetStream's ack, else remembered until this process has it.
    pub(super) fn receipt_of_before(&mut self, index: usize) -> ReceiptVerdict {
        let bits = self.bits(index);
        match bits.state() {
            None | Some(State::Confirmed) => ReceiptVerdict::Settled,
            Some(State::SetAside) => ReceiptVerdict::SetAside,
            Some(State::Published) => ReceiptVerdict::Right,
            Some(State::Journalled) if bits.was_published() => ReceiptVerdict::Right,
            Some(State::Journalled) => {
                self.change(index, bits.receipted());
                ReceiptVerdict::Early
            }
        }
    }

    /// Returns `true` when this confirms the entry, because its receipt had come before.
    pub(super) fn publish(&mut self, index: usize, sequence: u64, now: Ticks) -> bool {
        let Rows::Awake(columns) = &mut self.rows else { return false };
        let bits = columns.bits[index];
        if bits.state().is_none() || bits.state() == Some(State::Confirmed) {
            return false;
        }
        if columns.published_at.len() <= index {
            columns.published_at.resize(columns.bits.len(), 0);
        }
        columns.set_sequence(index, sequence);
        columns.published_at[index] = now;
        let receipted = bits.is_receipted();
        self.change(index, if receipted { Bits::STORED } else { Bits::IN_STREAM });
        receipted
    }

    /// JetStream has acknowledged the entry as a duplicate of the message at `sequence`. The entry is not published, and
    /// not in the stream for sure, until the stream has shown this message.
    pub(super) fn acknowledge_duplicate(&mut self, index: usize, sequence: u64) {
        let Rows::Awake(columns) = &mut self.rows else { return };
        let bits = columns.bits[index];
        if bits.state() == Some(State::Journalled) {
            columns.set_sequence(index, sequence);
            self.change(index, bits.unverified());
        }
    }

    /// Whether that was news. An entry of a segment that sleeps has to be woken first, if it is not confirmed already.
    pub(super) fn confirm(&mut self, index: usize) -> bool {
        let news = self.columns().is_some() && self.bits(index).state().is_some_and(|state| state != State::Confirmed);
        if news {
            self.change(index, Bits::STORED);
        }
        news
    }

    pub(super) fn set_aside(&mut self, index: usize, refusal: Refusal) {
        if self.bits(index).state().is_some_and(|state| state != State::Confirmed) {
            self.change(index, Bits::set_aside(refusal));
        }
    }

    /// Lets a set-aside entry be tried again. Whether it was one.
    pub(super) fn retry(&mut self, index: usize) -> bool {
        let was = self.bits(index).state() == Some(State::SetAside);
        if was {
            self.change(index, Bits::NEW);
        }
        was
    }

    /// An entry that the stream does not have (any more): it waits again.
    pub(super) fn lose(&mut self, index: usize) {
        if let Rows::Awake(columns) = &mut self.rows
            && columns.bits[index].has_sequence()
        {
            let bits = columns.bits[index];
            if bits.is_unverified() && !bits.was_published() {
                columns.sequences[index] = 0; // another entry's: JetStream has not acknowledged this one
            }
            if columns.repeats.len() <= index {
                columns.repeats.resize(columns.bits.len(), 0);
            }
            columns.repeats[index] = columns.repeats[index].saturating_add(1);
            self.change(index, Bits::NEW);
        }
    }

    /// No entry can be read at `index` after all. Whether that was news.
    pub(super) fn make_hole(&mut self, index: usize) -> bool {
        let news = self.columns().is_some() && self.bits(index).state().is_some();
        if news {
            self.damaged = true;
            self.change(index, Bits::GONE);
        }
        news
    }

    /// Entries from `from` on that are unverified, or were published at or before `until` and are not confirmed. Each
    /// comes with its sequence and the time of its PubAck, which an unverified one does not have.
    pub(super) fn unconfirmed(
        &self,
        from: usize,
        until: Option<Ticks>,
    ) -> impl Iterator<Item = (usize, u64, Option<Ticks>)> {
        let columns = self.columns().into_iter(); // one that sleeps has none of them
        columns.flat_map(move |columns| {
            let row = move |index: usize| {
                let bits = columns.bits[index];
                if bits.is_unverified() {
                    return Some((index, columns.sequences[index], None));
                }
                let until = until.filter(|_| bits.state() == Some(State::Published))?;
                let at = columns.published_at[index];
                (at <= until).then_some((index, columns.sequences[index], Some(at)))
            };
            (from..columns.bits.len()).filter_map(row)
        })
    }

    /// The content of a marks file.
    pub(super) fn marks(&self) -> Marks {
        match &self.rows {
            Rows::Awake(columns) => {
                let published = usize::try_from(self.tally(State::Published).entries).unwrap_or(0);
                let mut sequences = Vec::with_capacity(published + self.counts.unverified);
                let with_sequence =
                    |(index, bits): (usize, &Bits)| bits.has_sequence().then(|| columns.sequence(index));
                sequences.extend(columns.bits.iter().enumerate().filter_map(with_sequence));
                Marks { states: columns.bits.iter().map(|bits| bits.to_marks()).collect(), sequences }
            }
            Rows::Asleep(alike) => Marks { states: vec![alike.to_marks(); self.entries], sequences: Vec::new() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(entries: u32) -> Segment {
        let mut segment = Segment::new(7, Marker([1; 8]), Path::new("none").into(), 1 << 20, 4096);
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
        let found = vec![(0, 41, Some(5))];
        assert_eq!(
            [unconfirmed(0, Some(4)), unconfirmed(0, Some(5)), unconfirmed(1, Some(5))],
            [vec![], found, vec![]]
        );
        assert_eq!(unconfirmed(0, None), []);
        segment.lose(0);
        segment.lose(0); // no longer published: not lost twice
        let columns = segment.columns().unwrap();
        assert_eq!((columns.repeats(0), columns.repeats(1)), (1, 0));
        assert_eq!(segment.next_length(), Some(100));
        assert_eq!(segment.take_next(), Some(0));
    }

    #[test]
    fn marks_bring_back_what_still_holds() {
        let mut before = segment(5);
        before.take_next();
        before.publish(1, 77, 1);
        before.confirm(2);
        before.set_aside(3, Refusal::Subject);
        assert!(before.make_hole(4) && !before.make_hole(4) && before.damaged);
        let mut after = segment(6);
        after.apply_marks(&before.marks());
        assert_eq!(entries(&after), [4, 0, 1, 1]); // the hole's bytes are looked at again, the sixth entry is new
        assert_eq!(after.bits(3).refusal(), Some(Refusal::Subject));
        assert_eq!((after.waiting(), after.unverified()), (3, 1), "the stream is asked for what was published");
        assert_eq!(after.unconfirmed(0, None).collect::<Vec<_>>(), [(1, 77, None)]);
        // Those of the first version hold no sequence.
        let mut old = segment(6);
        old.apply_marks(&Marks { sequences: vec![], ..before.marks() });
        assert_eq!((old.waiting(), old.unverified()), (4, 0), "it is published again");
    }

    #[test]
    fn an_unverified_entry_is_neither_taken_nor_expendable_and_stays_so_over_restarts() {
        let mut first = segment(1);
        first.take_next();
        first.publish(0, 9, 0);
        let mut second = segment(1);
        second.apply_marks(&first.marks());
        let mut segment = segment(1);
        segment.apply_marks(&second.marks());
        assert_eq!((segment.take_next(), segment.next_length()), (None, None));
        assert!(!segment.expendable() && !segment.settled());
        assert_eq!(segment.receipt_of_before(0), ReceiptVerdict::Right, "an earlier process had the ack");
        let unverified = segment.marks();
        segment.publish(0, 9, 3);
        assert!(segment.expendable() && segment.unverified() == 0);
        segment.apply_marks(&unverified);
        segment.lose(0);
        assert_eq!((segment.take_next(), segment.unverified()), (Some(0), 0));
        assert_eq!(segment.columns().unwrap().repeats(0), 1);
    }

    #[test]
    fn a_duplicate_ack_settles_nothing_before_the_stream_has_shown_the_message() {
        let mut segment = segment(2);
        segment.take_next();
        segment.take_next();
        for index in 0..2 {
            segment.hand_out(index, 7);
            segment.acknowledge_duplicate(index, 5);
            assert_eq!(segment.judge_receipt(index, 7), ReceiptVerdict::Early);
        }
        assert_eq!((segment.unverified(), segment.take_next()), (2, None));
        assert!(segment.publish(0, 5, 1), "it was its own, and its receipt has come");
        segment.lose(1); // it was another's
        assert_eq!(segment.take_next(), Some(1));
        assert_eq!(segment.judge_receipt(1, 7), ReceiptVerdict::Early);
    }
}
