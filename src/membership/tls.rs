//! TLS 1.3 between nodes and servers: who believes whom.
//!
//! Servers ask for a client certificate of the cluster's CA and take connections without one too, for joining. Clients
//! believe a server whose certificate is the CA's, names the host that they wanted, and carries serverAuth; they know the
//! CA itself, or by its hash, or (before a key exchange that proves it) not at all.

use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme, version,
};
use sha2::{Digest, Sha256};

use super::authority::ServerLeaf;

/// The label of the exporter (RFC 8446 §7.5) that binds a key exchange to its connection.
const EXPORTER_LABEL: &[u8] = b"EXPORTER-meshd-join-v1";

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("TLS cannot be set up: {0}")]
pub struct TlsError(String);

/// The server's certificate, which can change under running connections.
#[derive(Debug)]
pub struct LiveCertificate(ArcSwap<CertifiedKey>);

impl LiveCertificate {
    /// Starts with this one.
    pub fn new(leaf: &ServerLeaf) -> Result<Arc<Self>, TlsError> {
        Ok(Arc::new(LiveCertificate(ArcSwap::from_pointee(certified(&leaf.chain, &leaf.key)?))))
    }

    /// New connections get this one.
    pub fn replace(&self, leaf: &ServerLeaf) -> Result<(), TlsError> {
        self.0.store(Arc::new(certified(&leaf.chain, &leaf.key)?));
        Ok(())
    }

    /// What new connections get.
    pub fn current(&self) -> Arc<CertifiedKey> {
        self.0.load_full()
    }
}

impl ResolvesServerCert for LiveCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

/// What a server takes connections with.
pub fn server_config(ca: &CertificateDer<'static>, live: Arc<LiveCertificate>) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(ca)?, provider())
        .allow_unauthenticated()
        .build()
        .map_err(|e| TlsError(e.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .map_err(|e| TlsError(e.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(live);
    // A connection lives long, and resumption would keep state for each.
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// How a client tells a server from somebody else.
#[derive(Debug, Clone)]
pub enum Trust {
    /// By the cluster's CA.
    Ca(CertificateDer<'static>),
    /// By the hash of the cluster's CA, whose certificate the server presents behind its own.
    Hash([u8; 32]),
    /// Not yet: who it is will be proven within the connection.
    Unproven,
}

/// The certificates that a server presented.
pub type Presented = Arc<OnceLock<Vec<CertificateDer<'static>>>>;

/// A node's certificate and key.
pub struct ClientIdentity {
    /// The node's certificate.
    pub certificate: CertificateDer<'static>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

/// What a client connects with; what the server presents is left in the second part.
pub fn client_config(
    trust: Trust,
    identity: Option<ClientIdentity>,
) -> Result<(Arc<ClientConfig>, Presented), TlsError> {
    let presented = Presented::default();
    let verifier = Arc::new(Verifier { trust, presented: presented.clone() });
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .map_err(|e| TlsError(e.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        Some(identity) => builder
            .with_client_auth_cert(vec![identity.certificate], identity.key)
            .map_err(|e| TlsError(e.to_string()))?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((Arc::new(config), presented))
}

/// What a datastore is connected to with: who it may be (PEM), and what is shown to it, certificate and key (PEM). TLS 1.2 as
/// well: etcd 3.5 knows 1.3 only since 3.5.8 (<https://github.com/etcd-io/etcd/issues/13506>).
pub fn datastore_config(roots: &str, identity: Option<(&str, &str)>) -> Result<ClientConfig, TlsError> {
    let told = |e: &dyn std::fmt::Display| TlsError(e.to_string());
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        // Of a machine's many some may be odd: those that can be read count.
        let _ = store.add(root.map_err(|e| told(&e))?);
    }
    if store.is_empty() {
        return Err(TlsError("no certificate of an authority is in the CA file".to_owned()));
    }
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13, &version::TLS12])
        .map_err(|e| told(&e))?
        .with_root_certificates(store);
    let mut config = match identity {
        Some((chain, key)) => {
            let chain: Vec<_> =
                CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<_, _>>().map_err(|e| told(&e))?;
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| told(&e))?;
            builder.with_client_auth_cert(chain, key).map_err(|e| told(&e))?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Whether `chain` is a server of the CA that it ends with, reached by `name`, at `now`.
pub fn check_chain(
    chain: &[CertificateDer<'static>],
    ca: &CertificateDer<'static>,
    name: &ServerName<'_>,
    now: UnixTime,
) -> Result<(), Error> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots(ca).map_err(general)?, provider())
        .build()
        .map_err(|e| Error::General(e.to_string()))?;
    let (leaf, rest) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
    verifier.verify_server_cert(leaf, rest, name, &[], now).map(drop)
}

/// 32 bytes that only the two ends of this very connection know.
pub fn exporter<Data>(connection: &rustls::ConnectionCommon<Data>) -> Result<[u8; 32], Error> {
    connection.export_keying_material([0; 32], EXPORTER_LABEL, None)
}

/// The cryptography: ring's, for everybody.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(ring::default_provider())).clone()
}

fn certified(chain: &[CertificateDer<'static>], key: &PrivateKeyDer<'static>) -> Result<CertifiedKey, TlsError> {
    CertifiedKey::from_der(chain.to_vec(), key.clone_key(), &provider()).map_err(|e| TlsError(e.to_string()))
}

fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).map_err(|e| TlsError(format!("the CA's certificate: {e}")))?;
    Ok(Arc::new(roots))
}

fn general(error: TlsError) -> Error {
    Error::General(error.to_string())
}

#[derive(Debug)]
struct Verifier {
    trust: Trust,
    presented: Presented,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain: Vec<_> =
            std::iter::once(leaf).chain(intermediates).take(4).map(|c| c.clone().into_owned()).collect();
        match &self.trust {
            Trust::Ca(ca) => check_chain(&chain, ca, name, now)?,
            Trust::Hash(hash) => {
                let ca = chain.iter().find(|c| Sha256::digest(c)[..] == hash[..]);
                let ca = ca.ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
                check_chain(&chain, ca, name, now)?;
            }
            Trust::Unproven => {}
        }
        let _ = self.presented.set(chain);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
