//! `worker dead-letters list|show|retry|discard`.

use std::io::IsTerminal as _;

use anyhow::{Context as _, ensure};
use clap::error::ErrorKind;
use clap::{Arg, ArgMatches, Command};
use serde_json::Value;
use shared::operator;
use shared::text::{printable, printable_json};
use tokio_postgres::types::Type;
use tokio_util::sync::CancellationToken;

use super::letters::{Filter, Letter};
use crate::Config;
use crate::commands::{self, Ending, flag, patiently, print, print_json, show_time, time_option};
use crate::store::{Retried, Statement, Store, StoreError};

/// Letters counted by reason.
const REASONS: Statement = Statement::new(
    "\
    SELECT count(*), reason
    FROM ingest.dead_letters
    WHERE delivery_id = ANY ($1)
    GROUP BY reason
    ORDER BY count(*) DESC, reason",
    &[Type::TEXT_ARRAY],
);

const BODY: Statement = Statement::new("SELECT body FROM ingest.dead_letters WHERE delivery_id = $1", &[Type::TEXT]);

pub(crate) fn command() -> Command {
    let filters =
        || {
            [
                Arg::new("reason").long("reason").value_name("TEXT").value_parser(reason).help(
                    "Only those with this in their reason, in any case; or with this SQLSTATE or class (23514, 23)",
                ),
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
                .about("Give letters up; the ledger keeps their ids, so that no redelivery brings them back")
                .after_help(UNDO)
                .arg(flag("yes", "Do not ask: with --all, needed where stdin or stderr is no terminal"))
                .arg(flag("dry-run", "Discard nothing; say how many letters there are, by reason")),
        ))
}

/// The way back from a discard.
const UNDO: &str = "\
A discard deletes the letter with its body. While the delivery's message is on the stream, it can be taken back:
`worker replay --restore-discarded` stores it, or makes it a letter again.";

/// A filter by reason. An empty one would leave all letters.
fn reason(text: &str) -> Result<String, String> {
    if text.trim().is_empty() { Err("an empty text is in every reason".into()) } else { Ok(text.to_owned()) }
}

pub(crate) async fn run(
    config: &Config,
    matches: &ArgMatches,
    interruption: &CancellationToken,
) -> anyhow::Result<Ending> {
    let (name, matches) = matches.subcommand().context("list, show, retry or discard")?;
    if name == "discard" {
        check_consent(matches)?;
    }
    let store = commands::store(config).await?;
    match name {
        "list" => list(&store, &Filter::of(matches), matches.get_flag("json")).await,
        "show" => show(&store, matches).await,
        "retry" => {
            let filter = Filter::of(matches);
            let ids = filter.ids(&store).await?;
            each("worker dead-letters retry", &store, &filter, &ids, retry, interruption).await
        }
        _ => discard_letters(&store, matches, interruption).await,
    }
}

async fn discard_letters(
    store: &Store,
    matches: &ArgMatches,
    interruption: &CancellationToken,
) -> anyhow::Result<Ending> {
    let filter = Filter::of(matches);
    // From here on only these: a letter that comes meanwhile was not shown.
    let ids = filter.ids(store).await?;
    let dry_run = matches.get_flag("dry-run");
    if dry_run || !filter.names_letters() && !matches.get_flag("yes") {
        let summary = summary(store, &ids).await?;
        if dry_run {
            print(&format!("{summary}{UNDO}\n"))?;
            return Ok(Ending::Well);
        }
        confirm(&summary).await?;
    }
    each("worker dead-letters discard", store, &filter, &ids, discard, interruption).await
}

/// The number of these letters, and their reasons.
async fn summary(store: &Store, ids: &[String]) -> anyhow::Result<String> {
    let rows = patiently(|| async { store.query(&REASONS, &[&ids]).await });
    let (mut letters, mut reasons) = (0_i64, String::new());
    for row in rows.await? {
        let (count, reason): (i64, String) = (row.try_get(0)?, row.try_get(1)?);
        letters += count;
        reasons += &format!("{count:>12}  {}\n", printable(&reason));
    }
    Ok(format!("{letters} {}\n{reasons}", if letters == 1 { "letter" } else { "letters" }))
}

/// Fails where a discard of all letters needs `--yes`, before anything is asked of the database.
fn check_consent(matches: &ArgMatches) -> anyhow::Result<()> {
    let given = matches.get_flag("yes") || matches.get_flag("dry-run") || matches.contains_id("id");
    let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if given || terminal {
        return Ok(());
    }
    let words =
        "discard --all wants --yes where there is no terminal to ask at; --dry-run says what it would discard\n";
    Err(clap::Error::raw(ErrorKind::MissingRequiredArgument, words).into())
}

/// Shows what is to be discarded and asks.
///
/// # Errors
/// Fails unless the answer is yes.
async fn confirm(summary: &str) -> anyhow::Result<()> {
    eprint!("{summary}{UNDO}\nDiscard them? Type yes: ");
    let answer = tokio::task::spawn_blocking(|| {
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).map(|_| answer)
    });
    ensure!(answer.await??.trim() == "yes", "nothing is discarded");
    Ok(())
}

async fn list(store: &Store, filter: &Filter, json: bool) -> anyhow::Result<Ending> {
    // The text before the first letter, and before each other.
    let titles = format!("{:36}  {:20}  {:>8}  {:>9}  REASON\n", "DELIVERY", "FAILED AT", "ATTEMPTS", "BYTES");
    let (first, next) = if json { ("[", ",") } else { (titles.as_str(), "") };
    let mut before = first;
    let number = filter.pages(store, |letters| {
        let mut text = String::new();
        for letter in letters {
            text += std::mem::replace(&mut before, next);
            text += &if json { letter.indented_json() } else { letter.line() };
        }
        print(&if json { printable_json(&text).into_owned() } else { text }).map_err(Into::into)
    });
    match (number.await?, json) {
        (0, true) => print("[]\n")?,
        (0, false) => print("no dead letters\n")?,
        (_, true) => print("\n]\n")?,
        (_, false) => {}
    }
    Ok(Ending::Well)
}

async fn show(store: &Store, matches: &ArgMatches) -> anyhow::Result<Ending> {
    let id = matches.get_one::<String>("id").context("which letter?")?;
    if matches.get_flag("body") {
        let rows = store.query(&BODY, &[id]).await?;
        let Some(row) = rows.first() else { return none(id) };
        let body: &[u8] = row.try_get(0).map_err(|err| StoreError::from_sql(&err))?;
        use std::io::Write as _;
        let mut out = std::io::stdout().lock();
        out.write_all(body)?;
        out.flush()?;
        return Ok(Ending::Well);
    }
    let filter = Filter::one(id);
    let letters = patiently(|| filter.page(store, None)).await?;
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
    ids: &[String],
    act: impl AsyncFn(&Store, &str) -> Result<(bool, String), StoreError>,
    interruption: &CancellationToken,
) -> anyhow::Result<Ending> {
    let (mut well, mut ill) = (0, 0);
    let all = async {
        for id in ids {
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
