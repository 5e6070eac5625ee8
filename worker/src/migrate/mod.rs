//! The tables: made where they are missing, checked where they are there, never altered where they are Loop's.
//!
//! Loop's own tables (`public.issues`, `public.signals`, their enum types) belong to Loop's migrations; this door only
//! makes them where no Loop has been, and then a Loop that comes later must bring its own into an empty database
//! first. The schema `ingest` is ours, and has versions.
//!
//! All of it is one transaction under one advisory lock: ten workers may start at once, and a run that fails has
//! changed nothing.

mod check;
mod tables;

use std::fmt;

use crate::store::{Class, Failure, Outage, Store, StoreError, Tx, within};

pub use check::Problem;

/// The advisory lock that whoever migrates holds: a number nobody else would take (the bytes of "loopsent").
const LOCK: i64 = 0x6c6f_6f70_7365_6e74;

/// Waiting for somebody who holds the lock ends with an error and not with `statement_timeout`, which a person may
/// have set for the role and which would name the wrong thing. A worker that hangs gives its locks up.
const SETTINGS: &str = "\
    SET LOCAL search_path = pg_catalog, pg_temp;
    SET LOCAL statement_timeout = 0;
    SET LOCAL idle_in_transaction_session_timeout = '30s';
    SET LOCAL lock_timeout = '30s'";

/// For a look that changes nothing.
const READ_ONLY: &str = "\
    SET TRANSACTION READ ONLY;
    SET LOCAL search_path = pg_catalog, pg_temp;
    SET LOCAL statement_timeout = 0;
    SET LOCAL lock_timeout = '30s'";

/// A rehearsal is not worth waiting for, nor being waited for.
const REHEARSAL: &str = "\
    SET LOCAL search_path = pg_catalog, pg_temp;
    SET LOCAL statement_timeout = '5s';
    SET LOCAL idle_in_transaction_session_timeout = '5s';
    SET LOCAL lock_timeout = '2s'";

/// What was found and what was done, one line an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    lines: Vec<(String, &'static str)>,
    notes: Vec<String>,
}

impl Report {
    fn line(&mut self, object: impl Into<String>, state: &'static str) {
        self.lines.push((object.into(), state));
    }

    /// What was created.
    pub fn created(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().filter(|(_, state)| *state == CREATED).map(|(object, _)| object.as_str())
    }

    /// Whether anything was created.
    pub fn changed(&self) -> bool {
        self.lines.iter().any(|(_, state)| *state == CREATED)
    }

    /// What does no harm and should still be known.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (object, state) in &self.lines {
            writeln!(f, "{object}: {state}")?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

const CREATED: &str = "created";
const THERE: &str = "there already, left alone";
const FITS: &str = "fits";

/// Why the database is not ready for this program. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MigrateError {
    /// PostgreSQL could not do it now.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Tables are there and do not fit.
    #[error("the database does not fit this program:{}", list(.0))]
    DoesNotFit(Vec<Problem>),
    /// The role lacks the right to create.
    #[error(
        "{object} is missing and the role {role} may not create it in the database {database}: run `worker migrate` \
         once as the owner of the database, or {remedy}"
    )]
    MayNotCreate {
        /// What is to be created.
        object: &'static str,
        /// Who tried.
        role: String,
        /// Where.
        database: String,
        /// What the owner can do instead.
        remedy: String,
    },
}

impl MigrateError {
    /// Whether trying again later can help without a person doing anything.
    pub fn is_outage(&self) -> bool {
        match self {
            MigrateError::Store(err) => err.is_outage(),
            MigrateError::DoesNotFit(_) | MigrateError::MayNotCreate { .. } => false,
        }
    }
}

impl Failure for MigrateError {
    fn is_outage(&self) -> bool {
        MigrateError::is_outage(self)
    }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n- {problem}")).collect()
}

/// Creates what is missing, then checks everything. Safe to run at any time and by many at once; where nothing is
/// missing it needs no right to create.
///
/// # Errors
/// [`MigrateError`]; nothing was changed then.
pub async fn migrate(store: &Store) -> Result<Report, MigrateError> {
    store.transact(SETTINGS, |tx| async move { create_and_check(&tx).await }).await
}

/// Does what [`migrate`] would do, and takes it all back: what a migration would create, or why it would fail. To
/// everybody else nothing has happened.
///
/// # Errors
/// As [`migrate`].
pub async fn rehearse(store: &Store) -> Result<Report, MigrateError> {
    store.rehearse(REHEARSAL, |tx| async move { create_and_check(&tx).await }).await
}

async fn create_and_check(tx: &Tx) -> Result<Report, MigrateError> {
    within(tx.execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK])).await?;
    let mut report = Report::default();
    create_loops_tables(tx, &mut report).await?;
    create_ours(tx, &mut report).await?;
    fail_if_any(check::problems(tx, &mut report.notes).await?)?;
    Ok(report)
}

/// Checks everything and changes nothing: what `WORKER_MIGRATE=off` does at start.
///
/// # Errors
/// [`MigrateError`] with every missing object and every column that does not fit.
pub async fn check(store: &Store) -> Result<Report, MigrateError> {
    let notes = store.transact(READ_ONLY, |tx| async move { fits(&tx).await }).await?;
    let mut report = Report { notes, ..Report::default() };
    check::TABLES.iter().for_each(|table| report.line(table.name, FITS));
    Ok(report)
}

/// The same within a transaction. Gives the notes.
///
/// # Errors
/// As [`check()`].
pub(crate) async fn fits(tx: &Tx) -> Result<Vec<String>, MigrateError> {
    let mut notes = Vec::new();
    fail_if_any(check::problems(tx, &mut notes).await?)?;
    Ok(notes)
}

fn fail_if_any(problems: Vec<Problem>) -> Result<(), MigrateError> {
    if problems.is_empty() { Ok(()) } else { Err(MigrateError::DoesNotFit(problems)) }
}

/// Loop's types and tables, each where it is missing.
async fn create_loops_tables(tx: &Tx, report: &mut Report) -> Result<(), MigrateError> {
    let compression = if has_lz4(tx).await? { "COMPRESSION lz4" } else { "" };
    for object in tables::LOOPS {
        if check::exists(tx, object.name).await? {
            report.line(object.name, THERE);
            continue;
        }
        create(tx, object.name, &object.sql.replace("{compression}", compression)).await?;
        report.line(object.name, CREATED);
    }
    if report.changed() {
        report.notes.push(
            "Loop's tables were created here as Loop makes them; to run Loop on this database as well, let Loop's own \
             migrations make them first, in an empty database, and migrate then"
                .into(),
        );
    }
    Ok(())
}

/// The schema `ingest`, version by version.
async fn create_ours(tx: &Tx, report: &mut Report) -> Result<(), MigrateError> {
    if !check::schema_exists(tx, "ingest").await? {
        create(tx, "the schema ingest", "CREATE SCHEMA ingest").await?;
    }
    if !check::exists(tx, "ingest.migrations").await? {
        create(tx, "ingest.migrations", tables::MIGRATIONS).await?;
    }
    if !check::may_read(tx, "ingest.migrations").await? {
        // Somebody else migrates here, and the check says whether what they made is enough.
        report.line("schema ingest", THERE);
        return Ok(());
    }
    let row = within(tx.query_one("SELECT coalesce(max(version), 0) FROM ingest.migrations", &[])).await?;
    let at: i32 = row.get(0);
    for (version, sql) in (1..).zip(tables::VERSIONS) {
        if version > at {
            match create(tx, "the schema ingest", sql).await {
                Err(MigrateError::MayNotCreate { role, .. }) if at > 0 => {
                    // The check says whether what is there is enough.
                    report.notes.push(format!(
                        "the schema ingest is at version {at}, and the role {role} may not bring it to version {version}: \
                         run `worker migrate` once as the owner of its tables"
                    ));
                    report.line("schema ingest", THERE);
                    return Ok(());
                }
                created => created?,
            }
            within(tx.execute("INSERT INTO ingest.migrations (version) VALUES ($1)", &[&version])).await?;
        }
    }
    let newest = i32::try_from(tables::VERSIONS.len()).expect("a handful of versions");
    if at > newest {
        report.notes.push(format!(
            "the schema ingest is at version {at}, which a newer worker made; this one knows version {newest} and uses \
             what it knows"
        ));
    }
    report.line("schema ingest", if at < newest { CREATED } else { THERE });
    Ok(())
}

/// Runs `sql`, which makes `object`.
async fn create(tx: &Tx, object: &'static str, sql: &str) -> Result<(), MigrateError> {
    // The savepoint keeps the transaction alive, so that it can still say who may not create where.
    within(tx.batch_execute("SAVEPOINT create_object")).await?;
    let Err(err) = tokio::time::timeout(crate::store::ANSWER_WITHIN, tx.batch_execute(sql))
        .await
        .map_err(|_| StoreError::Outage(Outage::new(Class::NoAnswer, format!("creating {object} took too long"))))?
    else {
        return Ok(());
    };
    if err.code() != Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE) {
        return Err(StoreError::from_sql(&err).into());
    }
    within(tx.batch_execute("ROLLBACK TO SAVEPOINT create_object")).await?;
    let row =
        within(tx.query_one("SELECT quote_ident(current_user::text), quote_ident(current_database()::text)", &[]))
            .await?;
    let (role, database): (String, String) = (row.get(0), row.get(1));
    let remedy = if object.contains("schema") {
        format!("GRANT CREATE ON DATABASE {database} TO {role}")
    } else {
        let schema = object.split('.').next().unwrap_or(object);
        format!("GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}")
    };
    Err(MigrateError::MayNotCreate { object, role, database, remedy })
}

/// Whether this server was built with lz4: PostgreSQL 14 and later can say so, and not every build has it.
async fn has_lz4(tx: &Tx) -> Result<bool, StoreError> {
    let asks = "SELECT coalesce((SELECT 'lz4' = ANY (enumvals) FROM pg_settings \
                                 WHERE name = 'default_toast_compression'), false)";
    Ok(within(tx.query_one(asks, &[])).await?.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_as_lines() {
        let mut report = Report::default();
        report.line("public.issues", THERE);
        assert!(!report.changed());
        report.line("public.signals", CREATED);
        assert!(report.changed());
        report.notes.push("mind this".into());
        let text = "public.issues: there already, left alone\npublic.signals: created\nnote: mind this\n";
        assert_eq!(report.to_string(), text);
    }
}
