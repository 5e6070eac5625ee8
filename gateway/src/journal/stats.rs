//! What the journal tells about itself: for metrics, for readiness, and in an append's error.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::stall::Stall;
use super::state::{State, Tally};

/// Upper bounds of the buckets of [`Syncs`], seconds.
pub const SYNC_BUCKETS: [f64; 12] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 0.5, 1.0];

/// How long writing and syncing a batch took.
#[derive(Debug, Clone, Default)]
pub struct Syncs {
    /// Batches synced.
    pub count: u64,
    /// Time spent on them.
    pub sum: Duration,
    /// How many took up to the bound in [`SYNC_BUCKETS`] and longer than the one before it. Longer ones than the
    /// last bound are in `count` only.
    pub buckets: [u64; SYNC_BUCKETS.len()],
}

impl Syncs {
    pub(super) fn record(&mut self, took: Duration) {
        self.count += 1;
        self.sum += took;
        if let Some(bucket) = SYNC_BUCKETS.iter().position(|&bound| took.as_secs_f64() <= bound) {
            self.buckets[bucket] += 1;
        }
    }
}

/// What is counted from the start of this process on.
#[derive(Debug, Clone, Default)]
pub(super) struct Counters {
    pub(super) syncs: Syncs,
    pub(super) damaged_records: u64,
    pub(super) unreadable_records: u64,
    pub(super) dropped_unconfirmed: u64,
}

/// One state's share of the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The state.
    pub state: State,
    /// How many entries are in it and how many bytes their records take.
    pub tally: Tally,
    /// When the oldest of them was received, to the second.
    pub oldest: Option<SystemTime>,
}

/// The entries that no worker has confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unsettled {
    /// How many.
    pub entries: u64,
    /// When the oldest of them was received, to the second.
    pub oldest: Option<SystemTime>,
}

/// A snapshot of the whole journal.
#[derive(Debug, Clone)]
pub struct Stats {
    /// One for each of [`State::ALL`], in that order.
    pub shares: [Share; State::ALL.len()],
    /// Segment files in use.
    pub segments: usize,
    /// The limit of what follows.
    pub max_bytes_on_disk: u64,
    /// Bytes that all files of the journal take, what is only reserved included.
    pub bytes_on_disk: u64,
    /// Bytes of appends that wait for the disk.
    pub bytes_waiting: usize,
    /// Batches synced since the start.
    pub syncs: Syncs,
    /// Records found damaged since the start, at recovery or when they were read. Each is an entry that is lost.
    pub damaged_records: u64,
    /// How often since the start the disk did not give a record.
    pub unreadable_records: u64,
    /// Entries that the disk has not given, and that are read again later.
    pub unreadable_entries: u64,
    /// Damaged files kept for people.
    pub damaged_files: usize,
    /// Published entries let go without a receipt since the start, to make room.
    pub dropped_unconfirmed: u64,
    /// Journalled entries that are not published before the stream was asked for them.
    pub unverified: u64,
}

impl Stats {
    /// The share of one state.
    pub fn share(&self, state: State) -> Share {
        self.shares[state as usize]
    }

    /// Entries that can be published now: all that are journalled, but those that the disk does not give, and those that
    /// the stream is asked for first.
    pub fn to_publish(&self) -> u64 {
        self.share(State::Journalled).tally.entries.saturating_sub(self.unreadable_entries + self.unverified)
    }

    /// What is answered 202 and not known to be stored.
    pub fn unsettled(&self) -> Unsettled {
        let unsettled = [State::Journalled, State::Published, State::SetAside].map(|state| self.share(state));
        Unsettled {
            entries: unsettled.iter().map(|share| share.tally.entries).sum(),
            oldest: unsettled.iter().filter_map(|share| share.oldest).min(),
        }
    }
}

/// Why an append was not taken. Nothing was promised; the sender may try again.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// The journal has its full size, and nothing in it may go.
    #[error(
        "the journal has reached its limit of {limit} bytes and holds only deliveries that are nowhere else; \
             it takes more as soon as some of them are published"
    )]
    Full {
        /// The limit, bytes.
        limit: u64,
    },
    /// The disk has no space (or quota) for another segment.
    #[error("the journal's disk is full: {0}")]
    DiskFull(#[source] Arc<io::Error>),
    /// Writing or syncing failed.
    #[error("the journal's disk fails: {0}")]
    Disk(#[source] Arc<io::Error>),
    /// The disk hangs. The entry may be on it later all the same, and is then published.
    #[error("{0}")]
    Stalled(Stall),
    /// The disk does not hang, and is too slow for what waits. The entry may be on it later all the same, and is then
    /// published.
    #[error("the journal's disk is slow: the delivery has waited {} s for it", waited.as_secs())]
    Slow {
        /// The longest that an append waits.
        waited: Duration,
    },
    /// More bytes wait for the disk than may.
    #[error("{limit} bytes already wait to be written to the journal")]
    Busy {
        /// The limit, bytes.
        limit: usize,
    },
    /// One entry larger than any journal takes.
    #[error("an entry of {bytes} bytes is larger than the {limit} a journal takes")]
    TooLarge {
        /// Bytes of its header block and body.
        bytes: usize,
        /// The limit, bytes.
        limit: usize,
    },
    /// The gateway is going down.
    #[error("the journal is shut down")]
    ShutDown,
}

impl AppendError {
    pub(super) fn of_disk(error: io::Error) -> AppendError {
        // A quota is mended as a full disk is: by making room.
        let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        let error = Arc::new(error);
        if full { AppendError::DiskFull(error) } else { AppendError::Disk(error) }
    }
}

/// What keeps the journal from taking entries.
#[derive(Debug, Clone)]
pub struct Trouble {
    /// Since when.
    pub since: SystemTime,
    /// What appends are told.
    pub problem: AppendError,
}
