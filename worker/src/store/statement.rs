//! Statements that leave nothing behind in the server's session.

use std::borrow::Cow;

use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::{StoreError, Tx, within};

/// SQL and the types of its parameters.
///
/// PostgreSQL parses and plans it at each use, in the same exchange that runs it. A prepared statement would stay in the
/// session. Behind a connection pooler in transaction mode, the next transaction finds another session, without the
/// statement or with another worker's of the same name (<https://www.pgbouncer.org/features.html>).
pub(crate) struct Statement {
    sql: Cow<'static, str>,
    types: &'static [Type],
}

impl Statement {
    pub(crate) const fn new(sql: &'static str, types: &'static [Type]) -> Statement {
        Statement { sql: Cow::Borrowed(sql), types }
    }

    /// The statement with its SQL changed.
    pub(crate) fn map(&self, change: impl FnOnce(&str) -> String) -> Statement {
        Statement { sql: Cow::Owned(change(&self.sql)), types: self.types }
    }

    /// Runs it. Returns its rows.
    pub(crate) async fn query(&self, tx: &Tx, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        within(tx.query_typed(&self.sql, &self.typed(values))).await
    }

    /// Runs it. Returns the number of rows that it wrote.
    pub(crate) async fn execute(&self, tx: &Tx, values: &[&(dyn ToSql + Sync)]) -> Result<u64, StoreError> {
        within(tx.execute_typed(&self.sql, &self.typed(values))).await
    }

    fn typed<'a>(&self, values: &[&'a (dyn ToSql + Sync)]) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
        debug_assert_eq!(values.len(), self.types.len());
        values.iter().copied().zip(self.types.iter().cloned()).collect()
    }
}
