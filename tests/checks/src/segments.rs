//! Journals as a script of bytes says: segment files written here, by the description in [`gateway::journal`]'s page and not
//! by its code, then damaged; or the bytes themselves as a file.

use std::ops::Range;
use std::path::{Path, PathBuf};

const FIRST_RECORD: usize = 4096;
const RECORD_HEADER: usize = 40;
const BLOCK: usize = 4096;
/// In a record's header block length: it is its batch's last, and zeros follow up to the next block.
const LAST: u32 = 1 << 31;

/// Bytes that decide. At their end, zeros.
pub(crate) struct Script<'a>(pub(crate) &'a [u8]);

impl<'a> Script<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    fn number(&mut self) -> u32 {
        self.bytes(4).iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
    }
}

/// A journal.
pub(crate) struct Plan {
    pub(crate) segments: Vec<Segment>,
    /// All of it was written as a gateway would have, and only then damaged.
    pub(crate) is_honest: bool,
}

/// One segment.
#[derive(Default)]
pub(crate) struct Segment {
    pub(crate) number: u64,
    pub(crate) file: Vec<u8>,
    /// Before it was damaged.
    pristine: Vec<u8>,
    pub(crate) records: Vec<Record>,
    pub(crate) marks: Option<Vec<u8>>,
    pristine_marks: Option<Vec<u8>>,
    /// What the pristine marks say.
    states: Vec<u8>,
    /// Where the records end.
    end: usize,
    is_sealed: bool,
    /// Where the batches that were promised end, and how many entries that is.
    promised: (usize, u32),
}

/// One record.
pub(crate) struct Record {
    pub(crate) index: u32,
    pub(crate) range: Range<usize>,
    received_ms: u64,
}

impl Plan {
    pub(crate) fn of(script: &[u8]) -> Plan {
        let mut script = Script(script);
        let kind = script.byte();
        if kind & 1 == 0 {
            return Plan { segments: vec![Segment::raw(kind, &mut script)], is_honest: false };
        }
        let is_honest = kind & 2 == 0;
        let mut segments: Vec<Segment> = Vec::new();
        for _ in 0..=script.below(3) {
            segments.push(Segment::write(segments.last(), is_honest, &mut script));
        }
        for _ in 0..script.below(8) {
            let which = script.below(segments.len());
            segments[which].damage(&mut script);
        }
        Plan { segments, is_honest }
    }

    /// Writes its files.
    pub(crate) fn write(&self, dir: &Path) {
        for segment in &self.segments {
            std::fs::write(file(dir, segment.number, "journal"), &segment.file).unwrap();
            if let Some(marks) = &segment.marks {
                std::fs::write(file(dir, segment.number, "marks"), marks).unwrap();
            }
        }
    }

    /// Whether what became of this record's segment was told by an intact header: the entry was promised to somebody.
    pub(crate) fn is_promised(&self, segment: usize, record: &Record) -> bool {
        let next = self.segments.get(segment + 1);
        next.is_some_and(|next| next.is_intact(0..64)) && record.range.end <= self.segments[segment].promised.0
    }
}

/// A file of a journal.
pub(crate) fn file(dir: &Path, number: u64, extension: &str) -> PathBuf {
    dir.join(format!("{number:012}.{extension}"))
}

impl Segment {
    /// The script itself as a file (the zeros of its first block need not be written out), and its end as its marks.
    fn raw(kind: u8, script: &mut Script<'_>) -> Segment {
        let marks = if kind & 2 == 0 { None } else { Some(script.below(64)) };
        let rest = script.0;
        let (file, marks_file) = rest.split_at(rest.len() - marks.unwrap_or(0).min(rest.len()));
        let mut file = file.to_vec();
        if kind & 4 == 0 && file.len() > 64 {
            file.splice(64..64, [0; FIRST_RECORD - 64]);
        }
        Segment { number: 1, file, marks: marks.map(|_| marks_file.to_vec()), ..Segment::default() }
    }

    fn write(before: Option<&Segment>, is_honest: bool, script: &mut Script<'_>) -> Segment {
        let kind = script.byte();
        let number = before.map_or(1, |before| before.number + 1) + u64::from(kind & 4 != 0);
        let marker = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        let mut segment = Segment { number, is_sealed: kind & 1 != 0, ..Segment::default() };
        let mut records = Vec::new();
        let (mut synced, mut version) = (FIRST_RECORD, 1);
        for index in 0..script.below(7) as u32 {
            let shape = script.byte();
            let start = FIRST_RECORD + records.len();
            if shape & 1 != 0 {
                synced = start;
                if kind & 16 != 0 {
                    segment.promised = (start, index); // as if the last batch were refused
                }
            }
            let meta = script.bytes(usize::from(shape >> 3 & 7)).to_vec();
            let length = usize::from(script.byte());
            let body = match shape >> 1 & 3 {
                0 => vec![b'x'; length],
                1 => script.bytes(length).to_vec(),
                2 => records.clone(), // whatever a sender might know of this file
                _ => marker.repeat(length % 9),
            };
            let received_ms = 1_700_000_000_000 + 999 * u64::from(index);
            let is_last = shape & 128 != 0;
            let meta_length = meta.len() as u32 | if is_last { LAST } else { 0 };
            let mut fields = [checksum([&meta, &body]), index, meta_length, body.len() as u32, synced as u32];
            if !is_honest && shape & 64 != 0 {
                fields[script.below(fields.len())] = script.number();
            }
            records.extend_from_slice(&record_header(marker, fields, received_ms, start));
            records.extend_from_slice(&meta);
            records.extend_from_slice(&body);
            let range = start..FIRST_RECORD + records.len();
            segment.records.push(Record { index, range, received_ms });
            if is_last {
                records.resize(records.len().next_multiple_of(BLOCK), 0); // the first begins a block, too
                version = 2;
            }
        }
        segment.end = FIRST_RECORD + records.len();
        if kind & 16 == 0 {
            segment.promised = (segment.end, segment.records.len() as u32);
        }
        let index = index(marker, segment.end, &segment.records, (!is_honest && kind & 32 != 0).then_some(script));
        let capacity = segment.end + index.len() + usize::from(kind >> 6) * 50;
        let mut file = header(version, marker, number, before, capacity);
        file.extend_from_slice(&records);
        match segment.is_sealed {
            true => file.extend_from_slice(&index),
            false => file.resize(capacity, 0),
        }
        if kind & 2 != 0 {
            // Eight and sixteen are bits that a gateway never writes down.
            let written = if is_honest { !24 } else { 0xff };
            let states = script.bytes(segment.records.len() + usize::from(kind & 8 != 0));
            segment.states = states.iter().map(|state| state & written).collect();
            segment.marks = Some(marks(marker, &segment.states));
        }
        segment.pristine_marks.clone_from(&segment.marks);
        segment.pristine.clone_from(&file);
        segment.file = file;
        segment
    }

    fn damage(&mut self, script: &mut Script<'_>) {
        let kind = script.byte();
        let in_header = kind & 8 != 0;
        let mut place = || {
            let at = script.number() >> 16;
            if in_header { at as usize % 64 } else { FIRST_RECORD + at as usize % (self.file.len() - FIRST_RECORD + 1) }
        };
        let (at, other) = (place(), place());
        let end = self.file.len().min(at + script.below(256));
        match kind & 7 {
            0 => self.file.truncate(at),
            1 => self.file[at.min(end)..end].fill(0),
            2 => {
                let piece = self.file[at.min(end)..end].to_vec();
                let room = self.file.len().saturating_sub(other).min(piece.len());
                self.file[other.min(self.pristine.len())..][..room].copy_from_slice(&piece[..room]);
            }
            3 => {
                let xor = script.byte() | 1;
                if let Some(marks) = &mut self.marks {
                    let at = at % marks.len();
                    marks[at] ^= xor;
                }
            }
            _ => {
                let xor = script.byte() | 1;
                if let Some(byte) = self.file.get_mut(at) {
                    *byte ^= xor;
                }
            }
        }
        // What is cut off may be followed by more damage, which needs something to be done to.
        let least = FIRST_RECORD + 1;
        if self.file.len() < least {
            self.file.resize(least, 0);
        }
    }

    /// What intact marks say; nothing where there are none. (Damage upon damage may mend what it broke.)
    pub(crate) fn states(&self) -> &[u8] {
        if self.marks == self.pristine_marks { &self.states } else { &[] }
    }

    pub(crate) fn is_intact(&self, range: Range<usize>) -> bool {
        self.file.get(range.clone()).is_some_and(|bytes| bytes == &self.pristine[range])
    }

    /// Whether anything is left that says which records are this segment's.
    pub(crate) fn can_be_known(&self) -> bool {
        let first_record = !self.records.is_empty() && self.is_intact(FIRST_RECORD..FIRST_RECORD + RECORD_HEADER);
        let has_index = self.is_sealed && self.file.len() == self.pristine.len();
        self.is_intact(0..64) || first_record || (has_index && self.is_intact(self.end..self.pristine.len()))
    }

    /// The record with this index whose every byte is covered by a checksum that holds, wherever it is.
    pub(crate) fn genuine(&self, index: u32, received_ms: u64, meta: &[u8], body: &[u8]) -> bool {
        let length = RECORD_HEADER + meta.len() + body.len();
        self.file.windows(length).enumerate().any(|(at, record)| {
            let field = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().unwrap());
            let fields = [12, 16, 20, 24, 28].map(field);
            let marker = record[..8].try_into().unwrap();
            let [crc, own_index, meta_length, body_length, _] = fields;
            (own_index, (meta_length & !LAST) as usize, body_length as usize) == (index, meta.len(), body.len())
                && record[RECORD_HEADER..] == [meta, body].concat()
                && crc == checksum([meta, body])
                && record[..RECORD_HEADER] == record_header(marker, fields, received_ms, at)
        })
    }
}

/// The magic and the version of a later program, intact.
pub(crate) fn is_of_another_version(file: &[u8]) -> bool {
    file.len() >= 64
        && file.starts_with(b"LOOPJRNL")
        && !matches!(file[8..12], [1 | 2, 0, 0, 0])
        && file[12..16] == checksum([&file[..12], &file[16..64]]).to_le_bytes()
}

fn checksum<const N: usize>(pieces: [&[u8]; N]) -> u32 {
    crc32c::crc32c(&pieces.concat())
}

fn header(version: u8, marker: [u8; 8], number: u64, before: Option<&Segment>, capacity: usize) -> Vec<u8> {
    let (end, entries) = before.map_or((0, 0), |before| before.promised);
    let rest = [
        &marker[..],
        &number.to_le_bytes(),
        &before.map_or(0, |before| before.number).to_le_bytes(),
        &(end as u64).to_le_bytes(),
        &entries.to_le_bytes(),
        &[0; 4],
        &(capacity as u64).to_le_bytes(),
    ]
    .concat();
    let start = [&b"LOOPJRNL"[..], &[version, 0, 0, 0]].concat();
    let mut header = [&start[..], &checksum([&start, &rest]).to_le_bytes(), &rest].concat();
    header.resize(FIRST_RECORD, 0);
    header
}

fn record_header(marker: [u8; 8], fields: [u32; 5], received_ms: u64, at: usize) -> Vec<u8> {
    let rest = [fields.map(u32::to_le_bytes).concat(), received_ms.to_le_bytes().to_vec()].concat();
    let crc = checksum([&marker, &rest, &(at as u64).to_le_bytes()]);
    [&marker[..], &crc.to_le_bytes(), &rest].concat()
}

/// Index and trailer; with a `liar`, one that says something else and is signed all the same.
fn index(marker: [u8; 8], end: usize, records: &[Record], liar: Option<&mut Script<'_>>) -> Vec<u8> {
    let mut index = Vec::new();
    for record in records {
        index.extend_from_slice(&(record.range.start as u32).to_le_bytes());
        index.extend_from_slice(&((record.received_ms / 1000) as u32).to_le_bytes());
    }
    if let Some(liar) = liar.filter(|_| !index.is_empty()) {
        let at = liar.below(index.len() / 4) * 4;
        index[at..at + 4].copy_from_slice(&liar.number().to_le_bytes());
    }
    index.extend_from_slice(&marker);
    index.extend_from_slice(b"LOOPTAIL");
    index.extend_from_slice(&(end as u64).to_le_bytes());
    index.extend_from_slice(&(records.len() as u32).to_le_bytes());
    let crc = checksum([&index]);
    index.extend_from_slice(&crc.to_le_bytes());
    index
}

fn marks(marker: [u8; 8], states: &[u8]) -> Vec<u8> {
    let rest = [&checksum([&marker]).to_le_bytes()[..], &(states.len() as u32).to_le_bytes(), states].concat();
    let start = b"LOOPMARK\x01\0\0\0";
    [start, &checksum([start, &rest]).to_le_bytes()[..], &rest].concat()
}
