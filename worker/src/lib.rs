//! The worker: turns deliveries from the stream into signals and issues.
//!
//! Read [`pull`] first: it is the way of a batch through this process. [`interpret`] says what a delivery means,
//! [`payload`] how its body becomes jsonb, [`store`] how a batch is written once and only once, [`migrate`] what tables
//! it is written to. What an operator runs by hand is in [`commands`].

mod audit;
pub mod commands;
pub mod dead_letters;

pub mod interpret;
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

use std::time::Duration;

use anyhow::Context as _;
use futures_util::future::join_all;
use prometheus_client::registry::Registry;
use shared::ops::{self, Readiness};
use shared::stream::{self, until_ready};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use crate::settings::Config;

use crate::migrate::{MigrateError, Report};
use crate::pull::Puller;
use crate::store::Store;

/// Works until `shutdown`; then the batches in hand are stored or handed back, for as long as the grace period lasts.
///
/// # Errors
/// Where the worker cannot start: an address is taken, say. While NATS or PostgreSQL is not there it starts and waits.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let problem = || format!("cannot listen on {}; WORKER_OPS_LISTEN sets another address", config.ops_listen);
    let ops = TcpListener::bind(config.ops_listen).await.with_context(problem)?;
    tracing::info!(ops = %ops.local_addr()?, "listening");
    let readiness = Readiness::default();
    let ops_shutdown = CancellationToken::new();
    let ops = tokio::spawn(ops::serve(ops, readiness.clone(), Registry::default(), ops_shutdown.clone()));

    let client = config.nats.connect("worker", &readiness, |_| ()).await?;
    let store = Store::new(&config.database, config.concurrency);
    let work = work(&config, &client, &store, &readiness, &shutdown);
    let grace_is_over = async {
        shutdown.cancelled().await;
        tokio::time::sleep(config.grace).await;
    };
    tokio::select! {
        () = work => {}
        () = grace_is_over => tracing::warn!("the grace period is over; what was in hand is delivered again"),
    }
    // What was handed back must have left before the connection goes.
    let _ = tokio::time::timeout(Duration::from_secs(1), client.flush()).await;
    ops_shutdown.cancel();
    ops.await.context("the ops listener failed")?;
    tracing::info!("stopped");
    Ok(())
}

/// Waits for the database, then keeps as many pullers going as there are batches to be worked on at once.
async fn work(
    config: &Config,
    client: &async_nats::Client,
    store: &Store,
    readiness: &Readiness,
    shutdown: &CancellationToken,
) {
    readiness.set("consumer", Err("waits for the database".into()));
    let prepared = shutdown.run_until_cancelled(until_ready("database", readiness, || prepare(config, store)));
    if prepared.await.is_none() {
        return;
    }
    let context = stream::jetstream(client.clone());
    let pulling = (0..config.concurrency).map(|_| async {
        // A consumer that was deleted ends the pulling: made again, it goes on.
        while !shutdown.is_cancelled() {
            let consumer = until_ready("consumer", readiness, || stream::ensure_consumer(&context, &config.nats));
            let Some(consumer) = shutdown.run_until_cancelled(consumer).await else { return };
            let puller = Puller { client: client.clone(), consumer, store: store.clone(), batch_max: config.batch_max };
            if let Err(error) = puller.run(shutdown).await {
                tracing::warn!("pulling again: {error:#}");
            }
        }
    });
    join_all(pulling).await;
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
