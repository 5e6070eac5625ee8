//! The rights that a login needs. Each is tried by a message without effect.
//!
//! The server checks the permission before it looks at the message. It sends a refusal as an event. So the check
//! publishes what the receiver must refuse: a member of a wrong type, and no reply subject. A receiver that ignored the
//! wrong member would still find nothing to do in the rest of the message.

use async_nats::Client;

use super::Side;
use crate::receipt;
use crate::stream::{CONSUMER, NatsSettings, SUBJECTS};

/// The request for the account's limits. Only a check sends it.
pub(super) const ACCOUNT_INFO: &str = "$JS.API.INFO";

/// The request for the names of streams. Only a check sends it.
pub(super) const STREAM_NAMES: &str = "$JS.API.STREAM.NAMES";

/// The request for what the server knows of this login, which has no effect. Only a check sends it.
pub(super) const END: &str = "$SYS.REQ.USER.INFO";

/// The rights that one program needs.
pub(super) struct Rights {
    /// Subjects, each with the message that tries it.
    tried: Vec<(String, &'static str)>,
    /// All subjects to publish to, as they stand in the server's configuration.
    publish: Vec<String>,
    /// All subjects to subscribe to, in words.
    subscribe: &'static str,
}

impl Rights {
    /// The rights of the program on that side, for the stream of these settings.
    pub(super) fn of(nats: &NatsSettings, side: Side<'_>) -> Rights {
        let api = |call: &str| format!("$JS.API.{call}.{}", nats.stream);
        let (stream, consumer) = (stream_info(nats), consumer_info(nats));
        let get = api("STREAM.MSG.GET");
        let try_get = (get.clone(), r#"{"seq":"none"}"#);
        match side {
            Side::Gateway { .. } => {
                let create = stream_create(nats);
                let tried =
                    vec![(stream.clone(), ""), (create.clone(), r#"{"name":0}"#), try_get, (consumer.clone(), "")];
                let publish = vec![SUBJECTS.to_owned(), stream, create, get, consumer];
                Rights { tried, publish, subscribe: "receipts.* and its inbox" }
            }
            Side::Worker => {
                let create = format!("{}.{CONSUMER}.{SUBJECTS}", api("CONSUMER.CREATE"));
                let next = format!("{}.{CONSUMER}", api("CONSUMER.MSG.NEXT"));
                let (purge, ack) = (api("STREAM.PURGE"), format!("$JS.ACK.{}.{CONSUMER}", nats.stream));
                let tried = vec![
                    (receipt::subject("check"), ""), // no gateway has this id
                    (stream.clone(), ""),
                    try_get,
                    (consumer.clone(), ""),
                    (create.clone(), r#"{"stream_name":0}"#),
                    (next.clone(), r#"{"batch":"none","no_wait":true}"#),
                    (format!("{ack}.0.0.0.0.0"), "+WPI"), // a progress ack for sequence 0, which no message has
                    (purge.clone(), r#"{"filter":"none","seq":1,"keep":"none"}"#),
                ];
                let acks = [format!("{ack}.>"), format!("$JS.ACK.*.*.{}.{CONSUMER}.>", nats.stream)];
                let mut publish = vec![receipt::subject("*"), stream, get, consumer, create, next, purge, reset(nats)];
                publish.extend(acks);
                Rights { tried, publish, subscribe: "its inbox" }
            }
        }
    }

    /// Publishes to each subject and to those that only a check needs. A refusal comes as an event.
    pub(super) async fn try_all(&self, client: &Client) {
        let all = self.tried.iter().map(|(subject, message)| (subject.as_str(), *message));
        for (subject, message) in all.chain([(ACCOUNT_INFO, ""), (STREAM_NAMES, "")]) {
            let _ = client.publish(subject.to_owned(), message.into()).await; // refused by the server, not here
        }
    }

    /// The permissions to write into the servers' configuration.
    pub(super) fn advice(&self) -> String {
        format!("allow this login to publish {} and to subscribe to {}", self.publish.join(", "), self.subscribe)
    }
}

/// The request for the stream's state.
pub(super) fn stream_info(nats: &NatsSettings) -> String {
    format!("$JS.API.STREAM.INFO.{}", nats.stream)
}

/// The request for the consumer's state.
pub(super) fn consumer_info(nats: &NatsSettings) -> String {
    format!("$JS.API.CONSUMER.INFO.{}.{CONSUMER}", nats.stream)
}

/// The request that makes the stream.
pub(super) fn stream_create(nats: &NatsSettings) -> String {
    format!("$JS.API.STREAM.CREATE.{}", nats.stream)
}

/// The request that moves the consumer back. The check never sends it: a request without a sequence moves it, too.
pub(super) fn reset(nats: &NatsSettings) -> String {
    format!("$JS.API.CONSUMER.RESET.{}.{CONSUMER}", nats.stream)
}

/// `true`: the refusal names this subject.
pub(super) fn is_about(refusal: &str, subject: &str) -> bool {
    refusal.contains(&format!("\"{subject}\""))
}
