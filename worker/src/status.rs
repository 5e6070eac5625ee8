//! `worker status`: how the stream, its consumer and the database stand, on one screen. Changes nothing, and tells what
//! it can where one of the two servers is away.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::stream::Stream;
use clap::{ArgMatches, Command};
use futures_util::TryStreamExt as _;
use indicatif::{HumanBytes, HumanDuration};
use serde_json::{Value, json};
use shared::hostile::StoredMessage;
use shared::stream::{CONSUMER, SUBJECTS, is_shared};
use shared::text::printable;
use time::OffsetDateTime;

use crate::Config;
use crate::commands::{self, Ending, count, flag, print, print_json, show_time};
use crate::severity::Severity;
use crate::store::{Statement, Store, StoreError};

/// Both are asked for at once. The ledger has a BRIN index on `stored_at`: only its newest part is read.
const COUNTS: Statement = Statement::new(
    "\
    SELECT (SELECT count(*) FROM ingest.dead_letters),
           count(*) FILTER (WHERE severity = 'critical'),
           count(*) FILTER (WHERE severity = 'high'),
           count(*) FILTER (WHERE severity = 'medium'),
           count(*) FILTER (WHERE severity = 'low')
    FROM ingest.deliveries WHERE state = 'stored' AND stored_at > now() - interval '1 hour'",
    &[],
);

pub(crate) fn command() -> Command {
    Command::new("status")
        .about("Show how the stream, its consumer and the database stand")
        .after_help("Exit codes: 0 both servers answered; 1 one did not; 2 neither did; 64 wrong arguments.")
        .arg(flag("json", "JSON, for programs"))
}

pub(crate) async fn run(config: &Config, matches: &ArgMatches) -> anyhow::Result<Ending> {
    let (nats, database) = tokio::join!(nats(config), database(config));
    let neither = nats.is_err() && database.is_err();
    let both = nats.is_ok() && database.is_ok();
    if matches.get_flag("json") {
        let or_error = |part: Result<Value, String>| part.unwrap_or_else(|error| json!({ "error": error }));
        let nats = or_error(nats.as_ref().map(Nats::json).map_err(Clone::clone));
        let database = or_error(database.as_ref().map(Database::json).map_err(Clone::clone));
        print_json(&json!({ "nats": nats, "postgresql": database }))?;
    } else {
        let away = |name: &str, error: &str| format!("{name:10}  away: {}\n", printable(error));
        let nats = nats.map_or_else(|error| away("NATS", &error), |nats| nats.text());
        let database = database.map_or_else(|error| away("PostgreSQL", &error), |database| database.text());
        print(&(nats + &database))?;
    }
    anyhow::ensure!(!neither, "neither NATS nor PostgreSQL answers");
    Ok(if both { Ending::Well } else { Ending::LookAtIt })
}

/// What NATS says.
struct Nats {
    stream: String,
    messages: u64,
    /// Number of messages that are deliveries, if others write into the stream, too.
    deliveries: Option<u64>,
    bytes: u64,
    max_bytes: Option<u64>,
    /// When the stream stored the oldest and the newest message that it has; none where it is empty.
    span: Option<(OffsetDateTime, OffsetDateTime)>,
    consumer: Option<Info>,
    /// When the stream stored the oldest message that is pending; none where nothing is. Or why it is not known.
    oldest_pending: Result<Option<OffsetDateTime>, String>,
}

async fn nats(config: &Config) -> Result<Nats, String> {
    ask_nats(config).await.map_err(|error| commands::words(&error))
}

async fn ask_nats(config: &Config) -> anyhow::Result<Nats> {
    let context = commands::link(config).await?.current().context.clone();
    let name = &config.nats.stream;
    let stream = context.get_stream(name).await.with_context(|| format!("cannot look at stream {name}"))?;
    let (state, settings) = (&stream.cached_info().state, &stream.cached_info().config);
    let consumer = match stream.consumer_info(CONSUMER).await {
        Ok(info) => Some(info),
        Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(|| format!("cannot look at consumer {CONSUMER}")),
    };
    // Everything up to the floor is acknowledged, the first message above it is not.
    let oldest_pending = match consumer.as_ref().filter(|info| info.num_pending > 0 || info.num_ack_pending > 0) {
        Some(info) => {
            let next = info.ack_floor.stream_sequence + 1;
            let oldest = StoredMessage::first(&context, name, SUBJECTS, next).await;
            let stored_at = oldest.map(|message| message.map(|message| message.stored_at));
            stored_at.context("cannot fetch it").map_err(|error| commands::words(&error))
        }
        None => Ok(None),
    };
    let deliveries = if is_shared(settings) { Some(deliveries(&stream).await?) } else { None };
    Ok(Nats {
        stream: name.clone(),
        messages: state.messages,
        deliveries,
        bytes: state.bytes,
        max_bytes: u64::try_from(settings.max_bytes).ok(),
        span: (state.messages > 0).then_some((state.first_timestamp, state.last_timestamp)),
        consumer,
        oldest_pending,
    })
}

/// The number of messages whose subject is a delivery's.
async fn deliveries(stream: &Stream) -> anyhow::Result<u64> {
    let subjects = stream.info_with_subjects(SUBJECTS).await.context("cannot count the deliveries")?;
    Ok(subjects.try_fold(0, async |sum, (_, messages)| Ok(sum + messages as u64)).await?)
}

impl Nats {
    fn json(&self) -> Value {
        let time = |at: Option<OffsetDateTime>| at.map(show_time);
        json!({
            "stream": {
                "name": self.stream,
                "messages": self.messages,
                "deliveries": self.deliveries.unwrap_or(self.messages),
                "bytes": self.bytes,
                "max_bytes": self.max_bytes,
                "oldest_at": time(self.span.map(|(oldest, _)| oldest)),
                "newest_at": time(self.span.map(|(_, newest)| newest)),
            },
            "consumer": self.consumer.as_ref().map(|info| json!({
                "not_delivered": info.num_pending,
                "not_acknowledged": info.num_ack_pending,
                "redelivered": info.num_redelivered,
                "oldest_pending_at": time(self.oldest_pending.clone().ok().flatten()),
                "oldest_pending_seconds": self.oldest_pending.clone().ok().flatten().map(|at| age(at).as_secs()),
                "oldest_pending_error": self.oldest_pending.as_ref().err(),
            })),
        })
    }

    fn text(&self) -> String {
        let Nats { stream, messages, bytes, max_bytes, .. } = self;
        let limit = max_bytes.map_or_else(String::new, |most| {
            format!(" of {} ({} %)", HumanBytes(most), bytes.saturating_mul(100) / most.max(1))
        });
        let mut text = format!("stream      {stream}: {} messages, {}{limit}\n", count(*messages), HumanBytes(*bytes));
        if let Some(deliveries) = self.deliveries {
            text += &format!("            {} of them are deliveries ({SUBJECTS})\n", count(deliveries));
        }
        if let Some((oldest, newest)) = self.span {
            text += &format!("            oldest {}, newest {}\n", ago(oldest), ago(newest));
        }
        let Some(info) = &self.consumer else {
            return text + &format!("consumer    there is no consumer {CONSUMER} yet: no worker has run\n");
        };
        text += &format!(
            "consumer    {} not delivered yet, {} delivered and not acknowledged, {} of them more than once\n",
            count(info.num_pending),
            count(info.num_ack_pending as u64),
            count(info.num_redelivered as u64)
        );
        text += &match &self.oldest_pending {
            Ok(Some(oldest)) => format!("            oldest pending {}\n", ago(*oldest)),
            Ok(None) => "            nothing pending\n".to_owned(),
            Err(error) => format!("            oldest pending: {}\n", printable(error)),
        };
        text
    }
}

/// What PostgreSQL says.
struct Database {
    dead_letters: u64,
    /// Gravest first.
    last_hour: [(Severity, u64); 4],
}

async fn database(config: &Config) -> Result<Database, String> {
    let ask = async {
        let rows = Store::new(&config.database, 1).query(&COUNTS, &[]).await?;
        let number = |column| {
            let number: i64 = rows[0].try_get(column).map_err(|err| StoreError::from_sql(&err))?;
            Ok::<_, StoreError>(number.unsigned_abs())
        };
        let [critical, high, medium, low] = Severity::ALL;
        Ok(Database {
            dead_letters: number(0)?,
            last_hour: [(critical, number(1)?), (high, number(2)?), (medium, number(3)?), (low, number(4)?)],
        })
    };
    ask.await.map_err(|error: StoreError| error.to_string())
}

impl Database {
    fn json(&self) -> Value {
        let last_hour: serde_json::Map<String, Value> =
            self.last_hour.iter().map(|(severity, number)| (severity.to_string(), json!(number))).collect();
        json!({ "dead_letters": self.dead_letters, "stored_in_the_last_hour": last_hour })
    }

    fn text(&self) -> String {
        let stored = self.last_hour.map(|(severity, number)| format!("{} {severity}", count(number))).join(", ");
        format!("database    {} dead letters; stored in the last hour: {stored}\n", count(self.dead_letters))
    }
}

fn age(at: OffsetDateTime) -> Duration {
    (OffsetDateTime::now_utc() - at).try_into().unwrap_or_default() // the server's clock may be ahead
}

fn ago(at: OffsetDateTime) -> String {
    format!("{} ago", HumanDuration(age(at)))
}
