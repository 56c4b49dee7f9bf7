//! What `capture` asks, handed on to the workers' tap.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::view::Shared;
use crate::admin::protocol::capture::{Ask, CaptureView, FilterView, PacketView, SideView};
use crate::io::tap::{Filter, Record, Side};

/// Bytes of packets in one answer.
const ANSWER: usize = 1 << 20;
/// The flight recorder keeps no more: some 60 MiB.
const RECORDED: usize = 200_000;

impl Shared {
    pub(super) fn captured(&self, ask: Ask) -> Result<CaptureView, String> {
        let now_us = self.started.elapsed().as_micros() as u64;
        let mut view = CaptureView { tun: self.tun.clone(), now_us, ..CaptureView::default() };
        match ask {
            Ask::Begin { filter } => {
                view.id = now_us;
                self.tap.capture(now_us, view.id, of(filter));
            }
            Ask::Fetch { id } => {
                let (records, lost) = self.tap.fetch(now_us, id, ANSWER).ok_or_else(|| {
                    "this capture has ended: another one was started, or nothing was asked for some seconds".to_owned()
                })?;
                (view.id, view.lost, view.packets) = (id, lost, records.iter().map(seen).collect());
            }
            Ask::End { id } => self.tap.end(id),
            Ask::Record { packets } if packets > RECORDED => {
                return Err(format!("the flight recorder keeps {RECORDED} packets at most"));
            }
            Ask::Record { packets } => {
                self.tap.record(packets);
                view.keeps = packets;
            }
            Ask::Recorded => {
                let (keeps, records) = self.tap.recorded();
                (view.keeps, view.packets) = (keeps, records.iter().map(seen).collect());
            }
        }
        Ok(view)
    }
}

fn of(filter: FilterView) -> Filter {
    let FilterView { side, nets, ports, protocol, dropped, snaplen } = filter;
    let side = side.map(|side| match side {
        SideView::Inner => Side::Inner,
        SideView::Outer => Side::Outer,
    });
    Filter { side, nets, ports, protocol, dropped, snaplen: snaplen.min(usize::from(u16::MAX)) }
}

fn seen(record: &Record) -> PacketView {
    PacketView {
        at_us: record.at_us,
        side: match record.side {
            Side::Inner => SideView::Inner,
            Side::Outer => SideView::Outer,
        },
        out: record.out,
        dropped: record.dropped.map(|reason| reason.name().to_owned()),
        length: record.len,
        bytes: STANDARD.encode(&record.bytes),
    }
}
