//! START HERE: what happens to a batch.
//!
//! pull -> interpret -> store -> ack -> receipt, and never in another order: a message is acknowledged only after the COMMIT that
//! stores it, so a crash anywhere repeats the batch, and the ledger makes the repeat harmless.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::Client;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::consumer::pull::MessagesErrorKind;
use async_nats::jetstream::{AckKind, Message};
use backon::{ExponentialBuilder, Retryable as _};
use futures_util::future::join_all;
use futures_util::{FutureExt as _, StreamExt as _};
use shared::delivery::Delivery;
use tokio_util::sync::CancellationToken;

use crate::dead_letters::DeadLetter;
use crate::read::read;
use crate::receipt;
use crate::store::{Batch, Origin, Record, Store, StoreError, Stored};

/// Most bytes of bodies in one batch, so that memory stays bounded when bodies are large. Well above the largest single
/// message that the servers here take: a pull that asks for less than the next message would stand still.
const BATCH_BYTES: usize = 64 << 20;
/// How long the server may take to confirm an ack. One that is not confirmed costs a redelivery, which changes nothing.
const ACK_WITHIN: Duration = Duration::from_secs(5);

/// Pulls batches, one at a time, and takes each to its end. A worker runs several.
pub struct Puller {
    /// The connection, for receipts.
    pub client: Client,
    /// Where batches come from.
    pub consumer: PullConsumer,
    /// Where they go.
    pub store: Store,
    /// `WORKER_BATCH_MAX`
    pub batch_max: usize,
}

impl Puller {
    /// Pulls and stores batches until `shutdown`; what was pulled and not stored by then is handed back.
    ///
    /// # Errors
    /// Why the consumer can no longer be pulled from: it or its stream was deleted, say. Making it again is the
    /// caller's.
    pub async fn run(&self, shutdown: &CancellationToken) -> anyhow::Result<()> {
        let pulls = self.consumer.stream().max_messages_per_batch(self.batch_max).max_bytes_per_batch(BATCH_BYTES);
        let messages = pulls.messages().await.context("cannot pull")?;
        // Whatever has arrived, up to a full batch: one message when idle, stored at once; many when behind.
        let mut batches = messages.ready_chunks(self.batch_max);
        while let Some(Some(arrived)) = shutdown.run_until_cancelled(batches.next()).await {
            let mut batch = Vec::with_capacity(arrived.len());
            let mut ended = None;
            for message in arrived {
                match message {
                    Ok(message) => batch.push(message),
                    // The connection hiccups; the client asks again by itself.
                    Err(error) if error.kind() == MessagesErrorKind::MissingHeartbeat => {
                        tracing::debug!(%error, "pulling again")
                    }
                    Err(error) => ended = Some(error),
                }
            }
            self.take(&batch, shutdown).await;
            if let Some(error) = ended {
                return Err(error).context("pulling ended");
            }
        }
        // Pulled ahead and not begun: another worker can have it at once.
        while let Some(Some(ahead)) = batches.next().now_or_never() {
            hand_back(&ahead.into_iter().flatten().collect::<Vec<_>>()).await;
        }
        Ok(())
    }

    /// One batch: read it, store it however long that takes, acknowledge it. Handed back where `shutdown` comes first.
    async fn take(&self, messages: &[Message], shutdown: &CancellationToken) {
        if messages.is_empty() {
            return;
        }
        let batch = read_all(messages.to_vec()).await;
        match shutdown.run_until_cancelled(self.persist(&batch)).await {
            Some(stored) => {
                acknowledge(messages).await;
                receipt::send(&self.client, messages).await;
                tracing::debug!(fresh = stored.fresh.len(), known = stored.known.len(), "stored a batch");
                for dead in &stored.dead {
                    tracing::warn!(
                        delivery.id = dead.delivery_id,
                        reason = dead.reason,
                        "a delivery became a dead letter"
                    );
                }
            }
            None => hand_back(messages).await,
        }
    }

    /// Stores a batch. PostgreSQL's troubles are waited out, for as long as they take; a row that PostgreSQL refuses is a
    /// dead letter when this returns.
    async fn persist(&self, batch: &Batch) -> Stored {
        let backoff = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(50))
            .with_max_delay(Duration::from_secs(5))
            .with_jitter()
            .without_max_times();
        let note = |error: &StoreError, wait: Duration| {
            let deliveries = batch.records.len() + batch.dead_letters.len();
            tracing::warn!(deliveries, ?wait, "a batch is not stored yet, will try again until it is: {error}");
        };
        let stored = (|| self.store.persist(batch)).retry(backoff).notify(note).await;
        stored.unwrap_or_else(|_| unreachable!("a retry without a limit ends only in success"))
    }
}

/// What the messages say, in their order. Reading megabytes of JSON takes a while, so it happens on a thread that may.
async fn read_all(messages: Vec<Message>) -> Batch {
    let read = move || {
        let mut batch = Batch::default();
        for message in &messages {
            match read_one(message) {
                Ok(record) => batch.records.push(record),
                Err(dead) => batch.dead_letters.push(*dead),
            }
        }
        batch
    };
    tokio::task::spawn_blocking(read).await.expect("reading a batch does not panic")
}

/// One message as a row to be, or as a dead letter where its body is no JSON.
fn read_one(message: &Message) -> Result<Record, Box<DeadLetter>> {
    // Every message of a consumer has its place in the reply subject; without one it could not be acknowledged either.
    let info = message.info().expect("a message from a consumer says where it stands");
    let delivery = Delivery::from_message(message, info.stream_sequence, info.published);
    let origin = Origin {
        subject: message.subject.to_string(),
        headers: message.headers.clone().unwrap_or_default(),
        body: message.payload.clone(),
        attempts: info.delivered,
    };
    read(&delivery, info.stream_sequence, origin)
}

/// Acknowledges, and waits until the server confirms. One that it does not confirm is delivered again.
async fn acknowledge(messages: &[Message]) {
    let acks = join_all(messages.iter().map(Message::double_ack));
    let unconfirmed = match tokio::time::timeout(ACK_WITHIN, acks).await {
        Ok(acks) => acks.into_iter().filter(Result::is_err).count(),
        Err(_) => messages.len(),
    };
    if unconfirmed > 0 {
        tracing::warn!(
            unconfirmed,
            "stored deliveries whose ack was not confirmed; they may come again, which is harmless"
        );
    }
}

/// Gives messages back to the consumer, for another worker to take.
async fn hand_back(messages: &[Message]) {
    for message in messages {
        // One that cannot be handed back is delivered again after the ack wait.
        let _ = message.ack_with(AckKind::Nak(None)).await;
    }
}
