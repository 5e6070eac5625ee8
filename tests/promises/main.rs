//! What this project promises, one file a promise.

#![expect(clippy::unwrap_used, reason = "a test that panics says enough")]

mod canonical_form;
