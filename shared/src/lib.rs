//! What the gateway and the worker must agree on, and nothing else.
//!
//! # The way of one delivery
//!
//! Sentry waits one second for an answer and, for the usual integrations, never tries again. So the answer waits for
//! nothing but the delivery's own safety, and everything else happens behind it:
//!
//! 1. gateway `receive`: route, limits, read the body, verify the signature (`signature`, `canonical`). No match: 401.
//! 2. gateway `journal`: append body and headers to a write-ahead journal, synced to disk. Only then 202; this is what
//!    202 promises.
//! 3. gateway `publish`: in the background, from the journal to JetStream, under the delivery's id ([`delivery`]).
//! 4. worker `pull`: a batch from the durable consumer ([`stream`]), shared by any number of workers.
//! 5. worker `interpret`: raw body to severity, priority, title, source. Pure: same bytes, same answer.
//! 6. worker `store`: one transaction a batch. The ledger's insert decides what is new. Only after COMMIT the ack.
//! 7. worker `receipt`: the worker tells the gateway that journalled a delivery that it is stored ([`receipt`]). The
//!    receipt, not JetStream's ack, settles the journal's entry.
//!
//! A crash between any two steps repeats a step. The delivery id, made in 1 and the ledger's primary key in 6, makes
//! the repeat harmless. And 7 closes the circle: whatever goes wrong between 3 and 6, in a broker that forgets what it
//! acknowledged, say, an entry without a receipt is looked after until it has one (gateway `confirm`).
//!
//! Input from the broker is hostile input. [`hostile`] states how both programs treat it.
//!
//! The trace that begins or goes on in 1 travels along ([`trace`]), onto every log line about the delivery.

pub mod check;
pub mod core_dumps;
pub mod delivery;
pub mod file;
pub mod hostile;
pub mod json;
pub mod link;
pub mod metrics;
pub mod nats;
pub mod operator;
pub mod ops;
pub mod receipt;
pub mod settings;
pub mod shutdown;
pub mod stream;
pub mod telemetry;
pub mod text;
pub mod tls;
pub mod trace;
