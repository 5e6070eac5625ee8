//! The stream and its consumer: connecting, making them where they are missing, checking them where they are there.
//!
//! The gateway makes the stream, the worker the consumer; each waits for the other's. What is there with other settings
//! is never changed: a [`Difference`] is told, and where it would break a promise the process waits until it is mended.

use std::fmt;
use std::time::Duration;

use async_nats::Client;
use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, PullConsumer, ReplayPolicy, pull};
use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::stream::{self, DiscardPolicy, PersistenceMode, RetentionPolicy, StorageType};
use async_nats::jetstream::{self, ErrorCode};
use backon::{ExponentialBuilder, Retryable as _};

use crate::link::Link;
use crate::nats::{CannotConnect, Connection};
use crate::ops::{self, Readiness};
use crate::settings::{self, Setting};

/// Every delivery's subject begins with this; a resource's token follows.
pub const SUBJECT_PREFIX: &str = "signals.sentry";
/// The subjects of all deliveries. A stream may hold others beside them, which are not this project's.
pub const SUBJECTS: &str = "signals.sentry.*";
/// The name of the durable consumer that all workers share.
pub const CONSUMER: &str = "worker";

/// Within this time the stream stores a message id once.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);
/// After this time without an ack or a progress ack a message is delivered again.
pub const ACK_WAIT: Duration = Duration::from_secs(30);
/// How many messages all workers together may hold un-acked: several batches each of a few dozen workers. At the limit
/// the server delivers to nobody, so it is no tuning knob.
const MAX_ACK_PENDING: i64 = 16_384;
/// A stream that keeps messages for less may drop what waits through an outage of PostgreSQL.
const MAX_AGE_LEAST: Duration = Duration::from_secs(24 * 60 * 60);

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
    /// rather than drop what no worker has read.
    pub(crate) fn stream_config(&self) -> stream::Config {
        stream::Config {
            name: self.stream.clone(),
            subjects: vec![SUBJECTS.to_owned()],
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
    /// holds the state under `nats`.
    ///
    /// # Errors
    /// Where the client itself cannot be made.
    pub async fn connect(&self, program: &str, queue: usize, readiness: &Readiness) -> anyhow::Result<Link> {
        Link::open(&self.connection, &self.stream, program, queue, readiness).await
    }

    /// Tries each server once, in order; the client knows the first that works. For a person who waits for the answer.
    ///
    /// # Errors
    /// What is wrong with each server and what to do, where none works.
    pub async fn try_connect(&self, program: &str) -> Result<Client, CannotConnect> {
        self.connection.try_connect(program).await
    }
}

/// The harm that a difference does to what the programs promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// Nothing.
    None,
    /// It may break a promise one day. The stream or consumer is used, and the programs are degraded.
    Risk(&'static str),
    /// It breaks a promise. The stream or consumer is not used.
    Breaks(&'static str),
}

/// A setting of an existing stream or consumer that is not as this program would have made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The stream or the consumer, such as `stream SIGNALS`.
    pub owner: String,
    /// The setting's name.
    pub setting: &'static str,
    /// Its value.
    pub found: String,
    /// The value that this program would have given it.
    pub wanted: String,
    /// The harm that comes of it.
    pub harm: Harm,
    /// The command that mends it, or a sentence where no command can.
    pub mend: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { owner, setting, found, wanted, harm, mend } = self;
        write!(f, "{owner} has {setting} {found}, wanted is {wanted}")?;
        match harm {
            Harm::None => Ok(()),
            Harm::Risk(promise) | Harm::Breaks(promise) => write!(f, " ({promise}): {mend}"),
        }
    }
}

/// Why the stream or the consumer cannot be used yet.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// Its settings break a promise; somebody has to change them.
    #[error("{}; nothing is changed silently", list(.0))]
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

/// The state of the check `stream_settings`: settings of the stream that may break a promise one day.
pub fn risks(found: &stream::Config, nats: &NatsSettings) -> ops::State {
    let mut differences = compare_streams(found, &nats.stream_config());
    differences.retain(|difference| matches!(difference.harm, Harm::Risk(_)));
    if differences.is_empty() { Ok("ready".into()) } else { Err(list(&differences)) }
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
    let breaking = breaking(compare_streams(&found, &wanted));
    if breaking.is_empty() { Ok(found) } else { Err(NotReady::Unfit(breaking)) }
}

/// Logs in what a stream differs from what would be made, where that does no harm.
pub fn tell_differences(found: &stream::Config, nats: &NatsSettings) {
    for difference in compare_streams(found, &nats.stream_config()) {
        tracing::warn!("{difference}; left as it is");
    }
}

/// Returns `true` while no promise breaks with this stream and this consumer.
pub fn is_fit(stream: &stream::Config, consumer: &consumer::Config, nats: &NatsSettings) -> bool {
    breaking(compare_streams(stream, &nats.stream_config())).is_empty()
        && breaking(compare_consumers(consumer, stream)).is_empty()
}

/// Returns `true` for a stream that holds messages of others beside deliveries.
pub fn is_shared(stream: &stream::Config) -> bool {
    subjects_held(stream).any(|subject| !covers(SUBJECTS, subject))
}

/// The subjects that messages of the stream may have. Messages from other streams may have any.
fn subjects_held(stream: &stream::Config) -> impl Iterator<Item = &str> {
    let sourced = stream.sources.as_ref().is_some_and(|sources| !sources.is_empty());
    stream.subjects.iter().map(String::as_str).chain(sourced.then_some(">"))
}

/// The subjects that a consumer is given.
pub fn filters(consumer: &consumer::Config) -> Vec<&str> {
    let one = Some(consumer.filter_subject.as_str()).filter(|filter| !filter.is_empty());
    let filters: Vec<_> = one.into_iter().chain(consumer.filter_subjects.iter().map(String::as_str)).collect();
    if filters.is_empty() { vec![">"] } else { filters }
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
    // Makes it, or takes it as it is: unlike CONSUMER.CREATE alone it never changes what is there.
    let consumer: PullConsumer = stream
        .get_or_create_consumer(CONSUMER, consumer_config())
        .await
        .map_err(|error| NotReady::Nats(format!("cannot make or look at consumer {CONSUMER}: {error}")))?;
    settle(compare_consumers(&consumer.cached_info().config, &stream.cached_info().config))?;
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
/// again. The ledger knows those that are stored, which costs time and changes nothing. If the stream has grown past
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

fn consumer_config() -> pull::Config {
    pull::Config {
        durable_name: Some(CONSUMER.to_owned()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        filter_subject: SUBJECTS.to_owned(),
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
    let breaking = breaking(differences.clone());
    if !breaking.is_empty() {
        return Err(NotReady::Unfit(breaking));
    }
    for difference in differences {
        tracing::warn!("{difference}; left as it is");
    }
    Ok(())
}

/// Those that break a promise.
fn breaking(mut differences: Vec<Difference>) -> Vec<Difference> {
    differences.retain(|difference| matches!(difference.harm, Harm::Breaks(_)));
    differences
}

/// Collects differences of one stream or consumer.
struct Comparison {
    owner: String,
    /// The command that changes a setting, without the flag.
    edit: String,
    differences: Vec<Difference>,
}

impl Comparison {
    fn of(owner: String, edit: String) -> Self {
        Comparison { owner, edit, differences: Vec::new() }
    }

    /// Notes a setting where `found` is not `wanted`. `mend` is the flag that mends it, or a sentence.
    fn check<T: PartialEq + fmt::Debug>(
        &mut self,
        setting: &'static str,
        found: &T,
        wanted: &T,
        harm: Harm,
        mend: impl Into<String>,
    ) {
        if found != wanted {
            self.note(setting, format!("{found:?}"), format!("{wanted:?}"), harm, mend);
        }
    }

    /// Notes a time that is not the wanted one. `mend` is the flag without its value, or a sentence.
    fn check_time(&mut self, setting: &'static str, found: Duration, wanted: Duration, harm: Harm, mend: &str) {
        if found != wanted {
            let shown = |time| humantime::format_duration(time).to_string();
            let mend = if mend.starts_with("--") { format!("{mend}={}", go_duration(wanted)) } else { mend.to_owned() };
            self.note(setting, shown(found), shown(wanted), harm, mend);
        }
    }

    /// Notes a difference.
    fn note(&mut self, setting: &'static str, found: String, wanted: String, harm: Harm, mend: impl Into<String>) {
        let mend = mend.into();
        let mend = if mend.starts_with("--") { format!("`{} {mend}`", self.edit) } else { mend };
        self.differences.push(Difference { owner: self.owner.clone(), setting, found, wanted, harm, mend });
    }
}

/// A time as the nats command reads it.
fn go_duration(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds > 0 && seconds.is_multiple_of(3600) { format!("{}h", seconds / 3600) } else { format!("{seconds}s") }
}

/// The mend of a setting that the server does not let change.
const ANOTHER: &str = "it cannot be changed: make a stream of another name, and set NATS_STREAM to that";

/// Compares a stream with the one that the gateway makes.
pub(crate) fn compare_streams(found: &stream::Config, wanted: &stream::Config) -> Vec<Difference> {
    let edit = format!("nats stream edit {}", wanted.name);
    let mut comparison = Comparison::of(format!("stream {}", wanted.name), edit);
    compare_subjects(&mut comparison, found, wanted);
    compare_storage(&mut comparison, found, wanted);
    compare_limits(&mut comparison, found, wanted);
    comparison.differences
}

fn compare_subjects(comparison: &mut Comparison, found: &stream::Config, wanted: &stream::Config) {
    use Harm::Breaks;
    if !found.subjects.iter().any(|pattern| covers(pattern, SUBJECTS)) {
        // One that takes some resources and not others is used for those; the rest is set aside by the gateway.
        let takes_some = found.subjects.iter().any(|pattern| covers(SUBJECTS, pattern));
        let harm = if takes_some { Harm::None } else { Breaks("no delivery would be stored") };
        comparison.check("subjects", &found.subjects, &wanted.subjects, harm, format!("--subjects='{SUBJECTS}'"));
    }
    let transform = found.subject_transform.as_ref().filter(|transform| overlap(&transform.source, SUBJECTS).is_some());
    let elsewhere = Breaks("deliveries would be stored under other subjects");
    comparison.check("subject_transform", &transform.map(|it| &it.destination), &None, elsewhere, "--no-transform");
    let mirror = found.mirror.is_some();
    comparison.check("mirror", &mirror, &false, Breaks("a mirror takes no deliveries"), ANOTHER);
}

/// Compares how messages are kept.
fn compare_storage(comparison: &mut Comparison, found: &stream::Config, wanted: &stream::Config) {
    use Harm::{Breaks, Risk};
    let no_replay = Breaks("what is acknowledged would be deleted, and nothing could be replayed");
    let retention = if found.retention == RetentionPolicy::WorkQueue { ANOTHER } else { "--retention=limits" };
    comparison.check("retention", &found.retention, &wanted.retention, no_replay, retention);
    let forgets = Breaks("a restart would lose what was accepted");
    comparison.check("storage", &found.storage, &wanted.storage, forgets, ANOTHER);
    let drops = Breaks("a full stream would drop what no worker has read");
    comparison.check("discard", &found.discard, &wanted.discard, drops, "--discard=new");
    let silent = Breaks("nothing would say that a delivery is stored");
    comparison.check("no_ack", &found.no_ack, &wanted.no_ack, silent, "--ack");
    comparison.check("sealed", &found.sealed, &wanted.sealed, Breaks("nothing more could be stored"), ANOTHER);
    let unwritten = Risk("it confirms what is not written yet, which a crash of the server loses");
    let is_async = found.persist_mode == Some(PersistenceMode::Async);
    comparison.check("persist_mode async", &is_async, &false, unwritten, ANOTHER);
    let stays_full = Risk("workers cannot make room: once it is full, it takes nothing until messages reach max_age");
    comparison.check("deny_purge", &found.deny_purge, &wanted.deny_purge, stays_full, ANOTHER);
    let rollup = Risk("a message with the header Nats-Rollup removes what no worker has read");
    comparison.check("allow_rollup", &found.allow_rollup, &wanted.allow_rollup, rollup, "--no-allow-rollup");
    let replicas = wanted.num_replicas;
    comparison.check("replicas", &found.num_replicas, &replicas, Harm::None, format!("--replicas={replicas}"));
    let window = (found.duplicate_window, wanted.duplicate_window);
    comparison.check_time("duplicate_window", window.0, window.1, Harm::None, "--dupe-window");
}

fn compare_limits(comparison: &mut Comparison, found: &stream::Config, wanted: &stream::Config) {
    use Harm::{Breaks, Risk};
    // The server keeps this limit by dropping the oldest, whatever `discard` says about the other limits.
    let (harm, flags) = match found.discard_new_per_subject {
        false => (Breaks("it would drop what no worker has read"), "--max-msgs-per-subject=-1"),
        true => (
            Risk("it takes no more of a resource that has as many, and workers make room only for the whole stream"),
            "--no-discard-per-subject --max-msgs-per-subject=-1",
        ),
    };
    comparison.check("max_messages_per_subject", &unlimited(found.max_messages_per_subject), &-1, harm, flags);
    let short = !found.max_age.is_zero() && found.max_age < MAX_AGE_LEAST;
    let harm = if short { Risk("what waits longer for PostgreSQL is dropped") } else { Harm::None };
    let wanted_age = if short { wanted.max_age.max(MAX_AGE_LEAST) } else { wanted.max_age };
    comparison.check_time("max_age", found.max_age, wanted_age, harm, "--max-age");
    let bytes = wanted.max_bytes;
    comparison.check("max_bytes", &found.max_bytes, &bytes, Harm::None, format!("--max-bytes={bytes}"));
    comparison.check("max_messages", &unlimited(found.max_messages), &-1, Harm::None, "--max-msgs=-1");
    let size = unlimited(found.max_message_size.into());
    comparison.check("max_message_size", &size, &-1, Harm::None, "--max-msg-size=-1");
}

/// Compares a consumer of `stream` with the one that workers make.
pub(crate) fn compare_consumers(found: &consumer::Config, stream: &stream::Config) -> Vec<Difference> {
    use Harm::Breaks;
    let wanted = consumer_config();
    let mut comparison =
        Comparison::of(format!("consumer {CONSUMER}"), format!("nats consumer edit {} {CONSUMER}", stream.name));
    let anew = format!(
        "`nats consumer rm {} {CONSUMER}`; a worker makes it again and reads the whole stream, of which the ledger knows \
         what is stored",
        stream.name
    );
    let skips = Breaks("it would skip deliveries");
    comparison.check("deliver_policy", &found.deliver_policy, &wanted.deliver_policy, skips, &anew);
    let (filters, only_ours) = (filters(found), format!("--filter '{SUBJECTS}'"));
    let others = |filter: &&str| {
        let given = subjects_held(stream).filter_map(|subject| overlap(filter, subject));
        given.into_iter().any(|subject| !covers(SUBJECTS, &subject))
    };
    let shown = || format!("'{}'", filters.join(", "));
    if !filters.iter().any(|filter| covers(filter, SUBJECTS)) {
        comparison.note("filter", shown(), format!("'{SUBJECTS}'"), skips, only_ours);
    } else if filters.iter().any(others) {
        let foreign = Breaks("messages that are none of Sentry's would become signals");
        comparison.note("filter", shown(), format!("'{SUBJECTS}'"), foreign, only_ours);
    }
    let unconfirmed = Breaks("a delivery could be lost with the worker that holds it");
    comparison.check("ack_policy", &found.ack_policy, &wanted.ack_policy, unconfirmed, &anew);
    let stops = Breaks("it would silently stop delivering what failed that often");
    comparison.check("max_deliver", &found.max_deliver, &wanted.max_deliver, stops, "--max-deliver=-1");
    let bodiless = Breaks("bodies would not arrive");
    comparison.check("headers_only", &found.headers_only, &wanted.headers_only, bodiless, "--no-headers-only");
    comparison.check("push", &found.deliver_subject.is_some(), &false, Breaks("workers pull"), &anew);
    let groups = Breaks("it gives nothing to workers, which name no group");
    comparison.check("priority_policy", &found.priority_policy, &wanted.priority_policy, groups, &anew);
    comparison.check_time("ack_wait", found.ack_wait, wanted.ack_wait, Harm::None, "--wait");
    comparison.check("backoff", &found.backoff, &wanted.backoff, Harm::None, "--backoff=none");
    let most = wanted.max_ack_pending;
    comparison.check("max_ack_pending", &found.max_ack_pending, &most, Harm::None, format!("--max-pending={most}"));
    comparison.check("replay_policy", &found.replay_policy, &ReplayPolicy::Instant, Harm::None, &anew);
    comparison.check_time("inactive_threshold", found.inactive_threshold, Duration::ZERO, Harm::None, &anew);
    // Workers hold their requests to these.
    comparison.check("max_batch", &found.max_batch, &0, Harm::None, &anew);
    comparison.check("max_bytes", &found.max_bytes, &0, Harm::None, &anew);
    comparison.check_time("max_expires", found.max_expires, Duration::ZERO, Harm::None, &anew);
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

/// The subjects that match both patterns, as a pattern; `None` where there is no such subject.
pub fn overlap(one: &str, other: &str) -> Option<String> {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    let mut tokens = Vec::new();
    loop {
        match (one.next(), other.next()) {
            (None, None) => return Some(tokens.join(".")),
            (Some(">"), Some(token)) => {
                return Some(tokens.into_iter().chain([token]).chain(other).collect::<Vec<_>>().join("."));
            }
            (Some(token), Some(">")) => {
                return Some(tokens.into_iter().chain([token]).chain(one).collect::<Vec<_>>().join("."));
            }
            (Some("*"), Some(token)) => tokens.push(token),
            (Some(token), Some(same)) if same == "*" || same == token => tokens.push(token),
            _ => return None,
        }
    }
}

/// Attempts something until it works: at once, then with jittered backoff up to five seconds, without end. Says what it
/// waits for when that changes, and keeps the state under `name` in `readiness`.
pub async fn until_ready<T, E, F>(name: &'static str, readiness: &Readiness, attempt: impl FnMut() -> F) -> T
where
    E: fmt::Display,
    F: Future<Output = Result<T, E>>,
{
    let ready = until_done(name, readiness, attempt).await;
    readiness.set(name, Ok("ready".into()));
    ready
}

/// The same, where the caller says whether all is well then.
pub async fn until_done<T, E, F>(name: &'static str, readiness: &Readiness, mut attempt: impl FnMut() -> F) -> T
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
        let one = |found: stream::Config| {
            let mut differences = compare_streams(&found, &wanted);
            assert_eq!(differences.len(), 1, "{differences:?}");
            differences.remove(0)
        };
        let breaks = |found| matches!(one(found).harm, Harm::Breaks(_));
        let risks = |found| matches!(one(found).harm, Harm::Risk(_));
        let harmless = |found| one(found).harm == Harm::None;
        let base = || wanted.clone();
        assert!(breaks(stream::Config { retention: RetentionPolicy::WorkQueue, ..base() }));
        assert!(breaks(stream::Config { storage: StorageType::Memory, ..base() }));
        assert!(breaks(stream::Config { discard: DiscardPolicy::Old, ..base() }));
        assert!(breaks(stream::Config { subjects: vec!["elsewhere.>".into()], ..base() }));
        assert!(breaks(stream::Config { no_ack: true, ..base() }));
        assert!(breaks(stream::Config { max_messages_per_subject: 1, ..base() }));
        let moved = stream::SubjectTransform { source: "signals.>".into(), destination: "elsewhere.>".into() };
        assert!(breaks(stream::Config { subject_transform: Some(moved), ..base() }));
        let per_subject = stream::Config { max_messages_per_subject: 1, discard_new_per_subject: true, ..base() };
        assert!(risks(per_subject));
        assert!(risks(stream::Config { max_age: Duration::from_secs(3_600), ..base() }));
        assert!(risks(stream::Config { deny_purge: true, ..base() }));
        assert!(risks(stream::Config { persist_mode: Some(PersistenceMode::Async), ..base() }));
        assert!(risks(stream::Config { allow_rollup: true, ..base() }));
        assert!(harmless(stream::Config { subjects: vec!["signals.sentry.issue".into()], ..base() }));
        assert!(harmless(stream::Config { max_age: Duration::ZERO, ..base() }));
        assert!(harmless(stream::Config { max_bytes: 1, ..base() }));
        assert!(harmless(stream::Config { max_messages: 1, ..base() }));
        assert!(harmless(stream::Config { num_replicas: 3, ..base() }));
        assert!(harmless(stream::Config { max_message_size: 1, ..base() }));
        let told = one(stream::Config { max_age: Duration::from_secs(3_600), ..base() }).to_string();
        assert!(told.contains("max_age 1h, ") && told.ends_with("`nats stream edit SIGNALS --max-age=720h`"), "{told}");
    }

    #[test]
    fn a_consumer_that_is_given_what_others_wrote_is_unfit() {
        let unfit = |filters: &[&str], subjects: &[&str]| {
            let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
            let found = consumer::Config {
                filter_subjects: owned(filters),
                ..consumer::IntoConsumerConfig::into_consumer_config(consumer_config())
            };
            let found = consumer::Config { filter_subject: String::new(), ..found };
            let differences = compare_consumers(&found, &stream::Config { subjects: owned(subjects), ..wanted() });
            assert!(differences.iter().all(|difference| difference.setting == "filter"), "{differences:?}");
            !differences.is_empty()
        };
        for good in [&["signals.sentry.*"][..], &["signals.sentry.*", "signals.sentry.issue"]] {
            for stream in ["signals.sentry.*", "signals.sentry.issue", "signals.>", ">"] {
                assert!(!unfit(good, &[stream]), "{good:?} {stream}");
            }
        }
        assert!(!unfit(&[], &["signals.sentry.*"]), "a stream of Sentry's alone needs no filter");
        assert!(!unfit(&[], &["signals.sentry.issue", "signals.sentry.error"]));
        assert!(!unfit(&["signals.*.*"], &["signals.sentry.*"]));
        assert!(!unfit(&["signals.*.*"], &["signals.sentry.*", "logs.>"]), "it is given none of the others");
        assert!(unfit(&[], &["signals.>"]));
        assert!(unfit(&[], &["signals.sentry.*", "logs.>"]));
        assert!(unfit(&["signals.sentry.>"], &["signals.>"]));
        assert!(unfit(&["signals.sentry.issue"], &["signals.sentry.*"]), "it would skip the others");
    }

    #[test]
    fn patterns_overlap_in_what_matches_both() {
        for (one, other, both) in [
            ("a.*", "a.b", Some("a.b")),
            ("a.>", "*.b.*", Some("a.b.*")),
            (">", "a.*", Some("a.*")),
            ("*.*", "a.>", Some("a.*")),
            ("a.>", "a.>", Some("a.>")),
            ("a.b", "a.c", None),
            ("a.>", "a", None),
            ("a.*", "a.b.c", None),
        ] {
            assert_eq!(overlap(one, other).as_deref(), both, "{one} {other}");
            assert_eq!(overlap(other, one).as_deref(), both, "{other} {one}");
        }
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
