//! `ctr tasks metrics`.

use anyhow::Context;
use clap::Args;
use proto::containerd::services::tasks::v1::MetricsRequest;
use proto::io::containerd::cgroups::{v1, v2};

use crate::args::Format;
use crate::client::{Client, Tried};
use crate::json;
use crate::output::{self, Table};

/// Show what a container uses: memory in bytes, CPU time, processes
#[derive(Debug, Args)]
pub(crate) struct Metrics {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[arg(value_name = "CONTAINER")]
    id: String,
}

impl Metrics {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let request = MetricsRequest { filters: vec![format!("id=={}", self.id)] };
        let metrics =
            client.tasks().metrics(request).await.tried(|| format!("measure task {}", self.id))?.metrics;
        let metric = metrics
            .into_iter()
            .next()
            .with_context(|| format!("task {} has no metrics: does it run?", self.id))?;
        let data = metric.data.with_context(|| format!("the metrics of task {} are empty", self.id))?;
        if self.format == Format::Json {
            return json::print(&json::of_any(&data));
        }
        let rows = if proto::any::is::<v1::Metrics>(&data) {
            rows_v1(&proto::any::unpack(&data)?)
        } else {
            rows_v2(&proto::any::unpack(&data)?)
        };
        let mut head = Table::spaced(1, 4, &["ID", "TIMESTAMP"]);
        head.row([metric.id, output::time(metric.timestamp.as_ref())]);
        let mut table = Table::spaced(1, 4, &["METRIC", "VALUE"]);
        for (name, value) in rows {
            table.row([name.to_owned(), value]);
        }
        output::print(&format!("{}\n{}", head.text(), table.text()))
    }
}

fn rows_v1(metrics: &v1::Metrics) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if let Some(memory) = &metrics.memory {
        let usage = memory.usage.unwrap_or_default();
        rows.push(("memory.usage_in_bytes", usage.usage.to_string()));
        rows.push(("memory.limit_in_bytes", usage.limit.to_string()));
        rows.push(("memory.stat.cache", memory.total_cache.to_string()));
    }
    if let Some(usage) = metrics.cpu.as_ref().and_then(|cpu| cpu.usage.as_ref()) {
        rows.push(("cpuacct.usage", usage.total.to_string()));
        rows.push(("cpuacct.usage_percpu", format!("{:?}", usage.per_cpu).replace(',', "")));
    }
    if let Some(pids) = &metrics.pids {
        rows.push(("pids.current", pids.current.to_string()));
        rows.push(("pids.limit", pids.limit.to_string()));
    }
    rows
}

fn rows_v2(metrics: &v2::Metrics) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if let Some(pids) = &metrics.pids {
        rows.push(("pids.current", pids.current.to_string()));
        rows.push(("pids.limit", pids.limit.to_string()));
    }
    if let Some(cpu) = &metrics.cpu {
        rows.push(("cpu.usage_usec", cpu.usage_usec.to_string()));
        rows.push(("cpu.user_usec", cpu.user_usec.to_string()));
        rows.push(("cpu.system_usec", cpu.system_usec.to_string()));
        rows.push(("cpu.nr_periods", cpu.nr_periods.to_string()));
        rows.push(("cpu.nr_throttled", cpu.nr_throttled.to_string()));
        rows.push(("cpu.throttled_usec", cpu.throttled_usec.to_string()));
    }
    if let Some(memory) = &metrics.memory {
        rows.push(("memory.usage", memory.usage.to_string()));
        rows.push(("memory.usage_limit", memory.usage_limit.to_string()));
        rows.push(("memory.swap_usage", memory.swap_usage.to_string()));
        rows.push(("memory.swap_limit", memory.swap_limit.to_string()));
    }
    rows
}
