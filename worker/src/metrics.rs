//! What the worker counts, and what each number means. All of it is on `/metrics`, and in the README's table.

use std::collections::BTreeMap;
use std::fmt::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use shared::metrics::{Each, counter, labels};
use time::OffsetDateTime;

use crate::store::{Batch, Class, Outage, Store, StoreError, Stored};

/// Bounds of the number of deliveries in a batch.
const BATCH: [f64; 11] = [1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 2500.0, 10000.0];
/// Bounds of the time that storing a batch takes, seconds: a body of 8 MiB may take a slow server 20 s.
const PERSIST: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0];
/// Bounds of the age at which deliveries are stored, seconds: at once when all is well, hours after an outage.
const AGE: [f64; 14] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0];

/// How one try to store a batch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// Committed.
    Stored,
    /// PostgreSQL cannot store it now.
    Outage,
    /// PostgreSQL refused even a dead letter.
    Refused,
}

impl Attempt {
    const ALL: [Attempt; 3] = [Attempt::Stored, Attempt::Outage, Attempt::Refused];

    fn of(outcome: &Result<Stored, StoreError>) -> Self {
        match outcome {
            Ok(_) => Attempt::Stored,
            Err(StoreError::Outage(_)) => Attempt::Outage,
            Err(StoreError::Refused(_) | StoreError::Denied(_)) => Attempt::Refused,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Attempt::Stored => "stored",
            Attempt::Outage => "outage",
            Attempt::Refused => "refused",
        }
    }
}

/// Why work with NATS began anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anew {
    /// The connection was lost, or the consumer or its stream is gone or another.
    Session,
    /// The consumer does not answer, or was ended.
    Pull,
    /// The stream or the consumer is not there, or does not fit.
    NotReady,
}

impl Anew {
    const ALL: [Anew; 3] = [Anew::Session, Anew::Pull, Anew::NotReady];

    fn as_str(self) -> &'static str {
        match self {
            Anew::Session => "nats_session",
            Anew::Pull => "nats_pull",
            Anew::NotReady => "nats_not_ready",
        }
    }
}

/// The names of [`Metrics::fates`], in their order.
const FATES: [&str; 3] = ["stored", "known", "dead"];

/// What is counted as it happens. Clones count into the same numbers.
#[derive(Debug, Clone)]
pub struct Metrics {
    batch: Histogram,
    persist: Each<Histogram>,
    /// Deliveries by what became of them: [`FATES`].
    fates: Each<Counter>,
    age: Histogram,
    /// The classes of PostgreSQL's failures, then those of NATS.
    retries: Each<Counter>,
    acks_unconfirmed: Counter,
    ignored: Counter,
    unreadable: Counter,
    purged: Counter,
    resets: Counter,
    lag: Arc<Lag>,
    set_back: Arc<SetBackCounts>,
}

impl Metrics {
    /// All metrics of a worker that stores in `store`, registered.
    pub fn new(registry: &mut Registry, store: &Store) -> Self {
        let batch = Histogram::new(BATCH);
        registry.register("worker_batch_deliveries", "Deliveries in a batch that was pulled", batch.clone());
        let outcomes = labels("outcome", Attempt::ALL.map(Attempt::as_str));
        let help = "One try to store a batch, by how it ended (stored, outage, refused)";
        let unit = Some(Unit::Seconds);
        let persist = Each::register(registry, "worker_persist", help, unit, outcomes, || Histogram::new(PERSIST));
        let help = "Deliveries by what became of them: stored, known (they were stored before), dead letters";
        let fates =
            Each::register(registry, "worker_deliveries", help, None, labels("outcome", FATES), Counter::default);
        let age = Histogram::new(AGE);
        let help = "From a delivery's receipt by the gateway to the commit that stored it";
        registry.register_with_unit("worker_delivery_age", help, Unit::Seconds, age.clone());
        let classes = labels("class", Class::ALL.map(Class::as_str).into_iter().chain(Anew::ALL.map(Anew::as_str)));
        let help = "What had to be tried again, by what PostgreSQL said, or NATS";
        let retries = Each::register(registry, "worker_retries", help, None, classes, Counter::default);
        let help = "Acks of stored deliveries that NATS did not confirm; they may come again, which is harmless";
        let acks_unconfirmed = counter(registry, "worker_acks_unconfirmed", help);
        let help = "Messages in a worker's inbox that are no deliveries: another program sent them, or they are on another subject";
        let ignored = counter(registry, "worker_messages_ignored", help);
        let help = "Messages of the stream that NATS's client library cannot read; they became dead letters";
        let unreadable = counter(registry, "worker_messages_unreadable", help);
        let help = "Messages purged from the stream to make room, all of them acknowledged";
        let purged = counter(registry, "worker_history_purged", help);
        let help = "Times that the consumer was moved back because the stream had gone back in time";
        let resets = counter(registry, "worker_consumer_resets", help);
        let lag = Arc::<Lag>::default();
        registry.register_collector(Box::new(OfConsumer(lag.clone())));
        registry.register_collector(Box::new(OfPool(store.clone())));
        let set_back = Arc::<SetBackCounts>::default();
        registry.register_collector(Box::new(OfSetBack(set_back.clone())));
        Metrics {
            batch,
            persist,
            fates,
            age,
            retries,
            acks_unconfirmed,
            ignored,
            unreadable,
            purged,
            resets,
            lag,
            set_back,
        }
    }

    /// A batch was pulled.
    pub fn pulled(&self, deliveries: usize) {
        self.batch.observe(deliveries as f64);
    }

    /// A try to store a batch has ended, after that long.
    pub fn tried(&self, outcome: &Result<Stored, StoreError>, took: Duration) {
        let attempt = Attempt::of(outcome);
        let place = Attempt::ALL.iter().position(|member| *member == attempt).expect("ALL has every member");
        self.persist.at(place).observe(took.as_secs_f64());
    }

    /// A batch is stored, at that time.
    pub fn stored(&self, batch: &Batch, stored: &Stored, at: OffsetDateTime) {
        for (fate, deliveries) in [stored.fresh.len(), stored.known.len(), stored.dead.len()].into_iter().enumerate() {
            self.fates.at(fate).inc_by(deliveries as u64);
        }
        // Both are in the order of the stream, and each fresh one is the first of its id.
        let mut fresh = stored.fresh.iter().peekable();
        for record in &batch.records {
            if fresh.next_if(|id| **id == record.delivery_id).is_some() {
                // A clock that is behind the gateway's stores nothing before it came.
                self.age.observe((at - record.received_at).as_seconds_f64().max(0.0));
            }
        }
    }

    /// A batch is to be tried again.
    pub fn retried(&self, error: &StoreError) {
        // What is refused for good cannot be tried again with another end, but who calls may.
        let class = match error {
            StoreError::Outage(outage) => outage.class(),
            StoreError::Refused(_) | StoreError::Denied(_) => Class::Unknown,
        };
        let place = Class::ALL.iter().position(|member| *member == class).expect("ALL has every member");
        self.retries.at(place).inc();
    }

    /// Work with NATS begins anew.
    pub fn anew(&self, why: Anew) {
        let place = Anew::ALL.iter().position(|member| *member == why).expect("ALL has every member");
        self.retries.at(Class::ALL.len() + place).inc();
    }

    /// The acks of that many deliveries were not confirmed.
    pub fn acks_unconfirmed(&self, deliveries: usize) {
        self.acks_unconfirmed.inc_by(deliveries as u64);
    }

    /// Counts a message in an inbox that is no delivery.
    pub fn ignored(&self) {
        self.ignored.inc();
    }

    /// Counts a message of the stream that cannot be read and became a dead letter.
    pub fn unreadable(&self) {
        self.unreadable.inc();
    }

    /// That many messages of history were purged.
    pub fn purged(&self, messages: u64) {
        self.purged.inc_by(messages);
    }

    /// The consumer was moved back.
    pub fn consumer_reset(&self) {
        self.resets.inc();
    }

    /// The number of deliveries that are set back now, by SQLSTATE.
    pub fn set_back(&self, counts: BTreeMap<String, u64>) {
        *self.set_back.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }

    /// What the consumer says, or nothing while it cannot be asked.
    pub fn lag(&self, consumer: Option<&async_nats::jetstream::consumer::Info>) {
        let numbers = consumer.map(|info| [info.num_pending, info.num_ack_pending as u64, info.num_redelivered as u64]);
        for (shown, number) in self.lag.0.iter().zip(numbers.unwrap_or([UNKNOWN; 3])) {
            shown.store(number, Ordering::Relaxed);
        }
    }
}

/// What was counted up to some moment, for the summary in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Stored, known, dead.
    pub(crate) fates: [u64; 3],
    /// What was tried again, in the order of [`Counts::classes`].
    pub(crate) retries: Vec<u64>,
}

impl Metrics {
    /// What has been counted.
    pub(crate) fn counts(&self) -> Counts {
        Counts {
            fates: [0, 1, 2].map(|fate| self.fates.at(fate).get()),
            retries: self.retries.iter().map(Counter::get).collect(),
        }
    }

    /// Deliveries that no worker has been given yet, as the consumer said last; none where it cannot be asked.
    pub(crate) fn pending(&self) -> Option<u64> {
        Some(self.lag.0[0].load(Ordering::Relaxed)).filter(|pending| *pending != UNKNOWN)
    }
}

impl Counts {
    /// What was counted since `before`.
    pub(crate) fn since(&self, before: &Counts) -> Counts {
        Counts {
            fates: [0, 1, 2].map(|fate| self.fates[fate] - before.fates[fate]),
            retries: self.retries.iter().zip(&before.retries).map(|(now, before)| now - before).collect(),
        }
    }

    /// Whether that is nothing at all.
    pub(crate) fn is_nothing(&self) -> bool {
        self.fates.iter().chain(&self.retries).all(|count| *count == 0)
    }

    /// What was tried again, by class.
    pub(crate) fn classes(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let names = Class::ALL.map(Class::as_str).into_iter().chain(Anew::ALL.map(Anew::as_str));
        names.zip(self.retries.iter().copied())
    }
}

/// A number of the consumer's that is not known.
const UNKNOWN: u64 = u64::MAX;

/// What the consumer said last: not delivered, not acknowledged, of these delivered more than once.
#[derive(Debug)]
struct Lag([AtomicU64; 3]);

impl Default for Lag {
    fn default() -> Self {
        Lag([(); 3].map(|()| AtomicU64::new(UNKNOWN)))
    }
}

/// Looked at every two seconds by `pull::watch`. While it cannot be asked there are no numbers, rather than old ones.
#[derive(Debug)]
struct OfConsumer(Arc<Lag>);

impl Collector for OfConsumer {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let names = [
            (
                "worker_consumer_pending",
                "Deliveries on the stream that no worker has been given yet: the lag of all workers",
            ),
            ("worker_consumer_ack_pending", "Deliveries given to a worker and not acknowledged"),
            ("worker_consumer_redelivered", "Deliveries given to a worker more than once and not acknowledged"),
        ];
        for ((name, help), number) in names.into_iter().zip(&self.0.0) {
            let number = number.load(Ordering::Relaxed);
            let encoder = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            if number != UNKNOWN {
                ConstGauge::new(number as f64).encode(encoder)?;
            }
        }
        Ok(())
    }
}

/// Deliveries that are set back, by SQLSTATE.
type SetBackCounts = Mutex<BTreeMap<String, u64>>;

/// Most codes that are shown by themselves. A trigger may raise any five characters.
const CODES_MAX: usize = 20;

#[derive(Debug)]
struct OfSetBack(Arc<SetBackCounts>);

impl Collector for OfSetBack {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let name = "worker_deliveries_set_back";
        let help = "Deliveries that wait alone because PostgreSQL refuses their rows for a reason that is not known, by SQLSTATE";
        let mut codes = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        // Always there, so that it can be asked for before there are any.
        let none = counts.get(Outage::NO_SQLSTATE).copied().unwrap_or(0);
        ConstGauge::new(none as f64).encode(codes.encode_family(&[("sqlstate", Outage::NO_SQLSTATE)])?)?;
        let mut others = counts.iter().filter(|(code, _)| *code != Outage::NO_SQLSTATE);
        for (code, count) in others.by_ref().take(CODES_MAX) {
            ConstGauge::new(*count as f64).encode(codes.encode_family(&[("sqlstate", code.as_str())])?)?;
        }
        let rest: u64 = others.map(|(_, count)| count).sum();
        if rest > 0 {
            ConstGauge::new(rest as f64).encode(codes.encode_family(&[("sqlstate", "other")])?)?;
        }
        Ok(())
    }
}

/// The connections to PostgreSQL at the moment somebody asks.
#[derive(Debug)]
struct OfPool(Store);

impl Collector for OfPool {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let pool = self.0.connections();
        let help = "Connections to PostgreSQL, by state";
        let mut states = encoder.encode_descriptor("worker_pool_connections", help, None, MetricType::Gauge)?;
        for (state, number) in [("idle", pool.idle), ("used", pool.used)] {
            ConstGauge::new(number as f64).encode(states.encode_family(&[("state", state)])?)?;
        }
        let waiting = ConstGauge::new(pool.waiting as f64);
        let help = "Callers that wait for a connection to PostgreSQL";
        waiting.encode(encoder.encode_descriptor("worker_pool_waiting", help, None, MetricType::Gauge)?)
    }
}

#[cfg(test)]
mod tests {
    use shared::delivery::{Delivery, DeliveryId};

    use super::*;
    use crate::store::Origin;

    #[tokio::test]
    async fn ages_are_those_of_what_was_stored_now() {
        let mut registry = Registry::default();
        let store = Store::new(&"postgres://loop@127.0.0.1:1/loop".parse().unwrap(), 1);
        let metrics = Metrics::new(&mut registry, &store);
        let at = OffsetDateTime::UNIX_EPOCH + Duration::from_secs(100);
        let record = |id: &str, received: u64| {
            let mut delivery = Delivery::received("{}".into(), None, None, None);
            delivery.id = DeliveryId::parse(id).unwrap();
            delivery.received_at = OffsetDateTime::UNIX_EPOCH + Duration::from_secs(received);
            crate::read::read(&delivery, 1, Origin::default()).unwrap()
        };
        let records = vec![record("a", 60), record("b", 0), record("a", 0), record("c", 200)];
        let batch = Batch { records, dead_letters: vec![] };
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
        let stored = Stored { fresh: ids(&["a", "c"]), dead: vec![], known: ids(&["b"]), set_back: vec![] };
        metrics.stored(&batch, &stored, at);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "worker_delivery_age_seconds_sum 40.0", // 40 s, and none where the clocks differ
            "worker_delivery_age_seconds_count 2",
            "worker_deliveries_total{outcome=\"stored\"} 2",
            "worker_deliveries_total{outcome=\"known\"} 1",
            "worker_deliveries_total{outcome=\"dead\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in {text}");
        }
        assert!(!text.contains("\nworker_consumer_pending "), "nobody has asked the consumer yet");
    }
}
