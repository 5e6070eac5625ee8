//! The journal, from the files up.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::pin::pin;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use gateway::journal::{Journal, Limits, OpenError, Outside, Snapshot, State, Stored};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::segments::{self, Plan, Segment};

const LIMITS: Limits =
    Limits { max_bytes_on_disk: 64 << 20, segment_bytes: 64 << 10, max_bytes_waiting: 1 << 20, retain: Duration::ZERO };
/// Bits of a byte of marks: [`State::Confirmed`], [`State::SetAside`].
const SETTLED: u8 = 2 | 4;

/// Of any files: looking at a journal changes nothing. Opening it never panics. Each entry that it gives out is a record on
/// disk whose checksums hold, under its own place, once. Every intact record is given out, whatever is broken around it,
/// and what was promised and is broken is told. Opened again it gives out the same; once confirmed, nothing.
pub fn check(script: &[u8]) {
    let plan = Plan::of(script);
    let dir = folder();
    plan.write(dir.path());
    let before = contents(dir.path());
    let looked = look(dir.path());
    assert!(before == contents(dir.path()), "looking at a journal changed it");
    let Some(first) = deliver(dir.path(), false) else {
        assert!(plan.segments.iter().any(|segment| segments::is_of_another_version(&segment.file)));
        assert!(before == contents(dir.path()), "a journal that was not opened was changed");
        return;
    };
    for (place, stored) in &first.entries {
        assert!(is_genuine(&plan, *place, stored), "made up: {place:?} {stored:?}");
    }
    if plan.is_honest {
        assert_complete(&plan, &first);
        assert_eq!(looked, first.entries, "looked at, there are other entries than when opened");
    }
    let second = deliver(dir.path(), true).expect("it was opened before");
    assert_eq!(first.entries, second.entries, "opened again, there are others");
    let third = deliver(dir.path(), false).expect("it was opened before");
    assert!(third.entries.is_empty(), "confirmed, and given out again: {:?}", third.entries);
}

/// Entries by their place: the segment's number, and the index in it.
type Entries = BTreeMap<(u64, u32), Stored>;

struct Delivered {
    entries: Entries,
    /// Files of which damage was told.
    damaged: BTreeSet<u64>,
    /// Records found damaged, in all.
    damaged_records: u64,
}

/// An empty folder, in memory where the system has such: nothing here is about its durability.
pub(crate) fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    folder.unwrap()
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap())
}

/// Everything in the folder, by name.
fn contents(dir: &Path) -> BTreeMap<std::ffi::OsString, Vec<u8>> {
    let files = std::fs::read_dir(dir).unwrap().map(|file| file.unwrap());
    let mut contents: BTreeMap<_, _> =
        files.map(|file| (file.file_name(), std::fs::read(file.path()).unwrap())).collect();
    // An opening that fails may have made these.
    contents.retain(|name, _| name != "lock" && name != "gateway-id");
    contents
}

fn key(stored: &Stored) -> (u64, u32) {
    let place = stored.place.to_string();
    let mut numbers = place.split('.');
    let mut number = || numbers.next().unwrap();
    (number().parse().unwrap(), number().parse().unwrap())
}

/// What is there to publish, seen from outside.
fn look(dir: &Path) -> Entries {
    let snapshot = Snapshot::of(dir).unwrap();
    let listed = snapshot.entries().filter(|entry| !matches!(entry.state(), State::Confirmed | State::SetAside));
    listed.filter_map(|entry| entry.read().ok()).map(|stored| (key(&stored), stored)).collect()
}

/// Opens the journal and takes everything that it gives out; `None` where a later version wrote it. Then confirms it all, if
/// that is wanted, and closes in good order.
fn deliver(dir: &Path, confirm: bool) -> Option<Delivered> {
    let (journal, recovered) = match Journal::open(dir, LIMITS) {
        Ok(opened) => opened,
        Err(OpenError::OtherVersion { .. }) => return None,
        Err(error) => panic!("{error}"),
    };
    let number = |file: &Path| file.file_stem().unwrap().to_str().unwrap().parse().unwrap();
    let damaged = recovered.damages.iter().map(|damage| number(&damage.file)).collect();
    let mut delivered = Delivered { entries: Entries::new(), damaged, damaged_records: 0 };
    runtime().block_on(async {
        while let Some(taken) = take(&journal, delivered.entries.len() as u64).await {
            for stored in taken {
                let again = delivered.entries.insert(key(&stored), stored);
                assert!(again.is_none(), "given out twice: {again:?}");
            }
        }
        delivered.damaged_records = journal.stats().damaged_records;
        if confirm {
            let places: Vec<_> = delivered.entries.values().map(|stored| stored.place).collect();
            assert_eq!(journal.mark_confirmed(&places).await, places.len());
        }
        journal.close().await;
    });
    drop(journal);
    until_free(dir);
    Some(delivered)
}

/// Waits until a journal that was closed can be opened again: a read that nobody waits for any more still has it until it
/// ends, and so has, for a moment, a program that another thread starts.
fn until_free(dir: &Path) {
    let begin = Instant::now();
    while Outside::look(dir).unwrap().held_by.is_some() {
        assert!(begin.elapsed() < Duration::from_secs(20), "the journal is closed, and still in use");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What is given out next, after so many entries; `None` where nothing is left. What is found damaged on the way is no entry
/// any more, so that has to be asked again and again.
async fn take(journal: &Journal, taken: u64) -> Option<Vec<Stored>> {
    let is_any_left = || journal.stats().to_publish() > taken;
    let mut take = pin!(journal.take(100, 1 << 20));
    while is_any_left() {
        tokio::select! {
            taken = &mut take => return Some(taken),
            () = tokio::time::sleep(Duration::from_millis(1)) => {}
        }
    }
    None
}

fn unix_ms(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as u64
}

fn is_genuine(plan: &Plan, (number, index): (u64, u32), stored: &Stored) -> bool {
    let segment = plan.segments.iter().find(|segment| segment.number == number);
    segment.is_some_and(|segment| segment.genuine(index, unix_ms(stored.received_at), &stored.meta, &stored.body))
}

/// Of a journal that was written honestly and then damaged: every intact record is there, and where one is not that was
/// promised, somebody is told.
fn assert_complete(plan: &Plan, delivered: &Delivered) {
    for (at, segment) in plan.segments.iter().enumerate() {
        for record in &segment.records {
            let is_delivered = delivered.entries.contains_key(&(segment.number, record.index));
            let is_intact = segment.can_be_known() && segment.is_intact(record.range.clone());
            if is_intact && !is_settled(segment, record.index) {
                assert!(is_delivered, "entry {} of segment {} is intact and not there", record.index, segment.number);
            }
            if !is_intact && plan.is_promised(at, record) && !is_settled(segment, record.index) {
                assert!(!is_delivered, "entry {} of segment {} is damaged", record.index, segment.number);
                let is_told = delivered.damaged.contains(&segment.number) || delivered.damaged_records > 0;
                assert!(is_told, "entry {} of segment {} is lost, and nobody is told", record.index, segment.number);
            }
        }
    }
}

/// Whether the marks let it go. A byte that says that there is no entry is none that a gateway writes, and counts for
/// nothing.
fn is_settled(segment: &Segment, index: u32) -> bool {
    segment.states().get(index as usize).is_some_and(|state| state & SETTLED != 0)
}
