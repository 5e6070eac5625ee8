//! The waits of statements that take long, as PostgreSQL tells them.

use std::fmt;

use shared::text::printable;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::transact::{End, transact};
use super::{SEARCH_PATH, Statement, Store, StoreError};

/// `$1`: process ids of sessions. A row for each of them that exists and for each session that it waits for. Another
/// role's state and times are NULL without `pg_read_all_stats`; its name and its application are not.
/// (<https://www.postgresql.org/docs/current/monitoring-stats.html>)
const DELAYS: Statement = Statement::new(
    "\
    SELECT mine.pid, mine.wait_event_type || ':' || mine.wait_event, holder.pid, other.application_name,
           other.usename::text, other.state,
           extract(epoch FROM clock_timestamp() - CASE WHEN other.state = 'active' THEN other.query_start
                                                       ELSE other.xact_start END)::bigint,
           quote_ident(current_user::text)
    FROM pg_stat_activity AS mine
    LEFT JOIN LATERAL unnest(pg_blocking_pids(mine.pid)) AS holder (pid) ON true
    LEFT JOIN pg_stat_activity AS other ON other.pid = holder.pid
    WHERE mine.pid = ANY ($1)
    ORDER BY holder.pid",
    &[Type::INT4_ARRAY],
);

/// A session that is busy with a statement of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Delay {
    pub(crate) pid: i32,
    /// PostgreSQL's name of what it waits for, such as `Timeout:PgSleep`. None while it computes.
    event: Option<String>,
    /// The first of the sessions that hold the lock it waits for.
    pub(crate) holder: Option<Holder>,
}

/// A session that holds a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// 0 is a prepared transaction.
    pub(crate) pid: i32,
    application: String,
    role: String,
    /// None where our role may not see it.
    state: Option<String>,
    seconds: Option<i64>,
    our_role: String,
}

impl Store {
    /// Asks what the sessions `pids` wait for, on the connection of [`Store::ping`], so that no batch is in its way.
    ///
    /// # Errors
    /// [`StoreError::Outage`]
    pub(crate) async fn delays(&self, pids: &[i32]) -> Result<Vec<Delay>, StoreError> {
        let rows =
            transact(&self.probe, SEARCH_PATH, End::Commit, |tx| async move { DELAYS.query(&tx, &[&pids]).await });
        rows.await?.iter().map(|row| Delay::of(row).map_err(|err| StoreError::from_sql(&err))).collect()
    }
}

impl Delay {
    fn of(row: &Row) -> Result<Delay, tokio_postgres::Error> {
        let holder = match row.try_get::<_, Option<i32>>(2)? {
            None => None,
            Some(pid) => Some(Holder {
                pid,
                application: row.try_get::<_, Option<String>>(3)?.unwrap_or_default(),
                role: row.try_get::<_, Option<String>>(4)?.unwrap_or_default(),
                state: row.try_get(5)?,
                seconds: row.try_get(6)?,
                our_role: row.try_get(7)?,
            }),
        };
        Ok(Delay { pid: row.try_get(0)?, event: row.try_get(1)?, holder })
    }
}

impl fmt::Display for Delay {
    /// Completes "a batch".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.holder, &self.event) {
            (Some(holder), _) => write!(f, "waits for a lock held by {holder}"),
            (None, Some(event)) => {
                write!(f, "is at a slow statement of pid {} (wait event {})", self.pid, printable(event))
            }
            (None, None) => write!(f, "is at a slow statement of pid {}", self.pid),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Holder { pid, application, role, state, seconds, our_role } = self;
        if *pid == 0 {
            return f.write_str("a prepared transaction (see pg_prepared_xacts)");
        }
        let application = if application.is_empty() { "without a name" } else { application };
        write!(f, "pid {pid} (application {}, ", printable(application))?;
        match (state.as_deref(), seconds) {
            (Some("active"), Some(seconds)) => write!(f, "its statement began {seconds} s ago)"),
            (Some(state), Some(seconds)) => write!(f, "{}, its transaction began {seconds} s ago)", printable(state)),
            (_, None) | (None, _) => {
                write!(f, "role {}; GRANT pg_read_all_stats TO {our_role} to see what it does)", printable(role))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_told_as_far_as_our_role_may_see() {
        let holder = |state: Option<&str>, seconds| Holder {
            pid: 123,
            application: "psql\u{1b}[2J".into(),
            role: "admin".into(),
            state: state.map(Into::into),
            seconds,
            our_role: "door".into(),
        };
        let delay = |holder| Delay { pid: 7, event: Some("Lock:relation".into()), holder }.to_string();
        let text = delay(Some(holder(Some("active"), Some(40))));
        assert!(text.starts_with("waits for a lock held by pid 123 (application psql"), "{text}");
        assert!(text.ends_with("its statement began 40 s ago)") && !text.contains('\u{1b}'), "{text}");
        let text = delay(Some(holder(Some("idle in transaction"), Some(9))));
        assert!(text.ends_with("idle in transaction, its transaction began 9 s ago)"), "{text}");
        let text = delay(Some(holder(None, None)));
        assert!(text.ends_with("role admin; GRANT pg_read_all_stats TO door to see what it does)"), "{text}");
        assert!(delay(Some(Holder { pid: 0, ..holder(None, None) })).ends_with("(see pg_prepared_xacts)"));
        assert_eq!(delay(None), "is at a slow statement of pid 7 (wait event Lock:relation)");
    }
}
