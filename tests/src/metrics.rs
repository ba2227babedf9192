//! What daemons tell Prometheus.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::{STEP_TIME_MAX, Scenario};

/// Switches the metrics of a daemon on.
pub const METRICS: &str = "metrics = \"127.0.0.1:0\"";

/// What a daemon tells Prometheus, by name and labels.
pub type Metrics = BTreeMap<String, f64>;

/// Where `daemon` serves its metrics.
pub async fn metrics_address(scenario: &mut Scenario, daemon: &str) -> SocketAddr {
    scenario.rig.wait_log(daemon, "metrics address=").await.unwrap();
    let log =
        std::fs::read_to_string(scenario.folder.path().join(format!("{daemon}.log"))).unwrap();
    let address = log.split("metrics address=").nth(1).unwrap().split_whitespace().next();
    address.unwrap().parse().unwrap()
}

/// What is served there now.
pub fn scrape(address: SocketAddr) -> Metrics {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let ours = text.lines().filter(|line| line.starts_with("backhaul_"));
    let pair = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    ours.map(pair).collect()
}

/// Scrapes until the metrics are as `wanted` says.
pub async fn wait_metrics(
    address: SocketAddr,
    what: &str,
    wanted: impl Fn(&Metrics) -> bool,
) -> Metrics {
    let (began, mut looks) = (Instant::now(), tokio::time::interval(Duration::from_millis(50)));
    loop {
        looks.tick().await;
        let metrics = scrape(address);
        if wanted(&metrics) {
            return metrics;
        }
        assert!(began.elapsed() < STEP_TIME_MAX, "{what} did not happen: {metrics:?}");
    }
}
