//! What the metrics of both programs are made of, and those that both have.
//!
//! Names and units follow the conventions of Prometheus (<https://prometheus.io/docs/practices/naming/>): base units
//! (`_seconds`, `_bytes`), `_total` for what only grows. Values of labels are members of closed sets, known when the
//! program is built: nothing that a sender, a broker or a database says becomes one. The one exception are fingerprints of
//! client secrets: the operator sets those, and few are valid at once.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::link::Link;
use crate::ops::Readiness;
use crate::telemetry::suppressed_lines;

/// A label and its value.
pub type Label = (&'static str, String);

/// What of the source this program was built from, where the build says so (`BUILD_REVISION` in its environment).
const REVISION: Option<&str> = option_env!("BUILD_REVISION");

/// A metric for each member of a closed set, found by its place in it. All are there from the start: the rate of a
/// series that begins with its first event does not show that event. Clones share the numbers.
#[derive(Debug)]
pub struct Each<M>(Arc<[M]>);

impl<M> Clone for Each<M> {
    fn clone(&self) -> Self {
        Each(self.0.clone())
    }
}

impl<M> Each<M>
where
    M: EncodeMetric + TypedMetric + fmt::Debug + Send + Sync + 'static,
{
    /// That many of them, not registered.
    pub fn new(count: usize, make: impl Fn() -> M) -> Self {
        Each((0..count).map(|_| make()).collect())
    }

    /// One for each set of labels, registered under `name` (without unit and `_total`, which follow by themselves).
    pub fn register(
        registry: &mut Registry,
        name: &'static str,
        help: &'static str,
        unit: Option<Unit>,
        labels: Vec<Vec<Label>>,
        make: impl Fn() -> M,
    ) -> Self {
        let each = Each::new(labels.len(), make);
        registry.register_collector(Box::new(Registered { name, help, unit, labels, each: each.clone() }));
        each
    }

    /// The one at that place of the set.
    pub fn at(&self, place: usize) -> &M {
        &self.0[place]
    }

    /// All of them, in the set's order.
    pub fn iter(&self) -> impl Iterator<Item = &M> {
        self.0.iter()
    }
}

/// The labels of a set of names, for [`Each::register`].
pub fn labels(label: &'static str, names: impl IntoIterator<Item = &'static str>) -> Vec<Vec<Label>> {
    names.into_iter().map(|name| vec![(label, name.to_owned())]).collect()
}

#[derive(Debug)]
struct Registered<M> {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    labels: Vec<Vec<Label>>,
    each: Each<M>,
}

impl<M> Collector for Registered<M>
where
    M: EncodeMetric + TypedMetric + fmt::Debug + Send + Sync + 'static,
{
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut encoder = encoder.encode_descriptor(self.name, self.help, self.unit.as_ref(), M::TYPE)?;
        for (labels, metric) in self.labels.iter().zip(self.each.iter()) {
            metric.encode(encoder.encode_family(labels)?)?;
        }
        Ok(())
    }
}

/// A counter, registered.
pub fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    let counter = Counter::default();
    registry.register(name, help, counter.clone());
    counter
}

/// A gauge, registered.
pub fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    let gauge = Gauge::default();
    registry.register(name, help, gauge.clone());
    gauge
}

/// Registers what both programs tell of themselves. `program` begins the names; `version` is its own.
pub fn of_process(registry: &mut Registry, program: &'static str, version: &'static str, readiness: &Readiness) {
    // Without the full stop that the registry adds to every help text.
    let labels = [("version", version), ("revision", REVISION.unwrap_or("unknown"))];
    registry.register(format!("{program}_build"), "1, and which build this is", Info::new(labels));
    let started = Gauge::<f64, AtomicU64>::default();
    started.set(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    registry.register_with_unit("process_start_time", "When this process began, Unix time", Unit::Seconds, started);
    let help = "Lines of the log that were not written because too many of their kind came at once";
    registry.register("log_lines_suppressed", help, suppressed_lines());
    registry.register_collector(Box::new(Checks { name: format!("{program}_check_ok"), readiness: readiness.clone() }));
}

/// Registers the metric of a program's connection to NATS. `program` begins its name.
pub fn of_link(registry: &mut Registry, program: &'static str, link: &Link) {
    registry.register_collector(Box::new(Replaced {
        name: format!("{program}_nats_clients_replaced"),
        link: link.clone(),
    }));
}

/// Number of NATS clients that were replaced.
#[derive(Debug)]
struct Replaced {
    name: String,
    link: Link,
}

impl Collector for Replaced {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "NATS clients that were replaced: they had ended, as over a message that they cannot read, or too many answers never came";
        let replaced = ConstCounter::new(self.link.replaced());
        replaced.encode(encoder.encode_descriptor(&self.name, help, None, replaced.metric_type())?)
    }
}

/// The checks of `/readyz`.
struct Checks {
    name: String,
    readiness: Readiness,
}

impl fmt::Debug for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Collector for Checks {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "1 where a check of /readyz is well, else 0";
        let mut encoder = encoder.encode_descriptor(&self.name, help, None, Gauge::<i64>::TYPE)?;
        for (check, ok) in self.readiness.states() {
            ConstGauge::new(i64::from(ok)).encode(encoder.encode_family(&[("check", check)])?)?;
        }
        Ok(())
    }
}
