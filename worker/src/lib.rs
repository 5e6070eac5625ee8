//! The worker: turns deliveries from the stream into signals and issues.
//!
//! Read [`pull`] first: it is the way of a batch through this process. [`interpret`] says what a delivery means,
//! [`payload`] how its body becomes jsonb, [`store`] how a batch is written once and only once, [`migrate`] what tables
//! it is written to.

pub mod pull;
pub mod settings;

use anyhow::Context as _;
use shared::ops::{self, Readiness};
use shared::stream;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use crate::settings::Config;

/// Works until `shutdown`; then the batches in hand are finished, for as long as the grace period lasts.
///
/// # Errors
/// Where the worker cannot start: an address is taken, say. While NATS or PostgreSQL is not there it starts and waits.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    todo!()
}
