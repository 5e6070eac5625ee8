//! A message that the consumer has delivered.

use async_nats::HeaderMap;
use async_nats::jetstream::Message;
use shared::stream::SUBJECT_PREFIX;
use time::OffsetDateTime;

use crate::dead_letters::DeadLetter;
use crate::read::read_message;
use crate::store::Record;

/// A message of the stream, with its place there. Only a message that can be acknowledged becomes one.
#[derive(Debug, Clone)]
pub struct Pulled {
    pub(super) message: Message,
    /// Its place in the stream.
    pub(super) sequence: u64,
    /// When the stream stored it.
    stored_at: OffsetDateTime,
    /// Number of times that the consumer has delivered it.
    pub(super) attempts: i64,
}

impl Pulled {
    /// `None` for what no consumer has sent: its reply subject does not name a place in a stream.
    pub fn of(message: Message) -> Option<Pulled> {
        let info = message.info().ok()?;
        let (sequence, stored_at, attempts) = (info.stream_sequence, info.published, info.delivered);
        Some(Pulled { message, sequence, stored_at, attempts })
    }

    /// The message's headers.
    pub fn headers(&self) -> Option<&HeaderMap> {
        self.message.headers.as_ref()
    }

    /// Returns `true` for a message on a delivery's subject.
    pub(super) fn is_delivery(&self) -> bool {
        let resource = self.message.subject.strip_prefix(SUBJECT_PREFIX).and_then(|rest| rest.strip_prefix('.'));
        resource.is_some_and(|resource| !resource.contains('.'))
    }

    /// The row that the message is to become.
    ///
    /// # Errors
    /// The dead letter that it is.
    pub fn read(&self) -> Result<Record, Box<DeadLetter>> {
        read_message(&self.message.message, self.sequence, self.stored_at, self.attempts)
    }
}

#[cfg(test)]
mod tests {
    use async_nats::jetstream;

    use super::*;

    #[tokio::test]
    async fn only_what_a_consumer_sent_is_a_message_of_the_stream() {
        // A client that never connects: a message only needs one to be acknowledged.
        let client = async_nats::ConnectOptions::new().retry_on_initial_connect().connect("127.0.0.1:1").await.unwrap();
        let context = jetstream::new(client);
        let pulled_from = |subject: &str, reply: Option<&str>| {
            let message = async_nats::Message {
                subject: subject.into(),
                reply: reply.map(Into::into),
                payload: "{}".into(),
                headers: None,
                status: None,
                description: None,
                length: 2,
            };
            Pulled::of(Message { message, context: context.clone() })
        };
        let pulled = |reply| pulled_from("signals.sentry.issue", reply);
        let reply = Some("$JS.ACK.SIGNALS.worker.2.7.9.1700000000000000000.0");
        for foreign in ["signals.github.push", "signals.sentry", "signals.sentry.a.b", "signals.sentryx.a"] {
            assert!(!pulled_from(foreign, reply).unwrap().is_delivery(), "{foreign}");
        }
        assert!(pulled(reply).unwrap().is_delivery());
        let good = pulled(Some("$JS.ACK.SIGNALS.worker.2.7.9.1700000000000000000.0")).unwrap();
        assert_eq!((good.sequence, good.attempts), (7, 2));
        assert_eq!(good.read().unwrap().stream_sequence, 7);
        for reply in [
            None,
            Some(""),
            Some("_INBOX.x"),
            Some("$JS.ACK."),
            Some("$JS.ACK.a.b.c.d.e.f.g"),
            Some("$JS.ACK.S.w.1.-1.1.1.0"),
        ] {
            assert!(pulled(reply).is_none(), "{reply:?}");
        }
        let far = pulled(Some("$JS.ACK.S.w.1.1.1.999999999999999999999999999999999.0"));
        assert!(far.is_none(), "a time that no calendar has");
    }
}
