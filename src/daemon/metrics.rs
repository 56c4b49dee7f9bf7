//! Metrics for Prometheus over HTTP, where `metrics-address` is set.
//!
//! Counters are read when somebody scrapes; nothing is counted for this alone. Names and labels are a contract, as the JSON
//! fields of the admin socket are.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelValue, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::view::Shared;
use crate::admin::protocol::{PeerState, PeerView, StatsView, StatusView, TrafficView};
use crate::admin::server::Mesh;

/// Scrapes at once; who comes too many is turned away.
const CLIENTS: usize = 8;
/// How long a connection lasts at most.
const PATIENCE: Duration = Duration::from_secs(30);
const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A server that is bound.
pub(super) struct Metrics(TcpListener);

impl Metrics {
    pub(super) async fn bind(address: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await;
        Ok(Metrics(listener.with_context(|| format!("cannot serve metrics on {address} (`metrics-address`)"))?))
    }

    /// Serves for as long as it is polled.
    pub(super) async fn serve(self, shared: Arc<Shared>) {
        let free = Arc::new(Semaphore::new(CLIENTS));
        loop {
            let Ok((stream, _)) = self.0.accept().await else {
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            let Ok(place) = free.clone().try_acquire_owned() else { continue };
            let shared = shared.clone();
            tokio::spawn(async move {
                timeout(PATIENCE, converse(stream, shared)).await.ok();
                drop(place);
            });
        }
    }
}

async fn converse(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(answer(&request, &shared)) }
    });
    if let Err(error) = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!("a scrape ended: {error}");
    }
}

fn answer(request: &Request<Incoming>, shared: &Shared) -> Response<Full<Bytes>> {
    let plain = |status, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n".to_owned());
    }
    let mut registry = Registry::default();
    let views = Views { peers: shared.peers(), stats: shared.stats(), status: shared.status() };
    registry.register_collector(Box::new(views));
    let mut text = String::new();
    if encode(&mut text, &registry).is_err() {
        return plain(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written\n".to_owned());
    }
    let mut response = plain(StatusCode::OK, text);
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(TEXT));
    response
}

#[derive(Debug)]
struct Views {
    peers: Vec<PeerView>,
    stats: StatsView,
    status: StatusView,
}

impl Collector for Views {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        self.node(&mut encoder)?;
        self.peers(&mut encoder)
    }
}

impl Views {
    fn node(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Views { stats, status, .. } = self;
        let node = stats.node.as_str();
        let info = [("node", node), ("version", &stats.version), ("io", &stats.io)];
        gauges(encoder, "meshd_node", "This node; always 1.", [(info, 1.0)])?;
        let alone = |value: f64| [([("node", node)], value)];
        let ready = f64::from(u8::from(status.ready));
        gauges(encoder, "meshd_ready", "Whether packets can cross.", alone(ready))?;
        gauges(encoder, "meshd_uptime_seconds", "Since meshd started.", alone(stats.uptime_ms as f64 / 1e3))?;
        gauges(encoder, "meshd_mtu_bytes", "MTU of the TUN device.", alone(f64::from(status.mtu)))?;
        let each = |read: fn(&TrafficView) -> [u64; 2]| {
            let sides = [("tun", read(&stats.tun)), ("udp", read(&stats.udp))];
            sides.into_iter().flat_map(|(side, [rx, tx])| {
                [([("side", side), ("direction", "rx")], rx), ([("side", side), ("direction", "tx")], tx)]
            })
        };
        let packets = each(|traffic| [traffic.rx_packets, traffic.tx_packets]);
        counters(encoder, "meshd_packets", "Packets read (rx) and written (tx).", packets)?;
        let bytes = each(|traffic| [traffic.rx_bytes, traffic.tx_bytes]);
        counters(encoder, "meshd_bytes", "Bytes read (rx) and written (tx).", bytes)?;
        let own = [([("kind", "originated")], stats.originated), ([("kind", "consumed")], stats.consumed)];
        counters(encoder, "meshd_own_packets", "Packets that meshd made or kept itself.", own)?;
        let drops = stats.drops.iter().map(|(reason, n)| ([("reason", reason.as_str())], *n));
        counters(encoder, "meshd_drops", "Packets that were dropped, by reason.", drops)
    }

    fn peers(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let each = |read: fn(&PeerView) -> Option<f64>| {
            self.peers.iter().filter_map(move |peer| Some(([("peer", peer.name.as_str())], read(peer)?)))
        };
        let up = each(|peer| match peer.state {
            PeerState::Up => Some(1.0),
            PeerState::Down => Some(0.0),
            PeerState::Unknown => None,
        });
        gauges(encoder, "meshd_peer_up", "1 up, 0 down; missing where nobody can tell.", up)?;
        let rtt = each(|peer| peer.rtt_us.map(|us| us as f64 / 1e6));
        gauges(encoder, "meshd_peer_rtt_seconds", "Smoothed round trip.", rtt)?;
        let loss = each(|peer| peer.loss_permille.map(|lost| f64::from(lost) / 1e3));
        gauges(encoder, "meshd_peer_loss_ratio", "Lost of the last 64 probes.", loss)?;
        let mtu = each(|peer| Some(f64::from(peer.path_mtu)));
        gauges(encoder, "meshd_peer_path_mtu_bytes", "The longest inner packet that reaches it.", mtu)?;
        let seen = each(|peer| peer.last_seen_ms.map(|ms| ms as f64 / 1e3));
        gauges(encoder, "meshd_peer_last_seen_seconds", "Age of the last datagram from it.", seen)?;
        let traffic = |read: fn(&PeerView) -> [u64; 2]| {
            self.peers.iter().flat_map(move |peer| {
                let ([rx, tx], name) = (read(peer), peer.name.as_str());
                [([("peer", name), ("direction", "rx")], rx), ([("peer", name), ("direction", "tx")], tx)]
            })
        };
        let packets = traffic(|peer| [peer.rx_packets, peer.tx_packets]);
        counters(encoder, "meshd_peer_packets", "Inner packets from (rx) and to (tx) the peer.", packets)?;
        let bytes = traffic(|peer| [peer.rx_bytes, peer.tx_bytes]);
        counters(encoder, "meshd_peer_bytes", "Inner bytes from (rx) and to (tx) the peer.", bytes)
    }
}

fn counters<K: EncodeLabelValue, const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = ([(&'static str, K); N], u64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauges<K: EncodeLabelValue, const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = ([(&'static str, K); N], f64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
