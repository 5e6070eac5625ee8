//! Whose fault a failure is, by its SQLSTATE
//! (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).
//!
//! "Ours" is the safe side: the batch waits and is tried again, and nothing is lost. Only what PostgreSQL says about
//! the data itself is the row's, because those bytes cannot change. A code that is not in this table is unclear: a trigger
//! may raise any code for one row alone. The batch waits as well, and may be run without that row.

use std::error::Error;

use tokio_postgres::error::DbError;

use super::{Outage, StoreError};

/// Whose fault it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Time, or a person, can mend it.
    Ours(Class),
    /// The same, and it may concern one row alone.
    Unclear(Class),
    /// This row can never be stored.
    Row,
}

/// What kind of trouble an outage is: the closed set that metrics have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The connection failed.
    Connection,
    /// The login was refused, or the database does not exist.
    Login,
    /// The server is read-only.
    ReadOnly,
    /// The transaction was rolled back in favour of another.
    Conflict,
    /// The role lacks a privilege, or the tables do not fit.
    Schema,
    /// The server's disk is full.
    DiskFull,
    /// The server is short of memory, connections or something else.
    Resources,
    /// A lock could not be had.
    Lock,
    /// The statement took too long, or was canceled.
    Canceled,
    /// The server is shutting down, starting up or recovering.
    Shutdown,
    /// The server, or the system that it runs on, failed.
    Server,
    /// No answer in time.
    NoAnswer,
    /// No connection in time, or all are in use.
    Pool,
    /// What this program does not know.
    Unknown,
}

impl Class {
    /// Every class.
    pub const ALL: [Class; 14] = [
        Class::Connection,
        Class::Login,
        Class::ReadOnly,
        Class::Conflict,
        Class::Schema,
        Class::DiskFull,
        Class::Resources,
        Class::Lock,
        Class::Canceled,
        Class::Shutdown,
        Class::Server,
        Class::NoAnswer,
        Class::Pool,
        Class::Unknown,
    ];

    /// Its name as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::Connection => "connection",
            Class::Login => "login",
            Class::ReadOnly => "read_only",
            Class::Conflict => "conflict",
            Class::Schema => "schema",
            Class::DiskFull => "disk_full",
            Class::Resources => "resources",
            Class::Lock => "lock",
            Class::Canceled => "canceled",
            Class::Shutdown => "shutdown",
            Class::Server => "server",
            Class::NoAnswer => "no_answer",
            Class::Pool => "pool",
            Class::Unknown => "unknown",
        }
    }
}

/// Codes and classes (their first two characters), the more special before the more general; and what to say. A row's
/// reason is made of these words alone, never of PostgreSQL's own, which quote the data.
const TABLE: &[(&str, Fault, &str)] = &[
    ("08", Fault::Ours(Class::Connection), "the connection failed"),
    ("22001", Fault::Row, "a text is longer than its column takes"),
    ("22003", Fault::Row, "a number is out of range"),
    ("22021", Fault::Row, "a text holds a character that the database's encoding cannot store"),
    ("22P02", Fault::Row, "the payload is not JSON"),
    ("2200H", Fault::Ours(Class::Schema), "a sequence has no number left"),
    ("22P05", Fault::Row, "the payload holds a character that jsonb cannot store"),
    ("22", Fault::Row, "a value is not one that its column can hold"),
    ("23502", Fault::Row, "a column that must have a value got none"),
    ("23503", Fault::Row, "a foreign key points to nothing"),
    ("23505", Fault::Row, "a unique index has this value already"),
    ("23514", Fault::Row, "a CHECK constraint does not hold"),
    ("23", Fault::Row, "an integrity constraint does not hold"),
    ("25006", Fault::Ours(Class::ReadOnly), "the server is read-only (a standby, or a primary that has become one)"),
    ("25", Fault::Ours(Class::Conflict), "the transaction could not go on"),
    ("26", Fault::Ours(Class::Connection), "the session has lost a statement (a pooler, perhaps)"),
    ("28", Fault::Ours(Class::Login), "the login was refused"),
    ("3D000", Fault::Ours(Class::Login), "the database does not exist"),
    ("40", Fault::Ours(Class::Conflict), "the transaction was rolled back in favour of another"),
    ("42501", Fault::Unclear(Class::Schema), "the role lacks a privilege"),
    ("42", Fault::Unclear(Class::Schema), "the tables do not fit this program (see `worker migrate`)"),
    ("53100", Fault::Ours(Class::DiskFull), "the server's disk is full"),
    ("53200", Fault::Ours(Class::Resources), "the server is out of memory"),
    ("53300", Fault::Ours(Class::Resources), "the server has no connection left"),
    ("53", Fault::Ours(Class::Resources), "the server is short of a resource"),
    ("54001", Fault::Row, "the payload is nested deeper than PostgreSQL's stack allows (max_stack_depth)"),
    ("54", Fault::Row, "a value is larger than PostgreSQL can hold"),
    ("55P03", Fault::Ours(Class::Lock), "a lock could not be had"),
    ("57014", Fault::Unclear(Class::Canceled), "the statement took too long, or was canceled"),
    ("57", Fault::Ours(Class::Shutdown), "the server is shutting down, starting up or recovering"),
    ("58", Fault::Ours(Class::Server), "the server's operating system failed it"),
    ("P0001", Fault::Row, "a trigger refuses it"),
    ("XX", Fault::Unclear(Class::Server), "the server found an internal error or corrupted data"),
];

fn look_up(code: &str) -> Option<(Fault, &'static str)> {
    TABLE.iter().find(|(prefix, ..)| code.starts_with(prefix)).map(|(_, fault, words)| (*fault, *words))
}

/// The error of one statement: an outage, or the row's fault.
pub(super) fn judge(err: &tokio_postgres::Error) -> StoreError {
    let row = |db: &DbError| match look_up(db.code().code()) {
        Some((Fault::Row, words)) => Some(reason(words, db)),
        Some((Fault::Ours(_) | Fault::Unclear(_), _)) | None => None,
    };
    err.as_db_error().and_then(row).map_or_else(|| StoreError::Outage(outage(err)), StoreError::Refused)
}

/// An error as an outage, whatever it is.
pub(super) fn outage(err: &tokio_postgres::Error) -> Outage {
    let Some(db) = err.as_db_error() else { return Outage::new(Class::Connection, describe(err)) };
    let code = db.code().code();
    match look_up(code) {
        Some((Fault::Ours(class), _)) => Outage::new(class, describe(err)),
        Some((Fault::Unclear(class), _)) => Outage::of_row(class, describe(err), code),
        Some((Fault::Row, _)) => Outage::new(Class::Unknown, describe(err)),
        None => Outage::of_row(Class::Unknown, describe(err), code),
    }
}

/// A reason that can be shown to anybody: our words, the code, and names out of the schema.
fn reason(words: &str, db: &DbError) -> String {
    let names = [("table", db.table()), ("column", db.column()), ("constraint", db.constraint())];
    let places: Vec<String> = names.iter().filter_map(|(kind, name)| Some(format!(", {kind} {}", (*name)?))).collect();
    format!("{words} (SQLSTATE {}{})", db.code().code(), places.concat())
}

/// The cause of an outage, for a person. Of PostgreSQL's own words only the main message, and only where the table says
/// what it is about: no DETAIL, no CONTEXT, and no text of a function, which may quote the row.
pub(super) fn describe(err: &tokio_postgres::Error) -> String {
    let Some(db) = err.as_db_error() else { return chain(err) };
    let code = db.code().code();
    let place = function(db).map(|name| format!(", in function {name}")).unwrap_or_default();
    match look_up(code) {
        Some((Fault::Unclear(Class::Schema), _)) if db.where_().is_some() => {
            format!("a function that a trigger calls fails (SQLSTATE {code}){place}; PostgreSQL's log says more")
        }
        Some((Fault::Ours(_) | Fault::Unclear(_), words)) => match db.where_() {
            None => format!("{words}: {} (SQLSTATE {code})", db.message()),
            Some(_) => format!("{words} (SQLSTATE {code}){place}"),
        },
        Some((Fault::Row, words)) => reason(words, db),
        None => {
            format!("an error that this program does not know (SQLSTATE {code}){place}; PostgreSQL's log says more")
        }
    }
}

/// The PL/pgSQL function in which the error was raised, by the first line of its context
/// (`PL/pgSQL function refuse() line 1 at RAISE`).
fn function(db: &DbError) -> Option<&str> {
    let name = db.where_()?.strip_prefix("PL/pgSQL function ")?.split_once(" line ")?.0;
    (!name.contains('\n')).then_some(name)
}

/// The error and its causes. Without the server in it, there is nothing of a row in it either.
fn chain(err: &tokio_postgres::Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        text = format!("{text}: {err}");
        cause = err.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(code: &str) -> Fault {
        look_up(code).map_or(Fault::Unclear(Class::Unknown), |(fault, _)| fault)
    }

    #[test]
    fn what_time_or_a_person_can_mend_is_ours() {
        let ours = [
            "08000 08001 08003 08004 08006 08007 08P01",       // connections
            "25006 25P02 25P03 25P04",                         // read-only, failed or timed out transactions
            "28000 28P01 3D000",                               // login
            "40000 40001 40002 40003 40P01",                   // serialization, deadlock
            "42501 42703 42704 42804 42846 42883 42P01 42P10", // rights, tables that do not fit
            "0A000",                                           // a cached plan after a column changed its type
            "53000 53100 53200 53300 53400",                   // disk, memory, connections
            "55000 55006 55P02 55P03",                         // locks
            "57000 57014 57P01 57P02 57P03 57P04 57P05",       // shutdown, crash, startup, cancel
            "58000 58030 58P01 58P02",                         // I/O
            "F0000 XX000 XX001 XX002",                         // corruption
            "P0000 P0004 HV000 72000 99999",                   // not known
            "2200H 26000",                                     // no number left, a pooler
        ];
        for code in ours.iter().flat_map(|class| class.split(' ')) {
            assert!(matches!(fault(code), Fault::Ours(_) | Fault::Unclear(_)), "{code}");
        }
    }

    #[test]
    fn what_a_trigger_may_raise_for_one_row_is_unclear() {
        for code in ["LP001", "P0002", "P0004", "XX000", "42883", "42501", "42P01", "57014", "F0000", "99999"] {
            assert!(matches!(fault(code), Fault::Unclear(_)), "{code}");
        }
        for code in ["08006", "25006", "25P02", "28P01", "40P01", "53100", "53300", "55P03", "57P01", "58030"] {
            assert!(matches!(fault(code), Fault::Ours(_)), "{code}");
        }
    }

    #[test]
    fn what_the_bytes_themselves_cause_is_the_rows() {
        let row = [
            "22000 22001 22003 22007 22008 22021 22P02 22P03 22P05 22023 22032", // data
            "23000 23502 23503 23505 23514 23P01",                               // constraints
            "54000 54001 54011 54023",                                           // program limits
            "P0001",                                                             // a trigger's RAISE EXCEPTION
        ];
        for code in row.iter().flat_map(|class| class.split(' ')) {
            assert_eq!(fault(code), Fault::Row, "{code}");
        }
    }

    #[test]
    fn every_line_of_the_table_can_be_reached() {
        for (at, (prefix, ..)) in TABLE.iter().enumerate() {
            let first = TABLE.iter().position(|(earlier, ..)| prefix.starts_with(earlier));
            assert_eq!(first, Some(at), "{prefix} is hidden by an earlier line");
        }
    }
}
