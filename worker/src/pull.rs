//! START HERE: what happens to a batch.
//!
//! pull -> interpret -> store -> ack, and never another order: a message is acknowledged only after the COMMIT that
//! stores it, so a crash anywhere repeats the batch, and the ledger makes the repeat harmless.

use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::consumer::pull::MessagesError;
use async_nats::jetstream::{self, AckKind, Message};
use backon::{ExponentialBuilder, Retryable as _};
use futures_util::future::join_all;
use futures_util::{FutureExt as _, StreamExt as _};
use shared::delivery::Delivery;
use tokio_util::sync::CancellationToken;

use crate::interpret::interpret;
use crate::payload::payload;
use crate::store::{Batch, DeadLetter, Record, Store, StoreError, Stored};

/// Most bytes of bodies that one batch may have, so that memory stays bounded when bodies are large. Above the largest
/// single message that any server here takes.
const BATCH_BYTES: usize = 64 << 20;
/// How long the server may take to confirm an ack. One that is not confirmed costs a redelivery, which changes nothing.
const ACK_WITHIN: Duration = Duration::from_secs(5);

/// One of the batches that a worker has in hand.
pub struct Puller {
    /// Where batches come from.
    pub consumer: PullConsumer,
    /// Where they go.
    pub store: Store,
    /// `WORKER_BATCH_MAX`
    pub batch_max: usize,
}

impl Puller {
    /// Pulls and stores batches until `shutdown` or until the consumer can no longer be pulled from.
    ///
    /// # Errors
    /// Why the consumer ended: it or its stream was deleted, say. Making it again is the caller's.
    pub async fn run(&self, shutdown: &CancellationToken) -> Result<(), MessagesError> {
        let pulling = self.consumer.stream().max_messages_per_batch(self.batch_max).max_bytes_per_batch(BATCH_BYTES);
        let messages = pulling.messages().await.map_err(|error| MessagesError::with_source(PULL, error))?;
        // Whatever has arrived, up to a full batch: one message when idle, so that it is stored at once, many when behind.
        let mut batches = messages.ready_chunks(self.batch_max);
        while let Some(Some(batch)) = shutdown.run_until_cancelled(batches.next()).await {
            let (messages, failed): (Vec<_>, Vec<_>) = batch.into_iter().partition(Result::is_ok);
            let messages: Vec<Message> = messages.into_iter().flatten().collect();
            if !messages.is_empty() {
                self.take(messages, shutdown).await;
            }
            if let Some(Err(error)) = failed.into_iter().next() {
                return Err(error);
            }
        }
        Ok(())
    }

    /// One batch, to its end.
    async fn take(&self, messages: Vec<Message>, shutdown: &CancellationToken) {
        todo!()
    }
}
