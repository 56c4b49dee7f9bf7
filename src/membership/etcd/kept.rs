//! What a server keeps of its etcd member, in `<data-dir>/server/etcd`: who it is and how far it has come (`member.json`),
//! the members' certificate authority (`ca.json`), its certificate (`tls.pem`) and the data.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::{CLIENT_PORT, PEER_PORT};
use crate::membership::authority::{self, Authority, AuthorityError};
use crate::membership::files::{self, FileError};
use crate::membership::store::Snapshot;
use crate::membership::tls::{self, TlsError};

const MEMBER: &str = "member.json";
const CA: &str = "ca.json";
const RESTORE: &str = "restore.json";

/// Why what is kept cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// Reading or writing.
    #[error(transparent)]
    File(#[from] FileError),
    /// What is there is not what was written.
    #[error("{}: damaged ({why}); restore a backup with `mesh-sidecar restore`", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How.
        why: String,
    },
    /// Certificates.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// How far a member has come. A crash in any phase goes on from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The first member, which is filled from what there was before: a backup, or SQLite.
    Filling,
    /// A further member, which is not one yet.
    Joining,
    /// A member.
    Member,
    /// A member that is to forget all others.
    Resetting,
}

/// A member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// How far it is.
    pub phase: Phase,
    /// The identity of its server's key: its name in etcd.
    pub name: String,
    /// Where it listens.
    pub address: IpAddr,
    /// Tells clusters apart, whatever their members' addresses.
    pub token: String,
    /// All members that it starts with: names and peer URLs.
    pub cluster: Vec<(String, String)>,
    /// Whether it joined others, whose cluster-wide settings it then has.
    #[serde(default)]
    pub joined: bool,
}

/// The folder.
#[derive(Debug, Clone)]
pub struct Kept {
    folder: PathBuf,
}

impl Kept {
    /// The folder of this data-dir.
    pub fn new(data_dir: &Path) -> Self {
        Kept { folder: data_dir.join("server/etcd") }
    }

    /// The member, where there is one.
    pub fn member(&self) -> Result<Option<Member>, KeptError> {
        self.read(MEMBER)
    }

    /// Keeps it.
    pub fn write(&self, member: &Member) -> Result<(), KeptError> {
        files::ensure_dir(&self.folder)?;
        let bytes = serde_json::to_vec_pretty(member).unwrap_or_default();
        Ok(files::write_atomic(&self.folder.join(MEMBER), &bytes)?)
    }

    /// The members' authority.
    pub fn authority(&self) -> Result<Option<authority::Kept>, KeptError> {
        self.read(CA)
    }

    /// Keeps it.
    pub fn write_authority(&self, ca: &authority::Kept) -> Result<(), KeptError> {
        files::ensure_dir(&self.folder)?;
        Ok(files::write_atomic(&self.folder.join(CA), &serde_json::to_vec(ca).unwrap_or_default())?)
    }

    /// A new certificate for the member at this address, which its etcd shows from its next handshake on.
    pub fn certify(&self, address: IpAddr, now: OffsetDateTime) -> Result<(), KeptError> {
        let authority = Authority::load(&self.needed_authority()?)?;
        let names = [address.to_string(), "localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
        let leaf = authority.peer_leaf(&names, now)?;
        // Both in one file: etcd, which reads it at each handshake, never sees one without the other.
        let key = pem("PRIVATE KEY", leaf.key.secret_der());
        let both = zeroize::Zeroizing::new(format!("{}{}", pem("CERTIFICATE", &leaf.chain[0]).as_str(), key.as_str()));
        files::write_atomic(&self.certificate(), both.as_bytes())?;
        Ok(files::write_atomic(&self.roots(), pem("CERTIFICATE", authority.certificate()).as_bytes())?)
    }

    /// When the certificate has two thirds of its life behind it; `None` if it cannot be read.
    pub fn renew_at(&self) -> Option<OffsetDateTime> {
        let pem = files::read(&self.certificate()).ok().flatten().unwrap_or_default();
        let first = CertificateDer::pem_slice_iter(&pem).next().and_then(Result::ok);
        let validity = first.and_then(|certificate| authority::validity(&certificate));
        let (from, to) = validity?;
        OffsetDateTime::from_unix_timestamp(from + (to - from) / 3 * 2).ok()
    }

    /// What members are asked with.
    pub fn client(&self) -> Result<Arc<ClientConfig>, KeptError> {
        let text = |path: PathBuf| -> Result<String, KeptError> {
            let bytes = files::read(&path)?.unwrap_or_default();
            String::from_utf8(bytes).map_err(|e| KeptError::Damaged { path, why: e.to_string() })
        };
        let (roots, both) = (text(self.roots())?, zeroize::Zeroizing::new(text(self.certificate())?));
        Ok(Arc::new(tls::datastore_config(&roots, Some((&both, &both)))?))
    }

    /// The member's certificate and key.
    pub fn certificate(&self) -> PathBuf {
        self.folder.join("tls.pem")
    }

    /// Whom it believes.
    pub fn roots(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// etcd's own folder.
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Puts the data aside, so that the member starts empty. Only the last such copy is kept.
    pub fn put_aside(&self) -> Result<(), KeptError> {
        let (data, aside) = (self.data(), self.folder.join("data.old"));
        let told = |source| FileError { path: aside.clone(), source };
        if data.exists() {
            match std::fs::remove_dir_all(&aside) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(told(e).into()),
                _ => {}
            }
            files::rename(&data, &aside)?;
        }
        Ok(())
    }

    /// This server is no member any more; to be one, it has to join again. It never makes a cluster of its own instead.
    pub fn forget(&self) -> Result<(), KeptError> {
        if let Some(mut member) = self.member()? {
            (member.phase, member.joined) = (Phase::Joining, true);
            self.write(&member)?;
        }
        self.put_aside()
    }

    /// What the first member is to be filled with, where a backup was restored.
    pub fn backup(&self) -> Result<Option<Snapshot>, KeptError> {
        let path = self.folder.join(RESTORE);
        match files::read(&path)? {
            Some(bytes) => Snapshot::from_backup(&bytes).map(Some).map_err(|why| KeptError::Damaged { path, why }),
            None => Ok(None),
        }
    }

    /// It is to be filled with that.
    pub fn write_backup(&self, backup: &[u8]) -> Result<(), KeptError> {
        files::ensure_dir(&self.folder)?;
        Ok(files::write_atomic(&self.folder.join(RESTORE), backup)?)
    }

    /// It was.
    pub fn drop_backup(&self) -> Result<(), KeptError> {
        let path = self.folder.join(RESTORE);
        Ok(files::remove(&path).map_err(|source| FileError { path, source })?)
    }

    fn needed_authority(&self) -> Result<authority::Kept, KeptError> {
        let missing = || KeptError::Damaged { path: self.folder.join(CA), why: "it is gone".to_owned() };
        self.authority()?.ok_or_else(missing)
    }

    fn read<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Option<T>, KeptError> {
        let path = self.folder.join(name);
        let Some(bytes) = files::read(&path)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| KeptError::Damaged { path, why: e.to_string() })
    }
}

impl Member {
    /// Where other members reach it.
    pub fn peer_url(&self) -> String {
        url(self.address, PEER_PORT)
    }

    /// Where it is asked.
    pub fn client_url(&self) -> String {
        url(self.address, CLIENT_PORT)
    }
}

/// A member's URL.
pub fn url(address: IpAddr, port: u16) -> String {
    format!("https://{}", std::net::SocketAddr::new(address, port))
}

/// RFC 7468 §2.
fn pem(label: &str, der: &[u8]) -> zeroize::Zeroizing<String> {
    let text = zeroize::Zeroizing::new(STANDARD.encode(der));
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        out.push_str(&String::from_utf8_lossy(line));
        out.push('\n');
    }
    out.push_str(&format!("-----END {label}-----\n"));
    zeroize::Zeroizing::new(out)
}
