//! The gateway: takes Sentry's webhooks, verifies them, makes them durable, and answers.
//!
//! Read [`receive`] first: it is the way of one delivery through this process. [`signature`] and [`canonical`] say
//! what a genuine delivery is, [`publish`] where it goes, [`reject`] what everybody else is told, [`server`] keeps the
//! connections.

pub mod canonical;
pub mod journal;
pub mod publish;
pub mod receive;
pub mod reject;
pub mod server;
pub mod settings;
pub mod signature;

use std::sync::Arc;

use anyhow::Context as _;
use shared::ops::{self, Readiness};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use crate::settings::Config;

use crate::publish::Publisher;
use crate::receive::Gateway;

/// Serves until `shutdown`, then lets what is in flight end, for as long as the grace period lasts.
///
/// # Errors
/// Where the gateway cannot start: an address is taken, say. While NATS is not there it starts and waits.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let public = bind(config.listen, "GATEWAY_LISTEN").await?;
    let ops = bind(config.ops_listen, "GATEWAY_OPS_LISTEN").await?;
    let readiness = Readiness::default();
    let publisher = Publisher::start(&config.nats, &readiness, shutdown.clone()).await?;
    let gateway = Arc::new(Gateway::new(&config, publisher));
    tracing::info!(public = %public.local_addr()?, ops = %ops.local_addr()?, "listening");
    // Ops outlives the public listener, so that a stopping gateway can be watched.
    let ops_shutdown = CancellationToken::new();
    let ops = tokio::spawn(ops::serve(ops, readiness, ops_shutdown.clone()));
    server::run(public, gateway, &config, shutdown).await;
    ops_shutdown.cancel();
    ops.await.context("the ops listener failed")?;
    tracing::info!("stopped");
    Ok(())
}

async fn bind(address: std::net::SocketAddr, setting: &str) -> anyhow::Result<TcpListener> {
    let problem = || format!("cannot listen on {address}; is another program there? {setting} sets another address");
    TcpListener::bind(address).await.with_context(problem)
}
