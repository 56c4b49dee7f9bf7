//! Whether the kernel encrypts what this host sends (IPsec): how many policies it has for that.
//!
//! Owns one question of the XFRM netlink family (linux/xfrm.h), for which there is no library here.

use std::io;

use rtnetlink::sys::protocols::NETLINK_XFRM;

use crate::sys::netlink::{self, HEADER};

const GETSPDINFO: u16 = 0x25;
const NEWSPDINFO: u16 = 0x24;
/// `XFRMA_SPD_INFO`: counts of policies, the second being that of outgoing ones.
const SPD_INFO: u16 = 1;
/// Bytes of the flags behind the header.
const FLAGS: usize = 4;

/// How many policies for outgoing packets there are in the network namespace of this thread. Needs CAP_NET_ADMIN.
pub fn outgoing_policies() -> io::Result<u32> {
    // a kernel without IPsec has none
    let Some(answer) = netlink::ask(NETLINK_XFRM, GETSPDINFO, &[0; FLAGS])? else { return Ok(0) };
    counted(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is none"))
}

/// The number of outgoing policies in an answer.
fn counted(answer: &[u8]) -> Option<u32> {
    let u16_at = |at: usize| Some(u16::from_ne_bytes(*answer.get(at..)?.first_chunk()?));
    let mut at = (netlink::kind(answer)? == NEWSPDINFO).then_some(HEADER + FLAGS)?;
    loop {
        let (len, kind) = (usize::from(u16_at(at)?), u16_at(at + 2)?);
        if kind == SPD_INFO {
            return Some(u32::from_ne_bytes(*answer.get(at + 8..at + len)?.first_chunk()?));
        }
        at += len.max(4).next_multiple_of(4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_answer() {
        let header = |kind: u16| [&52u32.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], &[0; FLAGS]].concat();
        let counts: Vec<u8> = [7u32, 3, 2, 0, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
        let attribute = |kind: u16| [&28u16.to_ne_bytes()[..], &kind.to_ne_bytes(), &counts].concat();
        assert_eq!(counted(&[header(NEWSPDINFO), attribute(SPD_INFO)].concat()), Some(3));
        assert_eq!(counted(&[header(NEWSPDINFO), attribute(2), attribute(SPD_INFO)].concat()), Some(3));
        assert_eq!(counted(&[header(2), attribute(SPD_INFO)].concat()), None, "an error");
        assert_eq!(counted(&header(NEWSPDINFO)), None);
        assert_eq!(counted(&[]), None);
    }
}
