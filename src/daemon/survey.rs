//! Who reaches whom: this node's own view, and those of the peers that say theirs.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::view::{Shared, lock};
use crate::admin::protocol::{Encryption, PairView, PeerState, SurveyView, TargetView};
use crate::admin::server::Mesh;
use crate::engine::tables::Tables;
use crate::health::peer::{SURVEYED, Verdict};
use crate::node::{Mac, first_address};
use crate::wire::survey::Entry;

/// How long sessions that have just begun may take to come up: a packet a second goes either way until then.
const SETTLE: Duration = Duration::from_millis(2_500);
/// How long peers that are up may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);

impl Shared {
    /// Has everybody find out about everybody, as far as the mesh is not too large for that, and collects what they say.
    pub(super) async fn ask_around(&self) -> SurveyView {
        if self.tables.load().peers().len() > SURVEYED {
            let answers = self.collect(false, Duration::ZERO).await;
            return self.told(&answers);
        }
        self.wake_all();
        let mut answers = self.collect(true, SETTLE).await;
        if answers.values().flatten().any(|entry| entry.state == Verdict::Unknown as u8) {
            sleep(SETTLE).await;
            answers = self.collect(false, Duration::ZERO).await;
        }
        self.told(&answers)
    }

    fn wake_all(&self) {
        let now_us = self.started.elapsed().as_micros() as u64;
        let tables = self.tables.load();
        for peer in tables.peers() {
            peer.spec.liveness.as_deref().inspect(|liveness| liveness.wake(now_us));
        }
    }

    /// What each peer says. For those that are not up yet it waits so long.
    async fn collect(&self, wake: bool, settle: Duration) -> HashMap<String, Vec<Entry>> {
        let (number, start) = (self.started.elapsed().as_micros() as u64, Instant::now());
        let mut answers = HashMap::new();
        loop {
            let tables = self.tables.load_full();
            let (mut missing, mut not_up) = (false, false);
            for peer in tables.peers() {
                let name = peer.spec.name.as_str();
                let Some(liveness) = peer.spec.liveness.as_deref().filter(|_| !answers.contains_key(name)) else {
                    continue;
                };
                if let Some(entries) = liveness.surveyed(number) {
                    answers.insert(name.to_owned(), entries);
                } else if liveness.verdict() == Verdict::Up {
                    liveness.survey(number, wake);
                    missing = true;
                } else {
                    not_up = true;
                }
            }
            let passed = start.elapsed();
            if passed >= ANSWER || (!missing && (!not_up || passed >= settle)) {
                return answers;
            }
            sleep(LOOK).await;
        }
    }

    fn told(&self, answers: &HashMap<String, Vec<Entry>>) -> SurveyView {
        let (list, tables) = (self.list.load_full(), self.tables.load_full());
        let names: HashMap<Mac, &str> = list.nodes.iter().map(|node| (node.mac, node.name.as_str())).collect();
        let own = self.peers().into_iter().map(|peer| PairView {
            from: self.node.to_string(),
            to: peer.name,
            state: peer.state,
            encryption: peer.encryption,
            path_mtu: peer.path_mtu,
            rtt_us: peer.rtt_us,
        });
        let mut pairs: Vec<PairView> = own.collect();
        for (from, entries) in answers {
            let named = entries.iter().filter_map(|entry| Some((entry, *names.get(&Mac(entry.mac))?)));
            pairs.extend(named.map(|(entry, to)| pair(from, to, entry)));
        }
        pairs.sort_by(|a, b| (&a.from, &a.to).cmp(&(&b.from, &b.to)));
        let silent = tables.peers().iter().map(|peer| peer.spec.name.as_str());
        let silent = silent.filter(|name| !answers.contains_key(*name)).map(str::to_owned).collect();
        SurveyView { node: self.node.to_string(), pairs, silent, targets: self.targets(&tables) }
    }

    /// An address of each peer for each family that both have.
    fn targets(&self, tables: &Tables) -> Vec<TargetView> {
        let overlay = lock(&self.overlay).clone();
        let local = tables.local();
        let mut targets = Vec::new();
        for peer in tables.peers() {
            for v4 in [true, false] {
                let source = overlay.iter().find(|ip| ip.is_ipv4() == v4);
                let subnet = peer.spec.subnets.iter().find(|net| net.addr().is_ipv4() == v4);
                let (Some(source), Some(subnet)) = (source, subnet) else { continue };
                // as this node has its own: the network's address or the first
                let network = local.subnets.iter().any(|net| net.network() == *source && first_address(net) != *source);
                let address: IpAddr = if network { subnet.network() } else { first_address(subnet) };
                let headers = if v4 { 28 } else { 48 };
                let ping_payload = u32::from(peer.mtu().min(local.mtu)).saturating_sub(headers);
                targets.push(TargetView { node: peer.spec.name.to_string(), address, source: *source, ping_payload });
            }
        }
        targets
    }
}

fn pair(from: &str, to: &str, entry: &Entry) -> PairView {
    PairView {
        from: from.to_owned(),
        to: to.to_owned(),
        state: match entry.state {
            1 => PeerState::Up,
            2 => PeerState::Down,
            _ => PeerState::Unknown,
        },
        encryption: if entry.sealed { Encryption::Wireguard } else { Encryption::None },
        path_mtu: entry.mtu.into(),
        rtt_us: Some(u64::from(entry.round_trip_us)).filter(|us| *us > 0),
    }
}
