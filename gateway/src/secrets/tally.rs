//! Right and wrong signatures since the secrets were taken.
//!
//! A wrong client secret refuses every delivery, and Sentry sends none twice. From here it looks like this: signatures are
//! wrong, and none is right. Strangers can send wrong signatures at any time, too. So a right one ends the suspicion.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::show_time;

/// After this time with wrong signatures and no right one, the secret may be the wrong one.
const SUSPECT_AFTER: Duration = Duration::from_secs(30);
/// After this time without any signature, wrong ones say nothing more about the secret.
const FORGET_AFTER: Duration = Duration::from_secs(3600);

/// Counts signatures.
#[derive(Debug, Default)]
pub(super) struct Tally(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    last_right: Option<Instant>,
    /// Wrong ones since the last right one.
    wrong: u64,
    first_wrong: Option<Instant>,
    last_wrong: Option<Instant>,
}

impl Tally {
    /// Counts a right signature.
    pub(super) fn right(&self) {
        let last_right = Some(Instant::now());
        *self.counts() = Counts { last_right, ..Counts::default() };
    }

    /// Counts a wrong one.
    pub(super) fn wrong(&self) {
        let (now, mut counts) = (Instant::now(), self.counts());
        counts.wrong += 1;
        counts.first_wrong.get_or_insert(now);
        counts.last_wrong = Some(now);
    }

    /// The time of the last wrong signature since the last right one.
    pub(super) fn last_wrong(&self) -> Option<Instant> {
        self.counts().last_wrong
    }

    /// Sentences on wrong signatures without a right one, once they have lasted. `None` while nothing is suspect.
    pub(super) fn only_wrong(&self) -> Option<String> {
        let counts = self.counts();
        let (first, last) = (counts.first_wrong?, counts.last_wrong?);
        if first.elapsed() < SUSPECT_AFTER || last.elapsed() >= FORGET_AFTER {
            return None;
        }
        let at = |instant: Instant| SystemTime::now().checked_sub(instant.elapsed()).map(show_time).unwrap_or_default();
        let right = match counts.last_right {
            Some(right) => format!("The last right one came at {}.", at(right)),
            None => "None was right since the secrets were taken.".to_owned(),
        };
        let (wrong, since) = (counts.wrong, at(first));
        let plural = if wrong == 1 { "signature was" } else { "signatures were" };
        Some(format!(
            "{wrong} {plural} wrong and none right since {since}. {right} Either the client secret here is not Sentry's, \
             and every delivery is refused and lost. Or only strangers have sent requests since then."
        ))
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // The counts are whole at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_wrong_ones_are_suspect_and_a_right_one_ends_it() {
        let tally = Tally::default();
        advance(FORGET_AFTER).await;
        assert_eq!(tally.only_wrong(), None, "no request at all");
        tally.wrong();
        advance(SUSPECT_AFTER - Duration::from_secs(1)).await;
        tally.wrong();
        assert_eq!(tally.only_wrong(), None);
        advance(Duration::from_secs(1)).await;
        let told = tally.only_wrong().unwrap();
        assert!(told.starts_with("2 signatures were wrong") && told.contains("None was right since"), "{told}");
        tally.right();
        assert_eq!(tally.only_wrong(), None);
        tally.wrong();
        advance(SUSPECT_AFTER).await;
        assert!(tally.only_wrong().unwrap().contains("The last right one came at 20"));
    }

    #[tokio::test(start_paused = true)]
    async fn wrong_ones_between_right_ones_are_not_suspect() {
        let tally = Tally::default();
        for _ in 0..100 {
            tally.wrong();
            advance(SUSPECT_AFTER / 2).await;
            assert_eq!(tally.only_wrong(), None);
            tally.right();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stranger_of_long_ago_is_not_suspect() {
        let tally = Tally::default();
        tally.wrong();
        advance(FORGET_AFTER - Duration::from_secs(1)).await;
        assert!(tally.only_wrong().is_some());
        advance(Duration::from_secs(1)).await;
        assert_eq!(tally.only_wrong(), None);
    }
}
