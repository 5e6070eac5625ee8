//! The worker: turns deliveries from the stream into signals and issues.
//!
//! Read [`pull`] first: it is the way of a batch through this process. [`interpret`] says what a delivery means,
//! [`payload`] how its body becomes jsonb, [`store`] how a batch is written once and only once, [`migrate`] what tables
//! it is written to. [`history`] makes room in the stream, [`metrics`] is what is counted. What an operator runs by
//! hand is in [`commands`].

mod audit;
mod check;
pub mod commands;
pub mod dead_letters;
pub mod history;
pub mod interpret;
pub mod metrics;
pub mod migrate;
pub mod payload;
pub mod pull;
pub mod read;
pub mod reading;
pub mod receipt;
mod replay;
pub mod settings;
pub mod severity;
mod status;
pub mod store;
mod summary;

use std::time::Duration;

use anyhow::Context as _;
use futures_util::future::join_all;
use prometheus_client::registry::Registry;
use shared::link::Link;
use shared::ops::{self, Readiness};
use shared::stream::{self, NotReady, until_done, until_ready};
use shared::telemetry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use crate::settings::Config;

use crate::metrics::{Anew, Metrics};
use crate::migrate::{MigrateError, Report};
use crate::pull::{Database, Puller, Session, UnreadableScan, Watch, pause};
use crate::store::Store;
use crate::summary::Summary;

/// Messages that may wait in a subscription beside a batch: the server's words on requests.
const SUBSCRIPTION_SPARE: usize = 64;

/// Works until `shutdown`; then the batches in hand are stored or handed back, for as long as the grace period lasts.
///
/// # Errors
/// Where the worker cannot start: an address is taken, say. While NATS or PostgreSQL is not there it starts and waits.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let problem = || format!("cannot listen on {}; WORKER_OPS_LISTEN sets another address", config.ops_listen);
    let ops = TcpListener::bind(config.ops_listen).await.with_context(problem)?;
    tracing::info!(ops = %ops.local_addr()?, "listening");
    let readiness = Readiness::tolerating(&["stream_settings", "rows"]);
    for check in ["database", "consumer", "stream_settings"] {
        readiness.set(check, Err("not looked at yet".into()));
    }
    let store = Store::for_worker(&config.database, config.concurrency);
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry, &store);
    shared::metrics::of_process(&mut registry, "worker", env!("CARGO_PKG_VERSION"), &readiness);
    // A batch fills a subscription, and nothing else comes there.
    let link = config.nats.connect("worker", config.batch_max + SUBSCRIPTION_SPARE, &readiness).await?;
    shared::metrics::of_link(&mut registry, "worker", &link);
    let ops_shutdown = CancellationToken::new();
    let ops = tokio::spawn(ops::serve(ops, readiness.clone(), registry, ops_shutdown.clone()));

    let work = Box::pin(work(&config, &link, &store, &readiness, &metrics, &shutdown));
    let grace_is_over = async {
        shutdown.cancelled().await;
        readiness.stopping();
        tokio::time::sleep(config.grace).await;
    };
    let mut summary = Summary::new(metrics.clone());
    tokio::select! {
        () = work => {}
        () = summary.run() => {}
        () = grace_is_over => tracing::warn!("the grace period is over; what was in hand is delivered again"),
    }
    // What was handed back must have left before the connection goes.
    let _ = tokio::time::timeout(Duration::from_secs(1), link.current().client.flush()).await;
    summary.tell();
    telemetry::tell_suppressed();
    ops_shutdown.cancel();
    ops.await.context("the ops listener failed")?;
    tracing::info!("stopped");
    Ok(())
}

/// Waits for the database, then works through one session with NATS after another.
async fn work(
    config: &Config,
    link: &Link,
    store: &Store,
    readiness: &Readiness,
    metrics: &Metrics,
    shutdown: &CancellationToken,
) {
    let prepared = shutdown.run_until_cancelled(until_ready("database", readiness, || prepare(config, store)));
    if prepared.await.is_none() {
        return;
    }
    let database = Database::new(store.clone(), readiness, metrics.clone());
    let sessions = async {
        let (mut scan, mut lost_connection) = (UnreadableScan::default(), false);
        let mut watch = Watch::new(&config.nats, readiness, &database);
        while !shutdown.is_cancelled() {
            let suspect = lost_connection.then_some(&mut scan);
            lost_connection = Box::pin(session(config, link, store, &mut watch, suspect, shutdown)).await;
            metrics.lag(None); // nobody asks any more
            if !shutdown.is_cancelled() {
                metrics.anew(Anew::Session);
            }
            pause().await;
        }
    };
    tokio::select! {
        () = sessions => {}
        () = database.watch() => {}
    }
}

/// Makes the consumer, or mends it, and keeps as many pullers going as there are batches to be worked on at once, until
/// `shutdown` or until the connection or the consumer is lost. Before that, where the connection before was lost, messages
/// that this program cannot read are set apart: one of them may have been the reason. Returns whether this connection was
/// lost.
async fn session(
    config: &Config,
    link: &Link,
    store: &Store,
    watch: &mut Watch<'_>,
    suspect: Option<&mut UnreadableScan>,
    shutdown: &CancellationToken,
) -> bool {
    let (database, readiness) = (watch.database, watch.readiness);
    let begin = || async {
        let linked = link.current();
        let session = Session::begin(linked.clone());
        let ensured = stream::ensure_consumer(&linked.context, &config.nats).await;
        let (stream, consumer, moved) = ensured.inspect_err(|_| database.metrics().anew(Anew::NotReady))?;
        if moved {
            database.metrics().consumer_reset();
        }
        Ok::<_, NotReady>((session, stream, consumer))
    };
    let begun = shutdown.run_until_cancelled(until_done("consumer", readiness, begin));
    let Some((session, stream, consumer)) = begun.await else { return false };
    watch.begin(&stream.cached_info().config, consumer.cached_info());
    let suspect = match suspect {
        None => None,
        Some(scan) => {
            let recent = Box::pin(scan.bury_recent(&stream, &session, database)); // large, and seldom
            let rest = shutdown.run_until_cancelled(recent).await.unwrap_or(Ok(None));
            rest.unwrap_or_else(|error| cannot_look(&error)).map(|rest| (scan, rest))
        }
    };
    let scanning = Box::pin(async {
        if let Some((scan, rest)) = suspect {
            let ended = scan.bury_rest(rest, &stream, &session, database).await;
            ended.unwrap_or_else(|error| cannot_look(&error));
        }
    });
    let pulling = (0..config.concurrency).map(|_| async {
        let puller = Puller { consumer: consumer.clone(), session: &session, database, batch_max: config.batch_max };
        puller.run(shutdown).await.unwrap_or_else(|error| {
            database.metrics().anew(Anew::Pull);
            tracing::warn!("pulling again: {error:#}");
            session.fail(format!("{error:#}"));
            Vec::new()
        })
    });
    let pulling = async {
        let unstored: Vec<_> = join_all(pulling).await.into_iter().flatten().collect();
        session.hand_back(&unstored).await
    };
    let room = history::keep_room(&stream, &session, store, database);
    let watching = async { tokio::join!(watch.run(&stream, &session), room, scanning) };
    tokio::select! {
        () = pulling => {}
        _ = watching => {}
    }
    watch.end(&session);
    // A client that has just ended fails its pullers before it is known to have ended.
    session.has_lost_connection() || session.failure().is_some()
}

fn cannot_look<T: Default>(error: &anyhow::Error) -> T {
    tracing::warn!("cannot look for messages that cannot be read: {error:#}");
    T::default()
}

/// Makes or checks the tables, as `WORKER_MIGRATE` says, and tells what was made.
async fn prepare(config: &Config, store: &Store) -> Result<(), MigrateError> {
    let report = if config.migrate { store.migrate().await? } else { store.check().await? };
    for note in report.notes() {
        tracing::warn!("{note}");
    }
    tracing::info!(changed = report.changed(), "the database is ready");
    Ok(())
}

/// `worker migrate`: makes the tables that are missing, checks those that are there, and tells what it found.
///
/// # Errors
/// Where the database cannot be reached or does not fit.
pub async fn migrate_now(config: &Config) -> Result<Report, MigrateError> {
    Store::new(&config.database, 1).migrate().await
}
