//! Confirming: the end-to-end argument. An entry is let go once the worker that stored it says so, and whatever else
//! happens to it on the way, it is looked after until then.
//!
//! - Receipts ([`crate::receipts`]) confirm entries. They may be lost, late, repeated, or meant for another journal.
//! - An entry without a receipt for `GATEWAY_CONFIRM_AFTER` is looked after: the stream is asked for the message at the
//!   sequence that was promised. There under its id, and not yet passed by the consumer: it waits on, however long
//!   PostgreSQL is away. Gone, another message in its place (a broker whose files went back in time uses sequences again),
//!   or passed without a receipt: it is published again under `<id>.<n>`. An entry that was repeated waits twice as long
//!   for the next time.
//! - An unverified entry (see [`crate::journal`]) is looked after at once: an earlier process published it, or JetStream
//!   called it a duplicate. It is not published again before the stream was asked. Without that rule each restart would put
//!   a copy of everything unconfirmed on the stream.
//! - At most a thousand a second are looked after, the oldest first. The stream's answers hold whole bodies ([`broker`]), so
//!   bytes bound a round, too. This bounds the memory of both programs and the reads of the stream.
//! - The check `reconciliation`, a log line and a metric tell that the stream cannot be asked. The entries wait meanwhile.

mod broker;

use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream as streams};
use shared::delivery::Delivery;
use shared::ops::Readiness;
use tokio::time::sleep;
use tracing::field::display;

use crate::journal::{Evidence, Journal, Place, Unconfirmed};
use crate::metrics::{Metrics, Repeat};
use crate::publish::Publisher;
use crate::receipts::ReceiptKey;
use broker::{Broker, Failure, Fate};

/// Messages asked for at once. The server cuts off a client for which more than 64 MiB wait; four bodies of 8 MiB in base64
/// are 43. These may come although the entries are small: other messages may have taken their places.
const AT_ONCE: usize = 4;
/// Entries in one round.
const A_ROUND: usize = 256;
/// Bytes of records in one round. A larger record is a round of its own.
const ROUND_BYTES: u64 = 4 << 20;
/// Time between the starts of two rounds while entries are due, longer for a larger record: a thousand entries and 16 MiB
/// a second.
const ROUND_TIME: Duration = Duration::from_millis(250);
/// Pause after a failure to ask.
const AFTER_FAILURE: Duration = Duration::from_secs(5);
/// A failure that lasts is logged once in this time.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// An entry that is repeated again and again waits at most this many times the confirm time, doubled each time.
const BACKOFF_MAX: u32 = 1 << 8;
/// The readiness check.
const CHECK: &str = "reconciliation";

/// Looks after entries that are unverified, or have no receipt after `confirm_after`. Without end.
pub async fn look_after(
    journal: &Journal,
    publisher: &Publisher,
    metrics: &Metrics,
    readiness: &Readiness,
    stream: &str,
    confirm_after: Duration,
) {
    readiness.set(CHECK, Ok("the stream was not asked yet".into()));
    let (key, after, told, well) = (ReceiptKey::new(journal.receipt_key()), None, None, false);
    let mut rounds = Rounds { journal, publisher, metrics, readiness, stream, confirm_after, key, after, told, well };
    loop {
        let begin = Instant::now();
        let pause = rounds.next().await;
        sleep(pause.saturating_sub(begin.elapsed())).await;
    }
}

struct Rounds<'a> {
    journal: &'a Journal,
    publisher: &'a Publisher,
    metrics: &'a Metrics,
    readiness: &'a Readiness,
    stream: &'a str,
    confirm_after: Duration,
    key: ReceiptKey,
    /// The next round begins after this entry; without one it begins with the oldest.
    after: Option<Place>,
    /// The failure that was logged last, and the time of that.
    told: Option<(String, Instant)>,
    /// The last question was answered.
    well: bool,
}

impl Rounds<'_> {
    /// One round. Returns the time from its start to that of the next.
    async fn next(&mut self) -> Duration {
        if !self.publisher.is_up() {
            return idle(self.confirm_after);
        }
        let found = self.journal.unconfirmed(self.confirm_after, self.after, A_ROUND);
        // The next round goes on where this one ends; at the end it begins again with the oldest.
        self.after = found.last().filter(|_| found.len() == A_ROUND).map(|last| last.place);
        let is_page = self.after.is_some();
        let mut due: Vec<_> = found.into_iter().filter(|entry| is_due(entry, self.confirm_after)).collect();
        if let Some(last) = cut(&mut due) {
            self.after = Some(last);
        }
        let pause = match due.is_empty() {
            true if !is_page => idle(self.confirm_after),
            _ => round_time(&due),
        };
        if due.is_empty() && self.well {
            return pause;
        }
        match self.look_after(due).await {
            Ok(()) => {
                self.tell_well();
                pause
            }
            Err(failure) => {
                self.tell_failure(failure);
                sleep(AFTER_FAILURE).await; // the failure itself may have taken as long
                Duration::ZERO
            }
        }
    }

    /// Asks the stream for these entries, and acts on its answers. The first failure ends the round.
    async fn look_after(&mut self, due: Vec<Unconfirmed>) -> Result<(), Failure> {
        let broker = Broker::look(self.publisher, self.stream).await?;
        if due.is_empty() {
            return broker.try_fetching().await;
        }
        let (journal, id, key) = (self.journal, self.journal.gateway_id(), self.key.clone());
        let (broker, key) = (&broker, &key);
        let asked = streams::iter(due).map(|entry| async move { (entry, broker.fate(&entry, id, key).await) });
        let mut asked = pin!(asked.buffer_unordered(AT_ONCE));
        while let Some((entry, fate)) = asked.next().await {
            match fate {
                Ok(fate) => settle(journal, self.metrics, &entry, fate).await,
                Err(failure) => {
                    // One that fails each time does not hold up those behind it.
                    self.after = Some(entry.place);
                    return Err(failure);
                }
            }
        }
        Ok(())
    }

    fn tell_well(&mut self) {
        if self.told.take().is_some() {
            tracing::info!("the stream can be asked again for deliveries without a receipt");
        }
        self.well = true;
        self.readiness.set(CHECK, Ok("the stream can be asked for deliveries without a receipt".into()));
    }

    fn tell_failure(&mut self, failure: Failure) {
        let Failure { cause, what } = failure;
        self.metrics.not_asked(cause);
        let news = self.told.as_ref().is_none_or(|(told, at)| *told != what || at.elapsed() >= TELL_EVERY);
        if news {
            tracing::warn!("cannot ask the stream for deliveries without a receipt: {what}");
            self.told = Some((what.clone(), Instant::now()));
        }
        self.well = false;
        self.readiness.set(CHECK, Err(what));
    }
}

/// The pause while nothing is due.
fn idle(confirm_after: Duration) -> Duration {
    (confirm_after / 8).clamp(Duration::from_millis(100), Duration::from_secs(1))
}

fn is_due(entry: &Unconfirmed, confirm_after: Duration) -> bool {
    match entry.evidence {
        Evidence::Published(ago) => ago >= confirm_after * wait_factor(entry.repeats),
        Evidence::Marks | Evidence::Duplicate { .. } => true,
    }
}

fn wait_factor(repeats: u8) -> u32 {
    1_u32.checked_shl(u32::from(repeats)).map_or(BACKOFF_MAX, |factor| factor.min(BACKOFF_MAX))
}

/// Cuts a round to [`ROUND_BYTES`], or to one entry. Returns the last entry that is left, where it cut.
fn cut(due: &mut Vec<Unconfirmed>) -> Option<Place> {
    let mut bytes = 0;
    let fits = |entry: &&Unconfirmed| {
        bytes += entry.bytes;
        bytes <= ROUND_BYTES
    };
    let count = due.iter().take_while(fits).count().max(1);
    let is_cut = count < due.len();
    due.truncate(count);
    due.last().filter(|_| is_cut).map(|last| last.place)
}

/// The time from the start of this round to that of the next.
fn round_time(due: &[Unconfirmed]) -> Duration {
    let bytes: u64 = due.iter().map(|entry| entry.bytes).sum();
    let share = u32::try_from(bytes.div_ceil(ROUND_BYTES)).unwrap_or(u32::MAX);
    ROUND_TIME.saturating_mul(share.max(1))
}

/// Acts on the stream's answer.
async fn settle(journal: &Journal, metrics: &Metrics, entry: &Unconfirmed, fate: Fate) {
    metrics.reconciled();
    match fate {
        // Looked at again after another while.
        Fate::Waits { tag } => {
            journal.hand_out(entry.place, tag); // what an earlier process handed out: its receipt costs no read now
            if journal.mark_published(entry.place, entry.sequence) {
                metrics.confirmed(1); // its receipt came first
            }
        }
        Fate::Repeat(cause) => {
            tell_repeat(journal, entry, cause).await;
            metrics.repeated(cause);
            journal.mark_lost(entry.place);
        }
    }
}

/// The delivery's id stands on disk, and is read for this line; the entry is about to be read to be published anyway.
async fn tell_repeat(journal: &Journal, entry: &Unconfirmed, cause: Repeat) {
    let block = journal.read_header_block(entry.place).await.ok();
    let delivery = block.and_then(|block| Delivery::from_journal(&block, Bytes::new()).ok());
    let id = delivery.as_ref().map(|delivery| display(&delivery.id));
    let trace = delivery.as_ref().and_then(Delivery::trace_id);
    let (place, sequence, expected, cause) = (entry.place, entry.sequence, is_expected(entry, cause), cause.as_str());
    let text = "a delivery has no receipt and is published again";
    if expected {
        tracing::debug!(delivery.id = id, trace.id = trace, %place, sequence, cause, "{text}");
    } else {
        tracing::warn!(delivery.id = id, trace.id = trace, %place, sequence, cause, "{text}");
    }
}

/// Returns `true` where nothing has failed: a request was sent twice, or a worker stored the delivery while this gateway
/// did not run, and its receipt was lost.
fn is_expected(entry: &Unconfirmed, cause: Repeat) -> bool {
    match cause {
        Repeat::Duplicate => true,
        Repeat::Passed => !matches!(entry.evidence, Evidence::Published(_)),
        Repeat::Missing | Repeat::Replaced => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_is_paced_by_rounds_and_not_by_the_confirm_time() {
        for confirm_after in [1, 300, 86_400].map(Duration::from_secs) {
            assert!(idle(confirm_after) <= Duration::from_secs(1));
        }
        let a_second = A_ROUND as f64 / ROUND_TIME.as_secs_f64();
        assert!((200.0..5000.0).contains(&a_second), "{a_second}");
    }

    #[test]
    fn a_round_is_bounded_by_bytes_and_a_large_record_has_a_longer_one_of_its_own() {
        let entry = |(index, bytes): (usize, &u64)| Unconfirmed {
            place: format!("1.{index}.00000000").parse().unwrap(),
            sequence: 1,
            evidence: Evidence::Marks,
            bytes: *bytes,
            repeats: 0,
        };
        let round = |sizes: &[u64]| {
            let mut due: Vec<_> = sizes.iter().enumerate().map(entry).collect();
            let last = cut(&mut due);
            assert_eq!(last, due.last().filter(|_| due.len() < sizes.len()).map(|entry| entry.place));
            (due.len(), round_time(&due))
        };
        assert_eq!(round(&[]), (0, ROUND_TIME));
        assert_eq!(round(&[16 << 10; 200]), (200, ROUND_TIME));
        assert_eq!(round(&[1 << 20; 9]), (4, ROUND_TIME));
        assert_eq!(round(&[8 << 20, 100]), (1, 2 * ROUND_TIME));
        assert_eq!(round(&[100, 8 << 20]), (1, ROUND_TIME));
    }
}
