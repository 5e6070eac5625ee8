//! What the log says of each delivery once its batch is committed.

use std::collections::HashMap;

use shared::delivery::trace_of_message;
use shared::trace::TraceId;
use tracing::Level;
use tracing::field::{DisplayValue, display};

use super::{Batch, Origin, SetBack, Stored};

/// Tells what became of each delivery of a committed batch: of what is stored at debug, of dead letters as warnings.
pub(crate) fn tell(stored: &Stored, batch: &Batch) {
    let Stored { fresh, dead, known, set_back: _ } = stored;
    let each = tracing::enabled!(Level::DEBUG);
    if dead.is_empty() && !each {
        return;
    }
    let traces = Traces::of(batch);
    for dead in dead {
        let (id, reason) = (&dead.delivery_id, &dead.reason);
        tracing::warn!(delivery.id = id, trace.id = traces.of_delivery(id), reason, "a delivery became a dead letter");
    }
    if each {
        for id in fresh {
            tracing::debug!(delivery.id = id, trace.id = traces.of_delivery(id), "stored a delivery");
        }
        for id in known {
            tracing::debug!(delivery.id = id, trace.id = traces.of_delivery(id), "a delivery was stored before");
        }
        tracing::debug!(fresh = fresh.len(), known = known.len(), dead = dead.len(), "stored a batch");
    }
}

/// Tells of deliveries of `batch` that are set back for the first time.
pub(crate) fn tell_set_back(rows: &[&SetBack], batch: &Batch) {
    if rows.is_empty() {
        return;
    }
    let traces = Traces::of(batch);
    for SetBack { delivery_id, sqlstate, reason } in rows {
        let trace = traces.of_delivery(delivery_id);
        tracing::warn!(
            delivery.id = delivery_id,
            trace.id = trace,
            sqlstate,
            "a delivery is set back, the others of its batch are stored: {reason}. Look at the triggers of its table. The \
             delivery is tried again within 5 minutes, until it is stored"
        );
    }
}

/// The traces of a batch's deliveries.
struct Traces<'a>(HashMap<&'a str, TraceId>);

impl<'a> Traces<'a> {
    fn of(batch: &'a Batch) -> Self {
        let records = batch.records.iter().map(|record| (record.delivery_id.as_str(), &record.origin));
        let letters = batch.dead_letters.iter().map(|letter| (letter.delivery_id.as_str(), &letter.origin));
        let trace = |(id, origin): (&'a str, &Origin)| Some((id, trace_of_message(Some(&origin.headers))?.trace_id()));
        Traces(records.chain(letters).filter_map(trace).collect())
    }

    fn of_delivery(&self, id: &str) -> Option<DisplayValue<TraceId>> {
        self.0.get(id).copied().map(display)
    }
}
