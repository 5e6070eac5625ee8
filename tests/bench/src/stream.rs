//! The stream without the gateway: made with the product's settings, filled and looked at by async-nats itself.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::Context as _;
use async_nats::jetstream::{self, stream};
use bytes::Bytes;
use shared::delivery::{Delivery, DeliveryId, Resource};
use shared::nats::NATS_URL;
use shared::receipt::ReceiptTo;
use shared::settings::Reader;
use shared::stream::{CONSUMER, NATS_MAX_BYTES, NatsSettings, ensure_stream};
use shared::trace::TraceContext;
use time::OffsetDateTime;

use crate::bodies::Deliveries;

/// As many as the gateway.
const IN_FLIGHT: usize = 512;

/// A client of a broker, and the stream's name there.
#[derive(Clone)]
pub(crate) struct Stream {
    context: jetstream::Context,
    settings: NatsSettings,
}

/// How messages came to be on a stream, by its own clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Filled {
    pub(crate) messages: u64,
    first: OffsetDateTime,
    last: OffsetDateTime,
}

impl Filled {
    /// Messages a second between the first and the last.
    pub(crate) fn rate(&self) -> f64 {
        (self.messages - 1) as f64 / (self.last - self.first).as_seconds_f64()
    }
}

impl Stream {
    /// Connects, and makes the stream where it is missing: as the gateway makes it, but for its size, which must hold
    /// what is measured.
    pub(crate) async fn on(url: &str) -> anyhow::Result<Stream> {
        let stream = Stream::of_others(url).await?;
        ensure_stream(&stream.context, &stream.settings).await?;
        Ok(stream)
    }

    /// Connects, and leaves the stream to others to make.
    pub(crate) async fn of_others(url: &str) -> anyhow::Result<Stream> {
        let lookup = |variable: &str| match variable {
            variable if variable == NATS_URL.variable => Some(url.to_owned()),
            variable if variable == NATS_MAX_BYTES.variable => Some(MAX_BYTES.to_owned()),
            _ => None,
        };
        let mut reader = Reader::new(&lookup);
        let settings = NatsSettings::read(&mut reader);
        let settings = reader.finish(settings)?;
        Ok(Stream { context: shared::link::jetstream(async_nats::connect(url).await?), settings })
    }

    /// Publishes deliveries number `0` to `count` as the gateway publishes them (the same headers and subjects), as
    /// fast as async-nats does it from memory. Returns when all are acknowledged.
    pub(crate) async fn publish(&self, deliveries: &Arc<Deliveries>, count: u64) -> anyhow::Result<()> {
        // Made before, so that publishing is all that happens: bodies are shared, not copied.
        let bodies: Vec<Bytes> = (0..deliveries.distinct()).map(|n| deliveries.body(n)).collect();
        let salt = fastrand::u64(..);
        let mut waiting = VecDeque::with_capacity(IN_FLIGHT);
        for (n, body) in (0..count).zip(bodies.iter().cycle()) {
            if waiting.len() == IN_FLIGHT
                && let Some(ack) = waiting.pop_front()
            {
                settle(ack).await?;
            }
            let delivery = delivery(salt, n, body.clone())?;
            let headers = delivery.headers(0, &ReceiptTo::new("bench", n));
            waiting.push_back(self.context.publish_with_headers(delivery.subject(), headers, delivery.body).await?);
        }
        for ack in waiting {
            settle(ack).await?;
        }
        Ok(())
    }

    /// What is on it now.
    pub(crate) async fn filled(&self) -> anyhow::Result<Filled> {
        let stream = self.stream().await?;
        let state = &stream.cached_info().state;
        Ok(Filled { messages: state.messages, first: state.first_timestamp, last: state.last_timestamp })
    }

    /// Lets go of all messages but the newest `count`.
    pub(crate) async fn keep(&self, count: u64) -> anyhow::Result<()> {
        self.stream().await?.purge().keep(count).await?;
        Ok(())
    }

    /// Whether the workers' consumer has had everything acknowledged.
    pub(crate) async fn is_worked_off(&self) -> anyhow::Result<bool> {
        let stream = self.stream().await?;
        // Not there yet: the worker makes it.
        let Ok(info) = stream.consumer_info(CONSUMER).await else { return Ok(false) };
        // By sequences: the server counts a message as pending a moment after it stored it.
        Ok(info.delivered.stream_sequence >= stream.cached_info().state.last_sequence && info.num_ack_pending == 0)
    }

    /// Forgets what the workers have read: the next one begins at the first message.
    pub(crate) async fn rewind(&self) -> anyhow::Result<()> {
        self.stream().await?.delete_consumer(CONSUMER).await?;
        Ok(())
    }

    /// The stream as it is now.
    pub(crate) async fn stream(&self) -> anyhow::Result<stream::Stream> {
        Ok(self.context.get_stream(&self.settings.stream).await?)
    }
}

/// The size of the stream, wherever one is made here.
pub(crate) const MAX_BYTES: &str = "60GiB";

async fn settle(ack: jetstream::context::PublishAckFuture) -> anyhow::Result<()> {
    let ack = ack.await.context("JetStream did not acknowledge a message")?;
    anyhow::ensure!(!ack.duplicate, "a message was taken for a duplicate");
    Ok(())
}

/// A delivery as the gateway has it, without the digest that its id costs there.
pub(crate) fn delivery(salt: u64, n: u64, body: Bytes) -> anyhow::Result<Delivery> {
    let now = OffsetDateTime::now_utc();
    Ok(Delivery {
        id: DeliveryId::parse(&format!("{salt:016x}-{n:016x}")).context("an id of hex digits is an id")?,
        received_at: now.replace_nanosecond(now.microsecond() * 1000)?,
        resource: Resource::of(Some("error")),
        request_id: Some(format!("{salt:016x}{n:016x}")),
        hook_timestamp: Some("1700000000".into()),
        trace: TraceContext::parse(&format!("00-{salt:016x}{n:016x}-{:016x}-00", n + 1)),
        body,
    })
}
