//! Random histories against a simple model in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use tempfile::tempdir;

use super::super::files::{self, Kind};
use super::super::format::{self, RECORD_HEADER, RecordHeader};
use super::super::{AppendError, Refusal, State, scan};
use super::*;

/// Entries in a segment, and bytes of the whole journal: few, so that it is often full.
const SEGMENT: u64 = 4;
const JOURNAL: u64 = 9 * (FIRST_RECORD + (SEGMENT + 1) * BLOCK);

#[derive(Debug, Clone)]
enum Step {
    Append { body_length: usize },
    Take { entries: usize },
    Publish(Which),
    Duplicate(Which),
    Confirm(Which),
    SetAside(Which),
    Release(Which),
    Lose(Which),
    Retry,
    Close,
    Crash(Leftover),
}

/// Some of the entries that there are: those whose number modulo the first is the second.
#[derive(Debug, Clone)]
struct Which(usize, usize);

/// What a crash leaves behind the last synced record.
#[derive(Debug, Clone)]
enum Leftover {
    Nothing,
    Noise(Vec<u8>),
    /// A record of a batch that was never answered, so much of it as there was time for.
    Part(usize),
    Whole,
}

fn step() -> impl Strategy<Value = Step> {
    let which = || (1usize..4, 0usize..4).prop_map(|(modulus, rest)| Which(modulus, rest % modulus));
    prop_oneof![
        10 => prop_oneof![9 => 0usize..400, 1 => 14_000usize..40_000].prop_map(|body_length| Step::Append { body_length }),
        4 => (1usize..30).prop_map(|entries| Step::Take { entries }),
        4 => which().prop_map(Step::Publish),
        1 => which().prop_map(Step::Duplicate),
        3 => which().prop_map(Step::Confirm),
        1 => which().prop_map(Step::SetAside),
        1 => which().prop_map(Step::Release),
        1 => which().prop_map(Step::Lose),
        1 => Just(Step::Retry),
        1 => Just(Step::Close),
        2 => prop_oneof![
            Just(Leftover::Nothing),
            prop::collection::vec(any::<u8>(), 1..200).prop_map(Leftover::Noise),
            (1usize..100).prop_map(Leftover::Part),
            Just(Leftover::Whole),
        ]
        .prop_map(Step::Crash),
    ]
}

#[derive(Debug, Clone)]
struct Known {
    entry: Entry,
    state: State,
    taken: bool,
    unverified: bool,
}

struct World {
    dir: tempfile::TempDir,
    journal: Option<Journal>,
    known: BTreeMap<Place, Known>,
    next_id: u32,
}

impl World {
    fn limits() -> Limits {
        Limits { max_bytes_on_disk: JOURNAL, ..limits(SEGMENT) }
    }

    async fn start() -> World {
        let dir = tempdir().unwrap();
        let (journal, _) = open(dir.path(), Self::limits()).await;
        World { dir, journal: Some(journal), known: BTreeMap::new(), next_id: 0 }
    }

    fn journal(&self) -> &Journal {
        self.journal.as_ref().unwrap()
    }

    fn some(&self, which: &Which, fits: impl Fn(&Known) -> bool) -> Vec<Place> {
        let fitting = self.known.iter().filter(|(_, known)| fits(known)).enumerate();
        fitting.filter(|(index, _)| index % which.0 == which.1).map(|(_, (place, _))| *place).collect()
    }

    fn set(&mut self, place: Place, state: State) {
        let known = self.known.get_mut(&place).unwrap();
        *known = Known { state, taken: false, unverified: false, ..known.clone() };
    }

    async fn step(&mut self, step: &Step) {
        match step {
            Step::Append { body_length } => self.append(*body_length).await,
            Step::Take { entries } => self.take(*entries).await,
            Step::Publish(which) => {
                for place in self.some(which, |known| known.taken || known.unverified) {
                    self.journal().mark_published(place, 7);
                    self.set(place, State::Published);
                }
            }
            Step::Duplicate(which) => {
                for place in self.some(which, |known| known.taken) {
                    self.journal().mark_duplicate(place, 7);
                    self.set(place, State::Journalled);
                    self.known.get_mut(&place).unwrap().unverified = true;
                }
            }
            Step::Confirm(which) => {
                // Receipts may come for entries in any state, and again.
                let places = self.some(which, |_| true);
                let news = places.iter().filter(|place| self.known[place].state != State::Confirmed).count();
                assert_eq!(self.journal().mark_confirmed(&places).await, news);
                places.iter().for_each(|place| self.set(*place, State::Confirmed));
            }
            Step::SetAside(which) => {
                for place in self.some(which, |known| known.taken) {
                    self.journal().mark_set_aside(place, Refusal::TooLarge);
                    self.set(place, State::SetAside);
                }
            }
            Step::Release(which) => {
                for place in self.some(which, |known| known.taken) {
                    self.journal().release(place);
                    self.set(place, State::Journalled);
                }
            }
            Step::Lose(which) => {
                for place in self.some(which, |known| known.state == State::Published || known.unverified) {
                    self.journal().mark_lost(place);
                    self.set(place, State::Journalled);
                }
            }
            Step::Retry => {
                let set_aside = self.some(&Which(1, 0), |known| known.state == State::SetAside);
                assert_eq!(self.journal().retry_set_aside(Refusal::TooLarge), set_aside.len());
                set_aside.into_iter().for_each(|place| self.set(place, State::Journalled));
            }
            Step::Close => self.restart(None).await,
            Step::Crash(leftover) => self.restart(Some(leftover)).await,
        }
        self.check().await;
    }

    async fn append(&mut self, body_length: usize) {
        let entry = entry(self.next_id, body_length);
        self.next_id += 1;
        match self.journal().append(entry.clone()).await {
            Ok(place) => {
                let news = Known { entry, state: State::Journalled, taken: false, unverified: false };
                assert!(self.known.last_key_value().is_none_or(|(last, _)| *last < place), "not in order");
                assert!(self.known.insert(place, news).is_none(), "one place twice");
            }
            Err(AppendError::Full { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    async fn take(&mut self, entries: usize) {
        let waits = |known: &Known| known.state == State::Journalled && !known.taken && !known.unverified;
        let waiting = self.some(&Which(1, 0), waits);
        if waiting.is_empty() {
            return;
        }
        let taken = self.journal().take(entries, u64::MAX).await;
        assert_eq!(taken.iter().map(|stored| stored.place).collect::<Vec<_>>(), waiting[..waiting.len().min(entries)]);
        for stored in taken {
            let known = self.known.get_mut(&stored.place).unwrap();
            assert!(same(&stored, &known.entry));
            known.taken = true;
        }
    }

    async fn restart(&mut self, crash: Option<&Leftover>) {
        let journal = self.journal.take().unwrap();
        if crash.is_none() {
            journal.close().await;
        }
        drop(journal);
        eventually(|| files::lock(self.dir.path()).is_ok()).await;
        if let Some(leftover) = crash {
            self.leave(leftover);
        }
        let (journal, recovered) = open(self.dir.path(), Self::limits()).await;
        assert!(recovered.damages.is_empty(), "{recovered:?}");
        let (after, unverified) = (present(&journal), unverified(&journal));
        self.journal = Some(journal);
        let before = std::mem::take(&mut self.known);
        for (place, known) in before {
            let now = after.get(&place).copied();
            // After a crash the marks on disk may be old; after a close they are not.
            let allowed: &[_] = match (known.state, crash) {
                (State::Journalled | State::Published, _) => &[Some(State::Journalled)],
                (State::SetAside, None) => &[Some(State::SetAside)],
                (State::SetAside, Some(_)) => &[Some(State::SetAside), Some(State::Journalled)],
                (State::Confirmed, None) => &[Some(State::Confirmed), None],
                (State::Confirmed, Some(_)) => &[Some(State::Confirmed), Some(State::Journalled), None],
            };
            // Marks as old as that may say of an entry what is no longer so.
            let stale = crash.is_some() && now == Some(State::SetAside);
            assert!(allowed.contains(&now) || stale, "{place}: {:?} is now {now:?}", known.state);
            let is_unverified = unverified.contains(&place);
            let had_sequence = known.state == State::Published || known.unverified;
            assert!(is_unverified == (now.is_some() && had_sequence) || crash.is_some(), "{place}: {known:?}");
            if let Some(state) = now {
                self.known.insert(place, Known { state, taken: false, unverified: is_unverified, ..known });
            }
        }
    }

    /// Writes behind the newest segment's records what a crash may leave there.
    fn leave(&mut self, leftover: &Leftover) {
        let mut newest = files::list(self.dir.path()).unwrap().into_iter().filter(|(kind, _)| *kind == Kind::Segment);
        let Some((_, number)) = newest.next_back() else { return };
        let path = files::segment(self.dir.path(), number);
        let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let (_, Some(marker)) = scan::identify(&file).unwrap() else { return }; // blank
        if scan::read_index(&file).is_some() {
            return; // sealed: nothing was being written there
        }
        let survey = scan::survey(&file, marker, true).unwrap();
        let entry = entry(self.next_id, 50);
        let header = RecordHeader {
            payload_crc: format::payload_crc(&entry.meta, &entry.body),
            index: u32::try_from(survey.offsets.len()).unwrap(),
            meta_length: u32::try_from(entry.meta.len()).unwrap(),
            body_length: u32::try_from(entry.body.len()).unwrap(),
            synced: u32::try_from(survey.end).unwrap(),
            received_ms: super::super::read::unix_ms(entry.received_at),
            last: false,
        };
        let record = [&header.encode(marker, survey.end)[..], &entry.meta, &entry.body].concat();
        let part = |length: usize| record[..length.min(RECORD_HEADER + entry.meta.len())].to_vec();
        let bytes = match leftover {
            Leftover::Nothing => return,
            Leftover::Noise(noise) => noise.clone(),
            Leftover::Part(length) => part(*length),
            Leftover::Whole => record.clone(),
        };
        file.write_all_at(&bytes, survey.end).unwrap();
        if matches!(leftover, Leftover::Whole) {
            // Never answered, but genuine and whole: it is delivered.
            self.next_id += 1;
            let place = Place { segment: number, index: header.index, check: marker.check() };
            let known = Known { entry, state: State::Journalled, taken: false, unverified: false };
            self.known.insert(place, known);
        }
    }

    /// The journal holds what the model holds, but for what it may have let go.
    async fn check(&mut self) {
        let (present, unverified) = (present(self.journal()), unverified(self.journal()));
        assert_eq!(unverified.into_iter().collect::<Vec<_>>(), self.some(&Which(1, 0), |known| known.unverified));
        for place in present.keys() {
            assert!(self.known.contains_key(place), "{place} was made up");
        }
        let gone: Vec<_> = self.known.keys().filter(|place| !present.contains_key(place)).copied().collect();
        for place in gone {
            let known = self.known.remove(&place).unwrap();
            assert!(matches!(known.state, State::Published | State::Confirmed), "{place} is lost: {known:?}");
        }
        for (place, known) in &self.known {
            assert_eq!(present[place], known.state, "{place}");
        }
        let stats = self.journal().stats();
        assert!(stats.bytes_on_disk <= JOURNAL);
        assert_eq!((stats.damaged_records, stats.bytes_waiting), (0, 0));
    }

    /// Every entry that must still be there can be read.
    async fn read_all(&self) {
        for (place, known) in &self.known {
            match self.journal().read(*place).await {
                Ok(stored) => assert!(same(&stored, &known.entry)),
                Err(error) => assert_eq!(known.state, State::Confirmed, "{place}: {error}"),
            }
        }
    }
}

/// The entries that the stream is to be asked for.
fn unverified(journal: &Journal) -> BTreeSet<Place> {
    let found = journal.unconfirmed(Duration::MAX, None, usize::MAX);
    assert_eq!(journal.stats().unverified, found.len() as u64);
    found.into_iter().map(|entry| entry.place).collect()
}

/// Every entry of the journal, and its state.
fn present(journal: &Journal) -> BTreeMap<Place, State> {
    let table = journal.0.shared.table();
    let mut all = BTreeMap::new();
    for segment in table.segments.values() {
        for index in 0..segment.entries() {
            all.extend(segment.bits(index).state().map(|state| (segment.place(index), state)));
        }
        // The tallies are kept by differences; here they are counted.
        let counted =
            |state| (0..segment.entries()).filter(|&index| segment.bits(index).state() == Some(state)).count();
        assert!(State::ALL.into_iter().all(|state| segment.tally(state).entries == counted(state) as u64));
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_history_keeps_what_must_be_kept(steps in prop::collection::vec(step(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut world = World::start().await;
            for step in &steps {
                world.step(step).await;
            }
            world.read_all().await;
        });
    }
}
