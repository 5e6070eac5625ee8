//! A disk that hangs. A system call that does not come back reports nothing. So the thread that writes notes each
//! operation before it begins. The threads that serve requests look at that note.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// An operation that takes longer is a fault: Sentry waits a second for its answer.
const STALL_AFTER: Duration = Duration::from_secs(1);

/// An operation that the writer waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Bytes to be written to a segment.
    Write,
    /// A batch that was written to be made durable.
    Sync,
    /// The next segment to be made, and others to be removed for it.
    NewSegment,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Write => "a write",
            Operation::Sync => "a sync",
            Operation::NewSegment => "a new segment",
        })
    }
}

/// An operation of the writer that takes too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// The operation.
    pub operation: Operation,
    /// The time that it has taken so far.
    pub lasts: Duration,
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the journal's disk has not finished {} for {} s", self.operation, self.lasts.as_secs())
    }
}

/// The writer's operation in flight, if there is one, and when it began.
#[derive(Debug, Default)]
pub(super) struct InFlight(Mutex<Option<(Operation, Instant)>>);

impl InFlight {
    /// Notes that an operation begins. It ends when the guard is dropped. The writer has one at a time.
    pub(super) fn begin(&self, operation: Operation) -> Running<'_> {
        *self.lock() = Some((operation, Instant::now()));
        Running(self)
    }

    /// The operation in flight, if there is one, and how long it has taken so far.
    #[cfg(test)]
    pub(super) fn now(&self) -> Option<(Operation, Duration)> {
        self.lock().map(|(operation, begin)| (operation, begin.elapsed()))
    }

    /// The operation in flight, if it takes too long.
    pub(super) fn stall(&self) -> Option<Stall> {
        let (operation, begin) = (*self.lock())?;
        let lasts = begin.elapsed();
        (lasts > STALL_AFTER).then_some(Stall { operation, lasts })
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Operation, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // it is only ever replaced
    }
}

/// An operation in flight.
pub(super) struct Running<'a>(&'a InFlight);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}
