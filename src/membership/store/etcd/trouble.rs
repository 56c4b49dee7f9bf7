//! What stands between a server and an etcd that somebody else runs, in words, with what to do about it. Pure.

use std::error::Error;

use rustls::{AlertDescription, CertificateError, InvalidMessage};

use super::gateway::{CallError, PERMISSION_DENIED};
use crate::membership::store::StoreError;

/// What is wrong with either side's certificate, where that is what an error is about.
pub(super) fn tls(place: &str, error: &(dyn Error + 'static)) -> Option<CallError> {
    let (problem, fix) = said(of_rustls(error)?)?;
    Some(CallError::Tls { problem: format!("{place}: {problem}"), fix })
}

/// The error beneath those that wrap it.
fn of_rustls<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // which hands on its cause's cause, and not its cause
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        at = inner.map(|inner| inner as &(dyn Error + 'static)).or_else(|| error.source());
    }
    None
}

fn said(error: &rustls::Error) -> Option<(String, String)> {
    use rustls::Error as E;
    let cafile = "set `datastore-cafile` to the authority of etcd's certificate";
    let clock = "renew it there (`--cert-file`), or set this machine's clock";
    let (problem, fix) = match error {
        E::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            ("its certificate is not from an authority that is known here".to_owned(), cafile.to_owned())
        }
        E::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            ("its certificate has expired, by this machine's clock".to_owned(), clock.to_owned())
        }
        E::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
            ("its certificate is not valid yet, by this machine's clock".to_owned(), clock.to_owned())
        }
        E::InvalidCertificate(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }) => {
            let fix = "write a name in `datastore-endpoint` that it has, or give etcd one with this name";
            ("its certificate does not name this host".to_owned(), fix.to_owned())
        }
        E::InvalidCertificate(why) => (format!("its certificate is no good ({why:?})"), cafile.to_owned()),
        E::InvalidMessage(InvalidMessage::InvalidContentType) => {
            ("it does not speak TLS".to_owned(), "write `etcd://` instead of `etcds://`".to_owned())
        }
        E::AlertReceived(AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure) => {
            let fix = "let it speak TLS 1.2 with ECDHE or TLS 1.3 (`--cipher-suites`, `--tls-max-version`)";
            ("it speaks no TLS that is safe".to_owned(), fix.to_owned())
        }
        E::AlertReceived(
            why @ (AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::AccessDenied),
        ) => {
            let fix = "set `datastore-certfile` and `datastore-keyfile` to a certificate for clients that has not expired, from an \
                       authority that etcd trusts (`--trusted-ca-file`)";
            (format!("it does not take this server's certificate ({why:?}), or wants one"), fix.to_owned())
        }
        _ => return None,
    };
    Some((problem, fix))
}

/// The same error, for who uses the keys below `prefix`.
pub(super) fn told(gateway: &super::Gateway, prefix: &str, error: CallError) -> StoreError {
    match (error, gateway.user()) {
        (CallError::Refused { code: PERMISSION_DENIED, .. }, None) => {
            let problem =
                "it wants a user and a password: write `etcd://USER@HOST:2379` and set `datastore-password-file`";
            StoreError::Unfit { place: gateway.place(), problem: problem.to_owned() }
        }
        (CallError::Refused { code: PERMISSION_DENIED, .. }, Some(user)) => {
            let problem =
                format!("user {user} may not read and write the keys below `{prefix}`; run: {}", grant(user, prefix));
            StoreError::Unfit { place: gateway.place(), problem }
        }
        (error, _) => gateway.told(error),
    }
}

/// What to run, as root, so that this user may read and write there.
pub(super) fn grant(user: &str, prefix: &str) -> String {
    format!(
        "etcdctl role add meshd; etcdctl role grant-permission --prefix=true meshd readwrite {prefix}; etcdctl user grant-role \
         {user} meshd"
    )
}
