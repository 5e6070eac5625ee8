//! What is promised, a file a promise, each shown with real parts.

#![expect(clippy::unwrap_used, reason = "a test that panics says enough")]

mod attacks;
mod broker_changes;
mod canonical_form;
mod check;
mod commands;
mod contract;
mod dead_letters;
mod drills;
mod duplicate_bodies;
mod existing_stream;
mod fuzzed;
mod hard_bodies;
mod hidden_characters;
mod history;
mod identity;
mod journal;
mod leaving;
mod limits;
mod load;
mod logs;
mod meaning;
mod metrics;
mod old_journals;
mod older_worker;
mod outages;
mod pooler;
mod programs;
mod reconciliation;
mod refused_rows;
mod replay;
mod rotation;
mod signature_forms;
mod slow_database;
mod sources;
mod store;
mod tls;
mod trace;
mod trust;
mod wider_stream;
mod worker_outages;

use world::{Binaries, Setup};

/// A world with the programs of this tree.
fn setup() -> Setup {
    Setup::new(Binaries {
        gateway: env!("CARGO_BIN_EXE_gateway-under-test"),
        worker: env!("CARGO_BIN_EXE_worker-under-test"),
    })
}

/// A fixture: a payload of Sentry's shape, as it stands on the wire.
macro_rules! fixture {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/", $name, ".json"))
    };
}
use fixture;
