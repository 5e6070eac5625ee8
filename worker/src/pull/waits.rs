//! Batches that are being stored, and what those wait for that take long.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use crate::store::Delay;

/// A batch that is being stored.
#[derive(Debug)]
pub(super) struct InHand {
    deliveries: usize,
    pub(super) since: Instant,
    /// The sessions in PostgreSQL of its first and its second try, by process id. 0 where there is none.
    pub(super) sessions: [AtomicI32; 2],
}

impl InHand {
    pub(super) fn new(deliveries: usize) -> InHand {
        InHand { deliveries, since: Instant::now(), sessions: [0.into(), 0.into()] }
    }

    /// The process ids.
    pub(super) fn pids(&self) -> impl Iterator<Item = i32> {
        self.sessions.iter().map(|session| session.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }
}

/// The wait of a batch, in words.
#[derive(Debug)]
pub(super) struct Wait {
    deliveries: usize,
    since: Instant,
    what: String,
    /// The process that holds the lock, where it is one.
    pub(super) holder: Option<i32>,
}

impl Wait {
    /// Of the first of these batches that waits for a lock of another program's, else of the first. A second try waits for
    /// its first, which is no news.
    pub(super) fn of(slow: &[Arc<InHand>], delays: &[Delay]) -> Option<Wait> {
        let ours: Vec<i32> = slow.iter().flat_map(|batch| batch.pids()).collect();
        let holder = |delay: &Delay| delay.holder.as_ref().map(|holder| holder.pid).filter(|pid| !ours.contains(pid));
        let of = |batch: &InHand, delay: &Delay| Wait {
            deliveries: batch.deliveries,
            since: batch.since,
            what: delay.to_string(),
            holder: holder(delay),
        };
        let mut first = None;
        for batch in slow {
            for delay in batch.pids().flat_map(|pid| delays.iter().filter(move |delay| delay.pid == pid)) {
                if holder(delay).is_some() {
                    return Some(of(batch, delay));
                }
                first = first.or_else(|| Some(of(batch, delay)));
            }
        }
        first
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Wait { deliveries, since, what, holder: _ } = self;
        let time: Duration = since.elapsed();
        write!(f, "a batch of {deliveries} {what} for {} s", time.as_secs())
    }
}
