//! What the database is made of, in SQL.

/// An object of Loop's, made where it is missing.
pub(super) struct Object {
    pub(super) name: &'static str,
    /// `{compression}` stands where a column's compression may be named.
    pub(super) sql: &'static str,
}

/// As Loop's own migrations make them, but for two things that Loop never notices: payloads are compressed with lz4
/// where the server has it (half the time of pglz), and there is no GIN index on `signals.payload` (no query of Loop's
/// uses it, and it costs 3.6 times the time of an insert).
pub(super) const LOOPS: &[Object] = &[
    Object {
        name: "public.issue_type",
        sql: "CREATE TYPE public.issue_type AS ENUM ('signal', 'hypothesis', 'plan', 'task', 'monitor')",
    },
    Object {
        name: "public.issue_status",
        sql: "CREATE TYPE public.issue_status AS ENUM
                  ('triage', 'backlog', 'todo', 'in_progress', 'done', 'canceled')",
    },
    Object {
        name: "public.signal_severity",
        sql: "CREATE TYPE public.signal_severity AS ENUM ('low', 'medium', 'high', 'critical')",
    },
    Object {
        name: "public.issues",
        sql: "
            CREATE TABLE public.issues (
                id               text PRIMARY KEY,
                number           serial NOT NULL UNIQUE, -- its sequence is issues_number_seq
                title            text NOT NULL,
                description      text,
                type             public.issue_type NOT NULL,
                status           public.issue_status NOT NULL DEFAULT 'triage',
                priority         integer NOT NULL DEFAULT 0,
                parent_id        text,
                project_id       text,
                signal_source    text,
                signal_payload   jsonb {compression},
                hypothesis       jsonb,
                commits          jsonb,
                pull_requests    jsonb,
                agent_session_id text,
                agent_summary    text,
                completed_at     timestamptz,
                deleted_at       timestamptz,
                created_at       timestamptz NOT NULL DEFAULT now(),
                updated_at       timestamptz NOT NULL DEFAULT now()
            );
            CREATE INDEX ON public.issues (parent_id);
            CREATE INDEX ON public.issues (project_id, status);
            CREATE INDEX ON public.issues (status);
            CREATE INDEX ON public.issues (type)",
    },
    Object {
        name: "public.signals",
        sql: "
            CREATE TABLE public.signals (
                id         text PRIMARY KEY,
                source     text NOT NULL,
                source_id  text,
                type       text NOT NULL,
                severity   public.signal_severity NOT NULL,
                payload    jsonb {compression} NOT NULL,
                issue_id   text NOT NULL,
                created_at timestamptz NOT NULL DEFAULT now()
            );
            CREATE INDEX ON public.signals (issue_id);
            CREATE INDEX ON public.signals (source)",
    },
];

/// Which of [`VERSIONS`] a database has.
pub(super) const MIGRATIONS: &str = "
    CREATE TABLE ingest.migrations (
        version    integer PRIMARY KEY,
        applied_at timestamptz NOT NULL DEFAULT now()
    )";

/// The schema `ingest`: the first line brings a database from version 0 to 1, and so on. A line that was released is
/// never edited; a change is a new line, and one that an older worker can live with while both run.
pub(super) const VERSIONS: &[&str] = &[
    "
    -- The ledger. A delivery is stored if and only if its row is here. Every insert pays for every index, and the
    -- primary key is all that the way of a delivery needs.
    CREATE TABLE ingest.deliveries (
        delivery_id     text PRIMARY KEY,
        state           text NOT NULL CHECK (state IN ('stored', 'dead', 'discarded')),
        signal_id       text,
        issue_id        text,
        stream_sequence bigint NOT NULL,
        resource        text,
        severity        text,
        type            text,
        source_id       text,
        received_at     timestamptz,
        stored_at       timestamptz NOT NULL DEFAULT now()
    );
    COMMENT ON TABLE ingest.deliveries IS
        'One row for each delivery taken from the stream: what makes a repeat harmless';

    -- What could not become a row, with the bytes as they came. Ordinarily empty.
    CREATE TABLE ingest.dead_letters (
        delivery_id     text PRIMARY KEY,
        stream_sequence bigint NOT NULL,
        subject         text NOT NULL,
        headers         jsonb NOT NULL,
        body            bytea NOT NULL,
        reason          text NOT NULL,
        attempts        integer NOT NULL,
        failed_at       timestamptz NOT NULL
    );
    COMMENT ON TABLE ingest.dead_letters IS 'Deliveries that cannot become a signal: see `worker dead-letters`'",
    // `worker status` counts the last hour. Rows come in the order of this time, so a BRIN index finds them, is a few pages
    // long, and costs an insert next to nothing.
    "
    CREATE INDEX IF NOT EXISTS deliveries_stored_at ON ingest.deliveries USING brin (stored_at) WITH (autosummarize = on)",
];
