//! The gateway: takes Sentry's webhooks, verifies them, makes them durable, and answers.
//!
//! Read [`receive`] first: it is the way of one delivery up to its 202. [`signature`] and [`canonical`] say what a genuine
//! delivery is, [`journal`] what a 202 rests on, [`reject`] what everybody else is told, [`server`] keeps the connections,
//! [`connection_limit`] closes one for another at the limit, [`body`]
//! and [`pace`] what they may cost, [`said`] that every word of theirs is ours, [`secrets`] the client secrets, which may change.
//! [`duplicate_bodies`] recognises a body that comes again. [`source`] finds the address that a request came from, [`top_sources`] counts by it.
//! Behind the answer, [`publish`] takes entries from the journal to JetStream, and [`confirm`] looks after each until a
//! worker has stored it. [`receipts`] says when it has. [`mod@restarted`] keeps both going. [`commands`] and [`check`] are for operators.

pub mod body;
pub mod canonical;
pub mod check;
pub mod commands;
pub mod confirm;
pub mod connection_limit;
pub mod descriptors;
pub mod duplicate_bodies;
pub mod head;
pub mod journal;
pub mod metrics;
pub mod pace;
pub mod publish;
pub mod receipts;
pub mod receive;
pub mod reject;
pub mod restarted;
pub mod said;
pub mod secrets;
pub mod server;
pub mod settings;
pub mod signature;
pub mod source;
pub mod summary;
pub mod top_sources;
pub mod traffic;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use shared::ops::{self, Readiness};
use shared::stream::NatsSettings;
use shared::telemetry;
use tokio::net::{TcpListener, TcpSocket};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use crate::settings::Config;

use crate::journal::{Journal, OpenError};
use crate::metrics::Metrics;
use crate::publish::Publisher;
use crate::receive::Gateway;
use crate::restarted::restarted;
use crate::settings::JournalSettings;
use crate::summary::Summary;

/// Checks that may fail while deliveries are taken.
const TOLERATED: [&str; 10] = [
    "nats",
    "stream",
    "stream_settings",
    "publishing",
    "receipts",
    "reconciliation",
    "reconciliation_task",
    "journal_reads",
    "secrets",
    "connections",
];

/// Serves until `shutdown`. Then `/readyz` says 503 while deliveries are still taken, so that load balancers turn to others;
/// after `GATEWAY_SHUTDOWN_DELAY` the listener closes, what is in flight is answered, and for what is left of the grace period
/// the journal is published; the rest stays on disk.
///
/// # Errors
/// Where the gateway cannot start: an address is taken, say, or the journal. While NATS is not there it starts, and takes
/// deliveries.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    descriptors::raise(config.limits.connections);
    let public = bind(config.listen, "GATEWAY_LISTEN")?;
    let ops = bind(config.ops_listen, "GATEWAY_OPS_LISTEN")?;
    // NATS away costs nothing but time: deliveries are taken, and wait on disk.
    let readiness = Readiness::tolerating(&TOLERATED);
    let Some(opened) = shutdown.run_until_cancelled(open_journal(&config.journal)).await else {
        tracing::info!("stopped before the journal was open");
        return Ok(());
    };
    let journal = opened?;
    let watched = journal.clone();
    readiness.probe("journal", move || match watched.trouble() {
        Some(trouble) => Err(trouble.problem.to_string()),
        None => Ok("takes deliveries".into()),
    });
    let watched = journal.clone();
    readiness.probe("journal_reads", move || match watched.unreadable() {
        Some((entries, error)) => Err(format!(
            "the journal's disk does not give {entries} deliveries ({error}); they are read again by themselves: look at the \
             disk and at the system's log"
        )),
        None => Ok("the disk gives every delivery that is read".into()),
    });
    let watched = journal.clone();
    readiness.vital(move || match watched.is_broken() {
        true => Err("a thread of the journal has ended; its last words are in the log".into()),
        false => Ok("the journal's threads run".into()),
    });
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry, &journal);
    let gateway = Arc::new(Gateway::new(&config, journal.clone(), metrics.clone()));
    metrics::watch(&mut registry, gateway.clone());
    let connections = gateway.connections().clone();
    readiness.probe("connections", move || connections.state());
    config.secrets.announce(&readiness);
    shared::metrics::of_process(&mut registry, "gateway", env!("CARGO_PKG_VERSION"), &readiness);
    tracing::info!(public = %public.local_addr()?, ops = %ops.local_addr()?, "listening");
    // Ops and publishing outlive the public listener.
    let after = CancellationToken::new();
    // Connecting goes on in the background. Before the first look at /readyz, so that no check is missing there.
    let publisher = Publisher::connect(&config.nats, journal.clone(), &readiness, metrics.clone()).await?;
    shared::metrics::of_link(&mut registry, "gateway", publisher.link());
    let ops = tokio::spawn(ops::serve(ops, readiness.clone(), registry, after.clone()));
    let settling = Settling { journal: &journal, publisher: &publisher, metrics: &metrics };
    let mut summary = Summary::new(metrics.clone(), journal.clone(), gateway.sources());
    let ending = server::Ending::default();
    let stopped_at = OnceLock::new();
    let leave = async {
        shutdown.cancelled().await;
        let _ = stopped_at.set(Instant::now());
        readiness.stopping();
        ending.leaving.cancel();
        if !config.shutdown_delay.is_zero() {
            tracing::info!(delay = ?config.shutdown_delay, "taking deliveries a while longer, until load balancers know");
        }
        tokio::time::sleep(config.shutdown_delay).await;
        ending.closing.cancel();
    };
    let closing = CLOSING.min(config.grace / 4);
    let serving = async {
        let orderly = async {
            tokio::join!(leave, server::run(public, gateway, &config.limits, ending.clone()));
            publisher.drained().await;
        };
        let grace_is_over = async {
            shutdown.cancelled().await;
            tokio::time::sleep(config.grace.saturating_sub(closing)).await;
        };
        tokio::select! {
            () = orderly => {}
            () = grace_is_over => {
                tracing::warn!("the grace period is over; what is not published stays in the journal until the next start");
            }
        }
        after.cancel();
    };
    tokio::join!(
        serving,
        settling.run(&config.nats, config.journal.confirm_after, &readiness, &after),
        after.run_until_cancelled(config.secrets.watch(metrics.secret_file_rejected())),
        after.run_until_cancelled(summary.run()),
        after.run_until_cancelled(journal.watch_disk()),
    );
    summary.tell();
    telemetry::tell_suppressed();
    let ops = ops.await;
    let grace_ends = stopped_at.get().map_or_else(Instant::now, |at| *at + config.grace);
    close(&journal, grace_ends).await;
    // Leaves in good order, unless the client is busy with a server that hangs. The server finds out by itself.
    let _ = tokio::time::timeout(LEAVING, publisher.link().current().client.drain()).await;
    ops.context("the ops listener failed")?;
    tracing::info!("stopped");
    Ok(())
}

/// The part of the grace period in which the journal is closed, a quarter of it at most. It takes milliseconds unless the
/// disk hangs.
const CLOSING: Duration = Duration::from_secs(2);
/// Time for telling NATS that this client leaves.
const LEAVING: Duration = Duration::from_millis(100);

/// Closes the journal. A disk that hangs is waited for until this moment.
async fn close(journal: &Journal, until: Instant) {
    if tokio::time::timeout_at(until, journal.close()).await.is_err() {
        tracing::warn!(
            "the journal's disk does not finish: the journal is left as it is, and the next start reads it through"
        );
    }
}

/// What brings entries from the journal to their receipts.
struct Settling<'a> {
    journal: &'a Journal,
    publisher: &'a Publisher,
    metrics: &'a Metrics,
}

impl Settling<'_> {
    /// Publishes, takes receipts and looks after what has none, until `shutdown`.
    async fn run(
        &self,
        nats: &NatsSettings,
        confirm_after: Duration,
        readiness: &Readiness,
        shutdown: &CancellationToken,
    ) {
        let work = async {
            let Settling { journal, publisher, metrics } = *self;
            let reconcile = || confirm::look_after(journal, publisher, metrics, readiness, &nats.stream, confirm_after);
            tokio::join!(
                publisher.run(readiness),
                restarted("receipts", readiness, || receipts::take(journal, publisher, metrics)),
                restarted("reconciliation_task", readiness, reconcile),
            );
        };
        shutdown.run_until_cancelled(Box::pin(work)).await;
    }
}

/// Time within which another process has to give the journal's lock back. `gateway check` has it for a moment.
const LOCKED_FOR: Duration = Duration::from_secs(2);

/// Opens the journal and tells what was found in it. Reading it may take a while, on a thread that may.
async fn open_journal(settings: &JournalSettings) -> anyhow::Result<Journal> {
    let JournalSettings { dir, limits, .. } = settings.clone();
    let begin = Instant::now();
    let mut waits = false;
    let opened = loop {
        let dir = dir.clone();
        match tokio::task::spawn_blocking(move || Journal::open(&dir, limits)).await? {
            Err(OpenError::InUse { .. }) if begin.elapsed() < LOCKED_FOR => {
                if !std::mem::replace(&mut waits, true) {
                    tracing::info!(at_most = ?LOCKED_FOR, "waiting for the journal: another process has its lock");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            opened => break opened,
        }
    };
    let (journal, found) = opened.context("GATEWAY_JOURNAL_DIR names the journal's directory")?;
    tracing::info!(
        gateway.id = journal.gateway_id(),
        unpublished = found.unpublished,
        unverified = found.unverified,
        set_aside = found.set_aside,
        torn_bytes = found.torn_bytes,
        took = ?found.took,
        "opened the journal"
    );
    Ok(journal)
}

/// Connections that the system keeps for us until we take them. Beyond that it drops a sender's first packet, which comes
/// again after a second, when Sentry has given up; 128, the library's own choice, is a burst on a busy machine. Linux allows
/// 4096 (net.core.somaxconn).
const BACKLOG: u32 = 4096;

fn bind(address: std::net::SocketAddr, setting: &str) -> anyhow::Result<TcpListener> {
    let problem = || format!("cannot listen on {address}; is another program there? {setting} sets another address");
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?; // as the standard library does: connections that have just ended hold nobody up
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().with_context(problem)
}
