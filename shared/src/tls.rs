//! TLS to the servers behind: files of certificates and keys, and what a failed handshake means for a person.
//!
//! All of it is rustls with one crypto provider, ring, which async-nats needs anyway: one library to trust and to update.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::file::read_regular;

/// The one crypto provider; from the first call on it is the process's default, which async-nats takes.
pub fn provider() -> Arc<CryptoProvider> {
    // Refused where it has been installed before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Arc::clone(CryptoProvider::get_default().expect("one was installed above, or before"))
}

/// Reads a file of certificates in PEM form; gives at least one.
///
/// # Errors
/// What the file must be and is not, in words that follow "must be" and hold nothing of it, not even its name: somebody
/// may have set a secret where a file's name belongs.
pub fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = read(file)?;
    let certificates = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err("a file of certificates in PEM form (it holds none)".into()),
        Err(_) => Err("a file of certificates in PEM form (it is damaged)".into()),
    }
}

/// Reads a file of certificates whose signatures are to be trusted.
///
/// # Errors
/// As [`certificates`].
pub fn roots(file: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        roots.add(certificate).map_err(|_| "a file of CA certificates (one of them is damaged)")?;
    }
    Ok(roots)
}

/// `true`: bytes that are sent to `host` stay on this machine. `host` is a name or an address (IPv6 with or without brackets).
/// A name is not looked up: `localhost` and names below it stay here (RFC 6761), others do not.
pub fn is_loopback(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    match bare.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => host.rsplit('.').next().is_some_and(|last| last.eq_ignore_ascii_case("localhost")),
    }
}

/// The CA certificates that this system trusts.
///
/// # Errors
/// When it has none; the words follow "must be".
pub fn system_roots() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        Err("a file of CA certificates: this system trusts none of its own".into())
    } else {
        Ok(roots)
    }
}

/// Reads the private key of `chain`, a certificate that this program shows: PKCS #8, PKCS #1 or SEC 1, in PEM form.
///
/// # Errors
/// As [`certificates`]; also when the key is another certificate's.
pub fn private_key(file: &Path, chain: &[CertificateDer<'static>]) -> Result<PrivateKeyDer<'static>, String> {
    let key = match PrivateKeyDer::from_pem_slice(&read(file)?) {
        Ok(key) => key,
        Err(PemError::NoItemsFound) => return Err("a private key in PEM form, not encrypted (it holds none)".into()),
        Err(_) => return Err("a private key in PEM form (it is damaged)".into()),
    };
    match CertifiedKey::from_der(chain.to_vec(), key.clone_key(), &provider()) {
        Ok(_) => Ok(key),
        Err(rustls::Error::InconsistentKeys(_)) => Err("the private key of the certificate (it is another's)".into()),
        Err(_) => Err("a private key of a kind that TLS uses (RSA, ECDSA on P-256 or P-384, Ed25519)".into()),
    }
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    read_regular(file).map_err(|error| format!("a file that can be read ({error})"))
}

/// The settings that a handshake depends on, by name.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// The CA certificates.
    pub roots: &'static str,
    /// Our own certificate and its key.
    pub client: &'static str,
}

/// What is wrong with a TLS connection, and what to do, for what rustls says of it. `error` is a whole error's text with
/// rustls's words in it: async-nats keeps no more than that. None where it is not about TLS, or speaks for itself.
pub fn explain(error: &str, names: Names) -> Option<String> {
    let Names { roots, client } = names;
    let table: [(&[&str], String); 9] = [
        (&["alert: CertificateRequired"], format!("it asks for a client certificate: set {client}")),
        (
            &["alert: UnknownCA", "alert: BadCertificate", "alert: Certificate", "alert: UnsupportedCertificate"],
            format!("it does not accept our client certificate, or misses one: check {client}"),
        ),
        (
            &["UnknownIssuer", "certificate: BadSignature"],
            format!("no CA that is trusted here has signed its certificate: {roots} must hold the CA that did"),
        ),
        (
            &["not valid for name", "NotValidForName"],
            "its certificate is not for this host: connect by a name that it is for, or give the server one for this \
             name (subjectAltName)"
                .into(),
        ),
        (&["certificate expired", "certificate: Expired"], "its certificate has expired: renew it".into()),
        (&["not valid yet", "NotValidYet"], "its certificate is not valid yet: look at both clocks".into()),
        (&["CaUsedAsEndEntity"], format!("its certificate is a CA's own: {roots} must hold exactly that one")),
        (
            &["UnsupportedCertVersion"],
            "its certificate is of X.509 version 1: give the server one of version 3, with a subjectAltName".into(),
        ),
        (&["InvalidContentType", "corrupt message"], "it does not speak TLS there".into()),
    ];
    table.into_iter().find(|(signs, _)| signs.iter().any(|sign| error.contains(sign))).map(|(_, words)| words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_this_machine_only_if_it_says_so() {
        for here in
            ["localhost", "LocalHost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "::ffff:127.0.0.1"]
        {
            assert!(is_loopback(here), "{here}");
        }
        for elsewhere in ["", "db", "localhost.example", "192.0.2.1", "0.0.0.0", "::", "[2001:db8::1]"] {
            assert!(!is_loopback(elsewhere), "{elsewhere}");
        }
    }

    #[test]
    fn a_file_that_is_not_what_it_should_be_is_told_without_its_name_and_content() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hunter2");
        let told = |what: &str| {
            if !what.is_empty() {
                std::fs::write(&file, what).unwrap();
            }
            let errors = [certificates(&file).unwrap_err(), private_key(&file, &[]).unwrap_err()];
            assert!(!errors.concat().contains("hunter2"), "{errors:?}");
            errors
        };
        assert!(told("").iter().all(|error| error.contains("No such file")));
        assert!(told("hunter2").iter().all(|error| error.contains("holds none")));
        let damaged = ["-----BEGIN CERTIFICATE-----\nhunter2", "-----BEGIN PRIVATE KEY-----\nhunter2"].map(told);
        assert!(damaged[0][0].contains("damaged") && damaged[1][1].contains("damaged"), "{damaged:?}");
    }
}
