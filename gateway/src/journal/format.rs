//! The bytes of segment and marks files, both ways. Pure: no file is touched here. The layout and what it is good for
//! are described in the [module](super).

/// What a segment is written in, in bytes: a batch begins at a multiple of it and fills its last one up with zeros. Writing
/// past the page cache asks for that, and no write ever touches a block that holds a record already.
pub(super) const BLOCK: u64 = 4096;
/// Where the first record of a segment begins. The header has this whole block to itself, so that one lost sector
/// never takes both the header and the first record, each of which is enough to know the segment's marker.
pub(super) const FIRST_RECORD: u64 = BLOCK;
/// Bytes of a segment's header; the rest of its block is zeros.
pub(super) const SEGMENT_HEADER: usize = 64;
/// Bytes of a record before its header block and body.
pub(super) const RECORD_HEADER: usize = 40;
/// Bytes at the very end of a sealed segment.
pub(super) const TRAILER: usize = 32;
/// Bytes a sealed segment spends on each entry in its index.
pub(super) const INDEX_ENTRY: usize = 8;
/// The most that an entry's header block and body may have together, in bytes. Keeps every length well inside 32 bits.
pub(super) const MAX_PAYLOAD: usize = 1 << 30;

/// No segment's file is longer: 1 GiB, or one entry and its index.
pub(super) const LARGEST_SEGMENT: u64 = 2 << 30;

const SEGMENT_MAGIC: &[u8; 8] = b"LOOPJRNL";
const TRAILER_MAGIC: &[u8; 8] = b"LOOPTAIL";
const MARKS_MAGIC: &[u8; 8] = b"LOOPMARK";
/// In version 1 batches followed each other without zeros between them; no record of it says that it is its batch's last,
/// so it reads the same.
const VERSION: u32 = 2;
/// The version of marks files. Version 1 has no sequences.
const MARKS_VERSION: u32 = 2;
/// In a record's header block length: it is the last of its batch.
const LAST: u32 = 1 << 31;
const MARKS_HEADER: usize = 24;
/// The most bytes that a sequence takes.
const VARINT: usize = 10;
/// The most bytes of a marks file. It may have more states than its segment has entries now: a damaged segment can lose
/// its end.
pub(super) const LARGEST_MARKS: usize = MARKS_HEADER + (1 + VARINT) * (LARGEST_SEGMENT as usize / RECORD_HEADER);

/// Eight random bytes that open every record of one segment. Nobody outside this directory ever sees them, so no
/// sender can put something into a body that would be taken for a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Marker(pub(super) [u8; 8]);

impl Marker {
    /// Never all zeros: those are what an unwritten block holds.
    pub(super) fn random() -> Result<Marker, getrandom::Error> {
        loop {
            let bytes = getrandom::u64()?.to_le_bytes();
            if bytes != [0; 8] {
                return Ok(Marker(bytes));
            }
        }
    }

    /// What a place carries to prove which segment it speaks of. Half the marker's size, so it does not give the
    /// marker away.
    pub(super) fn check(self) -> u32 {
        crc32c::crc32c(&self.0)
    }
}

/// The segment written before this one, as far as its entries were promised to anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Previous {
    /// Its number; 0 for none.
    pub(super) number: u64,
    /// Where its last synced record ends.
    pub(super) end: u64,
    /// How many entries were synced in it.
    pub(super) entries: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) marker: Marker,
    pub(super) number: u64,
    pub(super) previous: Previous,
    /// Bytes reserved for the file. It is never shorter before it is sealed.
    pub(super) capacity: u64,
}

/// What the first block of a segment turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderBlock {
    Valid(SegmentHeader),
    /// Intact, but written by a later version of this program.
    OtherVersion(u32),
    /// Not a header, or one that fails its checksum.
    Invalid,
}

impl SegmentHeader {
    pub(super) fn encode(&self) -> [u8; SEGMENT_HEADER] {
        let mut bytes = [0; SEGMENT_HEADER];
        bytes[..8].copy_from_slice(SEGMENT_MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.marker.0);
        bytes[24..32].copy_from_slice(&self.number.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.previous.number.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.previous.end.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.previous.entries.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.capacity.to_le_bytes());
        let crc = crc_around(&bytes, 12);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> HeaderBlock {
        let Some(bytes) = bytes.get(..SEGMENT_HEADER) else { return HeaderBlock::Invalid };
        if !bytes.starts_with(SEGMENT_MAGIC) || u32_at(bytes, 12) != crc_around(bytes, 12) {
            return HeaderBlock::Invalid;
        }
        if !(1..=VERSION).contains(&u32_at(bytes, 8)) {
            return HeaderBlock::OtherVersion(u32_at(bytes, 8));
        }
        HeaderBlock::Valid(SegmentHeader {
            marker: Marker(array_at(bytes, 16)),
            number: u64_at(bytes, 24),
            previous: Previous { number: u64_at(bytes, 32), end: u64_at(bytes, 40), entries: u32_at(bytes, 48) },
            capacity: u64_at(bytes, 56),
        })
    }
}

/// What stands before an entry's header block and body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordHeader {
    /// CRC32C of the header block and then the body.
    pub(super) payload_crc: u32,
    /// The how manieth entry of its segment, from 0.
    pub(super) index: u32,
    pub(super) meta_length: u32,
    pub(super) body_length: u32,
    /// Up to where the segment was synced when this record was written: where its batch begins.
    pub(super) synced: u32,
    /// Unix time, milliseconds.
    pub(super) received_ms: u64,
    /// The last of its batch: the zeros up to the next block are part of it.
    pub(super) last: bool,
}

impl RecordHeader {
    /// Bytes of the record, without zeros that follow it.
    pub(super) fn length(&self) -> u64 {
        RECORD_HEADER as u64 + u64::from(self.meta_length) + u64::from(self.body_length)
    }

    /// Where the record ends that begins at `position`, and the next one begins.
    pub(super) fn end(&self, position: u64) -> u64 {
        let end = position + self.length();
        if self.last { end.next_multiple_of(BLOCK) } else { end }
    }

    /// `position` is where in its file the record begins. It is part of the checksum, so that a copy of a record at
    /// another place is no record.
    pub(super) fn encode(&self, marker: Marker, position: u64) -> [u8; RECORD_HEADER] {
        let mut bytes = [0; RECORD_HEADER];
        bytes[..8].copy_from_slice(&marker.0);
        bytes[12..16].copy_from_slice(&self.payload_crc.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.index.to_le_bytes());
        let meta_length = self.meta_length | if self.last { LAST } else { 0 };
        bytes[20..24].copy_from_slice(&meta_length.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.body_length.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.synced.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.received_ms.to_le_bytes());
        let crc = crc32c::crc32c_append(crc_around(&bytes, 8), &position.to_le_bytes());
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The header at the start of `bytes`, if it is one of this segment's and was written for this position.
    pub(super) fn decode(bytes: &[u8], marker: Marker, position: u64) -> Option<RecordHeader> {
        let bytes = bytes.get(..RECORD_HEADER)?;
        let crc = crc32c::crc32c_append(crc_around(bytes, 8), &position.to_le_bytes());
        if !bytes.starts_with(&marker.0) || u32_at(bytes, 8) != crc {
            return None;
        }
        Some(RecordHeader {
            payload_crc: u32_at(bytes, 12),
            index: u32_at(bytes, 16),
            meta_length: u32_at(bytes, 20) & !LAST,
            body_length: u32_at(bytes, 24),
            synced: u32_at(bytes, 28),
            received_ms: u64_at(bytes, 32),
            last: u32_at(bytes, 20) & LAST != 0,
        })
    }
}

/// CRC32C of an entry's header block and then its body.
pub(super) fn payload_crc(meta: &[u8], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(meta), body)
}

/// The last bytes of a sealed segment; its index lies between `end` and these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trailer {
    pub(super) marker: Marker,
    /// Where the last record ends and the index begins.
    pub(super) end: u64,
    /// Entries in the segment, and so in the index.
    pub(super) entries: u32,
    /// CRC32C of the index and then of this trailer's other fields.
    pub(super) crc: u32,
}

/// Index and trailer of a segment: for each entry where it begins and when it was received (Unix time, seconds).
pub(super) fn encode_index(marker: Marker, end: u64, offsets: &[u32], received: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(offsets.len() * INDEX_ENTRY + TRAILER);
    for (offset, received) in offsets.iter().zip(received) {
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&received.to_le_bytes());
    }
    bytes.extend_from_slice(&marker.0);
    bytes.extend_from_slice(TRAILER_MAGIC);
    bytes.extend_from_slice(&end.to_le_bytes());
    let entries = u32::try_from(offsets.len()).expect("an entry's index is 32 bits wide");
    bytes.extend_from_slice(&entries.to_le_bytes());
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

impl Trailer {
    /// From the last [`TRAILER`] bytes of a file. Says nothing yet about its checksum; see [`Trailer::decode_index`].
    pub(super) fn decode(bytes: &[u8]) -> Option<Trailer> {
        let bytes = bytes.get(..TRAILER)?;
        (bytes[8..16] == TRAILER_MAGIC[..]).then(|| Trailer {
            marker: Marker(array_at(bytes, 0)),
            end: u64_at(bytes, 16),
            entries: u32_at(bytes, 24),
            crc: u32_at(bytes, 28),
        })
    }

    /// Bytes of index and trailer together.
    pub(super) fn index_length(&self) -> u64 {
        u64::from(self.entries) * INDEX_ENTRY as u64 + TRAILER as u64
    }

    /// Offsets and times of arrival from `bytes`, which run from [`Trailer::end`] to the end of the file. `None` where
    /// anything is not as [`encode_index`] wrote it, whatever the checksum says: records follow each other.
    pub(super) fn decode_index(&self, bytes: &[u8]) -> Option<(Vec<u32>, Vec<u32>)> {
        let index = self.entries as usize * INDEX_ENTRY;
        if bytes.len() != index + TRAILER || crc32c::crc32c(&bytes[..bytes.len() - 4]) != self.crc {
            return None;
        }
        let entries = bytes[..index].chunks_exact(INDEX_ENTRY);
        let (offsets, received): (Vec<_>, Vec<_>) = entries.map(|entry| (u32_at(entry, 0), u32_at(entry, 4))).unzip();
        let in_order = offsets.is_sorted()
            && offsets.first().is_none_or(|&first| u64::from(first) >= FIRST_RECORD)
            && offsets.last().is_none_or(|&last| u64::from(last) < self.end);
        in_order.then_some((offsets, received))
    }
}

/// The content of a marks file: how far the entries of one segment had come some time ago.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Marks {
    /// A byte for each entry.
    pub(super) states: Vec<u8>,
    /// The stream sequences of those entries whose state has one, in the order of the entries.
    pub(super) sequences: Vec<u64>,
}

/// A marks file. Sequences are written as differences: those of entries that follow each other are close.
pub(super) fn encode_marks(check: u32, marks: &Marks) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MARKS_HEADER + marks.states.len() + 2 * marks.sequences.len());
    bytes.extend_from_slice(MARKS_MAGIC);
    bytes.extend_from_slice(&MARKS_VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&check.to_le_bytes());
    let entries = u32::try_from(marks.states.len()).expect("an entry's index is 32 bits wide");
    bytes.extend_from_slice(&entries.to_le_bytes());
    bytes.extend_from_slice(&marks.states);
    let mut before = 0;
    for &sequence in &marks.sequences {
        put_difference(&mut bytes, sequence.wrapping_sub(before));
        before = sequence;
    }
    let crc = crc_around(&bytes, 12);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Reads a marks file. `None` unless it is intact and of the segment with this check.
pub(super) fn decode_marks(bytes: &[u8], check: u32) -> Option<Marks> {
    let header = bytes.get(..MARKS_HEADER)?;
    let valid = header.starts_with(MARKS_MAGIC)
        && (1..=MARKS_VERSION).contains(&u32_at(header, 8))
        && u32_at(header, 12) == crc_around(bytes, 12)
        && u32_at(header, 16) == check;
    let (states, mut rest) = bytes[MARKS_HEADER..].split_at_checked(u32_at(header, 20) as usize).filter(|_| valid)?;
    let (mut sequences, mut sequence) = (Vec::new(), 0_u64);
    while !rest.is_empty() {
        sequence = sequence.wrapping_add(take_difference(&mut rest)?);
        sequences.push(sequence);
    }
    Some(Marks { states: states.to_vec(), sequences })
}

/// Appends a difference of two sequences: small ones, up or down, take a byte (LEB128 of its zigzag form).
fn put_difference(bytes: &mut Vec<u8>, difference: u64) {
    let sign = if difference >> 63 == 0 { 0 } else { u64::MAX };
    let mut left = difference << 1 ^ sign;
    while left >= 0x80 {
        bytes.push(left.to_le_bytes()[0] | 0x80);
        left >>= 7;
    }
    bytes.push(left.to_le_bytes()[0]);
}

/// Takes what [`put_difference`] appended. `None` where that is not what stands there.
fn take_difference(bytes: &mut &[u8]) -> Option<u64> {
    let mut zigzag = 0_u64;
    for shift in (0..u64::BITS).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        zigzag |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(zigzag >> 1 ^ (zigzag & 1).wrapping_neg());
        }
    }
    None
}

/// CRC32C of all of `bytes` but the four at `hole`, where the checksum itself is kept.
fn crc_around(bytes: &[u8], hole: usize) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..hole]), &bytes[hole + 4..])
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a range of N bytes has N bytes")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKER: Marker = Marker(*b"\x01marker\xff");

    /// Every single-bit change of `bytes`, one after the other.
    fn flips(bytes: &[u8]) -> impl Iterator<Item = Vec<u8>> {
        (0..bytes.len() * 8).map(|bit| {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            flipped
        })
    }

    #[test]
    fn a_segment_header_reads_back_and_no_flipped_bit_passes() {
        let previous = Previous { number: 6, end: 70_000, entries: 12 };
        let header = SegmentHeader { marker: MARKER, number: 7, previous, capacity: 1 << 26 };
        let bytes = header.encode();
        assert_eq!(SegmentHeader::decode(&bytes), HeaderBlock::Valid(header));
        assert_eq!(SegmentHeader::decode(&bytes[..63]), HeaderBlock::Invalid);
        assert!(flips(&bytes).all(|flipped| SegmentHeader::decode(&flipped) == HeaderBlock::Invalid));
    }

    #[test]
    fn a_later_version_is_told_from_damage() {
        let header = SegmentHeader { marker: MARKER, number: 7, previous: Previous::default(), capacity: 0 };
        let mut bytes = header.encode();
        bytes[8] = 9;
        let crc = crc_around(&bytes, 12);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(SegmentHeader::decode(&bytes), HeaderBlock::OtherVersion(9));
    }

    #[test]
    fn a_record_header_holds_only_for_its_marker_and_position() {
        let header = RecordHeader {
            payload_crc: 0xdead_beef,
            index: 3,
            meta_length: 200,
            body_length: 16_384,
            synced: 4096,
            received_ms: 1_700_000_000_123,
            last: true,
        };
        assert_eq!((header.length(), header.end(8192)), (16_624, 8192 + 5 * BLOCK));
        assert_eq!(RecordHeader { last: false, ..header }.end(8192), 8192 + 16_624);
        let bytes = header.encode(MARKER, 8192);
        assert_eq!(RecordHeader::decode(&bytes, MARKER, 8192), Some(header));
        assert_eq!(RecordHeader::decode(&bytes, MARKER, 8193), None);
        assert_eq!(RecordHeader::decode(&bytes, Marker([7; 8]), 8192), None);
        assert_eq!(RecordHeader::decode(&bytes[..39], MARKER, 8192), None);
        assert!(flips(&bytes).all(|flipped| RecordHeader::decode(&flipped, MARKER, 8192).is_none()));
    }

    #[test]
    fn an_index_reads_back_and_no_flipped_bit_passes() {
        let bytes = encode_index(MARKER, 5000, &[4096, 4500], &[17, 18]);
        let read = |bytes: &[u8]| {
            let trailer = Trailer::decode(&bytes[bytes.len() - TRAILER..])?;
            // A flipped `end` or `entries` makes another length, as it would between a file's end and `end`.
            (trailer.end == 5000).then(|| trailer.decode_index(bytes))?
        };
        assert_eq!(read(&bytes), Some((vec![4096, 4500], vec![17, 18])));
        // The marker is checked against the header's by the reader, and is part of the checksum all the same.
        assert!(flips(&bytes).all(|flipped| read(&flipped).is_none()));
    }

    #[test]
    fn an_index_whose_records_do_not_follow_each_other_is_none() {
        let read = |offsets: &[u32]| {
            let bytes = encode_index(MARKER, 5000, offsets, &vec![17; offsets.len()]);
            Trailer::decode(&bytes[bytes.len() - TRAILER..])?.decode_index(&bytes)
        };
        assert!(read(&[]).is_some() && read(&[4096, 4999]).is_some());
        for offsets in [&[4500, 4096][..], &[4095], &[4096, 5000], &[u32::MAX]] {
            assert_eq!(read(offsets), None, "{offsets:?}");
        }
    }

    #[test]
    fn marks_read_back_for_their_segment_only() {
        let marks = Marks { states: vec![0, 1, 2, 3], sequences: vec![70_000, 70_001, 69_990, u64::MAX, 0, 1] };
        let bytes = encode_marks(42, &marks);
        assert_eq!(decode_marks(&bytes, 42), Some(marks));
        assert_eq!(decode_marks(&bytes, 43), None);
        assert!(flips(&bytes).all(|flipped| decode_marks(&flipped, 42).is_none()));
        assert!((0..bytes.len()).all(|length| decode_marks(&bytes[..length], 42).is_none()));
    }

    #[test]
    fn marks_of_the_first_version_have_no_sequences() {
        let mut bytes = encode_marks(42, &Marks { states: vec![1, 2], sequences: vec![] });
        bytes[8] = 1;
        let crc = crc_around(&bytes, 12);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(decode_marks(&bytes, 42), Some(Marks { states: vec![1, 2], sequences: vec![] }));
    }

    #[test]
    fn sequences_that_follow_each_other_take_a_byte_each() {
        let marks = Marks { states: vec![1; 1000], sequences: (1 << 40..).take(1000).collect() };
        assert!(encode_marks(42, &marks).len() < MARKS_HEADER + 2 * 1000 + VARINT);
    }
}
