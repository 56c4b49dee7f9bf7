//! Whether TCP super-packets leave uncut: where the network card, or nobody on a virtual link, cuts what lies in a tunnel.
//!
//! Owns the decision, which is looked at again whenever the host changes and each second. Everything that speaks against it
//! has a reason, which `meshctl stats` shows.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::data_plane::NO_SUPER_PACKETS;
use crate::config::{Config, Io};
use crate::host::{Host, Underlay, outgoing_policies};
use crate::io::tunnel_gso::TunnelGso;
use crate::sys::ethtool;

/// Features by the names that `ethtool -k` uses. With these the device cuts TCP in a tunnel and computes the outer checksum,
/// without which Linux does not join the datagrams again for a receiving socket (GRO).
const CUTS_TUNNELS: [&str; 3] = ["tx-udp_tnl-csum-segmentation", "tx-tcp-segmentation", "tx-tcp6-segmentation"];

/// For how long super-packets are cut here when some came back: at first, and at most. It doubles each time.
const PENANCE: Duration = Duration::from_secs(30);
const LONGEST_PENANCE: Duration = Duration::from_secs(3600);

/// The switch, and what it takes to use it.
pub(super) struct UncutSwitch {
    /// The way out.
    pub way: Arc<TunnelGso>,
    /// Loaded at the start, since that needs a privilege which is given up then. Else why there is none, or why it is of no
    /// use: not tried again, since to make a device and take it away would be news for everybody who watches devices.
    program: Result<OwnedFd, String>,
    penance: Duration,
    /// Some came back: until then it is not tried again.
    off_until: Option<Instant>,
}

impl UncutSwitch {
    /// Off until the first look.
    pub(super) fn new(config: &Config) -> Self {
        let program = match config.tunnel_gso {
            _ if config.io == Io::Tokio => Err(NO_SUPER_PACKETS.to_owned()),
            false => Err("`tunnel-gso: off`".to_owned()),
            true => TunnelGso::load().map_err(|error| {
                format!("the kernel takes no program for it ({error}): Linux 6.17 does, where meshd has CAP_BPF")
            }),
        };
        let why = program.as_ref().err().cloned().unwrap_or_else(|| "not yet looked at".to_owned());
        UncutSwitch { way: Arc::new(TunnelGso::off(why)), program, penance: PENANCE, off_until: None }
    }

    /// Looks who cuts, and switches.
    pub(super) async fn look(
        &mut self,
        host: &Host,
        tun: &str,
        underlays: &[Underlay],
        clear_peers: bool,
        super_packets: bool,
    ) {
        let before = self.way.state().is_ok();
        let returned = self.way.returned();
        if returned > 0 {
            tracing::warn!(
                "{returned} super-packets came back: for what is forwarded the routing table has no way to some peer; they are \
                 cut here for {} s",
                self.penance.as_secs()
            );
            self.off_until = Some(Instant::now() + self.penance);
            self.penance = LONGEST_PENANCE.min(2 * self.penance);
        }
        let decided = match (clear_peers, super_packets) {
            (_, false) => Err("the TUN device hands over no super-packets".to_owned()),
            (false, _) => Err("there is no peer in the clear".to_owned()),
            _ => self.decide(host, tun, underlays).await,
        };
        match decided {
            Ok((v4, v6)) => self.way.switch(v4, v6, String::new()),
            Err(why) => self.way.switch(false, false, why),
        }
        match (before, self.way.state()) {
            (false, Ok(())) => tracing::info!("TCP super-packets for clear peers leave uncut from now on"),
            (true, Err(why)) => tracing::info!("TCP super-packets are cut here from now on: {why}"),
            _ => {}
        }
    }

    async fn decide(&mut self, host: &Host, tun: &str, underlays: &[Underlay]) -> Result<(bool, bool), String> {
        let program = self.program.as_ref().map_err(Clone::clone)?;
        let (mut v4, mut v6, mut others) = (false, false, Vec::new());
        for Underlay { ip, ifname, .. } in underlays {
            match devices(ifname).map(|devices| speaks_against(&devices)) {
                Ok(None) if ip.is_ipv4() => v4 = true,
                Ok(None) => v6 = true,
                Ok(Some(why)) => others.push(why),
                Err(error) => others.push(format!("what {ifname} offloads cannot be read: {error}")),
            }
        }
        if !v4 && !v6 {
            return Err(others.join("; "));
        }
        if self.off_until.is_some_and(|until| Instant::now() < until) {
            return Err(
                "some came back, for want of a way: `ip route get PEER iif DEVICE` shows what forwarded packets find"
                    .to_owned(),
            );
        }
        match outgoing_policies() {
            Ok(0) => {}
            Ok(policies) => {
                return Err(format!("{policies} IPsec policies have what leaves this host encrypted first"));
            }
            Err(error) => return Err(format!("whether there are IPsec policies cannot be read: {error}")),
        }
        if let Err(error) = self.way.open(tun, program) {
            let why = error.to_string();
            self.program = Err(why.clone());
            return Err(why);
        }
        // others may set them back: a change of net.ipv4.ip_forward is one for every device
        host.ensure_outlet(&TunnelGso::device(tun)).await?;
        Ok((v4, v6))
    }
}

/// A network device and what it has switched on.
struct Device {
    name: String,
    active: Vec<String>,
}

/// A device and those that carry it, such as the cards of a bond.
fn devices(ifname: &str) -> io::Result<Vec<Device>> {
    let (mut names, mut devices) = (vec![ifname.to_owned()], Vec::new());
    while let Some(name) = names.get(devices.len()).cloned() {
        // where that cannot be read, the device has to speak for itself
        for entry in fs::read_dir(format!("/sys/class/net/{name}")).into_iter().flatten().flatten() {
            let entry = entry.file_name();
            let lower = entry.to_str().and_then(|entry| entry.strip_prefix("lower_"));
            names.extend(lower.filter(|lower| names.iter().all(|name| name != lower)).map(str::to_owned));
        }
        devices.push(Device { active: ethtool::active(&name)?, name });
    }
    Ok(devices)
}

/// Why super-packets should not leave uncut by these devices, if so. Who is carried by others may take what these do not.
fn speaks_against(devices: &[Device]) -> Option<String> {
    devices.iter().find_map(|Device { name, active }| {
        let missing = CUTS_TUNNELS.iter().find(|feature| active.iter().all(|active| active != *feature))?;
        Some(format!("{name} does not cut what lies in a tunnel ({missing} is off)"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, features: &[&str]) -> Device {
        Device { name: name.to_owned(), active: features.iter().map(|feature| (*feature).to_owned()).collect() }
    }

    #[test]
    fn a_card_that_cuts_tunnels() {
        assert_eq!(speaks_against(&[device("eth0", &CUTS_TUNNELS)]), None);
        for missing in CUTS_TUNNELS {
            let features =
                CUTS_TUNNELS.map(|feature| if feature == missing { "tx-udp_tnl-segmentation" } else { feature });
            let why = format!("eth0 does not cut what lies in a tunnel ({missing} is off)");
            assert_eq!(speaks_against(&[device("eth0", &features)]), Some(why));
        }
    }

    #[test]
    fn who_is_above_others_says_what_they_may_not_do() {
        let bond = |cards: [&[&str]; 2]| {
            let [eth0, eth1] = cards;
            speaks_against(&[device("bond0", &CUTS_TUNNELS), device("eth0", eth0), device("eth1", eth1)])
        };
        assert_eq!(bond([&CUTS_TUNNELS, &CUTS_TUNNELS]), None);
        let why = bond([&CUTS_TUNNELS, &[]]).unwrap();
        assert_eq!(why, "eth1 does not cut what lies in a tunnel (tx-udp_tnl-csum-segmentation is off)");
        let vlan = speaks_against(&[device("eth0.5", &[]), device("eth0", &CUTS_TUNNELS)]);
        assert!(vlan.unwrap().starts_with("eth0.5 does not cut"));
    }

    #[test]
    fn a_device_comes_first_of_those_that_carry_it() {
        let devices = devices("lo").unwrap();
        assert_eq!(devices.first().map(|device| device.name.as_str()), Some("lo"));
        assert!(super::devices("no-such-dev0").is_err());
    }
}
