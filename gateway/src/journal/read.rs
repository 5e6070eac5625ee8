//! Fetches one entry from disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};

use super::format::{self, Marker, RECORD_HEADER, RecordHeader};
use super::place::Place;
use super::table::Located;

/// An entry as it was appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Where it is.
    pub place: Place,
    /// When the gateway received it, to the millisecond.
    pub received_at: SystemTime,
    /// The header block that was given to `append`.
    pub meta: Bytes,
    /// The body that was given to `append`.
    pub body: Bytes,
    /// How often this entry was published and then found missing from the stream, since the journal was opened (255
    /// stands for more).
    pub repeats: u8,
}

/// Why an entry could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is not there (any more): confirmed and let go, or the place was never one of this journal.
    #[error("the journal has no entry at this place")]
    Unknown,
    /// Its bytes are not those that were written. They are lost; this was counted and logged.
    #[error("the record is damaged")]
    Damaged,
    /// The disk would not give it. It stays where it is until a start at which it can be read; this was counted and
    /// logged.
    #[error("the record cannot be read: {0}")]
    Disk(#[source] io::Error),
}

/// Reads and checks the record. Blocks.
pub(super) fn read(entry: &Located) -> Result<Stored, ReadError> {
    let stored = read_record(&entry.file, entry.marker, entry.offset, entry.length)?;
    let (header, meta, body) = stored;
    // Its place says which entry it is; a record of another one there would be confirmed in its stead.
    if header.index != entry.place.index {
        return Err(ReadError::Damaged);
    }
    let received_at = unix_time(header.received_ms);
    Ok(Stored { place: entry.place, received_at, meta, body, repeats: entry.repeats })
}

/// The intact record at `offset`, of exactly `length` bytes: its header, header block and body. One read, no copy.
pub(super) fn read_record(
    file: &File,
    marker: Marker,
    offset: u64,
    length: u64,
) -> Result<(RecordHeader, Bytes, Bytes), ReadError> {
    let length = usize::try_from(length).map_err(|_| ReadError::Damaged)?;
    let mut bytes = BytesMut::zeroed(length);
    file.read_exact_at(&mut bytes, offset).map_err(|error| {
        let cut_short = error.kind() == io::ErrorKind::UnexpectedEof;
        if cut_short { ReadError::Damaged } else { ReadError::Disk(error) }
    })?;
    let header = RecordHeader::decode(&bytes, marker, offset).ok_or(ReadError::Damaged)?;
    if header.record_length() != length as u64 {
        return Err(ReadError::Damaged);
    }
    let mut meta = bytes.freeze().split_off(RECORD_HEADER);
    let body = meta.split_off(header.meta_length as usize);
    if format::payload_crc(&meta, &body) != header.payload_crc {
        return Err(ReadError::Damaged);
    }
    Ok((header, meta, body))
}

/// The time that many milliseconds after 1970.
pub(super) fn unix_time(ms: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms)).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Milliseconds after 1970; 0 for what lies before.
pub(super) fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
