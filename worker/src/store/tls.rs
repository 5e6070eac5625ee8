//! TLS to PostgreSQL, as libpq means it (<https://www.postgresql.org/docs/current/libpq-ssl.html>).
//!
//! | sslmode | encrypted | whom it trusts |
//! |---|---|---|
//! | disable | never | |
//! | allow | if the server refuses a connection that is not | as require |
//! | prefer | if the server does TLS and it works | as require |
//! | require | always | anybody; with a root certificate as verify-ca |
//! | verify-ca | always | whom a CA of `sslrootcert` has certified |
//! | verify-full | always | whom a CA of `sslrootcert` has certified for the host in the URL |
//!
//! As in libpq, a root certificate is checked against whenever there is one: under `prefer` a server that fails the
//! check is talked to without encryption.
//!
//! Not as in libpq: where there is a password for another machine, `allow` and `prefer` always encrypt. A server that
//! does no TLS could ask for it in clear.
//!
//! `sslrootcert=system` means the system's CAs, and verify-full and nothing less.
//!
//! Not as in libpq: nothing is looked for in `~/.postgresql` (a service has no home), and a certificate of X.509
//! version 1 is refused (rustls cannot read it).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use shared::tls::{self, Names};
use x509_cert::Certificate;
use x509_cert::der::Decode as _;
use x509_cert::der::oid::db::rfc4519::COMMON_NAME;
use x509_cert::der::oid::db::rfc5280::ID_CE_SUBJECT_ALT_NAME;

/// What errors call the settings.
pub(super) const NAMES: Names =
    Names { roots: "sslrootcert (PGSSLROOTCERT)", client: "sslcert and sslkey (PGSSLCERT, PGSSLKEY)" };

/// `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl Mode {
    const ALL: [Mode; 6] = [Mode::Disable, Mode::Allow, Mode::Prefer, Mode::Require, Mode::VerifyCa, Mode::VerifyFull];

    fn name(self) -> &'static str {
        match self {
            Mode::Disable => "disable",
            Mode::Allow => "allow",
            Mode::Prefer => "prefer",
            Mode::Require => "require",
            Mode::VerifyCa => "verify-ca",
            Mode::VerifyFull => "verify-full",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The value of a setting, and how a person finds it.
pub(super) struct Parameter {
    /// Such as `sslmode in DATABASE_URL` or `PGSSLMODE`.
    pub(super) name: String,
    pub(super) value: String,
}

/// How the connection is encrypted. Its files are read at each new connection, so that certificates can be rotated.
#[derive(Debug, Clone)]
pub(super) struct Security {
    pub(super) mode: Mode,
    roots: Option<Roots>,
    client: Option<(PathBuf, PathBuf)>,
}

#[derive(Debug, Clone)]
enum Roots {
    System,
    File(PathBuf),
}

impl Security {
    /// Reads `sslmode`, `sslrootcert`, `sslcert`, `sslkey` and `sslnegotiation`, and looks into the files.
    ///
    /// # Errors
    /// Each mistake as a sentence, without a value.
    pub(super) fn read(parameter: impl Fn(&str) -> Option<Parameter>) -> Result<Security, Vec<String>> {
        let mut mistakes = Vec::new();
        let roots = parameter("sslrootcert");
        let system = roots.as_ref().is_some_and(|roots| roots.value == "system");
        let mode = match parameter("sslmode") {
            None if system => Mode::VerifyFull,
            None => Mode::Prefer,
            Some(Parameter { name, value }) => {
                let mode = Mode::ALL.into_iter().find(|mode| mode.name() == value);
                if mode.is_none() {
                    let names = Mode::ALL.map(Mode::name).join(", ");
                    mistakes.push(format!("{name} must be one of {names}"));
                } else if system && mode != Some(Mode::VerifyFull) {
                    mistakes.push(format!("{name} must be verify-full where the root certificates are the system's"));
                }
                mode.unwrap_or(Mode::VerifyFull)
            }
        };
        let mode_known = mistakes.is_empty();
        // libpq looks at no file where nothing is encrypted.
        let encrypted = mode != Mode::Disable;
        let roots = roots.filter(|_| encrypted).and_then(|Parameter { name, value }| {
            let roots = if system { Roots::System } else { Roots::File(value.into()) };
            roots.load().map_err(|wanted| mistakes.push(format!("{name} must be {wanted}"))).is_ok().then_some(roots)
        });
        if mode_known && mode >= Mode::VerifyCa && roots.is_none() && mistakes.is_empty() {
            mistakes.push(format!(
                "PGSSLROOTCERT (or sslrootcert in DATABASE_URL) must be set where sslmode is {mode}: a file of CA \
                 certificates, or system"
            ));
        }
        let client = match (parameter("sslcert"), parameter("sslkey")) {
            (Some(certificate), Some(key)) if encrypted => client(&certificate, &key, &mut mistakes),
            (Some(given), None) | (None, Some(given)) if encrypted => {
                mistakes.push(format!("{} must be set together with its other half, of {}", given.name, NAMES.client));
                None
            }
            _ => None,
        };
        if parameter("sslnegotiation").is_some_and(|negotiation| negotiation.value != "postgres") {
            mistakes.push("sslnegotiation in DATABASE_URL must be postgres, or left out".into());
        }
        if mistakes.is_empty() { Ok(Security { mode, roots, client }) } else { Err(mistakes) }
    }

    /// Whether the host's name matters.
    pub(super) fn checks_names(&self) -> bool {
        self.mode == Mode::VerifyFull
    }

    /// What rustls is to do, from the files as they are now.
    ///
    /// # Errors
    /// When one of them is not what it was at the start.
    pub(super) fn client_config(&self) -> Result<ClientConfig, String> {
        let provider = tls::provider();
        let trusted = self.roots.as_ref().map(Roots::load).transpose();
        let trusted = trusted.map_err(|wanted| format!("{} must be {wanted}", NAMES.roots))?;
        let verifier =
            Verifier { trusted, names: self.checks_names(), algorithms: provider.signature_verification_algorithms };
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous() // what libpq's lesser modes are
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match &self.client {
            None => config.with_no_client_auth(),
            Some((certificate, key)) => {
                let must = |wanted| format!("{} must be {wanted}", NAMES.client);
                let chain = tls::certificates(certificate).map_err(must)?;
                let key = tls::private_key(key, &chain).map_err(must)?;
                config.with_client_auth_cert(chain, key).map_err(|error| error.to_string())?
            }
        };
        config.alpn_protocols = vec![b"postgresql".to_vec()]; // as libpq says from 17 on; older servers do not listen
        Ok(config)
    }
}

/// Looks at certificate and key together.
fn client(certificate: &Parameter, key: &Parameter, mistakes: &mut Vec<String>) -> Option<(PathBuf, PathBuf)> {
    let chain = tls::certificates(Path::new(&certificate.value));
    let chain = chain.map_err(|wanted| mistakes.push(format!("{} must be {wanted}", certificate.name))).ok()?;
    let usable = tls::private_key(Path::new(&key.value), &chain);
    usable.map_err(|wanted| mistakes.push(format!("{} must be {wanted}", key.name))).ok()?;
    Some((PathBuf::from(&certificate.value), PathBuf::from(&key.value)))
}

/// Root certificates, ready to be checked against.
#[derive(Debug)]
struct Trusted {
    anchors: RootCertStore,
    /// The same, as they stand in the file.
    certificates: Vec<CertificateDer<'static>>,
}

impl Roots {
    fn load(&self) -> Result<Trusted, String> {
        match self {
            Roots::System => Ok(Trusted { anchors: tls::system_roots()?, certificates: vec![] }),
            Roots::File(file) => Ok(Trusted { anchors: tls::roots(file)?, certificates: tls::certificates(file)? }),
        }
    }
}

/// Checks the server's certificate as far as the mode asks for. That the server has the certificate's key is checked in
/// every mode.
#[derive(Debug)]
struct Verifier {
    trusted: Option<Trusted>,
    names: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn check_chain(
        &self,
        trusted: &Trusted,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let anchors = &trusted.anchors;
        match verify_server_cert_signed_by_trust_anchor(&parsed, anchors, intermediates, now, self.algorithms.all) {
            // What `openssl req -x509` makes and PostgreSQL's manual shows: one certificate that is its own CA. It is
            // trusted where it is itself in the file. webpki has looked at its dates before it says this.
            Err(error) if is_ca(&error) && trusted.certificates.contains(certificate) => Ok(()),
            checked => checked,
        }
    }

    fn check_name(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> Result<(), Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        verify_server_name(&parsed, name).or_else(|error| {
            // Where there is no subjectAltName at all, libpq looks at the subject's common name.
            let host = name.to_str();
            let named = common_name(certificate).is_some_and(|name| is_name_of(&name, &host));
            if named { Ok(()) } else { Err(error) }
        })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(trusted) = &self.trusted {
            self.check_chain(trusted, certificate, intermediates, now)?;
        }
        if self.names {
            Verifier::check_name(certificate, name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Whether all that is wrong with a server's certificate is that it may sign others.
fn is_ca(error: &Error) -> bool {
    let Error::InvalidCertificate(CertificateError::Other(other)) = error else { return false };
    matches!(other.0.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity))
}

/// The common name of a certificate without a subjectAltName.
fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let certificate = Certificate::from_der(certificate).ok()?.tbs_certificate;
    let extensions = certificate.extensions.unwrap_or_default();
    if extensions.iter().any(|extension| extension.extn_id == ID_CE_SUBJECT_ALT_NAME) {
        return None;
    }
    let mut attributes = certificate.subject.0.iter().flat_map(|part| part.0.iter());
    let name = attributes.find(|attribute| attribute.oid == COMMON_NAME)?;
    std::str::from_utf8(name.value.value()).ok().map(str::to_owned)
}

/// Whether a certificate's name is for `host`: the same, or `*.` and all of it but its first label.
fn is_name_of(name: &str, host: &str) -> bool {
    let wildcard = || host.split_once('.').zip(name.strip_prefix("*."));
    name.eq_ignore_ascii_case(host) || wildcard().is_some_and(|((_, domain), rest)| rest.eq_ignore_ascii_case(domain))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(given: &[(&str, &str)]) -> Result<Security, Vec<String>> {
        Security::read(|wanted| {
            let (name, value) = given.iter().find(|(name, _)| *name == wanted)?;
            Some(Parameter { name: (*name).to_owned(), value: (*value).to_owned() })
        })
    }

    #[test]
    fn every_mode_has_libpqs_name_and_prefer_is_the_default() {
        assert_eq!(read(&[]).unwrap().mode, Mode::Prefer);
        for mode in [Mode::Disable, Mode::Allow, Mode::Prefer, Mode::Require] {
            assert_eq!(read(&[("sslmode", mode.name())]).unwrap().mode, mode);
        }
        assert!(read(&[("sslmode", "hunter2")]).unwrap_err()[0].contains("verify-full"));
    }

    #[test]
    fn verifying_needs_root_certificates_that_are_there() {
        for mode in ["verify-ca", "verify-full"] {
            assert!(read(&[("sslmode", mode)]).unwrap_err()[0].contains("PGSSLROOTCERT"));
        }
        let missing = read(&[("sslmode", "verify-ca"), ("sslrootcert", "/no/hunter2")]).unwrap_err();
        assert!(
            missing.len() == 1 && missing[0].contains("sslrootcert") && !missing[0].contains("hunter2"),
            "{missing:?}"
        );
        assert!(read(&[("sslmode", "disable"), ("sslrootcert", "/no/such"), ("sslcert", "/no/such")]).is_ok());
    }

    #[test]
    fn half_a_client_certificate_is_a_mistake() {
        assert!(read(&[("sslcert", "/no/such")]).unwrap_err()[0].contains("sslkey"));
        assert!(read(&[("sslkey", "/no/such")]).unwrap_err()[0].contains("sslcert"));
    }

    #[test]
    fn the_systems_roots_mean_verify_full_and_nothing_less() {
        let weak = read(&[("sslrootcert", "system"), ("sslmode", "require")]).unwrap_err();
        assert!(weak[0].contains("verify-full"), "{weak:?}");
    }

    #[test]
    fn a_common_name_is_a_host_or_one_label_below_a_domain() {
        assert!(is_name_of("db.Example", "DB.example") && is_name_of("*.example", "db.example"));
        assert!(!is_name_of("*.example", "a.db.example") && !is_name_of("*.example", "example"));
        assert!(!is_name_of("*", "db") && !is_name_of("*.", "db.example"));
    }
}
