//! How much memory the bodies of all requests may take, and who gets it where there is not enough for all.
//!
//! What is in flight need not be in memory: what is not read waits in the kernel's buffers, and behind them at its sender.
//! - A body of at most [`SMALL`] bytes takes memory as its bytes come, and never waits for larger ones: of all that may be in
//!   flight, a quarter is its kind's alone, in a semaphore of its own. Small bodies take what is left for large ones only
//!   beyond that quarter. Nearly all deliveries are small.
//! - Larger ones take memory as their bytes come, too, while together they stay within the *window*.
//! - Beyond the window one waits, unread, for a *turn*: memory for all that may still come of it, first come, first served.
//!   Read side by side all of them would be late; one after the other, as many come in time as can. Who has a turn needs
//!   nothing from anybody, so bodies that are half read never wait for each other.
//! - Who waits counts as in flight with all that may still come of it. So what could not be done in time is turned away
//!   at once.
//! - Who announces much and sends nothing holds nothing. Who is overdue makes room as soon as another needs it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::{Duration, Instant, sleep_until, timeout};

use crate::reject::Reject;
use crate::settings::Limits;

/// A body that announces no more than this is small.
pub(super) const SMALL: usize = 64 * 1024;
/// From this age on an unfinished body makes room for another: Sentry waits a second for its answer, so nobody waits for
/// this one any more. Else a few slow senders of large bodies could hold all the memory there is for them.
const OVERDUE_AFTER: Duration = Duration::from_secs(1);
/// How long a body waits for the room that others were told to make.
const ROOM_WITHIN: Duration = Duration::from_millis(500);
/// How long a turn may last while others wait for theirs: so that these outlive whoever has one and sends nothing.
const TURN_FOR: Duration = Duration::from_millis(500);

/// The room that there is for bodies, in bytes.
#[derive(Debug)]
pub(super) struct Room {
    limit: usize,
    /// Of `limit` in all, what may still be in flight of any body.
    flight: Semaphore,
    /// The rest of `limit`: what may still be in flight of small bodies alone.
    reserve: Semaphore,
    /// The memory that large bodies may still take as their bytes come.
    window: Semaphore,
    /// The memory that they may still be promised, each all of its own.
    turns: Semaphore,
    /// Bodies being read.
    unfinished: Line,
    /// Those of them that have a turn.
    in_turn: Line,
    /// A body gave back what it held.
    left: Notify,
}

/// Bodies in the order in which they came here.
#[derive(Debug)]
struct Line {
    bodies: Mutex<BTreeMap<u64, Standing>>,
    joined: AtomicU64,
    /// For how long a body may be here while others need its room.
    at_most: Duration,
}

#[derive(Debug)]
struct Standing {
    since: Instant,
    /// The body has to make room.
    evicted: Arc<Notify>,
}

/// A body's place in a line, left when this is dropped.
#[derive(Debug)]
struct Place<'a> {
    line: &'a Line,
    number: u64,
}

/// What a body holds of the room.
#[derive(Debug)]
pub(super) struct Share<'a> {
    memory: Memory<'a>,
    bytes: usize,
    most: usize,
    small: bool,
    since: Instant,
    evicted: Arc<Notify>,
    room: &'a Room,
    _unfinished: Place<'a>,
    in_turn: Option<Place<'a>>,
}

/// Room that is held until this is dropped.
#[derive(Debug)]
pub struct Memory<'a> {
    flight: SemaphorePermit<'a>,
    reserve: SemaphorePermit<'a>,
    window: SemaphorePermit<'a>,
    turn: SemaphorePermit<'a>,
    /// Last: told when all of it is given back.
    _left: Told<'a>,
}

#[derive(Debug)]
struct Told<'a>(&'a Notify);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.notify_waiters();
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.line.bodies().remove(&self.number);
    }
}

impl Room {
    /// The room that these limits leave.
    pub(super) fn new(limits: &Limits) -> Self {
        let limit = limits.bytes_in_flight.min(Semaphore::MAX_PERMITS);
        // Not so much that the largest body could never be taken.
        let reserve = (limit / 4).min(limit - limits.body_bytes);
        Room {
            limit,
            flight: Semaphore::new(limit - reserve),
            reserve: Semaphore::new(reserve),
            window: Semaphore::new(limit / 16),
            // The largest body has to have its turn some time.
            turns: Semaphore::new((limit / 8).max(limits.body_bytes)),
            unfinished: Line::new(OVERDUE_AFTER),
            in_turn: Line::new(TURN_FOR),
            left: Notify::new(),
        }
    }

    /// How many bytes are in flight: in memory, or still to come of bodies that have a turn or wait for it.
    pub(super) fn in_flight(&self) -> usize {
        self.limit - self.flight.available_permits() - self.reserve.available_permits()
    }

    /// Lets a body in, which holds nothing yet. It will have `most` bytes, or fewer where it does not say.
    pub(super) fn enter(&self, most: usize, says: bool) -> Share<'_> {
        let evicted = Arc::<Notify>::default();
        Share {
            memory: Memory {
                flight: none(&self.flight),
                reserve: none(&self.reserve),
                window: none(&self.window),
                turn: none(&self.turns),
                _left: Told(&self.left),
            },
            bytes: 0,
            most,
            small: says && most <= SMALL,
            since: Instant::now(),
            room: self,
            _unfinished: self.unfinished.join(&evicted),
            in_turn: None,
            evicted,
        }
    }

    /// Lets that many more bytes be in flight; where there is no room, those that are overdue make it.
    async fn let_in(&self, bytes: usize, small: bool) -> Result<Flight<'_>, Reject> {
        let wanted = permits(bytes)?;
        let reserve = || if small { self.reserve.try_acquire_many(wanted).ok().map(Flight::OfSmall) } else { None };
        let flight = || self.flight.try_acquire_many(wanted).ok().map(Flight::OfAny);
        // Never by waiting in the semaphore's own queue: it gives a waiter what is free piece by piece.
        let freed = async {
            loop {
                let left = self.left.notified();
                if let Some(held) = reserve().or_else(flight) {
                    return Some(held);
                }
                if !self.unfinished.evict_oldest() {
                    return None;
                }
                let _ = timeout(ROOM_WITHIN / 10, left).await; // then there is room, or another has to go
            }
        };
        let freed = timeout(ROOM_WITHIN, freed).await.ok().flatten();
        freed.ok_or(Reject::TooManyBytes)
    }
}

/// Bytes that may be in flight, by the semaphore that they are from.
enum Flight<'a> {
    OfSmall(SemaphorePermit<'a>),
    OfAny(SemaphorePermit<'a>),
}

impl<'a> Memory<'a> {
    fn add(&mut self, flight: Flight<'a>) {
        match flight {
            Flight::OfSmall(held) => self.reserve.merge(held),
            Flight::OfAny(held) => self.flight.merge(held),
        }
    }
}

impl<'a> Share<'a> {
    /// How many bytes of memory the body may take.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns when the body has to make room.
    pub(super) async fn evicted(&self) {
        self.evicted.notified().await;
    }

    /// The body is read: it makes room for nobody any more. What it holds is given back with what is returned.
    pub(super) fn whole(self) -> Memory<'a> {
        self.memory
    }

    /// Takes memory for `needed` bytes in all; for `wanted`, or even all that may come, where there is room.
    ///
    /// # Errors
    /// [`Reject::TooManyBytes`] where there is none in time.
    pub(super) async fn grow(&mut self, needed: usize, wanted: usize) -> Result<(), Reject> {
        let (room, held) = (self.room, self.bytes);
        let wanted = wanted.min(self.most).max(needed);
        let more = wanted.saturating_sub(held);
        if self.small {
            self.memory.add(room.let_in(more, true).await?);
            self.bytes = wanted;
        } else if let Ok(window) = room.window.try_acquire_many(permits(more)?) {
            self.memory.add(room.let_in(more, false).await?);
            self.memory.window.merge(window);
            self.bytes = wanted;
        } else {
            let rest = self.most.max(needed) - held;
            self.memory.add(room.let_in(rest, false).await?);
            let turn = self.turn(rest).await?;
            self.memory.turn.merge(turn);
            self.bytes = held + rest;
        }
        Ok(())
    }

    /// Waits for a turn of that many bytes, about as long as the sender waits for its answer.
    async fn turn(&mut self, bytes: usize) -> Result<SemaphorePermit<'a>, Reject> {
        let room = self.room;
        let turn = room.turns.acquire_many(permits(bytes)?);
        let others_make_room = async {
            loop {
                sleep_until(room.in_turn.evict_overdue()).await;
            }
        };
        let until = (self.since + OVERDUE_AFTER).max(Instant::now() + ROOM_WITHIN);
        let turn = tokio::select! {
            biased; // a turn that has come is taken, however late it is noticed
            turn = turn => turn.map_err(|_| Reject::TooManyBytes)?,
            () = others_make_room => return Err(Reject::TooManyBytes),
            () = self.evicted() => return Err(Reject::TooManyBytes),
            () = sleep_until(until) => return Err(Reject::TooManyBytes),
        };
        self.in_turn = Some(room.in_turn.join(&self.evicted));
        Ok(turn)
    }
}

impl Line {
    fn new(at_most: Duration) -> Self {
        Line { bodies: Mutex::default(), joined: AtomicU64::new(0), at_most }
    }

    fn join(&self, evicted: &Arc<Notify>) -> Place<'_> {
        let number = self.joined.fetch_add(1, Ordering::Relaxed);
        self.bodies().insert(number, Standing { since: Instant::now(), evicted: evicted.clone() });
        Place { line: self, number }
    }

    /// Has the oldest make room; false where it has not been here too long.
    fn evict_oldest(&self) -> bool {
        let mut bodies = self.bodies();
        let Some(oldest) = bodies.first_entry().filter(|oldest| oldest.get().since.elapsed() >= self.at_most) else {
            return false;
        };
        oldest.remove().evicted.notify_one();
        true
    }

    /// Has all make room that have been here too long, and tells when to look again.
    fn evict_overdue(&self) -> Instant {
        while self.evict_oldest() {}
        let oldest = self.bodies().first_key_value().map(|(_, oldest)| oldest.since);
        oldest.unwrap_or_else(Instant::now) + self.at_most
    }

    fn bodies(&self) -> MutexGuard<'_, BTreeMap<u64, Standing>> {
        // Nothing that holds this can panic half-way.
        self.bodies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As many bytes as a semaphore's permits.
fn permits(bytes: usize) -> Result<u32, Reject> {
    u32::try_from(bytes).map_err(|_| Reject::TooManyBytes)
}

/// Nothing of it, to be added to.
fn none(of: &Semaphore) -> SemaphorePermit<'_> {
    of.try_acquire_many(0).expect("nothing can always be had, and none of these is ever closed")
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use crate::Config;

    const MIB: usize = 1 << 20;

    /// Room for 64 MiB in flight, of which large bodies leave 16; their window is 4 MiB, their turns
    /// are 8.
    fn room() -> Room {
        let set = |variable: &str| match variable {
            "SENTRY_CLIENT_SECRET" => Some("a-secret-of-the-tests".to_owned()),
            "GATEWAY_MAX_BYTES_IN_FLIGHT" => Some("64MiB".to_owned()),
            _ => None,
        };
        Room::new(&Config::load(&set).unwrap().limits)
    }

    /// As many bytes as the body has.
    async fn all(share: &mut Share<'_>) -> Result<(), Reject> {
        share.grow(share.most, share.most).await
    }

    #[tokio::test]
    async fn beyond_the_window_turns_come_in_order_and_what_is_given_back_is_there_for_the_next() {
        let room = room();
        let [mut first, mut second, mut third, mut fourth] = [4, 8, 5, 3].map(|mib| room.enter(mib * MIB, true));
        all(&mut first).await.unwrap(); // the whole window
        all(&mut second).await.unwrap(); // all turns
        {
            let (mut third, mut fourth) = (Box::pin(all(&mut third)), Box::pin(all(&mut fourth)));
            assert!(third.as_mut().now_or_never().is_none() && fourth.as_mut().now_or_never().is_none());
            assert_eq!(room.in_flight(), 20 * MIB, "who waits counts with all that is to come");
            let second = second.whole();
            assert!(third.as_mut().now_or_never().is_none(), "a body in use takes its memory");
            drop(second);
            third.await.unwrap();
            fourth.await.unwrap();
        }
        drop((first, third, fourth));
        assert_eq!(room.in_flight(), 0);
        assert_eq!((room.window.available_permits(), room.turns.available_permits()), (4 * MIB, 8 * MIB));
    }

    #[tokio::test]
    async fn small_bodies_wait_for_no_large_one_and_those_that_only_announce_hold_nothing() {
        let room = room();
        let announced: Vec<_> = (0..100).map(|_| room.enter(8 * MIB, true)).collect();
        assert_eq!(room.in_flight(), 0);
        let mut large: Vec<_> = [4, 8, 8, 8, 8, 8, 8].map(|mib| room.enter(mib * MIB, true)).into();
        let mut waiting: Vec<_> = large.iter_mut().map(|share| Box::pin(all(share))).collect();
        let answers: Vec<_> = waiting.iter_mut().map(|body| body.as_mut().now_or_never()).collect();
        // One fills the window, one has its turn, four wait, and there is no more room in flight.
        assert_eq!(answers.iter().filter(|answer| matches!(answer, Some(Ok(())))).count(), 2);
        assert_eq!(answers.iter().filter(|answer| answer.is_none()).count(), 4);
        assert!(matches!(answers[6], Some(Err(Reject::TooManyBytes))), "{answers:?}");
        let mut small = room.enter(SMALL, true);
        all(&mut small).now_or_never().expect("a small body waits for nobody").unwrap();
        drop(announced);
    }

    #[tokio::test]
    async fn who_has_a_turn_and_sends_nothing_makes_room_for_who_waits() {
        let room = room();
        let [mut window, mut stalled, mut next] = [4, 8, 8].map(|mib| room.enter(mib * MIB, true));
        all(&mut window).await.unwrap();
        all(&mut stalled).await.unwrap();
        let make_room = async {
            stalled.evicted().await;
            drop(stalled);
        };
        let (next, ()) = tokio::join!(all(&mut next), make_room);
        next.unwrap();
    }

    #[tokio::test]
    async fn nobody_waits_longer_than_its_sender() {
        let room = room();
        let [mut window, mut reading, mut waits] = [4, 8, 8].map(|mib| room.enter(mib * MIB, true));
        all(&mut window).await.unwrap();
        all(&mut reading).await.unwrap();
        let _in_use = reading.whole(); // read, and not journalled yet: nothing that could be asked to make room
        assert!(matches!(all(&mut waits).await, Err(Reject::TooManyBytes)));
        drop(waits);
        assert_eq!(room.in_flight(), 12 * MIB, "who gave up counts no more");
    }

    #[test]
    fn a_large_body_never_takes_what_is_kept_for_small_ones_even_for_an_instant() {
        let (room, runtime) = (room(), tokio::runtime::Runtime::new().unwrap());
        let take = |bytes: usize| {
            let _clock = runtime.enter();
            let mut share = room.enter(bytes, true);
            all(&mut share).now_or_never().expect("there is room at once").map(|()| share.whole())
        };
        let _held: Vec<_> = (0..640).map(|_| take(SMALL).unwrap()).collect(); // 40 MiB
        std::thread::scope(|scope| {
            let large = scope.spawn(|| (0..50_000).for_each(|_| drop(take(8 * MIB))));
            while !large.is_finished() {
                take(SMALL).expect("what is left for large bodies is none of a small one's business");
            }
        });
    }
}
