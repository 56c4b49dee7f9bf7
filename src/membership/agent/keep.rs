//! What a node keeps of its membership, in `<data-dir>/agent`: its key, and once it has joined who it is, its certificate,
//! the CA and the servers. Damaged files are errors: nothing here ever makes a new key where there was one.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::membership::address::ServerAddress;
use crate::membership::api::JoinAnswer;
use crate::membership::authority;
use crate::membership::files::{self, FileError};
use crate::membership::record::{NodeRecord, Role};
use crate::membership::tls::ClientIdentity;

const KEY: &str = "identity.key";
const MEMBER: &str = "membership.json";
const EXPELLED: &str = "membership.json.expelled";
const NODES: &str = "nodes.json";

/// Why kept state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// Reading or writing.
    #[error(transparent)]
    File(#[from] FileError),
    /// What is there is not what was written.
    #[error(
        "{}: damaged ({why}); restore it from a backup, or, to be a new node, remove the folder {} and join with a token",
        path.display(),
        path.parent().unwrap_or(path).display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How.
        why: String,
    },
    /// The library.
    #[error("no key can be made: {0}")]
    Key(#[from] rcgen::Error),
}

/// Who this node is, once it has joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Its id.
    pub id: String,
    /// The name that it joined under.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// The cluster's id.
    pub cluster: String,
    /// Its certificate, DER in base64.
    pub certificate: String,
    /// The CA's certificate, DER in base64.
    pub ca: String,
    /// All servers that it knows.
    pub servers: Vec<ServerAddress>,
}

/// The node list as it last was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct KeptList {
    pub(super) cluster: String,
    pub(super) revision: u64,
    pub(super) nodes: Vec<NodeRecord>,
}

/// The folder, and the node's key.
pub struct Keep {
    folder: PathBuf,
    key: KeyPair,
}

impl Keep {
    /// Opens the folder. Makes a key only where nothing of a membership is there.
    pub fn open(data_dir: &Path) -> Result<Self, KeepError> {
        let folder = data_dir.join("agent");
        files::ensure_dir(&folder)?;
        let path = folder.join(KEY);
        let damaged = |why: &str| KeepError::Damaged { path: path.clone(), why: why.to_owned() };
        let key = match files::read(&path)? {
            Some(pem) => {
                let pem = Zeroizing::new(pem);
                let text = std::str::from_utf8(&pem).map_err(|_| damaged("not a key"))?;
                let key = KeyPair::from_pkcs8_pem_and_sign_algo(text, &PKCS_ECDSA_P256_SHA256);
                key.map_err(|_| damaged("not a key"))?
            }
            None if files::read(&folder.join(MEMBER))?.is_some() => {
                return Err(damaged("it is gone, while the membership that it belongs to is there"));
            }
            None => {
                let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
                files::write_atomic(&path, Zeroizing::new(key.serialize_pem()).as_bytes())?;
                key
            }
        };
        Ok(Keep { folder, key })
    }

    /// Who this node is, if it has joined.
    pub fn membership(&self) -> Result<Option<Membership>, KeepError> {
        let path = self.folder.join(MEMBER);
        let damaged = |why: String| KeepError::Damaged { path: path.clone(), why };
        let Some(bytes) = files::read(&path)? else { return Ok(None) };
        let member: Membership = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        let certificate = STANDARD.decode(&member.certificate).unwrap_or_default();
        let ca = STANDARD.decode(&member.ca).unwrap_or_default();
        let identity = authority::identity_of_certificate(&certificate);
        if identity.is_none() || authority::identity_of_certificate(&ca).is_none() {
            return Err(damaged("a certificate in it cannot be read".to_owned()));
        }
        if identity.as_deref() != self.identity().ok().as_deref() {
            return Err(damaged("its certificate is for another key".to_owned()));
        }
        Ok(Some(member))
    }

    /// Keeps what a join answered.
    pub fn joined(&self, name: &str, role: Role, answer: &JoinAnswer) -> Result<Membership, KeepError> {
        let member = Membership {
            id: answer.id.clone(),
            name: name.to_owned(),
            role,
            cluster: answer.cluster.clone(),
            certificate: answer.certificate.clone(),
            ca: answer.ca.clone(),
            servers: answer.servers.clone(),
        };
        self.write(&member)?;
        Ok(member)
    }

    /// Keeps who this node is.
    pub fn write(&self, member: &Membership) -> Result<(), KeepError> {
        let bytes = serde_json::to_vec_pretty(member).unwrap_or_default();
        Ok(files::write_atomic(&self.folder.join(MEMBER), &bytes)?)
    }

    /// This node is no member any more. Its key stays, so that it gets its subnet back if it joins again soon.
    pub fn forget(&self) -> Result<(), KeepError> {
        let (member, expelled) = (self.folder.join(MEMBER), self.folder.join(EXPELLED));
        if files::read(&member)?.is_some() {
            files::rename(&member, &expelled)?;
        }
        let nodes = self.folder.join(NODES);
        Ok(files::remove(&nodes).map_err(|source| FileError { path: nodes, source })?)
    }

    /// The list as it last was, where it can still be read; it is only a copy.
    pub(super) fn list(&self) -> Option<KeptList> {
        let bytes = files::read(&self.folder.join(NODES)).ok()??;
        serde_json::from_slice(&bytes).inspect_err(|e| tracing::warn!("the copy of the node list is damaged: {e}")).ok()
    }

    pub(super) fn keep_list(&self, list: &KeptList) -> Result<(), KeepError> {
        let bytes = serde_json::to_vec(list).unwrap_or_default();
        Ok(files::write_atomic(&self.folder.join(NODES), &bytes)?)
    }

    /// A request for a certificate, DER in base64.
    pub fn request(&self) -> Result<String, KeepError> {
        Ok(STANDARD.encode(CertificateParams::default().serialize_request(&self.key)?.der()))
    }

    /// What this node shows to servers.
    pub fn client_identity(&self, member: &Membership) -> ClientIdentity {
        let certificate = CertificateDer::from(STANDARD.decode(&member.certificate).unwrap_or_default());
        ClientIdentity { certificate, key: PrivatePkcs8KeyDer::from(self.key.serialized_der().to_vec()).into() }
    }

    /// The identity of its key, by which servers know it.
    pub fn identity(&self) -> Result<String, KeepError> {
        let request = CertificateParams::default().serialize_request(&self.key)?;
        authority::identity_of_request(request.der())
            .map_err(|e| KeepError::Damaged { path: self.folder.join(KEY), why: e.to_string() })
    }
}
