//! Receipts: after COMMIT, the gateways that journalled these deliveries are told that they are stored (dead letters
//! included), so that they can let them go. See [`shared::receipt`].

use async_nats::Client;
use shared::receipt::{self, ReceiptTo};

use crate::pull::Pulled;

/// Sends the receipts of a batch that is stored.
pub async fn send(client: &Client, stored: &[Pulled]) {
    let wanted = stored.iter().filter_map(|pulled| ReceiptTo::of(pulled.headers()));
    for (subject, places) in receipt::messages(wanted) {
        // A receipt that is lost costs one repeat, which changes nothing and brings another receipt.
        if let Err(error) = client.publish(subject, places).await {
            tracing::debug!(%error, "a receipt was not sent");
        }
    }
}
