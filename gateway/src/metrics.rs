//! What the gateway counts, and what each number means. All of it is on `/metrics`, and in the README's table.

use std::fmt::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use shared::metrics::{Each, counter, gauge, labels};

use crate::journal::{Journal, Refusal, SYNC_BUCKETS};
use crate::receive::Gateway;
use crate::reject::Reject;
use crate::signature::Form;

/// Bounds of times that are short when all is well, seconds.
const QUICK: [f64; 13] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];
/// Bounds of the time that a signature takes, seconds.
const VERIFY: [f64; 12] = [0.00001, 0.000025, 0.0001, 0.00025, 0.001, 0.0025, 0.01, 0.025, 0.1, 0.25, 0.5, 1.0];
/// Bounds of sizes of bodies: from 1 KiB to 8 MiB.
const SIZES: [f64; 8] = [1024.0, 4096.0, 16384.0, 65536.0, 262_144.0, 1_048_576.0, 4_194_304.0, 8_388_608.0];

/// Why an entry was published again though JetStream had acknowledged it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// The stream has nothing at its sequence.
    Missing,
    /// Another message is at its sequence.
    Replaced,
    /// The consumer is past it, and no receipt came.
    Passed,
    /// The stream took it for a duplicate of another entry's message, whose receipt does not settle it.
    Duplicate,
}

impl Repeat {
    const ALL: [Repeat; 4] = [Repeat::Missing, Repeat::Replaced, Repeat::Passed, Repeat::Duplicate];

    /// Its name as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Repeat::Missing => "missing",
            Repeat::Replaced => "replaced",
            Repeat::Passed => "passed",
            Repeat::Duplicate => "duplicate",
        }
    }
}

/// The reason for which the stream could not be asked for entries without a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAsked {
    /// The login lacks a right.
    Permission,
    /// No answer in time.
    TimedOut,
    /// Anything else.
    Other,
}

impl NotAsked {
    const ALL: [NotAsked; 3] = [NotAsked::Permission, NotAsked::TimedOut, NotAsked::Other];

    /// Its name as a label.
    fn as_str(self) -> &'static str {
        match self {
            NotAsked::Permission => "permission",
            NotAsked::TimedOut => "timed_out",
            NotAsked::Other => "other",
        }
    }
}

/// Why a publish is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delay {
    /// No acknowledgement in time.
    TimedOut,
    /// There is no stream at the moment.
    NoStream,
    /// The stream or the server is full.
    Full,
    /// Anything else.
    Other,
}

impl Delay {
    /// All of them, in the order of their numbers.
    pub const ALL: [Delay; 4] = [Delay::TimedOut, Delay::NoStream, Delay::Full, Delay::Other];

    /// Its name as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Delay::TimedOut => "timed_out",
            Delay::NoStream => "no_stream",
            Delay::Full => "full",
            Delay::Other => "other",
        }
    }
}

/// The reason for which a receipt was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// A message of receipts with more bytes than any worker sends.
    TooLarge,
    /// A line that is no receipt, such as one without a tag.
    Malformed,
    /// A tag that is not its entry's.
    WrongTag,
    /// An entry that NATS has refused, and so no worker can have stored.
    SetAside,
}

impl Refused {
    /// All of them, in the order of their numbers.
    pub const ALL: [Refused; 4] = [Refused::TooLarge, Refused::Malformed, Refused::WrongTag, Refused::SetAside];

    /// Its name as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Refused::TooLarge => "too_large",
            Refused::Malformed => "malformed",
            Refused::WrongTag => "wrong_tag",
            Refused::SetAside => "set_aside",
        }
    }
}

/// How long signatures took, by form and result.
#[derive(Debug, Clone)]
pub struct VerifyTimes(Each<Histogram>);

/// What [`VerifyTimes`] tells apart: the form, and whether it matched.
const VERIFIED: [(&str, &str); 4] =
    [("raw", "matched"), ("raw", "unmatched"), ("canonical", "matched"), ("canonical", "unmatched")];

impl VerifyTimes {
    /// Of the body's own bytes.
    pub fn raw(&self, matched: bool, took: Duration) {
        self.0.at(usize::from(!matched)).observe(took.as_secs_f64());
    }

    /// Of the canonical form, made for this.
    pub fn canonical(&self, matched: bool, took: Duration) {
        self.0.at(2 + usize::from(!matched)).observe(took.as_secs_f64());
    }
}

/// The forms that [`Metrics::signed`] counts.
const SIGNED: [Form; 2] = [Form::Raw, Form::Canonical];

impl Default for VerifyTimes {
    /// Times that nobody asks for.
    fn default() -> Self {
        VerifyTimes(Each::new(VERIFIED.len(), || Histogram::new(VERIFY)))
    }
}

/// What is counted as it happens. Clones count into the same numbers.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// 202 first, then the refusals in the order of [`Reject::ALL`].
    answers: Each<Counter>,
    bodies: Histogram,
    verify: VerifyTimes,
    signatures: Each<Counter>,
    repeated_bodies: Counter,
    appends: Histogram,
    appended_bytes: Counter,
    publish: Histogram,
    published: Counter,
    in_flight: Gauge,
    refusals: Each<Counter>,
    retries: Each<Counter>,
    overdue: Each<Gauge>,
    confirmed: Counter,
    receipts_refused: Each<Counter>,
    repeats: Each<Counter>,
    reconciled: Counter,
    not_asked: Each<Counter>,
    connections: Gauge,
    accepted_connections: Counter,
    accept_errors: Counter,
    secret_file_rejected: Counter,
    evictions: Counter,
    dropped_connections: Counter,
}

impl Metrics {
    /// All metrics of a gateway with this journal, registered.
    pub fn new(registry: &mut Registry, journal: &Journal) -> Self {
        let answer = |status: u16, reason: &str| vec![("status", status.to_string()), ("reason", reason.to_owned())];
        let refused = Reject::ALL.iter().map(|reject| answer(reject.status().as_u16(), reject.reason()));
        let answers = std::iter::once(answer(202, "accepted")).chain(refused).collect();
        let help = "Answers of the public listener, by status and reason (accepted, or why not)";
        let answers = Each::register(registry, "gateway_answers", help, None, answers, Counter::default);

        let bodies = Histogram::new(SIZES);
        registry.register_with_unit(
            "gateway_body",
            "Size of the bodies that were accepted",
            Unit::Bytes,
            bodies.clone(),
        );
        let verified = VERIFIED.map(|(form, result)| vec![("form", form.to_owned()), ("result", result.to_owned())]);
        let help =
            "Time that a signature took by form; a canonical one with making that form, without waiting for a turn";
        let unit = Some(Unit::Seconds);
        let verify =
            Each::register(registry, "gateway_verify", help, unit, verified.to_vec(), || Histogram::new(VERIFY));
        let help = "Right signatures, by the signed form: the body's bytes (raw) or its canonical JSON (canonical)";
        let forms = labels("form", SIGNED.map(Form::as_str));
        let signatures = Each::register(registry, "gateway_signatures", help, None, forms, Counter::default);

        let help = "Deliveries whose body was accepted under another delivery id within the hour before";
        let repeated_bodies = counter(registry, "gateway_repeated_bodies", help);

        let appends = Histogram::new(QUICK);
        let help = "From handing an accepted delivery to the journal until it is on disk";
        registry.register_with_unit("gateway_journal_append", help, Unit::Seconds, appends.clone());
        let appended_bytes = Counter::default();
        let help = "Bytes of deliveries, headers included, that were written to the journal";
        registry.register_with_unit("gateway_journal_written", help, Unit::Bytes, appended_bytes.clone());

        let publish = Histogram::new(QUICK);
        let help = "From sending an entry to JetStream to its acknowledgement";
        registry.register_with_unit("gateway_publish", help, Unit::Seconds, publish.clone());
        let help = "Acknowledgements of JetStream, those of entries published again included";
        let published = counter(registry, "gateway_published", help);
        let in_flight = gauge(registry, "gateway_publish_in_flight", "Entries on their way to JetStream");
        let refused = labels("kind", Refusal::ALL.map(Refusal::as_str));
        let help =
            "Entries set aside because NATS refuses them for good, by kind (too_large, subject, permission, other)";
        let refusals = Each::register(registry, "gateway_publish_refusals", help, None, refused, Counter::default);
        let delayed = labels("cause", Delay::ALL.map(Delay::as_str));
        let help = "Publishes that failed and are tried again, by cause (timed_out, no_stream, full, other)";
        let retries = Each::register(registry, "gateway_publish_retries", help, None, delayed, Counter::default);

        let delayed = labels("cause", Delay::ALL.map(Delay::as_str));
        let help = "Entries whose publish has failed for seconds and is tried again, by cause (timed_out, no_stream, full, other)";
        let overdue = Each::register(registry, "gateway_publish_overdue", help, None, delayed, Gauge::default);

        let help = "Deliveries that a worker has confirmed as stored";
        let confirmed = counter(registry, "gateway_confirmed", help);
        let reasons = labels("reason", Refused::ALL.map(Refused::as_str));
        let help = "Receipts that were refused, by reason (too_large, malformed, wrong_tag, set_aside)";
        let receipts_refused =
            Each::register(registry, "gateway_receipts_refused", help, None, reasons, Counter::default);
        let causes = labels("cause", Repeat::ALL.map(Repeat::as_str));
        let help = "Entries published again for want of a receipt, by cause (missing, replaced, passed, duplicate)";
        let repeats = Each::register(registry, "gateway_repeats", help, None, causes, Counter::default);
        let help = "Entries without a receipt that were looked for in the stream";
        let reconciled = counter(registry, "gateway_reconciled", help);
        let causes = labels("cause", NotAsked::ALL.map(NotAsked::as_str));
        let help = "Failures to look for such entries in the stream, by cause (permission, timed_out, other)";
        let not_asked = Each::register(registry, "gateway_reconciliation_errors", help, None, causes, Counter::default);

        let connections = gauge(registry, "gateway_connections_open", "Connections to the public listener");
        let accepted_connections =
            counter(registry, "gateway_connections_accepted", "Connections that the public listener took");
        let help = "Connections that could not be taken (out of file descriptors, say)";
        let accept_errors = counter(registry, "gateway_accept_errors", help);
        let help = "Connections without a 202 that were closed for new ones at GATEWAY_MAX_CONNECTIONS";
        let evictions = counter(registry, "gateway_connections_evicted", help);
        let help =
            "Connections beyond GATEWAY_MAX_CONNECTIONS that were closed without an answer (256 at once have one)";
        let dropped_connections = counter(registry, "gateway_connections_dropped", help);

        let help = "Times that the file of SENTRY_CLIENT_SECRET_FILE became unusable; the secrets stayed as they were";
        let secret_file_rejected = counter(registry, "gateway_secret_file_rejected", help);

        registry.register_collector(Box::new(OfJournal(Arc::new(journal.clone()))));
        Metrics {
            answers,
            bodies,
            verify: VerifyTimes(verify),
            signatures,
            repeated_bodies,
            appends,
            appended_bytes,
            publish,
            published,
            in_flight,
            refusals,
            retries,
            overdue,
            confirmed,
            receipts_refused,
            repeats,
            reconciled,
            not_asked,
            connections,
            accepted_connections,
            accept_errors,
            secret_file_rejected,
            evictions,
            dropped_connections,
        }
    }

    /// A request was answered: with 202, or refused.
    pub fn answered(&self, refused: Option<&Reject>) {
        self.answers.at(refused.map_or(0, |reject| 1 + reject.place())).inc();
    }

    /// An accepted delivery is on disk: so many bytes of it, so long after it was handed to the journal.
    pub fn journalled(&self, meta: usize, body: usize, took: Duration) {
        self.bodies.observe(body as f64);
        self.appends.observe(took.as_secs_f64());
        self.appended_bytes.inc_by((meta + body) as u64);
    }

    /// For how long signatures take.
    pub fn verify_times(&self) -> VerifyTimes {
        self.verify.clone()
    }

    /// Counts a right signature over that form.
    pub fn signed(&self, form: Form) {
        self.signatures.at(usize::from(form == Form::Canonical)).inc();
    }

    /// Counts a body that came again under another delivery id.
    pub fn repeated_body(&self) {
        self.repeated_bodies.inc();
    }

    /// An entry is on its way to JetStream until what this gives is dropped.
    pub fn publishing(&self) -> Counted {
        Counted::new(&self.in_flight)
    }

    /// An entry was acknowledged, so long after it was sent.
    pub fn published(&self, took: Duration) {
        self.publish.observe(took.as_secs_f64());
        self.published.inc();
    }

    /// An entry was set aside.
    pub fn refused(&self, refusal: Refusal) {
        self.refusals.at(place(&Refusal::ALL, refusal)).inc();
    }

    /// A publish failed and is tried again.
    pub fn delayed(&self, delay: Delay) {
        self.retries.at(place(&Delay::ALL, delay)).inc();
    }

    /// The entries whose publish has failed for seconds, for this cause.
    pub fn overdue(&self, delay: Delay) -> &Gauge {
        self.overdue.at(place(&Delay::ALL, delay))
    }

    /// That many deliveries are known to be stored that were not before.
    pub fn confirmed(&self, deliveries: usize) {
        self.confirmed.inc_by(deliveries as u64);
    }

    /// Counts refused receipts.
    pub fn receipts_refused(&self, reason: Refused, receipts: usize) {
        self.receipts_refused.at(reason as usize).inc_by(receipts as u64);
    }

    /// An entry is to be published again.
    pub fn repeated(&self, cause: Repeat) {
        self.repeats.at(place(&Repeat::ALL, cause)).inc();
    }

    /// An entry without a receipt was looked for in the stream.
    pub fn reconciled(&self) {
        self.reconciled.inc();
    }

    /// The stream could not be asked.
    pub fn not_asked(&self, cause: NotAsked) {
        self.not_asked.at(place(&NotAsked::ALL, cause)).inc();
    }

    /// A connection was taken, and is there until what this gives is dropped.
    pub fn connected(&self) -> Counted {
        self.accepted_connections.inc();
        Counted::new(&self.connections)
    }

    /// Counts the times that the secrets' file became unusable.
    pub fn secret_file_rejected(&self) -> &Counter {
        &self.secret_file_rejected
    }

    /// Counts the connections that were closed for new ones.
    pub fn evictions(&self) -> Counter {
        self.evictions.clone()
    }

    /// A connection was closed without an answer.
    pub fn dropped_connection(&self) {
        self.dropped_connections.inc();
    }

    /// A connection could not be taken.
    pub fn not_connected(&self) {
        self.accept_errors.inc();
    }
}

/// What was counted up to some moment, for the summary in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    /// In the order of [`Metrics::answers`].
    answers: Vec<u64>,
    /// Acknowledgements of JetStream.
    pub published: u64,
    /// Publishes that are tried again.
    pub retries: u64,
    /// Deliveries known to be stored.
    pub confirmed: u64,
    /// Entries published again for want of a receipt.
    pub repeats: u64,
}

impl Metrics {
    /// What has been counted.
    pub fn counts(&self) -> Counts {
        let sum = |each: &Each<Counter>| each.iter().map(Counter::get).sum();
        Counts {
            answers: self.answers.iter().map(Counter::get).collect(),
            published: self.published.get(),
            retries: sum(&self.retries),
            confirmed: self.confirmed.get(),
            repeats: sum(&self.repeats),
        }
    }
}

impl Counts {
    /// What was counted since `before`.
    pub fn since(&self, before: &Counts) -> Counts {
        Counts {
            answers: self.answers.iter().zip(&before.answers).map(|(now, before)| now - before).collect(),
            published: self.published - before.published,
            retries: self.retries - before.retries,
            confirmed: self.confirmed - before.confirmed,
            repeats: self.repeats - before.repeats,
        }
    }

    /// Whether that is nothing at all.
    pub fn is_nothing(&self) -> bool {
        let Counts { answers, published, retries, confirmed, repeats } = self;
        answers.iter().chain([published, retries, confirmed, repeats]).all(|count| *count == 0)
    }

    /// Deliveries answered 202.
    pub fn accepted(&self) -> u64 {
        self.answers[0]
    }

    /// Requests that were refused.
    pub fn refused(&self) -> u64 {
        self.answers[1..].iter().sum()
    }

    /// The same by reason.
    pub fn reasons(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Reject::ALL.iter().map(Reject::reason).zip(self.answers[1..].iter().copied())
    }
}

/// Where a member of a closed set stands in it.
fn place<T: PartialEq>(all: &[T], one: T) -> usize {
    all.iter().position(|member| *member == one).expect("ALL has every member")
}

/// One of the things that a gauge counts, until this is dropped.
#[derive(Debug)]
pub struct Counted(Gauge);

impl Counted {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Counted(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Has what `gateway` holds shown: the memory that bodies take, and the secrets in use.
pub fn watch(registry: &mut Registry, gateway: Arc<Gateway>) {
    registry.register_collector(Box::new(OfGateway(gateway)));
}

/// What the gateway holds at the moment somebody asks.
struct OfGateway(Arc<Gateway>);

impl std::fmt::Debug for OfGateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OfGateway")
    }
}

impl Collector for OfGateway {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let help = "Bodies in flight, in memory or waiting to be read (at most GATEWAY_MAX_BYTES_IN_FLIGHT)";
        show(&mut encoder, "gateway_bodies_in_flight", help, Some(&Unit::Bytes), self.0.bytes_in_flight() as f64)?;
        let help = "Client secrets that may have signed a delivery";
        let secrets = self.0.secrets();
        show(&mut encoder, "gateway_secrets", help, None, secrets.valid() as f64)?;
        let help = "Deliveries that a client secret has signed, by the first 8 hex digits of the secret's SHA-256";
        let mut encoder = encoder.encode_descriptor(
            "gateway_secret_deliveries",
            help,
            None,
            ConstCounter::new(0_u64).metric_type(),
        )?;
        for (fingerprint, deliveries) in secrets.deliveries() {
            let labels = [("fingerprint", fingerprint.to_string())];
            ConstCounter::new(deliveries).encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn show(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: f64,
) -> Result<(), Error> {
    let gauge = ConstGauge::new(value);
    gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
}

/// What the journal says of itself at the moment somebody asks.
#[derive(Debug)]
struct OfJournal(Arc<Journal>);

impl Collector for OfJournal {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let stats = self.0.stats();
        let unsettled = stats.unsettled();
        let age = unsettled.oldest.and_then(|oldest| SystemTime::now().duration_since(oldest).ok()).unwrap_or_default();

        let mut gauge =
            |name: &str, help: &str, unit: Option<&Unit>, value: f64| show(&mut encoder, name, help, unit, value);
        let help = "Deliveries answered 202 that no worker has confirmed yet";
        gauge("gateway_deliveries_unconfirmed", help, None, unsettled.entries as f64)?;
        let help = "How long ago the oldest delivery was received that no worker has confirmed yet";
        gauge("gateway_oldest_unconfirmed_age", help, Some(&Unit::Seconds), age.as_secs_f64())?;
        let help = "Journalled entries that the stream is asked for before they are published";
        gauge("gateway_journal_unverified", help, None, stats.unverified as f64)?;
        let help = "What the journal takes on disk, reserved space included";
        gauge("gateway_journal_disk", help, Some(&Unit::Bytes), stats.bytes_on_disk as f64)?;
        let help = "What the journal may take on disk (GATEWAY_JOURNAL_MAX_BYTES)";
        gauge("gateway_journal_limit", help, Some(&Unit::Bytes), stats.max_bytes_on_disk as f64)?;
        let help = "Deliveries that wait to be written to the journal";
        gauge("gateway_journal_waiting", help, Some(&Unit::Bytes), stats.bytes_waiting as f64)?;
        let help = "Entries that the journal's disk does not give; they are read again by themselves";
        gauge("gateway_journal_unreadable_entries", help, None, stats.unreadable_entries as f64)?;
        let help = "Damaged journal files kept for people to look at";
        gauge("gateway_journal_damaged_files", help, None, stats.damaged_files as f64)?;
        let trouble = f64::from(u8::from(self.0.trouble().is_some()));
        let help = "1 while the journal cannot take deliveries (they are answered 503)";
        gauge("gateway_journal_failing", help, None, trouble)?;

        let mut counter = |name: &str, help: &str, value: u64| {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)
        };
        let help = "Journal records found damaged: deliveries that are lost here";
        counter("gateway_journal_damaged_records", help, stats.damaged_records)?;
        let help = "Reads of a journal record that the disk did not give";
        counter("gateway_journal_unreadable_records", help, stats.unreadable_records)?;
        let help = "Entries let go unconfirmed to make room at the byte limit (the stream has them)";
        counter("gateway_journal_dropped_unconfirmed", help, stats.dropped_unconfirmed)?;

        let per_state = [
            ("gateway_journal_entries", "Entries in the journal by state (journalled: not yet published)", None),
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

        let help = "Syncing one batch of entries to the journal's disk";
        let mut syncs =
            encoder.encode_descriptor("gateway_journal_sync", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        let buckets: Vec<_> = SYNC_BUCKETS.into_iter().zip(stats.syncs.buckets).collect();
        let beyond = stats.syncs.count - stats.syncs.buckets.iter().sum::<u64>();
        let all: Vec<_> = buckets.into_iter().chain([(f64::INFINITY, beyond)]).collect();
        syncs.encode_histogram::<NoLabelSet>(stats.syncs.sum.as_secs_f64(), stats.syncs.count, &all, None)
    }
}
