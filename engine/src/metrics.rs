//! What the engine counts, in Prometheus' text form at `/v1/metrics` when `metrics.address` is configured.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::watch;

/// The labels of a method's series. Only methods that exist are counted, so their number is bounded.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Method {
    service: String,
    method: String,
}

/// The labels of an ended call.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ended {
    service: String,
    method: String,
    code: String,
}

/// The engine's metrics; cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    ended: Family<Ended, Counter>,
    seconds: Family<Method, Histogram>,
    in_flight: Gauge,
    begun: watch::Sender<()>,
}

impl Default for Metrics {
    fn default() -> Self {
        // From a quarter of a millisecond to about four seconds, doubling.
        let seconds = Family::new_with_constructor(
            (|| Histogram::new(exponential_buckets(0.000_25, 2.0, 15))) as fn() -> _,
        );
        let (ended, in_flight) = (Family::default(), Gauge::default());
        let mut registry = Registry::with_prefix("gantry");
        registry.register("grpc_calls", "gRPC calls that have been answered", ended.clone());
        registry.register_with_unit(
            "grpc_call",
            "Time to the answer of a gRPC call",
            Unit::Seconds,
            seconds.clone(),
        );
        registry.register("grpc_calls_in_flight", "gRPC calls being worked on", in_flight.clone());
        Metrics { registry: Arc::new(registry), ended, seconds, in_flight, begun: watch::Sender::new(()) }
    }
}

impl Metrics {
    /// Counts a call that begins; how many are in flight now, this one included.
    pub fn begin(&self) -> i64 {
        self.begun.send_replace(());
        self.in_flight.inc() + 1
    }

    /// Changes whenever a call begins.
    pub fn begun(&self) -> watch::Receiver<()> {
        self.begun.subscribe()
    }

    /// Counts a call that has left, whatever became of it.
    pub fn leave(&self) {
        self.in_flight.dec();
    }

    /// Counts a call that was answered: path is `/SERVICE/METHOD`, code the name of its gRPC status.
    pub fn answered(&self, path: &str, code: tonic::Code, took: Duration) {
        let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
            return;
        };
        if code == tonic::Code::Unimplemented {
            // The path may be anything a client has made up.
            return;
        }
        let (service, method) = (service.to_owned(), method.to_owned());
        self.seconds
            .get_or_create(&Method { service: service.clone(), method: method.clone() })
            .observe(took.as_secs_f64());
        self.ended.get_or_create(&Ended { service, method, code: format!("{code:?}") }).inc();
    }

    /// The text form.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted() {
        let metrics = Metrics::default();
        assert_eq!(metrics.begin(), 1);
        metrics.answered("/a.B/C", tonic::Code::Ok, Duration::from_millis(3));
        metrics.answered("/made/up", tonic::Code::Unimplemented, Duration::ZERO);
        let text = metrics.text();
        assert!(
            text.contains("gantry_grpc_calls_total{service=\"a.B\",method=\"C\",code=\"Ok\"} 1"),
            "{text}"
        );
        assert!(text.contains("gantry_grpc_calls_in_flight 1"), "{text}");
        assert!(!text.contains("made"), "{text}");
        metrics.leave();
        assert!(metrics.text().contains("gantry_grpc_calls_in_flight 0"));
    }
}
