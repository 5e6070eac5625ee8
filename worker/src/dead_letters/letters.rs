//! The letters that a command is about: a filter, and the pages of what it leaves.

use clap::ArgMatches;
use serde_json::{Value, json};
use shared::operator;
use shared::text::printable;
use time::OffsetDateTime;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use crate::commands::{patiently, show_time};
use crate::store::{Statement, Store, StoreError};

/// Letters without their bodies, a page of them. `$1` ids, `$2` reason, `$3` and `$4` times; each may be NULL for any.
/// `$5` and `$6` are the last letter of the page before, `$7` is the size of a page. The inner query sorts no headers.
const LIST: Statement = Statement::new(
    "\
    SELECT delivery_id, stream_sequence, subject, reason, attempts, failed_at, octet_length(body), headers::text
    FROM ingest.dead_letters
    WHERE delivery_id IN (
        SELECT delivery_id
        FROM ingest.dead_letters
        WHERE ($1::text[] IS NULL OR delivery_id = ANY ($1))
          AND ($2::text IS NULL OR strpos(lower(reason), lower($2)) > 0)
          AND ($3::timestamptz IS NULL OR failed_at >= $3)
          AND ($4::timestamptz IS NULL OR failed_at < $4)
          AND ($5::bigint IS NULL OR (stream_sequence, delivery_id) > ($5, $6::text))
        ORDER BY stream_sequence, delivery_id
        LIMIT $7)
    ORDER BY stream_sequence, delivery_id",
    &[Type::TEXT_ARRAY, Type::TEXT, Type::TIMESTAMPTZ, Type::TIMESTAMPTZ, Type::INT8, Type::TEXT, Type::INT8],
);

/// Letters that are held in memory at once. The headers of each may have some KB.
const PAGE: u16 = 500;

/// Which letters.
#[derive(Debug, Default)]
pub(super) struct Filter {
    ids: Option<Vec<String>>,
    reason: Option<String>,
    since: Option<OffsetDateTime>,
    until: Option<OffsetDateTime>,
}

impl Filter {
    /// The letter with that id.
    pub(super) fn one(id: &str) -> Filter {
        Filter { ids: Some(vec![id.to_owned()]), ..Filter::default() }
    }

    /// Returns `true` where letters are named by their ids.
    pub(super) fn names_letters(&self) -> bool {
        self.ids.is_some()
    }

    pub(super) fn of(matches: &ArgMatches) -> Filter {
        let time = |name: &str| matches.get_one::<OffsetDateTime>(name).copied();
        let ids = matches.try_get_many::<String>("id").ok().flatten();
        Filter {
            ids: ids.map(|ids| ids.cloned().collect()),
            reason: matches.get_one::<String>("reason").map(|text| in_reason(text)),
            since: time("since"),
            until: time("until"),
        }
    }

    /// The filter as arguments of the command.
    pub(super) fn arguments(&self) -> String {
        let Filter { ids, reason, since, until } = self;
        if let Some(ids) = ids {
            return operator::ids(ids.iter().map(String::as_str));
        }
        let mut text = "--all".to_owned();
        text.extend(reason.iter().map(|reason| format!(" --reason {reason:?}")));
        text.extend(since.iter().map(|since| format!(" --since {}", show_time(*since))));
        text.extend(until.iter().map(|until| format!(" --until {}", show_time(*until))));
        text
    }

    /// The letters after `last`, a page of them.
    pub(super) async fn page(&self, store: &Store, last: Option<&Letter>) -> Result<Vec<Letter>, StoreError> {
        let Filter { ids, reason, since, until } = self;
        let after = last.map(|letter| (letter.stream_sequence, letter.delivery_id.as_str())).unzip();
        let rows = store.query(&LIST, &[ids, reason, since, until, &after.0, &after.1, &i64::from(PAGE)]).await?;
        rows.iter().map(|row| Letter::of(row).map_err(|err| StoreError::from_sql(&err))).collect()
    }

    /// Hands all letters to `see`, page by page, in the order of the stream. Returns their number.
    pub(super) async fn pages(
        &self,
        store: &Store,
        mut see: impl FnMut(&[Letter]) -> anyhow::Result<()>,
    ) -> anyhow::Result<usize> {
        let (mut last, mut number) = (None::<Letter>, 0);
        loop {
            let mut page = patiently(|| self.page(store, last.as_ref())).await?;
            see(&page)?;
            number += page.len();
            if page.len() < usize::from(PAGE) {
                return Ok(number);
            }
            last = page.pop();
        }
    }

    /// The ids of the letters: those that were named, named well or not, or all that the filter leaves.
    pub(super) async fn ids(&self, store: &Store) -> anyhow::Result<Vec<String>> {
        if let Some(ids) = &self.ids {
            return Ok(ids.clone());
        }
        let mut ids = Vec::new();
        let note = |letters: &[Letter]| {
            ids.extend(letters.iter().map(|letter| letter.delivery_id.clone()));
            Ok(())
        };
        self.pages(store, note).await?;
        Ok(ids)
    }
}

/// What to look for in a reason. A SQLSTATE or its class (`23514`, `23`, `P0001`) would be found in other numbers, too.
fn in_reason(text: &str) -> String {
    let is_code = matches!(text.len(), 2 | 5)
        && text.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit())
        && text.bytes().any(|byte| byte.is_ascii_digit());
    if is_code { format!("SQLSTATE {text}") } else { text.to_owned() }
}

/// A letter without its body.
pub(super) struct Letter {
    pub(super) delivery_id: String,
    pub(super) stream_sequence: i64,
    pub(super) subject: String,
    pub(super) reason: String,
    pub(super) attempts: i32,
    pub(super) failed_at: OffsetDateTime,
    pub(super) bytes: i32,
    pub(super) headers: Value,
}

impl Letter {
    fn of(row: &Row) -> Result<Letter, tokio_postgres::Error> {
        Ok(Letter {
            delivery_id: row.try_get(0)?,
            stream_sequence: row.try_get(1)?,
            subject: row.try_get(2)?,
            reason: row.try_get(3)?,
            attempts: row.try_get(4)?,
            failed_at: row.try_get(5)?,
            bytes: row.try_get(6)?,
            headers: serde_json::from_str(row.try_get(7)?).unwrap_or_default(),
        })
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "delivery_id": self.delivery_id,
            "stream_sequence": self.stream_sequence,
            "subject": self.subject,
            "reason": self.reason,
            "attempts": self.attempts,
            "failed_at": show_time(self.failed_at),
            "bytes": self.bytes,
            "headers": self.headers,
        })
    }

    /// The same as a member of an array on lines of its own.
    pub(super) fn indented_json(&self) -> String {
        format!("\n{:#}", self.json()).replace('\n', "\n  ")
    }

    /// A line of the table.
    pub(super) fn line(&self) -> String {
        let Letter { delivery_id, attempts, bytes, reason, failed_at, .. } = self;
        let (failed_at, reason) = (show_time(*failed_at), printable(reason));
        format!("{delivery_id:36}  {failed_at:20}  {attempts:>8}  {bytes:>9}  {reason}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sqlstate_is_told_from_words() {
        for (text, looked_for) in [
            ("23514", "SQLSTATE 23514"),
            ("23", "SQLSTATE 23"),
            ("P0001", "SQLSTATE P0001"),
            ("JSON", "JSON"),
            ("not JSON", "not JSON"),
            ("CHECK", "CHECK"),
            ("ab", "ab"),
        ] {
            assert_eq!(in_reason(text), looked_for);
        }
    }
}
