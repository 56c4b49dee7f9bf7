//! Captured packets as a pcapng file (draft-ietf-opsawg-pcapng), and the filter that people write.
//!
//! Owns the file's layout: two interfaces, one for the TUN device and one for the underlay, packets from the IP header on, the
//! direction as a flag, and why a packet was dropped as its comment. Fetches nothing.

use std::borrow::Cow;
use std::io::Write;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use pcap_file::DataLink;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption};

use crate::admin::protocol::PeerView;
use crate::admin::protocol::capture::{CaptureView, FilterView, PacketView, SideView};
use crate::admin::reasons;

/// Bits 0 and 1 of a packet's flags: its direction, seen from this machine's kernel.
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;
/// Timestamps are in nanoseconds.
const RESOLUTION: u8 = 9;

/// A file that is being written.
pub struct File<W: Write> {
    writer: PcapNgWriter<W>,
    /// When meshd started, since 1970.
    started: Duration,
    packets: u64,
}

impl<W: Write> File<W> {
    /// Writes the head of a file. `view` is an answer that has just come: it tells the device's name and meshd's clock.
    pub fn start(out: W, view: &CaptureView) -> anyhow::Result<Self> {
        let mut writer = PcapNgWriter::new(out)?;
        let interface = |name: String, what: &'static str| InterfaceDescriptionBlock {
            linktype: DataLink::RAW,
            snaplen: 0,
            options: vec![
                InterfaceDescriptionOption::IfName(Cow::Owned(name)),
                InterfaceDescriptionOption::IfDescription(Cow::Borrowed(what)),
                InterfaceDescriptionOption::IfTsResol(RESOLUTION),
            ],
        };
        writer.write_pcapng_block(interface(view.tun.clone(), "inner packets, at the TUN device"))?;
        let what = "outer datagrams, on the underlay; IP and UDP header as meshd knows them";
        writer.write_pcapng_block(interface("underlay".to_owned(), what))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let started = now.saturating_sub(Duration::from_micros(view.now_us));
        Ok(File { writer, started, packets: 0 })
    }

    /// Adds packets.
    pub fn add(&mut self, packets: &[PacketView]) -> anyhow::Result<()> {
        for packet in packets {
            let bytes = STANDARD.decode(&packet.bytes)?;
            let mut options = vec![EnhancedPacketOption::Flags(if packet.out { OUTBOUND } else { INBOUND })];
            if let Some(reason) = &packet.dropped {
                let meaning = reasons::explain(reason).unwrap_or_default();
                options.push(EnhancedPacketOption::Comment(Cow::Owned(format!("dropped: {reason}: {meaning}"))));
            }
            self.writer.write_pcapng_block(EnhancedPacketBlock {
                interface_id: if packet.side == SideView::Inner { 0 } else { 1 },
                timestamp: self.started + Duration::from_micros(packet.at_us),
                original_len: packet.length,
                data: Cow::Owned(bytes),
                options,
            })?;
            self.packets += 1;
        }
        self.writer.get_mut().flush()?;
        Ok(())
    }

    /// How many there are.
    pub fn packets(&self) -> u64 {
        self.packets
    }
}

/// Reads a filter: `[host ADDR] [net PREFIX] [peer NAME] [port N] [tcp|udp|icmp] [drop]`, with or without `and` in between.
pub fn filter(words: &[String], peers: &[PeerView]) -> Result<FilterView, String> {
    const HELP: &str = "a filter is `host ADDR`, `net PREFIX`, `peer NAME`, `port N`, `tcp`, `udp`, `icmp` and `drop`, all of \
                        which have to hold";
    let mut filter = FilterView::default();
    let mut words = words.iter().flat_map(|words| words.split_whitespace());
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("`{word}` lacks its value: {HELP}"));
        match word {
            "and" => {}
            "host" => {
                let text = value()?;
                let ip: IpAddr = text.parse().map_err(|_| format!("`{text}` is no address: {HELP}"))?;
                filter.nets.push(vec![ip.into()]);
            }
            "net" => {
                let text = value()?;
                filter.nets.push(vec![text.parse().map_err(|_| format!("`{text}` is no prefix: {HELP}"))?]);
            }
            "peer" => {
                let name = value()?;
                let peer = peers.iter().find(|peer| peer.name == name);
                let peer = peer.ok_or_else(|| format!("no peer is called `{name}`: `meshctl peers` shows them"))?;
                let endpoint = IpNet::from(peer.endpoint.ip());
                filter.nets.push(peer.subnets.iter().copied().chain([endpoint]).collect());
            }
            "port" => {
                let text = value()?;
                filter.ports.push(text.parse().map_err(|_| format!("`{text}` is no port: {HELP}"))?);
            }
            "tcp" => filter.protocol = Some(6),
            "udp" => filter.protocol = Some(17),
            "icmp" => filter.protocol = Some(1),
            "icmp6" => filter.protocol = Some(58),
            "drop" => filter.dropped = true,
            other => return Err(format!("`{other}` is nothing that is known here: {HELP}")),
        }
    }
    Ok(filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Result<FilterView, String> {
        filter(&[text.to_owned()], &[])
    }

    #[test]
    fn what_people_write() {
        let all = words("host 10.42.1.1 and net fd42::/16 tcp and port 80 port 443 drop").unwrap();
        let nets = vec![vec!["10.42.1.1/32".parse().unwrap()], vec!["fd42::/16".parse().unwrap()]];
        assert_eq!((all.nets, all.ports, all.protocol, all.dropped), (nets, vec![80, 443], Some(6), true));
        assert_eq!(filter(&[], &[]), Ok(FilterView::default()));
        for (wrong, says) in [
            ("host", "lacks"),
            ("host x", "no address"),
            ("port 70000", "no port"),
            ("peer b", "b"),
            ("not tcp", "not"),
        ] {
            let error = words(wrong).unwrap_err();
            assert!(error.contains(says), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_file_can_be_read_again() {
        let view = CaptureView { tun: "mesh0".to_owned(), now_us: 5, ..CaptureView::default() };
        let packet = PacketView {
            at_us: 2,
            side: SideView::Outer,
            out: true,
            dropped: Some("no_route".to_owned()),
            length: 9,
            bytes: STANDARD.encode(b"\x45bytes"),
        };
        let mut bytes = Vec::new();
        let mut file = File::start(&mut bytes, &view).unwrap();
        file.add(&[packet]).unwrap();
        assert_eq!(file.packets(), 1);
        let mut reader = pcap_file::pcapng::PcapNgReader::new(&bytes[..]).unwrap();
        let mut found = None;
        while let Some(block) = reader.next_block() {
            found = block.unwrap().into_owned().into_enhanced_packet().or(found);
        }
        let found = found.unwrap();
        assert_eq!((found.interface_id, found.original_len, &found.data[..]), (1, 9, &b"\x45bytes"[..]));
        assert!(
            found
                .options
                .iter()
                .any(|option| matches!(option, EnhancedPacketOption::Comment(text) if text.contains("no_route")))
        );
    }
}
