//! START HERE: what happens to a batch.
//!
//! pull -> interpret -> store -> ack -> receipt, and never in another order: a message is acknowledged only after the
//! COMMIT that stores it, so a crash anywhere repeats the batch, and the ledger makes the repeat harmless.
//!
//! What a worker holds is what its pullers have in hand, one batch each, and no more: [`requests`] asks for the next
//! only once the one before is stored (then it is acknowledged while the next is on its way). While a batch waits for
//! [`database`], the server is told that it is worked on ([`session`]); when the worker is asked to stop, it is handed
//! back, once no puller of this worker asks any more: the server would give it to one that is about to leave.

mod database;
mod pulled;
mod requests;
mod session;
mod set_back;
mod unreadable;
mod waits;
mod watch;

use std::collections::HashSet;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::consumer::PullConsumer;
use futures_util::future::join;
use shared::stream::ACK_WAIT;
use tokio_util::sync::CancellationToken;

use crate::receipt;
use crate::store::{Batch, Stored, tell};

pub use database::Database;
pub use pulled::Pulled;
use requests::Requests;
pub use session::{Session, pause};
pub use unreadable::{UnreadableScan, unreadable_letter};
pub use watch::Watch;

/// Pulls batches, one at a time, and takes each to its end. A worker runs several.
pub struct Puller<'a> {
    /// Where batches come from.
    pub consumer: PullConsumer,
    /// For how long.
    pub session: &'a Session,
    /// Where they go.
    pub database: &'a Database,
    /// `WORKER_BATCH_MAX`
    pub batch_max: usize,
}

impl Puller<'_> {
    /// Pulls and stores batches until `shutdown` or the session's end. Gives what was pulled and not stored: at
    /// `shutdown`, the caller hands it back when all pullers have ended.
    ///
    /// # Errors
    /// Why the consumer can no longer be pulled from: it or its stream was deleted, say. Making it again is the
    /// caller's.
    pub async fn run(&self, shutdown: &CancellationToken) -> anyhow::Result<Vec<Pulled>> {
        let requests = Requests::open(self.session, self.consumer.clone(), self.batch_max, self.database.metrics());
        let mut requests = requests.await.context("cannot pull")?;
        let (mut stored, mut unstored) = (Vec::new(), Vec::new());
        while unstored.is_empty() {
            let pulled = async {
                tokio::select! {
                    () = shutdown.cancelled() => None,
                    () = self.session.over() => None,
                    batch = async { self.database.available().await; requests.next().await } => Some(batch),
                }
            };
            // One batch is acknowledged while the next is on its way, so that PostgreSQL waits for neither.
            let (pulled, ()) = join(pulled, self.acknowledge(stored)).await;
            let Some(messages) = pulled else { break };
            (stored, unstored) = match self.store(messages.context("pulling ended")?, shutdown).await {
                Ok(messages) => (messages, Vec::new()),
                Err(messages) => (Vec::new(), messages),
            };
        }
        if !self.session.is_over() {
            unstored.extend(requests.close().await);
        }
        Ok(unstored)
    }

    /// One batch: read it, store it however long that takes. Gives its messages once they are stored, and as an error
    /// where they are not, because `shutdown` or the session's end came first.
    async fn store(&self, messages: Vec<Pulled>, shutdown: &CancellationToken) -> Result<Vec<Pulled>, Vec<Pulled>> {
        self.database.metrics().pulled(messages.len());
        let (messages, batch) = read_all(messages).await;
        // Tried again for as long as the session lasts; what is not stored by then comes again in the next.
        let stored = self.database.persist(&batch, || !self.session.is_over(), || self.may_set_back(messages.len()));
        let kept = async {
            self.session.keep(&messages, self.progress_every()).await;
            std::future::pending().await // a try that has begun is worth its end, even without an ack
        };
        let stored = tokio::select! {
            stored = stored => stored,
            () = shutdown.cancelled() => None,
            () = kept => unreachable!("it never ends"),
        };
        let Some(stored) = stored else { return Err(messages) };
        tell(&stored, &batch);
        let (set_back, messages) = part(messages, &batch, &stored);
        self.session.set_back(&set_back).await;
        Ok(messages)
    }

    /// Returns `true` where a delivery of a batch of `deliveries` may be given back with a delay. It stays un-acked meanwhile,
    /// and at `max_ack_pending` the server delivers nothing new. So half of that is kept for deliveries that can be stored.
    async fn may_set_back(&self, deliveries: usize) -> bool {
        let Ok(info) = self.consumer.get_info().await else { return false };
        let limit = info.config.max_ack_pending;
        // The batch itself is un-acked as well, and may be all that the server gives out.
        let others = info.num_ack_pending.saturating_sub(deliveries);
        limit <= 0 || i64::try_from(others).is_ok_and(|others| others <= limit / 2)
    }

    /// Acknowledges messages that are stored, and tells the gateways that they are.
    async fn acknowledge(&self, stored: Vec<Pulled>) {
        if stored.is_empty() {
            return;
        }
        let unconfirmed = self.session.acknowledge(&stored).await;
        self.database.metrics().acks_unconfirmed(unconfirmed);
        // Also where the ack came too late: it is stored, and a receipt names the gateway's place, no sequence.
        receipt::send(self.session.client(), &stored).await;
    }

    /// Three times within the consumer's ack wait, which an operator may have set to less than ours. A `backoff` takes the
    /// place of the ack wait: its first time counts for the first delivery, its second for the second.
    fn progress_every(&self) -> Duration {
        let config = &self.consumer.cached_info().config;
        let waits = config.backoff.iter().copied().chain([config.ack_wait]).filter(|wait| !wait.is_zero());
        waits.min().unwrap_or(ACK_WAIT).div_f64(3.0).max(Duration::from_millis(10))
    }
}

/// The messages whose deliveries are set back, and all others. A message that cannot become a row may have the id of one
/// that can.
fn part(messages: Vec<Pulled>, batch: &Batch, stored: &Stored) -> (Vec<Pulled>, Vec<Pulled>) {
    let ids: HashSet<&str> = stored.set_back.iter().map(|row| row.delivery_id.as_str()).collect();
    let records = batch.records.iter().map(|record| (&record.delivery_id, record.stream_sequence));
    let letters = batch.dead_letters.iter().map(|letter| (&letter.delivery_id, letter.stream_sequence));
    let of_them = records.chain(letters).filter(|(id, _)| ids.contains(id.as_str()));
    let sequences: HashSet<u64> = of_them.map(|(_, sequence)| sequence).collect();
    messages.into_iter().partition(|pulled| sequences.contains(&pulled.sequence))
}

/// What the messages say, in their order. Reading megabytes of JSON takes a while, so it happens on a thread that may.
async fn read_all(messages: Vec<Pulled>) -> (Vec<Pulled>, Batch) {
    let read = move || {
        let mut batch = Batch::default();
        for pulled in &messages {
            match pulled.read() {
                Ok(record) => batch.records.push(record),
                Err(dead) => batch.dead_letters.push(*dead),
            }
        }
        (messages, batch)
    };
    tokio::task::spawn_blocking(read).await.expect("reading isolates its panics")
}

#[cfg(test)]
mod tests {
    use async_nats::jetstream::{self, Message};

    use super::*;
    use crate::store::SetBack;

    #[tokio::test]
    async fn no_message_of_a_delivery_that_is_set_back_is_acknowledged() {
        // A client that never connects.
        let client = async_nats::ConnectOptions::new().retry_on_initial_connect().connect("127.0.0.1:1").await.unwrap();
        let context = jetstream::new(client);
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(shared::delivery::DELIVERY_ID, "a");
        let pulled = |sequence: u64, body: &'static str, headers: Option<&async_nats::HeaderMap>| {
            let message = async_nats::Message {
                subject: "signals.sentry.issue".into(),
                reply: Some(format!("$JS.ACK.SIGNALS.worker.1.{sequence}.9.1700000000000000000.0").into()),
                payload: body.into(),
                headers: headers.cloned(),
                status: None,
                description: None,
                length: body.len(),
            };
            Pulled::of(Message { message, context: context.clone() }).unwrap()
        };
        // The last has the id of the first, and cannot become a row.
        let messages =
            vec![pulled(1, "{}", Some(&headers)), pulled(2, "{}", None), pulled(3, "no JSON", Some(&headers))];
        let (messages, batch) = read_all(messages).await;
        assert_eq!((batch.records.len(), batch.dead_letters.len()), (2, 1));
        let row = SetBack { delivery_id: "a".into(), sqlstate: "LP001".into(), reason: String::new() };
        let stored = Stored { set_back: vec![row], ..Stored::default() };
        let (set_back, stored) = part(messages, &batch, &stored);
        let sequences = |messages: &[Pulled]| messages.iter().map(|pulled| pulled.sequence).collect::<Vec<_>>();
        assert_eq!((sequences(&set_back), sequences(&stored)), (vec![1, 3], vec![2]));
    }
}
