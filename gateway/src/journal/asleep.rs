//! Waking segments: what memory does not hold of them is read back from the index at the end of their files.
//! [`super::segment`] says what that is, [`super::table`] which of them is to be woken.
//!
//! Several may want the same segment awake: each reads its index, and whoever is first installs it.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::format::{Marker, Previous, Trailer};
use super::scan::{self, Survey};
use super::{Journal, read, recover};

/// A segment that sleeps, for somebody who wants it awake.
#[derive(Debug)]
pub(super) struct Sleeper {
    /// Its number, where its records end, and how many they are.
    pub(super) previous: Previous,
    pub(super) marker: Marker,
    pub(super) path: Arc<Path>,
}

/// What its file says of its entries.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) offsets: Vec<u32>,
    /// Unix time, seconds.
    pub(super) received: Vec<u32>,
    /// Entries that the file has lost.
    pub(super) holes: Vec<u32>,
    /// Where the last record ends.
    pub(super) end: u64,
    /// The index says all this; else it is damaged, and the records were read.
    pub(super) by_index: bool,
    /// How many entries are lost, and a word on it, if the file is damaged.
    pub(super) damage: Option<(u32, &'static str)>,
}

impl Sleeper {
    /// Reads the index, or as a start would, where that is damaged, the records. Each of these is checked when it is
    /// read to be published. Blocks.
    ///
    /// # Errors
    /// The disk does not give enough of the file to know every entry.
    pub(super) fn read(&self) -> io::Result<Found> {
        let Previous { end, entries, .. } = self.previous;
        let file = read::open(&self.path)?;
        let expected =
            |trailer: &Trailer| (trailer.marker, trailer.end, trailer.entries) == (self.marker, end, entries);
        if let Some((_, offsets, received)) = scan::read_index(&file).filter(|(trailer, ..)| expected(trailer)) {
            return Ok(Found { offsets, received, holes: Vec::new(), end, by_index: true, damage: None });
        }
        let survey = scan::survey(&file, self.marker, false)?;
        let damage = recover::loss(&survey, Some(self.previous), false);
        if survey.unreadable && damage.is_some_and(|(lost, _)| lost > 0) {
            return Err(io::Error::other("neither the index nor all of the records can be read"));
        }
        let Survey { mut offsets, mut received, mut holes, end, .. } = survey;
        let last = received.last().copied().unwrap_or(0);
        // What is lost at the end, the survey does not know.
        for index in offsets.len()..entries as usize {
            holes.push(u32::try_from(index).expect("below a 32-bit count"));
            offsets.push(u32::try_from(end).unwrap_or(u32::MAX));
            received.push(last);
        }
        Ok(Found { offsets, received, holes, end, by_index: false, damage })
    }
}

impl Journal {
    /// Wakes a segment, away from the threads that serve requests and without holding the table up meanwhile. What is
    /// wrong with its file is counted and told.
    ///
    /// # Errors
    /// The disk does not give what it takes, or the runtime goes down: it sleeps on.
    pub(super) async fn wake(&self, sleeper: Sleeper) -> io::Result<()> {
        let journal = self.clone();
        let woken = tokio::task::spawn_blocking(move || journal.wake_now(&sleeper)).await;
        woken.unwrap_or_else(|ended| Err(io::Error::other(ended)))
    }

    fn wake_now(&self, sleeper: &Sleeper) -> io::Result<()> {
        let (shared, file) = (&self.0.shared, &sleeper.path);
        match sleeper.read() {
            Ok(found) => {
                let damage = found.damage;
                let only_index = damage.is_none() && !found.by_index;
                if !shared.table().wake(sleeper, found) {
                    return Ok(()); // somebody else was quicker
                }
                shared.appended.notify_waiters();
                if let Some((entries_lost, what)) = damage {
                    recover::Damage { file: file.to_path_buf(), entries_lost, what }.tell();
                } else if only_index {
                    tracing::warn!(file = %file.display(), "the index of a segment is damaged; none of its entries is");
                }
                Ok(())
            }
            Err(error) => {
                // `None`: let go meanwhile, or woken by another caller.
                let Some(again_after) = shared.table().give_up(sleeper, &error.to_string()) else { return Ok(()) };
                tracing::error!(
                    file = %file.display(),
                    entries = sleeper.previous.entries,
                    ?again_after,
                    %error,
                    "the disk does not give a segment of the journal; it is read again, and delivered once the disk gives it"
                );
                Err(error)
            }
        }
    }
}
