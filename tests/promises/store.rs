//! What the worker promises of PostgreSQL: a delivery becomes one signal and one issue, once, whatever is repeated, run
//! at the same time or refused; and nobody's tables are changed behind their back.
#![expect(clippy::unwrap_used, reason = "in a test, a failure of its tools is a failure")]

use bytes::Bytes;
use futures_util::future::join_all;
use time::OffsetDateTime;
use tokio_postgres::{Client, NoTls};
use worker::dead_letters::DeadLetter;
use worker::migrate::MigrateError;
use worker::store::{Batch, Dead, Origin, Record, Store};
use world::eventually;

/// A database of its own for each test.
pub(crate) struct Database {
    url: String,
    name: String,
    /// As the superuser, for looking and for mischief.
    admin: Client,
}

impl Database {
    /// An empty one.
    async fn empty() -> Database {
        let name = format!("store_{}", uuid::Uuid::new_v4().simple());
        let url = world::postgres().await.create_database(&name).await.unwrap();
        let admin = connect(&url).await;
        Database { url, name, admin }
    }

    /// One that `worker migrate` has been over.
    pub(crate) async fn migrated() -> Database {
        let database = Database::empty().await;
        database.store().migrate().await.unwrap();
        database
    }

    /// One where Loop has run its own migrations.
    async fn of_loop() -> Database {
        let database = Database::empty().await;
        database.run(LOOP).await;
        database
    }

    pub(crate) fn store(&self) -> Store {
        Store::new(&self.url.parse().unwrap(), 4)
    }

    /// As a role that may log in, and nothing else that `rights` does not say.
    async fn store_of_role(&self, rights: &str) -> Store {
        let role = &self.name;
        self.run(&format!("CREATE ROLE {role} LOGIN; {}", rights.replace("ROLE", role))).await;
        let url = self.url.replace("loop@", &format!("{role}@"));
        Store::new(&url.parse().unwrap(), 1)
    }

    async fn run(&self, sql: &str) {
        self.admin.batch_execute(sql).await.unwrap();
    }

    /// The first column of every row.
    async fn texts(&self, sql: &str) -> Vec<String> {
        self.admin.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    }

    pub(crate) async fn text(&self, sql: &str) -> String {
        self.texts(sql).await.remove(0)
    }

    /// How far issue numbers are drawn.
    async fn drawn(&self) -> i64 {
        let row = self.admin.query_one("SELECT coalesce(pg_sequence_last_value('issues_number_seq'), 0)", &[]).await;
        row.unwrap().get(0)
    }

    /// Signals, issues, ledger rows, dead letters.
    pub(crate) async fn counts(&self) -> [i64; 4] {
        let count = async |table: &str| {
            self.admin.query_one(&format!("SELECT count(*) FROM {table}"), &[]).await.unwrap().get(0)
        };
        [
            count("public.signals").await,
            count("public.issues").await,
            count("ingest.deliveries").await,
            count("ingest.dead_letters").await,
        ]
    }
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Loop's tables as its migrations make them, the GIN index included.
const LOOP: &str = "
    CREATE TYPE issue_type AS ENUM ('signal', 'hypothesis', 'plan', 'task', 'monitor');
    CREATE TYPE issue_status AS ENUM ('triage', 'backlog', 'todo', 'in_progress', 'done', 'canceled');
    CREATE TYPE signal_severity AS ENUM ('low', 'medium', 'high', 'critical');
    CREATE TABLE issues (
        id text PRIMARY KEY, number serial NOT NULL, title text NOT NULL, description text, type issue_type NOT NULL,
        status issue_status NOT NULL DEFAULT 'triage', priority integer NOT NULL DEFAULT 0, parent_id text,
        project_id text, signal_source text, signal_payload jsonb, hypothesis jsonb, commits jsonb, pull_requests jsonb,
        agent_session_id text, agent_summary text, completed_at timestamptz, deleted_at timestamptz,
        created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT issues_number_unique UNIQUE (number));
    CREATE INDEX ON issues (parent_id);
    CREATE INDEX ON issues (project_id, status);
    CREATE INDEX ON issues (status);
    CREATE INDEX ON issues (type);
    CREATE TABLE signals (
        id text PRIMARY KEY, source text NOT NULL, source_id text, type text NOT NULL,
        severity signal_severity NOT NULL, payload jsonb NOT NULL, issue_id text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now());
    CREATE INDEX ON signals (issue_id);
    CREATE INDEX ON signals (source);
    CREATE INDEX ON signals USING gin (payload);";

/// A record like any other; `n` makes it its own.
fn record(n: u64) -> Record {
    let payload = format!(r#"{{"action": "created", "n": {n}}}"#);
    Record {
        delivery_id: format!("delivery-{n}"),
        signal_id: format!("s{n:023}"),
        issue_id: format!("i{n:023}"),
        stream_sequence: n,
        resource: "issue".into(),
        received_at: at(n),
        severity: "high",
        priority: 2,
        kind: "created".into(),
        title: format!("Sentry: no. {n} (1 events)"),
        source_id: Some(format!("{n}00")),
        origin: origin(payload.clone().into()),
        payload,
    }
}

fn origin(body: Bytes) -> Origin {
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Request-Id", "r-1");
    Origin { subject: "signals.sentry.issue".into(), headers, body, attempts: 3 }
}

fn letter(n: u64) -> DeadLetter {
    DeadLetter {
        delivery_id: format!("delivery-{n}"),
        stream_sequence: n,
        origin: origin(Bytes::from_static(b"\xff\0not json")),
        reason: "not JSON: no value where one must be at byte 0".into(),
        failed_at: at(n),
    }
}

/// A moment in the past, to the microsecond.
fn at(n: u64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + time::Duration::days(19_000) + time::Duration::microseconds(n.cast_signed())
}

fn records(numbers: impl IntoIterator<Item = u64>) -> Batch {
    Batch { records: numbers.into_iter().map(record).collect(), dead_letters: Vec::new() }
}

fn ids(numbers: impl IntoIterator<Item = u64>) -> Vec<String> {
    numbers.into_iter().map(|n| format!("delivery-{n}")).collect()
}

#[tokio::test]
async fn a_delivery_becomes_one_signal_and_one_issue() {
    let database = Database::migrated().await;
    let plain = Record { source_id: None, severity: "low", priority: 4, ..record(8) };
    let batch = Batch { records: vec![record(7), plain], dead_letters: Vec::new() };
    let stored = database.store().persist(&batch).await.unwrap();
    assert_eq!((stored.fresh, stored.known, stored.dead), (ids([7, 8]), vec![], vec![]));
    let issues = "SELECT concat_ws('|', id, number, title, type, status, priority, signal_source, \
                  signal_payload::text, extract(epoch from created_at), created_at = updated_at) \
                  FROM issues ORDER BY number";
    assert_eq!(
        database.texts(issues).await,
        [
            "i00000000000000000000007|1|Sentry: no. 7 (1 events)|signal|triage|2|sentry|{\"n\": 7, \"action\": \
             \"created\"}|1641600000.000007|t",
            "i00000000000000000000008|2|Sentry: no. 8 (1 events)|signal|triage|4|sentry|{\"n\": 8, \"action\": \
             \"created\"}|1641600000.000008|t",
        ]
    );
    let signals = "SELECT concat_ws('|', s.id, source, coalesce(source_id, 'none'), s.type, severity, \
                   payload = i.signal_payload, issue_id, s.created_at = i.created_at) \
                   FROM signals s JOIN issues i ON i.id = issue_id ORDER BY s.id";
    assert_eq!(
        database.texts(signals).await,
        [
            "s00000000000000000000007|sentry|700|created|high|t|i00000000000000000000007|t",
            "s00000000000000000000008|sentry|none|created|low|t|i00000000000000000000008|t",
        ]
    );
    let ledger = "SELECT concat_ws('|', delivery_id, state, signal_id, issue_id, stream_sequence, resource, severity, \
                  type, source_id, extract(epoch from received_at), stored_at > now() - interval '1 minute') \
                  FROM ingest.deliveries WHERE stream_sequence = 7";
    assert_eq!(
        database.text(ledger).await,
        "delivery-7|stored|s00000000000000000000007|i00000000000000000000007|7|issue|high|created|700|\
         1641600000.000007|t"
    );
}

#[tokio::test]
async fn a_repeat_changes_nothing_and_draws_no_number() {
    let database = Database::migrated().await;
    let store = database.store();
    store.persist(&records(0..300)).await.unwrap();
    let before = database.drawn().await;
    let repeated = store.persist(&records(0..300)).await.unwrap();
    assert_eq!((repeated.fresh.len(), repeated.known), (0, ids(0..300)));
    assert_eq!((before, database.drawn().await), (300, 300));
    // Among the known, only the fresh draw, in the order of the stream.
    let mixed = store.persist(&records([305, 4, 301, 299, 303])).await.unwrap();
    assert_eq!((mixed.fresh, mixed.known), (ids([305, 301, 303]), ids([4, 299])));
    let numbered = database.texts("SELECT number || ' ' || id FROM issues WHERE number > 300 ORDER BY number").await;
    let expected = [(301, 305), (302, 301), (303, 303)].map(|(number, n)| format!("{number} i{n:023}"));
    assert_eq!(numbered, expected);
    assert_eq!((database.counts().await, database.drawn().await), ([303, 303, 303, 0], 303));
    // What a user deleted stays deleted.
    database.run("DELETE FROM signals; DELETE FROM issues").await;
    assert_eq!(store.persist(&records(0..10)).await.unwrap().known, ids(0..10));
    assert_eq!(database.counts().await, [0, 0, 303, 0]);
}

#[tokio::test]
async fn a_delivery_twice_in_a_batch_counts_once_and_the_first_wins() {
    let database = Database::migrated().await;
    let again = Record { title: "the second".into(), ..record(1) };
    let batch =
        Batch { records: vec![record(1), again, record(2)], dead_letters: vec![letter(2), letter(3), letter(3)] };
    let stored = database.store().persist(&batch).await.unwrap();
    assert_eq!((stored.fresh, stored.known), (ids([1, 2]), vec![]));
    assert_eq!(stored.dead, [Dead { delivery_id: "delivery-3".into(), reason: letter(3).reason }]);
    assert_eq!(database.counts().await, [2, 2, 3, 1]);
    assert_eq!(database.text("SELECT title FROM issues WHERE number = 1").await, record(1).title);
}

#[tokio::test]
async fn an_empty_batch_is_stored_at_once() {
    let database = Database::migrated().await;
    assert_eq!(database.store().persist(&Batch::default()).await.unwrap(), worker::store::Stored::default());
}

#[tokio::test]
async fn workers_with_the_same_messages_write_them_once() {
    let database = Database::migrated().await;
    let stores: Vec<Store> = (0..3).map(|_| database.store()).collect();
    for round in 0..30 {
        let numbers = || round * 100..round * 100 + 64;
        // The same messages, in different orders.
        let batches = [records(numbers()), records(numbers().rev()), records(numbers().rev().chain(numbers()))];
        let outcomes = join_all(stores.iter().zip(&batches).map(|(store, batch)| store.persist(batch))).await;
        let mut fresh: Vec<String> = outcomes.into_iter().flat_map(|stored| stored.unwrap().fresh).collect();
        fresh.sort();
        let mut all = ids(numbers());
        all.sort();
        assert_eq!(fresh, all, "round {round}: each delivery is fresh to one worker");
    }
    assert_eq!((database.counts().await, database.drawn().await), ([1920, 1920, 1920, 0], 1920));
}

#[tokio::test]
async fn workers_with_the_same_bad_row_bury_it_once() {
    let database = Database::migrated().await;
    let stores: Vec<Store> = (0..3).map(|_| database.store()).collect();
    for round in 0..10 {
        let mut batch = records(round * 10..round * 10 + 8);
        batch.records[3].payload = "{".into();
        let outcomes = join_all(stores.iter().map(|store| store.persist(&batch))).await;
        let stored: Vec<_> = outcomes.into_iter().map(Result::unwrap).collect();
        assert_eq!(stored.iter().map(|stored| stored.fresh.len()).sum::<usize>(), 7);
        assert_eq!(stored.iter().map(|stored| stored.dead.len()).sum::<usize>(), 1);
        assert!(stored.iter().all(|stored| stored.fresh.len() + stored.dead.len() + stored.known.len() == 8));
    }
    assert_eq!(database.counts().await, [70, 70, 80, 10]);
}

#[tokio::test]
async fn a_row_that_postgresql_refuses_becomes_a_dead_letter_and_the_rest_is_stored() {
    let database = Database::migrated().await;
    let store = database.store();
    let deep = "[".repeat(200_000) + &"]".repeat(200_000);
    let bad = [
        (2, Record { payload: "{\"secret\": hunter2}".into(), ..record(2) }, "22P02"),
        (3, Record { payload: deep, ..record(3) }, "54001"),
        (5, Record { payload: "{\"a\": \"hunter2\\u0000\"}".into(), ..record(5) }, "22P05"),
        (6, Record { title: "hunter2\0".into(), ..record(6) }, "22021"),
        (8, Record { source_id: Some("hunter2\0".into()), ..record(8) }, "22021"),
        (9, Record { payload: "{\"n\": 1e999999}".into(), ..record(9) }, "22003"),
    ];
    let mut batch = records(0..11);
    for (n, record, _) in &bad {
        batch.records[usize::try_from(*n).unwrap()] = record.clone();
    }
    batch.dead_letters.push(letter(20));
    let stored = store.persist(&batch).await.unwrap();
    assert_eq!((stored.fresh, stored.known), (ids([0, 1, 4, 7, 10]), vec![]));
    let dead: Vec<String> = stored.dead.iter().map(|dead| dead.delivery_id.clone()).collect();
    assert_eq!(dead, ids([20, 2, 3, 5, 6, 8, 9]));
    for ((_, _, code), dead) in bad.iter().zip(&stored.dead[1..]) {
        assert!(dead.reason.contains(&format!("SQLSTATE {code}")), "{dead:?}");
        assert!(!dead.reason.contains("hunter2") && !dead.reason.contains("secret"), "{dead:?}");
    }
    assert_eq!(database.counts().await, [5, 5, 12, 7]);
    let numbered = database.texts("SELECT id FROM issues ORDER BY number").await;
    assert_eq!(numbered, [0, 1, 4, 7, 10].map(|n| format!("i{n:023}")), "in the order of the stream");
    let letters = "SELECT concat_ws('|', delivery_id, state, stream_sequence, subject, headers, attempts, \
                   body = convert_to('{\"action\": \"created\", \"n\": 2}', 'UTF8')) \
                   FROM ingest.dead_letters JOIN ingest.deliveries d USING (delivery_id, stream_sequence) \
                   WHERE delivery_id = 'delivery-2'";
    assert_eq!(
        database.text(letters).await,
        "delivery-2|dead|2|signals.sentry.issue|{\"Request-Id\": [\"r-1\"]}|3|t",
        "the message as it came"
    );
    // And once more: nothing is tried again, nothing is buried twice.
    let repeated = store.persist(&batch).await.unwrap();
    assert_eq!((repeated.fresh.len(), repeated.dead.len(), repeated.known.len()), (0, 0, 12));
    assert_eq!(database.counts().await, [5, 5, 12, 7]);
}

#[tokio::test]
async fn dead_letters_go_with_their_batch_or_not_at_all() {
    let database = Database::migrated().await;
    let store = database.store();
    let batch = Batch { records: records(0..3).records, dead_letters: vec![letter(10), letter(11)] };
    // Neither rows nor dead letters while the batch cannot be stored.
    database.run("ALTER TABLE signals RENAME TO elsewhere").await;
    assert!(store.persist(&batch).await.unwrap_err().is_outage());
    database.run("ALTER TABLE elsewhere RENAME TO signals").await;
    assert_eq!(database.counts().await, [0, 0, 0, 0]);
    assert_eq!(store.persist(&batch).await.unwrap().dead.len(), 2);
    assert_eq!(database.counts().await, [3, 3, 5, 2]);
    let row = database.admin.query_one("SELECT body, reason FROM ingest.dead_letters LIMIT 1", &[]).await.unwrap();
    assert_eq!((row.get::<_, &[u8]>(0), row.get(1)), (&b"\xff\0not json"[..], letter(10).reason));
    let repeated = store.persist(&batch).await.unwrap();
    assert_eq!((repeated.dead.len(), repeated.known.len()), (0, 5));
}

/// Holds the third record of a batch inside PostgreSQL, by a trigger that waits for a lock.
const WAIT: &str = "
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN IF NEW.title = 'wait' THEN PERFORM pg_advisory_xact_lock_shared(42); END IF; RETURN NEW; END $$;
    CREATE TRIGGER wait BEFORE INSERT ON issues FOR EACH ROW EXECUTE FUNCTION wait();
    SELECT pg_advisory_lock(42)";

#[tokio::test]
async fn an_outage_in_the_middle_of_row_by_row_is_no_poison() {
    let database = Database::migrated().await;
    database.run(WAIT).await;
    let store = database.store();
    let mut batch = records(0..5);
    batch.records[1].payload = "not json".into(); // refused before anything runs, so the next try is row by row
    batch.records[2].title = "wait".into();
    let killed = async {
        let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                    WHERE datname = current_database() AND wait_event = 'advisory'";
        eventually("the third record to wait", async || {
            (database.admin.query_one(kill, &[]).await.unwrap().get::<_, i64>(0) > 0).then_some(())
        })
        .await;
    };
    let (outcome, ()) = tokio::join!(store.persist(&batch), killed);
    assert!(outcome.as_ref().is_err_and(|err| err.is_outage()), "{outcome:?}");
    assert_eq!(database.counts().await, [0, 0, 0, 0]);
    database.run("SELECT pg_advisory_unlock(42)").await;
    let stored = store.persist(&batch).await.unwrap();
    assert_eq!((stored.fresh, stored.dead.len()), (ids([0, 2, 3, 4]), 1));
}

#[tokio::test]
async fn a_schema_that_changed_under_us_is_no_poison() {
    let database = Database::migrated().await;
    let store = database.store();
    store.persist(&records(0..3)).await.unwrap();
    for (change, named, back) in [
        (
            "ALTER TABLE signals ADD COLUMN team text NOT NULL DEFAULT ''; ALTER TABLE signals ALTER team DROP DEFAULT",
            "column team",
            "ALTER TABLE signals DROP COLUMN team",
        ),
        (
            "ALTER TYPE issue_status RENAME VALUE 'triage' TO 'new'",
            "label triage",
            "ALTER TYPE issue_status RENAME VALUE 'new' TO 'triage'",
        ),
        (
            "SELECT setval('issues_number_seq', 1)",
            "SELECT setval(",
            "SELECT setval('issues_number_seq', (SELECT max(number) FROM issues))",
        ),
        ("DROP INDEX issues_status_idx", "", "CREATE INDEX ON issues (status)"),
    ] {
        database.run(change).await;
        let outcome = store.persist(&records(3..6)).await;
        if named.is_empty() {
            assert_eq!(outcome.unwrap().fresh, ids(3..6), "an index is Loop's own affair");
        } else {
            let err = outcome.expect_err(change);
            assert!(err.is_outage() && err.to_string().contains(named), "{change}: {err}");
        }
        database.run(back).await;
    }
    assert_eq!(database.counts().await, [6, 6, 6, 0]);
}

#[tokio::test]
async fn a_server_that_became_read_only_is_an_outage() {
    let database = Database::migrated().await;
    let store = database.store();
    store.persist(&Batch::default()).await.unwrap(); // connects
    let set = format!("ALTER DATABASE {} SET default_transaction_read_only", database.name);
    database.run(&format!("{set} = on")).await;
    let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                WHERE datname = current_database() AND application_name = 'loop-worker'";
    // Another may be there for a moment: the one that made the tables.
    assert!(database.admin.query_one(kill, &[]).await.unwrap().get::<_, i64>(0) >= 1);
    assert!(store.persist(&records([1])).await.unwrap_err().is_outage(), "its connection was killed");
    assert!(store.persist(&records([1])).await.unwrap_err().is_outage(), "it is read-only");
    database.run(&format!("SET default_transaction_read_only = off; {set} = off")).await;
    assert_eq!(store.persist(&records([1])).await.unwrap().fresh, ids([1]));
}

#[tokio::test]
async fn a_lost_ledger_makes_no_duplicates() {
    let database = Database::migrated().await;
    let store = database.store();
    store.persist(&records(0..5)).await.unwrap();
    database.run("DELETE FROM signals WHERE id LIKE '%4'; TRUNCATE ingest.deliveries").await;
    let stored = store.persist(&records(0..8)).await.unwrap();
    assert_eq!((stored.fresh, stored.dead), (ids(0..8), vec![]));
    assert_eq!(database.counts().await, [8, 8, 8, 0], "what is there stays, what is missing is written");
}

#[tokio::test]
async fn the_largest_bodies_fit_in_one_batch() {
    let database = Database::migrated().await;
    let large = |n| Record { payload: format!("{{\"a\": \"{}\"}}", "x".repeat(8 << 20)), ..record(n) };
    let batch = Batch { records: (0..5).map(large).collect(), dead_letters: Vec::new() };
    assert_eq!(database.store().persist(&batch).await.unwrap().fresh, ids(0..5));
    let lengths = "SELECT DISTINCT length(payload ->> 'a')::text FROM signals JOIN issues ON issues.id = issue_id \
                   WHERE payload = signal_payload";
    assert_eq!(database.texts(lengths).await, ["8388608"]);
}

#[tokio::test]
async fn issues_are_looked_up_by_key_also_when_the_plan_was_made_for_an_empty_table() {
    let database = Database::migrated().await;
    let store = database.store();
    for round in 0..10 {
        store.persist(&records(round * 10..round * 10 + 10)).await.unwrap();
    }
    drop(store); // a server process reports its statistics when it ends, at the latest
    // Building an index reads the table once, too.
    let scans = "SELECT seq_scan - (SELECT count(*) FROM pg_indexes WHERE tablename = 'issues'), n_tup_ins \
                 FROM pg_stat_user_tables WHERE relname = 'issues'";
    let scans = eventually("the statistics of all 100 rows", async || {
        let row = database.admin.query_one(scans, &[]).await.unwrap();
        (row.get::<_, i64>(1) == 100).then(|| row.get::<_, i64>(0))
    })
    .await;
    assert_eq!(scans, 0, "no scan of the whole table");
}

#[tokio::test]
async fn ten_workers_may_migrate_at_once() {
    let database = Database::empty().await;
    let stores: Vec<Store> = (0..10).map(|_| database.store()).collect();
    let reports = join_all(stores.iter().map(Store::migrate)).await;
    let reports: Vec<_> = reports.into_iter().map(Result::unwrap).collect();
    assert_eq!(reports.iter().filter(|report| report.changed()).count(), 1, "one created, nine found it there");
    assert_eq!(database.texts("SELECT version::text FROM ingest.migrations ORDER BY 1").await, ["1", "2"]);
    assert_eq!(stores[0].persist(&records(0..3)).await.unwrap().fresh.len(), 3);
}

#[tokio::test]
async fn payloads_are_compressed_with_lz4_where_the_server_has_it() {
    let database = Database::migrated().await;
    let lz4 = "SELECT bool_or('lz4' = ANY (enumvals))::text FROM pg_settings WHERE name = 'default_toast_compression'";
    let used = "SELECT string_agg(DISTINCT attcompression::text, '') FROM pg_attribute WHERE attrelid IN \
                ('issues'::regclass, 'signals'::regclass) AND attname IN ('payload', 'signal_payload')";
    let expected = if database.text(lz4).await == "true" { "l" } else { "" };
    assert_eq!(database.text(used).await, expected);
}

/// Everything the catalog holds on the schema `public`; `xmin` shows even a change that was taken back.
const FINGERPRINT: &str = "
    SELECT 'table ' || c.xmin || to_jsonb(c)::text FROM pg_class c WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'column ' || a.xmin || to_jsonb(a)::text FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid
              WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'label ' || e.xmin || to_jsonb(e)::text FROM pg_enum e
    UNION ALL SELECT 'constraint ' || c.xmin || to_jsonb(c)::text FROM pg_constraint c
              WHERE connamespace = 'public'::regnamespace
    ORDER BY 1";

#[tokio::test]
async fn loops_own_tables_are_left_alone() {
    let database = Database::of_loop().await;
    // A Loop that moved on: columns we do not know, one of ours that we do not write gone, labels added.
    database.run("ALTER TABLE issues ADD COLUMN team text, DROP COLUMN agent_summary").await;
    database.run("ALTER TABLE signals ADD COLUMN seen boolean NOT NULL DEFAULT false").await;
    database.run("ALTER TYPE issue_status ADD VALUE 'duplicate'").await;
    database.run("INSERT INTO issues (id, title, type) VALUES ('mine', 'mine', 'task')").await;
    let before = database.texts(FINGERPRINT).await;
    let store = database.store();
    let report = store.migrate().await.unwrap();
    assert_eq!(before, database.texts(FINGERPRINT).await);
    let text = report.to_string();
    for line in ["public.issues: there already, left alone", "schema ingest: created"] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
    }
    assert_eq!(store.persist(&records(0..3)).await.unwrap().fresh.len(), 3);
    assert_eq!(database.text("SELECT max(number)::text FROM issues").await, "4");
    // And ours, when they are there.
    let again = store.migrate().await.unwrap();
    assert!(!again.changed() && again.to_string().contains("schema ingest: there already, left alone"), "{again}");
    assert!(store.check().await.unwrap().to_string().contains("ingest.deliveries: fits"));
}

#[tokio::test]
async fn what_does_not_fit_is_named() {
    let cases = [
        ("ALTER TABLE issues DROP COLUMN signal_payload", "public.issues, column signal_payload: found no such column"),
        (
            "DROP INDEX signals_payload_idx; ALTER TABLE signals ALTER payload TYPE text",
            "public.signals, column payload: found text, expected jsonb",
        ),
        ("ALTER TABLE issues ALTER id TYPE varchar(30)", "column id: found character varying(30), expected text"),
        ("ALTER TABLE issues ALTER number DROP DEFAULT", "public.issues, column number: found no default"),
        ("ALTER TABLE signals ALTER source_id SET NOT NULL", "column source_id: found NOT NULL, expected NULL allowed"),
        ("ALTER TABLE signals ADD team text NOT NULL", "column team: found text NOT NULL without a default"),
        ("ALTER TABLE signals DROP CONSTRAINT signals_pkey", "public.signals, column id: found no unique index"),
        (
            "ALTER TABLE signals DROP type; ALTER TABLE signals ADD type text GENERATED ALWAYS AS ('a') STORED",
            "generated",
        ),
        ("DROP TABLE signals; CREATE VIEW signals AS SELECT 1", "public.signals: found no such table"),
        (
            "ALTER TYPE signal_severity RENAME VALUE 'low' TO 'minor'",
            "public.signal_severity, label low: found only minor",
        ),
        ("DROP TYPE issue_status CASCADE", "column status: found no such column, expected public.issue_status"),
        ("SELECT setval('issues_number_seq', 9); INSERT INTO issues VALUES ('a', 12, 'a', NULL, 'task')", "up to 12"),
    ];
    for (change, named) in cases {
        let database = Database::of_loop().await;
        database.run(change).await;
        let before = database.texts(FINGERPRINT).await;
        let err = database.store().migrate().await.expect_err(change);
        assert!(err.to_string().contains(named) && !err.is_outage(), "{change}: {err}");
        assert_eq!(before, database.texts(FINGERPRINT).await, "{change}: nothing may be altered");
        assert_eq!(database.text("SELECT count(*)::text FROM pg_namespace WHERE nspname = 'ingest'").await, "0");
    }
}

#[tokio::test]
async fn every_problem_is_named_at_once() {
    let database = Database::empty().await;
    let Err(MigrateError::DoesNotFit(problems)) = database.store().check().await else { panic!("nothing is there") };
    let objects: Vec<&str> = problems.iter().map(|problem| problem.object.as_str()).collect();
    for object in ["public.issues", "public.signals", "ingest.deliveries", "ingest.dead_letters", "public.issue_type"] {
        assert!(objects.contains(&object), "{object} is missing in {objects:?}");
    }
}

#[tokio::test]
async fn a_role_that_may_not_create_is_told_what_to_do() {
    let database = Database::of_loop().await;
    let store = database.store_of_role("REVOKE CREATE ON SCHEMA public FROM PUBLIC").await;
    let err = store.migrate().await.unwrap_err();
    let role = &database.name;
    assert!(err.to_string().contains(&format!("GRANT CREATE ON DATABASE {role} TO {role}")), "{err}");
    database.store().migrate().await.unwrap();
    let err = store.migrate().await.unwrap_err();
    assert!(err.to_string().contains(&format!("the role {role} may not INSERT")), "{err}");
    for grant in [
        "GRANT SELECT, INSERT ON issues, signals TO ROLE; GRANT USAGE ON SCHEMA ingest TO ROLE; \
         GRANT SELECT, INSERT, UPDATE ON ingest.deliveries TO ROLE; \
         GRANT SELECT, INSERT, DELETE ON ingest.dead_letters TO ROLE",
        "GRANT USAGE ON SEQUENCE issues_number_seq TO ROLE",
    ] {
        assert!(store.migrate().await.is_err(), "not yet: {grant}");
        database.run(&grant.replace("ROLE", role)).await;
    }
    assert!(!store.migrate().await.unwrap().changed(), "where nothing is missing, no right to create is needed");
    assert_eq!(store.persist(&records(0..3)).await.unwrap().fresh.len(), 3);
}

#[tokio::test]
async fn a_role_that_may_not_create_tables_in_public_is_told_so() {
    let database = Database::empty().await;
    let store = database.store_of_role("REVOKE CREATE ON SCHEMA public FROM PUBLIC").await;
    let err = store.migrate().await.unwrap_err();
    let remedy = format!("GRANT USAGE, CREATE ON SCHEMA public TO {}", database.name);
    assert!(err.to_string().contains(&remedy) && !err.is_outage(), "{err}");
}

/// An index that is missing only makes `worker status` slower.
#[tokio::test]
async fn a_role_that_owns_no_table_works_with_the_tables_of_an_earlier_version() {
    let database = Database::migrated().await;
    database.run("DROP INDEX ingest.deliveries_stored_at; DELETE FROM ingest.migrations WHERE version > 1").await;
    let rights = "GRANT USAGE ON SCHEMA ingest TO ROLE;
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA ingest, public TO ROLE;
        GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO ROLE;";
    let store = database.store_of_role(rights).await;
    let report = store.migrate().await.unwrap();
    assert!(!report.changed() && report.notes()[0].contains("run `worker migrate` once as the owner"), "{report:?}");
    let batch = Batch { records: vec![record(1)], dead_letters: vec![] };
    assert_eq!(store.persist(&batch).await.unwrap().fresh.len(), 1);
    assert_eq!(database.texts("SELECT version::text FROM ingest.migrations").await, ["1"]);

    let report = database.store().migrate().await.unwrap();
    assert!(report.created().any(|object| object.contains("ingest")), "{report:?}");
    assert_eq!(
        database.text("SELECT count(*)::text FROM pg_indexes WHERE indexname = 'deliveries_stored_at'").await,
        "1"
    );
}

/// A trigger on `table` that drops every row without an error, and how to take it away.
fn dropping(table: &str) -> (String, String) {
    let name = table.replace('.', "_");
    let make = format!(
        "CREATE OR REPLACE FUNCTION drop_{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
         CREATE TRIGGER dropping BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION drop_{name}()"
    );
    (make, format!("DROP TRIGGER dropping ON {table}"))
}

#[tokio::test]
async fn rows_that_a_trigger_drops_are_an_outage_that_names_the_table() {
    let database = Database::migrated().await;
    let store = database.store();
    let batch = || Batch { records: records(0..5).records, dead_letters: vec![letter(10)] };
    for table in ["public.signals", "public.issues", "ingest.deliveries", "ingest.dead_letters"] {
        let (make, remove) = dropping(table);
        database.run(&make).await;
        let err = store.persist(&batch()).await.expect_err(table);
        let text = err.to_string();
        assert!(err.is_outage() && text.contains(table) && text.contains("returns NULL"), "{table}: {text}");
        assert_eq!(database.counts().await, [0, 0, 0, 0], "{table}");
        database.run(&remove).await;
    }
    let stored = store.persist(&batch()).await.unwrap();
    assert_eq!((stored.fresh, stored.dead.len()), (ids(0..5), 1));
    // After the ledger alone was lost, the rows that are there count, though no statement writes them.
    database.run("TRUNCATE ingest.deliveries").await;
    assert_eq!(store.persist(&batch()).await.unwrap().fresh, ids(0..5));
    // The check of the rows that are known finds them.
    let (make, _) = dropping("public.issues");
    database.run(&make).await;
    assert_eq!(store.persist(&batch()).await.unwrap().known.len(), 6);
}

#[tokio::test]
async fn a_restored_row_that_a_trigger_drops_is_named() {
    let database = Database::migrated().await;
    let store = database.store();
    store.persist(&records(0..2)).await.unwrap();
    database.run("DELETE FROM signals").await;
    let (make, remove) = dropping("public.signals");
    database.run(&make).await;
    let records = records(0..2).records;
    let all: Vec<&Record> = records.iter().collect();
    let dropped = store.restore(&all).await.unwrap();
    assert!(dropped.restored.is_empty() && dropped.refused.len() == 2, "{dropped:?}");
    assert!(dropped.refused.iter().all(|row| row.reason.contains("public.signals")), "{dropped:?}");
    database.run(&remove).await;
    assert_eq!(store.restore(&all).await.unwrap().restored, ids(0..2));
}

/// Rights that are enough for a worker.
const RIGHTS: &str = "GRANT SELECT, INSERT ON issues, signals TO ROLE; GRANT USAGE ON SCHEMA ingest TO ROLE; \
     GRANT SELECT, INSERT, UPDATE ON ingest.deliveries TO ROLE; \
     GRANT SELECT, INSERT, DELETE ON ingest.dead_letters TO ROLE; \
     GRANT USAGE ON SEQUENCE issues_number_seq TO ROLE";

#[tokio::test]
async fn row_level_security_that_hides_rows_is_named() {
    let database = Database::migrated().await;
    let store = database.store_of_role(RIGHTS).await;
    store.check().await.unwrap();
    database
        .run("ALTER TABLE issues ENABLE ROW LEVEL SECURITY; CREATE POLICY put ON issues FOR INSERT WITH CHECK (true)")
        .await;
    // A row that this role cannot see is a row that it cannot link a signal to.
    let err = store.persist(&records(0..3)).await.expect_err("no signal was written");
    assert!(err.is_outage() && err.to_string().contains("row-level security"), "{err}");
    assert_eq!(database.counts().await, [0, 0, 0, 0]);
    let err = store.check().await.expect_err("the check sees it");
    let text = err.to_string();
    assert!(text.contains("public.issues: found row-level security"), "{text}");
    assert!(text.contains(&format!("ALTER ROLE {} BYPASSRLS", database.name)), "{text}");
    // A policy that lets it do everything is no problem.
    database.run("CREATE POLICY all_rows ON issues USING (true)").await;
    let report = store.check().await.unwrap();
    assert!(report.notes().iter().any(|note| note.contains("row-level security")), "{report}");
    assert_eq!(store.persist(&records(10..12)).await.unwrap().fresh, ids(10..12));
    database.run("DROP POLICY all_rows ON issues").await;
    database.run(&format!("ALTER ROLE {} BYPASSRLS", database.name)).await;
    let store = Store::new(&database.url.replace("loop@", &format!("{}@", database.name)).parse().unwrap(), 1);
    store.check().await.unwrap();
    assert_eq!(store.persist(&records(0..3)).await.unwrap().fresh, ids(0..3));
}

#[tokio::test]
async fn a_connection_that_failed_is_not_used_again() {
    let database = Database::migrated().await;
    let store = database.store();
    store.persist(&Batch { records: records(0..2).records, dead_letters: vec![letter(5)] }).await.unwrap();
    let (known, fresh) = (records(0..2).records, records(10..12));
    let all: Vec<&Record> = known.iter().collect();
    // Each of these meets a table that is away, which is an outage.
    let away = |table: &str| format!("ALTER TABLE {table} RENAME TO away");
    let back = |table: &str| {
        let (schema, name) = table.split_once('.').unwrap();
        format!("ALTER TABLE {schema}.away RENAME TO {name}")
    };
    for what in ["retry", "discard", "look_up", "restore", "try_out", "persist"] {
        let table = match what {
            "retry" | "discard" => "ingest.dead_letters",
            "look_up" | "restore" => "ingest.deliveries",
            _ => "public.issues",
        };
        assert_eq!(store.look_up(&ids(0..1)).await.unwrap().len(), 1);
        let sound = store.connections();
        assert_eq!((sound.idle, sound.used), (1, 0), "{what}");
        database.run(&away(table)).await;
        let failed = match what {
            "retry" => store.retry("delivery-5").await.map(drop),
            "discard" => store.discard("delivery-5").await.map(drop),
            "look_up" => store.look_up(&ids(0..1)).await.map(drop),
            "restore" => store.restore(&all).await.map(drop),
            "try_out" => store.try_out(&all).await.map(drop),
            _ => store.persist(&Batch { records: fresh.records.clone(), dead_letters: vec![] }).await.map(drop),
        };
        assert!(failed.as_ref().is_err_and(|err| err.is_outage()), "{what}: {failed:?}");
        let after = store.connections();
        assert_eq!((after.idle, after.used), (0, 0), "{what}: it may lead to a server that is no primary any more");
        database.run(&back(table)).await;
    }
}

#[tokio::test]
async fn numbers_that_are_used_up_are_an_outage() {
    let database = Database::migrated().await;
    let store = database.store();
    database.run("ALTER SEQUENCE issues_number_seq MAXVALUE 3").await;
    let err = store.persist(&records(0..5)).await.expect_err("two have no number");
    assert!(err.is_outage() && err.to_string().contains("2200H"), "{err}");
    assert_eq!(database.counts().await, [0, 0, 0, 0]);
    database.run("ALTER SEQUENCE issues_number_seq MAXVALUE 2147483647").await;
    assert_eq!(store.persist(&records(0..5)).await.unwrap().fresh, ids(0..5));
    // A sequence that goes beyond what the column holds fails with the SQLSTATE of a row's fault.
    database.run("ALTER SEQUENCE issues_number_seq AS bigint; SELECT setval('issues_number_seq', 2147483647)").await;
    let err = store.persist(&records(5..7)).await.expect_err("the column holds no such number");
    assert!(err.is_outage() && err.to_string().contains("2147483647"), "{err}");
    assert_eq!(database.counts().await, [5, 5, 5, 0]);
}

#[tokio::test]
async fn a_schema_that_changed_is_no_verdict_on_a_letter_or_a_deleted_row() {
    let database = Database::migrated().await;
    let store = database.store();
    store.persist(&records(0..1)).await.unwrap();
    let mut letter = letter(5);
    letter.origin.body = Bytes::from_static(b"{}");
    store.persist(&Batch { records: vec![], dead_letters: vec![letter.clone()] }).await.unwrap();
    database.run("DELETE FROM signals").await;
    let add =
        "ALTER TABLE signals ADD COLUMN team text NOT NULL DEFAULT ''; ALTER TABLE signals ALTER team DROP DEFAULT";
    database.run(add).await;
    let named = |err: &worker::store::StoreError| err.is_outage() && err.to_string().contains("column team");
    let retried = store.retry("delivery-5").await;
    assert!(retried.as_ref().is_err_and(named), "{retried:?}");
    let record = record(0);
    let restored = store.restore(&[&record]).await;
    assert!(restored.as_ref().is_err_and(named), "{restored:?}");
    let kept = database.text("SELECT reason || ' ' || attempts FROM ingest.dead_letters").await;
    assert_eq!(kept, format!("{} 3", letter.reason), "the letter is as it was");
    database.run("ALTER TABLE signals DROP COLUMN team").await;
    assert_eq!(store.retry("delivery-5").await.unwrap(), worker::store::Retried::Stored);
    assert_eq!(store.restore(&[&record]).await.unwrap().restored, ids(0..1));
}

#[tokio::test]
async fn ten_workers_may_migrate_at_once_under_another_default_isolation() {
    let database = Database::empty().await;
    let set = "ALTER DATABASE NAME SET default_transaction_isolation = 'serializable'".replace("NAME", &database.name);
    database.run(&set).await;
    let stores: Vec<Store> = (0..10).map(|_| database.store()).collect();
    let reports = join_all(stores.iter().map(Store::migrate)).await;
    let failed: Vec<_> = reports.iter().filter_map(|report| report.as_ref().err().map(ToString::to_string)).collect();
    assert_eq!(failed, [""; 0]);
    assert_eq!(reports.iter().filter(|report| report.as_ref().is_ok_and(|it| it.changed())).count(), 1);
}

#[tokio::test]
async fn letters_that_outlived_the_ledger_are_kept() {
    let database = Database::migrated().await;
    let store = database.store();
    let mut batch = Batch { records: records(0..2).records, dead_letters: vec![letter(5)] };
    batch.records[1].payload = "not json".into();
    store.persist(&batch).await.unwrap();
    let before = database.texts("SELECT to_jsonb(l)::text FROM ingest.dead_letters l ORDER BY delivery_id").await;
    database.run("TRUNCATE ingest.deliveries").await;
    let stored = store.persist(&batch).await.unwrap();
    assert_eq!((stored.fresh, stored.dead.len()), (ids(0..1), 2));
    assert_eq!(
        database.texts("SELECT to_jsonb(l)::text FROM ingest.dead_letters l ORDER BY delivery_id").await,
        before
    );
    assert_eq!(database.counts().await, [1, 1, 3, 2]);
}

#[tokio::test]
async fn a_dry_run_of_a_role_without_temporary_tables_names_the_grant() {
    let database = Database::migrated().await;
    database.run(&format!("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC", database.name)).await;
    let store = database.store_of_role(RIGHTS).await;
    let record = record(0);
    let err = store.try_out(&[&record]).await.expect_err("it may make no temporary table");
    let grant = format!("GRANT TEMPORARY ON DATABASE {} TO {}", database.name, database.name);
    assert!(!err.is_outage() && err.to_string().contains(&grant), "{err}");
    database.run(&grant).await;
    assert_eq!(store.try_out(&[&record]).await.unwrap(), worker::store::Tried::default());
}
