//! PostgreSQL: a batch becomes rows in one transaction, and the same batch again becomes nothing.
//!
//! [`Store::persist`] runs three statements, the same for one row and for 256:
//! 1. [`LEDGER`] claims each delivery by its id. What it returns is fresh; the rest was stored before, here or by
//!    another worker, and nothing more happens to it. A replay therefore sends ids, not payloads.
//! 2. [`ISSUES`] inserts the issues of the fresh ones in the order of the stream, and so draws their numbers in it.
//! 3. [`SIGNALS`] inserts their signals, taking each payload from the issue just written.
//!
//! Repeating is harmless whatever happened: the ledger's row is written in the same transaction as what it stands
//! for, so a COMMIT whose answer got lost is found by the next try. Issue numbers are the exception that PostgreSQL
//! makes (sequences are not transactional): a transaction that fails may leave a gap, a repeat draws none.
//!
//! Whose fault a failure is, [`sqlstate`] decides. Ours (an outage): the whole batch waits, nothing is judged. The
//! row's: the batch is run once more with a savepoint a row, and what PostgreSQL refuses becomes a dead letter in that
//! same transaction, next to the rows of all the others. Unclear: an outage, until the caller asks for a savepoint a row
//! ([`Store::persist_each`]). Then the rows that fail alone are named, and all others are stored.

mod connect;
mod delay;
mod error;
mod ledger;
mod pool;
mod restore;
mod retry;
mod rows;
mod sqlstate;
mod statement;
mod taken;
mod tls;
mod told;
mod transact;
mod trial;
mod url;

use std::collections::HashSet;

use bytes::Bytes;
use deadpool_postgres::Pool;
use time::OffsetDateTime;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Row, SimpleQueryMessage};

use crate::dead_letters::{self, DeadLetter};
use crate::migrate::{self, MigrateError, Report};

pub(crate) use delay::Delay;
pub use error::{Outage, StoreError};
pub(crate) use ledger::LOOK_UP;
pub use ledger::{Fate, Known};
pub(crate) use pool::ANSWER_WITHIN;

pub use restore::Restored;
pub use retry::Retried;
use rows::{Claim, Statements};
pub(crate) use rows::{JsonText, bigint};
pub use sqlstate::Class;
pub(crate) use statement::Statement;
pub(crate) use taken::DEAD_LETTERS;
pub(crate) use told::{tell, tell_set_back};
pub(crate) use transact::{End, Failure, Tx, within};
use transact::{Lease, in_order, savepoint};
pub use trial::Tried;
pub use url::{BadDatabaseUrl, DatabaseUrl, TLS_SETTINGS};

/// Claims deliveries: `$1` to `$10` are columns, one array each. Returns the ids that nobody had claimed before. Where
/// another worker is claiming the same id right now, this waits for its COMMIT or ROLLBACK, and so never answers
/// "known" for a delivery that might yet not be stored. Callers send ids in ascending order: two workers with the same
/// messages then wait for each other in the same order and cannot deadlock. Row by row the claims follow the stream, as
/// the numbers do. There two workers may deadlock. PostgreSQL ends one of the two transactions, and it is tried again.
const LEDGER: Statement = Statement::new(
    "\
    INSERT INTO ingest.deliveries
        (delivery_id, state, signal_id, issue_id, stream_sequence, resource, severity, type, source_id, received_at)
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[],
                         $6::text[], $7::text[], $8::text[], $9::text[], $10::timestamptz[])
    ON CONFLICT (delivery_id) DO NOTHING
    RETURNING delivery_id",
    &[
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::INT8_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TIMESTAMPTZ_ARRAY,
    ],
);

/// Inserts the issues of fresh deliveries. `number` comes from its default, in the order of the arrays.
const ISSUES: Statement = Statement::new(
    "\
    INSERT INTO public.issues
        (id, title, type, status, priority, signal_source, signal_payload, created_at, updated_at)
    SELECT id, title, 'signal'::public.issue_type, 'triage'::public.issue_status, priority, 'sentry', payload,
           received_at, received_at
    FROM unnest($1::text[], $2::text[], $3::integer[], $4::jsonb[], $5::timestamptz[]) WITH ORDINALITY
         AS fresh (id, title, priority, payload, received_at, place)
    ORDER BY place",
    &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT4_ARRAY, Type::JSONB_ARRAY, Type::TIMESTAMPTZ_ARRAY],
);

/// Inserts the signals of fresh deliveries. The payload is copied from the issue inside the server: it crosses the
/// wire and is parsed and compressed once, not twice (TOAST keeps a value that is already compressed as it is), which
/// at 16 KB saves a third of the server's time.
const SIGNALS: Statement = Statement::new(
    "\
    INSERT INTO public.signals (id, source, source_id, type, severity, payload, issue_id, created_at)
    SELECT fresh.id, 'sentry', fresh.source_id, fresh.type, fresh.severity::public.signal_severity,
           issue.signal_payload, issue.id, issue.created_at
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[])
         AS fresh (id, issue_id, source_id, type, severity)
    JOIN public.issues AS issue ON issue.id = fresh.issue_id",
    &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY],
);

/// Appended to [`ISSUES`] and [`SIGNALS`] when a batch is run row by row: where the ledger was lost and Loop's tables
/// were not (a backup of the schema `public` alone), the derived ids still keep a replay from writing anything twice.
/// Not in the ordinary way, where it costs a seventh of the server's time for 2 KB rows.
const UNLESS_THERE: &str = " ON CONFLICT (id) DO NOTHING";

/// The first statement of every transaction. It is set for the transaction alone, because a connection pooler hands the
/// session to other clients.
///
/// Names without a schema then mean PostgreSQL's own functions and operators. Otherwise another role could put a
/// function into `public` that fits the arguments better, and the worker would call it with its own rights. Our tables
/// and types are named with their schemas. `pg_temp` stands last: PostgreSQL searches it first where it is left out.
/// (<https://www.postgresql.org/docs/current/ddl-schemas.html#DDL-SCHEMAS-PATTERNS>)
pub(crate) const SEARCH_PATH: &str = "SET LOCAL search_path = pg_catalog, pg_temp";

/// Set for one transaction. The first line is [`SEARCH_PATH`].
///
/// The time limits keep a transaction that lost its worker from holding its claims against the others. The planner is
/// told to look issues up by their key: its statistics may be of a time when the table was empty. A minute a statement:
/// a slow server may take 20 s for a body of 8 MiB, and one of control characters is twice that as JSON. Less for a lock:
/// a statement that waits for one then fails with another SQLSTATE than one that is slow by itself.
const SETTINGS: &str = "\
    SET LOCAL search_path = pg_catalog, pg_temp;
    SET LOCAL statement_timeout = '60s';
    SET LOCAL lock_timeout = '50s';
    SET LOCAL idle_in_transaction_session_timeout = '30s';
    SET LOCAL enable_seqscan = off;
    SET LOCAL enable_hashjoin = off;
    SET LOCAL enable_mergejoin = off";

/// A delivery that was understood, ready to become a signal and an issue.
#[derive(Debug, Clone)]
pub struct Record {
    /// The identity: the ledger's key.
    pub delivery_id: String,
    /// `signals.id`, derived from the delivery id.
    pub signal_id: String,
    /// `issues.id`, derived from the delivery id.
    pub issue_id: String,
    /// Its place in the stream.
    pub stream_sequence: u64,
    /// What the subject says it is about (`issue`, `error`, ...).
    pub resource: String,
    /// When the gateway received it; becomes `created_at`.
    pub received_at: OffsetDateTime,
    /// A label of Loop's enum `signal_severity`.
    pub severity: &'static str,
    /// `issues.priority`.
    pub priority: i32,
    /// `signals.type`: the action.
    pub kind: String,
    /// `issues.title`.
    pub title: String,
    /// The Sentry issue, where there is one.
    pub source_id: Option<String>,
    /// The body as JSON text. Not parsed here; PostgreSQL does that.
    pub payload: String,
    /// What arrived, for a dead letter should PostgreSQL refuse the row.
    pub origin: Origin,
}

/// A message as it came from the stream.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// Its subject.
    pub subject: String,
    /// Its headers.
    pub headers: async_nats::HeaderMap,
    /// Its body, byte for byte.
    pub body: Bytes,
    /// How many times the stream has delivered it.
    pub attempts: i64,
}

/// What is persisted together. A delivery id that occurs twice counts once: the first record, else the first dead
/// letter.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// In the order of the stream.
    pub records: Vec<Record>,
    /// What can never become a row, by the caller's judgement.
    pub dead_letters: Vec<DeadLetter>,
}

/// What a committed batch did. Every distinct delivery id of the batch is in exactly one of these lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// Became a signal and an issue now, in the order of the stream.
    pub fresh: Vec<String>,
    /// Became a dead letter now: the caller's, and the rows that PostgreSQL refused.
    pub dead: Vec<Dead>,
    /// Were in the ledger before; nothing was changed.
    pub known: Vec<String>,
    /// Are not stored. Only [`Store::persist_each`] leaves any.
    pub set_back: Vec<SetBack>,
}

/// A delivery whose row fails alone, for a reason that is no verdict on what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetBack {
    /// The delivery.
    pub delivery_id: String,
    /// PostgreSQL's code, or [`Outage::NO_SQLSTATE`].
    pub sqlstate: String,
    /// The words of PostgreSQL's error, without anything of what the delivery says.
    pub reason: String,
}

/// A delivery that became a dead letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dead {
    /// The delivery.
    pub delivery_id: String,
    /// Why, without anything of what it said.
    pub reason: String,
}

/// The connections of a [`Store`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections {
    /// Open, and nobody's.
    pub idle: usize,
    /// Open, and somebody's.
    pub used: usize,
    /// Callers that wait for one.
    pub waiting: usize,
}

/// The worker's connections to PostgreSQL. Cloning is cheap and shares them.
#[derive(Debug, Clone)]
pub struct Store {
    pool: Pool,
    /// One connection more, for questions about the others. It must never wait for one of them.
    probe: Pool,
}

impl Store {
    /// At most `connections` at a time, and one for [`Store::ping`]. They are made when they are first needed: a database
    /// that is down is found out by the first use, not here.
    pub fn new(url: &DatabaseUrl, connections: usize) -> Store {
        Store { pool: pool::pool(url, connections), probe: pool::pool(url, 1) }
    }

    /// For a worker that stores `concurrency` batches at once: each may be tried a second time beside the first try, and
    /// history takes a lock of its own.
    pub fn for_worker(url: &DatabaseUrl, concurrency: usize) -> Store {
        Store::new(url, Store::connections_of_worker(concurrency) - 1)
    }

    /// The most connections that such a worker opens.
    pub(crate) fn connections_of_worker(concurrency: usize) -> usize {
        2 * concurrency + 2
    }

    /// Stores a batch: all of it, in one transaction. When this returns, it is committed.
    ///
    /// # Errors
    /// [`StoreError::Outage`]: nothing was stored, or (when the connection died during COMMIT) everything was; the
    /// same call again settles it.
    pub async fn persist(&self, batch: &Batch) -> Result<Stored, StoreError> {
        self.persist_at(batch, |_| ()).await
    }

    /// The same. `at` is given the process id of each session in PostgreSQL that works on it.
    pub(crate) async fn persist_at(&self, batch: &Batch, at: impl Fn(i32)) -> Result<Stored, StoreError> {
        let distinct = Distinct::of(batch);
        let (distinct, at) = (&distinct, &at);
        let work = |tx: Tx| async move { Ok(in_order(backend(&tx, at), store_whole(&tx, distinct)).await?.1) };
        match self.transact(SETTINGS, work).await {
            Err(StoreError::Refused(_)) => self.row_by_row(distinct, false, at).await,
            outcome => outcome,
        }
    }

    /// Stores a batch with a savepoint a row. A row that fails alone for an unclear reason is set back, and all others are
    /// stored.
    ///
    /// # Errors
    /// As [`Store::persist`].
    pub async fn persist_each(&self, batch: &Batch) -> Result<Stored, StoreError> {
        self.persist_each_at(batch, |_| ()).await
    }

    /// The same. `at` is as in [`Store::persist_at`].
    pub(crate) async fn persist_each_at(&self, batch: &Batch, at: impl Fn(i32)) -> Result<Stored, StoreError> {
        self.row_by_row(&Distinct::of(batch), true, at).await
    }

    async fn row_by_row(&self, batch: &Distinct<'_>, set_back: bool, at: impl Fn(i32)) -> Result<Stored, StoreError> {
        let at = &at;
        let work = |tx: Tx| async move {
            Ok(in_order(backend(&tx, at), Box::pin(store_row_by_row(&tx, batch, set_back))).await?.1)
        };
        self.transact(SETTINGS, work).await
    }

    /// Asks whether PostgreSQL answers. May be dropped at any time, so that the caller says how long that may take.
    ///
    /// # Errors
    /// [`StoreError::Outage`] with the cause.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let lease = Lease::of(&self.probe).await?;
        within(lease.batch_execute("SELECT 1")).await?;
        lease.give_back();
        Ok(())
    }

    /// Runs `work` in one transaction after `settings`, and commits. `settings` and the first statement of `work` are sent
    /// together. See [`transact`].
    pub(crate) async fn transact<T, E: Failure, F: Future<Output = Result<T, E>>>(
        &self,
        settings: &str,
        work: impl FnOnce(Tx) -> F,
    ) -> Result<T, E> {
        transact::transact(&self.pool, settings, End::Commit, work).await
    }

    /// The same, and rolls back.
    pub(crate) async fn rehearse<T, E: Failure, F: Future<Output = Result<T, E>>>(
        &self,
        settings: &str,
        work: impl FnOnce(Tx) -> F,
    ) -> Result<T, E> {
        transact::transact(&self.pool, settings, End::Rollback, work).await
    }

    /// Runs one statement that reads, in a transaction of its own with [`SEARCH_PATH`].
    pub(crate) async fn query(
        &self,
        statement: &Statement,
        values: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        self.transact(SEARCH_PATH, |tx| async move { statement.query(&tx, values).await }).await
    }

    /// Creates what is missing and checks what is there. See [`migrate::migrate`].
    ///
    /// # Errors
    /// As [`migrate::migrate`] says.
    pub async fn migrate(&self) -> Result<Report, MigrateError> {
        migrate::migrate(self).await
    }

    /// Checks only, for a role that may not create. See [`migrate::check`].
    ///
    /// # Errors
    /// As [`migrate::check`] says.
    pub async fn check(&self) -> Result<Report, MigrateError> {
        migrate::check(self).await
    }

    /// The connections that there are now.
    pub fn connections(&self) -> Connections {
        let [batches, probe] = [&self.pool, &self.probe].map(|pool| {
            let status = pool.status();
            let idle = status.available.min(status.size);
            Connections { idle, used: status.size - idle, waiting: status.waiting }
        });
        Connections {
            idle: batches.idle + probe.idle,
            used: batches.used + probe.used,
            waiting: batches.waiting + probe.waiting,
        }
    }

    /// Closes the connections that nobody uses.
    pub fn forget_idle(&self) {
        self.pool.retain(|_, _| false);
    }
}

/// Tells `at` which process of PostgreSQL's this session is now. Behind a pooler it is another one in each transaction.
async fn backend(tx: &Tx, at: impl Fn(i32)) -> Result<(), StoreError> {
    let answer = within(tx.simple_query("SELECT pg_catalog.pg_backend_pid()")).await?;
    let pid = answer.iter().find_map(|message| {
        let SimpleQueryMessage::Row(row) = message else { return None };
        row.get(0)?.parse().ok()
    });
    pid.into_iter().for_each(at);
    Ok(())
}

/// A batch in which every delivery id occurs once.
struct Distinct<'a> {
    records: Vec<&'a Record>,
    dead_letters: Vec<&'a DeadLetter>,
}

impl<'a> Distinct<'a> {
    fn of(batch: &'a Batch) -> Distinct<'a> {
        let mut seen = HashSet::new();
        Distinct {
            records: batch.records.iter().filter(|record| seen.insert(&record.delivery_id)).collect(),
            dead_letters: batch.dead_letters.iter().filter(|letter| seen.insert(&letter.delivery_id)).collect(),
        }
    }
}

/// The ordinary way: three statements, three round trips.
async fn store_whole(tx: &Tx, batch: &Distinct<'_>) -> Result<Stored, StoreError> {
    let claims = batch.records.iter().map(|record| Claim::stored(record));
    let claims = claims.chain(batch.dead_letters.iter().map(|letter| Claim::dead(letter)));
    let statements = Statements::new("");
    let fresh = statements.claim(tx, claims.collect()).await?;
    let (records, known): (Vec<_>, Vec<_>) = batch.records.iter().partition(|it| fresh.contains(&it.delivery_id));
    let (letters, known_letters): (Vec<_>, Vec<_>) =
        batch.dead_letters.iter().partition(|it| fresh.contains(&it.delivery_id));
    statements.insert(tx, &records).await?;
    dead_letters::bury(tx, &letters).await?;
    Ok(Stored {
        fresh: records.iter().map(|record| record.delivery_id.clone()).collect(),
        dead: letters.iter().map(|letter| Dead::of(letter)).collect(),
        known: (known.iter().map(|it| &it.delivery_id))
            .chain(known_letters.iter().map(|it| &it.delivery_id))
            .cloned()
            .collect(),
        set_back: Vec::new(),
    })
}

/// The way of a batch with a bad row in it: a savepoint a row, so that PostgreSQL says which one it refuses. With
/// `set_back`, a row may also fail for an unclear reason.
async fn store_row_by_row(tx: &Tx, batch: &Distinct<'_>, set_back: bool) -> Result<Stored, StoreError> {
    // A refusal is the row's fault only while the tables are what this program writes to. A column that somebody
    // added, an enum label that is gone: that is everybody's trouble, and a reason to wait.
    migrate::fits(tx).await.map_err(StoreError::from_check)?;
    let statements = Statements::new(UNLESS_THERE);
    // A deferred constraint must refuse a row while the row's savepoint is open, not at COMMIT.
    within(tx.batch_execute("SET CONSTRAINTS ALL IMMEDIATE")).await?;
    let mut stored = Stored::default();
    let mut refused = Vec::new();
    for record in &batch.records {
        let delivery_id = record.delivery_id.clone();
        match savepoint(tx, store_one(tx, &statements, record)).await {
            Ok(true) => stored.fresh.push(delivery_id),
            Ok(false) => stored.known.push(delivery_id),
            Err(StoreError::Refused(reason)) => refused.push(DeadLetter::of(record, reason)),
            Err(StoreError::Outage(Outage { reason, of_row: Some(sqlstate), .. })) if set_back => {
                stored.set_back.push(SetBack { delivery_id, sqlstate, reason });
            }
            Err(error @ (StoreError::Outage(_) | StoreError::Denied(_))) => return Err(error),
        }
    }
    let letters: Vec<&DeadLetter> = batch.dead_letters.iter().copied().chain(&refused).collect();
    let fresh = statements.claim(tx, letters.iter().map(|letter| Claim::dead(letter)).collect()).await?;
    let (letters, known): (Vec<_>, Vec<_>) = letters.into_iter().partition(|it| fresh.contains(&it.delivery_id));
    dead_letters::bury(tx, &letters).await?;
    stored.dead.extend(letters.iter().map(|letter| Dead::of(letter)));
    stored.known.extend(known.iter().map(|letter| letter.delivery_id.clone()));
    Ok(stored)
}

/// Whether the delivery was fresh.
async fn store_one(tx: &Tx, statements: &Statements, record: &Record) -> Result<bool, StoreError> {
    let fresh = !statements.claim(tx, vec![Claim::stored(record)]).await?.is_empty();
    if fresh {
        statements.insert(tx, &[record]).await?;
    }
    Ok(fresh)
}

impl Dead {
    fn of(letter: &DeadLetter) -> Dead {
        Dead { delivery_id: letter.delivery_id.clone(), reason: letter.reason.clone() }
    }
}
