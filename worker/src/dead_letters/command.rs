//! `worker dead-letters list|show|retry|discard`.

use anyhow::Context as _;
use clap::{Arg, ArgMatches, Command};
use serde_json::{Value, json};
use shared::operator;
use shared::text::printable;
use time::OffsetDateTime;
use tokio_postgres::Row;

use crate::Config;
use crate::commands::{self, Ending, flag, patiently, print, print_json, show_time, time_option};
use crate::store::{Retried, Store, StoreError};

/// Letters without their bodies. `$1` ids, `$2` reason, `$3` and `$4` times; each may be NULL for any.
const LIST: &str = "\
    SELECT delivery_id, stream_sequence, subject, reason, attempts, failed_at, octet_length(body), headers::text
    FROM ingest.dead_letters
    WHERE ($1::text[] IS NULL OR delivery_id = ANY ($1))
      AND ($2::text IS NULL OR strpos(lower(reason), lower($2)) > 0)
      AND ($3::timestamptz IS NULL OR failed_at >= $3)
      AND ($4::timestamptz IS NULL OR failed_at < $4)
    ORDER BY stream_sequence, delivery_id";

const BODY: &str = "SELECT body FROM ingest.dead_letters WHERE delivery_id = $1";

pub(crate) fn command() -> Command {
    let filters = || {
        [
            Arg::new("reason")
                .long("reason")
                .value_name("TEXT")
                .help("Only those with this in their reason, in any case; or with this SQLSTATE or class (23514, 23)"),
            time_option("since", "Only those that failed at this time or later (RFC 3339, or how long ago: 2h)"),
            time_option("until", "Only those that failed before this time (RFC 3339, or how long ago: 2h)"),
        ]
    };
    let which = |command: Command| {
        let ids = Arg::new("id").value_name("ID").num_args(1..).help("Delivery ids");
        let all = flag("all", "All letters, or all that --reason, --since and --until leave").conflicts_with("id");
        command
            .arg(ids.required_unless_present("all"))
            .arg(all)
            .args(filters().map(|filter| filter.conflicts_with("id")))
    };
    let json = || flag("json", "JSON, for programs");
    Command::new("dead-letters")
        .about("Deliveries that could not be stored: see them, try them again, or give them up")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            Command::new("list").about("One line a letter, in the order of the stream").args(filters()).arg(json()),
        )
        .subcommand(
            Command::new("show")
                .about("Headers and reason of one letter")
                .arg(Arg::new("id").value_name("ID").required(true).help("Delivery id"))
                .arg(flag("body", "Only the body, byte for byte").conflicts_with("json"))
                .arg(json()),
        )
        .subcommand(which(
            Command::new("retry")
                .about("Read letters as this version reads them and store them; exit code 1 where one is still dead"),
        ))
        .subcommand(which(
            Command::new("discard")
                .about("Give letters up for good; the ledger keeps their ids, so that no replay brings them back"),
        ))
}

pub(crate) async fn run(config: &Config, matches: &ArgMatches) -> anyhow::Result<Ending> {
    let store = commands::store(config).await?;
    let (name, matches) = matches.subcommand().context("list, show, retry or discard")?;
    match name {
        "list" => list(&store, &Filter::of(matches), matches.get_flag("json")).await,
        "show" => show(&store, matches).await,
        "retry" => each("worker dead-letters retry", &store, &Filter::of(matches), retry).await,
        _ => each("worker dead-letters discard", &store, &Filter::of(matches), discard).await,
    }
}

/// Which letters.
#[derive(Debug, Default)]
struct Filter {
    ids: Option<Vec<String>>,
    reason: Option<String>,
    since: Option<OffsetDateTime>,
    until: Option<OffsetDateTime>,
}

impl Filter {
    fn of(matches: &ArgMatches) -> Filter {
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
    fn arguments(&self) -> String {
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

    async fn letters(&self, store: &Store) -> Result<Vec<Letter>, StoreError> {
        let Filter { ids, reason, since, until } = self;
        let rows = store.query(LIST, &[ids, reason, since, until]).await?;
        rows.iter().map(|row| Letter::of(row).map_err(|err| StoreError::from_sql(&err))).collect()
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
struct Letter {
    delivery_id: String,
    stream_sequence: i64,
    subject: String,
    reason: String,
    attempts: i32,
    failed_at: OffsetDateTime,
    bytes: i32,
    headers: Value,
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

    fn json(&self) -> Value {
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
}

async fn list(store: &Store, filter: &Filter, json: bool) -> anyhow::Result<Ending> {
    let letters = patiently(|| filter.letters(store)).await?;
    if json {
        let list: Vec<Value> = letters.iter().map(Letter::json).collect();
        print_json(&Value::Array(list))?;
        return Ok(Ending::Well);
    }
    if letters.is_empty() {
        print("no dead letters\n")?;
        return Ok(Ending::Well);
    }
    let mut table = format!("{:36}  {:20}  {:>8}  {:>9}  {}\n", "DELIVERY", "FAILED AT", "ATTEMPTS", "BYTES", "REASON");
    for letter in &letters {
        let Letter { delivery_id, attempts, bytes, reason, failed_at, .. } = letter;
        let (failed_at, reason) = (show_time(*failed_at), printable(reason));
        table += &format!("{delivery_id:36}  {failed_at:20}  {attempts:>8}  {bytes:>9}  {reason}\n");
    }
    print(&table)?;
    Ok(Ending::Well)
}

async fn show(store: &Store, matches: &ArgMatches) -> anyhow::Result<Ending> {
    let id = matches.get_one::<String>("id").context("which letter?")?;
    if matches.get_flag("body") {
        let rows = store.query(BODY, &[id]).await?;
        let Some(row) = rows.first() else { return none(id) };
        let body: &[u8] = row.try_get(0).map_err(|err| StoreError::from_sql(&err))?;
        use std::io::Write as _;
        let mut out = std::io::stdout().lock();
        out.write_all(body)?;
        out.flush()?;
        return Ok(Ending::Well);
    }
    let filter = Filter { ids: Some(vec![id.clone()]), ..Filter::default() };
    let letters = patiently(|| filter.letters(store)).await?;
    let Some(letter) = letters.first() else { return none(id) };
    if matches.get_flag("json") {
        print_json(&letter.json())?;
        return Ok(Ending::Well);
    }
    let Letter { delivery_id, stream_sequence, subject, reason, attempts, failed_at, bytes, headers } = letter;
    let failed_at = show_time(*failed_at);
    let (subject, reason) = (printable(subject), printable(reason));
    let mut text = format!(
        "delivery   {delivery_id}\nreason     {reason}\nfailed at  {failed_at}\nattempts   {attempts}\n\
         message    {stream_sequence} on {subject}\nbody       {bytes} bytes (--body prints them)\n\n"
    );
    for (name, values) in headers.as_object().into_iter().flatten() {
        for value in values.as_array().into_iter().flatten().filter_map(Value::as_str) {
            text += &format!("{}: {}\n", printable(name), printable(value));
        }
    }
    print(&text)?;
    Ok(Ending::Well)
}

fn none(id: &str) -> anyhow::Result<Ending> {
    eprintln!("there is no dead letter {}", printable(id));
    Ok(Ending::LookAtIt)
}

/// Applies `act` to each letter, and prints each result and their counts. `command` is for the log.
async fn each(
    command: &str,
    store: &Store,
    filter: &Filter,
    act: impl AsyncFn(&Store, &str) -> Result<(bool, String), StoreError>,
) -> anyhow::Result<Ending> {
    let interruption = commands::interruption()?;
    let ids: Vec<String> = match &filter.ids {
        Some(ids) => ids.clone(),
        None => patiently(|| filter.letters(store)).await?.into_iter().map(|letter| letter.delivery_id).collect(),
    };
    let (mut well, mut ill) = (0, 0);
    let all = async {
        for id in &ids {
            let Some(done) = interruption.run_until_cancelled(patiently(|| act(store, id))).await else {
                eprintln!("interrupted; the letters named above are done");
                return Ok(Ending::Interrupted);
            };
            let (good, what) = done.with_context(|| format!("letter {id}"))?;
            *(if good { &mut well } else { &mut ill }) += 1;
            print(&format!("{}  {}\n", printable(id), printable(&what)))?;
        }
        anyhow::Ok(Ending::Well)
    };
    let ended = all.await;
    operator::log_end(command, &filter.arguments(), &format!("{} letters, {well} done, {ill} not", ids.len()));
    if ended? == Ending::Interrupted {
        return Ok(Ending::Interrupted);
    }
    print(&format!("{} letters: {well} done, {ill} not\n", ids.len()))?;
    Ok(if ill == 0 { Ending::Well } else { Ending::LookAtIt })
}

async fn retry(store: &Store, id: &str) -> Result<(bool, String), StoreError> {
    Ok(match store.retry(id).await? {
        Retried::Stored => (true, "stored".into()),
        Retried::StillDead(reason) => (false, format!("still dead: {reason}")),
        Retried::Settled => (true, "was settled before, the letter is removed".into()),
        Retried::NotThere => (false, "no such dead letter".into()),
    })
}

async fn discard(store: &Store, id: &str) -> Result<(bool, String), StoreError> {
    Ok(match store.discard(id).await? {
        true => (true, "discarded".into()),
        false => (false, "no such dead letter".into()),
    })
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

    #[test]
    fn retry_and_discard_want_ids_or_all() {
        let parse = |arguments: &str| command().try_get_matches_from(arguments.split(' ')).map(drop);
        for good in ["x retry a b", "x discard --all", "x retry --all --reason 23 --since 2h", "x list --reason 23"] {
            assert!(parse(good).is_ok(), "{good}: {:?}", parse(good));
        }
        for bad in [
            "x",
            "x retry",
            "x discard",
            "x retry a --all",
            "x retry a --reason b",
            "x retry --reason b",
            "x list --since 7",
            "x show",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
