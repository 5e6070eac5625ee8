//! The variable or the file that the client secrets come from.
//!
//! A file is read again whenever its content changes. It is read once a second. Reading sees an edit and a `mv`. It
//! also sees the swap of a directory's symbolic link: Kubernetes replaces `..data` under a mounted Secret. Notifications of
//! the kernel see only some of these, and not on every file system.
//!
//! A secret that is taken out of the file stays valid for a grace time. Why: the moment at which Sentry uses the new one
//! and the moment at which the file has it are not the same.

use std::fmt;
use std::future::pending;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use prometheus_client::metrics::counter::Counter;
use shared::file::open_regular;
use shared::ops::Readiness;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, sleep_until};

use super::{LARGEST_FILE, Secrets, Unusable, show_time};

/// Time between two looks at the file.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// For how long a changed file must stay as it is before it counts: who writes it in place may be half-way.
const SETTLED_AFTER: Duration = Duration::from_millis(100);
/// The least time between two lines of the log about wrong signatures.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// A secret that has signed a delivery within this time is in use: at the end of its grace time deliveries are lost.
const STILL_USED: Duration = Duration::from_secs(60);

/// The source of the secrets: `SENTRY_CLIENT_SECRET`, or the file of `SENTRY_CLIENT_SECRET_FILE`.
#[derive(Debug)]
pub struct Source {
    current: watch::Sender<Secrets>,
    file: Option<SecretFile>,
    grace: Duration,
}

/// A file of secrets, and its content at the start.
struct SecretFile {
    path: PathBuf,
    content: String,
    condition: Arc<Mutex<Condition>>,
}

/// The file as it was found last.
struct Condition {
    changed: Option<SystemTime>,
    /// The reason for which its content is not in use.
    problem: Option<String>,
}

/// The content of a file, and the time at which it was written.
struct Content {
    text: String,
    changed: Option<SystemTime>,
}

impl fmt::Debug for SecretFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretFile({}, content not shown)", self.path.display())
    }
}

impl Source {
    /// Secrets that stay as they are.
    pub fn fixed(secrets: Secrets) -> Self {
        Source { current: watch::Sender::new(secrets), file: None, grace: Duration::ZERO }
    }

    /// Secrets from a file, which is watched once [`Source::watch`] runs. A secret that is taken out of it stays valid
    /// for `grace`.
    ///
    /// # Errors
    /// Fails when the file cannot be read now, or when [`Secrets::parse`] refuses its content.
    pub fn file(path: &Path, grace: Duration) -> Result<Self, Unusable> {
        let Content { text, changed } = read(path)?;
        let secrets = Secrets::parse(&text)?;
        let condition = Arc::new(Mutex::new(Condition { changed, problem: None }));
        let file = SecretFile { path: path.to_owned(), content: text, condition };
        Ok(Source { current: watch::Sender::new(secrets), file: Some(file), grace })
    }

    /// The file, where they are from one.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }

    /// The time at which the file was last written, in words.
    pub fn changed(&self) -> Option<String> {
        self.file.as_ref().and_then(|file| file.with(|condition| condition.words(&file.path)))
    }

    /// The secrets, as they are at any time.
    pub fn current(&self) -> watch::Receiver<Secrets> {
        self.current.subscribe()
    }

    /// Logs the secrets in use, and keeps the check `secrets` in `readiness`.
    pub fn announce(&self, readiness: &Readiness) {
        let secrets = self.current.borrow().clone();
        let (number, fingerprints, changed) = (secrets.count(), secrets.fingerprints(), self.changed());
        tracing::info!(secrets = number, fingerprints, changed, "client secrets in use");
        let (current, file) =
            (self.current(), self.file.as_ref().map(|file| (file.path.clone(), file.condition.clone())));
        readiness.probe("secrets", move || {
            let state = current.borrow().state();
            let Some((path, condition)) = &file else { return state };
            let condition = condition.lock().unwrap_or_else(PoisonError::into_inner);
            match (&condition.problem, state) {
                (Some(problem), Ok(_)) => Err(problem.clone()),
                (Some(problem), Err(wrong)) => Err(format!("{problem}. {wrong}")),
                (None, Err(wrong)) => Err(format!("{wrong}{}", condition.sentence(path))),
                (None, Ok(well)) => Ok(well),
            }
        });
    }

    /// Takes what changes in the file, ends grace times, and warns of wrong signatures. Never returns. A file that cannot
    /// be used leaves the secrets as they are: the check tells its problem of the moment, the log and `rejected` have the
    /// first problem alone.
    pub async fn watch(&self, rejected: &Counter) {
        tokio::join!(self.follow_file(rejected), self.end_grace_times(), self.warn_of_wrong_signatures());
    }

    async fn follow_file(&self, rejected: &Counter) {
        let Some(file) = &self.file else { return };
        let mut taken = file.content.clone();
        loop {
            sleep(LOOK_EVERY).await;
            let was_bad = file.with(|condition| condition.problem.is_some());
            match file.look(&taken).await {
                Ok(None) if !was_bad => continue,
                Ok(None) => file.with(|condition| condition.problem = None),
                Ok(Some((content, secrets))) => {
                    file.with(|condition| *condition = Condition { changed: content.changed, problem: None });
                    taken = content.text;
                    self.current.send_modify(|current| *current = secrets.succeed(current, self.grace));
                }
                Err(problem) => {
                    let path = file.path.display();
                    let told = format!("{path} {problem}; the secrets stay as they were");
                    file.with(|condition| condition.problem = Some(told));
                    if !was_bad {
                        tracing::error!(%path, "the file of SENTRY_CLIENT_SECRET_FILE {problem}; the secrets stay as they were");
                        rejected.inc();
                    }
                    continue;
                }
            }
            let secrets = self.current.borrow().clone();
            let (number, fingerprints, previous) = (secrets.count(), secrets.fingerprints(), secrets.previous());
            let (path, grace) = (file.path.display(), self.grace);
            let words = "took the client secrets from their file";
            tracing::info!(%path, secrets = number, fingerprints, previous, ?grace, "{words}");
        }
    }

    async fn end_grace_times(&self) {
        let mut current = self.current();
        loop {
            let next = current.borrow_and_update().next_expiry();
            let over = async {
                match next {
                    Some(end) => sleep_until(end).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                _ = current.changed() => {}
                () = over => {
                    for key in current.borrow().expired() {
                        let secret = key.describe();
                        if key.unused_for() < STILL_USED {
                            tracing::warn!("the grace time of client secret {secret} is over: what it signs is refused from now on");
                        } else {
                            tracing::info!("the grace time of client secret {secret} is over");
                        }
                    }
                    self.current.send_modify(|current| *current = current.without_expired());
                }
            }
        }
    }

    async fn warn_of_wrong_signatures(&self) {
        let mut warned: Option<Instant> = None;
        loop {
            sleep(LOOK_EVERY).await;
            let secrets = self.current.borrow().clone();
            let Err(wrong) = secrets.state() else { continue };
            let is_new = |warned: Instant| secrets.tally.last_wrong().is_some_and(|last| last > warned);
            if warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY && is_new(warned)) {
                warned = Some(Instant::now());
                let sentence = self.file.as_ref().map(|file| file.with(|condition| condition.sentence(&file.path)));
                tracing::warn!("{wrong}{}", sentence.unwrap_or_default());
            }
        }
    }
}

impl Condition {
    fn words(&self, path: &Path) -> Option<String> {
        Some(format!("{} last changed at {}", path.display(), show_time(self.changed?)))
    }

    /// The same as a sentence that follows others.
    fn sentence(&self, path: &Path) -> String {
        self.words(path).map(|words| format!(" {words}.")).unwrap_or_default()
    }
}

impl SecretFile {
    fn with<T>(&self, see: impl FnOnce(&mut Condition) -> T) -> T {
        // It is whole at any time.
        see(&mut self.condition.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The file's secrets now, if they are others than those that were `taken`.
    async fn look(&self, taken: &str) -> Result<Option<(Content, Secrets)>, Unusable> {
        let mut seen = self.read().await;
        loop {
            if seen.as_ref().is_ok_and(|content| content.text == taken) {
                return Ok(None);
            }
            sleep(SETTLED_AFTER).await;
            let again = self.read().await;
            let settled = match (&seen, &again) {
                (Ok(before), Ok(after)) => before.text == after.text,
                (Err(_), Err(_)) => true,
                _ => false,
            };
            if settled {
                let content = again?;
                let secrets = Secrets::parse(&content.text)?;
                return Ok(Some((content, secrets)));
            }
            seen = again;
        }
    }

    async fn read(&self) -> Result<Content, Unusable> {
        let path = self.path.clone();
        spawn_blocking(move || read(&path)).await.map_err(io::Error::from)?
    }
}

/// Reads a file of secrets. Blocks.
fn read(path: &Path) -> Result<Content, Unusable> {
    let file = open_regular(path)?;
    let changed = file.metadata()?.modified().ok();
    let mut text = String::new();
    file.take(LARGEST_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > LARGEST_FILE {
        return Err(Unusable::TooLarge);
    }
    Ok(Content { text, changed })
}
