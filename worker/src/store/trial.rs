//! `worker replay --dry-run`: would PostgreSQL take these rows?
//!
//! They are written to temporary tables of this session, by the statements that would write them to Loop's, in a
//! transaction that is rolled back. Types, enum labels, NOT NULL, CHECK constraints and generated columns are those of
//! Loop's tables. No default is evaluated, so no number is drawn. Workers never wait for it: it holds nothing of
//! Loop's tables but ACCESS SHARE, which a SELECT takes as well, and that no longer than one batch.
//!
//! Not tried, because only the real tables could tell: triggers, foreign keys and unique indexes that somebody added.

use super::rows::Statements;
use super::{
    Dead, ISSUES, LEDGER, Outage, Record, SETTINGS, SIGNALS, SetBack, Store, StoreError, Tx, savepoint, within,
};

/// The right to make temporary tables, and the names of role and database, for the GRANT.
const MAY: &str = "\
    SELECT has_database_privilege(current_database(), 'TEMPORARY'), quote_ident(current_user::text),
           quote_ident(current_database()::text)";

/// Columns that these statements do not write get NULL here, whatever their default would be.
const TABLES: &str = "\
    CREATE TEMPORARY TABLE issues (LIKE public.issues INCLUDING CONSTRAINTS INCLUDING GENERATED) ON COMMIT DROP;
    CREATE TEMPORARY TABLE signals (LIKE public.signals INCLUDING CONSTRAINTS INCLUDING GENERATED) ON COMMIT DROP;
    CREATE INDEX ON pg_temp.issues (id);
    DO $$
    DECLARE
        unwritten record;
    BEGIN
        FOR unwritten IN
            SELECT attrelid::regclass AS its_table, attname FROM pg_catalog.pg_attribute
            WHERE attrelid IN ('pg_temp.issues'::regclass, 'pg_temp.signals'::regclass)
              AND attnum > 0 AND attnotnull AND NOT attisdropped AND attgenerated = ''
              AND attname NOT IN ('id', 'title', 'type', 'status', 'priority', 'created_at', 'updated_at',
                                  'source', 'severity', 'payload', 'issue_id')
        LOOP
            EXECUTE format('ALTER TABLE %s ALTER COLUMN %I DROP NOT NULL', unwritten.its_table, unwritten.attname);
        END LOOP;
    END $$";

/// The rows that PostgreSQL would not take.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tried {
    /// For what they say.
    pub refused: Vec<Dead>,
    /// For an unclear reason.
    pub set_back: Vec<SetBack>,
}

impl Store {
    /// Tries these rows. Changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Outage`]; [`StoreError::Denied`] where the role may make no temporary tables.
    pub async fn try_out(&self, records: &[&Record]) -> Result<Tried, StoreError> {
        if records.is_empty() {
            return Ok(Tried::default());
        }
        self.rehearse(SETTINGS, |tx| async move { try_out(&tx, records).await }).await
    }
}

async fn try_out(tx: &Tx, records: &[&Record]) -> Result<Tried, StoreError> {
    let row = within(tx.query_one(MAY, &[])).await?;
    if !row.get::<_, bool>(0) {
        let (role, database): (String, String) = (row.get(1), row.get(2));
        return Err(StoreError::Denied(format!(
            "a dry run writes to temporary tables, and the role {role} may make none in the database {database}: as its \
             owner, GRANT TEMPORARY ON DATABASE {database} TO {role}"
        )));
    }
    within(tx.batch_execute(TABLES)).await?;
    let statements = Statements {
        ledger: LEDGER.map(str::to_owned),
        issues: ISSUES.map(|sql| sql.replace("public.issues", "pg_temp.issues")),
        signals: SIGNALS
            .map(|sql| sql.replace("public.signals", "pg_temp.signals").replace("public.issues", "pg_temp.issues")),
    };
    let mut tried = Tried::default();
    match savepoint(tx, statements.insert(tx, records)).await {
        Ok(()) => return Ok(tried),
        Err(error) if error.may_be_of_one_row() => {}
        Err(error) => return Err(error),
    }
    for record in records {
        let delivery_id = record.delivery_id.clone();
        match savepoint(tx, statements.insert(tx, &[record])).await {
            Ok(()) => {}
            Err(StoreError::Refused(reason)) => tried.refused.push(Dead { delivery_id, reason }),
            Err(StoreError::Outage(Outage { reason, of_row: Some(sqlstate), .. })) => {
                tried.set_back.push(SetBack { delivery_id, sqlstate, reason });
            }
            Err(error @ (StoreError::Outage(_) | StoreError::Denied(_))) => return Err(error),
        }
    }
    Ok(tried)
}
