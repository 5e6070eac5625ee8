//! The local write-ahead journal: every 202 rests on it.
//!
//! An *entry* is one accepted delivery: a header block and a body, both opaque here. It is on disk before `append`
//! returns, it is published from here, and it is let go once the worker's receipt says that it is stored. Memory holds
//! what is being worked on: where an entry is, and its state in a byte. Bodies stay on disk (but for two megabytes of
//! those that come next to be published, see [`recent`]), and so does the index of a segment that nobody has got to
//! yet, so memory does not grow with what waits.
//!
//! # The directory
//! | file | what |
//! |---|---|
//! | `lock` | locked by the gateway that has the journal open; holds its process id, for the message to a second one |
//! | `gateway-id` | made once: a token of letters and digits |
//! | `receipt-key` | made once: 32 random bytes in hex, from which the tags of receipts follow |
//! | `000000000042.journal` | segment 42 |
//! | `000000000042.marks` | the states of its entries, and their sequences in the stream, some time ago |
//! | `000000000042.damaged` | a segment with damage, kept for people once nothing in it is left to do |
//!
//! The directory is its owner's alone, and so are the files ([`access`]).
//!
//! Numbers grow and are never used twice while any file bears them. All integers are little-endian; every checksum is
//! CRC32C (RFC 3720, appendix B.4) of everything it covers in the order of the file, its own four bytes left out.
//!
//! # A segment
//! ```text
//!    0  header      magic "LOOPJRNL" | version u32 | crc u32 | marker [8] | number u64
//!                   | previous: number u64, end u64, entries u32 | 0 u32 | capacity u64
//!   64  zeros, up to 4096
//! 4096  record      marker [8] | crc u32 | payload crc u32 | index u32 | header block length u32 | body length u32
//!                   | synced u32 | received at u64 | header block | body
//!       record ...  the last of a batch: zeros up to a multiple of 4096
//!       zeros, up to the capacity; or, once sealed, the index, which ends the file:
//!       index       for each entry: offset u32, received at u32 (Unix time, seconds)
//!       trailer     marker [8] | magic "LOOPTAIL" | end u64 | entries u32 | crc u32 (of index and trailer)
//! ```
//! - *marker*: eight random bytes of this segment. They open every record and are known to nobody outside, so what a
//!   sender puts into a body is never taken for a record.
//! - A record's *crc* covers its header and its position in the file; its *payload crc* the header block and body.
//!   `received at` is Unix time in milliseconds; `index` counts the entries of the segment from 0.
//! - *header block length* is 31 bits; the highest says that the record is the last of its batch, and so where the next
//!   one begins. (Version 1 of the format had neither that bit nor those zeros, and reads the same.)
//! - *synced* is where the record's batch begins: all before it was synced before this record was written. *previous*
//!   says the same of the segment before: where its synced records end, and how many they are. Only with these can
//!   damage, which is a loss, be told from a batch that was never finished, which is not.
//! - *capacity*: bytes reserved for the file. It is only shorter once it is sealed; the index always fits into it.
//!
//! A marks file, replaced as a whole:
//! ```text
//!    0  magic "LOOPMARK" | version u32 | crc u32 | check u32 | entries u32
//!   24  states, a byte each | sequences of the entries whose state says that they have one: each as the difference from
//!       the one before, in LEB128 of its zigzag form
//! ```
//! Version 1 has no sequences.
//!
//! # Invariants
//! - A file is reserved in full, synced, and its name synced, before its first record is written.
//! - Records are only ever appended, by one thread, a batch at a time: whole blocks of 4096 bytes, past the page cache
//!   where the file system can do that ([`direct`]), then one fdatasync, and only then the answers. The header goes with
//!   the first batch. No block with a record in it is written again, so a write that is torn spoils its own batch only.
//! - After a failed write or sync the segment is abandoned: never written or synced again (a second fdatasync may
//!   succeed although the pages of the first are gone). What was synced before is delivered. The failed batch was
//!   refused, but its records may be on disk and found at the next start: then they are delivered, too, since they
//!   were genuine.
//! - A sealed segment never changes. The index is written behind the records before the file is cut to its new length,
//!   and only after the next segment's header, which says how long this one is, was synced. At an orderly shutdown, and
//!   at a start, there is no such header: then the index is synced before the file is cut. The second thread seals, so
//!   no delivery waits for that.
//! - Only the writer keeps a segment's file open, the one that it writes to. All others are opened when they are read,
//!   sealed or removed: a journal may have more segments than a process may have files open.
//! - A disk that hangs is a fault. The writer notes each operation before it begins. When one takes more than a second,
//!   appends are refused at once, and those that wait within 3 s of its beginning ([`stall`]). A disk that is slow, and
//!   does not hang, has 4 s for each append. Entries that were refused may be on disk later, as those of a failed batch
//!   may, and are then delivered.
//! - A segment goes as a whole, when every entry in it is confirmed and `retain` is over. At the byte limit, or on a
//!   full disk, segments in which every entry is published or confirmed go first, the oldest first; never one with an
//!   entry that is not in the stream.
//! - Marks are hints: written at most once a second, never synced, replaced by rename. Without them confirmed entries
//!   are published again, which changes nothing in the end. They are never the reason to let an entry go that was not
//!   confirmed: checksum and marker tie them to their segment.
//! - An *unverified* entry has a sequence, and the stream has not shown yet that the message there is this entry's. Its
//!   marks say that an earlier process published it, or JetStream called it a duplicate. It counts as journalled, so it
//!   makes no room. It is not given out before the stream was asked ([`Journal::unconfirmed`]), and waits while the stream
//!   cannot be asked. The answer makes it published, or lost and given out again.
//! - No entry is confirmed before JetStream has acknowledged it, to this process or to an earlier one. A receipt that
//!   comes sooner is remembered until then ([`receipts`]).
//! - Nothing in memory says more than the disk: an entry can be published, read or marked only after its sync.
//! - A sealed segment whose entries are all alike, as new or confirmed, *sleeps*: memory has its totals only. It is
//!   *woken*, its index read back and held against what is known of it, before one of its entries is taken or read, or
//!   confirmed by a receipt for what an earlier process published. Any other mark is for an entry that was taken, so
//!   its segment is awake. Nobody holds the table while a disk is read.
//!
//! # What `open` does with what it finds
//! | found | done |
//! |---|---|
//! | a sealed segment | its index is read, its records are not; each is checked when it is read to be published |
//! | any other | all records are read and checked |
//! | zeros or a broken record at the end, nothing promised there | the torn tail: cut, its bytes reported |
//! | a broken record, promised (see *synced*, *previous*) | counted, reported; reading goes on at the next marker |
//! | a broken record in an unfinished batch | passed over |
//! | a damaged header | reported; the marker is taken from the first record or the trailer |
//! | the same, nothing promised, all records of one batch | the first batch, torn: no damage; the header is written anew |
//! | a damaged index | the records are read instead |
//! | a file cut short | reported, unless the next header shows that nothing is missing |
//! | a sector that cannot be read | as zeros, reported |
//! | a file in which nothing can be read | renamed to `.damaged` at once, reported |
//! | a blank file | removed: it was made ready and never used |
//! | a damaged marks file, or one of another segment | ignored |
//! | a file of a later version | an error; nothing is touched |
//!
//! A damaged segment is left as it is, delivered as far as it is intact, and renamed to `.damaged` when it would
//! otherwise be removed. A record found damaged later, when it is read, is treated alike; one that the disk then does
//! not give keeps its segment and is read again later ([`unreadable`]). An index found damaged when its segment is woken
//! is no loss then either: the records are read. If the disk does not give those, all of the segment is read again
//! later. Only one thing cannot be told apart: damage in the very last batch before a crash looks like a torn tail, and
//! is reported as one.
//!
//! Then what the marks call published is unverified, what else is not known to be confirmed is published again, each the
//! oldest first. A new segment is begun: none is ever appended to after a restart.

mod access;
mod asleep;
mod direct;
mod files;
mod format;
mod keeper;
mod place;
mod read;
mod receipts;
mod recent;
mod recover;
mod scan;
mod segment;
mod snapshot;
mod stall;
mod state;
mod stats;
mod table;
mod unreadable;
mod writer;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::{Notify, oneshot};

pub use access::{foreign_owner, open_to_others};
pub use place::{NotAPlace, Place};
pub use read::{ReadError, Stored};
pub use receipts::{Judged, Receipt};
pub use recover::{Damage, OpenError, Recovered};
pub use snapshot::{Listed, SegmentStatus, Snapshot, later_versions};
pub use stall::{Operation, Stall};
pub use state::{Evidence, Refusal, State, Tally};
pub use stats::{AppendError, SYNC_BUCKETS, Share, Stats, Syncs, Trouble, Unsettled};
pub use table::Unconfirmed;

use format::{MAX_PAYLOAD, RECORD_HEADER};
use keeper::Nudge;
use recent::Recent;
use segment::{Segment, Ticks};
use stall::InFlight;
use table::{Located, Table};
use writer::{Job, Waiting, Work, Writer};

/// Time after which an append looks whether the disk hangs, and how often it looks again. With the second after which an
/// operation counts as hanging, an append is refused within 3 s of its beginning.
const LOOK_AFTER: Duration = Duration::from_millis(1500);
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Longest wait of an append while the disk does not hang. Sentry counts an answer that takes 5 s against all deliveries.
const WAIT_AT_MOST: Duration = Duration::from_secs(4);

/// What an entry costs while it waits, beside its bytes: so that the bound on waiting bytes also bounds empty ones.
const WAITING_OVERHEAD: usize = 512;

/// How much a journal may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all its files on disk. Marks (a byte for each entry, about two where it is published) come on top.
    pub max_bytes_on_disk: u64,
    /// Bytes of one segment, 1 GiB at most. Larger entries get a segment of their own.
    pub segment_bytes: u64,
    /// Bytes of entries that wait for the disk.
    pub max_bytes_waiting: usize,
    /// How long an entry is kept after it was received, though it is confirmed.
    pub retain: Duration,
}

impl Limits {
    /// Limits that suit a journal of that size: segments of a hundredth of it, between 1 and 64 MiB (more only where
    /// it would else take thousands of them), 256 MiB waiting, nothing retained.
    pub fn of(max_bytes_on_disk: u64) -> Limits {
        const MIB: u64 = 1 << 20;
        let segment_bytes = (max_bytes_on_disk / 128).clamp(MIB, 64 * MIB).max(max_bytes_on_disk / 1024);
        Limits { max_bytes_on_disk, segment_bytes, max_bytes_waiting: 256 << 20, retain: Duration::ZERO }.sane()
    }

    /// The least [`Limits::max_bytes_on_disk`] of a journal that takes entries of so many bytes, header block included. The
    /// segment that is written to stays until the next one is there, and each may hold such an entry.
    pub fn least_for(entry_bytes: usize) -> u64 {
        /// More than a segment holds beside the bytes of one entry.
        const BESIDE: u64 = 64 << 10;
        2 * (entry_bytes as u64 + BESIDE)
    }

    /// A journal needs several segments, or nothing in it could ever make room.
    fn sane(mut self) -> Limits {
        self.segment_bytes = self.segment_bytes.min(1 << 30).min(self.max_bytes_on_disk / 4);
        self
    }
}

/// A journal's directory as it looks from outside, also while a gateway has it open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outside {
    /// Its gateway's id, where one ever ran on it.
    pub gateway_id: Option<String>,
    /// Whether a gateway has it open now, and that one's process id if it is known.
    pub held_by: Option<Option<u32>>,
    /// Bytes that the journal's files take.
    pub bytes: u64,
    /// A gateway ever ran on it, or it holds files of a journal.
    pub is_journal: bool,
}

impl Outside {
    /// Looks at `dir`, reads no entry, changes nothing.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn look(dir: &Path) -> std::io::Result<Outside> {
        let path = |(kind, number)| match kind {
            files::Kind::Segment => Some(files::segment(dir, number)),
            files::Kind::Marks => Some(files::marks(dir, number)),
            files::Kind::Damaged => Some(files::damaged(dir, number)),
            files::Kind::Unfinished => None, // about to become marks, or left over
        };
        let (gateway_id, files) = (files::read_gateway_id(dir)?, files::list(dir)?);
        let is_journal = gateway_id.is_some() || !files.is_empty();
        let paths = files.into_iter().filter_map(path);
        let bytes = paths.filter_map(|path| Some(files::taken(&path.symlink_metadata().ok()?))).sum(); // one that has just gone takes nothing
        Ok(Outside { gateway_id, held_by: files::holder(dir)?, bytes, is_journal })
    }
}

/// What is to be appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// When the gateway received it. Kept to the millisecond.
    pub received_at: SystemTime,
    /// What the publisher needs beside the body.
    pub meta: Bytes,
    /// The body.
    pub body: Bytes,
}

/// What the handle and both threads share. The lock on the directory is held until the last of them is gone.
#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    gateway_id: String,
    receipt_key: [u8; 32],
    limits: Limits,
    table: Mutex<Table>,
    /// With `table`: a segment was made, sealed or removed.
    space: Condvar,
    in_flight: InFlight,
    /// Something waits for a publisher that did not before.
    appended: Notify,
    waiting: AtomicUsize,
    buffers: Arc<read::Buffers>,
    recent: Recent,
    opened: Instant,
    _lock: files::Lock,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        // What is in it stays true whatever panicked: it says only what the disk says.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ticks(&self, at: Instant) -> Ticks {
        Ticks::try_from(at.saturating_duration_since(self.opened).as_millis() / 100).unwrap_or(Ticks::MAX)
    }
}

/// An open journal. Cloning gives another handle on the same one. Without [`Journal::close`] the end of the last handle
/// is like a crash: everything appended stays, the next start has more to look at.
#[derive(Debug, Clone)]
pub struct Journal(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    work: Sender<Work>,
    keeper: Sender<Nudge>,
    threads: Mutex<Option<(JoinHandle<()>, JoinHandle<()>)>>,
}

impl Journal {
    /// Opens the journal in `dir`, making it where there is none. Blocks: it reads what is there.
    ///
    /// A disk on which nothing can be written is no error as long as the journal can be read: what is in it can still
    /// be published. [`Journal::trouble`] tells.
    ///
    /// # Errors
    /// [`OpenError`]; nothing was lost or changed.
    pub fn open(dir: &Path, limits: Limits) -> Result<(Journal, Recovered), OpenError> {
        files::create_dir(dir).map_err(OpenError::at(dir))?;
        access::tighten_directory(dir)?;
        let lock = files::lock(dir).map_err(|error| match error {
            files::LockError::Held(holder) => OpenError::InUse { dir: dir.to_owned(), holder },
            files::LockError::Io(error) => OpenError::at(&dir.join(files::LOCK))(error),
        })?;
        access::tighten_files(dir);
        let gateway_id = files::gateway_id(dir).map_err(OpenError::at(&dir.join(files::ID)))?;
        let receipt_key = files::receipt_key(dir).map_err(OpenError::at(&dir.join(files::RECEIPT_KEY)))?;
        let (table, recovered) = recover::recover(dir)?;
        recovered.damages.iter().for_each(recover::Damage::tell);
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            gateway_id,
            receipt_key,
            limits: limits.sane(),
            table: Mutex::new(table),
            space: Condvar::new(),
            in_flight: InFlight::default(),
            appended: Notify::new(),
            waiting: AtomicUsize::new(0),
            buffers: Arc::default(),
            recent: Recent::default(),
            opened: Instant::now(),
            _lock: lock,
        });
        let (work, works) = mpsc::channel();
        let (keeper, nudges) = mpsc::channel();
        let writer = Writer::new(Arc::clone(&shared), works, keeper.clone());
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| thread::Builder::new().name(name.into()).spawn(run);
        let for_keeper = Arc::clone(&shared);
        let keep = spawn("journal-keeper", Box::new(move || keeper::run(&for_keeper, &nudges)));
        let write = spawn("journal-writer", Box::new(move || writer.run()));
        let threads = (write.map_err(OpenError::at(dir))?, keep.map_err(OpenError::at(dir))?);
        let handle = Handle { shared, work, keeper, threads: Mutex::new(Some(threads)) };
        Ok((Journal(Arc::new(handle)), recovered))
    }

    /// The id of the gateway whose journal this is: a token of at most 64 lower-case letters and digits.
    pub fn gateway_id(&self) -> &str {
        &self.0.shared.gateway_id
    }

    /// The key of the tags that receipts must show. It never leaves this process.
    pub fn receipt_key(&self) -> &[u8; 32] {
        &self.0.shared.receipt_key
    }

    /// Makes an entry durable. It is on disk when this returns its place. If the future is dropped before, it may be
    /// on disk all the same, and will then be published. While the disk hangs this returns an error: at once, or within
    /// 3 s of the beginning where the entry was on its way before. It waits some 4 s at most for a disk that is slow.
    ///
    /// # Errors
    /// [`AppendError`]: it is not promised to anybody.
    pub async fn append(&self, entry: Entry) -> Result<Place, AppendError> {
        let Entry { received_at, meta, body } = entry;
        let bytes = meta.len() + body.len();
        if bytes > MAX_PAYLOAD {
            return Err(AppendError::TooLarge { bytes, limit: MAX_PAYLOAD });
        }
        self.stall().map_or(Ok(()), |stall| Err(AppendError::Stalled(stall)))?;
        let shared = &self.0.shared;
        let bytes = bytes + RECORD_HEADER + WAITING_OVERHEAD;
        let before = shared.waiting.fetch_add(bytes, Ordering::Relaxed);
        let waiting = Waiting { shared: Arc::clone(shared), bytes };
        let limit = shared.limits.max_bytes_waiting;
        if before + bytes > limit {
            return Err(AppendError::Busy { limit });
        }
        // Here, and not in the writer: there is one of it and many of us.
        let payload_crc = format::payload_crc(&meta, &body);
        let (answer, answered) = oneshot::channel();
        let received_ms = read::unix_ms(received_at);
        let job = Job { received_ms, meta, body, payload_crc, waiting, answer };
        self.0.work.send(Work::Append(job)).map_err(|_| AppendError::ShutDown)?;
        self.answer(answered).await
    }

    /// The writer's answer, or an error where the disk hangs or is too slow.
    async fn answer(&self, mut answered: oneshot::Receiver<Result<Place, AppendError>>) -> Result<Place, AppendError> {
        // The disk's time, not the runtime's: a clock of the runtime that is set forward says nothing of the disk.
        let (mut wait, begin) = (LOOK_AFTER, Instant::now());
        loop {
            if let Ok(answer) = tokio::time::timeout(wait, &mut answered).await {
                return answer.unwrap_or(Err(AppendError::ShutDown));
            }
            if let Some(stall) = self.stall() {
                return Err(AppendError::Stalled(stall));
            }
            if begin.elapsed() >= WAIT_AT_MOST {
                return Err(AppendError::Slow { waited: WAIT_AT_MOST });
            }
            wait = LOOK_EVERY;
        }
    }

    /// The oldest entries that are journalled, neither published nor set aside, and not taken already: at most
    /// `entries` of them and `bytes` of records, but one at least. Waits until there is one.
    ///
    /// What was taken is the caller's: it is not given out again until it is released, found lost, or tried again. If
    /// this future is dropped, nothing was taken. Entries that cannot be read are counted, reported and left out. Those
    /// that the disk did not give are read again later.
    pub async fn take(&self, entries: usize, bytes: u64) -> Vec<Stored> {
        let shared = &self.0.shared;
        loop {
            let appended = shared.appended.notified();
            tokio::pin!(appended);
            appended.as_mut().enable(); // before looking, or what comes in between would go unnoticed
            let (next, read_again) = {
                let mut table = shared.table();
                table.offer_unreadable(Instant::now());
                (table.take(entries, bytes), table.unreadable.next())
            };
            let located = match next {
                Ok(located) => located,
                Err(sleeper) => {
                    let _ = self.wake(sleeper).await; // told there; its entries do not wait any more
                    tokio::task::yield_now().await; // see below
                    continue;
                }
            };
            if located.is_empty() {
                match read_again {
                    Some(at) => drop(tokio::time::timeout_at(at.into(), appended).await),
                    None => appended.await,
                }
                continue;
            }
            let mut taken = Taken { shared, places: located.iter().map(|entry| entry.place).collect() };
            let stored = self.fetch(located).await;
            taken.places.clear();
            if !stored.is_empty() {
                return stored;
            }
            tokio::task::yield_now().await; // a runtime that goes down reads nothing more, and must get to end this
        }
    }

    /// The entries that these are, from memory or from disk, in their order. Those that cannot be read are left out.
    async fn fetch(&self, mut located: Vec<Located>) -> Vec<Stored> {
        let mut fetched = self.0.shared.recent.take(&located);
        let mut remembered = fetched.iter().map(Option::is_some);
        located.retain(|_| !remembered.next().unwrap_or_default());
        if !located.is_empty() {
            let mut read = self.read_each(located).await.into_iter();
            fetched.iter_mut().filter(|entry| entry.is_none()).for_each(|entry| *entry = read.next().flatten());
        }
        let fetched: Vec<_> = fetched.into_iter().flatten().collect();
        let mut table = self.0.shared.table();
        fetched.iter().for_each(|entry| table.forget_unreadable(entry.place));
        drop(table);
        fetched
    }

    /// Reads entries from disk, away from the threads that serve requests; nothing for one that cannot be read.
    async fn read_each(&self, located: Vec<Located>) -> Vec<Option<Stored>> {
        let handle = self.clone();
        let read = move || {
            let read = read::read_each(&located, &handle.0.shared.buffers);
            read.map(|(entry, read)| handle.reported(entry.place, read).ok()).collect()
        };
        // Cancelled only when the runtime goes down, and then nobody publishes any more.
        tokio::task::spawn_blocking(read).await.unwrap_or_default()
    }

    /// Counts and tells what is wrong with an entry, where something is.
    fn reported(&self, place: Place, read: Result<Stored, ReadError>) -> Result<Stored, ReadError> {
        match &read {
            Ok(_) | Err(ReadError::Unknown) => {}
            Err(ReadError::Damaged) => {
                let mut table = self.0.shared.table();
                table.unreadable.forget(place);
                if table.entry(place).is_some_and(|(segment, index)| segment.make_hole(index)) {
                    table.counters.damaged_records += 1;
                    drop(table);
                    tracing::error!(%place, "an entry of the journal is damaged and lost; the others are delivered");
                }
            }
            // Its bytes may be well. It stays as it is, its segment with it, and is read again.
            Err(ReadError::Disk(error)) => {
                let mut table = self.0.shared.table();
                if table.entry(place).is_none() {
                    return Err(ReadError::Unknown); // let go meanwhile, and its file with it
                }
                let again_after = table.refused(place, &error.to_string());
                drop(table);
                tracing::error!(%place, ?again_after, %error, "the disk does not give an entry of the journal; it is read \
                    again, and delivered once the disk gives it");
            }
        }
        read
    }

    /// Reads one entry, whatever its state.
    ///
    /// # Errors
    /// [`ReadError`]. A damaged entry is counted and reported once, an unreadable one each time.
    pub async fn read(&self, place: Place) -> Result<Stored, ReadError> {
        let located = self.located(place).await?;
        let handle = self.clone();
        let read = tokio::task::spawn_blocking(move || handle.reported(place, read::read(&located))).await;
        read.unwrap_or(Err(ReadError::Unknown))
    }

    /// Reads the header block of one entry, whatever its state, and not its body. Its checksum covers both, so only the
    /// record's own header is checked.
    ///
    /// # Errors
    /// [`ReadError`]; what is wrong is counted and reported when the whole entry is read.
    pub async fn read_header_block(&self, place: Place) -> Result<Bytes, ReadError> {
        let located = self.located(place).await?;
        let read = tokio::task::spawn_blocking(move || read::read_header_block(&located)).await;
        read.unwrap_or(Err(ReadError::Unknown))
    }

    /// Finds an entry's record on disk. Loads the index of its segment where memory does not hold it.
    async fn located(&self, place: Place) -> Result<Located, ReadError> {
        loop {
            let (located, asleep) = {
                let mut table = self.0.shared.table();
                (table.locate(place), table.sleeper(place))
            };
            match asleep {
                Some(sleeper) => self.wake(sleeper).await.map_err(ReadError::Disk)?,
                None => return located.ok_or(ReadError::Unknown),
            }
        }
    }

    /// Hands back an entry that was taken and of which nothing has become; it is given out again.
    pub fn release(&self, place: Place) {
        self.change(place, Segment::release);
        self.0.shared.appended.notify_waiters();
    }

    /// JetStream acknowledged the entry at `sequence`. Again, for one already published, it sets sequence and time
    /// anew. Returns whether the entry is confirmed by this, because its receipt had come before.
    ///
    /// Like all marks but [`Journal::mark_confirmed`] this is for an entry that was taken, and costs no I/O. Like all
    /// of them it may be repeated, and ignores a place that is not of this journal, or whose segment is gone.
    pub fn mark_published(&self, place: Place, sequence: u64) -> bool {
        let now = self.0.shared.ticks(Instant::now());
        let (mut confirmed, mut finished) = (false, false);
        self.change(place, |segment, index| {
            confirmed = segment.publish(index, sequence, now);
            finished = confirmed && !segment.active && segment.settled();
        });
        if finished {
            let _ = self.0.keeper.send(Nudge::Look); // gone only when the journal is closed
        }
        confirmed
    }

    /// JetStream acknowledged the entry as a duplicate of the message at `sequence`, which may be another entry's. The entry
    /// is unverified: [`Journal::unconfirmed`] names it, and the stream's answer marks it published or lost.
    pub fn mark_duplicate(&self, place: Place, sequence: u64) {
        self.change(place, |segment, index| segment.acknowledge_duplicate(index, sequence));
    }

    /// These entries are stored for good. Returns how many of them were not known to be: not those confirmed before,
    /// of another journal, or long let go.
    ///
    /// Reads from the disk only where an earlier process published the entry, and this one has not come to it yet.
    pub async fn mark_confirmed(&self, places: &[Place]) -> usize {
        let (mut news, mut asleep) = self.confirm(places);
        while let Some(&first) = asleep.first() {
            let sleeper = self.0.shared.table().sleeper(first);
            if let Some(sleeper) = sleeper
                && self.wake(sleeper).await.is_err()
            {
                asleep.retain(|place| place.segment != first.segment); // published once more after the next start
            }
            let (more, others) = self.confirm(&asleep);
            news += more;
            asleep = others;
        }
        news
    }

    /// How many of these were not known to be confirmed and are now; and those whose segment has to be woken first.
    fn confirm(&self, places: &[Place]) -> (usize, Vec<Place>) {
        let mut table = self.0.shared.table();
        let (mut news, mut asleep, mut finished) = (0, Vec::new(), false);
        for &place in places {
            let Some((segment, index)) = table.entry(place) else { continue };
            if segment.confirm(index) {
                news += 1;
                finished |= !segment.active && segment.settled();
                table.forget_unreadable(place);
            } else if segment.bits(index).waits() {
                asleep.push(place);
            }
        }
        drop(table);
        if finished {
            let _ = self.0.keeper.send(Nudge::Look); // gone only when the journal is closed
        }
        (news, asleep)
    }

    /// NATS refuses this entry, and waiting does not mend it. It stays until [`Journal::retry_set_aside`].
    pub fn mark_set_aside(&self, place: Place, refusal: Refusal) {
        self.change(place, |segment, index| segment.set_aside(index, refusal));
    }

    /// The stream does not have this published or unverified entry (any more): it is given out again by
    /// [`Journal::take`], and does not make room until it is published again.
    pub fn mark_lost(&self, place: Place) {
        self.change(place, Segment::lose);
        self.0.shared.appended.notify_waiters();
    }

    /// Lets all entries be tried again that were set aside for this reason. Returns how many.
    pub fn retry_set_aside(&self, refusal: Refusal) -> usize {
        let retried = self.0.shared.table().retry_set_aside(refusal);
        self.0.shared.appended.notify_waiters();
        retried
    }

    fn change(&self, place: Place, change: impl FnOnce(&mut Segment, usize)) {
        if let Some((segment, index)) = self.0.shared.table().entry(place) {
            change(segment, index);
        }
    }

    /// Unconfirmed entries that the stream has yet to show, or whose publish was acknowledged at least `age` ago. Gives the
    /// oldest `at_most` of those that come `after` a place. Ages are exact to a tenth of a second.
    pub fn unconfirmed(&self, age: Duration, after: Option<Place>, at_most: usize) -> Vec<Unconfirmed> {
        let shared = &self.0.shared;
        // None where nothing was published that long ago.
        let until = Instant::now().checked_sub(age).filter(|until| *until >= shared.opened);
        let (now, until) = (shared.ticks(Instant::now()), until.map(|until| shared.ticks(until)));
        let mut found = Vec::new();
        let (mut number, mut from) = after.map_or((0, 0), |place| (place.segment, place.index as usize + 1));
        // One segment at a time, so that with a million of them nobody waits for the table meanwhile.
        while found.len() < at_most {
            let table = shared.table();
            let Some(segment) = table.next_with_unconfirmed(number, until.is_some()) else { break };
            if segment.number != number {
                from = 0;
            }
            let here = segment.unconfirmed(from, until).take(at_most - found.len());
            found.extend(here.map(|(index, sequence, published_at)| Unconfirmed {
                place: segment.place(index),
                sequence,
                evidence: match published_at {
                    Some(at) => Evidence::Published(Duration::from_millis(100) * now.saturating_sub(at)),
                    None => segment.bits(index).evidence(),
                },
                bytes: segment.columns().map_or(0, |columns| columns.length(index, segment.end)),
                repeats: segment.columns().map_or(0, |columns| columns.repeats(index)),
            }));
            (number, from) = (segment.number + 1, 0);
        }
        found
    }

    /// Returns `true` when a thread of the open journal has ended. That is a fault of the program, and only a restart
    /// helps.
    pub fn is_broken(&self) -> bool {
        let threads = self.0.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.as_ref().is_some_and(|(writer, keeper)| writer.is_finished() || keeper.is_finished())
    }

    /// The entries that the disk does not give, and the system's words on that; `None` while it gives everything.
    pub fn unreadable(&self) -> Option<(u64, String)> {
        let table = self.0.shared.table();
        Some((table.unreadable.entries(), table.unreadable.error()?.to_owned()))
    }

    /// What keeps the journal from taking entries, if anything does.
    pub fn trouble(&self) -> Option<Trouble> {
        let hangs = self
            .stall()
            .map(|stall| Trouble { since: SystemTime::now() - stall.lasts, problem: AppendError::Stalled(stall) });
        hangs.or_else(|| self.0.shared.table().trouble.clone())
    }

    /// The operation that the disk does not finish, while it hangs.
    pub fn stall(&self) -> Option<Stall> {
        self.0.shared.in_flight.stall()
    }

    /// Logs when the disk begins to hang, and when it goes on. Never returns.
    pub async fn watch_disk(&self) {
        let mut since = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            match (self.stall(), since) {
                (Some(stall), None) => {
                    tracing::warn!("{stall}; deliveries are answered 503 until it has");
                    since = Some(Instant::now().checked_sub(stall.lasts).unwrap_or_else(Instant::now));
                }
                (None, Some(begin)) => {
                    let took = Instant::elapsed(&begin);
                    tracing::warn!(?took, "the journal's disk goes on; deliveries are taken again");
                    since = None;
                }
                (Some(_), Some(_)) | (None, None) => {}
            }
        }
    }

    /// A snapshot, for metrics.
    pub fn stats(&self) -> Stats {
        let shared = &self.0.shared;
        let table = shared.table();
        Stats {
            shares: snapshot::shares(table.segments.values()),
            segments: table.segments.len(),
            max_bytes_on_disk: shared.limits.max_bytes_on_disk,
            bytes_on_disk: table.on_disk(),
            bytes_waiting: shared.waiting.load(Ordering::Relaxed),
            syncs: table.counters.syncs.clone(),
            damaged_records: table.counters.damaged_records,
            unreadable_records: table.counters.unreadable_records,
            unreadable_entries: table.unreadable.entries(),
            damaged_files: table.kept.1,
            dropped_unconfirmed: table.counters.dropped_unconfirmed,
            unverified: table.segments.values().map(|segment| segment.unverified() as u64).sum(),
        }
    }

    /// Ends in good order: what was appended before is written and answered, later appends are refused, and the next
    /// start finds all states and indexes on disk. The lock is free once the last handle is dropped.
    pub async fn close(&self) {
        let handle = Arc::clone(&self.0);
        let end = move || {
            let threads = handle.threads.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some((writer, keeper)) = threads else { return }; // closed already
            // A thread that panicked has said so; what matters is on disk.
            let _ = handle.work.send(Work::Stop);
            let _ = writer.join();
            let _ = handle.keeper.send(Nudge::Stop);
            let _ = keeper.join();
        };
        let _ = tokio::task::spawn_blocking(end).await;
    }
}

/// Entries on their way to somebody who may stop waiting for them.
struct Taken<'j> {
    shared: &'j Shared,
    places: Vec<Place>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.places.is_empty() {
            return;
        }
        let mut table = self.shared.table();
        for &place in &self.places {
            if let Some((segment, index)) = table.entry(place) {
                segment.release(index);
            }
        }
        drop(table);
        self.shared.appended.notify_waiters();
    }
}
