//! What each call promises.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::FileExt;

use tempfile::tempdir;

use super::super::direct::SegmentFile;
use super::super::files::{self, Kind};
use super::super::{AppendError, Evidence, Operation, ReadError, Refusal, Shared, Snapshot, State, keeper};
use super::*;

const MIB: u64 = 1 << 20;

/// Entries in each state, in the order of [`State::ALL`].
fn states(journal: &Journal) -> [u64; 4] {
    journal.stats().shares.map(|share| share.tally.entries)
}

fn count(dir: &Path, kind: Kind) -> usize {
    files::list(dir).unwrap().iter().filter(|(other, _)| *other == kind).count()
}

#[tokio::test]
async fn what_was_appended_comes_back_in_order_after_every_kind_of_end() {
    for orderly in [true, false] {
        let dir = tempdir().unwrap();
        let entries: Vec<_> = (0..40).map(|id| entry(id, 300)).collect();
        let (journal, recovered) = open(dir.path(), limits(5)).await;
        assert_eq!(recovered.unpublished, 0);
        let places = append_all(&journal, &entries).await;
        assert!(places.is_sorted() && places.iter().collect::<HashSet<_>>().len() == 40);
        if orderly {
            journal.close().await;
        }
        drop(journal);

        let (journal, recovered) = open(dir.path(), limits(5)).await;
        assert_eq!((recovered.unpublished, recovered.torn_bytes), (40, 0));
        assert!(recovered.damages.is_empty(), "{recovered:?}");
        let taken = journal.take(100, MIB).await;
        assert_eq!(taken.iter().map(|stored| stored.place).collect::<Vec<_>>(), places);
        assert!(taken.iter().zip(&entries).all(|(stored, entry)| same(stored, entry)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_share_a_sync_and_each_gets_its_own_place() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(25)).await;
    let appends = (0..2000).map(|id| {
        let journal = journal.clone();
        tokio::spawn(async move { (id, journal.append(entry(id, 200)).await.unwrap()) })
    });
    for append in appends.collect::<Vec<_>>() {
        let (id, place) = append.await.unwrap();
        assert!(same(&journal.read(place).await.unwrap(), &entry(id, 200)));
    }
    let syncs = journal.stats().syncs;
    assert!(syncs.count < 2000, "each append had a sync of its own");
    assert!(syncs.buckets.iter().sum::<u64>() <= syncs.count && !syncs.sum.is_zero());
}

#[tokio::test]
async fn marks_that_could_not_be_written_are_written_once_they_can() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(5)).await;
    let place = append_all(&journal, &[entry(1, 300)]).await[0];
    let marks = files::marks(dir.path(), place.segment);
    // No file can be made in the place of a directory.
    let obstacle = marks.with_extension("marks.new");
    fs::create_dir(&obstacle).unwrap();
    journal.mark_published(place, 1);
    keeper::write_marks(&journal.0.shared);
    assert!(!marks.exists());
    fs::remove_dir(&obstacle).unwrap();
    journal.close().await;
    assert!(marks.exists());
}

#[tokio::test]
async fn a_second_process_is_kept_out_and_told_by_whom() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let Err(OpenError::InUse { holder, .. }) = Journal::open(dir.path(), limits(3)) else { panic!("not kept out") };
    assert_eq!(holder, Some(std::process::id()));
    journal.close().await;
    drop(journal);
    assert!(Journal::open(dir.path(), limits(3)).is_ok());
}

#[tokio::test]
async fn an_entry_larger_than_a_segment_gets_one_of_its_own() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let entries = [entry(1, 10), entry(2, 30_000), entry(3, 10)];
    let places = append_all(&journal, &entries).await;
    drop(journal);
    let (journal, recovered) = open(dir.path(), limits(3)).await;
    assert!(recovered.damages.is_empty());
    for (place, entry) in places.iter().zip(&entries) {
        assert!(same(&journal.read(*place).await.unwrap(), entry));
    }
}

#[tokio::test]
async fn empty_bodies_are_entries_too() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let empty = Entry { meta: Bytes::new(), body: Bytes::new(), ..entry(1, 0) };
    let place = journal.append(empty.clone()).await.unwrap();
    assert!(same(&journal.read(place).await.unwrap(), &empty));
    drop(journal);
    let (journal, _) = open(dir.path(), limits(3)).await;
    assert!(same(&journal.take(1, 0).await[0], &empty));
}

#[tokio::test]
async fn a_full_journal_says_so_and_recovers_by_itself() {
    let dir = tempdir().unwrap();
    let limits = Limits { max_bytes_on_disk: 180_000, ..limits(7) };
    let (journal, _) = open(dir.path(), limits).await;
    let mut accepted = Vec::new();
    let error = loop {
        match journal.append(entry(u32::try_from(accepted.len()).unwrap(), 500)).await {
            Ok(place) => accepted.push(place),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, AppendError::Full { limit: 180_000 }), "{error}");
    assert!(matches!(journal.trouble().unwrap().problem, AppendError::Full { .. }));
    assert!(journal.stats().bytes_on_disk <= 180_000);

    // One segment's worth in the stream makes room, without anybody appending.
    let first = accepted[0].segment;
    let taken = journal.take(1000, MIB).await;
    assert_eq!(taken.len(), accepted.len(), "what was not published is never let go");
    for stored in taken.iter().filter(|stored| stored.place.segment == first) {
        journal.mark_published(stored.place, 1);
    }
    eventually(|| journal.trouble().is_none()).await;
    // The first appends may still find room: the last segment was sealed meanwhile, and takes less than before.
    while journal.read(accepted[0]).await.is_ok() {
        journal.append(entry(1000, 500)).await.unwrap();
    }
    assert!(matches!(journal.read(accepted[0]).await, Err(ReadError::Unknown)));
    let gone = accepted.iter().filter(|place| place.segment == first).count();
    assert_eq!(journal.stats().dropped_unconfirmed, gone as u64);
    for place in accepted.iter().filter(|place| place.segment != first) {
        journal.read(*place).await.unwrap();
    }
}

#[tokio::test]
async fn nothing_is_let_go_for_an_entry_that_would_not_fit_anyway() {
    let dir = tempdir().unwrap();
    let limits = Limits { max_bytes_on_disk: 180_000, ..limits(7) };
    let (journal, _) = open(dir.path(), limits).await;
    append_all(&journal, &(0..20).map(|id| entry(id, 500)).collect::<Vec<_>>()).await;
    for stored in journal.take(20, MIB).await {
        journal.mark_published(stored.place, 1);
    }
    let error = journal.append(entry(99, 200_000)).await.unwrap_err();
    assert!(matches!(error, AppendError::Full { .. }), "{error}");
    assert_eq!(states(&journal), [0, 20, 0, 0]);
    journal.append(entry(99, 500)).await.unwrap();
}

#[tokio::test]
async fn a_segment_that_fails_is_abandoned_and_the_next_one_takes_over() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(7)).await;
    let shared = &journal.0.shared;
    let before = append_all(&journal, &(0..5).map(|id| entry(id, 500)).collect::<Vec<_>>()).await;
    // More than half full: the next one is made ready.
    eventually(|| shared.table().spare.is_some()).await;
    // It turns out to be one that cannot be written.
    let (number, path) = shared.table().spare.as_ref().map(|spare| (spare.number, spare.path.clone())).unwrap();
    shared.table().spare.as_mut().unwrap().file =
        std::sync::Arc::new(SegmentFile::through_cache(fs::File::open(&path).unwrap()));
    let mut after = Vec::new();
    let error = loop {
        match journal.append(entry(5 + u32::try_from(after.len()).unwrap(), 500)).await {
            Ok(place) => after.push(place),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, AppendError::Disk(_)), "{error}");
    eventually(|| journal.trouble().is_none()).await;
    let last = journal.append(entry(99, 500)).await.unwrap();
    assert!(last.segment > number && after.iter().all(|place| place.segment == before[0].segment));
    assert!(!path.exists(), "nothing was promised in it");
    drop(journal);
    let (_journal, recovered) = open(dir.path(), limits(7)).await;
    assert_eq!((recovered.unpublished, recovered.damages.len()), (6 + after.len() as u64, 0));
}

#[tokio::test]
async fn set_aside_entries_never_make_room() {
    let dir = tempdir().unwrap();
    let limits = Limits { max_bytes_on_disk: 180_000, ..limits(7) };
    let (journal, _) = open(dir.path(), limits).await;
    let place = journal.append(entry(0, 500)).await.unwrap();
    journal.mark_set_aside(place, Refusal::TooLarge);
    for id in 1..200 {
        let place = journal.append(entry(id, 500)).await.unwrap();
        journal.mark_published(place, u64::from(id));
    }
    assert!(same(&journal.read(place).await.unwrap(), &entry(0, 500)));
}

#[tokio::test]
async fn too_much_waiting_is_refused() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), Limits { max_bytes_waiting: 4000, ..limits(20) }).await;
    assert!(matches!(journal.append(entry(1, 5000)).await, Err(AppendError::Busy { limit: 4000 })));
    journal.append(entry(1, 2000)).await.unwrap();
    assert_eq!(journal.stats().bytes_waiting, 0);
}

/// Each operation of such a disk is short enough, and those before it in the queue are many.
#[tokio::test]
async fn an_append_waits_only_so_long_for_a_disk_that_is_slow_and_does_not_hang() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(5)).await;
    let (_writer, answered) = tokio::sync::oneshot::channel();
    let answer = tokio::time::timeout(Duration::from_secs(60), journal.answer(answered)).await;
    let error = answer.expect("a sender that waits for longer counts it against all deliveries").unwrap_err();
    assert!(matches!(error, AppendError::Slow { .. }), "{error}");
}

#[tokio::test]
async fn a_closed_journal_takes_nothing_and_leaves_nothing_to_find_out() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let place = journal.append(entry(1, 100)).await.unwrap();
    journal.close().await;
    journal.close().await;
    assert!(matches!(journal.append(entry(2, 100)).await, Err(AppendError::ShutDown)));
    assert!(journal.trouble().is_some());
    let path = files::segment(dir.path(), place.segment);
    assert!(super::super::scan::read_index(&fs::File::open(path).unwrap()).is_some());
    assert_eq!(count(dir.path(), Kind::Segment), 1, "no blank file is left");
}

#[tokio::test]
async fn confirmed_segments_go_and_the_rest_stays_confirmed_over_a_restart() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let places = append_all(&journal, &(0..20).map(|id| entry(id, 200)).collect::<Vec<_>>()).await;
    let last = places[19];
    // All but the very last: every segment but its own is done with.
    assert_eq!(journal.mark_confirmed(&places[..19]).await, 19);
    assert_eq!(journal.mark_confirmed(&places).await, 1, "only what is news");
    assert_eq!(journal.mark_confirmed(&[last]).await, 0);
    eventually(|| journal.stats().segments == 1).await;
    let left = states(&journal)[State::Confirmed as usize];
    assert!(left < 20);
    journal.mark_set_aside(journal.append(entry(20, 50)).await.unwrap(), Refusal::Permission);
    journal.close().await;
    drop(journal);

    let (journal, recovered) = open(dir.path(), limits(3)).await;
    assert_eq!((recovered.unpublished, recovered.set_aside), (0, 1));
    assert!(is_waiting(journal.take(10, MIB)).await);
    assert_eq!(journal.retry_set_aside(Refusal::TooLarge), 0);
    assert_eq!(journal.retry_set_aside(Refusal::Permission), 1);
    assert!(same(&journal.take(10, MIB).await[0], &entry(20, 50)));
}

#[tokio::test]
async fn finished_segments_are_kept_as_long_as_they_are_to_be() {
    let dir = tempdir().unwrap();
    let retained = Limits { retain: Duration::from_secs(3600), ..limits(3) };
    let (journal, _) = open(dir.path(), retained).await;
    let old = append_all(&journal, &(0..8).map(|id| entry(id, 200)).collect::<Vec<_>>()).await; // received in 2023
    let now = SystemTime::now();
    let new: Vec<_> = (8..16).map(|id| Entry { received_at: now, ..entry(id, 200) }).collect();
    let new = append_all(&journal, &new).await;
    assert_eq!(journal.mark_confirmed(&old).await + journal.mark_confirmed(&new).await, 16);
    eventually(|| journal.stats().shares[State::Confirmed as usize].tally.entries <= 12).await;
    for place in new {
        journal.read(place).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_taken_is_given_once_until_it_is_handed_back() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(20)).await;
    let places = append_all(&journal, &(0..5).map(|id| entry(id, 100)).collect::<Vec<_>>()).await;
    let ids = |taken: &[Stored]| taken.iter().map(|stored| stored.place).collect::<Vec<_>>();
    assert_eq!(ids(&journal.take(2, MIB).await), places[..2]);
    assert_eq!(ids(&journal.take(9, 1).await), places[2..3], "one at least, whatever its size");
    journal.mark_published(places[0], 7);
    journal.release(places[0]); // published meanwhile, so it is not handed back
    journal.release(places[1]);
    assert_eq!(ids(&journal.take(9, MIB).await), [places[1], places[3], places[4]]);
    assert!(is_waiting(journal.take(9, MIB)).await);
    journal.mark_lost(places[0]);
    journal.mark_lost(places[1]); // never published, so not lost
    let again = journal.take(9, MIB).await;
    assert_eq!((ids(&again), again[0].repeats), (vec![places[0]], 1));
}

#[tokio::test]
async fn a_taker_who_stops_waiting_has_taken_nothing() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(20)).await;
    append_all(&journal, &(0..5).map(|id| entry(id, 100)).collect::<Vec<_>>()).await;
    journal.0.shared.recent.forget(); // so that they are read
    {
        let mut take = std::pin::pin!(journal.take(5, MIB));
        // Polled once: the entries are marked as taken and are being read.
        assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(take.as_mut().poll(cx))).await.is_pending());
    }
    assert_eq!(journal.take(5, MIB).await.len(), 5);
}

#[tokio::test]
async fn a_new_entry_wakes_a_waiting_taker() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(20)).await;
    let takes = journal.clone();
    let taker = tokio::spawn(async move { takes.take(5, MIB).await });
    let place = journal.append(entry(1, 100)).await.unwrap();
    assert_eq!(taker.await.unwrap()[0].place, place);
}

#[tokio::test]
async fn places_of_others_are_ignored() {
    let (dir, other_dir) = (tempdir().unwrap(), tempdir().unwrap());
    let (journal, _) = open(dir.path(), limits(3)).await;
    let (other, _) = open(other_dir.path(), limits(3)).await;
    assert_ne!(journal.gateway_id(), other.gateway_id());
    let ours = journal.append(entry(1, 100)).await.unwrap();
    let theirs = other.append(entry(2, 100)).await.unwrap();
    assert_eq!((ours.segment, ours.index), (theirs.segment, theirs.index));
    for foreign in [theirs, Place { index: 1, ..ours }, Place { segment: 9, ..ours }] {
        journal.mark_published(foreign, 1);
        journal.mark_set_aside(foreign, Refusal::Other);
        journal.mark_lost(foreign);
        assert_eq!(journal.mark_confirmed(&[foreign]).await, 0);
        assert!(matches!(journal.read(foreign).await, Err(ReadError::Unknown)));
    }
    assert_eq!(states(&journal), [1, 0, 0, 0]);
}

#[tokio::test]
async fn unconfirmed_entries_are_found_by_age_and_page_by_page() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let places = append_all(&journal, &(0..20).map(|id| entry(id, 200)).collect::<Vec<_>>()).await;
    assert_eq!(journal.take(20, MIB).await.len(), 20);
    for (place, sequence) in places.iter().zip(100..) {
        journal.mark_published(*place, sequence);
    }
    journal.mark_confirmed(&places[4..6]).await;
    assert!(journal.unconfirmed(Duration::from_secs(3600), None, 100).is_empty());
    eventually(|| journal.unconfirmed(Duration::from_millis(100), None, 100).len() == 18).await;
    let first = journal.unconfirmed(Duration::ZERO, None, 7);
    let rest = journal.unconfirmed(Duration::ZERO, Some(first[6].place), 100);
    let all: Vec<_> = first.iter().chain(&rest).map(|entry| (entry.place, entry.sequence)).collect();
    let expected: Vec<_> =
        places.iter().copied().zip(100..).filter(|(place, _)| !places[4..6].contains(place)).collect();
    assert_eq!(all, expected);
    journal.mark_published(places[0], 500); // published anew: its time begins anew
    assert_eq!(journal.unconfirmed(Duration::ZERO, None, 1)[0].sequence, 500);
}

#[tokio::test]
async fn what_an_earlier_process_published_makes_no_room_before_the_stream_has_shown_it() {
    let dir = tempdir().unwrap();
    let limits = Limits { max_bytes_on_disk: 180_000, ..limits(7) };
    let (journal, _) = open(dir.path(), limits).await;
    let mut places = Vec::new();
    while let Ok(place) = journal.append(entry(u32::try_from(places.len()).unwrap(), 500)).await {
        places.push(place);
    }
    for (stored, sequence) in journal.take(1000, MIB).await.iter().zip(100..) {
        journal.mark_published(stored.place, sequence);
    }
    journal.close().await;
    drop(journal);

    let (journal, recovered) = open(dir.path(), limits).await;
    assert_eq!((recovered.unpublished, recovered.unverified), (0, places.len() as u64));
    assert_eq!((journal.stats().unverified, journal.stats().to_publish()), (places.len() as u64, 0));
    assert!(is_waiting(journal.take(1, MIB)).await, "nothing is published again before the stream was asked");
    // The limit is reached again, and nothing goes.
    let refused = async || loop {
        match journal.append(entry(1000, 500)).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(refused().await, AppendError::Full { .. }));
    let found = journal.unconfirmed(Duration::from_secs(300), None, usize::MAX);
    assert_eq!(found.iter().map(|entry| entry.place).collect::<Vec<_>>(), places, "due at once, the oldest first");
    assert!(found.iter().zip(100..).all(|(entry, sequence)| entry.sequence == sequence));
    assert!(found.iter().all(|entry| entry.evidence == Evidence::Marks && entry.bytes >= 500));
    // Shown, the oldest segment makes room; lost, an entry is given out.
    for entry in found.iter().filter(|entry| entry.place.segment == places[0].segment) {
        journal.mark_published(entry.place, entry.sequence);
    }
    eventually(|| journal.trouble().is_none()).await;
    journal.append(entry(1001, 500)).await.unwrap();
    let lost = *places.last().unwrap();
    journal.mark_lost(lost);
    let taken = journal.take(1, MIB).await;
    assert_eq!((taken[0].place, taken[0].repeats), (lost, 1));
}

#[tokio::test]
async fn a_snapshot_shows_a_running_journal() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let entries: Vec<_> = (0..10).map(|id| entry(id, 200)).collect();
    let places = append_all(&journal, &entries).await;
    assert_eq!(journal.take(10, MIB).await.len(), 10);
    journal.mark_published(places[1], 1);
    journal.mark_confirmed(&places[2..3]).await;
    journal.mark_set_aside(places[9], Refusal::TooLarge);
    let look = || Snapshot::of(dir.path()).unwrap();
    eventually(|| look().shares().map(|share| share.tally.entries) == [7, 1, 1, 1]).await;
    let snapshot = look();
    assert_eq!(snapshot.gateway_id(), Some(journal.gateway_id()));
    assert_eq!(snapshot.shares(), journal.stats().shares);
    assert_eq!(snapshot.shares()[0].oldest, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)));
    let bytes = |shares: [super::super::Share; 4]| shares.iter().map(|share| share.tally.bytes).sum::<u64>();
    assert_eq!(snapshot.segments().map(|segment| bytes(segment.shares)).sum::<u64>(), bytes(snapshot.shares()));
    assert!(snapshot.segments().all(|segment| !segment.damaged && segment.bytes > 0));
    let listed: Vec<_> = snapshot.entries().collect();
    assert_eq!(listed.iter().map(|entry| entry.place()).collect::<Vec<_>>(), places);
    assert!(listed.iter().zip(&entries).all(|(listed, entry)| same(&listed.read().unwrap(), entry)));
    assert_eq!((listed[9].state(), listed[9].refusal()), (State::SetAside, Some(Refusal::TooLarge)));
}

#[tokio::test]
async fn a_record_spoilt_while_it_waits_is_reported_and_its_file_kept() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let places = append_all(&journal, &(0..8).map(|id| entry(id, 200)).collect::<Vec<_>>()).await;
    journal.0.shared.recent.forget();
    let spoilt = places[1];
    assert_ne!(spoilt.segment, places[7].segment);
    let path = files::segment(dir.path(), spoilt.segment);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    wake_all(&mut journal.0.shared.table());
    let located = journal.0.shared.table().locate(spoilt).unwrap();
    file.write_all_at(b"?", located.offset + 100).unwrap();

    let taken = journal.take(100, MIB).await;
    assert_eq!(taken.len(), 7);
    assert!(taken.iter().all(|stored| stored.place != spoilt));
    assert!(matches!(journal.read(spoilt).await, Err(ReadError::Unknown)));
    let stats = journal.stats();
    assert_eq!((stats.damaged_records, stats.shares.map(|share| share.tally.entries)), (1, [7, 0, 0, 0]));
    assert_eq!(journal.mark_confirmed(&places).await, 7);
    eventually(|| count(dir.path(), Kind::Damaged) == 1).await;
    eventually(|| journal.stats().damaged_files == 1).await;
    assert!(!path.exists());
    fs::remove_file(files::damaged(dir.path(), spoilt.segment)).unwrap();
    eventually(|| journal.stats().damaged_files == 0).await;
}

#[tokio::test]
async fn a_record_that_the_disk_does_not_give_is_not_given_up() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let places = append_all(&journal, &(0..8).map(|id| entry(id, 200)).collect::<Vec<_>>()).await;
    journal.0.shared.recent.forget();
    let bad = places[0].segment;
    assert_ne!(bad, places[7].segment);
    wake_all(&mut journal.0.shared.table());
    // A directory cannot be read as a file.
    journal.0.shared.table().segments.get_mut(&bad).unwrap().path = dir.path().into();
    let there = places.iter().filter(|place| place.segment != bad).count();
    let mut taken = Vec::new();
    while taken.len() < there {
        taken.extend(journal.take(1, MIB).await); // one by one: nothing but unreadable ones must not end the wait
    }
    assert!(is_waiting(journal.take(1, MIB)).await, "not tried again and again");
    let (entries, _) = journal.unreadable().unwrap();
    assert_eq!(entries, 8 - there as u64);
    assert_eq!((journal.stats().unreadable_entries, journal.stats().to_publish()), (entries, there as u64));
    for stored in &taken {
        journal.mark_published(stored.place, 1);
    }
    journal.mark_confirmed(&taken.iter().map(|stored| stored.place).collect::<Vec<_>>()).await;
    journal.close().await;
    drop(journal);
    let (_journal, recovered) = open(dir.path(), limits(3)).await;
    assert_eq!((recovered.unpublished, recovered.damages.len()), (8 - there as u64, 0));
}

#[tokio::test]
async fn a_record_that_the_disk_gives_again_is_offered_again() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let places = append_all(&journal, &(0..8).map(|id| entry(id, 200)).collect::<Vec<_>>()).await;
    journal.0.shared.recent.forget();
    wake_all(&mut journal.0.shared.table());
    let number = places[0].segment;
    let there: Vec<_> = places.iter().copied().filter(|place| place.segment == number).collect();
    // A directory cannot be read as a file.
    let put = |path: &Path| journal.0.shared.table().segments.get_mut(&number).unwrap().path = path.into();
    put(dir.path());
    let mut taken = Vec::new();
    while taken.len() < places.len() - there.len() {
        taken.extend(journal.take(1, MIB).await);
    }
    assert!(is_waiting(journal.take(1, MIB)).await);
    assert_eq!(journal.unreadable().unwrap().0, there.len() as u64);
    assert_eq!(journal.mark_confirmed(&there[..1]).await, 1, "its receipt may come all the same");
    assert_eq!(journal.unreadable().map_or(0, |(entries, _)| entries), there.len() as u64 - 1);
    put(&files::segment(dir.path(), number));
    let mut again = Vec::new();
    while again.len() < there.len() - 1 {
        again.extend(journal.take(1, MIB).await.into_iter().map(|stored| stored.place));
    }
    again.sort();
    assert_eq!(again, there[1..]);
    assert!(journal.unreadable().is_none());
}

#[tokio::test]
async fn the_gateway_keeps_its_id() {
    let dir = tempdir().unwrap();
    let id = |journal: &Journal| journal.gateway_id().to_owned();
    let (journal, _) = open(dir.path(), limits(3)).await;
    let first = id(&journal);
    assert!(first.len() == 16 && first.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    drop(journal);
    let (journal, _) = open(dir.path(), limits(3)).await;
    assert_eq!(id(&journal), first);
    drop(journal);
    // Not a token of a NATS subject: somebody edited it.
    fs::write(dir.path().join("gateway-id"), "my gateway.*\n").unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    assert_ne!(id(&journal), first);
    assert!(id(&journal).bytes().all(|byte| byte.is_ascii_alphanumeric()));
}

#[test]
fn the_usual_limits_make_sense() {
    for exponent in 20..45 {
        let limits = Limits::of(1 << exponent);
        assert!(limits.segment_bytes <= limits.max_bytes_on_disk / 4 && limits.segment_bytes <= 1 << 30);
        assert!(limits.max_bytes_on_disk / limits.segment_bytes <= 1 << 15);
    }
    assert_eq!(Limits::of(10 << 30).segment_bytes, 64 << 20);
}

/// How many files of the journal this process has open.
fn open_files(dir: &Path) -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    open.filter(|path| path.starts_with(dir) && path.extension() == Some("journal".as_ref())).count()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn open_files_do_not_follow_the_journals_size() {
    let dir = tempdir().unwrap();
    let (mut journal, _) = open(dir.path(), limits(3)).await;
    let entries: Vec<_> = (0..120).map(|id| entry(id, 300)).collect();
    append_all(&journal, &entries).await;
    for _ in 0..2 {
        assert!(journal.stats().segments >= 40);
        assert!(open_files(dir.path()) <= 6, "{} are open", open_files(dir.path()));
        let snapshot = Snapshot::of(dir.path()).unwrap();
        assert!(open_files(dir.path()) <= 6, "{} are open beside a snapshot", open_files(dir.path()));
        assert!(same(&snapshot.entries().last().unwrap().read().unwrap(), &entries[119]));
        journal.0.shared.recent.forget();
        assert_eq!(journal.take(1000, MIB).await.len(), 120);
        assert!(open_files(dir.path()) <= 6, "{} are open after reading", open_files(dir.path()));
        journal.close().await;
        drop(journal);
        (journal, _) = open(dir.path(), limits(3)).await;
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_start_has_few_files_open_at_once() {
    let dir = tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (journal, _) = open(dir.path(), limits(3)).await;
        append_all(&journal, &(0..120).map(|id| entry(id, 300)).collect::<Vec<_>>()).await;
        journal.close().await;
    });
    let ended = std::sync::atomic::AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = 0;
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                most = most.max(open_files(dir.path()));
            }
            most
        });
        for _ in 0..20 {
            super::super::recover::recover(dir.path()).unwrap();
        }
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
        watch.join().unwrap()
    });
    assert!(most <= 6, "{most} were open at once");
}

/// Returns `true` when the writer has waited for a segment for a while.
fn waits_for_space(shared: &Shared) -> bool {
    matches!(shared.in_flight.now(), Some((Operation::NewSegment, lasts)) if lasts > Duration::from_millis(50))
}

fn wait_for_writer(condition: impl Fn() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(20);
    while !condition() && Instant::now() < give_up {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A journal at its byte limit. All of it is published, nothing is confirmed.
async fn at_its_limit(dir: &Path) -> (Journal, u64) {
    let limits = Limits { max_bytes_on_disk: 4 * limits(7).segment_bytes, ..limits(7) };
    let (journal, _) = open(dir, limits).await;
    let mut id = 0;
    while journal.append(entry(id, 500)).await.is_ok() {
        id += 1;
    }
    for stored in journal.take(1000, MIB).await {
        journal.mark_published(stored.place, 1);
    }
    eventually(|| journal.trouble().is_none()).await;
    let dropped = journal.stats().dropped_unconfirmed;
    (journal, dropped)
}

#[tokio::test]
async fn nothing_unconfirmed_goes_while_a_segment_is_being_removed() {
    let dir = tempdir().unwrap();
    let (journal, before) = at_its_limit(dir.path()).await;
    let shared = journal.0.shared.clone();
    // As the keeper does it: out of the table, and on its way off the disk.
    let segment = {
        let mut table = shared.table();
        let number = table.expendable().unwrap();
        let segment = table.segments.remove(&number).unwrap();
        table.begin_removal(&segment);
        segment
    };
    let removing = std::thread::spawn(move || {
        wait_for_writer(|| waits_for_space(&shared) || shared.table().counters.dropped_unconfirmed > before);
        keeper::remove(&shared, &segment);
    });
    for id in 0.. {
        if removing.is_finished() {
            break;
        }
        let place = journal.append(entry(1000 + id, 500)).await.unwrap();
        journal.mark_published(place, 1);
    }
    removing.join().unwrap();
    assert_eq!(journal.stats().dropped_unconfirmed, before, "room was on its way");
}

#[tokio::test]
async fn a_delivery_waits_for_the_segment_that_is_just_being_made() {
    let dir = tempdir().unwrap();
    let limits = Limits { max_bytes_on_disk: 4 * limits(7).segment_bytes, ..limits(7) };
    let (journal, _) = open(dir.path(), limits).await;
    let shared = journal.0.shared.clone();
    // As the keeper does it, when the active segment is half full: all that is left of the limit.
    let blank = keeper::reserve(&shared, u64::MAX, limits.segment_bytes).unwrap();
    append_all(&journal, &(0..5).map(|id| entry(id, 500)).collect::<Vec<_>>()).await;
    eventually(|| {
        let table = shared.table();
        !table.spare_wanted && !table.making_spare // the keeper itself finds no room
    })
    .await;
    shared.table().making_spare = true;
    let making = std::thread::spawn(move || {
        wait_for_writer(|| waits_for_space(&shared) || shared.table().trouble.is_some());
        let spare = keeper::create(&shared, blank).unwrap();
        shared.table().end_spare(Some(spare));
        shared.space.notify_all();
    });
    for id in 0..10 {
        journal.append(entry(id, 500)).await.unwrap();
    }
    making.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_beside_a_busy_writer_shows_no_damage() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), Limits::of(256 << 20)).await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let senders: Vec<_> = (0..16)
        .map(|id| {
            let (journal, stop) = (journal.clone(), stop.clone());
            tokio::spawn(async move {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    if let Ok(place) = journal.append(entry(id, 16_000)).await {
                        journal.mark_published(place, 1); // so that it makes room
                    }
                }
            })
        })
        .collect();
    for _ in 0..20 {
        let dir = dir.path().to_owned();
        let snapshot = tokio::task::spawn_blocking(move || Snapshot::of(&dir).unwrap()).await.unwrap();
        let damaged: Vec<_> = snapshot.segments().filter(|segment| segment.damaged).collect();
        assert!(damaged.is_empty(), "{damaged:?}");
        assert!(snapshot.unreadable().is_empty(), "{:?}", snapshot.unreadable());
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for sender in senders {
        sender.await.unwrap();
    }
}

#[tokio::test]
async fn a_thread_that_has_ended_is_told() {
    let dir = tempdir().unwrap();
    let (journal, _) = open(dir.path(), limits(3)).await;
    assert!(!journal.is_broken());
    journal.0.keeper.send(keeper::Nudge::Stop).unwrap();
    eventually(|| journal.is_broken()).await;
}
