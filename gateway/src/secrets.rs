//! The client secrets: how they are read, held, and replaced while the gateway runs.
//!
//! A file is read again whenever its content changes. It is looked at once a second, by reading it: that sees an edit, a
//! `mv`, and the swap of a directory's symbolic link (Kubernetes replaces `..data` under a mounted Secret) alike, on every
//! file system, where notifications of the kernel see some of them.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use prometheus_client::metrics::counter::Counter;
use sha2::Sha256;
use shared::ops::Readiness;
use subtle::{Choice, ConstantTimeEq as _};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::signature::Signature;

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// For how long a changed file must stay as it is before it counts: who writes it in place may be half-way.
const SETTLED_AFTER: Duration = Duration::from_millis(100);

/// The fewest and the most characters of a secret. Sentry's have 64 hex digits.
const LENGTH: RangeInclusive<usize> = 16..=256;
/// The most secrets at once: two while one is rotated, and room for several integrations.
const MOST: usize = 8;
/// The most bytes of the file. It is read once a second, so a longer one must not be held in memory.
const LARGEST_FILE: u64 = 64 << 10;

/// The client secrets, any of which may have signed. Never shown. Clones share them.
#[derive(Clone)]
pub struct Secrets(Arc<[Hmac<Sha256>]>);

impl Secrets {
    /// Secrets separated by commas or line ends. White space around each is dropped, and so are empty ones.
    ///
    /// The text is taken as a whole or not at all. Lines of JSON, of HTML or of a comment would else be secrets, and
    /// an outsider can guess those.
    ///
    /// # Errors
    /// Fails when there is none, when there are too many, or when a part does not look like a secret.
    pub fn parse(text: &str) -> Result<Self, Unusable> {
        let secrets = text.split([',', '\n']).map(str::trim).filter(|secret| !secret.is_empty());
        let secrets: Vec<&str> = secrets.collect();
        if secrets.is_empty() {
            return Err(Unusable::Empty);
        }
        if !secrets.iter().all(|secret| is_secret(secret)) {
            return Err(Unusable::NoSecret);
        }
        if secrets.len() > MOST {
            return Err(Unusable::TooMany);
        }
        // Keyed once here; each delivery clones the keyed state.
        let key = |secret: &str| Hmac::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length");
        Ok(Secrets(secrets.into_iter().map(key).collect()))
    }

    /// How many there are, one at least.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Begins to sign with all of the secrets, piece by piece.
    pub fn begin(&self) -> Signing {
        Signing(self.0.to_vec())
    }

    /// Whether any of the secrets gives `signature` over `signed`, in a time that depends on neither.
    pub fn signed(&self, signed: &[u8], signature: &Signature) -> bool {
        let mut signing = self.begin();
        signing.update(signed);
        signing.gives(signature)
    }
}

/// Tells by length and characters whether a text can be a secret.
fn is_secret(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._~+/=-".contains(&byte);
    LENGTH.contains(&text.len()) && text.bytes().all(fits)
}

/// What is being signed with each of the secrets.
pub struct Signing(Vec<Hmac<Sha256>>);

impl Signing {
    /// Takes the next piece of it.
    pub fn update(&mut self, piece: &[u8]) {
        self.0.iter_mut().for_each(|secret| secret.update(piece));
    }

    /// Whether any of the secrets gives `signature` over all of it, in a time that does not depend on the answer.
    pub fn gives(self, signature: &Signature) -> bool {
        let matches = |secret: Hmac<Sha256>| secret.finalize().into_bytes().ct_eq(&signature.0);
        self.0.into_iter().map(matches).fold(Choice::from(0), |any, this| any | this).into()
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({} of them, not shown)", self.0.len())
    }
}

/// Where the secrets are from: `SENTRY_CLIENT_SECRET`, or the file of `SENTRY_CLIENT_SECRET_FILE`.
#[derive(Debug)]
pub struct Source {
    current: watch::Sender<Secrets>,
    file: Option<SecretFile>,
}

/// A file of secrets, and its content at the start.
struct SecretFile {
    path: PathBuf,
    content: String,
}

/// The reason for which a text of secrets cannot be used. The words follow "it" and hold nothing of the text.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It cannot be read, or is not UTF-8.
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    /// It is a file that is too long.
    #[error("has more than {LARGEST_FILE} bytes")]
    TooLarge,
    /// It holds no secret.
    #[error("is empty")]
    Empty,
    /// A part of it is no secret.
    #[error(
        "holds something other than secrets: a secret has {} to {} characters of A-Z a-z 0-9 . _ ~ + / = -",
        LENGTH.start(), LENGTH.end()
    )]
    NoSecret,
    /// It holds more secrets than are ever needed.
    #[error("holds more than {MOST} secrets")]
    TooMany,
}

impl fmt::Debug for SecretFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretFile({}, content not shown)", self.path.display())
    }
}

impl Source {
    /// Secrets that stay as they are.
    pub fn fixed(secrets: Secrets) -> Self {
        Source { current: watch::Sender::new(secrets), file: None }
    }

    /// Secrets from a file, which is watched once [`Source::watch`] runs.
    ///
    /// # Errors
    /// Fails when the file cannot be read now, or when [`Secrets::parse`] refuses its content.
    pub fn file(path: &Path) -> Result<Self, Unusable> {
        let content = read(path)?;
        let secrets = Secrets::parse(&content)?;
        let file = SecretFile { path: path.to_owned(), content };
        Ok(Source { current: watch::Sender::new(secrets), file: Some(file) })
    }

    /// The file, where they are from one.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }

    /// The secrets, as they are at any time.
    pub fn current(&self) -> watch::Receiver<Secrets> {
        self.current.subscribe()
    }

    /// Takes what changes in the file, without end; returns at once when there is none. A file that cannot be used leaves
    /// the secrets as they are. Until it can be used again, `readiness` tells its problem of the moment. The log and
    /// `rejected` have the first problem alone.
    pub async fn watch(&self, readiness: &Readiness, rejected: &Counter) {
        let Some(file) = &self.file else { return };
        let mut taken = file.content.clone();
        let in_use = |secrets: &Secrets| Ok(format!("{} in use", secrets.0.len()));
        readiness.set("secrets", in_use(&self.current.borrow()));
        let mut troubled = false;
        loop {
            sleep(LOOK_EVERY).await;
            let (content, secrets) = match file.look(&taken).await {
                Ok(None) if !troubled => continue,
                Ok(None) => (None, self.current.borrow().clone()),
                Ok(Some((content, secrets))) => (Some(content), secrets),
                Err(problem) => {
                    let path = file.path.display();
                    readiness.set("secrets", Err(format!("{path} {problem}; the secrets stay as they were")));
                    if !troubled {
                        tracing::error!(%path, "the file of SENTRY_CLIENT_SECRET_FILE {problem}; the secrets stay as they were");
                        rejected.inc();
                        troubled = true;
                    }
                    continue;
                }
            };
            troubled = false;
            readiness.set("secrets", in_use(&secrets));
            tracing::info!(path = %file.path.display(), secrets = secrets.0.len(), "took the client secrets from their file");
            if let Some(content) = content {
                taken = content;
                self.current.send_replace(secrets);
            }
        }
    }
}

impl SecretFile {
    /// What the file holds now, where that is something else than what was `taken`.
    async fn look(&self, taken: &str) -> Result<Option<(String, Secrets)>, Unusable> {
        let mut seen = self.read().await;
        loop {
            if seen.as_ref().is_ok_and(|content| content == taken) {
                return Ok(None);
            }
            sleep(SETTLED_AFTER).await;
            let again = self.read().await;
            let settled = match (&seen, &again) {
                (Ok(before), Ok(after)) => before == after,
                (Err(_), Err(_)) => true,
                _ => false,
            };
            if settled {
                let content = again?;
                let secrets = Secrets::parse(&content)?;
                return Ok(Some((content, secrets)));
            }
            seen = again;
        }
    }

    async fn read(&self) -> Result<String, Unusable> {
        let path = self.path.clone();
        spawn_blocking(move || read(&path)).await.map_err(io::Error::from)?
    }
}

/// Reads a file of secrets. Blocks.
fn read(path: &Path) -> Result<String, Unusable> {
    let mut content = String::new();
    File::open(path)?.take(LARGEST_FILE + 1).read_to_string(&mut content)?;
    if content.len() as u64 > LARGEST_FILE { Err(Unusable::TooLarge) } else { Ok(content) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_never_shown() {
        let secrets = Secrets::parse("hunter2-hunter2-hunter2,hunter3-hunter3-hunter3").unwrap();
        assert_eq!(format!("{secrets:?}"), "Secrets(2 of them, not shown)");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        std::fs::write(&path, "hunter2-hunter2-hunter2\nhunter3-hunter3-hunter3\n").unwrap();
        let shown = format!("{:?}", Source::file(&path).unwrap());
        assert!(shown.contains("2 of them") && !shown.contains("hunter"), "{shown}");
    }

    #[test]
    fn a_text_is_taken_whole_or_not_at_all() {
        let (shortest, longest) = ("0123456789abcdef", "x".repeat(256));
        let most = [shortest; MOST].join("\n");
        for good in [shortest, &longest, &format!(" {shortest} ,\r\n\n{longest}\r\n"), "AZaz09._~+/=-AZaz", &most] {
            assert!(Secrets::parse(good).is_ok(), "{good}");
        }
        assert!(matches!(Secrets::parse(" ,\n "), Err(Unusable::Empty)));
        for part in
            ["0123456789abcde", &"x".repeat(257), "0123456789\tabcdef", "0123456789abcdé0", "<html>0123456789>", "\0"]
        {
            let with = format!("{shortest}\n{part}\n");
            assert!(matches!(Secrets::parse(&with), Err(Unusable::NoSecret)), "{part}");
        }
        assert!(matches!(Secrets::parse(&format!("{most},{shortest}")), Err(Unusable::TooMany)));
    }

    #[test]
    fn a_file_that_cannot_be_used_says_why_and_nothing_of_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        assert!(matches!(Source::file(&path), Err(Unusable::Unreadable(_))));
        std::fs::write(&path, " \n").unwrap();
        assert!(matches!(Source::file(&path), Err(Unusable::Empty)));
        for content in [&b"hunter\xff"[..], b"hunter", b"{\"hunter\": 2}"] {
            std::fs::write(&path, content).unwrap();
            let problem = Source::file(&path).unwrap_err().to_string();
            assert!(!problem.contains("hunter"), "{problem}");
        }
        std::fs::write(&path, format!("0123456789abcdef{}", "\n".repeat(64 << 10))).unwrap();
        assert_eq!(Source::file(&path).unwrap_err().to_string(), "has more than 65536 bytes");
    }
}
