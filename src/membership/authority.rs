//! The cluster's certificate authority: who is a server, and who is which node.
//!
//! Owns the CA's key and what certificates say. Leaves for servers carry serverAuth and the names that agents reach them
//! by; leaves for nodes carry clientAuth and the node's id as common name, which comes from the registry: of a certificate
//! request only the key is taken. Knows nothing of who may have one.

use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::random;
use super::settings::Secret;

/// How long a server's or node's certificate lasts. It is renewed at two thirds.
pub const LEAF_LIFE: Duration = Duration::days(365);
const CA_LIFE: Duration = Duration::days(3650);
/// Certificates begin this much before now, for nodes whose clock is behind.
const SLACK: Duration = Duration::days(1);

/// Something about certificates that does not work.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// What the store has under the CA's key is none.
    #[error("the cluster's CA in the store is damaged; restore a backup")]
    Damaged,
    /// A request that is none, or not signed by its own key, or for another kind of key.
    #[error("the certificate request is not a PKCS#10 request with an ECDSA P-256 key, signed by that key")]
    BadRequest,
    /// A `tls-san` that is neither a name nor an address.
    #[error("`{0}` cannot stand in a certificate; in `tls-san`, give DNS names and IP addresses")]
    BadName(String),
    /// The library refuses.
    #[error("the certificate cannot be made: {0}")]
    Failed(#[from] rcgen::Error),
}

/// The CA as the store keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Certificate, DER in base64.
    pub certificate: String,
    /// Private key, PKCS#8 in base64.
    pub key: Secret,
}

/// The certificate authority.
pub struct Authority {
    certificate: CertificateDer<'static>,
    hash: [u8; 32],
    issuer: Issuer<'static, KeyPair>,
}

/// A server's certificate with its key.
pub struct ServerLeaf {
    /// The leaf, and behind it the CA, so that clients can find it by its hash.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    /// When it should be replaced.
    pub renew_at: OffsetDateTime,
}

impl Authority {
    /// Makes the CA of a new cluster.
    pub fn generate(cluster: &str, now: OffsetDateTime) -> Result<(Self, Kept), AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(&format!("meshd cluster {cluster}"), now, CA_LIFE);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        let kept = Kept {
            certificate: STANDARD.encode(certificate.der()),
            key: Secret::new(STANDARD.encode(key.serialized_der())),
        };
        Ok((Self::load(&kept)?, kept))
    }

    /// The CA that was kept.
    pub fn load(kept: &Kept) -> Result<Self, AuthorityError> {
        let damaged = |_| AuthorityError::Damaged;
        let certificate = CertificateDer::from(STANDARD.decode(&kept.certificate).map_err(damaged)?);
        let key = STANDARD.decode(kept.key.reveal()).map_err(damaged)?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(key), &PKCS_ECDSA_P256_SHA256)
            .map_err(|_| AuthorityError::Damaged)?;
        let matches = identity_of_certificate(&certificate).is_some_and(|id| id == identity(&key));
        if !matches {
            return Err(AuthorityError::Damaged);
        }
        let hash = Sha256::digest(&certificate).into();
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|_| AuthorityError::Damaged)?;
        Ok(Authority { certificate, hash, issuer })
    }

    /// The CA's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// SHA-256 of the CA's certificate, as tokens carry it.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// A certificate for a server that is reached by these names and addresses.
    pub fn server_leaf(&self, names: &[String], now: OffsetDateTime) -> Result<ServerLeaf, AuthorityError> {
        self.named_leaf("meshd server", names, vec![ExtendedKeyUsagePurpose::ServerAuth], now)
    }

    /// A certificate for one of equals that serve each other.
    pub fn peer_leaf(&self, names: &[String], now: OffsetDateTime) -> Result<ServerLeaf, AuthorityError> {
        let both = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.named_leaf("meshd datastore", names, both, now)
    }

    fn named_leaf(
        &self,
        title: &str,
        names: &[String],
        usages: Vec<ExtendedKeyUsagePurpose>,
        now: OffsetDateTime,
    ) -> Result<ServerLeaf, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(title, now, LEAF_LIFE);
        params.extended_key_usages = usages;
        params.subject_alt_names = names.iter().map(|name| alt_name(name)).collect::<Result<_, _>>()?;
        let leaf = params.signed_by(&key, &self.issuer)?;
        Ok(ServerLeaf {
            chain: vec![leaf.der().clone(), self.certificate.clone()],
            key: PrivatePkcs8KeyDer::from(key.serialized_der().to_vec()).into(),
            renew_at: now + LEAF_LIFE * 2 / 3,
        })
    }

    /// A certificate for the node `id` with the key of this request (DER); nothing else of the request counts.
    pub fn node_leaf(&self, request: &[u8], id: &str, now: OffsetDateTime) -> Result<Vec<u8>, AuthorityError> {
        let request = parse(request)?;
        let mut params = params(id, now, LEAF_LIFE);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(&request.public_key, &self.issuer)?.der().to_vec())
    }
}

/// The identity of the key that made this request (DER), once its signature proves that it has the key.
pub fn identity_of_request(request: &[u8]) -> Result<String, AuthorityError> {
    Ok(identity(&parse(request)?.public_key))
}

/// The identity of a certificate's key: SHA-256 of its SubjectPublicKeyInfo, in hexadecimal.
pub fn identity_of_certificate(certificate: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(random::hex(&Sha256::digest(certificate.public_key().raw)))
}

/// Whether a certificate that is to be renewed at `renew_at` is due: also one that was made while the clock was ahead, since
/// nobody takes a certificate of the future.
pub fn is_due(renew_at: OffsetDateTime, now: OffsetDateTime) -> bool {
    now >= renew_at || now < renew_at - LEAF_LIFE * 2 / 3 - SLACK
}

/// When a certificate begins and ends, seconds since 1970.
pub fn validity(certificate: &[u8]) -> Option<(i64, i64)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let validity = certificate.validity();
    Some((validity.not_before.timestamp(), validity.not_after.timestamp()))
}

fn parse(request: &[u8]) -> Result<CertificateSigningRequestParams, AuthorityError> {
    let parsed = CertificateSigningRequestParams::from_der(&request.into());
    let parsed = parsed.map_err(|_| AuthorityError::BadRequest)?;
    if parsed.public_key.algorithm() == &PKCS_ECDSA_P256_SHA256 { Ok(parsed) } else { Err(AuthorityError::BadRequest) }
}

fn identity(key: &impl PublicKeyData) -> String {
    random::hex(&Sha256::digest(key.subject_public_key_info()))
}

fn params(name: &str, now: OffsetDateTime, life: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = now - SLACK;
    params.not_after = now + life;
    // RFC 5280 §4.1.2.2: positive, at most 20 octets.
    let mut serial = random::bytes::<16>();
    serial[0] &= 0x7f;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

fn alt_name(name: &str) -> Result<SanType, AuthorityError> {
    let bad = || AuthorityError::BadName(name.chars().take(80).collect());
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    rustls::pki_types::DnsName::try_from(name).map_err(|_| bad())?;
    Ok(SanType::DnsName(name.try_into().map_err(|_| bad())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap()
    }

    #[test]
    fn a_certificate_of_the_future_is_due() {
        let (ca, _) = Authority::generate("c", now()).unwrap();
        let leaf = |at| ca.server_leaf(&["a".to_owned()], at).unwrap();
        let begins = |leaf: &ServerLeaf| validity(&leaf.chain[0]).unwrap().0;
        let ahead = leaf(now() + Duration::days(400));
        assert!(begins(&ahead) > now().unix_timestamp(), "positive control");
        assert!(is_due(ahead.renew_at, now()));
        let right = leaf(now() + Duration::hours(23));
        assert!(begins(&right) < now().unix_timestamp() && !is_due(right.renew_at, now()));
        assert!(is_due(right.renew_at, now() + Duration::days(300)));
    }

    #[test]
    fn a_node_is_who_the_registry_says_and_not_who_it_says_it_is() {
        let (ca, kept) = Authority::generate("c", now()).unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut wish = CertificateParams::new(vec!["server.example".to_owned()]).unwrap();
        wish.distinguished_name.push(DnType::CommonName, "somebody-else");
        wish.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let request = wish.serialize_request(&key).unwrap();
        let leaf = Authority::load(&kept).unwrap().node_leaf(request.der(), "node-id", now()).unwrap();
        let (_, read) = X509Certificate::from_der(&leaf).unwrap();
        assert_eq!(read.subject().to_string(), "CN=node-id");
        assert!(read.subject_alternative_name().unwrap().is_none());
        let usage = read.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth);
        assert_eq!(identity_of_certificate(&leaf), Some(identity_of_request(request.der()).unwrap()));
        assert_eq!(validity(&leaf), Some((1_800_000_000 - 86_400, 1_800_000_000 + 365 * 86_400)));
        read.verify_signature(Some(X509Certificate::from_der(ca.certificate()).unwrap().1.public_key())).unwrap();
    }

    #[test]
    fn requests_that_are_none_are_refused() {
        let (ca, _) = Authority::generate("c", now()).unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut request = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        assert!(ca.node_leaf(&request, "x", now()).is_ok(), "positive control");
        *request.last_mut().unwrap() ^= 1;
        assert!(matches!(ca.node_leaf(&request, "x", now()), Err(AuthorityError::BadRequest)));
        assert!(matches!(ca.node_leaf(b"", "x", now()), Err(AuthorityError::BadRequest)));
        let other = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let request = CertificateParams::default().serialize_request(&other).unwrap();
        assert!(matches!(identity_of_request(request.der()), Err(AuthorityError::BadRequest)));
    }

    #[test]
    fn a_ca_with_another_key_is_damaged() {
        let (_, a) = Authority::generate("c", now()).unwrap();
        let (_, b) = Authority::generate("c", now()).unwrap();
        let mixed = Kept { certificate: a.certificate, key: b.key };
        assert!(matches!(Authority::load(&mixed), Err(AuthorityError::Damaged)));
    }

    #[test]
    fn names_are_checked() {
        let (ca, _) = Authority::generate("c", now()).unwrap();
        let leaf = |name: &str| ca.server_leaf(&[name.to_owned()], now());
        assert!(leaf("a.example").is_ok() && leaf("10.0.0.1").is_ok() && leaf("2001:db8::1").is_ok());
        assert!(matches!(leaf("a b"), Err(AuthorityError::BadName(_))));
    }
}
