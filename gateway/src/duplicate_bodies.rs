//! Duplicate bodies: a captured delivery that is posted again under another `Request-ID`.
//!
//! Sentry signs no time, so a captured body and its signature stay valid until the client secret is rotated. Each post of
//! them with a new `Request-ID` is a delivery of its own. Here they are recognised for [`KEPT_FOR`], and counted.
//!
//! - A body is recognised by the signature that was right for it: an HMAC-SHA256, so a digest with a secret key, which is
//!   there already. Nothing is hashed for this. A replayer has no other signature: altered bytes that the canonical form
//!   does not see come with the same one. So two bodies that differ only there, both signed over that form, are one here.
//! - A body enters the window after its journal append succeeded. So what was answered 503 is no duplicate when it comes again,
//!   and two that come at the same moment may both be taken.
//! - The same `Request-ID` and body again (a proxy's resend) is the same delivery, and no duplicate.
//! - The window is this process's own: another gateway, or this one after a restart, does not know it.
//! - Memory: 3.7 MB at [`BODIES_MAX`] bodies. Beyond that the oldest go first.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shared::delivery::DeliveryId;

use crate::signature::BodyDigest;

/// A body is recognised for this long after it was accepted first.
const KEPT_FOR: Duration = Duration::from_secs(60 * 60);
/// Bodies that are recognised at once.
const BODIES_MAX: usize = 65_536;

/// The treatment of a duplicate body: `GATEWAY_DUPLICATE_BODIES`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DuplicateBodies {
    /// It is a delivery of its own.
    Accept,
    /// It is the first delivery of this body: the same answer, and no second entry in the journal.
    Once,
}

impl DuplicateBodies {
    /// The choice of that name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "accept" => Some(DuplicateBodies::Accept),
            "once" => Some(DuplicateBodies::Once),
            _ => None,
        }
    }
}

/// Recognises duplicate bodies.
#[derive(Debug)]
pub struct SeenBodies {
    duplicates: DuplicateBodies,
    window: Mutex<Window>,
}

impl SeenBodies {
    /// An empty window.
    pub fn new(duplicates: DuplicateBodies) -> Self {
        SeenBodies { duplicates, window: Mutex::new(Window::new(BODIES_MAX)) }
    }

    /// The delivery whose answer this body gets. `None` when the body is to be taken. `id` is the id that it would have.
    pub fn first_delivery(&self, body: BodyDigest, id: &DeliveryId) -> Option<DeliveryId> {
        if self.duplicates == DuplicateBodies::Accept {
            return None;
        }
        let first = self.lock().find(body, Instant::now()).map(DeliveryId::from_bits)?;
        (first != *id).then_some(first)
    }

    /// Remembers a body that is in the journal as delivery `id`. Returns the delivery that had it before, which is `id` again
    /// after a resend.
    pub fn journalled(&self, body: BodyDigest, id: &DeliveryId) -> Option<DeliveryId> {
        self.lock().remember(body, id.to_bits()?, Instant::now()).map(DeliveryId::from_bits)
    }

    fn lock(&self) -> MutexGuard<'_, Window> {
        // The worst that a panic leaves behind is a body that is not recognised.
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bodies with the id of the delivery that had each first. The oldest is at the front of `bodies`.
///
/// Bodies are numbered, beginning with 1, and `front` is the number of the oldest. A body is found by the low bits of its
/// digest: `newest` has the number of the last one with the same bits, and each has the number of the one before. A number
/// below `front` is that of a body that is gone, and ends the search. A `HashMap` would move all its entries now and then,
/// under the lock.
#[derive(Debug)]
struct Window {
    max: usize,
    begun: Instant,
    front: u64,
    bodies: VecDeque<Body>,
    newest: Vec<u64>,
}

/// 48 bytes: the id as bytes, because a `u128` would be aligned to 16.
#[derive(Debug)]
struct Body {
    digest: BodyDigest,
    id: [u8; 16],
    /// Number of the last body before with the same low bits.
    before: u64,
    /// Seconds after [`Window::begun`].
    accepted: u32,
}

impl Window {
    /// Reserves the memory for all bodies at once. The system provides it as it is used.
    fn new(max: usize) -> Self {
        let (bodies, newest) = (VecDeque::with_capacity(max), vec![0; max]);
        Window { max, begun: Instant::now(), front: 1, bodies, newest }
    }

    /// The id of the delivery that had this body first.
    fn find(&self, digest: BodyDigest, now: Instant) -> Option<u128> {
        let mut number = self.newest[self.bucket(digest)];
        loop {
            let body = self.bodies.get(usize::try_from(number.checked_sub(self.front)?).ok()?)?;
            if body.digest == digest {
                return (!self.is_over(body, now)).then(|| u128::from_be_bytes(body.id));
            }
            number = body.before;
        }
    }

    /// Finds it like [`Window::find`]. When there is none, delivery `id` becomes the first.
    fn remember(&mut self, digest: BodyDigest, id: u128, now: Instant) -> Option<u128> {
        // Two at a time: more than are added. No call pays for all that are over after a silence.
        for _ in 0..2 {
            if self.bodies.len() >= self.max || self.bodies.front().is_some_and(|oldest| self.is_over(oldest, now)) {
                self.bodies.pop_front();
                self.front += 1;
            }
        }
        let first = self.find(digest, now);
        if first.is_none() {
            let (bucket, number) = (self.bucket(digest), self.front + self.bodies.len() as u64);
            let before = std::mem::replace(&mut self.newest[bucket], number);
            self.bodies.push_back(Body { digest, id: id.to_be_bytes(), before, accepted: self.seconds(now) });
        }
        first
    }

    fn bucket(&self, digest: BodyDigest) -> usize {
        // The remainder is less than a `usize`.
        (digest.0[0] % self.newest.len() as u64) as usize
    }

    fn is_over(&self, body: &Body, now: Instant) -> bool {
        u64::from(self.seconds(now).saturating_sub(body.accepted)) >= KEPT_FOR.as_secs()
    }

    /// Seconds since the window began: 136 years of them.
    fn seconds(&self, now: Instant) -> u32 {
        u32::try_from(now.saturating_duration_since(self.begun).as_secs()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: u64) -> BodyDigest {
        BodyDigest([number, !number])
    }

    #[test]
    fn a_body_is_recognised_for_an_hour_after_it_was_accepted_first() {
        let mut window = Window::new(10);
        let begun = window.begun;
        let times = [0, 30, 59, 60, 90, 119, 120].map(|minutes| begun + Duration::from_secs(60 * minutes));
        let found = times.map(|now| window.remember(digest(1), 1, now).is_some());
        assert_eq!(found, [false, true, true, false, true, true, false]);
        assert_eq!(window.bodies.len(), 1);
    }

    #[test]
    fn beyond_the_limit_the_oldest_go_first() {
        let mut window = Window::new(100);
        let now = window.begun;
        let reserved = window.bodies.capacity();
        for number in 0..1000 {
            assert_eq!(window.remember(digest(number), u128::from(number), now), None);
        }
        for number in 0..1000 {
            let known = (900..1000).contains(&number).then_some(u128::from(number));
            assert_eq!(window.find(digest(number), now), known, "{number}");
        }
        assert_eq!((window.bodies.len(), window.bodies.capacity()), (100, reserved), "nothing was moved");
    }

    #[test]
    fn half_a_digest_in_common_is_no_duplicate() {
        let mut window = Window::new(10);
        let now = window.begun;
        assert_eq!(window.remember(BodyDigest([1, 1]), 1, now), None);
        assert_eq!(window.remember(BodyDigest([1, 2]), 2, now), None);
        assert_eq!(window.find(BodyDigest([1, 1]), now), Some(1));
        assert_eq!(window.find(BodyDigest([1, 2]), now), Some(2));
        assert_eq!(window.find(BodyDigest([11, 1]), now), None);
        for number in 10..30 {
            window.remember(digest(number), 3, now);
        }
        assert_eq!(window.find(BodyDigest([1, 2]), now), None);
        assert_eq!(window.bodies.len(), 10);
    }

    #[test]
    fn a_silence_is_forgotten_step_by_step() {
        let mut window = Window::new(1000);
        let (begin, later) = (window.begun, window.begun + Duration::from_secs(60 * 61));
        for number in 0..500 {
            window.remember(digest(number), 1, begin);
        }
        assert!((0..500).all(|number| window.find(digest(number), later).is_none()));
        for number in 0..600 {
            assert_eq!(window.remember(digest(number), 2, later), None, "{number}");
        }
        assert_eq!(window.bodies.len(), 600);
        assert!((0..600).all(|number| window.find(digest(number), later) == Some(2)));
    }

    #[test]
    fn the_same_id_again_is_no_duplicate() {
        let [first, other] = [1, 2].map(DeliveryId::from_bits);
        for duplicates in [DuplicateBodies::Accept, DuplicateBodies::Once] {
            let seen = SeenBodies::new(duplicates);
            assert_eq!(seen.first_delivery(digest(1), &first), None);
            assert_eq!(seen.journalled(digest(1), &first), None);
            assert_eq!(seen.journalled(digest(1), &first), Some(first.clone()));
            assert_eq!(seen.first_delivery(digest(1), &first), None);
            let once = (duplicates == DuplicateBodies::Once).then(|| first.clone());
            assert_eq!(seen.first_delivery(digest(1), &other), once);
            assert_eq!(seen.journalled(digest(1), &other), Some(first.clone()), "two at the same moment");
        }
    }
}
