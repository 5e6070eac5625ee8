//! What lies behind is reached over TLS, and only whom the settings name is trusted: NATS and PostgreSQL as they are,
//! with certificates, keys and credentials made here.

mod certificates;
mod door;
mod nats;
mod postgres;
mod proxy;
mod servers;

use serde_json::Value;
use world::{Program, eventually};

/// Waits until a check of `/readyz` is not ok and says all of `words`.
async fn refuses(program: &Program, check: &str, words: &[&str]) {
    eventually(&format!("{check} to say {words:?}"), || async {
        let found = check_of(program, check).await?;
        let detail = found["detail"].as_str()?;
        (found["ok"] == false && words.iter().all(|word| detail.contains(word))).then_some(())
    })
    .await;
}

/// Waits until a check of `/readyz` is ok.
async fn takes(program: &Program, check: &str) {
    eventually(&format!("{check} to be ok"), || async {
        (check_of(program, check).await?["ok"] == true).then_some(())
    })
    .await;
}

async fn check_of(program: &Program, check: &str) -> Option<Value> {
    let list = program.ops("/readyz").await.json();
    list.as_array()?.iter().find(|entry| entry["name"] == check).cloned()
}
