//! What `open` does with what it finds. The rules are in the [module](super)'s description.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::access;
use super::files::{self, Kind};
use super::format::{self, HeaderBlock, Marker, Previous, SegmentHeader};
use super::scan::{self, Survey};
use super::segment::Segment;
use super::state::State;
use super::table::Table;

/// What was found when the journal was opened.
#[derive(Debug, Clone, Default)]
pub struct Recovered {
    /// Entries to be published (again).
    pub unpublished: u64,
    /// Entries that an earlier process published at a known sequence: the stream is asked for them.
    pub unverified: u64,
    /// Entries that were set aside.
    pub set_aside: u64,
    /// Entries known to be confirmed, in segments that are not yet let go.
    pub confirmed: u64,
    /// Bytes at the end of the newest segment that are no whole record: a batch that was being written when the
    /// gateway or the machine went down. None of it was answered 202.
    pub torn_bytes: u64,
    /// What is lost or spoilt. Empty in good times.
    pub damages: Vec<Damage>,
    /// How long it took.
    pub took: Duration,
}

/// One file that is not as it was written. Everything intact in it is delivered, then it is kept under the name
/// `*.damaged`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file, by its name before it is kept.
    pub file: PathBuf,
    /// Entries that were promised and cannot be read. Where the damage hides their number, what is known of it.
    pub entries_lost: u32,
    /// What is wrong, for people.
    pub what: &'static str,
}

impl Damage {
    pub(super) fn tell(&self) {
        tracing::error!(
            file = %self.file.display(),
            entries_lost = self.entries_lost,
            "the journal is damaged: {}; what is intact is delivered, and the file kept as *.damaged",
            self.what
        );
    }
}

/// Why a journal cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("the journal in {dir} is in use by {}; two gateways cannot share one: stop that one or give this one \
             another directory", holder.map_or("another process".to_owned(), |id| format!("process {id}")))]
    InUse {
        /// The journal's directory.
        dir: PathBuf,
        /// The other's process id, where it is known.
        holder: Option<u32>,
    },
    /// A later version of this program wrote there.
    #[error(
        "{file} has format version {version}, which this program does not know; use the program that wrote it, or \
             a newer one"
    )]
    OtherVersion {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Its directory belongs to another user, who is not root.
    #[error(
        "the journal's directory {dir} belongs to user {owner}, who can read and replace what is in it, and this \
             gateway runs as user {user}: chown -R {user} it, or have GATEWAY_JOURNAL_DIR name another"
    )]
    ForeignOwner {
        /// The journal's directory.
        dir: PathBuf,
        /// Its owner.
        owner: u32,
        /// The user of this process.
        user: u32,
    },
    /// The system would not let us.
    #[error("cannot open the journal: {path}: {error}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What it said.
        #[source]
        error: io::Error,
    },
}

impl OpenError {
    pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> OpenError {
        let path = path.to_owned();
        move |error| OpenError::Io { path, error }
    }
}

/// A segment file before its entries are read. It is not kept open: there may be more of them than a process may have
/// files open.
struct Found {
    number: u64,
    path: PathBuf,
    header: Option<SegmentHeader>,
    marker: Option<Marker>,
}

/// Reads the journal in `dir`, cuts the torn tail, and tidies up what no segment needs. Blocks.
pub(super) fn recover(dir: &Path) -> Result<(Table, Recovered), OpenError> {
    let started = Instant::now();
    let listed = files::list(dir).map_err(OpenError::at(dir))?;
    let mut table = Table { next_number: listed.last().map_or(1, |&(_, number)| number + 1), ..Table::default() };
    let mut recovered = Recovered::default();
    let mut found = Vec::new();
    for &(kind, number) in &listed {
        match kind {
            Kind::Segment => found.push(Found::open(dir, number)?),
            Kind::Damaged => {}
            Kind::Marks if listed.binary_search_by_key(&(number, Kind::Segment), |&(k, n)| (n, k)).is_ok() => {}
            Kind::Marks => tidy(&files::marks(dir, number)),
            Kind::Unfinished => tidy(&files::marks(dir, number).with_extension("marks.new")),
        }
    }
    let promised = found.iter().filter_map(|file| file.header.map(|header| header.previous));
    let mut promises: BTreeMap<u64, Previous> = BTreeMap::new();
    for previous in promised {
        let promise = promises.entry(previous.number).or_default();
        *promise = (*promise).max_by_end(previous);
    }
    for file in found {
        let promise = promises.get(&file.number).copied();
        if let Some(segment) = file.load(dir, promise, &mut recovered)? {
            table.segments.insert(segment.number, segment);
        }
    }
    table.kept = kept(dir).map_err(OpenError::at(dir))?;
    let entries = |state| table.segments.values().map(|segment| segment.tally(state).entries).sum();
    recovered.unverified = table.segments.values().map(|segment| segment.unverified() as u64).sum();
    recovered.unpublished = entries(State::Journalled) - recovered.unverified;
    recovered.set_aside = entries(State::SetAside);
    recovered.confirmed = entries(State::Confirmed);
    table.counters.damaged_records = recovered.damages.iter().map(|damage| u64::from(damage.entries_lost)).sum();
    recovered.took = started.elapsed();
    Ok((table, recovered))
}

/// Bytes and number of the files kept for people.
pub(super) fn kept(dir: &Path) -> io::Result<(u64, usize)> {
    let mut kept = (0, 0);
    for (kind, number) in files::list(dir)? {
        if kind == Kind::Damaged {
            // One that is just being removed by somebody no longer counts.
            kept.0 += fs::symlink_metadata(files::damaged(dir, number)).map_or(0, |file| files::taken(&file));
            kept.1 += 1;
        }
    }
    Ok(kept)
}

/// Writes the index behind the records of a segment that gets no more of them, and gives back what was reserved for
/// more. Returns the file's new length. The index only spares the next start the reading of the records, so whoever
/// calls may ignore an error; with `sync` it is lasting, and with it the promise that the file is whole.
pub(super) fn seal(file: &File, marker: Marker, end: u64, index: &[u8], sync: bool) -> io::Result<u64> {
    debug_assert!(format::Trailer::decode(&index[index.len() - format::TRAILER..]).is_some_and(|t| t.marker == marker));
    // In this order, so that the file is never shorter than its capacity without having an index.
    file.write_all_at(index, end)?;
    if sync {
        file.sync_data()?;
    }
    let length = end + index.len() as u64;
    file.set_len(length)?;
    if sync {
        file.sync_all()?;
    }
    Ok(length)
}

fn tidy(path: &Path) {
    if let Err(error) = files::remove(path) {
        tracing::warn!(file = %path.display(), %error, "a file of the journal that nobody needs could not be removed");
    }
}

impl Previous {
    fn is_none(self) -> bool {
        self.entries == 0
    }

    fn max_by_end(self, other: Previous) -> Previous {
        if other.end > self.end { other } else { self }
    }
}

impl Found {
    fn open(dir: &Path, number: u64) -> Result<Found, OpenError> {
        let path = files::segment(dir, number);
        let file = access::open(OpenOptions::new().read(true), &path).map_err(OpenError::at(&path))?;
        let (block, marker) = scan::identify(&file).map_err(OpenError::at(&path))?;
        let header = match block {
            HeaderBlock::Valid(header) => Some(header),
            HeaderBlock::OtherVersion(version) => return Err(OpenError::OtherVersion { file: path, version }),
            HeaderBlock::Invalid => None,
        };
        Ok(Found { number, path, header, marker })
    }

    /// The segment, if there is anything in it. `promise` is what a later segment says of this one.
    fn load(
        self,
        dir: &Path,
        promise: Option<Previous>,
        recovered: &mut Recovered,
    ) -> Result<Option<Segment>, OpenError> {
        let at = OpenError::at;
        let file = access::open(OpenOptions::new().read(true).write(true), &self.path).map_err(at(&self.path))?;
        let Some(marker) = self.marker else { return self.without_marker(dir, &file, promise, recovered) };
        let found = file.metadata().map_err(at(&self.path))?;
        let length = found.len();
        let path = self.path.as_path().into();
        let mut segment = Segment::new(self.number, marker, path, files::taken(&found), format::FIRST_RECORD);
        let mut damage = self.header.is_none().then_some((0, "its header is damaged"));
        match scan::read_index(&file).filter(|(trailer, ..)| trailer.marker == marker) {
            Some((trailer, offsets, received)) => {
                segment.end = trailer.end;
                segment.sealed = true;
                segment.fill(offsets, received, &[]);
            }
            None => {
                let survey = scan::survey(&file, marker, true).map_err(at(&self.path))?;
                let cut = self.header.is_some_and(|header| length < header.capacity);
                let torn_header =
                    self.header.is_none() && survey.is_one_batch() && promise.is_none_or(Previous::is_none);
                if torn_header {
                    damage = None;
                }
                damage = loss(&survey, promise, cut).or(damage);
                segment.end = survey.end;
                let sealable = damage.is_none() && survey.holes.is_empty() && !survey.offsets.is_empty();
                let index = || format::encode_index(marker, survey.end, &survey.offsets, &survey.received);
                let index = sealable.then(index);
                segment.fill(survey.offsets, survey.received, &survey.holes);
                if damage.is_none() {
                    recovered.torn_bytes += survey.tail;
                }
                if let Some(index) = index {
                    let header = torn_header.then_some(SegmentHeader {
                        marker,
                        number: self.number,
                        previous: Previous::default(),
                        capacity: length,
                    });
                    // Before the index: a sealed segment without a header is damaged.
                    let complete = header.map_or(Ok(()), |header| file.write_all_at(&header.encode(), 0));
                    match complete.and_then(|()| seal(&file, marker, segment.end, &index, true)) {
                        Ok(length) => (segment.on_disk, segment.sealed) = (length, true),
                        Err(error) => {
                            tracing::debug!(%error, "no index written; the next start reads the records again")
                        }
                    }
                }
            }
        }
        if let Some((entries_lost, what)) = damage {
            segment.damaged = true;
            recovered.damages.push(Damage { file: self.path.clone(), entries_lost, what });
        }
        if let Ok(bytes) = access::read_small(&files::marks(dir, self.number), format::LARGEST_MARKS)
            && let Some(marks) = format::decode_marks(&bytes, segment.check)
        {
            segment.apply_marks(&marks);
        }
        segment.sleep(); // before the next one is read: what a start needs does not grow with the journal
        if segment.entries() == 0 && !segment.damaged {
            tidy(&self.path); // nothing was ever promised in it
            tidy(&files::marks(dir, self.number));
            return Ok(None);
        }
        Ok(Some(segment))
    }

    /// A file in which no record could be told from anything else. Blank, it was made ready and never used.
    fn without_marker(
        self,
        dir: &Path,
        file: &File,
        promise: Option<Previous>,
        recovered: &mut Recovered,
    ) -> Result<Option<Segment>, OpenError> {
        if promise.is_none_or(Previous::is_none) && scan::is_blank(file).map_err(OpenError::at(&self.path))? {
            tidy(&self.path);
            return Ok(None);
        }
        let kept = files::damaged(dir, self.number);
        fs::rename(&self.path, kept).and_then(|()| files::sync_dir(dir)).map_err(OpenError::at(&self.path))?;
        tidy(&files::marks(dir, self.number));
        let entries_lost = promise.map_or(0, |promise| promise.entries);
        recovered.damages.push(Damage { file: self.path, entries_lost, what: "nothing in it can be read" });
        Ok(None)
    }
}

/// What of a surveyed segment was promised and is not there: how many entries, and a word on it. `cut` says that the
/// file is shorter than any that was written to the end.
pub(super) fn loss(survey: &Survey, promise: Option<Previous>, cut: bool) -> Option<(u32, &'static str)> {
    let promised = promise.unwrap_or_default();
    let synced = survey.synced.max(promised.end);
    let promised_hole = |&&hole: &&u32| u64::from(survey.offsets[hole as usize]) < synced;
    let holes = survey.holes.iter().filter(promised_hole).count();
    let holes = u32::try_from(holes).expect("an entry's index is 32 bits wide");
    if synced > survey.end {
        let found = u32::try_from(survey.offsets.len()).expect("an entry's index is 32 bits wide");
        return Some((holes + promised.entries.saturating_sub(found).max(1), "records at its end are damaged"));
    }
    if holes > 0 {
        return Some((holes, "records in it are damaged"));
    }
    if survey.unreadable {
        return Some((0, "the disk cannot read all of it"));
    }
    (promise.is_none() && cut).then_some((0, "its end is missing, and perhaps entries with it"))
}
