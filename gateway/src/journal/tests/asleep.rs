//! What waits is not in memory, and is there all the same when somebody wants it.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use tempfile::{TempDir, tempdir};

use super::super::files::{self, Kind};
use super::super::format::RECORD_HEADER;
use super::super::{ReadError, State};
use super::*;

const MIB: u64 = 1 << 20;
const NONE: [u64; 0] = [];

/// Several segments of a few entries each, on which nobody has worked yet.
struct Backlog {
    dir: TempDir,
    journal: Journal,
    entries: Vec<Entry>,
    places: Vec<Place>,
}

impl Backlog {
    const LENGTH: usize = 40;

    async fn make() -> Backlog {
        Self::with(limits(5)).await
    }

    async fn with(limits: Limits) -> Backlog {
        let dir = tempdir().unwrap();
        let (journal, _) = open(dir.path(), limits).await;
        let entries: Vec<_> = (0..40).map(|id| entry(id, 300)).collect();
        let places = append_all(&journal, &entries).await;
        let backlog = Backlog { dir, journal, entries, places };
        assert!(backlog.numbers().len() > 5);
        backlog
    }

    /// Closed and opened again.
    async fn opened_again(mut self) -> Backlog {
        self.journal.close().await;
        let Backlog { dir, journal, .. } = self;
        drop(journal);
        let (journal, recovered) = open(dir.path(), limits(5)).await;
        assert!(recovered.damages.is_empty(), "{recovered:?}");
        self = Backlog { dir, journal, entries: self.entries, places: self.places };
        self
    }

    /// Every segment that holds an entry, oldest first.
    fn numbers(&self) -> Vec<u64> {
        let mut numbers: Vec<_> = self.places.iter().map(|place| place.segment).collect();
        numbers.dedup();
        numbers
    }

    /// Those that have their columns in memory.
    fn awake(&self) -> Vec<u64> {
        let table = self.journal.0.shared.table();
        let awake = table.segments.values().filter(|segment| segment.columns().is_some() && segment.entries() > 0);
        awake.map(|segment| segment.number).collect()
    }

    fn of(&self, number: u64) -> Vec<Place> {
        self.places.iter().copied().filter(|place| place.segment == number).collect()
    }

    /// Takes one by one whatever there is to take; each is what was appended.
    async fn take_all(&self, expected: &[Place]) {
        for place in expected {
            let taken = self.journal.take(1, MIB).await;
            assert_eq!(taken.iter().map(|stored| stored.place).collect::<Vec<_>>(), [*place]);
            let index = self.places.iter().position(|other| other == place).unwrap();
            assert!(same(&taken[0], &self.entries[index]));
        }
        assert!(is_waiting(self.journal.take(1, MIB)).await, "nothing else is given out");
    }

    /// Changes the file of segment `number`, behind the journal's back.
    fn spoil(&self, number: u64, spoil: impl FnOnce(&mut Vec<u8>)) {
        let path = files::segment(self.dir.path(), number);
        let mut content = fs::read(&path).unwrap();
        let length = content.len();
        spoil(&mut content);
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&content, 0).unwrap();
        assert_eq!(content.len(), length);
    }

    /// From now on every read of segment `number` fails, as on a disk that is broken.
    fn break_disk(&self, number: u64) {
        // A directory cannot be read as a file.
        self.journal.0.shared.table().segments.get_mut(&number).unwrap().path = self.dir.path().into();
    }

    fn mend_disk(&self, number: u64) {
        let path = files::segment(self.dir.path(), number).into();
        self.journal.0.shared.table().segments.get_mut(&number).unwrap().path = path;
    }

    fn states(&self) -> [u64; 4] {
        self.journal.stats().shares.map(|share| share.tally.entries)
    }
}

#[tokio::test]
async fn only_the_segment_that_is_written_to_is_awake() {
    let backlog = Backlog::make().await;
    let newest = *backlog.numbers().last().unwrap();
    eventually(|| backlog.awake() == [newest]).await; // the others are sealed a moment later
    let before = backlog.journal.stats().shares;
    let backlog = backlog.opened_again().await;
    assert_eq!(backlog.awake(), NONE, "nor after a start");
    assert_eq!(backlog.journal.stats().shares, before, "and asleep they count as they did awake");
    assert_eq!(before[0].oldest, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)));
}

#[tokio::test]
async fn each_is_woken_when_the_publisher_comes_to_it() {
    let backlog = Backlog::make().await.opened_again().await;
    let numbers = backlog.numbers();
    let first = backlog.of(numbers[0]);
    backlog.journal.take(first.len(), MIB).await;
    assert_eq!(backlog.awake(), numbers[..1]);
    first.iter().for_each(|place| backlog.journal.release(*place));
    backlog.journal.take(first.len() + 1, MIB).await;
    assert_eq!(backlog.awake(), numbers[..2]);
    first.iter().for_each(|place| backlog.journal.release(*place));
    backlog.journal.release(backlog.of(numbers[1])[0]);
    backlog.take_all(&backlog.places).await;
    assert_eq!(backlog.awake(), numbers);
    for (place, sequence) in backlog.places.iter().zip(1..) {
        backlog.journal.mark_published(*place, sequence);
    }
    assert_eq!(backlog.journal.mark_confirmed(&backlog.places).await, Backlog::LENGTH);
    eventually(|| backlog.journal.stats().segments == 1).await;
}

#[tokio::test]
async fn one_that_waits_again_as_it_did_at_first_is_not_asleep_without_its_index() {
    let backlog = Backlog::make().await;
    // The newest has no index yet: its rows are nowhere else.
    let newest = *backlog.numbers().last().unwrap();
    backlog.journal.0.shared.table().segments.get_mut(&newest).unwrap().sleep();
    assert_eq!(backlog.awake(), [newest]);
}

#[tokio::test]
async fn a_receipt_for_what_an_earlier_process_published_is_not_lost() {
    let backlog = Backlog::make().await.opened_again().await;
    let numbers = backlog.numbers();
    let receipt = [backlog.of(numbers[3])[1], backlog.of(numbers[1])[0], backlog.of(numbers[3])[0]];
    let foreign = receipt.map(|place| Place { check: !place.check, ..place });
    let too_far = Place { index: 1000, ..receipt[0] };
    assert_eq!(backlog.journal.mark_confirmed(&[&foreign[..], &[too_far]].concat()).await, 0);
    assert_eq!(backlog.awake(), NONE, "woken for what is none of its entries");
    assert_eq!(backlog.journal.mark_confirmed(&receipt).await, 3);
    assert_eq!(backlog.awake(), [numbers[1], numbers[3]]);
    assert_eq!(backlog.journal.mark_confirmed(&receipt).await, 0);
    let left: Vec<_> = backlog.places.iter().copied().filter(|place| !receipt.contains(place)).collect();
    backlog.take_all(&left).await;
}

#[tokio::test]
async fn receipts_and_takers_at_the_same_time_leave_nothing_out() {
    let backlog = Backlog::make().await.opened_again().await;
    let (journal, places) = (backlog.journal.clone(), backlog.places.clone());
    let receipts = tokio::spawn(async move { journal.mark_confirmed(&places).await });
    let mut taken = 0;
    while !receipts.is_finished() {
        tokio::select! {
            some = backlog.journal.take(3, MIB) => taken += some.len(),
            () = tokio::task::yield_now() => {}
        }
    }
    assert_eq!(receipts.await.unwrap(), Backlog::LENGTH, "each confirmed once, taken or not ({taken} were)");
    eventually(|| backlog.states()[State::Journalled as usize] == 0).await;
}

#[tokio::test]
async fn an_entry_that_sleeps_can_be_read() {
    let backlog = Backlog::make().await.opened_again().await;
    for (place, entry) in backlog.places.iter().zip(&backlog.entries) {
        assert!(same(&backlog.journal.read(*place).await.unwrap(), entry));
    }
    let nowhere = Place { index: 1000, ..backlog.places[0] };
    assert!(matches!(backlog.journal.read(nowhere).await, Err(ReadError::Unknown)));
}

#[tokio::test]
async fn what_is_only_retained_sleeps_too_and_stays_confirmed() {
    let retained = Limits { retain: Duration::from_secs(1 << 40), ..limits(5) };
    let backlog = Backlog::with(retained).await;
    assert_eq!(backlog.journal.mark_confirmed(&backlog.places).await, Backlog::LENGTH);
    let newest = *backlog.numbers().last().unwrap();
    eventually(|| backlog.awake() == [newest]).await;
    assert_eq!(backlog.states(), [0, 0, Backlog::LENGTH as u64, 0]);
    assert_eq!(backlog.journal.mark_confirmed(&backlog.places).await, 0);
    assert_eq!(backlog.awake(), [newest], "it is known without waking them");
    assert!(same(&backlog.journal.read(backlog.places[0]).await.unwrap(), &backlog.entries[0]));
    assert_eq!(backlog.states(), [0, 0, Backlog::LENGTH as u64, 0]);
    backlog.journal.close().await;
    drop(backlog.journal);
    let (_journal, recovered) = open(backlog.dir.path(), retained).await;
    assert_eq!((recovered.confirmed, recovered.unpublished), (Backlog::LENGTH as u64, 0), "their marks were written");
}

#[tokio::test]
async fn where_the_index_is_damaged_the_records_are_read() {
    let backlog = Backlog::make().await.opened_again().await;
    let numbers = backlog.numbers();
    backlog.spoil(numbers[0], |content| *content.last_mut().unwrap() ^= 1); // the checksum
    backlog.spoil(numbers[1], |content| content[FIRST_RECORD as usize..].reverse()); // nothing is left
    let trailer = numbers[3];
    let other = fs::read(files::segment(backlog.dir.path(), numbers[4])).unwrap();
    backlog.spoil(trailer, |content| {
        // Intact, but another segment's.
        let end = content.len();
        content[end - 32..].copy_from_slice(&other[other.len() - 32..]);
    });
    let lost = backlog.of(numbers[1]);
    let left: Vec<_> = backlog.places.iter().copied().filter(|place| !lost.contains(place)).collect();
    backlog.take_all(&left).await;
    let stats = backlog.journal.stats();
    assert_eq!((stats.damaged_records, stats.unreadable_records), (lost.len() as u64, 0));
    assert_eq!(backlog.states(), [left.len() as u64, 0, 0, 0], "a lost entry does not wait");

    assert_eq!(backlog.journal.mark_confirmed(&backlog.places).await, left.len());
    eventually(|| backlog.journal.stats().damaged_files == 1).await;
    let kept = files::list(backlog.dir.path()).unwrap().into_iter().filter(|(kind, _)| *kind == Kind::Damaged);
    assert_eq!(kept.collect::<Vec<_>>(), [(Kind::Damaged, numbers[1])], "only what lost something is kept for people");
}

#[tokio::test]
async fn a_record_lost_with_the_index_costs_only_itself() {
    for nth in 0..2 {
        let backlog = Backlog::make().await.opened_again().await;
        let number = backlog.numbers()[2];
        let places = backlog.of(number);
        let lost = [places[0], *places.last().unwrap()][nth];
        backlog.spoil(number, |content| {
            let at = FIRST_RECORD as usize + lost.index as usize * BLOCK as usize;
            content[at..at + RECORD_HEADER].fill(0);
            *content.last_mut().unwrap() ^= 1;
        });
        let left: Vec<_> = backlog.places.iter().copied().filter(|place| *place != lost).collect();
        backlog.take_all(&left).await;
        assert_eq!(backlog.journal.stats().damaged_records, 1);
        assert!(matches!(backlog.journal.read(lost).await, Err(ReadError::Unknown)));
    }
}

#[tokio::test]
async fn what_the_disk_does_not_give_holds_nobody_up_and_is_there_after_a_start_that_can() {
    let backlog = Backlog::make().await.opened_again().await;
    let bad = backlog.numbers()[1];
    backlog.break_disk(bad);
    let held = backlog.of(bad);
    let left: Vec<_> = backlog.places.iter().copied().filter(|place| place.segment != bad).collect();
    backlog.take_all(&left).await;
    let stats = backlog.journal.stats();
    assert_eq!((stats.unreadable_entries, stats.damaged_records), (held.len() as u64, 0));
    assert_eq!(backlog.journal.mark_confirmed(&held).await, 0);
    assert_eq!(backlog.journal.mark_confirmed(&left).await, left.len());
    assert_eq!(backlog.journal.stats().unreadable_entries, held.len() as u64, "each counts once");
    assert!(matches!(backlog.journal.read(held[0]).await, Err(ReadError::Disk(_))));
    assert_eq!(backlog.states()[0], held.len() as u64, "not given up");
    backlog.journal.close().await;
    drop(backlog.journal);
    let (journal, recovered) = open(backlog.dir.path(), limits(5)).await;
    assert_eq!((recovered.unpublished, recovered.damages.len()), (held.len() as u64, 0));
    assert_eq!(journal.take(100, MIB).await.iter().map(|stored| stored.place).collect::<Vec<_>>(), held);
}

#[tokio::test]
async fn a_segment_that_the_disk_gives_again_is_offered_again() {
    let backlog = Backlog::make().await.opened_again().await;
    let bad = backlog.numbers()[1];
    backlog.break_disk(bad);
    let held = backlog.of(bad);
    let left: Vec<_> = backlog.places.iter().copied().filter(|place| place.segment != bad).collect();
    backlog.take_all(&left).await;
    assert_eq!(backlog.journal.unreadable().unwrap().0, held.len() as u64);
    backlog.mend_disk(bad);
    backlog.take_all(&held).await;
    assert!(backlog.journal.unreadable().is_none());
}

#[tokio::test]
async fn a_disk_that_comes_to_itself_gives_what_it_held() {
    let backlog = Backlog::make().await.opened_again().await;
    let bad = backlog.numbers()[1];
    backlog.break_disk(bad);
    let held = backlog.of(bad);
    let left: Vec<_> = backlog.places.iter().copied().filter(|place| place.segment != bad).collect();
    assert_eq!(backlog.journal.mark_confirmed(&held[..1]).await, 0, "a receipt ends, too");
    backlog.take_all(&left).await;
    backlog.mend_disk(bad);
    assert!(same(
        &backlog.journal.read(held[0]).await.unwrap(),
        &backlog.entries[backlog.of(backlog.numbers()[0]).len()]
    ));
    backlog.take_all(&held).await;
}
