//! `gateway check`: would a gateway with these settings do what it promises? Changes nothing (see [`shared::check`]).

mod disk;

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::thread::available_parallelism;
use std::time::Duration;

use clap::{ArgMatches, Command};
use nix::unistd::geteuid;
use shared::check::nats::{self, Side};
use shared::check::{self, Finding, Report, size};
use shared::settings;
use shared::text::print;
use tokio::time::timeout;

use crate::descriptors;
use crate::journal::Outside;
use crate::server::connection_bytes;
use crate::settings::{Config, SETTINGS};
use crate::signature::Form;

/// The longest that proxies in common use keep an idle connection to what is behind them, by default: nginx.
/// <https://nginx.org/en/docs/http/ngx_http_upstream_module.html#keepalive_timeout>
const PROXIES_KEEP: Duration = Duration::from_secs(60);

/// Time for the journal's directory and disk. A healthy disk needs half of it.
const DISK_WITHIN: Duration = Duration::from_secs(8);

/// The command line below `gateway check`.
pub fn command() -> Command {
    check::command("Look before a deployment: what would be used, and whether it would work")
}

/// Looks, prints what was found; gives whether there is no problem.
///
/// # Errors
/// Fails when its output cannot be written. All else that goes wrong is a finding.
pub async fn run(arguments: &ArgMatches, config: &Config) -> anyhow::Result<bool> {
    let in_use = settings::in_use(&SETTINGS, arguments, |variable| shown(variable, config));
    let journal = config.journal.clone();
    let looked = tokio::task::spawn_blocking(move || (Outside::look(&journal.dir).ok(), disk::look(&journal)));
    let (outside, mut findings) = match timeout(DISK_WITHIN, looked).await {
        Ok(looked) => looked?,
        Err(_) => (None, vec![disk::hangs(&config.journal.dir, DISK_WITHIN)]),
    };
    let running = outside.as_ref().and_then(|outside| outside.held_by);
    findings.push(client_secrets(config));
    findings.extend(config.secrets.path().map(secret_file));
    findings.extend(listeners(config, running).await);
    findings.push(signature_form(config.form));
    findings.extend(limits(config));
    let id = outside.as_ref().and_then(|outside| outside.gateway_id.as_deref());
    let side = Side::Gateway { id, body_bytes: config.limits.body_bytes };
    findings.extend(nats::look(&config.nats, side).await);
    let report = Report::new("gateway", in_use, findings);
    if arguments.get_flag("json") {
        print(&format!("{}\n", report.to_json()))?;
    } else {
        print(&report.to_string())?;
    }
    Ok(report.is_well())
}

/// The values that are not shown as they are set, or are made out of nothing.
fn shown(variable: &str, config: &Config) -> Option<String> {
    let secrets = config.secrets.current().borrow().count();
    match (variable, config.secrets.path()) {
        ("SENTRY_CLIENT_SECRET", None) => Some(format!("set, {secrets} in use")),
        ("SENTRY_CLIENT_SECRET_FILE", Some(path)) => Some(format!("{} ({secrets} in use)", path.display())),
        ("NATS_URL", _) => Some(config.nats.url_to_show()),
        ("GATEWAY_MAX_CANONICAL", _) => Some(config.limits.canonical.to_string()),
        _ => None,
    }
}

/// The secrets by their fingerprints, to be compared with those of another gateway or of the secret that Sentry shows.
fn client_secrets(config: &Config) -> Finding {
    let fingerprints = config.secrets.current().borrow().fingerprints();
    let changed = config.secrets.changed().map(|changed| format!("; {changed}")).unwrap_or_default();
    let how = "printf %s SECRET | sha256sum | cut -c1-8";
    Finding::ok("client secrets", format!("fingerprints {fingerprints} ({how}){changed}"))
}

/// The mode of the secrets' file. The group may read the file of another owner: so a process reads a Kubernetes volume of
/// root's.
fn secret_file(path: &Path) -> Finding {
    let what = "secret file";
    let found = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(error) => {
            return Finding::warning(what, format!("the system does not tell its mode: {error}"), "look with ls -lL");
        }
    };
    let mode = found.mode() & 0o7777;
    if mode & 0o077 == 0 {
        return Finding::ok(what, format!("mode {mode:04o}, its owner's alone"));
    }
    if mode & 0o037 == 0 && found.uid() != geteuid().as_raw() {
        return Finding::ok(what, format!("mode {mode:04o}, its owner's and, to read, its group's"));
    }
    let advice = "chmod 600 it, and let the gateway's user own it (defaultMode: 0400 of a Kubernetes Secret): a user who can \
                  read the secret can sign any delivery, and a user who can write it chooses the secret";
    Finding::warning(what, format!("mode {mode:04o}: its group or others have rights on it"), advice)
}

async fn listeners(config: &Config, running: Option<Option<u32>>) -> [Finding; 2] {
    let holder = running.map(|id| match id {
        Some(id) => format!("the gateway that runs on this journal (process {id})"),
        None => "the gateway that runs on this journal".to_owned(),
    });
    [
        check::address("GATEWAY_LISTEN", config.listen, holder.as_deref()),
        check::ops_address("GATEWAY_OPS_LISTEN", config.ops_listen).await,
    ]
}

/// What the settings say to each other, and to this machine.
fn limits(config: &Config) -> Vec<Finding> {
    let limits = &config.limits;
    let mut findings = vec![open_files(limits.connections)];
    let cores = available_parallelism().map_or(1, usize::from);
    let what = "canonical forms";
    let at_once = format!("{} at once, {cores} core(s)", limits.canonical);
    findings.push(if limits.canonical >= cores && cores > 1 {
        let advice = "lower GATEWAY_MAX_CANONICAL, so that a core is left for deliveries that are signed raw";
        Finding::warning(what, at_once, advice)
    } else {
        Finding::ok(what, at_once)
    });
    findings.push(if limits.idle_timeout <= PROXIES_KEEP {
        let advice = "set GATEWAY_IDLE_TIMEOUT above the time for which the proxy keeps its idle connections (nginx: 60s), or \
                      now and then a delivery is sent into a connection that we are just closing, and is lost";
        Finding::warning("idle time-out", format!("{:?}", limits.idle_timeout), advice)
    } else {
        let detail = format!("{:?}; has to be longer than the proxy in front keeps its connections", limits.idle_timeout);
        Finding::ok("idle time-out", detail)
    });
    let connections = (limits.connections * connection_bytes(limits.header_bytes)) as u64;
    let detail = format!(
        "{} for bodies, and {} at the very worst for {} connections",
        size(limits.bytes_in_flight as u64),
        size(connections),
        limits.connections
    );
    findings.push(Finding::ok("memory", detail));
    findings
}

/// No warning: the check cannot know the sender, and `any` is right for one that signs the canonical form.
fn signature_form(form: Form) -> Finding {
    let advice = match form {
        Form::Any => {
            "; where Sentry itself is the sender, set SENTRY_SIGNATURE_FORM=raw: with any, a replayer can alter bytes of \
             a captured delivery"
        }
        Form::Canonical | Form::Raw => "",
    };
    Finding::ok("signature form", format!("{}{advice}", form.as_str()))
}

fn open_files(connections: usize) -> Finding {
    let what = "open files";
    let needed = descriptors::needed(connections);
    let Some((_, most)) = descriptors::limits() else { return Finding::ok(what, "the system does not tell its limit") };
    let detail = format!("{most} are allowed, {connections} connections need up to {needed}");
    if most >= needed {
        return Finding::ok(what, detail);
    }
    let advice = "raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd), or lower GATEWAY_MAX_CONNECTIONS: beyond it \
                  connections wait unanswered instead of being told 503";
    Finding::problem(what, detail, advice)
}
