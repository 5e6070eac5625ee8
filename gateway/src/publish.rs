//! Publishing: a verified delivery goes to JetStream, and only its ack makes it accepted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::{self, context::PublishErrorKind};
use shared::delivery::Delivery;
use shared::ops::Readiness;
use shared::stream::{self, NatsSettings};
use tokio_util::sync::CancellationToken;

/// How long JetStream may take to ack. Sentry gives up after a second.
const ACK_WITHIN: Duration = Duration::from_millis(900);

/// Why a delivery is not known to be on the stream. It may be there all the same; its id makes a repeat harmless.
#[derive(Debug, thiserror::Error)]
pub enum NotStored {
    /// NATS is not connected, or the stream is not there or not as it must be.
    #[error("NATS is not ready")]
    NotReady,
    /// No ack in time.
    #[error("JetStream did not acknowledge within {} ms", ACK_WITHIN.as_millis())]
    TimedOut,
    /// JetStream said no.
    #[error("JetStream refused it: {0}")]
    Refused(String),
}

/// Publishes deliveries. Clones share one connection.
#[derive(Clone)]
pub struct Publisher {
    context: jetstream::Context,
    client: async_nats::Client,
    /// Whether the stream was found fit.
    stream_ready: Arc<AtomicBool>,
}

impl Publisher {
    /// Connects and prepares the stream in the background, for as long as it takes.
    ///
    /// # Errors
    /// Where the NATS client itself cannot be made.
    pub async fn start(
        nats: &NatsSettings,
        readiness: &Readiness,
        shutdown: CancellationToken,
    ) -> anyhow::Result<Self> {
        let client = nats.connect("gateway", readiness).await?;
        let context = stream::jetstream(client.clone());
        let publisher = Publisher { context, client, stream_ready: Arc::default() };
        let (preparing, nats, readiness) = (publisher.clone(), nats.clone(), readiness.clone());
        readiness.set("stream", Err("not looked at yet".into()));
        tokio::spawn(async move { shutdown.run_until_cancelled(preparing.prepare(&nats, &readiness)).await });
        Ok(publisher)
    }

    async fn prepare(&self, nats: &NatsSettings, readiness: &Readiness) {
        stream::until_ready("stream", readiness, || stream::ensure_stream(&self.context, nats)).await;
        self.stream_ready.store(true, Ordering::Release);
    }

    /// Puts a delivery on the stream; returns once JetStream acknowledged it.
    ///
    /// # Errors
    /// [`NotStored`], in any case within [`ACK_WITHIN`].
    pub async fn publish(&self, delivery: &Delivery) -> Result<(), NotStored> {
        // Without a connection the client would hold the message for later; the answer cannot wait for that.
        if self.client.connection_state() != State::Connected || !self.stream_ready.load(Ordering::Acquire) {
            return Err(NotStored::NotReady);
        }
        let acked = async {
            let publish =
                self.context.publish_with_headers(delivery.subject(), delivery.headers(), delivery.body.clone());
            publish.await?.await
        };
        match tokio::time::timeout(ACK_WITHIN, acked).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if error.kind() == PublishErrorKind::TimedOut => Err(NotStored::TimedOut),
            Ok(Err(error)) => Err(NotStored::Refused(error.to_string())),
            Err(_) => Err(NotStored::TimedOut),
        }
    }
}
