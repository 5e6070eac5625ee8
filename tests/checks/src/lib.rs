//! What must hold for any bytes whatever, of each part that reads what others wrote. Each check takes the bytes and panics
//! where something does not hold.
//!
//! Fuzzers look for bytes that break a check (`tests/fuzz`, which only calls these functions); the tests run the same
//! checks over what the fuzzers left behind (`tests/promises/fuzzed.rs`), so that what was found once stays mended.
//!
//! Whatever a check holds against the code it works out for itself, from the specification and in the plainest way:
//! [`javascript`] reads and writes JSON, [`segments`] writes journals, [`wire`] reads answers.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a check that panics is how a check fails")]

pub mod canonical;
pub mod http;
pub mod interpret;
pub mod javascript;
pub mod journal;
pub mod message;
mod segments;
mod wire;
