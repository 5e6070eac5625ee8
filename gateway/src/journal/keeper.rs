//! The second thread: everything that takes a while and that no delivery waits for. Makes the next segment before the
//! writer needs it, seals the one before, writes marks, lets finished segments go.

use std::fs::OpenOptions;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use super::segment::Segment;
use super::state::State;
use super::table::Spare;
use super::{Limits, Shared, access, files, format, read, recover, scan};

/// How old the marks on disk may be.
const MARKS_EVERY: Duration = Duration::from_secs(1);
/// A segment is smaller than wished for where space is short, but not smaller than this part of it.
const SMALLEST_PART: u64 = 8;

/// Why the thread is woken.
pub(super) enum Nudge {
    /// A segment may be finished, or a spare wanted.
    Look,
    /// Seal this segment, which gets no more records: the header of the next one, which says how long this one is, is
    /// synced. With `sync` it need not be.
    Seal { number: u64, sync: bool },
    /// Write what is not yet written, then end.
    Stop,
}

/// Runs until it is told to stop, or until nobody is left who could tell it.
pub(super) fn run(shared: &Shared, nudges: &Receiver<Nudge>) {
    let mut marks_due = Instant::now() + MARKS_EVERY;
    loop {
        let stop = match nudges.recv_timeout(marks_due.saturating_duration_since(Instant::now())) {
            Ok(Nudge::Look) => false,
            Ok(Nudge::Seal { number, sync }) => {
                seal(shared, number, sync);
                shared.table().end_seal();
                shared.space.notify_all();
                false
            }
            Ok(Nudge::Stop) => true,
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if !stop {
            make_spare(shared);
        }
        let_finished_go(shared);
        if stop || Instant::now() >= marks_due {
            write_marks(shared);
            count_kept(shared);
            marks_due = Instant::now() + MARKS_EVERY;
        }
        if stop {
            let spare = shared.table().spare.take();
            let _ = spare.map(|spare| files::remove(&spare.path)); // blank: the next start removes it, too
            return;
        }
    }
}

/// A number and bytes on disk for a file that is yet to be made.
pub(super) struct Blank {
    number: u64,
    capacity: u64,
}

/// Sets `wanted` bytes of the journal's limit aside, or what there is of them, if that is not less than `smallest`.
pub(super) fn reserve(shared: &Shared, wanted: u64, smallest: u64) -> Option<Blank> {
    let mut table = shared.table();
    let capacity = wanted.min(shared.limits.max_bytes_on_disk.saturating_sub(table.on_disk()));
    if capacity < smallest {
        return None;
    }
    let number = table.next_number;
    table.next_number += 1;
    table.reserved += capacity;
    Some(Blank { number, capacity })
}

/// Makes the file.
pub(super) fn create(shared: &Shared, blank: Blank) -> std::io::Result<Spare> {
    let Blank { number, capacity } = blank;
    let file = files::create_segment(&shared.dir, number, capacity);
    shared.table().reserved -= capacity;
    Ok(Spare { number, file: Arc::new(file?), path: files::segment(&shared.dir, number), capacity })
}

/// The smallest segment worth making for a record that needs `needed` bytes: space may be short.
pub(super) fn smallest(limits: &Limits, needed: u64) -> u64 {
    needed.max(limits.segment_bytes / SMALLEST_PART)
}

/// Whether a segment with `needed` bytes could be made, if need be by letting others go.
pub(super) fn has_room(shared: &Shared, needed: u64) -> bool {
    let table = shared.table();
    let stays = table.on_disk() - table.expendable_bytes();
    stays + smallest(&shared.limits, needed) <= shared.limits.max_bytes_on_disk
}

/// Ends the segment's file with its index. Failing costs only time at the next start.
fn seal(shared: &Shared, number: u64, sync: bool) {
    let table = shared.table();
    let segment = table.segments.get(&number); // none where it is already let go
    let Some((segment, columns)) = segment.and_then(|segment| Some((segment, segment.columns()?))) else { return };
    let (path, marker, end) = (Arc::clone(&segment.path), segment.marker, segment.end);
    let (offsets, received) = (columns.offsets.clone(), columns.received.clone());
    drop(table);
    let index = format::encode_index(marker, end, &offsets, &received);
    let sealed = access::open(OpenOptions::new().read(true).write(true), &path)
        .and_then(|file| recover::seal(&file, marker, end, &index, sync));
    match sealed {
        Ok(length) => {
            if let Some(segment) = shared.table().segments.get_mut(&number) {
                (segment.on_disk, segment.sealed) = (length, true);
                segment.sleep();
            }
        }
        Err(error) => tracing::debug!(%error, "no index written; the next start reads the records again"),
    }
}

/// Lets one segment go that others can do without, if that leads to `needed` bytes of room. False if it does not.
pub(super) fn make_room(shared: &Shared, needed: u64) -> bool {
    if !has_room(shared, needed) {
        return false;
    }
    let mut table = shared.table();
    let Some(segment) = table.expendable().and_then(|number| table.segments.remove(&number)) else { return false };
    let unconfirmed = segment.tally(State::Published).entries;
    table.counters.dropped_unconfirmed += unconfirmed;
    table.begin_removal(&segment);
    drop(table);
    if unconfirmed > 0 {
        tracing::warn!(
            segment = segment.number,
            unconfirmed,
            "the journal is full: it lets go of deliveries that are in the stream but not yet known to be stored"
        );
    }
    remove(shared, &segment);
    true
}

fn let_finished_go(shared: &Shared) {
    let retained_since = SystemTime::now().checked_sub(shared.limits.retain).unwrap_or(SystemTime::UNIX_EPOCH);
    // Confirmed within the second in which it was received, it still goes now.
    let kept_since = scan::seconds(read::unix_ms(retained_since)).saturating_add(1);
    let finished = shared.table().finished(if shared.limits.retain.is_zero() { u32::MAX } else { kept_since });
    for number in finished {
        let mut table = shared.table();
        let Some(segment) = table.segments.remove(&number) else { continue };
        table.begin_removal(&segment);
        drop(table);
        remove(shared, &segment);
    }
    shared.table().let_settled_sleep();
}

/// Removes the file of a segment that is no longer in the table, or keeps it for people if it is damaged. Its bytes
/// stay reserved until it is gone.
///
/// No sync: should the name come back after a power cut, its entries are published once more, which changes nothing.
pub(super) fn remove(shared: &Shared, segment: &Segment) {
    let path = files::segment(&shared.dir, segment.number);
    let removed = if segment.damaged {
        std::fs::rename(&path, files::damaged(&shared.dir, segment.number))
    } else {
        files::remove(&path)
    };
    let removed = removed.and_then(|()| files::remove(&files::marks(&shared.dir, segment.number)));
    let mut table = shared.table();
    table.end_removal(segment);
    if segment.damaged {
        table.kept.0 += segment.on_disk;
        table.kept.1 += 1;
    }
    drop(table);
    shared.space.notify_all();
    if let Err(error) = removed {
        tracing::warn!(file = %path.display(), %error, "a finished segment stays until the next start");
    }
}

/// Makes the next segment early, so that no delivery waits for it. Nothing is let go for it.
fn make_spare(shared: &Shared) {
    {
        let mut table = shared.table();
        if !std::mem::take(&mut table.spare_wanted) {
            return;
        }
        table.making_spare = true; // before its bytes are reserved: the writer waits for them
    }
    let size = shared.limits.segment_bytes;
    // An error is no trouble yet: the writer meets it again if it is one.
    let spare = reserve(shared, size, size).and_then(|blank| create(shared, blank).ok());
    shared.table().end_spare(spare);
    shared.space.notify_all();
}

/// Writes the states of every segment in which one changed. Hints for the next start and for `gateway journal status`:
/// not synced, and an error is no more than a repeat of some entries.
pub(super) fn write_marks(shared: &Shared) {
    let changed: Vec<u64> = {
        let table = shared.table();
        table.segments.values().filter(|segment| segment.marks_changed).map(|segment| segment.number).collect()
    };
    for number in changed {
        let mut table = shared.table();
        let Some(segment) = table.segments.get_mut(&number) else { continue };
        segment.marks_changed = false;
        let (check, marks) = (segment.check, segment.marks());
        drop(table);
        let bytes = format::encode_marks(check, &marks);
        let path = files::marks(&shared.dir, number);
        if let Err(error) = files::write_whole(&shared.dir, &path, &bytes, false) {
            tracing::debug!(file = %path.display(), %error, "marks not written, will try again");
            if let Some(segment) = shared.table().segments.get_mut(&number) {
                segment.marks_changed = true;
            }
        }
    }
}

/// People remove damaged files when they are done with them.
fn count_kept(shared: &Shared) {
    if shared.table().kept.1 == 0 {
        return;
    }
    if let Ok(kept) = recover::kept(&shared.dir) {
        shared.table().kept = kept;
    }
}
