//! One connection to NATS, from its beginning to its end, and what may be said to the server in it.
//!
//! Acks name a message by its sequence. A broker that came back with older files gives sequences out again, so an ack
//! that was meant for a message of before a reconnect could acknowledge another one, unread. Hence this rule: what was
//! delivered in a session is acknowledged in it or not at all. What is not acknowledged comes again after the ack
//! wait; if it was stored, the ledger knows it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_nats::Client;
use async_nats::jetstream::{AckKind, Context};
use futures_util::future::join_all;
use shared::link::Linked;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::pulled::Pulled;
use super::set_back::delay;

/// How long the server may take to confirm an ack. One that is not confirmed costs a redelivery, which changes nothing.
const ACK_WITHIN: Duration = Duration::from_secs(5);
/// How often a session looks whether its connection is still there.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// The time of one connection, shared by all pullers of a worker.
pub struct Session {
    linked: Arc<Linked>,
    /// Which of the client's connections this is, counted from 1.
    connection: u64,
    ended: CancellationToken,
    /// Why pulling ended.
    failure: OnceLock<String>,
}

impl Session {
    /// Begins one with the connection that the client has now. Begun before the consumer is looked at, it also covers
    /// what was found there.
    pub fn begin(linked: Arc<Linked>) -> Session {
        let connection = connections(&linked.client);
        Session { linked, connection, ended: CancellationToken::new(), failure: OnceLock::new() }
    }

    /// Ends it for every puller, because pulling has failed.
    pub fn fail(&self, why: String) {
        let _ = self.failure.set(why); // the first says most
        self.end();
    }

    /// Why pulling failed, if it did.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Ends it for everybody.
    pub fn end(&self) {
        self.ended.cancel();
    }

    /// Whether it was ended or its connection is gone.
    pub fn is_over(&self) -> bool {
        self.ended.is_cancelled() || self.has_lost_connection()
    }

    /// Returns `true` when its connection is gone, or the client itself.
    pub fn has_lost_connection(&self) -> bool {
        self.connection != connections(&self.linked.client) || !self.linked.is_up()
    }

    /// Returns once it is over. It looks, and does not rely on the client's events: those may be dropped when there
    /// are many, and the count of connections cannot lie.
    pub async fn over(&self) {
        while !self.is_over() {
            let _ = timeout(LOOK_EVERY, self.ended.cancelled()).await;
        }
    }

    /// The client.
    pub(super) fn client(&self) -> &Client {
        &self.linked.client
    }

    /// JetStream by that client.
    pub(crate) fn context(&self) -> &Context {
        &self.linked.context
    }

    /// Acknowledges messages that are stored, and waits until the server confirms. Gives how many acks it did not.
    pub(super) async fn acknowledge(&self, messages: &[Pulled]) -> usize {
        let unconfirmed = match self.is_over() {
            true => messages.len(),
            false => {
                match timeout(ACK_WITHIN, join_all(messages.iter().map(|pulled| pulled.message.double_ack()))).await {
                    Ok(acks) => acks.into_iter().filter(Result::is_err).count(),
                    Err(_) => messages.len(),
                }
            }
        };
        if unconfirmed > 0 {
            tracing::warn!(
                unconfirmed,
                "stored deliveries whose ack was not confirmed; they may come again, which is harmless"
            );
        }
        unconfirmed
    }

    /// Keeps telling the server that these messages are worked on, so that nobody else gets them. Returns when
    /// the session is over, and nothing can be told any more.
    pub(super) async fn keep(&self, messages: &[Pulled], every: Duration) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await; // the first is at once, and the server has only just delivered them
        loop {
            ticks.tick().await;
            for pulled in messages {
                if self.is_over() {
                    return;
                }
                // One that is not told is delivered again after the ack wait.
                let _ = pulled.message.ack_with(AckKind::Progress).await;
            }
        }
    }

    /// Gives messages back to the consumer, which delivers them again after a while.
    pub(super) async fn set_back(&self, messages: &[Pulled]) {
        for pulled in messages {
            if self.is_over() {
                return;
            }
            // One that cannot be set back is delivered again after the ack wait.
            let _ = pulled.message.ack_with(AckKind::Nak(Some(delay(pulled.attempts)))).await;
        }
    }

    /// Gives messages back to the consumer, for another worker to have at once.
    pub async fn hand_back(&self, messages: &[Pulled]) {
        for pulled in messages {
            if self.is_over() {
                return;
            }
            // One that cannot be handed back is delivered again after the ack wait.
            let _ = pulled.message.ack_with(AckKind::Nak(None)).await;
        }
    }
}

/// A moment in which whatever ended a session may pass, so that two sessions never follow in a spin.
pub async fn pause() {
    sleep(LOOK_EVERY).await;
}

fn connections(client: &Client) -> u64 {
    client.statistics().connects.load(Ordering::Relaxed)
}
