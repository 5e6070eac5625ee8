//! Confirming: the end-to-end argument. An entry is let go once the worker that stored it says so, and whatever else
//! happens to it on the way, it is looked after until then.
//!
//! - Receipts ([`crate::receipts`]) confirm entries. They may be lost, late, repeated, or meant for another journal.
//! - An entry without a receipt for `GATEWAY_CONFIRM_AFTER` is looked after: the stream is asked for the message at the
//!   sequence that was promised (STREAM.MSG.GET, which the leader answers; a direct get could come from a stale replica).
//!   There under its id, and not yet passed by the consumer: it waits on, however long PostgreSQL is away. Gone, another
//!   message in its place (a broker whose files went back in time uses sequences again), or passed without a receipt: it
//!   is published again under `<id>.<n>`. At most a few hundred a second are looked after, and an entry that was repeated
//!   waits twice as long for the next time.

use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream as streams};
use shared::delivery::{DELIVERY_ID, Delivery};
use shared::hostile::StoredMessage;
use shared::stream::CONSUMER;

use crate::journal::{Journal, Unconfirmed};
use crate::metrics::{Metrics, Repeat};
use crate::publish::Publisher;

/// Entries looked after at once, and in one round.
const AT_ONCE: usize = 16;
const A_ROUND: usize = 256;
/// An entry that is repeated again and again waits at most this many times the confirm time, doubled each time.
const BACKOFF_MAX: u32 = 1 << 8;

/// Looks after entries that have no receipt after `confirm_after`.
pub async fn look_after(
    journal: &Journal,
    publisher: &Publisher,
    metrics: &Metrics,
    stream: &str,
    confirm_after: Duration,
) {
    let pause = (confirm_after / 8).clamp(Duration::from_millis(100), Duration::from_secs(5));
    let mut after = None;
    loop {
        tokio::time::sleep(pause).await;
        if !publisher.is_up() {
            continue;
        }
        let round = journal.unconfirmed(confirm_after, after, A_ROUND);
        // The next round goes on where this one ends; at the end it begins again with the oldest.
        after = round.last().filter(|_| round.len() == A_ROUND).map(|last| last.place);
        if round.is_empty() {
            continue;
        }
        let Some(broker) = Broker::look(publisher, stream).await else { continue };
        let due: Vec<_> = round
            .into_iter()
            .filter(|entry| entry.published_for >= confirm_after * wait_factor(entry.repeats))
            .collect();
        let judged = streams::iter(due).map(|entry| broker.judge(journal, entry)).buffer_unordered(AT_ONCE);
        let judged: Vec<_> = judged.collect().await;
        for (entry, fate) in judged {
            match fate {
                Fate::Waits => {
                    journal.mark_published(entry.place, entry.sequence); // looked at again after another while
                }
                Fate::Unknown => {}
                Fate::Repeat(cause) => {
                    tell_repeat(journal, &entry, cause).await;
                    metrics.repeated(cause);
                    journal.mark_lost(entry.place);
                }
            }
        }
    }
}

/// Which delivery that is stands on disk, and is read for this line; it is about to be read to be published anyway.
async fn tell_repeat(journal: &Journal, entry: &Unconfirmed, cause: Repeat) {
    let block = journal.read_header_block(entry.place).await.ok();
    let delivery = block.and_then(|block| Delivery::from_journal(&block, Bytes::new()).ok());
    tracing::warn!(
        delivery.id = delivery.as_ref().map(|delivery| display(&delivery.id)),
        trace.id = delivery.as_ref().and_then(Delivery::trace_id),
        place = %entry.place,
        sequence = entry.sequence,
        cause = cause.as_str(),
        "a delivery has no receipt and is published again"
    );
}

fn wait_factor(repeats: u8) -> u32 {
    1_u32.checked_shl(u32::from(repeats)).map_or(BACKOFF_MAX, |factor| factor.min(BACKOFF_MAX))
}

/// What is to become of an entry without a receipt.
enum Fate {
    /// It is in the stream, and the consumer will come to it.
    Waits,
    /// Nobody could say; asked again later.
    Unknown,
    /// It has to be published again.
    Repeat(Repeat),
}

/// The stream, and how far its consumer has come.
struct Broker {
    context: jetstream::Context,
    stream: String,
    /// Everything up to this sequence is acknowledged.
    passed: u64,
}

impl Broker {
    async fn look(publisher: &Publisher, name: &str) -> Option<Self> {
        let context = publisher.link().current().context.clone();
        // A stream that is gone has none of the entries; the publisher makes it anew, and then this finds it empty.
        let stream = context.get_stream(name).await.ok()?;
        let passed = match stream.consumer_info(CONSUMER).await {
            Ok(info) => info.ack_floor.stream_sequence,
            // One that is made (again) begins at the start.
            Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => 0,
            Err(_) => return None,
        };
        Some(Broker { context, stream: name.to_owned(), passed })
    }

    async fn judge(&self, journal: &Journal, entry: Unconfirmed) -> (Unconfirmed, Fate) {
        (entry, self.fate(journal, entry).await)
    }

    async fn fate(&self, journal: &Journal, entry: Unconfirmed) -> Fate {
        if entry.sequence <= self.passed {
            return Fate::Repeat(Repeat::Passed);
        }
        let message = match StoredMessage::at(&self.context, &self.stream, entry.sequence).await {
            Ok(Some(message)) => message,
            Ok(None) => return Fate::Repeat(Repeat::Missing),
            Err(_) => return Fate::Unknown,
        };
        let Ok(block) = journal.read_header_block(entry.place).await else { return Fate::Unknown };
        let Ok(delivery) = Delivery::from_journal(&block, Bytes::new()) else { return Fate::Unknown };
        let there = message.header(DELIVERY_ID) == Some(delivery.id.as_str());
        if there { Fate::Waits } else { Fate::Repeat(Repeat::Replaced) }
    }
}
