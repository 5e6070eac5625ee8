//! The one thread that writes. Whoever waits for the disk at the same time shares one fdatasync: while one batch is
//! synced, the next one gathers in the queue.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::direct::{Blocks, Output, SegmentFile};
use super::files;
use super::format::{
    BLOCK, FIRST_RECORD, INDEX_ENTRY, Marker, Previous, RECORD_HEADER, RecordHeader, SegmentHeader, TRAILER,
};
use super::keeper::{self, Nudge};
use super::recent::Remembered;
use super::scan;
use super::segment::{Appended, Segment};
use super::stall::{InFlight, Operation};
use super::stats::{AppendError, Trouble};
use super::table::{Spare, Table};
use super::{Place, Shared};

/// No batch is larger, so that the first to wait in it does not wait for megabytes of others.
const BATCH_BYTES: u64 = 8 << 20;
/// Bytes that are put together for one write. Larger ones are not faster by much, and this much memory stays.
const WRITE_BYTES: usize = 1 << 20;
/// Pauses between attempts while the disk fails. The first attempt comes at once: the fault may be the segment's, and
/// each delivery refused is lost to its sender. For the same reason the longest is short.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Time that the writer waits for space that the keeper is about to give, before it makes a segment itself, lets one go or
/// refuses. A longer wait counts as a disk that hangs.
const WAIT_FOR_SPACE: Duration = Duration::from_secs(1);

/// What the thread is asked to do.
pub(super) enum Work {
    Append(Job),
    /// Everything asked before is still done, nothing asked after.
    Stop,
}

/// One entry to be made durable, and whom to tell.
pub(super) struct Job {
    pub(super) received_ms: u64,
    pub(super) meta: Bytes,
    pub(super) body: Bytes,
    pub(super) payload_crc: u32,
    pub(super) waiting: Waiting,
    pub(super) answer: oneshot::Sender<Result<Place, AppendError>>,
}

impl Job {
    /// Bytes of its record.
    fn length(&self) -> u64 {
        (RECORD_HEADER + self.meta.len() + self.body.len()) as u64
    }

    /// Bytes that it needs in a segment: its record's, and its part of the index that comes at the end. So a segment
    /// can be sealed in the space that it has, on a full disk, too.
    fn room(&self) -> u64 {
        self.length() + INDEX_ENTRY as u64
    }
}

/// Bytes that wait for the disk; they count until this is dropped.
pub(super) struct Waiting {
    pub(super) shared: Arc<Shared>,
    pub(super) bytes: usize,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.shared.waiting.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The segment that is written to.
struct Active {
    number: u64,
    marker: Marker,
    file: Arc<SegmentFile>,
    capacity: u64,
    /// Up to here everything is synced.
    end: u64,
    entries: u32,
    /// Its header, until that is on disk. It goes with the first batch, so a new segment costs no sync of its own.
    header: Option<SegmentHeader>,
    asked_for_spare: bool,
}

impl Active {
    /// Room for more records and their part of the index, whatever zeros it takes to fill the last block.
    fn room(&self) -> u64 {
        let index = u64::from(self.entries) * INDEX_ENTRY as u64 + TRAILER as u64;
        self.capacity.saturating_sub(self.end + (BLOCK - 1) + index)
    }

    /// Writes a batch behind what is there. Gives its records and where they end; nothing is synced yet.
    fn write(&self, jobs: &[Job], blocks: &mut Blocks, in_flight: &InFlight) -> io::Result<(Vec<Appended>, u64)> {
        let begin = if self.header.is_some() { 0 } else { self.end };
        let mut output = Output::new(&self.file, begin, blocks, in_flight);
        if let Some(header) = self.header {
            output.put(&header.encode())?;
            output.fill_block();
        }
        let mut appended = Vec::with_capacity(jobs.len());
        let mut end = self.end;
        let position = |end| u32::try_from(end).expect("a record begins before its segment's end, at most 1 GiB");
        for (index, (nth, job)) in (self.entries..).zip(jobs.iter().enumerate()) {
            let length = |bytes: &Bytes| u32::try_from(bytes.len()).expect("append refuses more than MAX_PAYLOAD");
            let record = RecordHeader {
                payload_crc: job.payload_crc,
                index,
                meta_length: length(&job.meta),
                body_length: length(&job.body),
                synced: position(self.end),
                received_ms: job.received_ms,
                last: nth + 1 == jobs.len(),
            };
            for part in [&record.encode(self.marker, end)[..], &job.meta, &job.body] {
                output.put(part)?;
            }
            appended.push(Appended { offset: position(end), received: scan::seconds(job.received_ms) });
            end = record.end(end);
        }
        output.finish()?;
        Ok((appended, end))
    }
}

/// When to try again, after something went wrong.
struct Retry {
    at: Instant,
    pause: Duration,
    problem: AppendError,
    /// The segment that was being written to then. A later one that works ends the trouble.
    went_wrong_in: u64,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    work: Receiver<Work>,
    keeper: Sender<Nudge>,
    batch: VecDeque<Job>,
    blocks: Blocks,
    stopping: bool,
    active: Option<Active>,
    retry: Option<Retry>,
    /// The newest segment that holds something, before the active one.
    previous: Previous,
    /// The newest segment that was ever active.
    newest: u64,
    /// A full segment that has no index yet. It gets one after the next segment's first sync: only then does that
    /// segment's header say on disk how much was in this one.
    unsealed: Option<u64>,
}

impl Writer {
    /// Makes the first segment, so that a disk that is full or broken is known before the first request. That is no
    /// error here: what is in the journal can still be published.
    pub(super) fn new(shared: Arc<Shared>, work: Receiver<Work>, keeper: Sender<Nudge>) -> Writer {
        let previous = shared.table().segments.values().next_back().map(Segment::as_previous).unwrap_or_default();
        let mut writer = Writer {
            shared,
            work,
            keeper,
            batch: VecDeque::new(),
            blocks: Blocks::new(WRITE_BYTES),
            stopping: false,
            active: None,
            retry: None,
            previous,
            newest: previous.number,
            unsealed: None,
        };
        if let Err(problem) = writer.next_segment(0) {
            writer.trouble(problem);
        }
        writer
    }

    pub(super) fn run(mut self) {
        while self.gather() {
            self.write();
        }
        if self.stopping {
            self.finish();
        }
    }

    /// Waits for work and takes all there is, up to a batch. False when there will be none any more.
    fn gather(&mut self) -> bool {
        let first = loop {
            if self.stopping {
                return false;
            }
            let Some(retry) = &self.retry else { break self.work.recv().ok() };
            // With the gateway not ready nobody may come by to find out that the disk is well again.
            match self.work.recv_timeout(retry.at.saturating_duration_since(Instant::now())) {
                Ok(work) => break Some(work),
                Err(RecvTimeoutError::Timeout) => self.probe(),
                Err(RecvTimeoutError::Disconnected) => break None,
            }
        };
        let Some(first) = first else { return false };
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(work) = next {
            match work {
                Work::Append(job) => {
                    bytes += job.length();
                    self.batch.push_back(job);
                }
                Work::Stop => {
                    self.stopping = true;
                    break;
                }
            }
            next = if bytes < BATCH_BYTES { self.work.try_recv().ok() } else { None };
        }
        true
    }

    /// Writes what was gathered and answers everybody.
    fn write(&mut self) {
        // An entry is written even if nobody waits for it any more: Sentry does not send it again, and nothing is wrong
        // with storing it.
        while let Some(job) = self.batch.front() {
            if let Err(problem) = self.room_for(job.room()) {
                // A full journal may still have room for a smaller one; a disk that fails has it for nobody.
                let refused = if matches!(problem, AppendError::Full { .. }) { 1 } else { self.batch.len() };
                refuse(self.batch.drain(..refused), &problem);
                continue;
            }
            let jobs = self.next_that_fit();
            match self.write_and_sync(&jobs) {
                Ok(places) => answer(jobs, places),
                Err(error) => {
                    let problem = AppendError::of_disk(error);
                    self.abandon();
                    self.trouble(problem.clone());
                    refuse(jobs, &problem);
                }
            }
        }
    }

    /// Makes sure that the active segment has that much room.
    fn room_for(&mut self, room: u64) -> Result<(), AppendError> {
        if self.active.as_ref().is_some_and(|active| active.room() >= room) {
            return Ok(());
        }
        let too_early =
            |retry: &&Retry| Instant::now() < retry.at && !matches!(retry.problem, AppendError::Full { .. });
        if let Some(retry) = self.retry.as_ref().filter(too_early) {
            return Err(retry.problem.clone());
        }
        self.next_segment(room).inspect_err(|problem| self.trouble(problem.clone()))
    }

    /// The jobs at the front that go into the active segment together; the first is known to fit.
    fn next_that_fit(&mut self) -> Vec<Job> {
        let mut room = self.active.as_ref().map_or(0, Active::room);
        let fits = |job: &&Job| match room.checked_sub(job.room()) {
            Some(left) => {
                room = left;
                true
            }
            None => false,
        };
        let count = self.batch.iter().take_while(fits).count();
        self.batch.drain(..count).collect()
    }

    /// A batch: a write or few, one fdatasync. After an error nothing is known of what is on disk beyond what was synced before.
    fn write_and_sync(&mut self, jobs: &[Job]) -> io::Result<Vec<Place>> {
        let active = self.active.as_mut().expect("room_for made one");
        let (appended, end) = active.write(jobs, &mut self.blocks, &self.shared.in_flight)?;
        let began = Instant::now();
        let syncing = self.shared.in_flight.begin(Operation::Sync);
        active.file.sync()?;
        drop(syncing);
        let took = began.elapsed();

        let first = active.entries;
        active.header = None;
        active.end = end;
        active.entries += u32::try_from(jobs.len()).expect("a batch is far smaller than 2^32 records");
        let wants_spare = !active.asked_for_spare && end > active.capacity / 2;
        active.asked_for_spare |= wants_spare;
        let (number, check) = (active.number, active.marker.check());
        let places: Vec<_> = (first..active.entries).map(|index| Place { segment: number, index, check }).collect();
        let remembered = places.iter().zip(jobs).map(|(&place, job)| {
            let (meta, body) = (job.meta.clone(), job.body.clone());
            Remembered { place, received_ms: job.received_ms, meta, body }
        });
        self.shared.recent.remember(remembered);
        let mut table = self.shared.table();
        table.counters.syncs.record(took);
        let segment = table.segments.get_mut(&number).expect("the active segment is never let go");
        segment.extend(&appended, end);
        table.spare_wanted |= wants_spare && table.spare.is_none();
        drop(table);
        self.shared.appended.notify_waiters();
        if wants_spare {
            let _ = self.keeper.send(Nudge::Look); // it only ends after this thread
        }
        self.mended(number);
        if let Some(number) = self.unsealed.take() {
            self.seal(number, false);
        }
        Ok(places)
    }

    /// A new segment becomes the active one. Costs no sync if a spare is ready.
    fn next_segment(&mut self, room: u64) -> Result<(), AppendError> {
        let spare = self.spare(FIRST_RECORD + room + (BLOCK - 1) + TRAILER as u64)?;
        let marker = Marker::random().map_err(|error| AppendError::of_disk(error.into()))?;
        let mut segment = Segment::new(spare.number, marker, spare.path.as_path().into(), spare.capacity, FIRST_RECORD);
        segment.active = true;
        let mut table = self.shared.table();
        if let Some(old) = self.active.take() {
            let segment = table.segments.get_mut(&old.number).expect("the active segment is never let go");
            segment.close(old.capacity);
            if segment.entries() > 0 {
                self.previous = segment.as_previous();
                self.unsealed = Some(old.number);
            }
        }
        table.segments.insert(spare.number, segment);
        drop(table);
        let Spare { number, file, capacity, .. } = spare;
        let header = Some(SegmentHeader { marker, number, previous: self.previous, capacity });
        self.newest = number;
        let asked_for_spare = false;
        self.active =
            Some(Active { number, marker, file, capacity, end: FIRST_RECORD, entries: 0, header, asked_for_spare });
        let _ = self.keeper.send(Nudge::Look); // the old one may have nothing left to wait for
        Ok(())
    }

    /// A blank file with room for `needed` bytes: the one that lies ready, or a new one for which others may have to
    /// go.
    fn spare(&self, needed: u64) -> Result<Spare, AppendError> {
        let _making = self.shared.in_flight.begin(Operation::NewSegment);
        let until = Instant::now() + WAIT_FOR_SPACE;
        let limits = &self.shared.limits;
        let smallest = keeper::smallest(limits, needed);
        let mut wanted = limits.segment_bytes.max(needed);
        loop {
            if let Some(spare) = self.ready_spare(needed) {
                return Ok(spare);
            }
            if self.wait_for_keeper(until, |table| table.making_spare) {
                continue;
            }
            let Some(blank) = keeper::reserve(&self.shared, wanted, smallest) else {
                if self.make_room(until, smallest) {
                    continue;
                }
                return Err(AppendError::Full { limit: limits.max_bytes_on_disk });
            };
            let problem = match keeper::create(&self.shared, blank) {
                Ok(spare) => return Ok(spare),
                Err(error) => AppendError::of_disk(error),
            };
            if !matches!(problem, AppendError::DiskFull(_)) {
                return Err(problem);
            }
            // The disk is smaller than the journal's limit says. What may go at the limit may go now, and a smaller
            // segment is better than none.
            if !self.make_room(until, smallest) {
                if wanted / 2 < smallest {
                    return Err(problem);
                }
                wanted /= 2;
            }
        }
    }

    /// The file that lies ready, if it is of use.
    fn ready_spare(&self, needed: u64) -> Option<Spare> {
        let spare = self.shared.table().spare.take()?;
        // Numbers tell the age, so one that was overtaken is of no use.
        if spare.capacity >= needed && spare.number > self.newest {
            return Some(spare);
        }
        let _ = files::remove(&spare.path);
        None
    }

    /// Waits for space that the keeper is about to give, else lets a segment go. Returns `false` when there is none to be
    /// had.
    fn make_room(&self, until: Instant, needed: u64) -> bool {
        self.wait_for_keeper(until, Table::gets_room) || keeper::make_room(&self.shared, needed)
    }

    /// Waits until the keeper has made, sealed or removed a segment, if it is about to. Returns `false` when it is not, or not in
    /// time.
    fn wait_for_keeper(&self, until: Instant, is_about_to: impl Fn(&Table) -> bool) -> bool {
        let table = self.shared.table();
        if !is_about_to(&table) {
            return false;
        }
        let (given, left) = (table.space_given, until.saturating_duration_since(Instant::now()));
        let waited = self.shared.space.wait_timeout_while(table, left, |table| table.space_given == given);
        let (table, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(table);
        !waited.timed_out()
    }

    /// Never writes to or syncs this segment again: after a failed fdatasync the kernel may have dropped the pages and
    /// call the next one a success. What was synced before stays and is delivered.
    fn abandon(&mut self) {
        let Some(active) = self.active.take() else { return };
        let mut table = self.shared.table();
        let segment = table.segments.get_mut(&active.number).expect("the active segment is never let go");
        segment.close(active.capacity);
        if segment.entries() > 0 {
            self.previous = segment.as_previous();
        } else {
            table.segments.remove(&active.number);
            drop(table);
            let _removing = self.shared.in_flight.begin(Operation::NewSegment);
            let _ = files::remove(&files::segment(&self.shared.dir, active.number));
        }
    }

    fn trouble(&mut self, problem: AppendError) {
        let pause = match &self.retry {
            _ if matches!(problem, AppendError::Full { .. }) => FIRST_PAUSE,
            None => Duration::ZERO,
            Some(retry) => (retry.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE),
        };
        let mut table = self.shared.table();
        let before = table.trouble.as_ref().map(|trouble| trouble.since);
        table.trouble = Some(Trouble { since: before.unwrap_or_else(SystemTime::now), problem: problem.clone() });
        drop(table); // a log may be slow
        if before.is_none() {
            tracing::error!(error = %problem, "the journal takes no deliveries; it goes on trying");
        }
        self.retry = Some(Retry { at: Instant::now() + pause, pause, problem, went_wrong_in: self.newest });
    }

    /// Segment `number` works. If it was begun after the trouble, the trouble is over.
    fn mended(&mut self, number: u64) {
        if self.retry.as_ref().is_some_and(|retry| number > retry.went_wrong_in) {
            self.well_again();
        }
    }

    fn well_again(&mut self) {
        self.retry = None;
        self.shared.table().trouble = None;
        tracing::info!("the journal takes deliveries again");
    }

    /// Looks, while nobody asks, whether the trouble is over.
    fn probe(&mut self) {
        let Some(retry) = &self.retry else { return };
        if matches!(retry.problem, AppendError::Full { .. }) {
            if keeper::has_room(&self.shared, 0) {
                self.well_again();
            } else if let Some(retry) = &mut self.retry {
                retry.at = Instant::now() + retry.pause;
            }
            return;
        }
        let written = self.next_segment(0).and_then(|()| self.write_and_sync(&[]).map_err(AppendError::of_disk));
        if let Err(problem) = written {
            self.abandon();
            self.trouble(problem);
        }
    }

    /// An orderly end: the next start has nothing to find out. No synced header says how long these segments are, so they
    /// are synced themselves.
    fn finish(&mut self) {
        let unsealed = self.unsealed.take();
        let newest = self.active.as_ref().filter(|active| active.entries > 0).map(|active| active.number);
        self.abandon();
        for number in unsealed.into_iter().chain(newest) {
            self.seal(number, true);
        }
    }

    /// Has the keeper seal a segment.
    fn seal(&self, number: u64, sync: bool) {
        self.shared.table().being_sealed += 1;
        let _ = self.keeper.send(Nudge::Seal { number, sync }); // it only ends after this thread
    }
}

impl Drop for Writer {
    /// Without its writer, however it ended, the journal takes nothing, and readiness must say so.
    fn drop(&mut self) {
        let trouble = Trouble { since: SystemTime::now(), problem: AppendError::ShutDown };
        self.shared.table().trouble = Some(trouble);
    }
}

fn answer(jobs: Vec<Job>, places: Vec<Place>) {
    for (job, place) in jobs.into_iter().zip(places) {
        drop(job.waiting);
        let _ = job.answer.send(Ok(place)); // the client may be gone
    }
}

fn refuse(jobs: impl IntoIterator<Item = Job>, problem: &AppendError) {
    for job in jobs {
        drop(job.waiting);
        let _ = job.answer.send(Err(problem.clone()));
    }
}
