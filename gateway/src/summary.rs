//! The gateway's line in the log now and then: what happened since the last one, where anything did. What is the
//! senders' doing (a 401, say) is counted here and in the metrics, and has no line of its own.

use shared::telemetry::{SUMMARY_EVERY, numbers};

use crate::journal::{Journal, State};
use crate::metrics::{Counts, Metrics};
use crate::top_sources::{Sources, Top};

/// Sums up.
pub struct Summary {
    metrics: Metrics,
    journal: Journal,
    last: Counts,
    sources: Sources,
}

impl Summary {
    /// Of what is counted in `metrics` from now on.
    pub fn new(metrics: Metrics, journal: Journal, sources: Sources) -> Self {
        Summary { last: metrics.counts(), metrics, journal, sources }
    }

    /// Sums up again and again. Never returns.
    pub async fn run(&mut self) {
        loop {
            tokio::time::sleep(SUMMARY_EVERY).await;
            self.tell();
        }
    }

    /// Sums up what happened since the last time; nothing, where nothing did.
    pub fn tell(&mut self) {
        self.warn_of_sources();
        let now = self.metrics.counts();
        let since = now.since(&self.last);
        self.last = now;
        if since.is_nothing() {
            return;
        }
        let stats = self.journal.stats();
        tracing::info!(
            accepted = since.accepted(),
            refused = since.refused(),
            reasons = numbers(since.reasons()),
            published = since.published,
            retries = since.retries,
            set_aside = stats.share(State::SetAside).tally.entries,
            confirmed = since.confirmed,
            repeats = since.repeats,
            unconfirmed = stats.unsettled().entries,
            "summary"
        );
    }

    /// Warns of the sources of wrong signatures and of repeated bodies. Each has one line, so that a flood is one line, too.
    fn warn_of_sources(&self) {
        if let Some(Top { events: wrong_signatures, sources }) = self.sources.wrong_signatures.take() {
            tracing::warn!(wrong_signatures, sources, "requests had a wrong signature; `sources` has the top five");
        }
        if let Some(Top { events: repeated_bodies, sources }) = self.sources.repeated_bodies.take() {
            let words = "bodies came again under other delivery ids; `sources` has the top five; \
                         GATEWAY_DUPLICATE_BODIES=once takes each once an hour";
            tracing::warn!(repeated_bodies, sources, "{words}");
        }
    }
}
