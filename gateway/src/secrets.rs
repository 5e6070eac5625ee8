//! The client secrets: how they are read, held, and replaced while the gateway runs.
//!
//! [`Secrets`] are those that may have signed at one moment. [`Source`] is the variable or the file that they come from.
//! A secret is shown by its [`Fingerprint`] alone.

mod source;
mod tally;

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

use crate::signature::Signature;

pub use source::Source;
use tally::Tally;

/// The fewest and the most characters of a secret. Sentry's have 64 hex digits.
const LENGTH: RangeInclusive<usize> = 16..=256;
/// The most secrets at once: two while one is rotated, and room for several integrations. As many previous ones may be
/// valid beside them.
const MOST: usize = 8;
/// The most bytes of the file. It is read once a second, so a longer one must not be held in memory.
const LARGEST_FILE: u64 = 64 << 10;

/// The client secrets, any of which may have signed. Never shown. Clones share them.
#[derive(Clone)]
pub struct Secrets {
    keys: Arc<[Key]>,
    /// The signatures since these secrets were taken.
    tally: Arc<Tally>,
}

/// One secret.
#[derive(Clone)]
struct Key {
    /// Keyed once. Each delivery clones the keyed state.
    mac: Hmac<Sha256>,
    digest: [u8; 32],
    usage: Arc<Usage>,
    /// The end of a previous secret's grace time. `None`: the variable or the file holds the secret.
    valid_until: Option<Instant>,
}

/// The deliveries that a secret has signed.
#[derive(Debug, Default)]
struct Usage {
    deliveries: AtomicU64,
    /// Unix time of the last, in seconds; 0 for none.
    last: AtomicU64,
}

/// The first 32 bits of a secret's SHA-256, as 8 hex digits: `printf %s "$SECRET" | sha256sum | cut -c1-8`. It tells
/// secrets apart and tells nothing about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 4]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl Key {
    fn new(secret: &str) -> Self {
        Key {
            mac: Hmac::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length"),
            digest: Sha256::digest(secret).into(),
            usage: Arc::default(),
            valid_until: None,
        }
    }

    fn fingerprint(&self) -> Fingerprint {
        let [a, b, c, d, ..] = self.digest;
        Fingerprint([a, b, c, d])
    }

    /// The time since the last delivery. Without any it is longer than any grace time.
    fn unused_for(&self) -> Duration {
        let last = SystemTime::UNIX_EPOCH + Duration::from_secs(self.usage.last.load(Ordering::Relaxed));
        SystemTime::now().duration_since(last).unwrap_or_default()
    }

    /// The fingerprint and the use of the secret, for a person.
    fn describe(&self) -> String {
        let ago = self.unused_for().as_secs();
        let used = match self.usage.deliveries.load(Ordering::Relaxed) {
            0 => "no delivery yet".to_owned(),
            1 => format!("1 delivery, {ago} s ago"),
            many => format!("{many} deliveries, the last {ago} s ago"),
        };
        format!("{} ({used})", self.fingerprint())
    }
}

impl Usage {
    fn count(&self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.deliveries.fetch_add(1, Ordering::Relaxed);
        self.last.store(now.as_secs(), Ordering::Relaxed);
    }
}

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
        let repeated = |at: usize, secret: &str| secrets[..at].contains(&secret);
        let distinct = secrets.iter().enumerate().filter(|(at, secret)| !repeated(*at, secret));
        Ok(Secrets::of(distinct.map(|(_, secret)| Key::new(secret)).collect()))
    }

    fn of(keys: Arc<[Key]>) -> Self {
        Secrets { keys, tally: Arc::default() }
    }

    /// These secrets in the place of `before`. Secrets that only `before` has stay valid for `grace`.
    fn succeed(&self, before: &Secrets, grace: Duration) -> Secrets {
        let now = Instant::now();
        let known = |key: &Key, among: &Secrets| among.keys.iter().find(|other| other.digest == key.digest).cloned();
        let current = self.keys.iter().map(|key| {
            let usage = known(key, before).map_or_else(|| key.usage.clone(), |before| before.usage);
            Key { usage, ..key.clone() }
        });
        let mut previous: Vec<Key> = before.keys.iter().filter(|key| known(key, self).is_none()).cloned().collect();
        for key in &mut previous {
            key.valid_until.get_or_insert(now + grace);
        }
        previous.retain(|key| key.valid_until.is_some_and(|until| until > now));
        previous.sort_by_key(|key| std::cmp::Reverse(key.valid_until));
        Secrets::of(current.chain(previous.into_iter().take(MOST)).collect())
    }

    /// The same without the previous secrets whose grace time is over.
    fn without_expired(&self) -> Secrets {
        let now = Instant::now();
        let is_valid = |key: &&Key| key.valid_until.is_none_or(|until| until > now);
        Secrets::of(self.keys.iter().filter(is_valid).cloned().collect())
    }

    /// The previous secrets whose grace time is over.
    fn expired(&self) -> impl Iterator<Item = &Key> {
        let now = Instant::now();
        self.keys.iter().filter(move |key| key.valid_until.is_some_and(|until| until <= now))
    }

    /// The next end of a grace time.
    fn next_expiry(&self) -> Option<Instant> {
        self.keys.iter().filter_map(|key| key.valid_until).min()
    }

    /// The number of secrets that the variable or the file holds, one at least.
    pub fn count(&self) -> usize {
        self.keys.iter().filter(|key| key.valid_until.is_none()).count()
    }

    /// The number of secrets that may have signed: previous ones in their grace time, too.
    pub fn valid(&self) -> usize {
        self.keys.len()
    }

    /// The fingerprints of the secrets that may have signed, each with the number of deliveries that it has signed.
    pub fn deliveries(&self) -> impl Iterator<Item = (Fingerprint, u64)> {
        self.keys.iter().map(|key| (key.fingerprint(), key.usage.deliveries.load(Ordering::Relaxed)))
    }

    /// The fingerprints of the secrets that the variable or the file holds, separated by commas.
    pub fn fingerprints(&self) -> String {
        list(self.keys.iter().filter(|key| key.valid_until.is_none()).map(|key| key.fingerprint().to_string()))
    }

    /// The fingerprints of the previous secrets that are still valid, separated by commas.
    fn previous(&self) -> String {
        list(self.keys.iter().filter(|key| key.valid_until.is_some()).map(|key| key.fingerprint().to_string()))
    }

    /// Begins to sign with all of the secrets, piece by piece.
    pub fn begin(&self) -> Signing {
        Signing(self.keys.iter().map(|key| key.mac.clone()).collect())
    }

    /// The place of the secret that gives `signature` over `signed`. See [`Signing::gives`].
    pub fn signed(&self, signed: &[u8], signature: &Signature) -> Option<usize> {
        let mut signing = self.begin();
        signing.update(signed);
        signing.gives(signature)
    }

    /// Counts a right signature, by the secret at that place.
    pub fn count_right(&self, place: usize) {
        self.keys[place].usage.count();
        self.tally.right();
    }

    /// Counts a wrong signature.
    pub fn count_wrong(&self) {
        self.tally.wrong();
    }

    /// The secrets and their use, for a person.
    ///
    /// # Errors
    /// Fails while signatures are wrong and none is right (see [`tally`]).
    fn state(&self) -> Result<String, String> {
        if let Some(wrong) = self.tally.only_wrong() {
            return Err(format!("{wrong} Fingerprints in use: {}.", self.fingerprints()));
        }
        let mut text = format!("{} in use", self.count());
        for (number, key) in self.keys.iter().enumerate() {
            let Some(until) = key.valid_until else {
                text += &format!("{} {}", if number == 0 { ":" } else { "," }, key.describe());
                continue;
            };
            let until = SystemTime::now() + until.saturating_duration_since(Instant::now());
            text += &format!("; previous: {}, valid until {}", key.describe(), show_time(until));
        }
        Ok(text)
    }
}

fn list(texts: impl Iterator<Item = String>) -> String {
    texts.collect::<Vec<_>>().join(", ")
}

/// RFC 3339, in UTC, to the second.
fn show_time(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time);
    time.replace_nanosecond(0).unwrap_or(time).format(&Rfc3339).unwrap_or_default()
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

    /// The place of the secret that gives `signature` over all of it. All secrets are compared before any result is
    /// looked at, so a wrong signature takes a time that does not depend on it.
    pub fn gives(self, signature: &Signature) -> Option<usize> {
        let matches = |secret: Hmac<Sha256>| secret.finalize().into_bytes().ct_eq(&signature.0);
        let matched: Vec<Choice> = self.0.into_iter().map(matches).collect();
        matched.into_iter().position(bool::from)
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({} of them, not shown)", self.keys.len())
    }
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
        let shown = format!("{:?}", Source::file(&path, Duration::ZERO).unwrap());
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
        assert!(matches!(Source::file(&path, Duration::ZERO), Err(Unusable::Unreadable(_))));
        std::fs::write(&path, " \n").unwrap();
        assert!(matches!(Source::file(&path, Duration::ZERO), Err(Unusable::Empty)));
        for content in [&b"hunter\xff"[..], b"hunter", b"{\"hunter\": 2}"] {
            std::fs::write(&path, content).unwrap();
            let problem = Source::file(&path, Duration::ZERO).unwrap_err().to_string();
            assert!(!problem.contains("hunter"), "{problem}");
        }
        std::fs::write(&path, format!("0123456789abcdef{}", "\n".repeat(64 << 10))).unwrap();
        assert_eq!(Source::file(&path, Duration::ZERO).unwrap_err().to_string(), "has more than 65536 bytes");
    }

    #[test]
    fn a_secret_is_told_by_its_fingerprint() {
        // printf %s a-secret-of-the-tests | sha256sum | cut -c1-8
        let secrets = Secrets::parse("a-secret-of-the-tests,another-of-the-tests,a-secret-of-the-tests").unwrap();
        assert_eq!(secrets.fingerprints(), "eab69819, 68135f93");
        assert_eq!(secrets.count(), 2, "one is there twice");
    }

    #[tokio::test(start_paused = true)]
    async fn previous_secrets_are_valid_for_the_grace_time_of_their_own_change() {
        let texts: Vec<String> = (0..20).map(|number| format!("the-secret-number-{number:02}")).collect();
        let grace = Duration::from_secs(600);
        let parse = |text: &str| Secrets::parse(text).unwrap();
        let first = parse(&texts[0]);
        first.count_right(0);
        let second = parse(&texts[1]).succeed(&first, grace);
        assert_eq!((second.count(), second.valid(), second.previous()), (1, 2, first.fingerprints()));
        tokio::time::advance(Duration::from_secs(400)).await;
        let third = parse(&texts[2]).succeed(&second, grace);
        assert_eq!((third.count(), third.valid()), (1, 3));
        tokio::time::advance(Duration::from_secs(300)).await;
        assert_eq!(third.without_expired().previous(), second.fingerprints());
        // Back in the file it is no previous one, and its count goes on.
        let back = parse(&format!("{},{}", texts[2], texts[0])).succeed(&second, grace);
        assert_eq!((back.count(), back.deliveries().nth(1).unwrap().1), (2, 1));
        assert_eq!(parse(&texts[1]).succeed(&first, Duration::ZERO).valid(), 1, "no grace time");
        let many = texts.iter().fold(first, |before, text| parse(text).succeed(&before, grace));
        assert_eq!(many.valid(), 1 + MOST);
        assert!(many.previous().starts_with(&parse(&texts[18]).fingerprints()), "the newest are kept");
    }
}
