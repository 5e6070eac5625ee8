//! What the gateway and the worker must agree on, and nothing else.
//!
//! # The way of one delivery
//!
//! Sentry waits one second for an answer and, for the usual integrations, never tries again. So the answer waits for
//! nothing but the delivery's own safety, and everything else happens behind it:
//!
//! 1. gateway `receive`: route, limits, read the body, verify the signature (`signature`, `canonical`). No match: 401.
//! 2. gateway `publish`: the raw body goes to JetStream, under the delivery's id ([`delivery`]). Only JetStream's ack
//!    makes it a 202; no ack within 900 ms is a 503.
//! 3. worker `pull`: a batch from the durable consumer ([`stream`]), shared by any number of workers.
//! 4. worker `interpret`: raw body to severity, priority, title, source. Pure: same bytes, same answer.
//! 5. worker `store`: one transaction a batch. The ledger's insert decides what is new.
//! 6. worker `pull` again: only after COMMIT the ack, and it is confirmed.
//!
//! A crash between any two steps repeats a step. The delivery id, made in 1 and the ledger's primary key in 5, makes
//! the repeat harmless.

pub mod delivery;
pub mod json;
pub mod ops;
pub mod settings;
pub mod shutdown;
pub mod stream;
pub mod telemetry;
