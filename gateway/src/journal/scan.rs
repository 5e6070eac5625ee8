//! Reads a segment file that has no index: from record to record, over whatever is damaged between them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::format::{
    self, FIRST_RECORD, HeaderBlock, LARGEST_SEGMENT, Marker, RECORD_HEADER, RecordHeader, SegmentHeader, TRAILER,
    Trailer,
};

/// Read at once.
pub(super) const CHUNK: usize = 256 * 1024;
/// The unit in which a disk fails to read.
const SECTOR: u64 = 4096;

/// What a segment file holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Survey {
    /// Where each entry begins. One that is missing begins where its damage does.
    pub(super) offsets: Vec<u32>,
    /// When each was received; Unix time, seconds.
    pub(super) received: Vec<u32>,
    /// The entries that are missing.
    pub(super) holes: Vec<u32>,
    /// Bytes between records that should be records.
    pub(super) gaps: Vec<Range<u64>>,
    /// Where the last intact record ends, and the next one would begin.
    pub(super) end: u64,
    /// Bytes after `end` up to the last that is not zero.
    pub(super) tail: u64,
    /// Everything before this was synced before something after it was written: damage there is a loss, damage
    /// after it may be a batch that was never promised to anybody.
    pub(super) synced: u64,
    /// There are bytes that the disk would not give.
    pub(super) unreadable: bool,
}

impl Survey {
    /// Tells if all its records are of one batch, the first. The header went with that one. Nothing of it was promised as
    /// far as this file shows.
    pub(super) fn is_one_batch(&self) -> bool {
        self.synced <= FIRST_RECORD
    }
}

/// A file, seen through a buffer. Sectors that cannot be read are seen as zeros.
struct Window<'f> {
    file: &'f File,
    length: u64,
    start: u64,
    buffer: Vec<u8>,
    unreadable: bool,
}

impl<'f> Window<'f> {
    fn on(file: &'f File) -> io::Result<Self> {
        let length = file.metadata()?.len().min(LARGEST_SEGMENT); // what follows was not written here
        Ok(Window { file, length, start: 0, buffer: Vec::new(), unreadable: false })
    }

    /// At most `length` bytes from `at` on: fewer only at the end of the file. `length` is at most [`CHUNK`].
    fn bytes(&mut self, at: u64, length: usize) -> &[u8] {
        let end = self.length.min(at + length as u64);
        if at < self.start || end > self.start + self.buffer.len() as u64 {
            self.fill(at);
        }
        let skip = usize::try_from(at.saturating_sub(self.start)).unwrap_or(usize::MAX).min(self.buffer.len());
        let rest = &self.buffer[skip..];
        &rest[..rest.len().min(length)]
    }

    fn fill(&mut self, at: u64) {
        let left = usize::try_from(self.length.saturating_sub(at)).unwrap_or(usize::MAX);
        self.start = at;
        self.buffer.clear();
        self.buffer.resize(left.min(CHUNK), 0);
        if self.file.read_exact_at(&mut self.buffer, at).is_ok() {
            return;
        }
        let mut rest = &mut self.buffer[..];
        let mut from = at;
        while !rest.is_empty() {
            let to_next = usize::try_from(SECTOR - from % SECTOR).expect("a sector is small").min(rest.len());
            let (sector, others) = rest.split_at_mut(to_next);
            if self.file.read_exact_at(sector, from).is_err() {
                sector.fill(0);
                self.unreadable = true;
            }
            from += to_next as u64;
            rest = others;
        }
    }

    fn record_at(&mut self, marker: Marker, at: u64) -> Option<RecordHeader> {
        RecordHeader::decode(self.bytes(at, RECORD_HEADER), marker, at)
    }

    fn payload_intact(&mut self, header: &RecordHeader, at: u64) -> bool {
        let end = at + header.length();
        let mut crc = 0;
        let mut at = at + RECORD_HEADER as u64;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX).min(CHUNK);
            let bytes = self.bytes(at, left);
            if bytes.is_empty() {
                return false; // the file ends before the record does
            }
            crc = crc32c::crc32c_append(crc, bytes);
            at += bytes.len() as u64;
        }
        crc == header.payload_crc
    }

    /// The next record from `from` on, wherever it begins.
    fn next_record(&mut self, marker: Marker, from: u64) -> Option<(u64, RecordHeader)> {
        let mut at = from;
        loop {
            let bytes = self.bytes(at, CHUNK);
            let found = match is_zero(bytes) {
                true => None,
                false => bytes.windows(marker.0.len()).position(|window| window == marker.0),
            };
            let Some(found) = found else {
                let seen = bytes.len() as u64;
                if at + seen >= self.length {
                    return None;
                }
                at += seen - (marker.0.len() as u64 - 1); // a marker may lie across two chunks
                continue;
            };
            at += found as u64;
            if let Some(header) = self.record_at(marker, at) {
                return Some((at, header));
            }
            at += 1;
        }
    }

    /// How many bytes after `end` until only zeros follow.
    fn tail(&mut self, end: u64) -> u64 {
        let mut last = end;
        let mut at = end;
        while at < self.length {
            let bytes = self.bytes(at, CHUNK);
            if !is_zero(bytes)
                && let Some(index) = bytes.iter().rposition(|&byte| byte != 0)
            {
                last = at + index as u64 + 1;
            }
            at += bytes.len() as u64;
        }
        last - end
    }
}

/// Whether a chunk holds nothing but zeros. Most of a segment that was not sealed is such, and comparing memory is by far
/// the quickest look at it.
fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; CHUNK] = [0; CHUNK];
    ZEROS.get(..bytes.len()).is_some_and(|zeros| zeros == bytes)
}

/// Finds every intact record. `payloads` says whether header blocks and bodies are checked, too, or only the records'
/// headers: enough to know what is there, and far quicker.
///
/// # Errors
/// Only when the file's length cannot be learnt. What cannot be read is damage, and part of the answer.
pub(super) fn survey(file: &File, marker: Marker, payloads: bool) -> io::Result<Survey> {
    let mut window = Window::on(file)?;
    let mut survey = Survey { end: FIRST_RECORD, synced: FIRST_RECORD, ..Survey::default() };
    // The first byte not yet known to belong to a record.
    let mut at = FIRST_RECORD;
    while let Some((start, header)) = record_from(&mut window, marker, at) {
        at = header.end(start);
        // Those that are missing before it lay in the gap.
        let missing = (header.index as usize).checked_sub(survey.offsets.len());
        let room = start.saturating_sub(survey.end) / RECORD_HEADER as u64;
        if missing.is_none_or(|missing| missing as u64 > room) || u32::try_from(start).is_err() {
            at = start + 1; // nothing writes this; let it neither stand for an entry that is known nor make up others
            continue;
        }
        survey.synced = survey.synced.max(u64::from(header.synced));
        // The zeros that fill the last block are no loss.
        let is_whole = start + header.length() <= window.length;
        if !is_whole || payloads && !window.payload_intact(&header, start) {
            // Its header is authentic, so the next record is where it says, unless the file ends first. If nothing
            // intact follows, this is the tail.
            continue;
        }
        let gap = survey.end..start;
        while survey.offsets.len() < header.index as usize {
            survey.holes.push(u32::try_from(survey.offsets.len()).expect("below a 32-bit index"));
            survey.offsets.push(offset(gap.start));
            survey.received.push(survey.received.last().copied().unwrap_or(seconds(header.received_ms)));
        }
        if !gap.is_empty() {
            survey.gaps.push(gap);
        }
        survey.offsets.push(offset(start));
        survey.received.push(seconds(header.received_ms));
        survey.end = at;
    }
    survey.tail = window.tail(survey.end);
    survey.unreadable = window.unreadable;
    Ok(survey)
}

/// The record at `at`, or else the next one after it.
fn record_from(window: &mut Window<'_>, marker: Marker, at: u64) -> Option<(u64, RecordHeader)> {
    match window.record_at(marker, at) {
        Some(header) => Some((at, header)),
        None => window.next_record(marker, at),
    }
}

/// What the first block says, and the marker, from wherever it is still to be had: the header, the first record, or the
/// trailer.
pub(super) fn identify(file: &File) -> io::Result<(HeaderBlock, Option<Marker>)> {
    let mut window = Window::on(file)?;
    let block = SegmentHeader::decode(window.bytes(0, format::SEGMENT_HEADER));
    if let HeaderBlock::Valid(header) = block {
        return Ok((block, Some(header.marker)));
    }
    let first: Option<[u8; 8]> = window.bytes(FIRST_RECORD, 8).try_into().ok();
    let first = first.filter(|&bytes| bytes != [0; 8]).map(Marker);
    if let Some(marker) = first.filter(|&marker| window.record_at(marker, FIRST_RECORD).is_some()) {
        return Ok((block, Some(marker)));
    }
    Ok((block, read_index(file).map(|(trailer, ..)| trailer.marker)))
}

/// Trailer, offsets and times of arrival of a sealed segment. `None` where any of it is missing or damaged.
pub(super) fn read_index(file: &File) -> Option<(Trailer, Vec<u32>, Vec<u32>)> {
    let length = file.metadata().ok()?.len();
    let mut bytes = [0; TRAILER];
    file.read_exact_at(&mut bytes, length.checked_sub(TRAILER as u64)?).ok()?;
    let trailer = Trailer::decode(&bytes)?;
    // Compared before anything is read or reserved: a damaged count must not ask for gigabytes.
    if trailer.end < FIRST_RECORD || trailer.end.checked_add(trailer.index_length()) != Some(length) {
        return None;
    }
    let mut index = vec![0; usize::try_from(trailer.index_length()).ok()?];
    file.read_exact_at(&mut index, trailer.end).ok()?;
    let (offsets, received) = trailer.decode_index(&index)?;
    Some((trailer, offsets, received))
}

/// Tells if a file holds only zeros. Returns `false` when it cannot be read, or is longer than any segment: reading a
/// terabyte of zeros would take hours.
pub(super) fn is_blank(file: &File) -> io::Result<bool> {
    if file.metadata()?.len() > LARGEST_SEGMENT {
        return Ok(false);
    }
    let mut window = Window::on(file)?;
    Ok(window.tail(0) == 0 && !window.unreadable)
}

fn offset(position: u64) -> u32 {
    u32::try_from(position).expect("no record begins beyond the size of a segment, which is at most 1 GiB")
}

pub(super) fn seconds(unix_ms: u64) -> u32 {
    u32::try_from(unix_ms / 1000).unwrap_or(u32::MAX)
}
