//! `worker check`: would a worker with these settings do what it promises? Changes nothing (see [`shared::check`]).

use std::time::Duration;

use clap::{ArgMatches, Command};
use shared::check::nats::{self, Side};
use shared::check::{self, Finding, Report};
use shared::settings;
use time::OffsetDateTime;
use tokio::time::timeout;

use crate::Config;
use crate::commands::{Ending, print};
use crate::migrate::{self, MigrateError};
use crate::settings::SETTINGS;
use crate::store::{Class, Statement, Store, StoreError};

/// How long one try may take.
const TRY_WITHIN: Duration = Duration::from_secs(6);
/// Clocks that differ by more make ages wrong that people look at; nothing of a delivery depends on them.
const CLOCKS_APART: time::Duration = time::Duration::seconds(5);

/// All that is asked of the server itself, in one row. Everybody may read these.
/// <https://www.postgresql.org/docs/current/runtime-config.html>
const SERVER: Statement = Statement::new(
    "\
    SELECT current_setting('server_version'), current_setting('server_version_num')::int, current_user::text,
           current_setting('server_encoding'), current_setting('synchronous_commit'), current_setting('fsync'),
           current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
               - coalesce(current_setting('reserved_connections', true)::bigint, 0),
           (SELECT coalesce(sum(numbackends), 0)::bigint FROM pg_stat_database),
           (SELECT rolconnlimit::bigint FROM pg_roles WHERE rolname = current_user),
           (SELECT datconnlimit::bigint FROM pg_database WHERE datname = current_database()),
           coalesce((SELECT 'lz4' = ANY (enumvals) FROM pg_settings WHERE name = 'default_toast_compression'), false),
           clock_timestamp(), has_database_privilege(current_database(), 'TEMPORARY'),
           format('GRANT TEMPORARY ON DATABASE %I TO %I', current_database(), current_user)",
    &[],
);

pub(crate) fn command() -> Command {
    check::command("Look before a deployment: what would be used, and whether it would work")
}

pub(crate) async fn run(config: &Config, arguments: &ArgMatches) -> anyhow::Result<Ending> {
    let in_use = settings::in_use(&SETTINGS, arguments, |variable| match variable {
        "DATABASE_URL" => {
            let user = config.database.user().map(|user| format!("{user}@")).unwrap_or_default();
            Some(format!("postgres://{user}{}", config.database))
        }
        "NATS_URL" => Some(config.nats.url_to_show()),
        _ => None,
    });
    let (database, nats) = tokio::join!(database(config), nats::look(&config.nats, Side::Worker));
    let ops = check::ops_address("WORKER_OPS_LISTEN", config.ops_listen).await;
    let report = Report::new("worker", in_use, [database, vec![ops], nats].concat());
    let text = if arguments.get_flag("json") { report.to_json() + "\n" } else { report.to_string() };
    print(&text)?;
    Ok(if report.is_well() { Ending::Well } else { Ending::LookAtIt })
}

async fn database(config: &Config) -> Vec<Finding> {
    let what = format!("PostgreSQL {}", config.database);
    let store = Store::new(&config.database, 1);
    let mut findings = match timeout(TRY_WITHIN, server(&what, &store, config)).await {
        Ok(Ok(findings)) => findings,
        Ok(Err(error)) => return vec![away(&what, &error, config)],
        Err(_) => return vec![hangs(&what)],
    };
    match timeout(TRY_WITHIN, tables(&store, config.migrate)).await {
        Ok(found) => findings.extend(found),
        Err(_) => findings.push(hangs("tables")),
    }
    findings
}

fn hangs(what: &str) -> Finding {
    let detail = format!("no answer within {} s", TRY_WITHIN.as_secs());
    Finding::problem(what, detail, "does the server hang, or is something between that swallows packets?")
}

fn away(what: &str, error: &StoreError, config: &Config) -> Finding {
    let words = match error {
        StoreError::Outage(outage) => outage.to_string(),
        StoreError::Refused(words) | StoreError::Denied(words) => words.clone(),
    };
    let says = |part: &str| words.to_ascii_lowercase().contains(part);
    if says("permission denied for database") {
        let role = config.database.user().unwrap_or("the role");
        let grant = format!("as its owner, GRANT CONNECT ON DATABASE {} TO {role}", config.database.name());
        return Finding::problem(what, words, grant);
    }
    let advice = if says("does not allow writes") || says("25006") {
        "this is a standby, or set read-only: name the primary (of several hosts separated by commas, the one that may be \
         written to is taken)"
    } else if says("28p01") || says("28000") || says("password") {
        "look at the user and the password in DATABASE_URL, and at the server's pg_hba.conf"
    } else if says("3d000") {
        "make the database, or name another in DATABASE_URL"
    } else if says("53300") {
        "the server has no connection left: end some, or raise its max_connections"
    } else if says("tls") || says("ssl") || says("certificate") {
        "look at sslmode in DATABASE_URL, PGSSLROOTCERT and the server's certificate"
    } else if says("sqlstate") {
        "it answers and does not take this login: look at its log"
    } else {
        "start it, or let this machine reach it; DATABASE_URL says where it is"
    };
    Finding::problem(what, words, advice)
}

/// The server itself.
async fn server(what: &str, store: &Store, config: &Config) -> Result<Vec<Finding>, StoreError> {
    let rows = store.query(&SERVER, &[]).await?;
    let row = &rows[0]; // without FROM there is exactly one
    let (version, number, role): (String, i32, String) = (row.get(0), row.get(1), row.get(2));
    let (encoding, commit, fsync): (String, String, String) = (row.get(3), row.get(4), row.get(5));
    let (most, used): (i64, i64) = (row.get(6), row.get(7));
    let (of_role, of_database): (Option<i64>, Option<i64>) = (row.get(8), row.get(9));
    let (lz4, clock): (bool, OffsetDateTime) = (row.get(10), row.get(11));

    let detail = format!("PostgreSQL {version}, takes writes, logged in as {role}");
    let mut findings = vec![if number < 130_000 {
        Finding::warning(what, detail, "this is tried with 13 and later: update the server")
    } else {
        Finding::ok(what, detail)
    }];
    if encoding != "UTF8" {
        let advice = "make the database anew with ENCODING 'UTF8': deliveries are Unicode";
        findings.push(Finding::problem("encoding", format!("the database's is {encoding}"), advice));
    }
    findings.push(connections(Store::connections_of_worker(config.concurrency), most, used, of_role, of_database));
    let durable = [("synchronous_commit", commit), ("fsync", fsync)];
    let off: Vec<&str> = durable.iter().filter(|(_, value)| value == "off").map(|(name, _)| *name).collect();
    findings.push(if off.is_empty() {
        Finding::ok("durability", "a COMMIT waits for the disk")
    } else {
        let advice = "turn it on for this role or server: a crash may lose what was stored and acknowledged; `worker audit` \
                      finds that, `worker replay` brings it back as long as the stream has it";
        Finding::warning("durability", format!("{} off", off.join(" and ")), advice)
    });
    let compression =
        if lz4 { "lz4 is there" } else { "the server is built without lz4: payloads take pglz, and longer" };
    findings.push(Finding::ok("compression", compression));
    let apart = OffsetDateTime::now_utc() - clock;
    findings.push(if apart.abs() > CLOCKS_APART {
        let detail = format!("the server's is {apart} behind this machine's (or ahead, where that is negative)");
        Finding::warning("clock", detail, "set the clocks by NTP")
    } else {
        Finding::ok("clock", "agrees with this machine's")
    });
    let (temporary, grant): (bool, String) = (row.get(12), row.get(13));
    findings.push(if temporary {
        Finding::ok("temporary tables", "may be made, as `worker replay --dry-run` does")
    } else {
        let advice = format!("{grant}; the worker itself needs none");
        Finding::warning("temporary tables", "may not be made: `worker replay --dry-run` would fail", advice)
    });
    Ok(findings)
}

/// What one worker opens, against what there is. -1 is no limit.
fn connections(needed: usize, most: i64, used: i64, of_role: Option<i64>, of_database: Option<i64>) -> Finding {
    let what = "connections";
    let needed = i64::try_from(needed).unwrap_or(i64::MAX);
    let limit = [of_role, of_database].into_iter().flatten().filter(|limit| *limit >= 0).fold(most, i64::min);
    let detail = format!("a worker opens up to {needed}; {limit} are allowed, {used} of the server's are in use");
    if limit < needed {
        let advice = "raise max_connections (or the limit of the role or the database), or lower WORKER_CONCURRENCY";
        Finding::problem(what, detail, advice)
    } else if most - used < needed {
        let advice = "there is not that much left now: raise max_connections, or end what needs none";
        Finding::warning(what, detail, advice)
    } else {
        Finding::ok(what, detail)
    }
}

/// The tables as they are, or as a start would make them.
async fn tables(store: &Store, migrate: bool) -> Vec<Finding> {
    // Only looked at first: nothing is rehearsed where all is there.
    let mut looked = migrate::check(store).await;
    let fits = looked.is_ok();
    if !fits && migrate && matches!(looked, Err(MigrateError::DoesNotFit(_))) {
        looked = migrate::rehearse(store).await;
    }
    match looked {
        Ok(report) => {
            let made: Vec<&str> = report.created().collect();
            let detail = match made.is_empty() {
                true => "there, and fit; the role may write to them".to_owned(),
                false => format!("a start makes {}", made.join(", ")),
            };
            let note = |note: &String| Finding::warning("tables", note, "no matter if that is what you mean");
            std::iter::once(Finding::ok("tables", detail)).chain(report.notes().iter().map(note)).collect()
        }
        Err(MigrateError::DoesNotFit(problems)) => {
            let tell = |problem: migrate::Problem| {
                let part = problem.part.map(|part| format!(", {part}")).unwrap_or_default();
                let detail = format!("found {}, expected {}", problem.found, problem.expected);
                Finding::problem(format!("table {}{part}", problem.object), detail, problem.remedy)
            };
            problems.into_iter().map(tell).collect()
        }
        Err(error @ MigrateError::MayNotCreate { .. }) => {
            vec![Finding::problem("tables", error.to_string(), "then look again")]
        }
        Err(MigrateError::Store(StoreError::Outage(outage))) if outage.class() == Class::Lock => {
            let detail = format!("a session holds a lock that the look needs: {outage}");
            vec![Finding::not_tried("tables", detail, "look again; a worker may be migrating right now")]
        }
        Err(MigrateError::Store(error)) => {
            vec![Finding::problem("tables", error.to_string(), "look again")]
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::check::State;

    use super::*;

    #[test]
    fn connections_are_counted_against_every_limit() {
        let state = |most, used, role, database| connections(4, most, used, role, database).state;
        assert_eq!(state(97, 3, Some(-1), Some(-1)), State::Ok);
        assert_eq!(state(97, 95, Some(-1), Some(-1)), State::Warning);
        assert_eq!(state(3, 0, None, None), State::Problem);
        assert_eq!(state(97, 0, Some(2), Some(-1)), State::Problem);
        assert_eq!(state(97, 0, Some(-1), Some(3)), State::Problem);
    }
}
