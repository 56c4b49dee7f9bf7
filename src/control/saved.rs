//! The node list as it is kept on disk, so that a start needs no server: one line that says what follows, then the
//! records as JSON.
//!
//! Pure: bytes in, records out. A text that was cut or changed anywhere is told from a whole one by its checksum, and
//! never taken for a shorter list.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::records::Records;
use crate::membership::record::NodeRecord;

/// The form that this version writes, and the only one that there was so far.
const VERSION: u32 = 1;

/// A kept list that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damaged {
    /// No first line, or not ours.
    #[error("it does not begin as a kept node list does")]
    NoHeader,
    /// A form of a later release.
    #[error("it is in form {0}, which a later meshd wrote; this one knows form {VERSION}")]
    Version(u32),
    /// Cut or changed.
    #[error("its checksum does not fit: it was cut or changed")]
    Checksum,
    /// Whole, and yet not what we write.
    #[error("its content makes no sense ({0})")]
    Content(String),
}

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    sha256: String,
}

#[derive(Serialize)]
struct Written<'r> {
    cluster: &'r str,
    revision: u64,
    cidrs: &'r [IpNet],
    nodes: Vec<&'r NodeRecord>,
}

#[derive(Deserialize)]
struct Read {
    cluster: String,
    revision: u64,
    #[serde(default)]
    cidrs: Vec<IpNet>,
    nodes: Vec<NodeRecord>,
}

/// The bytes to keep.
pub fn encode(records: &Records) -> Result<Vec<u8>, serde_json::Error> {
    let nodes = records.nodes.values().collect();
    let body = serde_json::to_vec(&Written {
        cluster: &records.cluster,
        revision: records.revision,
        cidrs: &records.cidrs,
        nodes,
    })?;
    let mut bytes = serde_json::to_vec(&Header { version: VERSION, sha256: digest(&body) })?;
    bytes.push(b'\n');
    bytes.extend(body);
    bytes.push(b'\n');
    Ok(bytes)
}

/// What was kept.
pub fn decode(bytes: &[u8]) -> Result<Records, Damaged> {
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or(Damaged::NoHeader)?;
    let (header, body) = bytes.split_at(end);
    let header: Header = serde_json::from_slice(header).map_err(|_| Damaged::NoHeader)?;
    if header.version != VERSION {
        return Err(Damaged::Version(header.version));
    }
    let body = body.strip_prefix(b"\n").and_then(|body| body.strip_suffix(b"\n")).ok_or(Damaged::Checksum)?;
    if digest(body) != header.sha256 {
        return Err(Damaged::Checksum);
    }
    let read: Read = serde_json::from_slice(body).map_err(|error| Damaged::Content(error.to_string()))?;
    Ok(Records::new(read.cluster, read.revision, read.nodes).within(read.cidrs))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::records::tests::record;
    use super::*;

    fn records() -> Records {
        Records::new("c".to_owned(), 7, vec![record("a", 1), record("b", 2)])
            .within(vec!["10.42.0.0/16".parse().unwrap()])
    }

    #[test]
    fn what_is_kept_comes_back() {
        assert_eq!(decode(&encode(&records()).unwrap()).unwrap(), records());
        assert_eq!(decode(&encode(&Records::default()).unwrap()).unwrap(), Records::default());
    }

    #[test]
    fn a_text_that_was_cut_or_changed_anywhere_is_refused() {
        let good = encode(&records()).unwrap();
        for end in 0..good.len() {
            assert!(decode(&good[..end]).is_err(), "cut at {end}");
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(decode(&bad).is_err(), "bit {bit} of byte {at}");
            }
        }
        assert!(decode(&[good.clone(), good].concat()).is_err());
    }

    #[test]
    fn a_later_form_is_named() {
        let error = decode(b"{\"version\":2,\"sha256\":\"\"}\n{}\n").unwrap_err();
        assert_eq!(error, Damaged::Version(2));
        assert!(error.to_string().contains("later meshd"));
    }
}
