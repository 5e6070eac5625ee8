//! Certificates, made for one test.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

/// A CA.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, in PEM form.
pub(super) struct Pair {
    pub(super) certificate: String,
    pub(super) key: String,
}

impl Authority {
    pub(super) fn new() -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, format!("CA {}", uuid::Uuid::now_v7()));
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(params, key), pem }
    }

    /// A server's certificate for these names and addresses.
    pub(super) fn server(&self, names: &[&str]) -> Pair {
        self.certify(subject(names, "a server"))
    }

    /// A server's certificate that was right once.
    pub(super) fn expired(&self, names: &[&str]) -> Pair {
        let mut params = subject(names, "a server");
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        self.certify(params)
    }

    /// A client's certificate.
    pub(super) fn client(&self, name: &str) -> Pair {
        self.certify(subject(&[], name))
    }

    fn certify(&self, params: CertificateParams) -> Pair {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Pair { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// Its own certificate, as a file.
    pub(super) fn file(&self, folder: &Path, name: &str) -> PathBuf {
        written(folder, name, &self.pem)
    }
}

impl Pair {
    /// One certificate that is its own CA and has a common name and nothing else, as `openssl req -x509 -subj /CN=...`
    /// makes it and PostgreSQL's manual shows.
    pub(super) fn self_signed(name: &str) -> Pair {
        let mut params = subject(&[], name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Pair { certificate: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() }
    }

    /// Both, as files.
    pub(super) fn files(&self, folder: &Path, name: &str) -> (PathBuf, PathBuf) {
        let certificate = written(folder, &format!("{name}.crt"), &self.certificate);
        (certificate, written(folder, &format!("{name}.key"), &self.key))
    }

    /// The key in the older form SEC 1, which is the inner part of PKCS #8.
    pub(super) fn with_sec1_key(self) -> Pair {
        let key = KeyPair::from_pem(&self.key).unwrap().serialize_der();
        // ECPrivateKey (RFC 5915): version 1, then 32 bytes of key; before it the tag and the length of the sequence.
        let version = key.windows(5).position(|bytes| bytes == [2, 1, 1, 4, 32]).unwrap();
        let inner = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &key[version - 2..]);
        Pair { key: format!("-----BEGIN EC PRIVATE KEY-----\n{inner}\n-----END EC PRIVATE KEY-----\n"), ..self }
    }
}

fn subject(names: &[&str], common_name: &str) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

fn written(folder: &Path, name: &str, content: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, content).unwrap();
    path
}
