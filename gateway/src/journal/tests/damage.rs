//! Real segment files, broken at every place: what is intact is delivered, what is not is reported, and nothing is
//! delivered twice or made up.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use tempfile::{TempDir, tempdir};

use super::super::files::{self, Kind};
use super::super::format::{RECORD_HEADER, RecordHeader, SEGMENT_HEADER};
use super::super::recover::{Recovered, recover};
use super::super::state::State;
use super::super::table::Table;
use super::super::{read, scan};
use super::*;

/// One record of a pristine journal.
struct Written {
    segment: usize,
    record: std::ops::Range<usize>,
    entry: Entry,
}

/// The files of a journal, to be broken in copies.
struct Pristine {
    /// Numbers and contents of its segments.
    segments: Vec<(u64, Vec<u8>)>,
    written: BTreeMap<Place, Written>,
    /// Whether the last segment has its index.
    closed: bool,
}

impl Pristine {
    /// Three segments of three entries each; after a crash, or closed in good order.
    async fn make(closed: bool) -> Pristine {
        let dir = tempdir().unwrap();
        let (journal, _) = open(dir.path(), limits(3)).await;
        let entries: Vec<_> = (0..9).map(|id| entry(id, 30 + id as usize)).collect();
        let places = append_all(&journal, &entries).await;
        if closed {
            journal.close().await;
        }
        drop(journal);
        let mut numbers: Vec<_> = places.iter().map(|place| place.segment).collect();
        numbers.dedup();
        assert_eq!(numbers.len(), 3);
        eventually(|| files::lock(dir.path()).is_ok()).await;
        let segments = numbers.iter().map(|&n| (n, fs::read(files::segment(dir.path(), n)).unwrap())).collect();
        // Where the records lie is worked out here, not asked of the code under test.
        let mut written = BTreeMap::new();
        let mut next = [FIRST_RECORD as usize; 3];
        for (place, entry) in places.into_iter().zip(entries) {
            let segment = numbers.iter().position(|&number| number == place.segment).unwrap();
            let start = next[segment];
            let end = start + RECORD_HEADER + entry.meta.len() + entry.body.len();
            next[segment] = end.next_multiple_of(BLOCK as usize); // each is a batch
            written.insert(place, Written { segment, record: start..end, entry });
        }
        Pristine { segments, written, closed }
    }

    fn records_end(&self, segment: usize) -> usize {
        self.written.values().filter(|entry| entry.segment == segment).map(|entry| entry.record.end).max().unwrap()
    }

    /// Every place behind the header's block, but those deep in the zeros that fill blocks, which are all alike.
    fn places(content: &[u8]) -> impl Iterator<Item = usize> {
        let alike = |at: &usize| content[at.saturating_sub(6)..content.len().min(at + 6)].iter().all(|byte| *byte == 0);
        (FIRST_RECORD as usize..content.len()).filter(move |at| !alike(at))
    }

    /// A copy in which the file of one segment is another.
    fn broken(&self, segment: usize, content: &[u8]) -> Found {
        let dir = tempdir().unwrap();
        for (index, (number, intact)) in self.segments.iter().enumerate() {
            let content = if index == segment { content } else { intact };
            fs::write(files::segment(dir.path(), *number), content).unwrap();
        }
        let (mut table, recovered) = recover(dir.path()).unwrap();
        wake_all(&mut table);
        Found { dir, table, recovered }
    }

    /// Checks what `found` delivers, when `intact` says which records are. `case` is for the message.
    fn check(&self, found: &Found, case: &str, intact: impl Fn(&Written) -> bool) {
        let mut missing = 0;
        for (place, written) in &self.written {
            match found.delivered(*place) {
                Some(stored) => {
                    assert!(same(&stored, &written.entry), "{case}: {place} is delivered as something else")
                }
                None => {
                    assert!(!intact(written), "{case}: the intact entry {place} is not delivered");
                    missing += 1;
                }
            }
        }
        // Every entry that is offered is one of those above: nothing is made up.
        let offered: usize = found.table.segments.values().map(|segment| segment.entries()).sum();
        let known = self.written.keys().filter(|place| found.table.segments.contains_key(&place.segment)).count();
        assert!(offered <= known, "{case}: {offered} entries where {known} were written");
        if missing > 0 {
            assert!(
                found.reports(),
                "{case}: {missing} entries are missing, and nobody is told: {:?}",
                found.recovered
            );
        }
    }
}

struct Found {
    dir: TempDir,
    table: Table,
    recovered: Recovered,
}

impl Found {
    fn delivered(&self, place: Place) -> Option<Stored> {
        read::read(&self.table.locate(place)?).ok()
    }

    /// Whether anybody learns of a loss: at once, or when the entry that is still listed is read.
    fn reports(&self) -> bool {
        let spoilt = |segment: &super::super::Segment| {
            (0..segment.entries()).any(|index| {
                segment.bits(index).state() == Some(State::Journalled)
                    && read::read(&Table::located(segment, segment.columns().unwrap(), index)).is_err()
            })
        };
        !self.recovered.damages.is_empty() || self.recovered.torn_bytes > 0 || self.table.segments.values().any(spoilt)
    }

    fn kept(&self) -> Vec<PathBuf> {
        let damaged = files::list(self.dir.path()).unwrap();
        let damaged = damaged.into_iter().filter(|(kind, _)| *kind == Kind::Damaged);
        damaged.map(|(_, number)| files::damaged(self.dir.path(), number)).collect()
    }
}

#[tokio::test]
async fn a_flipped_bit_at_any_place_costs_at_most_the_record_it_is_in() {
    for closed in [false, true] {
        let pristine = Pristine::make(closed).await;
        for (segment, (_, intact)) in pristine.segments.iter().enumerate() {
            for at in (0..SEGMENT_HEADER).chain(Pristine::places(intact)) {
                let mut content = intact.clone();
                content[at] ^= 1 << (at % 8);
                let found = pristine.broken(segment, &content);
                let case = format!("closed: {closed}, segment {segment}, byte {at}");
                pristine.check(&found, &case, |written| written.segment != segment || !written.record.contains(&at));
                assert!(found.kept().is_empty(), "{case}: what can be delivered is kept instead");
                // Only the last batch of a journal that was not closed may pass for a torn tail.
                if found.recovered.torn_bytes > 0 {
                    let end = pristine.records_end(segment);
                    let last_record = pristine.written.values().filter(|w| w.segment == segment).last().unwrap();
                    let in_last = last_record.record.start <= at && (at < end || !pristine.closed);
                    assert!(segment == 2 && in_last || at >= end, "{case}: {:?}", found.recovered);
                }
            }
        }
    }
}

#[tokio::test]
async fn a_file_cut_at_any_place_keeps_what_is_before_the_cut() {
    for closed in [false, true] {
        let pristine = Pristine::make(closed).await;
        for (segment, (_, intact)) in pristine.segments.iter().enumerate() {
            for length in (1..SEGMENT_HEADER + 1).chain([FIRST_RECORD as usize - 1]).chain(Pristine::places(intact)) {
                let found = pristine.broken(segment, &intact[..length]);
                let case = format!("closed: {closed}, segment {segment}, cut to {length}");
                let cut = |written: &Written| {
                    written.segment != segment || (written.record.end <= length && length >= SEGMENT_HEADER)
                };
                pristine.check(&found, &case, cut);
            }
        }
    }
}

#[tokio::test]
async fn a_lost_sector_costs_only_what_is_in_it() {
    let pristine = Pristine::make(true).await;
    for (segment, (number, intact)) in pristine.segments.iter().enumerate() {
        // The header's: the marker is still in the first record.
        let mut content = intact.clone();
        content[..FIRST_RECORD as usize].fill(0);
        let found = pristine.broken(segment, &content);
        pristine.check(&found, "first sector", |_| true);
        assert_eq!(found.recovered.damages.len(), 1);
        assert!(found.table.segments[number].damaged, "kept for people in the end");
        // The header's and the first record: the trailer has the marker, too.
        let mut content = intact.clone();
        content[..FIRST_RECORD as usize + RECORD_HEADER].fill(0);
        let found = pristine.broken(segment, &content);
        pristine.check(&found, "header and first record", |written| {
            written.segment != segment || written.record.start > FIRST_RECORD as usize
        });
        // Everything: nothing to deliver, so it is kept at once.
        let found = pristine.broken(segment, &vec![b'x'; intact.len()]);
        pristine.check(&found, "all sectors", |written| written.segment != segment);
        assert_eq!(found.kept().len(), 1);
    }
}

#[tokio::test]
async fn the_number_of_lost_entries_is_reported() {
    let pristine = Pristine::make(false).await;
    let lost = |segment: usize, spoil: &dyn Fn(&mut Vec<u8>)| {
        let mut content = pristine.segments[segment].1.clone();
        // Without the index the records have to be read.
        content.truncate(pristine.records_end(segment));
        spoil(&mut content);
        let found = pristine.broken(segment, &content);
        found.recovered.damages.iter().map(|damage| damage.entries_lost).collect::<Vec<_>>()
    };
    let start = |segment: usize, nth: usize| {
        pristine.written.values().filter(|written| written.segment == segment).nth(nth).unwrap().record.start
    };
    let nothing = |_: &mut Vec<u8>| {};
    assert!(lost(0, &nothing).is_empty(), "the next header says that nothing is missing");
    assert_eq!(lost(0, &|content| content[start(0, 1)] ^= 1), [1]);
    assert_eq!(lost(0, &|content| content[start(0, 0)..start(0, 2)].fill(0)), [2]);
    assert_eq!(lost(1, &|content| content.truncate(start(1, 1))), [2]);
    assert_eq!(lost(1, &|content| content[start(1, 2) + RECORD_HEADER] ^= 1), [1]);
    assert_eq!(lost(2, &|content| content.truncate(start(2, 2))), [0], "how many is not known");
}

#[tokio::test]
async fn a_record_that_claims_an_impossible_place_makes_no_entries_up() {
    let pristine = Pristine::make(false).await;
    let (_, intact) = &pristine.segments[2];
    let records = pristine.written.values().filter(|written| written.segment == 2).collect::<Vec<_>>();
    let marker = super::super::format::Marker(intact[16..24].try_into().unwrap());
    // Every checksum holds, as no damage could make it.
    for index in [1, 3, u32::MAX] {
        let start = records[2].record.start;
        let header = RecordHeader::decode(&intact[start..], marker, start as u64).unwrap();
        let mut content = intact.clone();
        content[start..start + RECORD_HEADER]
            .copy_from_slice(&RecordHeader { index, ..header }.encode(marker, start as u64));
        let found = pristine.broken(2, &content);
        pristine
            .check(&found, &format!("index {index}"), |written| written.record.start != start || written.segment != 2);
    }
}

#[tokio::test]
async fn a_record_that_claims_more_bytes_than_the_file_has_is_none() {
    let pristine = Pristine::make(false).await;
    let (number, intact) = &pristine.segments[2];
    let start = pristine.written.values().filter(|written| written.segment == 2).last().unwrap().record.start;
    let marker = super::super::format::Marker(intact[16..24].try_into().unwrap());
    let header = RecordHeader::decode(&intact[start..], marker, start as u64).unwrap();
    let mut content = intact.clone();
    let forged = RecordHeader { body_length: u32::MAX, ..header }.encode(marker, start as u64);
    content[start..start + RECORD_HEADER].copy_from_slice(&forged);
    let dir = tempdir().unwrap();
    fs::write(files::segment(dir.path(), *number), content).unwrap();
    // Nobody may try to read it: that would take four gigabytes.
    assert_eq!(super::super::Snapshot::of(dir.path()).unwrap().entries().count(), 2);
}

#[tokio::test]
async fn names_that_no_journal_writes_are_left_alone() {
    let pristine = Pristine::make(true).await;
    let dir = tempdir().unwrap();
    let names =
        ["7.journal", "+00000000007.journal", "18446744073709551615.journal", "0000000000007.marks", "x.journal"];
    for name in names {
        fs::write(dir.path().join(name), &pristine.segments[0].1).unwrap();
    }
    let (table, recovered) = recover(dir.path()).unwrap();
    assert!(table.segments.is_empty() && recovered.damages.is_empty());
    assert!(names.iter().all(|name| dir.path().join(name).exists()));
}

#[tokio::test]
async fn a_record_inside_a_body_is_no_record() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(7)).await;
    let first = journal.append(entry(1, 100)).await.unwrap();
    // The worst a sender could do: a body with a genuine record of this very segment in it, marker and all.
    let path = files::segment(dir.path(), first.segment);
    let length = RECORD_HEADER + entry(1, 100).meta.len() + 100;
    let record = fs::read(&path).unwrap()[FIRST_RECORD as usize..][..length].to_vec();
    let forged = Entry { body: Bytes::from([&b"x"[..], &record].concat()), ..entry(2, 0) };
    journal.append(forged).await.unwrap();
    journal.append(entry(3, 100)).await.unwrap();
    drop(journal);
    eventually(|| files::lock(dir.path()).is_ok()).await;

    let mut content = fs::read(&path).unwrap();
    content[FIRST_RECORD as usize + BLOCK as usize + 9] ^= 1; // its real header is broken, so the next marker is in the body
    fs::write(&path, content).unwrap();
    let (journal, recovered) = open(dir.path(), limits(7)).await;
    assert_eq!(recovered.damages[0].entries_lost, 1);
    let taken = journal.take(10, 1 << 20).await;
    assert!(same(&taken[0], &entry(1, 100)) && same(&taken[1], &entry(3, 100)));
    assert_eq!(taken.len(), 2);
}

#[tokio::test]
async fn a_damaged_segment_is_delivered_and_then_kept() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(7)).await;
    let places = append_all(&journal, &(0..4).map(|id| entry(id, 100)).collect::<Vec<_>>()).await;
    drop(journal);
    eventually(|| files::lock(dir.path()).is_ok()).await;
    let path = files::segment(dir.path(), places[0].segment);
    let mut content = fs::read(&path).unwrap();
    content[FIRST_RECORD as usize + 60] ^= 4;
    fs::write(&path, &content).unwrap();

    // Twice: what was found once is found again, until the rest is delivered.
    for _ in 0..2 {
        let (journal, recovered) = open(dir.path(), limits(7)).await;
        assert_eq!(recovered.damages.len(), 1);
        assert_eq!((recovered.unpublished, journal.stats().damaged_records), (3, 1));
        drop(journal);
    }
    let (journal, _) = open(dir.path(), limits(7)).await;
    assert_eq!(journal.mark_confirmed(&places).await, 3);
    let kept = files::damaged(dir.path(), places[0].segment);
    eventually(|| kept.exists()).await;
    assert_eq!(fs::read(kept).unwrap(), content, "as it was found");
    drop(journal);
    let (_journal, recovered) = open(dir.path(), limits(7)).await;
    assert_eq!((recovered.damages.len(), recovered.unpublished), (0, 0));
}

#[tokio::test]
async fn a_damaged_marks_file_is_only_a_repeat() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(7)).await;
    let places = append_all(&journal, &(0..4).map(|id| entry(id, 100)).collect::<Vec<_>>()).await;
    journal.mark_confirmed(&places[..2]).await;
    journal.close().await;
    drop(journal);
    let marks = files::marks(dir.path(), places[0].segment);
    let intact = fs::read(&marks).unwrap();
    for at in 0..intact.len() {
        let mut content = intact.clone();
        content[at] ^= 1 << (at % 8);
        fs::write(&marks, content).unwrap();
        let (_, recovered) = recover(dir.path()).unwrap();
        assert_eq!((recovered.unpublished, recovered.confirmed), (4, 0), "byte {at}");
    }
    fs::write(&marks, intact).unwrap();
    let (_, recovered) = recover(dir.path()).unwrap();
    assert_eq!((recovered.unpublished, recovered.confirmed), (2, 2));
}

#[tokio::test]
async fn marks_hold_for_the_rest_of_a_segment_that_lost_its_end() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(7)).await;
    let places = append_all(&journal, &(0..4).map(|id| entry(id, 100)).collect::<Vec<_>>()).await;
    journal.mark_confirmed(&places[..2]).await;
    journal.close().await;
    drop(journal);
    let segment = fs::File::options().write(true).open(files::segment(dir.path(), places[0].segment)).unwrap();
    segment.set_len(FIRST_RECORD + 3 * BLOCK).unwrap();
    let (_, recovered) = recover(dir.path()).unwrap();
    assert_eq!((recovered.unpublished, recovered.confirmed), (1, 2));
}

#[tokio::test]
async fn a_later_version_is_left_alone() {
    let pristine = Pristine::make(true).await;
    let dir = tempdir().unwrap();
    let (number, intact) = &pristine.segments[0];
    let mut content = intact.clone();
    content[8] = 3;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&content[..12]), &content[16..SEGMENT_HEADER]);
    content[12..16].copy_from_slice(&crc.to_le_bytes());
    let path = files::segment(dir.path(), *number);
    fs::write(&path, &content).unwrap();
    let error = Journal::open(dir.path(), limits(3)).unwrap_err();
    assert!(matches!(error, OpenError::OtherVersion { version: 3, .. }), "{error}");
    assert_eq!(fs::read(path).unwrap(), content);
}

#[tokio::test]
async fn what_nobody_needs_is_tidied_away_and_what_is_not_ours_is_left() {
    let dir = tempdir().unwrap();
    for name in ["000000000007.journal", "000000000008.marks", "000000000009.marks.new", "notes.txt"] {
        fs::write(dir.path().join(name), b"").unwrap();
    }
    fs::write(dir.path().join("000000000012.damaged"), b"kept").unwrap();
    let (table, recovered) = recover(dir.path()).unwrap();
    assert!(recovered.damages.is_empty());
    assert_eq!((table.next_number, table.kept), (13, (4, 1)), "no number is used twice");
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["000000000012.damaged", "notes.txt"]);
}

#[test]
fn sectors_that_cannot_be_read_are_reported() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, vec![1; 10_000]).unwrap();
    // A file that was opened for writing only fails every read.
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let survey = scan::survey(&file, super::super::format::Marker([1; 8]), true).unwrap();
    assert!(survey.unreadable && survey.offsets.is_empty());
    assert!(!scan::is_blank(&file).unwrap());
}

#[test]
fn the_next_record_is_found_wherever_it_begins() {
    let marker = super::super::format::Marker(*b"marker!?");
    let payload_crc = super::super::format::payload_crc(b"", b"");
    // Around the end of what is read at once, where a marker lies half in one piece and half in the next.
    let chunk = FIRST_RECORD + scan::CHUNK as u64;
    for at in chunk - 50..chunk + 10 {
        let header = RecordHeader {
            payload_crc,
            index: 1,
            meta_length: 0,
            body_length: 0,
            synced: 4096,
            received_ms: 7000,
            last: false,
        };
        let mut content = vec![b'm'; usize::try_from(at).unwrap()];
        content.extend_from_slice(&header.encode(marker, at));
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&content, 0).unwrap();
        let survey = scan::survey(&file, marker, true).unwrap();
        assert_eq!((survey.offsets, survey.holes), (vec![4096, u32::try_from(at).unwrap()], vec![0]));
    }
}

#[test]
fn a_hole_in_an_unfinished_batch_is_no_damage() {
    // After a power cut the pages of a batch that was not yet synced may be on disk in any order.
    let dir = tempdir().unwrap();
    let marker = super::super::format::Marker([9; 8]);
    let previous = super::super::format::Previous::default();
    let header = super::super::format::SegmentHeader { marker, number: 1, previous, capacity: 8192 };
    let mut content = header.encode().to_vec();
    content.resize(FIRST_RECORD as usize, 0);
    let payload_crc = super::super::format::payload_crc(b"", b"body");
    let synced = u32::try_from(FIRST_RECORD).unwrap();
    for index in 0..3 {
        let record = RecordHeader {
            payload_crc,
            index,
            meta_length: 0,
            body_length: 4,
            synced,
            received_ms: 1_700_000_000_000,
            last: false,
        };
        let at = content.len();
        content.extend_from_slice(&record.encode(marker, at as u64));
        content.extend_from_slice(b"body");
        if index == 1 {
            content[at..].fill(0);
        }
    }
    content.resize(8192, 0);
    fs::write(files::segment(dir.path(), 1), content).unwrap();
    for _ in 0..2 {
        let (table, recovered) = recover(dir.path()).unwrap();
        assert!(recovered.damages.is_empty(), "{recovered:?}");
        assert_eq!(recovered.unpublished, 2);
        let read = |index| table.locate(Place { index, ..table.segments[&1].place(0) }).map(|entry| read::read(&entry));
        assert!(read(0).unwrap().is_ok() && read(1).is_none() && read(2).unwrap().is_ok());
    }
}

#[tokio::test]
async fn a_torn_first_batch_is_no_damage() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(7)).await;
    let place = journal.append(entry(1, 100)).await.unwrap();
    drop(journal);
    eventually(|| files::lock(dir.path()).is_ok()).await;
    // A power cut: of the batch that the header goes with, the records came to the disk and the header did not.
    let path = files::segment(dir.path(), place.segment);
    let mut content = fs::read(&path).unwrap();
    content[..FIRST_RECORD as usize].fill(0);
    fs::write(&path, &content).unwrap();
    assert_eq!(super::super::Snapshot::of(dir.path()).unwrap().segments().filter(|found| found.damaged).count(), 0);
    for _ in 0..2 {
        let (table, recovered) = recover(dir.path()).unwrap();
        assert!(recovered.damages.is_empty(), "{recovered:?}");
        assert_eq!(recovered.unpublished, 1);
        let located = table.segments[&place.segment].sleeper().is_some();
        assert!(located, "it is sealed, and asleep");
    }
    let (journal, _) = open(dir.path(), limits(7)).await;
    assert!(same(&journal.take(10, 1 << 20).await[0], &entry(1, 100)));
}

#[tokio::test]
async fn a_lost_header_is_damage_once_a_second_batch_was_synced() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(7)).await;
    let places = append_all(&journal, &[entry(1, 100), entry(2, 100)]).await;
    drop(journal);
    eventually(|| files::lock(dir.path()).is_ok()).await;
    let path = files::segment(dir.path(), places[0].segment);
    let mut content = fs::read(&path).unwrap();
    content[..FIRST_RECORD as usize].fill(0);
    fs::write(&path, &content).unwrap();
    let (_, recovered) = recover(dir.path()).unwrap();
    assert_eq!((recovered.damages.len(), recovered.unpublished), (1, 2));
}
