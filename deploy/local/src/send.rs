//! `cargo run -- send FILE`: one delivery, from Sentry's side to the rows in the database.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use hyper::{Response, StatusCode, Uri};
use local::sentry::{Delivery, Sign};
use local::stack_env::{NAME, StackEnv};
use shared::text::printable;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls, Row};

/// How long the rows may take.
const ROWS: Duration = Duration::from_secs(15);

/// What a person can choose.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) file: PathBuf,
    pub(crate) sign: Sign,
    pub(crate) url: Option<String>,
    pub(crate) secret: Option<String>,
    pub(crate) resource: Option<String>,
    pub(crate) request_id: Option<String>,
    pub(crate) data_dir: PathBuf,
}

/// Posts the file and shows what became of it.
///
/// # Errors
/// When the answer is not 202, or the rows do not come in time.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let file = options.file.display();
    let payload = std::fs::read(&options.file).with_context(|| format!("cannot read {file}"))?;
    let (target, database_url) = target(&options)?;
    let mut delivery = Delivery::sign(&payload, &target.secret, options.sign, options.resource.as_deref())
        .with_context(|| format!("cannot send {file}"))?;
    if let Some(request_id) = options.request_id {
        delivery.request_id = request_id;
    }
    let posted = Instant::now();
    let answer = delivery.post(&target.url).await.with_context(|| {
        format!("{} gave no answer (Sentry would have lost this delivery). Is `cargo run` still running?", target.url)
    })?;
    let took = posted.elapsed();
    let said = describe(&answer);
    if answer.status() != StatusCode::ACCEPTED {
        bail!("not accepted: {said} (in {took:.1?}). For an internal integration Sentry would not try again");
    }
    println!("\n{said} in {took:.1?}: {} ({} bytes)", delivery.resource, delivery.body.len());
    let Some(database_url) = database_url else { return Ok(()) };
    let answer: serde_json::Value = serde_json::from_slice(answer.body()).context("the answer is no JSON")?;
    let id = answer["data"]["deliveryId"].as_str().context("the answer names no deliveryId")?;
    print!("{}", rows(&database_url, id).await?);
    Ok(())
}

struct Target {
    url: Uri,
    secret: String,
}

/// Where to send, and the database to look into: the running stack's, unless `--url` leads elsewhere.
fn target(options: &Options) -> anyhow::Result<(Target, Option<String>)> {
    let stack = match (&options.url, &options.secret) {
        (Some(_), Some(_)) => None,
        _ => Some(StackEnv::read(&options.data_dir)?.with_context(|| {
            format!(
                "no stack is running here (there is no {}). Start one with `cargo run` in another terminal, or name \
                 another gateway with both --url and --secret",
                options.data_dir.join(NAME).display()
            )
        })?),
    };
    let from_stack = |of: fn(&StackEnv) -> &String| stack.as_ref().map(of).cloned();
    let url = options.url.clone().or_else(|| from_stack(|stack| &stack.webhook_url)).unwrap_or_default();
    let secret = options.secret.clone().or_else(|| from_stack(|stack| &stack.secret)).unwrap_or_default();
    let url: Uri = url.parse().with_context(|| format!("{url:?} is no URL"))?;
    local::http::authority(&url)?;
    // Elsewhere is another database; the environment may say which.
    let database_url = match options.url {
        Some(_) => std::env::var("DATABASE_URL").ok().filter(|url| !url.is_empty()),
        None => from_stack(|stack| &stack.database_url),
    };
    Ok((Target { url, secret }, database_url))
}

/// Status and text of an answer, in one line.
fn describe(answer: &Response<Bytes>) -> String {
    let text = String::from_utf8_lossy(answer.body());
    let text: String = text.chars().take(300).collect();
    format!("{} {}", answer.status(), printable(text.trim_end()))
}

/// The signal and the issue of a delivery, or the reason why there are none.
const ROW: &str = "
    SELECT delivery.state, letter.reason,
           (extract(epoch FROM delivery.stored_at - delivery.received_at) * 1000)::float8 AS took,
           signal.id AS signal_id, signal.source, signal.type, signal.severity::text, signal.source_id,
           signal.created_at,
           issue.id AS issue_id, issue.number, issue.title, issue.status::text, issue.priority
    FROM ingest.deliveries AS delivery
    LEFT JOIN ingest.dead_letters AS letter USING (delivery_id)
    LEFT JOIN public.signals AS signal ON signal.id = delivery.signal_id
    LEFT JOIN public.issues AS issue ON issue.id = signal.issue_id
    WHERE delivery_id = $1";

/// Waits for the rows of the delivery `id` and writes them for a person.
async fn rows(database_url: &str, id: &str) -> anyhow::Result<String> {
    let late = || {
        format!(
            "accepted, but not found in the database within {ROWS:?} (delivery {id}). It is not lost: is a worker running? Its \
             /readyz says what it lacks"
        )
    };
    let found = tokio::time::timeout(ROWS, first_row(database_url, id)).await.with_context(late)?;
    let row = found.context("cannot look into the database")?;
    let state: String = row.try_get("state")?;
    match state.as_str() {
        "dead" => {
            let reason: Option<String> = row.try_get("reason")?;
            let reason = reason.unwrap_or_default();
            bail!("delivery {id} cannot become a signal and is kept as a dead letter: {}", printable(&reason))
        }
        "stored" if row.try_get::<_, Option<String>>("issue_id")?.is_some() => Ok(block(&row, id)?),
        "stored" => bail!("delivery {id} was stored, but its signal or issue has since been deleted"),
        _ => bail!("delivery {id} is {state}"),
    }
}

/// Looks for the row until it is there.
async fn first_row(database_url: &str, id: &str) -> Result<Row, tokio_postgres::Error> {
    let (mut client, connection) = tokio_postgres::connect(database_url, NoTls).await?;
    tokio::spawn(connection);
    loop {
        if let Some(row) = row(&mut client, id).await? {
            return Ok(row);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn row(client: &mut Client, id: &str) -> Result<Option<Row>, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    // As in the worker: names without a schema mean PostgreSQL's own functions and operators.
    transaction.batch_execute("SET LOCAL search_path = pg_catalog, pg_temp").await?;
    match transaction.query_opt(ROW, &[&id]).await {
        // A worker that has never run has made no tables yet.
        Err(err) if matches!(err.code(), Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME)) => Ok(None),
        row => row,
    }
}

fn block(row: &Row, id: &str) -> anyhow::Result<String> {
    let text = |name: &str| -> anyhow::Result<String> {
        let value: Option<String> = row.try_get(name)?;
        // Somebody else's words, on a terminal.
        Ok(printable(&value.unwrap_or_else(|| "none".into())).into_owned())
    };
    let created_at: OffsetDateTime = row.try_get("created_at")?;
    let (number, priority): (i32, i32) = (row.try_get("number")?, row.try_get("priority")?);
    // A delivery that came without a time of receipt was put on the stream by somebody else than the gateway.
    let took =
        row.try_get::<_, Option<f64>>("took")?.map(|took| format!(", stored {took:.0} ms after it was received"));
    Ok(format!(
        "
  Delivery    {id}{took}
  Signal      {signal_id}
    source    {source}, {source_id}
    type      {kind}
    severity  {severity}
    created   {created_at}
  Issue #{number}  {issue_id}
    title     {title}
    status    {status}
    priority  {priority}
",
        took = took.unwrap_or_default(),
        signal_id = text("signal_id")?,
        source = text("source")?,
        source_id = text("source_id")?,
        kind = text("type")?,
        severity = text("severity")?,
        created_at = created_at.format(&Rfc3339)?,
        issue_id = text("issue_id")?,
        title = text("title")?,
        status = text("status")?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_cannot_steer_the_terminal() {
        let answer = Response::builder().status(502).body(Bytes::from("<h1>\u{202e}\u{1b}[2J\u{9b}0m\n\nno")).unwrap();
        assert_eq!(describe(&answer), r"502 Bad Gateway <h1>\u{202e}\u{1b}[2J\u{9b}0m\n\nno");
    }

    #[tokio::test]
    async fn a_database_that_says_nothing_is_not_waited_for() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("postgres://loop@{}/loop", silent.local_addr().unwrap());
        let looked = tokio::time::timeout(ROWS * 3, rows(&url, "an id")).await.expect("it gives up");
        let error = format!("{:#}", looked.unwrap_err());
        assert!(error.contains("an id") && error.contains("is not lost"), "{error}");
    }
}
