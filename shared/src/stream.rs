//! The stream and its consumer: connecting, making them where they are missing, checking them where they are there.
//!
//! The gateway makes the stream, the worker the consumer; each waits for the other's. What is there with other settings
//! is never changed: a [`Difference`] is told, and where it would break a promise the process waits until it is mended.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, PullConsumer, ReplayPolicy, pull};
use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::stream::{self, DiscardPolicy, RetentionPolicy, StorageType};
use async_nats::jetstream::{self, ErrorCode};
use async_nats::{Client, Event};
use backon::{ExponentialBuilder, Retryable as _};

use crate::link::Link;
use crate::nats::{CannotConnect, Connection};
use crate::ops::Readiness;
use crate::settings::{self, Setting};

/// Every delivery's subject begins with this; a resource's token follows.
pub const SUBJECT_PREFIX: &str = "signals.sentry";
/// The name of the durable consumer that all workers share.
pub const CONSUMER: &str = "worker";

/// Within this time the stream stores a message id once.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);
/// After this time without an ack or a progress ack a message is delivered again.
pub const ACK_WAIT: Duration = Duration::from_secs(30);
/// How many messages all workers together may hold un-acked: several batches each of a few dozen workers. At the limit
/// the server delivers to nobody, so it is no tuning knob.
const MAX_ACK_PENDING: i64 = 16_384;

/// The stream's name.
pub const NATS_STREAM: Setting = Setting::new("NATS_STREAM", "SIGNALS", "Name of the stream");
/// How many servers hold each message.
pub const NATS_REPLICAS: Setting =
    Setting::new("NATS_REPLICAS", "1", "Servers that hold each message, where the stream is made (1, 3 or 5)");
/// How large the stream may grow.
pub const NATS_MAX_BYTES: Setting =
    Setting::new("NATS_MAX_BYTES", "10GiB", "Size the stream may have, where it is made");
/// How long messages are kept.
pub const NATS_MAX_AGE: Setting =
    Setting::new("NATS_MAX_AGE", "30d", "How long the stream keeps messages, where it is made");

/// The settings that both programs have, besides those of the connection ([`crate::nats::SETTINGS`]).
pub const SETTINGS: [Setting; 4] = [NATS_STREAM, NATS_REPLICAS, NATS_MAX_BYTES, NATS_MAX_AGE];

/// Where NATS is, and what the stream there should be.
#[derive(Debug, Clone)]
pub struct NatsSettings {
    /// Where it is and how to log in.
    connection: Connection,
    /// `NATS_STREAM`
    pub stream: String,
    replicas: usize,
    max_bytes: i64,
    max_age: Duration,
}

impl NatsSettings {
    /// Reads [`crate::nats::SETTINGS`] and [`SETTINGS`].
    pub fn read(reader: &mut settings::Reader<'_>) -> Option<Self> {
        let connection = Connection::read(reader);
        let stream = reader.parse(&NATS_STREAM, |text| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            let named = text.bytes().all(allowed).then(|| text.to_owned());
            named.ok_or_else(|| "a stream's name: letters, digits, - and _".into())
        });
        let replicas = reader.parse(&NATS_REPLICAS, |text| match text {
            "1" => Ok(1),
            "3" => Ok(3),
            "5" => Ok(5),
            _ => Err("1, 3 or 5: more than half of the servers must be there, so 2 and 4 outlast no more losses than 1 and 3"
                .into()),
        });
        let max_bytes = reader.parse(&NATS_MAX_BYTES, |text| {
            i64::try_from(settings::size(text)?).map_err(|_| "a size below 8 EiB".into())
        });
        let max_age = reader.parse(&NATS_MAX_AGE, settings::duration);
        Some(NatsSettings {
            connection: connection?,
            stream: stream?,
            replicas: replicas?,
            max_bytes: max_bytes?,
            max_age: max_age?,
        })
    }

    /// How to reach NATS.
    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// `NATS_URL` without what logs in.
    pub fn url_to_show(&self) -> String {
        self.connection.servers().iter().map(crate::check::nats::shown).collect::<Vec<_>>().join(",")
    }

    /// The stream as the gateway makes it: keeps everything (limits retention), refuses what is new when it is full
    /// rather than drop what nobody has read.
    pub(crate) fn stream_config(&self) -> stream::Config {
        stream::Config {
            name: self.stream.clone(),
            subjects: vec![format!("{SUBJECT_PREFIX}.*")],
            retention: RetentionPolicy::Limits,
            storage: StorageType::File,
            discard: DiscardPolicy::New,
            duplicate_window: DUPLICATE_WINDOW,
            num_replicas: self.replicas,
            max_bytes: self.max_bytes,
            max_age: self.max_age,
            ..stream::Config::default()
        }
    }

    /// Connects in the background: this returns at once, also while NATS is not there, and the link connects and
    /// reconnects for as long as it lives. `queue` messages may wait in each subscription; more are dropped. `readiness`
    /// holds the state under `nats`; `observe` sees every event.
    ///
    /// # Errors
    /// Where the client itself cannot be made.
    pub async fn connect(
        &self,
        program: &str,
        queue: usize,
        readiness: &Readiness,
        observe: impl Fn(&Event) + Send + Sync + 'static,
    ) -> anyhow::Result<Link> {
        Link::open(&self.connection, &self.stream, program, queue, readiness, Arc::new(observe)).await
    }

    /// Tries each server once, in order; the client knows the first that works. For a person who waits for the answer.
    ///
    /// # Errors
    /// What is wrong with each server and what to do, where none works.
    pub async fn try_connect(&self, program: &str) -> Result<Client, CannotConnect> {
        self.connection.try_connect(program).await
    }
}

/// A setting of an existing stream or consumer that is not as this program would have made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Whose, such as `stream SIGNALS`.
    pub owner: String,
    /// Which.
    pub setting: &'static str,
    /// What it is.
    pub found: String,
    /// What it would be.
    pub wanted: String,
    /// The promise it breaks, where it does.
    pub breaks: Option<&'static str>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { owner, setting, found, wanted, breaks } = self;
        write!(f, "{owner} has {setting} {found}, wanted is {wanted}")?;
        breaks.map_or(Ok(()), |promise| write!(f, " ({promise})"))
    }
}

/// Why the stream or the consumer cannot be used yet.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// Its settings break a promise; somebody has to change them.
    #[error("{}; change it with the nats command (nothing is changed silently) or use another name", list(.0))]
    Unfit(Vec<Difference>),
    /// It is not there, and the other program makes it.
    #[error("{0} is not there yet")]
    Missing(String),
    /// NATS does not answer, or says no.
    #[error("{0}")]
    Nats(String),
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(Difference::to_string).collect::<Vec<_>>().join("; ")
}

/// Makes the stream where it is missing, checks it where it is there. Gives its settings as they are.
///
/// # Errors
/// [`NotReady`]; asking again later is right for each.
pub async fn ensure_stream(context: &jetstream::Context, nats: &NatsSettings) -> Result<stream::Config, NotReady> {
    let wanted = nats.stream_config();
    let found = match context.get_stream(&nats.stream).await {
        Ok(stream) => stream.cached_info().config.clone(),
        Err(error) if is_missing(&error) => {
            let made = context.create_stream(wanted).await;
            let made = made.map_err(|error| NotReady::Nats(format!("cannot make stream {}: {error}", nats.stream)))?;
            tracing::info!(stream = nats.stream, "made the stream");
            return Ok(made.cached_info().config.clone());
        }
        Err(error) => return Err(NotReady::Nats(format!("cannot look at stream {}: {error}", nats.stream))),
    };
    let mut differences = compare_streams(&found, &wanted);
    differences.retain(|difference| difference.breaks.is_some());
    if differences.is_empty() { Ok(found) } else { Err(NotReady::Unfit(differences)) }
}

/// Logs in what a stream differs from what would be made, where that does no harm.
pub fn tell_differences(found: &stream::Config, nats: &NatsSettings) {
    for difference in compare_streams(found, &nats.stream_config()) {
        tracing::warn!("{difference}; left as it is");
    }
}

/// Makes the durable consumer where it is missing, checks it where it is there, and mends its position where that is
/// beyond the stream's end (the last thing given says whether it was). The stream is the gateway's to make.
///
/// # Errors
/// [`NotReady`]; asking again later is right for each.
pub async fn ensure_consumer(
    context: &jetstream::Context,
    nats: &NatsSettings,
) -> Result<(stream::Stream, PullConsumer, bool), NotReady> {
    let stream = match context.get_stream(&nats.stream).await {
        Ok(stream) => stream,
        Err(error) if is_missing(&error) => return Err(NotReady::Missing(format!("stream {}", nats.stream))),
        Err(error) => return Err(NotReady::Nats(format!("cannot look at stream {}: {error}", nats.stream))),
    };
    settle(compare_streams(&stream.cached_info().config, &nats.stream_config()))?;
    let wanted = consumer_config();
    // Makes it, or takes it as it is: unlike CONSUMER.CREATE alone it never changes what is there.
    let consumer: PullConsumer = stream
        .get_or_create_consumer(CONSUMER, wanted.clone())
        .await
        .map_err(|error| NotReady::Nats(format!("cannot make or look at consumer {CONSUMER}: {error}")))?;
    settle(compare_consumers(&consumer.cached_info().config, &wanted))?;
    let moved = mend_position(&stream, consumer.cached_info()).await?;
    Ok((stream, consumer, moved))
}

/// Whether a consumer claims to have been where the stream has not been yet, and would skip what comes there next. So
/// it is after the stream's files went back in time and the consumer's did not; a single server puts it right when it
/// reads them, a cluster does not. The stream must have been looked at after the consumer.
pub fn lies_beyond(consumer: &consumer::Info, last_sequence: u64) -> bool {
    consumer.delivered.stream_sequence.max(consumer.ack_floor.stream_sequence) > last_sequence
}

/// Moves a consumer that lies beyond the stream's end back to the stream's first message. Returns `true` where it did.
///
/// Nothing tells which messages came after the files went back in time: sequences are used again. So all are delivered
/// again. The ledger knows those that are stored, which costs time and changes nothing. Where the stream has grown past
/// the consumer's position before the first look, nothing can be seen here: the gateway publishes again what has no
/// receipt.
async fn mend_position(stream: &stream::Stream, consumer: &consumer::Info) -> Result<bool, NotReady> {
    let owner = &stream.cached_info().config.name;
    let failed = |error: &dyn fmt::Display| NotReady::Nats(format!("cannot look at stream {owner}: {error}"));
    let state = stream.get_info().await.map_err(|error| failed(&error))?.state;
    if !lies_beyond(consumer, state.last_sequence) {
        return Ok(false);
    }
    let (was, next) = (consumer.delivered.stream_sequence, state.first_sequence.max(1));
    stream.reset_consumer(CONSUMER, Some(next)).await.map_err(|error| {
        NotReady::Nats(format!(
            "consumer {CONSUMER} is at {was} and stream {owner} ends at {}; it cannot be reset ({error}). \
             Delete it (`nats consumer rm {owner} {CONSUMER}`): it is made again and reads the whole stream, of which the \
             ledger knows what is stored",
            state.last_sequence
        ))
    })?;
    tracing::warn!(
        was,
        stream_ends = state.last_sequence,
        next,
        "the stream has gone back in time (an older copy of its files?); moved the consumer back: it reads all that the \
         stream has, from sequence {next} on, and the ledger knows what is stored"
    );
    Ok(true)
}

pub(crate) fn consumer_config() -> pull::Config {
    pull::Config {
        durable_name: Some(CONSUMER.to_owned()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_deliver: -1,
        max_ack_pending: MAX_ACK_PENDING,
        ..pull::Config::default()
    }
}

pub(crate) fn is_missing(error: &GetStreamError) -> bool {
    matches!(error.kind(), GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

/// Goes on where it is safe, having said what differs; refuses where a promise would break.
fn settle(differences: Vec<Difference>) -> Result<(), NotReady> {
    let (breaking, harmless): (Vec<_>, Vec<_>) = differences.into_iter().partition(|found| found.breaks.is_some());
    for difference in harmless {
        tracing::warn!("{difference}; left as it is");
    }
    if breaking.is_empty() { Ok(()) } else { Err(NotReady::Unfit(breaking)) }
}

/// Collects differences of one stream or consumer.
struct Comparison {
    owner: String,
    differences: Vec<Difference>,
}

impl Comparison {
    fn of(owner: String) -> Self {
        Comparison { owner, differences: Vec::new() }
    }

    /// Notes a setting where `found` is not `wanted`.
    fn check<T: PartialEq + fmt::Debug>(
        &mut self,
        setting: &'static str,
        found: &T,
        wanted: &T,
        breaks: Option<&'static str>,
    ) {
        if found != wanted {
            let (owner, found, wanted) = (self.owner.clone(), format!("{found:?}"), format!("{wanted:?}"));
            self.differences.push(Difference { owner, setting, found, wanted, breaks });
        }
    }
}

pub(crate) fn compare_streams(found: &stream::Config, wanted: &stream::Config) -> Vec<Difference> {
    let mut comparison = Comparison::of(format!("stream {}", wanted.name));
    let subject = &wanted.subjects[0];
    if !found.subjects.iter().any(|pattern| covers(pattern, subject)) {
        // One that takes some resources and not others is used for those; the rest is set aside by the gateway.
        let takes_some = found.subjects.iter().any(|pattern| covers(subject, pattern));
        let lost = (!takes_some).then_some("no delivery would be stored");
        comparison.check("subjects", &found.subjects, &wanted.subjects, lost);
    }
    let no_replay = Some("what is acknowledged would be deleted, and nothing could be replayed");
    comparison.check("retention", &found.retention, &wanted.retention, no_replay);
    comparison.check("storage", &found.storage, &wanted.storage, Some("a restart would lose what was accepted"));
    comparison.check("discard", &found.discard, &wanted.discard, Some("a full stream would drop what nobody has read"));
    comparison.check("no_ack", &found.no_ack, &wanted.no_ack, Some("nothing would say that a delivery is stored"));
    comparison.check("sealed", &found.sealed, &wanted.sealed, Some("nothing more could be stored"));
    comparison.check("mirror", &found.mirror.is_some(), &false, Some("a mirror takes no deliveries"));
    comparison.check("replicas", &found.num_replicas, &wanted.num_replicas, None);
    comparison.check("max_bytes", &found.max_bytes, &wanted.max_bytes, None);
    comparison.check("max_age", &found.max_age, &wanted.max_age, None);
    comparison.check("duplicate_window", &found.duplicate_window, &wanted.duplicate_window, None);
    comparison.check("max_messages", &unlimited(found.max_messages), &-1, None);
    comparison.check("max_messages_per_subject", &unlimited(found.max_messages_per_subject), &-1, None);
    comparison.check("max_message_size", &unlimited(found.max_message_size.into()), &-1, None);
    comparison.differences
}

pub(crate) fn compare_consumers(found: &consumer::Config, wanted: &pull::Config) -> Vec<Difference> {
    let mut comparison = Comparison::of(format!("consumer {CONSUMER}"));
    let skips = Some("it would skip deliveries");
    comparison.check("deliver_policy", &found.deliver_policy, &wanted.deliver_policy, skips);
    comparison.check("filter_subject", &found.filter_subject, &wanted.filter_subject, skips);
    comparison.check("filter_subjects", &found.filter_subjects, &wanted.filter_subjects, skips);
    let unconfirmed = Some("a delivery could be lost with the worker that holds it");
    comparison.check("ack_policy", &found.ack_policy, &wanted.ack_policy, unconfirmed);
    let stops = Some("it would silently stop delivering what failed that often");
    comparison.check("max_deliver", &found.max_deliver, &wanted.max_deliver, stops);
    comparison.check("headers_only", &found.headers_only, &wanted.headers_only, Some("bodies would not arrive"));
    comparison.check("push", &found.deliver_subject.is_some(), &false, Some("workers pull"));
    comparison.check("ack_wait", &found.ack_wait, &wanted.ack_wait, None);
    comparison.check("backoff", &found.backoff, &wanted.backoff, None);
    comparison.check("max_ack_pending", &found.max_ack_pending, &wanted.max_ack_pending, None);
    comparison.check("replay_policy", &found.replay_policy, &ReplayPolicy::Instant, None);
    comparison.check("inactive_threshold", &found.inactive_threshold, &wanted.inactive_threshold, None);
    comparison.differences
}

/// Servers write "no limit" as 0 or -1.
fn unlimited(limit: i64) -> i64 {
    if limit <= 0 { -1 } else { limit }
}

/// Whether every subject that matches `inner` matches `pattern` (NATS subject wildcards `*` and `>`).
pub fn covers(pattern: &str, inner: &str) -> bool {
    let (mut pattern, mut inner) = (pattern.split('.'), inner.split('.'));
    loop {
        match (pattern.next(), inner.next()) {
            (None, None) | (Some(">"), Some(_)) => return true,
            (Some("*"), Some(token)) if token != ">" => {}
            (Some(same), Some(token)) if same == token => {}
            _ => return false,
        }
    }
}

/// Attempts something until it works: at once, then with jittered backoff up to five seconds, without end. Says what it
/// waits for when that changes, and keeps the state under `name` in `readiness`.
pub async fn until_ready<T, E, F>(name: &'static str, readiness: &Readiness, mut attempt: impl FnMut() -> F) -> T
where
    E: fmt::Display,
    F: Future<Output = Result<T, E>>,
{
    let backoff = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times();
    let mut told = String::new();
    let note = |error: &E, _: Duration| {
        let error = error.to_string();
        if error != told {
            tracing::warn!("{name} not ready, will try again until it is: {error}");
        }
        readiness.set(name, Err(error.clone()));
        told = error;
    };
    let ready = (move || attempt()).retry(backoff).notify(note).await;
    readiness.set(name, Ok("ready".into()));
    ready.unwrap_or_else(|_| unreachable!("a retry without a limit ends only in success"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> stream::Config {
        let unset = |_: &str| None;
        let mut reader = settings::Reader::new(&unset);
        NatsSettings::read(&mut reader).unwrap().stream_config()
    }

    #[test]
    fn a_stream_as_it_should_be_has_no_difference() {
        let wanted = wanted();
        let as_a_server_says_it = stream::Config { max_messages: -1, max_message_size: -1, ..wanted.clone() };
        assert_eq!(compare_streams(&as_a_server_says_it, &wanted), []);
    }

    #[test]
    fn what_breaks_a_promise_is_told_from_what_does_not() {
        let wanted = wanted();
        let breaks = |found: stream::Config| {
            let differences = compare_streams(&found, &wanted);
            assert_eq!(differences.len(), 1, "{differences:?}");
            differences[0].breaks.is_some()
        };
        let base = || wanted.clone();
        assert!(breaks(stream::Config { retention: RetentionPolicy::WorkQueue, ..base() }));
        assert!(breaks(stream::Config { storage: StorageType::Memory, ..base() }));
        assert!(breaks(stream::Config { discard: DiscardPolicy::Old, ..base() }));
        assert!(breaks(stream::Config { subjects: vec!["elsewhere.>".into()], ..base() }));
        assert!(!breaks(stream::Config { subjects: vec!["signals.sentry.issue".into()], ..base() }));
        assert!(breaks(stream::Config { no_ack: true, ..base() }));
        assert!(!breaks(stream::Config { max_bytes: 1, ..base() }));
        assert!(!breaks(stream::Config { num_replicas: 3, ..base() }));
        assert!(!breaks(stream::Config { max_message_size: 1, ..base() }));
    }

    #[test]
    fn replicas_are_an_odd_number() {
        for (text, is_good) in [("1", true), ("2", false), ("3", true), ("4", false), ("5", true), ("7", false)] {
            let lookup = |variable: &str| (variable == "NATS_REPLICAS").then(|| text.to_owned());
            assert_eq!(NatsSettings::read(&mut settings::Reader::new(&lookup)).is_some(), is_good, "{text}");
        }
    }

    #[test]
    fn subjects_cover_as_nats_matches_them() {
        for wide in ["signals.sentry.*", "signals.sentry.>", "signals.>", "signals.*.*", "*.*.*", ">"] {
            assert!(covers(wide, "signals.sentry.*"), "{wide}");
        }
        for narrow in ["signals.sentry.issue", "signals.sentry", "signals.*", "signals.sentry.*.*", "other.>", ""] {
            assert!(!covers(narrow, "signals.sentry.*"), "{narrow}");
        }
    }
}
