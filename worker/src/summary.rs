//! The worker's line in the log now and then: what happened since the last one, where anything did.

use shared::telemetry::{SUMMARY_EVERY, numbers};

use crate::metrics::{Counts, Metrics};

/// Sums up.
pub(crate) struct Summary {
    metrics: Metrics,
    last: Counts,
}

impl Summary {
    /// Of what is counted in `metrics` from now on.
    pub(crate) fn new(metrics: Metrics) -> Self {
        Summary { last: metrics.counts(), metrics }
    }

    /// Sums up again and again. Never returns.
    pub(crate) async fn run(&mut self) {
        loop {
            tokio::time::sleep(SUMMARY_EVERY).await;
            self.tell();
        }
    }

    /// Sums up what happened since the last time; nothing, where nothing did.
    pub(crate) fn tell(&mut self) {
        let now = self.metrics.counts();
        let since = now.since(&self.last);
        self.last = now;
        if since.is_nothing() {
            return;
        }
        let [stored, known, dead] = since.fates;
        tracing::info!(
            stored,
            known,
            dead,
            retries = since.retries.iter().sum::<u64>(),
            classes = numbers(since.classes()),
            lag = self.metrics.pending(),
            "summary"
        );
    }
}
