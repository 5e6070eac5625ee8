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
mod requests;
mod session;
mod watch;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{self, Message};
use futures_util::future::join;
use shared::delivery::Delivery;
use shared::stream::ACK_WAIT;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use crate::dead_letters::DeadLetter;
use crate::read::read;
use crate::receipt;
use crate::store::{Batch, Origin, Record, tell};

pub use database::Database;
use requests::Requests;
pub use session::{Session, pause};
pub use watch::watch;

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
    pub async fn run(&self, shutdown: &CancellationToken) -> anyhow::Result<Vec<Message>> {
        let context = jetstream::new(self.session.client().clone());
        let requests = Requests::open(self.session.client(), &context, self.consumer.clone(), self.batch_max);
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
    async fn store(&self, messages: Vec<Message>, shutdown: &CancellationToken) -> Result<Vec<Message>, Vec<Message>> {
        self.database.metrics().pulled(messages.len());
        let (messages, batch) = read_all(messages).await;
        // Tried again for as long as the session lasts; what is not stored by then comes again in the next.
        let stored = self.database.persist(&batch, || !self.session.is_over());
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
        Ok(messages)
    }

    /// Acknowledges messages that are stored, and tells the gateways that they are.
    async fn acknowledge(&self, stored: Vec<Message>) {
        if stored.is_empty() {
            return;
        }
        let unconfirmed = self.session.acknowledge(&stored).await;
        self.database.metrics().acks_unconfirmed(unconfirmed);
        // Also where the ack came too late: it is stored, and a receipt names the gateway's place, no sequence.
        receipt::send(self.session.client(), &stored).await;
    }

    /// Three times within the consumer's ack wait, which somebody may have set to less than ours.
    fn progress_every(&self) -> Duration {
        let ack_wait = self.consumer.cached_info().config.ack_wait;
        if ack_wait.is_zero() { ACK_WAIT } else { ack_wait }.div_f64(3.0).max(Duration::from_millis(10))
    }
}

/// What the messages say, in their order. Reading megabytes of JSON takes a while, so it happens on a thread that may.
async fn read_all(messages: Vec<Message>) -> (Vec<Message>, Batch) {
    let read = move || {
        let batch = read_each(&messages, read_one);
        (messages, batch)
    };
    tokio::task::spawn_blocking(read).await.expect("reading a batch does not panic")
}

/// A message that makes `read` panic is poison, and no other has to suffer for it: it becomes a dead letter.
fn read_each(messages: &[Message], read: impl Fn(&Message) -> Result<Record, Box<DeadLetter>>) -> Batch {
    let mut batch = Batch::default();
    for message in messages {
        // Unwind safety: reading is a pure function of the message, so there is no state that it could leave half done.
        let outcome = catch_unwind(AssertUnwindSafe(|| read(message)));
        match outcome.unwrap_or_else(|_| Err(Box::new(poison(message)))) {
            Ok(record) => batch.records.push(record),
            Err(dead) => batch.dead_letters.push(*dead),
        }
    }
    batch
}

/// The dead letter of a message that this program cannot read without failing itself.
fn poison(message: &Message) -> DeadLetter {
    let info = message.info().expect("as in `read_one`");
    DeadLetter {
        delivery_id: Delivery::from_message(message, info.stream_sequence, info.published).id.to_string(),
        stream_sequence: info.stream_sequence,
        origin: origin(message, info.delivered),
        reason: "reading it made this program panic, which is a fault of the program; its log says where".to_owned(),
        failed_at: OffsetDateTime::now_utc(),
    }
}

/// One message as a row to be, or as a dead letter where its body is no JSON.
fn read_one(message: &Message) -> Result<Record, Box<DeadLetter>> {
    // Every message of a consumer has its place in the reply subject; without one it could not be acknowledged either.
    let info = message.info().expect("a message from a consumer says where it stands");
    let delivery = Delivery::from_message(message, info.stream_sequence, info.published);
    read(&delivery, info.stream_sequence, origin(message, info.delivered))
}

fn origin(message: &Message, attempts: i64) -> Origin {
    Origin {
        subject: message.subject.to_string(),
        headers: message.headers.clone().unwrap_or_default(),
        body: message.payload.clone(),
        attempts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages as a consumer delivers them, with these bodies.
    async fn delivered(bodies: &[&'static str]) -> Vec<Message> {
        // A client that never connects: a message only needs one to be acknowledged.
        let client = async_nats::ConnectOptions::new().retry_on_initial_connect().connect("127.0.0.1:1").await.unwrap();
        let context = jetstream::new(client);
        let message = |(place, body): (usize, &&'static str)| Message {
            message: async_nats::Message {
                subject: "signals.sentry.issue".into(),
                reply: Some(format!("$JS.ACK.SIGNALS.worker.1.{place}.{place}.1700000000000000000.0").into()),
                payload: bytes::Bytes::from_static(body.as_bytes()),
                headers: None,
                status: None,
                description: None,
                length: body.len(),
            },
            context: context.clone(),
        };
        bodies.iter().enumerate().map(message).collect()
    }

    fn fails_at_one(message: &Message) -> Result<Record, Box<DeadLetter>> {
        assert!(message.info().unwrap().stream_sequence != 1, "a panic that is meant");
        read_one(message)
    }

    #[tokio::test]
    async fn a_panic_is_the_poison_of_one_delivery() {
        let messages = delivered(&["{}", r#"{"a":1}"#, "no JSON", "[]"]).await;
        let batch = read_each(&messages, fails_at_one);
        let sequences: Vec<u64> = batch.records.iter().map(|record| record.stream_sequence).collect();
        assert_eq!(sequences, [0, 3]);
        let [panicked, not_json] = &batch.dead_letters[..] else { panic!("{:?}", batch.dead_letters) };
        assert_eq!((panicked.stream_sequence, &panicked.origin.body[..]), (1, &br#"{"a":1}"#[..]));
        assert!(panicked.reason.contains("panic") && !panicked.reason.contains("meant"), "{}", panicked.reason);
        // Its identity is that which reading it would have given it.
        let read = read_each(&messages[1..2], read_one);
        assert_eq!(panicked.delivery_id, read.records[0].delivery_id);
        assert_eq!(not_json.stream_sequence, 2);
    }
}
