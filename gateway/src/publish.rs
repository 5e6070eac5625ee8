//! Publishing: from the journal to JetStream, in the background, for as long as it takes.
//!
//! - Entries go out in the order in which they came, several hundred at a time, and each settles by itself: a PubAck for
//!   that very entry marks it published, a refusal that waiting cannot mend sets it aside, anything else is tried again
//!   with jittered backoff and without limit. One entry delays another only while its body is being written.
//! - A body is the client's from the first try on, so that its memory goes once it is written to NATS; for a further try
//!   it is read from the journal again.
//! - A try that timed out may have been stored: it is repeated under the same `Nats-Msg-Id`. An ack that says "duplicate"
//!   may be for that try, or for another entry (one request, sent twice): [`crate::confirm`] asks the stream.
//! - Published is not stored: only the worker's receipt lets an entry go (see [`crate::confirm`]).
//! - Nothing is read from disk while NATS cannot take it, and entries on their way are bounded, as are bodies in memory,
//!   so memory does not grow with the backlog.
//! - Nothing is published before the stream was looked at and is fit. A look holds for its connection, and until the next
//!   one, five seconds later: a stream that was made unfit meanwhile gets no more. Entries sleep until then.

mod in_flight;
mod overdue;

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::{self, ErrorCode, stream};
use backon::{ExponentialBuilder, Retryable as _};
use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use shared::delivery::{Delivery, NotADelivery};
use shared::link::{Link, Linked};
use shared::ops::Readiness;
use shared::stream::{NatsSettings, NotReady, covers, ensure_stream, risks, tell_differences};
use tokio::sync::{Notify, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::journal::{Journal, Place, ReadError, Refusal, Stored};
use crate::metrics::{Delay, Metrics};
use crate::receipts::{self, ReceiptKey};
pub(crate) use in_flight::InFlight;
use in_flight::{READ_ENTRIES, READ_KIB, Slot};
use overdue::Overdue;

/// How many bytes of records are read from the journal in one go.
const READ_BYTES: u64 = READ_KIB as u64 * 1024;
/// Where several entries waited together, more are coming, and get so long to gather: fewer, larger writes cost a tenth
/// less of both this process and the broker. Who comes alone does not wait, and neither does a backlog.
const GATHER: Duration = Duration::from_millis(2);
/// Longest wait for JetStream's ack before the publish is repeated: the limit of each request to JetStream.
const ACK_WITHIN: Duration = shared::link::ANSWER_WITHIN;
/// Messages that may wait in the gateway's one subscription, that of receipts. More are dropped: a receipt that is lost
/// costs one repeat.
const SUBSCRIPTION_QUEUE: usize = 64;
/// What JetStream says where a stream, an account or a server has no room.
const FULL: [ErrorCode; 5] = [
    ErrorCode::STREAM_STORE_FAILED,
    ErrorCode::INSUFFICIENT_RESOURCES,
    ErrorCode::ACCOUNT_RESOURCES_EXCEEDED,
    ErrorCode::STORAGE_RESOURCES_EXCEEDED,
    ErrorCode::MEMORY_RESOURCES_EXCEEDED,
];
/// How often the stream and the server's limits are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Pause after a look that failed, doubled each time up to [`LOOK_EVERY`].
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Publishes what is in a journal. Clones share one connection.
#[derive(Clone)]
pub struct Publisher(Arc<Shared>);

struct Shared {
    journal: Journal,
    nats: NatsSettings,
    link: Link,
    /// From which the tags of receipts follow.
    key: ReceiptKey,
    metrics: Metrics,
    /// The last look at the stream, or none while the stream is not known to be there and fit.
    fit: watch::Sender<Option<Arc<Fit>>>,
    /// Something speaks against the last look.
    doubt: Notify,
    in_flight: InFlight,
    overdue: Overdue,
}

/// A look at a stream that may be published to.
#[derive(Debug)]
struct Fit {
    linked: Arc<Linked>,
    /// Which connection of that client's it was: a look holds for one.
    connects: u64,
    stream: stream::Config,
    max_payload: usize,
}

impl Fit {
    fn holds(&self) -> bool {
        self.linked.is_up() && self.linked.connects() == self.connects
    }
}

/// A look at the stream that came to nothing.
#[derive(Debug, thiserror::Error)]
enum LookFailed {
    #[error("not connected to NATS, see the check `nats`")]
    NotConnected,
    #[error(transparent)]
    NotReady(#[from] NotReady),
}

/// Why an entry is not published.
#[derive(Debug, thiserror::Error)]
enum NotPublished {
    /// Waiting does not mend it.
    #[error("{1}")]
    Never(Refusal, String),
    /// It may work later.
    #[error("{1}")]
    Later(Delay, String),
    /// For a further try the journal does not give it: it is stored meanwhile, or what is wrong was told there.
    #[error(transparent)]
    Unreadable(#[from] ReadError),
}

impl Publisher {
    /// A publisher that connects in the background.
    ///
    /// # Errors
    /// Where the NATS client itself cannot be made.
    pub async fn connect(
        nats: &NatsSettings,
        journal: Journal,
        readiness: &Readiness,
        metrics: Metrics,
    ) -> anyhow::Result<Self> {
        let link = nats.connect("gateway", SUBSCRIPTION_QUEUE, readiness).await?;
        readiness.set("stream", Err("not looked at yet".into()));
        let shared = Arc::new(Shared {
            key: ReceiptKey::new(journal.receipt_key()),
            journal,
            nats: nats.clone(),
            link,
            overdue: Overdue::new(metrics.clone()),
            metrics,
            fit: watch::Sender::new(None),
            doubt: Notify::new(),
            in_flight: InFlight::new(),
        });
        let probed = Arc::downgrade(&shared);
        readiness.probe("publishing", move || match probed.upgrade() {
            Some(shared) if shared.is_up() => shared.overdue.state(shared.in_flight.is_full_of_retries()),
            Some(shared) => Err(format!(
                "nothing is published before NATS and the stream are ready, see the checks `nats` and `stream`; {} deliveries \
                 wait in the journal",
                shared.journal.stats().to_publish()
            )),
            None => Err("the publisher has ended".into()),
        });
        Ok(Publisher(shared))
    }

    /// The connection.
    pub fn link(&self) -> &Link {
        &self.0.link
    }

    /// Publishes what is in the journal and what comes into it, without end.
    pub async fn run(&self, readiness: &Readiness) {
        let publisher = self.clone();
        // One task for all of it, which ends with us: one for each entry would wake threads seven times as often.
        let publishing = AbortOnDropHandle::new(tokio::spawn(async move { publisher.0.publish_all().await }));
        let (published, ()) = tokio::join!(publishing, self.keep_stream(readiness));
        published.expect("publishing does not end, and what panics in it is caught there");
    }

    /// Waits until the journal holds nothing that could be published now, or NATS is away. It does
    /// not wait for entries that the disk does not give.
    pub async fn drained(&self) {
        while self.is_up() && self.0.journal.stats().to_publish() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Returns `true` while NATS is connected and the stream is there and fit.
    pub fn is_up(&self) -> bool {
        self.0.is_up()
    }

    /// Keeps the stream there, and sees when it is fit and when what it takes has changed.
    async fn keep_stream(&self, readiness: &Readiness) {
        let shared = &self.0;
        let mut changes = shared.link.changes();
        let (mut known, mut told, mut again) = (None, None, LOOK_AGAIN);
        loop {
            changes.mark_unchanged();
            let looked = tokio::select! {
                looked = shared.look() => looked,
                _ = changes.changed() => Err(LookFailed::NotConnected), // a look does not outlive its connection
            };
            let pause = match looked {
                Ok(fit) => {
                    readiness.set("stream_settings", risks(&fit.stream, &shared.nats));
                    let limits = (fit.stream.clone(), fit.max_payload, fit.connects);
                    if known.as_ref() != Some(&limits) {
                        tell_differences(&fit.stream, &shared.nats);
                        shared.retry_set_aside();
                        known = Some(limits);
                    }
                    if told.take().is_some() {
                        tracing::info!("the stream is ready; deliveries are published");
                    }
                    readiness.set("stream", Ok("ready".into()));
                    shared.fit.send_replace(Some(Arc::new(fit)));
                    again = LOOK_AGAIN;
                    LOOK_EVERY
                }
                Err(error) => {
                    shared.fit.send_replace(None);
                    let words = error.to_string();
                    if matches!(error, LookFailed::NotReady(_)) && told.as_ref() != Some(&words) {
                        tracing::warn!("nothing is published until the stream is ready: {words}");
                        told = Some(words.clone());
                    }
                    readiness.set("stream", Err(words));
                    let pause = again;
                    again = LOOK_EVERY.min(again * 2);
                    pause
                }
            };
            // Soon when the connection changes, or when a publish finds no stream.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = changes.changed() => {
                    shared.fit.send_replace(None);
                    again = LOOK_AGAIN;
                }
                () = shared.doubt.notified() => { shared.fit.send_replace(None); }
            }
        }
    }
}

impl Shared {
    /// Takes entries from the journal and publishes them, without end. What is not settled is left to the next start.
    async fn publish_all(&self) {
        let mut on_their_way = FuturesUnordered::new();
        loop {
            let next = async {
                let room = self.in_flight.for_a_read().await;
                self.fit().await;
                (room, self.journal.take(READ_ENTRIES as usize, READ_BYTES).await)
            };
            let (mut room, taken) = beside(&mut on_their_way, next).await;
            let several = taken.len() > 1 && !is_backlog(&taken);
            for entry in taken {
                let share = self.in_flight.share(&mut room, entry.body);
                let (slot, body) = beside(&mut on_their_way, share).await;
                let (entry, counted) = (Stored { body, ..entry }, self.metrics.publishing());
                let publishing = self.isolated(entry.place, self.publish(entry, slot));
                on_their_way.push(publishing.inspect(move |()| drop(counted)));
            }
            if several {
                beside(&mut on_their_way, tokio::time::sleep(GATHER)).await;
            }
        }
    }

    /// A fault of ours that only this entry brings out is not the others' affair: it is set aside. (No `async fn`: that would
    /// hold `publishing` twice, where it came from and where it is polled, for each of hundreds.)
    fn isolated(&self, place: Place, publishing: impl Future<Output = ()>) -> impl Future<Output = ()> {
        AssertUnwindSafe(publishing).catch_unwind().map(move |done| {
            if done.is_err() {
                tracing::error!(%place, "an entry of the journal made the publisher panic; it is set aside, and tried \
                    again with the next connection to NATS");
                self.metrics.refused(Refusal::Other);
                self.journal.mark_set_aside(place, Refusal::Other);
            }
        })
    }

    /// One entry, until it is settled one way or the other.
    async fn publish(&self, entry: Stored, mut slot: Slot) {
        let Stored { place, meta, body, repeats, .. } = entry;
        let bytes = body.len();
        let told = |error: &NotADelivery| tracing::error!(%place, %error, "an entry of the journal is set aside");
        // `meta` goes: it lies in one piece of memory with the body, and that is to be free once the body is written.
        let Ok(delivery) = Delivery::from_journal(&{ meta }, Bytes::new()).inspect_err(told) else {
            self.metrics.refused(Refusal::Other);
            return self.journal.mark_set_aside(place, Refusal::Other);
        };
        let tag = self.key.tag(place, &delivery.id);
        let receipt_to = receipts::to(self.journal.gateway_id(), place, tag);
        self.journal.hand_out(place, tag); // before the first try: the receipt may be quicker than the ack
        let (id, trace) = (&delivery.id, delivery.trace_id());
        let backoff = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(50))
            .with_max_delay(Duration::from_secs(5))
            .with_jitter()
            .without_max_times();
        let subject = delivery.subject();
        let mut body = Some(body);
        let mut tries = self.overdue.tries();
        let again = || self.in_flight.reread(bytes, async move { Ok(self.journal.read(place).await?.body) });
        // The client takes headers and body as its own.
        let try_once = || {
            let headers = delivery.headers(u32::from(repeats), &receipt_to);
            self.try_publish(&subject, headers, body.take(), again)
        };
        let published = try_once
            .retry(backoff)
            .when(|error| matches!(error, NotPublished::Later(..)))
            .notify(|error, _| {
                if let NotPublished::Later(delay, because) = error {
                    self.metrics.delayed(*delay);
                    tries.failed(*delay, because);
                    self.in_flight.set_apart(&mut slot);
                }
                tracing::debug!(delivery.id = %id, trace.id = trace, %error, "not published yet, will try again");
            })
            .await;
        match published {
            // The message may be another entry's (one request, sent twice): the stream is asked.
            Ok((sequence, true)) => {
                tracing::debug!(delivery.id = %id, trace.id = trace, %place, sequence, "the stream has this id already");
                self.journal.mark_duplicate(place, sequence);
            }
            Ok((sequence, false)) => {
                tracing::debug!(delivery.id = %id, trace.id = trace, %place, sequence, "published a delivery");
                if self.journal.mark_published(place, sequence) {
                    self.metrics.confirmed(1); // its receipt came first
                }
            }
            Err(NotPublished::Never(refusal, because)) => {
                let reason = refusal.as_str();
                tracing::error!(
                    delivery.id = %id, trace.id = trace, bytes, reason,
                    "NATS refuses a delivery; it is kept in the journal and tried again when NATS's limits change: {because}"
                );
                self.metrics.refused(refusal);
                self.journal.mark_set_aside(place, refusal);
            }
            Err(NotPublished::Unreadable(error)) => {
                tracing::debug!(delivery.id = %id, trace.id = trace, %place, %error, "not tried again");
            }
            Err(NotPublished::Later(..)) => unreachable!("what may work later is retried without limit"),
        }
    }

    /// One try, with `body`, or else with what is read: the sequence at which JetStream has it, and `true` where it calls
    /// the message a duplicate.
    async fn try_publish(
        &self,
        subject: &str,
        headers: HeaderMap,
        body: Option<Bytes>,
        read: impl AsyncFnOnce() -> Result<Bytes, ReadError>,
    ) -> Result<(u64, bool), NotPublished> {
        let body = match body {
            Some(body) => body,
            None => {
                self.fit().await; // nothing is read while it cannot be published
                Box::pin(read()).await? // seldom, and large
            }
        };
        let fit = self.fit().await;
        if fit.linked.is_denied(subject) {
            return Err(denied(subject)); // no acknowledgement would come, and the time limit is long
        }
        let begin = Instant::now();
        let acked = async {
            // Boxed, because it lasts no longer than it takes to hand the message over, and is most of what we would hold.
            let publish = Box::pin(fit.linked.context.publish_with_headers(subject.to_owned(), headers, body));
            publish.await?.await // within ACK_WITHIN, or TimedOut
        };
        match acked.await {
            Ok(ack) => {
                self.metrics.published(begin.elapsed());
                Ok((ack.sequence, ack.duplicate))
            }
            Err(error) => Err(self.judge(&error, subject, &fit)),
        }
    }

    /// Whether waiting can help.
    fn judge(&self, error: &PublishError, subject: &str, fit: &Fit) -> NotPublished {
        let because = || format!("{error}{}", cause(error));
        match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => NotPublished::Never(Refusal::TooLarge, because()),
            PublishErrorKind::Other if api_code(error) == Some(ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM) => {
                NotPublished::Never(Refusal::TooLarge, because())
            }
            PublishErrorKind::StreamNotFound if !fit.stream.subjects.iter().any(|pattern| covers(pattern, subject)) => {
                NotPublished::Never(Refusal::Subject, format!("the stream does not take the subject {subject}"))
            }
            PublishErrorKind::StreamNotFound => {
                self.doubt.notify_one();
                NotPublished::Later(Delay::NoStream, because())
            }
            PublishErrorKind::TimedOut => {
                fit.linked.note_unanswered();
                // A denied publish gets no acknowledgement. The server reports the denial separately.
                if fit.linked.is_denied(subject) {
                    return denied(subject);
                }
                NotPublished::Later(Delay::TimedOut, format!("no acknowledgement within {} s", ACK_WITHIN.as_secs()))
            }
            PublishErrorKind::WrongLastMessageId
            | PublishErrorKind::WrongLastSequence
            | PublishErrorKind::BrokenPipe
            | PublishErrorKind::MaxAckPending
            | PublishErrorKind::Other => {
                let full = api_code(error).is_some_and(|code| FULL.contains(&code));
                NotPublished::Later(if full { Delay::Full } else { Delay::Other }, because())
            }
        }
    }

    fn retry_set_aside(&self) {
        let retried: usize = Refusal::ALL.into_iter().map(|refusal| self.journal.retry_set_aside(refusal)).sum();
        if retried > 0 {
            tracing::info!(entries = retried, "trying again what NATS refused under other limits");
        }
    }

    /// Looks at the stream, and makes it where it is missing.
    async fn look(&self) -> Result<Fit, LookFailed> {
        let linked = self.link.current();
        let connects = linked.connects();
        if !linked.is_up() {
            return Err(LookFailed::NotConnected);
        }
        let stream = ensure_stream(&linked.context, &self.nats).await?;
        let max_payload = linked.client.server_info().max_payload;
        Ok(Fit { linked, connects, stream, max_payload })
    }

    fn is_up(&self) -> bool {
        self.fit.borrow().as_ref().is_some_and(|fit| fit.holds())
    }

    /// Waits until NATS is connected and the stream fit.
    async fn fit(&self) -> Arc<Fit> {
        loop {
            let fit = self.fit.borrow().clone();
            if let Some(fit) = &fit
                && fit.holds()
            {
                return fit.clone();
            }
            let mut changed = self.fit.subscribe();
            if fit.is_some() {
                // The look was on a connection that is gone. The first to see that withdraws it.
                self.fit.send_if_modified(|now| now.take_if(|fit| !fit.holds()).is_some());
                self.doubt.notify_one();
            }
            let _ = changed.wait_for(Option::is_some).await; // the sender is ours, so it is there
        }
    }
}

/// What `future` comes to, while those go on.
async fn beside<T>(others: &mut FuturesUnordered<impl Future<Output = ()>>, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        tokio::select! {
            output = &mut future => return output,
            Some(()) = others.next() => {}
        }
    }
}

/// Whether about as much came as is read in one go: then there is more to read now, most likely.
fn is_backlog(taken: &[Stored]) -> bool {
    let bytes: usize = taken.iter().map(|entry| entry.body.len()).sum();
    taken.len() >= READ_ENTRIES as usize || bytes as u64 > READ_BYTES / 2
}

/// The error code that JetStream gave, if it gave one.
fn api_code(error: &PublishError) -> Option<ErrorCode> {
    let cause = std::error::Error::source(error)?;
    Some(cause.downcast_ref::<jetstream::Error>()?.error_code())
}

fn cause(error: &PublishError) -> String {
    std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default()
}

fn denied(subject: &str) -> NotPublished {
    NotPublished::Never(Refusal::Permission, format!("this account may not publish to {subject}"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::SystemTime;

    use prometheus_client::registry::Registry;

    use super::*;
    use crate::journal::{Entry, Limits, State};
    use crate::settings::JournalConfig;

    /// A journal in `dir`, and a publisher of it that no broker answers.
    async fn publisher(dir: &Path) -> (Journal, Publisher) {
        let limits = Limits {
            max_bytes_on_disk: 1 << 20,
            segment_bytes: 1 << 16,
            max_bytes_waiting: 1 << 20,
            retain: Duration::ZERO,
        };
        let (journal, _) = Journal::open(dir, limits).unwrap();
        let metrics = Metrics::new(&mut Registry::default(), &journal);
        let nats = JournalConfig::load(&|_| None).unwrap().nats;
        let publisher = Publisher::connect(&nats, journal.clone(), &Readiness::tolerating(&[]), metrics).await.unwrap();
        (journal, publisher)
    }

    fn entry(meta: Bytes) -> Entry {
        Entry { received_at: SystemTime::now(), meta, body: Bytes::from("body") }
    }

    #[tokio::test]
    async fn an_entry_that_makes_us_panic_is_set_aside_and_the_next_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, publisher) = publisher(dir.path()).await;
        let append = || journal.append(entry(Bytes::new()));
        let (poison, next) = (append().await.unwrap(), append().await.unwrap());
        assert_eq!(journal.take(2, 1 << 16).await.len(), 2);
        publisher.0.isolated(poison, async { panic!("a panic that is meant") }).await;
        publisher.0.isolated(next, async { assert!(!journal.mark_published(next, 1)) }).await;
        let entries = |state| journal.stats().share(state).tally.entries;
        assert_eq!((entries(State::SetAside), entries(State::Published), entries(State::Journalled)), (1, 1, 0));
    }

    #[tokio::test]
    async fn an_entry_that_waits_for_nats_sleeps() {
        let dir = tempfile::tempdir().unwrap();
        let (_journal, publisher) = publisher(dir.path()).await;
        // As after a connection that is gone.
        let (linked, stream) = (publisher.link().current(), stream::Config::default());
        publisher.0.fit.send_replace(Some(Arc::new(Fit { linked, connects: 1, stream, max_payload: 1 })));
        let (mut waiting, mut polls) = (pin!(publisher.0.fit()), 0);
        let counted = std::future::poll_fn(|context| {
            polls += 1;
            waiting.as_mut().poll(context)
        });
        tokio::time::timeout(Duration::from_millis(500), counted).await.unwrap_err();
        assert!(polls <= 2, "polled {polls} times: there may be thousands of these");
    }

    #[tokio::test]
    async fn an_entry_on_its_way_holds_little_and_nothing_of_what_was_understood() {
        struct Watched(Bytes, #[expect(dead_code)] Arc<()>);
        impl AsRef<[u8]> for Watched {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let (journal, publisher) = publisher(dir.path()).await;
        let meta = Delivery::received(Bytes::new(), None, None, None).to_journal();
        journal.append(entry(meta.clone())).await.unwrap();
        let mut taken = journal.take(1, 1 << 16).await.remove(0);
        let held = Arc::new(());
        taken.meta = Bytes::from_owner(Watched(meta, held.clone()));
        let in_flight = InFlight::new();
        let (slot, _) = in_flight.share(&mut in_flight.for_a_read().await, Bytes::new()).await;
        let mut publishing = pin!(publisher.0.isolated(taken.place, publisher.0.publish(taken, slot)));
        assert!(size_of_val(&*publishing) < 2048, "there are hundreds of these: {} bytes", size_of_val(&*publishing));
        assert_eq!(Arc::strong_count(&held), 2);
        assert!(publishing.as_mut().now_or_never().is_none(), "it waits for NATS");
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
