//! What is served over HTTP: metrics, to whoever collects them, and the debug socket, to whoever looks after this engine.
//!
//! ```text
//! GET  /v1/metrics          both          Prometheus' text form
//! GET  /debug/config        debug socket  the configuration that the engine runs with, as a file
//! GET  /debug/log-level     debug socket  the level that is logged
//! PUT  /debug/log-level     debug socket  sets it, until the next reload or start: trace, debug, info, warn or error
//! ```

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::{TcpListener, UnixListener};

use crate::config::{self, MetricsAddress};
use crate::metrics::Metrics;
use crate::serving;

/// Sets the level that is logged.
pub type SetLevel = Arc<dyn Fn(tracing::Level) -> anyhow::Result<()> + Send + Sync>;

/// What the debug socket shows and changes.
#[derive(Clone)]
pub struct Debug {
    /// The configuration, as a file.
    pub config: Arc<str>,
    /// The level that is logged now.
    pub level: Arc<Mutex<tracing::Level>>,
    /// Sets it.
    pub set_level: SetLevel,
}

/// Serves metrics, until the engine ends.
pub async fn serve_metrics(address: &MetricsAddress, metrics: Metrics) -> anyhow::Result<()> {
    let router = metrics_router(metrics);
    match address {
        MetricsAddress::Tcp(address) => {
            let listener = TcpListener::bind(address).await.with_context(|| {
                format!("cannot listen on {address} for metrics (metrics.address in the configuration)")
            })?;
            spawn("metrics", async move { axum::serve(listener, router).await });
        }
        MetricsAddress::Unix(socket) => {
            let listener = serving::bind(socket)?;
            spawn("metrics", async move { axum::serve(listener, router).await });
        }
    }
    Ok(())
}

/// Serves the debug socket, until the engine ends.
pub fn serve_debug(listener: UnixListener, metrics: Metrics, debug: Debug) {
    let router = Router::new()
        .route("/debug/config", get(|State(debug): State<Debug>| async move { debug.config.to_string() }))
        .route("/debug/log-level", get(level).put(set_level))
        .with_state(debug)
        .merge(metrics_router(metrics));
    spawn("the debug socket", async move { axum::serve(listener, router).await });
}

fn spawn(what: &'static str, serving: impl Future<Output = std::io::Result<()>> + Send + 'static) {
    tokio::spawn(async move {
        if let Err(error) = serving.await {
            tracing::error!(%error, "{what} can no longer be served");
        }
    });
}

fn metrics_router(metrics: Metrics) -> Router {
    let answer = move || {
        let text = metrics.text();
        async move { ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text) }
    };
    Router::new().route("/v1/metrics", get(answer))
}

async fn level(State(debug): State<Debug>) -> String {
    let level = *debug.level.lock().unwrap_or_else(PoisonError::into_inner);
    format!("{}\n", level.to_string().to_lowercase())
}

async fn set_level(State(debug): State<Debug>, body: String) -> impl IntoResponse {
    let level = match config::parse_level(body.trim()) {
        Ok(level) => level,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("{error:#}\n")),
    };
    match (debug.set_level)(level) {
        Ok(()) => {
            *debug.level.lock().unwrap_or_else(PoisonError::into_inner) = level;
            tracing::info!(%level, "the log level was set on the debug socket");
            (StatusCode::OK, String::new())
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")),
    }
}
