//! What the gateway counts, and what each number means. All of it is on `/metrics`.

use std::fmt::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric as _, LabelValueEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::journal::{Journal, SYNC_BUCKETS, State};
use crate::receive::Gateway;
use crate::reject::Reject;

/// Why an entry was published again though JetStream had acknowledged it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Repeat {
    /// The stream has nothing at its sequence.
    Missing,
    /// Another message is at its sequence.
    Replaced,
    /// The consumer is past it, and no receipt came.
    Passed,
}

impl Repeat {
    /// Its name as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Repeat::Missing => "missing",
            Repeat::Replaced => "replaced",
            Repeat::Passed => "passed",
        }
    }
}

impl EncodeLabelValue for Repeat {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), Error> {
        self.as_str().encode(encoder)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RepeatLabels {
    cause: Repeat,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    status: u16,
    reason: &'static str,
}

/// What is counted as it happens. Clones count into the same numbers.
#[derive(Debug, Clone)]
pub struct Metrics {
    answers: Family<AnswerLabels, Counter>,
    publish: Histogram,
    repeats: Family<RepeatLabels, Counter>,
}

impl Metrics {
    /// All metrics of a gateway with this journal, registered.
    pub fn new(registry: &mut Registry, journal: &Journal) -> Self {
        let metrics = Metrics {
            answers: Family::default(),
            publish: Histogram::new([0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0]),
            repeats: Family::default(),
        };
        registry.register(
            "gateway_answers",
            "Answers of the public listener, by status and reason (accepted, or why not)",
            metrics.answers.clone(),
        );
        registry.register_with_unit(
            "gateway_publish",
            "From sending an entry to JetStream to its acknowledgement",
            Unit::Seconds,
            metrics.publish.clone(),
        );
        registry.register(
            "gateway_repeats",
            "Entries published again for want of a receipt, by cause (missing, replaced, passed)",
            metrics.repeats.clone(),
        );
        registry.register_collector(Box::new(OfJournal(Arc::new(journal.clone()))));
        metrics
    }

    /// A request was answered: with 202, or refused.
    pub fn answered(&self, refused: Option<&Reject>) {
        let (status, reason) = refused.map_or((202, "accepted"), |why| (why.status().as_u16(), why.reason()));
        self.answers.get_or_create(&AnswerLabels { status, reason }).inc();
    }

    /// An entry was acknowledged, so long after it was sent.
    pub fn published(&self, took: Duration) {
        self.publish.observe(took.as_secs_f64());
    }

    /// An entry is to be published again.
    pub fn repeated(&self, cause: Repeat) {
        self.repeats.get_or_create(&RepeatLabels { cause }).inc();
    }
}

/// Has the memory that `gateway`'s bodies take shown.
pub fn watch_bodies(registry: &mut Registry, gateway: Arc<Gateway>) {
    registry.register_collector(Box::new(OfBodies(gateway)));
}

/// What the bodies in flight take at the moment somebody asks.
struct OfBodies(Arc<Gateway>);

impl std::fmt::Debug for OfBodies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OfBodies")
    }
}

impl Collector for OfBodies {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let gauge = ConstGauge::new(self.0.bytes_in_flight() as f64);
        let help = "Memory that bodies being received take (at most GATEWAY_MAX_BYTES_IN_FLIGHT)";
        gauge.encode(encoder.encode_descriptor(
            "gateway_bodies_in_flight",
            help,
            Some(&Unit::Bytes),
            gauge.metric_type(),
        )?)
    }
}

/// What the journal says of itself at the moment somebody asks.
#[derive(Debug)]
struct OfJournal(Arc<Journal>);

impl Collector for OfJournal {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let stats = self.0.stats();
        let unsettled = [State::Journalled, State::Published, State::SetAside].map(|state| stats.share(state));
        let unconfirmed: u64 = unsettled.iter().map(|share| share.tally.entries).sum();
        let oldest = unsettled.iter().filter_map(|share| share.oldest).min();
        let age = oldest.and_then(|oldest| SystemTime::now().duration_since(oldest).ok()).unwrap_or_default();

        let mut gauge = |name: &str, help: &str, unit: Option<&Unit>, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
        };
        gauge(
            "gateway_deliveries_unconfirmed",
            "Deliveries answered 202 that no worker has confirmed yet",
            None,
            unconfirmed as f64,
        )?;
        let help = "How long ago the oldest of them was received";
        gauge("gateway_oldest_unconfirmed_age", help, Some(&Unit::Seconds), age.as_secs_f64())?;
        let help = "What the journal takes on disk, reserved space included";
        gauge("gateway_journal_disk", help, Some(&Unit::Bytes), stats.bytes_on_disk as f64)?;
        let help = "Damaged journal files kept for people to look at";
        gauge("gateway_journal_damaged_files", help, None, stats.damaged_files as f64)?;
        let trouble = f64::from(u8::from(self.0.trouble().is_some()));
        gauge(
            "gateway_journal_failing",
            "1 while the journal cannot take deliveries (they are answered 503)",
            None,
            trouble,
        )?;

        let mut counter = |name: &str, help: &str, value: u64| {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)
        };
        let help = "Journal records found damaged: deliveries that are lost here";
        counter("gateway_journal_damaged_records", help, stats.damaged_records)?;
        let help = "Entries let go unconfirmed to make room at the byte limit (the stream has them)";
        counter("gateway_journal_dropped_unconfirmed", help, stats.dropped_unconfirmed)?;

        let per_state = [
            ("gateway_journal_entries", "Entries in the journal by state", None),
            ("gateway_journal_size", "Bytes of entries in the journal by state", Some(&Unit::Bytes)),
        ];
        for (name, help, unit) in per_state {
            let mut encoder = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
            for share in stats.shares {
                let value = if unit.is_some() { share.tally.bytes } else { share.tally.entries };
                let labels = [("state", share.state.as_str())];
                ConstGauge::new(value as f64).encode(encoder.encode_family(&labels)?)?;
            }
        }

        let help = "Writing and syncing one batch of entries to the journal";
        let mut syncs =
            encoder.encode_descriptor("gateway_journal_sync", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        let buckets: Vec<_> = SYNC_BUCKETS.into_iter().zip(stats.syncs.buckets).collect();
        let beyond = stats.syncs.count - stats.syncs.buckets.iter().sum::<u64>();
        let all: Vec<_> = buckets.into_iter().chain([(f64::MAX, beyond)]).collect();
        syncs.encode_histogram::<NoLabelSet>(stats.syncs.sum.as_secs_f64(), stats.syncs.count, &all, None)
    }
}
