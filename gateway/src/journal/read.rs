//! Fetches entries from disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::iter;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::access;
use super::direct::{Blocks, SegmentFile};
use super::format::{self, BLOCK, Marker, RECORD_HEADER, RecordHeader};
use super::place::Place;
use super::table::Located;

/// Records that follow each other are read together, up to so many bytes: past the page cache nobody reads ahead, and each
/// read waits for the disk (at 256 KiB a backlog went by a tenth more slowly). Together they also stay in memory, until
/// the last of them is done with.
const RUN_BYTES: usize = 1024 * 1024;
/// The blocks around a run: it begins and ends anywhere in one.
const AROUND: usize = 2 * BLOCK as usize;
const BUFFER_BYTES: usize = RUN_BYTES + AROUND;
/// Unused buffers for such runs that are kept: as many as are in use at once, with as much memory as bodies may take on
/// their way to NATS, one that is being read, and one that is still being written.
const BUFFERS_KEPT: usize = 6;

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
    /// The disk would not give it. It stays where it is and is read again later; this was counted and logged.
    #[error("the record cannot be read: {0}")]
    Disk(#[source] io::Error),
}

/// Memory that records are read into, used again and again: new memory for each run would cost the kernel as much in page
/// faults as the reading does.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// [`BUFFER_BYTES`] each, at most [`BUFFERS_KEPT`] of them.
    unused: Mutex<Vec<Blocks>>,
}

impl Buffers {
    fn unused(&self) -> MutexGuard<'_, Vec<Blocks>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner) // nothing that holds this can panic half-way
    }

    /// Blocks that so many bytes of a file lie in, with anything in them.
    fn lend(self: &Arc<Self>, length: usize) -> Lent {
        // A short run gets memory of its own size: in such a buffer it would hold many times that until it is done with.
        let suits = (RUN_BYTES / 2..=RUN_BYTES).contains(&length);
        let unused = if suits { self.unused().pop() } else { None };
        let blocks = unused.unwrap_or_else(|| Blocks::new(if suits { BUFFER_BYTES } else { length + AROUND }));
        Lent { blocks, range: 0..0, home: Arc::clone(self) }
    }
}

/// A buffer in use, until nobody looks at any of its bytes any more.
struct Lent {
    blocks: Blocks,
    /// Where in it the run is.
    range: Range<usize>,
    home: Arc<Buffers>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.blocks.bytes()[self.range.clone()]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut unused = self.home.unused();
        if self.blocks.len() == BUFFER_BYTES && unused.len() < BUFFERS_KEPT {
            unused.push(std::mem::take(&mut self.blocks));
        }
    }
}

/// Opens a segment's file to read it. Blocks.
///
/// # Errors
/// Fails when the system does.
pub(super) fn open(path: &Path) -> io::Result<File> {
    access::open(OpenOptions::new().read(true), path)
}

/// Reads and checks these records, each for itself: what is wrong with one is not held against another. Blocks.
pub(super) fn read_each<'e>(
    entries: &'e [Located],
    buffers: &Arc<Buffers>,
) -> impl Iterator<Item = (&'e Located, Result<Stored, ReadError>)> {
    runs(entries).flat_map(move |run| {
        let mut bytes = read_run(run, buffers).ok();
        run.iter().map(move |entry| match &mut bytes {
            Some(bytes) => (entry, check(entry, bytes.split_to(bytes.len().min(length(entry))))),
            None => (entry, read(entry)), // some of it the disk will not give, or the file ends early
        })
    })
}

/// Reads and checks the record. Blocks.
pub(super) fn read(entry: &Located) -> Result<Stored, ReadError> {
    check(entry, read_first(entry, length(entry))?.into())
}

/// Reads the header block of the record, and not its body. Only the record's own header is checked. Blocks.
pub(super) fn read_header_block(entry: &Located) -> Result<Bytes, ReadError> {
    let first = read_first(entry, length(entry).min(BLOCK as usize))?;
    let header = RecordHeader::decode(&first, entry.marker, entry.offset).ok_or(ReadError::Damaged)?;
    if header.index != entry.place.index || header.length() > entry.length {
        return Err(ReadError::Damaged);
    }
    let end = RECORD_HEADER + header.meta_length as usize;
    let mut bytes = if end <= first.len() { first } else { read_first(entry, end)? };
    if bytes.len() < end {
        return Err(ReadError::Damaged);
    }
    bytes.truncate(end);
    Ok(Bytes::from(bytes).slice(RECORD_HEADER..))
}

/// The first bytes of the record: to its end or the file's, as what a file that was cut lacks may be no more than zeros.
fn read_first(entry: &Located, bytes: usize) -> Result<Vec<u8>, ReadError> {
    let file = open(&entry.path).map_err(ReadError::Disk)?;
    let mut bytes = vec![0; bytes];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], entry.offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ReadError::Disk(error)),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// Cuts `entries` where the next record does not lie right behind the one before, in the same file, or there are enough.
fn runs(entries: &[Located]) -> impl Iterator<Item = &[Located]> {
    let mut rest = entries;
    iter::from_fn(move || {
        let first = rest.first()?;
        let mut end = first.offset + first.length;
        let follows = |next: &&Located| {
            let is_next = next.path == first.path && next.offset == end;
            end = next.offset + next.length;
            is_next && end - first.offset <= RUN_BYTES as u64
        };
        let others = rest[1..].iter().take_while(follows).count();
        let (run, left) = rest.split_at(1 + others);
        rest = left;
        Some(run)
    })
}

/// The bytes of one such run.
fn read_run(run: &[Located], buffers: &Arc<Buffers>) -> io::Result<Bytes> {
    let Some(first) = run.first() else { return Ok(Bytes::new()) };
    let length = run.iter().map(length).sum();
    let file = SegmentFile::to_read(open(&first.path)?, &first.path);
    let mut lent = buffers.lend(length);
    let at = file.read(&mut lent.blocks, first.offset, length)?;
    lent.range = at..at + length;
    Ok(Bytes::from_owner(lent))
}

fn length(entry: &Located) -> usize {
    usize::try_from(entry.length).expect("where a record begins is 32 bits wide, and so is how long it can be")
}

/// The entry in the bytes of its record.
fn check(entry: &Located, bytes: Bytes) -> Result<Stored, ReadError> {
    let (header, meta, body) = check_record(&bytes, entry.marker, entry.offset)?;
    // Its place says which entry it is; a record of another one there would be confirmed in its stead.
    if header.index != entry.place.index {
        return Err(ReadError::Damaged);
    }
    let received_at = unix_time(header.received_ms);
    Ok(Stored { place: entry.place, received_at, meta, body, repeats: entry.repeats })
}

/// The intact record that `bytes` are, which were read at `offset`: its header, header block and body. No copy.
fn check_record(bytes: &Bytes, marker: Marker, offset: u64) -> Result<(RecordHeader, Bytes, Bytes), ReadError> {
    let header = RecordHeader::decode(bytes, marker, offset).ok_or(ReadError::Damaged)?;
    if !(header.length()..=header.end(offset) - offset).contains(&(bytes.len() as u64)) {
        return Err(ReadError::Damaged);
    }
    let record = usize::try_from(header.length()).expect("no longer than `bytes`");
    let mut meta = bytes.slice(RECORD_HEADER..record);
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

#[cfg(test)]
mod tests {
    use tempfile::NamedTempFile;

    use super::*;

    const MARKER: Marker = Marker([7; 8]);

    /// A file with entries of these body lengths, one behind the other.
    fn written(lengths: &[usize]) -> (NamedTempFile, Vec<Located>) {
        let file = NamedTempFile::new().unwrap();
        let path: Arc<Path> = file.path().into();
        let (mut entries, mut offset) = (Vec::new(), 0);
        for (index, &length) in (0..).zip(lengths) {
            let body = vec![b'x'; length];
            let header = RecordHeader {
                payload_crc: format::payload_crc(b"", &body),
                index,
                meta_length: 0,
                body_length: u32::try_from(length).unwrap(),
                synced: 0,
                received_ms: 0,
                last: false,
            };
            file.as_file().write_all_at(&header.encode(MARKER, offset), offset).unwrap();
            file.as_file().write_all_at(&body, offset + RECORD_HEADER as u64).unwrap();
            let place = Place { segment: 1, index, check: 0 };
            let length = header.length();
            entries.push(Located { place, path: path.clone(), marker: MARKER, offset, length, repeats: 0 });
            offset += length;
        }
        (file, entries)
    }

    fn lengths(entries: &[Located]) -> Vec<Option<usize>> {
        let buffers = Arc::default();
        let read = read_each(entries, &buffers).zip(entries);
        read.map(|((of, read), entry)| {
            assert_eq!(of.place, entry.place);
            read.ok().map(|stored| {
                assert_eq!(stored.place, entry.place);
                stored.body.len()
            })
        })
        .collect()
    }

    #[test]
    fn what_lies_together_is_read_together() {
        let half = RUN_BYTES / 2;
        let (_file, mut entries) = written(&[1, 2, 3, half, half, 3 * half, 4]);
        let cut = |entries: &[Located]| runs(entries).map(<[Located]>::len).collect::<Vec<_>>();
        assert_eq!(cut(&entries), [4, 1, 1, 1]);
        assert_eq!(lengths(&entries), [1, 2, 3, half, half, 3 * half, 4].map(Some));
        entries.remove(1);
        assert_eq!(cut(&entries), [1, 2, 1, 1, 1]);
        let mut other = written(&[1]);
        entries.push(other.1.remove(0)); // another file
        assert_eq!(cut(&entries), [1, 2, 1, 1, 1, 1]);
        assert!(cut(&[]).is_empty());
    }

    #[test]
    fn a_buffer_is_used_again_when_nobody_looks_at_it_any_more() {
        let half = RUN_BYTES / 2;
        let (_file, entries) = written(&[half, 20, RUN_BYTES, 10]);
        let buffers = Arc::<Buffers>::default();
        let bodies: Vec<_> = read_each(&entries, &buffers).map(|(_, read)| read.unwrap().body).collect();
        assert_eq!(buffers.unused().len(), 0);
        let [first, second, large, short] = bodies.try_into().unwrap();
        drop(first);
        assert_eq!(buffers.unused().len(), 0, "the second lies in the same");
        assert_eq!(second, vec![b'x'; 20]);
        drop(second);
        assert_eq!(buffers.unused().len(), 1);
        drop((large, short));
        assert_eq!(buffers.unused().len(), 1, "large and short ones had memory of their own");
        let again: Vec<_> = read_each(&entries[..1], &buffers).map(|(_, read)| read.unwrap().body).collect();
        assert_eq!((buffers.unused().len(), &again[0][..]), (0, &vec![b'x'; half][..]));
    }

    #[test]
    fn what_is_wrong_with_one_is_not_held_against_another() {
        let (file, entries) = written(&[10, 20, 30]);
        file.as_file().write_all_at(b"y", entries[1].offset + RECORD_HEADER as u64).unwrap();
        assert_eq!(lengths(&entries), [Some(10), None, Some(30)]);
        file.as_file().set_len(entries[2].offset + 1).unwrap();
        assert_eq!(lengths(&entries), [Some(10), None, None]);
    }
}
