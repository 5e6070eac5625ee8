//! Receipts: after COMMIT, the gateways that journalled these deliveries are told that they are stored (dead letters
//! included), so that they can let them go. See [`shared::receipt`].

use async_nats::Client;
use async_nats::jetstream::Message;
use shared::receipt::{self, ReceiptTo};

/// Sends the receipts of a batch that is stored.
pub async fn send(client: &Client, stored: &[Message]) {
    let wanted = stored.iter().filter_map(|message| ReceiptTo::of(message.headers.as_ref()));
    for (subject, places) in receipt::messages(wanted) {
        // A receipt that is lost costs one repeat, which changes nothing and brings another receipt.
        if let Err(error) = client.publish(subject, places).await {
            tracing::debug!(%error, "a receipt was not sent");
        }
    }
}
