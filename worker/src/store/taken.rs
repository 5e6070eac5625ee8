//! Rows that an INSERT did not write, though it reported no error.
//!
//! A trigger may return NULL, a rule may do something else, row-level security may hide what the next statement reads. So
//! the number of rows that PostgreSQL reports is compared with what was sent. Rows that are in the table all the same
//! count: they were there before, or a trigger put them into a partition.

use tokio_postgres::types::Type;

use super::{Class, Outage, Statement, StoreError, Tx};

/// A table and its key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    name: &'static str,
    /// Counts the rows with the keys `$1`.
    there: &'static str,
}

pub(crate) const ISSUES: Target =
    Target { name: "public.issues", there: "SELECT count(*) FROM public.issues WHERE id = ANY ($1)" };
pub(crate) const SIGNALS: Target =
    Target { name: "public.signals", there: "SELECT count(*) FROM public.signals WHERE id = ANY ($1)" };
pub(crate) const DELIVERIES: Target =
    Target { name: "ingest.deliveries", there: "SELECT count(*) FROM ingest.deliveries WHERE delivery_id = ANY ($1)" };
pub(crate) const DEAD_LETTERS: Target = Target {
    name: "ingest.dead_letters",
    there: "SELECT count(*) FROM ingest.dead_letters WHERE delivery_id = ANY ($1)",
};

impl Target {
    /// Fails unless each of `keys`, which are distinct, has its row. `written`: rows that the INSERT reports.
    pub(crate) async fn has_taken(self, tx: &Tx, written: u64, keys: &[&str]) -> Result<(), StoreError> {
        let sent = keys.len() as u64;
        if written == sent {
            return Ok(());
        }
        let counted = Statement::new(self.there, &[Type::TEXT_ARRAY]).query(tx, &[&keys]).await?;
        let there: i64 = counted[0].get(0);
        if there.unsigned_abs() == sent {
            return Ok(());
        }
        let reason = format!(
            "{} has {there} of {sent} rows after an INSERT without an error: a trigger that returns NULL, a rule or row-level \
             security keeps the others out; look at the triggers, rules and policies of this table",
            self.name
        );
        Err(StoreError::Outage(Outage::of_row(Class::Schema, reason, Outage::NO_SQLSTATE)))
    }
}
