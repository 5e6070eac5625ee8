//! Why something could not be stored.

use std::fmt;

use super::{Class, sqlstate};
use crate::migrate::MigrateError;

/// PostgreSQL is in trouble of that class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outage {
    class: Class,
    pub(super) reason: String,
    /// The code, where the cause may lie in one row alone.
    pub(super) of_row: Option<String>,
}

impl Outage {
    /// Stands for the code where an INSERT wrote nothing and reported no error.
    pub const NO_SQLSTATE: &str = "none";

    /// For that reason, in words for a person.
    pub(crate) fn new(class: Class, reason: String) -> Self {
        Outage { class, reason, of_row: None }
    }

    /// One whose cause may lie in one row alone.
    pub(crate) fn of_row(class: Class, reason: String, sqlstate: &str) -> Self {
        Outage { class, reason, of_row: Some(sqlstate.to_owned()) }
    }

    /// Returns `true` where the cause may lie in one row alone.
    pub(crate) fn is_unclear(&self) -> bool {
        self.of_row.is_some()
    }

    /// The same with more words.
    pub(crate) fn with(self, more: &str) -> Self {
        Outage { reason: self.reason + more, ..self }
    }

    /// The kind of trouble.
    pub fn class(&self) -> Class {
        self.class
    }
}

impl fmt::Display for Outage {
    /// The reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// Why a batch was not stored. Nothing of it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// PostgreSQL is away, full, read-only, out of step with this program. Try again later, with the same batch.
    #[error("PostgreSQL cannot store this now: {0}")]
    Outage(Outage),
    /// PostgreSQL refused a row for what is in it. [`super::Store::persist`] deals with this itself; it only comes out when
    /// even the dead letter is refused.
    #[error("PostgreSQL refused a row: {0}")]
    Refused(String),
    /// The role lacks a right that this takes; only a GRANT helps.
    #[error("{0}")]
    Denied(String),
}

impl StoreError {
    /// The meaning of an error of one statement.
    pub(crate) fn from_sql(err: &tokio_postgres::Error) -> StoreError {
        sqlstate::judge(err)
    }

    /// Returns `true` when trying again later can help.
    pub fn is_outage(&self) -> bool {
        match self {
            StoreError::Outage(_) => true,
            StoreError::Refused(_) | StoreError::Denied(_) => false,
        }
    }

    /// Returns `true` where the cause may lie in one row alone, so that the others can be stored without it.
    pub(crate) fn may_be_of_one_row(&self) -> bool {
        self.is_unclear() || matches!(self, StoreError::Refused(_))
    }

    /// Returns `true` for an outage whose cause may lie in one row alone.
    pub(crate) fn is_unclear(&self) -> bool {
        matches!(self, StoreError::Outage(outage) if outage.is_unclear())
    }

    /// Why the tables could not be checked, or why they do not fit.
    pub(super) fn from_check(err: MigrateError) -> StoreError {
        match err {
            MigrateError::Store(err) => err,
            err @ (MigrateError::DoesNotFit(_) | MigrateError::MayNotCreate { .. }) => {
                StoreError::Outage(Outage::new(Class::Schema, err.to_string()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_could_not_be_made_is_no_verdict_on_the_tables() {
        let class = |err| match StoreError::from_check(err) {
            StoreError::Outage(outage) => outage.class(),
            refused @ (StoreError::Refused(_) | StoreError::Denied(_)) => panic!("{refused:?}"),
        };
        let lost = StoreError::Outage(Outage::new(Class::Connection, "the connection failed".into()));
        assert_eq!(class(MigrateError::Store(lost)), Class::Connection);
        assert_eq!(class(MigrateError::DoesNotFit(Vec::new())), Class::Schema);
    }
}
