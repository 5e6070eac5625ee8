//! Looks into a journal without opening it: for `gateway journal status` and `redrive`, also while a gateway has it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::access;
use super::files::{self, Kind};
use super::format::{self, FIRST_RECORD, HeaderBlock, Marker};
use super::place::Place;
use super::read::{self, ReadError, Stored};
use super::scan::{self, Survey};
use super::segment::{Columns, Segment};
use super::state::{Refusal, State, Tally};
use super::stats::Share;
use super::table::Table;

/// What lies in a journal's directory. Takes no lock and changes nothing; states are those that the gateway last wrote
/// down, up to a second old while it runs.
#[derive(Debug)]
pub struct Snapshot {
    gateway_id: Option<String>,
    receipt_key: Option<[u8; 32]>,
    segments: Vec<(PathBuf, Segment)>,
    unreadable: Vec<PathBuf>,
    damaged: Vec<(PathBuf, u64)>,
}

/// One segment file of a [`Snapshot`].
#[derive(Debug, Clone)]
pub struct SegmentStatus<'s> {
    /// The file.
    pub file: &'s Path,
    /// Bytes it takes, what is only reserved included.
    pub bytes: u64,
    /// One for each of [`State::ALL`], in that order.
    pub shares: [Share; State::ALL.len()],
    /// Whether a header or record in it is damaged. Bodies are not looked at.
    pub damaged: bool,
}

/// One entry of a [`Snapshot`].
#[derive(Debug, Clone, Copy)]
pub struct Listed<'s> {
    segment: &'s Segment,
    columns: &'s Columns,
    index: usize,
    state: State,
}

impl Snapshot {
    /// Looks now. Blocks.
    ///
    /// # Errors
    /// When the directory cannot be listed, or a file in it not be opened. One that is let go meanwhile is left out.
    pub fn of(dir: &Path) -> io::Result<Snapshot> {
        let gateway_id = files::read_gateway_id(dir)?;
        let receipt_key = files::read_receipt_key(dir)?;
        let (segments, unreadable, damaged) = (Vec::new(), Vec::new(), Vec::new());
        let mut snapshot = Snapshot { gateway_id, receipt_key, segments, unreadable, damaged };
        for (kind, number) in files::list(dir)? {
            let looked = match kind {
                Kind::Segment => snapshot.look_into(dir, number),
                Kind::Damaged => snapshot.note_damaged(files::damaged(dir, number)),
                Kind::Marks | Kind::Unfinished => Ok(()),
            };
            match looked {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(snapshot)
    }

    fn note_damaged(&mut self, path: PathBuf) -> io::Result<()> {
        let bytes = fs::metadata(&path)?.len();
        self.damaged.push((path, bytes));
        Ok(())
    }

    fn look_into(&mut self, dir: &Path, number: u64) -> io::Result<()> {
        let path = files::segment(dir, number);
        let file = access::open(OpenOptions::new().read(true), &path)?;
        let (mut block, mut marker) = scan::identify(&file)?;
        if marker.is_none() && !scan::is_blank(&file)? {
            (block, marker) = scan::identify(&file)?; // its first batch may have come meanwhile
            if marker.is_none() {
                // A later version's file is as unreadable to us as a damaged one.
                self.unreadable.push(path.clone());
            }
        }
        let Some(marker) = marker else { return Ok(()) }; // blank: made ready for later
        let length = file.metadata()?.len();
        let mut segment = Segment::new(number, marker, path.as_path().into(), length, FIRST_RECORD);
        match look_at(&file, marker)? {
            Looked::Sealed { end, offsets, received } => {
                segment.damaged = block == HeaderBlock::Invalid;
                segment.end = end;
                segment.fill(offsets, received, &[]);
            }
            Looked::Unsealed { survey, damaged } => {
                segment.damaged = damaged || block == HeaderBlock::Invalid && !survey.is_one_batch();
                segment.end = survey.end;
                segment.fill(survey.offsets, survey.received, &survey.holes);
            }
        }
        let marks = access::read_small(&files::marks(dir, number), format::LARGEST_MARKS).unwrap_or_default();
        if let Some(marks) = format::decode_marks(&marks, segment.check) {
            segment.show_marks(&marks);
        }
        self.segments.push((path, segment));
        Ok(())
    }

    /// The key of the tags that its receipts must show; `None` before the first start that made one.
    pub fn receipt_key(&self) -> Option<&[u8; 32]> {
        self.receipt_key.as_ref()
    }

    /// The id of the gateway whose journal it is; `None` if no gateway ever ran on it.
    pub fn gateway_id(&self) -> Option<&str> {
        self.gateway_id.as_deref()
    }

    /// All segments together: one share for each of [`State::ALL`], in that order.
    pub fn shares(&self) -> [Share; State::ALL.len()] {
        shares(self.segments.iter().map(|(_, segment)| segment))
    }

    /// Each segment, oldest first.
    pub fn segments(&self) -> impl Iterator<Item = SegmentStatus<'_>> {
        self.segments.iter().map(|(file, segment)| SegmentStatus {
            file,
            bytes: segment.on_disk,
            shares: shares([segment]),
            damaged: segment.damaged,
        })
    }

    /// Segment files in which nothing can be read.
    pub fn unreadable(&self) -> &[PathBuf] {
        &self.unreadable
    }

    /// Damaged files kept for people, and their bytes.
    pub fn damaged(&self) -> &[(PathBuf, u64)] {
        &self.damaged
    }

    /// Each entry that is still there, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = Listed<'_>> {
        // All are awake: nobody puts those of a snapshot to sleep.
        let awake = self.segments.iter().filter_map(|(_, segment)| Some((segment, segment.columns()?)));
        awake.flat_map(|(segment, columns)| {
            let entry = move |index| Some(Listed { segment, columns, index, state: segment.bits(index).state()? });
            (0..segment.entries()).filter_map(entry)
        })
    }
}

impl Listed<'_> {
    /// Where it is.
    pub fn place(&self) -> Place {
        self.segment.place(self.index)
    }

    /// How far it has come.
    pub fn state(&self) -> State {
        self.state
    }

    /// Why it was set aside, if it was.
    pub fn refusal(&self) -> Option<Refusal> {
        self.segment.bits(self.index).refusal()
    }

    /// When the gateway received it, to the second.
    pub fn received_at(&self) -> SystemTime {
        from_seconds(self.columns.received[self.index])
    }

    /// Bytes that its record takes.
    pub fn bytes(&self) -> usize {
        usize::try_from(self.columns.length(self.index, self.segment.end)).unwrap_or(usize::MAX)
    }

    /// Its header block and body. Blocks.
    ///
    /// # Errors
    /// [`ReadError`]; here nothing is counted or logged. A running gateway may have let the entry go meanwhile.
    pub fn read(&self) -> Result<Stored, ReadError> {
        match read::read(&Table::located(self.segment, self.columns, self.index)) {
            Err(ReadError::Disk(error)) if error.kind() == io::ErrorKind::NotFound => Err(ReadError::Unknown),
            read => read,
        }
    }
}

/// The records of a segment's file.
enum Looked {
    Sealed { end: u64, offsets: Vec<u32>, received: Vec<u32> },
    Unsealed { survey: Survey, damaged: bool },
}

/// Reads the index of a segment, or its records where there is none. A gateway may write to the file, or seal it, while
/// it is read. So damage is only what a second look shows, too.
fn look_at(file: &File, marker: Marker) -> io::Result<Looked> {
    let sealed = || {
        let (trailer, offsets, received) = scan::read_index(file).filter(|(trailer, ..)| trailer.marker == marker)?;
        Some(Looked::Sealed { end: trailer.end, offsets, received })
    };
    let damaged = |survey: &Survey| !survey.holes.is_empty() || survey.synced > survey.end || survey.unreadable;
    if let Some(sealed) = sealed() {
        return Ok(sealed);
    }
    let first = scan::survey(file, marker, false)?;
    if !damaged(&first) {
        return Ok(Looked::Unsealed { survey: first, damaged: false });
    }
    if let Some(sealed) = sealed() {
        return Ok(sealed);
    }
    let survey = scan::survey(file, marker, false)?;
    let damaged = first.holes.iter().any(|hole| survey.holes.binary_search(hole).is_ok())
        || first.synced > survey.end
        || first.unreadable && survey.unreadable;
    Ok(Looked::Unsealed { survey, damaged })
}

/// The states' shares of these segments.
pub(super) fn shares<'s>(segments: impl IntoIterator<Item = &'s Segment> + Clone) -> [Share; State::ALL.len()] {
    State::ALL.map(|state| {
        let mut tally = Tally::default();
        let mut oldest = None;
        for segment in segments.clone() {
            tally += segment.tally(state);
            // Segments are in the order of their age, and entries in them.
            oldest = oldest.or_else(|| segment.oldest(state));
        }
        Share { state, tally, oldest: oldest.map(from_seconds) }
    })
}

fn from_seconds(seconds: u32) -> SystemTime {
    read::unix_time(u64::from(seconds) * 1000)
}

/// The segment files that a later version of this program wrote, and the versions of their format.
///
/// # Errors
/// When the directory cannot be listed, or a file in it not be read.
pub fn later_versions(dir: &Path) -> io::Result<Vec<(PathBuf, u32)>> {
    let mut later = Vec::new();
    for (kind, number) in files::list(dir)? {
        if kind != Kind::Segment {
            continue;
        }
        let path = files::segment(dir, number);
        match access::open(OpenOptions::new().read(true), &path).and_then(|file| scan::identify(&file)) {
            Ok((HeaderBlock::OtherVersion(version), _)) => later.push((path, version)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(later)
}
