//! Asks the stream for an entry: three requests to JetStream, and the meaning of their answers and failures.
//!
//! STREAM.MSG.GET is answered by the stream's leader; a direct get could come from a stale replica. Its answer holds the
//! whole body. A consumer with `headers_only` would leave the body out. It is not used: it needs the right to create
//! consumers, and nats-server itself ends over some messages that such a consumer meets (`trust::publisher` in the tests).

use std::sync::Arc;

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::RequestErrorKind;
use async_nats::jetstream::response::Response;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use shared::delivery::{DELIVERY_ID, DeliveryId};
use shared::hostile::{self, StoredHeaders};
use shared::link::{ANSWER_WITHIN, Linked};
use shared::receipt::RECEIPT_TO;
use shared::stream::CONSUMER;

use crate::journal::{Evidence, Unconfirmed};
use crate::metrics::{NotAsked, Repeat};
use crate::publish::Publisher;
use crate::receipts::{self, ReceiptKey};

/// The judgement on an entry without a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Its message is in the stream. The consumer will come to it, or its receipt has come.
    Waits {
        /// The tag that the message shows, and that its receipt must show.
        tag: u64,
    },
    /// It has to be published again.
    Repeat(Repeat),
}

/// The stream could not be asked.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) cause: NotAsked,
    /// For people: what failed, and what to do.
    pub(super) what: String,
}

/// The stream as it is now, and how far its consumer has come.
pub(super) struct Broker<'a> {
    linked: Arc<Linked>,
    stream: &'a str,
    /// Of the messages that the stream holds.
    first: u64,
    last: u64,
    /// Everything up to this sequence is acknowledged.
    passed: u64,
}

/// The part of an answer to STREAM.INFO that is read here.
#[derive(Deserialize)]
struct StreamInfo {
    state: StreamState,
}

#[derive(Deserialize)]
struct StreamState {
    #[serde(rename = "first_seq")]
    first: u64,
    #[serde(rename = "last_seq")]
    last: u64,
}

/// The part of an answer to CONSUMER.INFO that is read here.
#[derive(Deserialize)]
struct ConsumerInfo {
    ack_floor: AckFloor,
}

#[derive(Deserialize)]
struct AckFloor {
    #[serde(rename = "stream_seq")]
    sequence: u64,
}

impl<'a> Broker<'a> {
    /// Looks at the stream and its consumer.
    ///
    /// # Errors
    /// [`Failure`]. A stream that is gone is one: the publisher makes it anew, and then it is found empty.
    pub(super) async fn look(publisher: &Publisher, stream: &'a str) -> Result<Self, Failure> {
        let mut broker = Broker { linked: publisher.link().current(), stream, first: 0, last: 0, passed: 0 };
        let info: Option<StreamInfo> = broker.ask(format!("STREAM.INFO.{stream}"), json!({}), None).await?;
        if let Some(StreamInfo { state }) = info {
            (broker.first, broker.last) = (state.first, state.last);
        }
        // One that is made (again) begins at the start.
        let missing = Some(ErrorCode::CONSUMER_NOT_FOUND);
        let info: Option<ConsumerInfo> =
            broker.ask(format!("CONSUMER.INFO.{stream}.{CONSUMER}"), json!({}), missing).await?;
        broker.passed = info.map_or(0, |info| info.ack_floor.sequence);
        Ok(broker)
    }

    /// Judges an entry of the journal of gateway `id`.
    ///
    /// # Errors
    /// [`Failure`]; asking again later is right.
    pub(super) async fn fate(&self, entry: &Unconfirmed, id: &str, key: &ReceiptKey) -> Result<Fate, Failure> {
        let passed = entry.sequence <= self.passed;
        let duplicate = matches!(entry.evidence, Evidence::Duplicate { .. });
        if passed && !duplicate {
            return Ok(Fate::Repeat(Repeat::Passed));
        }
        if !(self.first..=self.last).contains(&entry.sequence) {
            return Ok(Fate::Repeat(Repeat::Missing));
        }
        let Some(block) = self.header_block(entry.sequence).await? else { return Ok(Fate::Repeat(Repeat::Missing)) };
        let tag = hostile::header(&block, DELIVERY_ID)
            .and_then(DeliveryId::parse)
            .map(|delivery| key.tag(entry.place, &delivery))
            // It shows that this gateway published this delivery from this place.
            .filter(|tag| hostile::header(&block, RECEIPT_TO) == Some(receipts::to(id, entry.place, *tag).as_str()));
        Ok(match (tag, entry.evidence) {
            (Some(_), Evidence::Duplicate { receipted: false }) if passed => Fate::Repeat(Repeat::Passed),
            (Some(tag), _) => Fate::Waits { tag },
            (None, Evidence::Duplicate { .. }) => Fate::Repeat(Repeat::Duplicate),
            (None, _) => Fate::Repeat(Repeat::Replaced),
        })
    }

    /// Tries the right to fetch messages, without a message.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) async fn try_fetching(&self) -> Result<(), Failure> {
        self.header_block(u64::MAX).await.map(drop)
    }

    /// The header block of the message at `sequence`; `None` where there is none.
    async fn header_block(&self, sequence: u64) -> Result<Option<bytes::Bytes>, Failure> {
        let missing = Some(ErrorCode::NO_MESSAGE_FOUND);
        let call = format!("STREAM.MSG.GET.{}", self.stream);
        let answer: Option<StoredHeaders> = self.ask(call, json!({ "seq": sequence }), missing).await?;
        Ok(answer.map(|headers| headers.block()))
    }

    /// A request to JetStream. `None`: it answers that what is asked for does not exist, as the code `missing` says.
    async fn ask<T: DeserializeOwned>(
        &self,
        call: String,
        request: Value,
        missing: Option<ErrorCode>,
    ) -> Result<Option<T>, Failure> {
        let subject = format!("$JS.API.{call}");
        match self.linked.context.request(call, &request).await {
            Ok(Response::Ok(answer)) => Ok(Some(answer)),
            Ok(Response::Err { error }) if Some(error.error_code()) == missing => Ok(None),
            Ok(Response::Err { error }) => {
                Err(Failure { cause: NotAsked::Other, what: format!("JetStream refuses {subject}: {error}") })
            }
            Err(_) if self.linked.is_denied(&subject) => Err(self.denied(&subject)),
            Err(error) if error.kind() == RequestErrorKind::TimedOut => {
                let what = format!("no answer within {} s to {subject}", ANSWER_WITHIN.as_secs());
                Err(Failure { cause: NotAsked::TimedOut, what })
            }
            Err(error) => Err(Failure { cause: NotAsked::Other, what: format!("cannot ask {subject}: {error}") }),
        }
    }

    fn denied(&self, subject: &str) -> Failure {
        let stream = self.stream;
        let what = format!(
            "this login may not publish to {subject}, so what the stream loses is not published again: allow this login \
             to publish $JS.API.STREAM.INFO.{stream}, $JS.API.CONSUMER.INFO.{stream}.{CONSUMER} and \
             $JS.API.STREAM.MSG.GET.{stream}"
        );
        Failure { cause: NotAsked::Permission, what }
    }
}
