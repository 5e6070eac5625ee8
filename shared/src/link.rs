//! The connection of a program to NATS, for as long as the program runs.
//!
//! async-nats connects again by itself. One fault that it does not survive is a panic of its own task, which a single message
//! can bring about ([`crate::hostile`]). The client then takes no more commands and still calls itself connected. A
//! [`Link`] notices that the task has ended and makes a new client; subscriptions and requests of the old one are gone.
//!
//! Another fault costs memory. The client keeps a place for the answer of each request, also when the caller has stopped
//! waiting, and only an answer frees it (<https://github.com/nats-io/nats.rs/issues/1617>). A broker whose disk is full takes
//! publishes and never acknowledges them. So after [`UNANSWERED_MAX`] time-outs a new client takes over. The old one
//! ends when its last user has let go of it.
//!
//! The check `nats` of `/readyz` is a round trip: the server has answered a request within the last seconds.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::client::RequestErrorKind;
use async_nats::connection::State;
use async_nats::{Client, Event, ServerError, jetstream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::nats::Connection;
use crate::ops::Readiness;

/// Time between two requests to the server. Each new connection is asked at once.
const ASK_EVERY: Duration = Duration::from_secs(3);
/// Longest wait for an answer of the server, also for every request to JetStream.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Pause before a client that has ended is replaced. Hostile messages cannot make a busy loop of it.
const REPLACE_AFTER: Duration = Duration::from_millis(200);
/// Time for which a refused subject counts as refused. A server that is given other permissions keeps the connection, and
/// tells its clients nothing.
const DENIED_FOR: Duration = Duration::from_secs(60);
/// Requests without an answer after which a client is replaced. Each costs it some 300 bytes.
const UNANSWERED_MAX: usize = 1024;

/// A connection whose client is replaced when it has ended. Clones share it.
#[derive(Clone)]
pub struct Link(Arc<Kept>);

/// The state of a [`Link`] and the task that keeps it. Dropping it ends the task.
struct Kept {
    shared: Arc<Shared>,
    _keeper: AbortOnDropHandle<()>,
}

struct Shared {
    connection: Connection,
    /// The stream that the server is asked about.
    stream: String,
    program: String,
    queue: usize,
    readiness: Readiness,
    /// Counts connections made, connections lost, and clients replaced.
    changes: Arc<watch::Sender<u64>>,
    current: watch::Sender<Arc<Linked>>,
    replaced: AtomicU64,
}

/// A client, its JetStream context, and whether its task still runs.
#[derive(Debug)]
pub struct Linked {
    /// The client.
    pub client: Client,
    /// JetStream by this client, with this project's time limits.
    pub context: jetstream::Context,
    ended: CancellationToken,
    /// The same as `ended`, to be read for each publish without a lock.
    has_ended: Arc<AtomicBool>,
    /// Requests that had no answer.
    unanswered: AtomicUsize,
    /// Cancelled after [`UNANSWERED_MAX`] of them.
    worn: CancellationToken,
    /// Another client has taken over: the events of this one are no longer told.
    retired: Arc<AtomicBool>,
    denied: Arc<Denied>,
    /// Connections of the clients before this one.
    connects_before: u64,
}

/// The subjects that the server has refused on this connection, and the times of the last refusals.
type Denied = Mutex<BTreeMap<String, Instant>>;

/// Dropped with the client's task.
struct Ended(CancellationToken, Arc<AtomicBool>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.1.store(true, Ordering::Relaxed);
        self.0.cancel();
    }
}

impl Linked {
    /// Returns `true` when the client's task has ended: only another client can work.
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// Returns once the client's task has ended.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// The subjects that the server has not let this client publish to, on this connection. The server's refusal answers no
    /// request: what was asked there ends in a time-out.
    pub fn denied(&self) -> Vec<String> {
        lock(&self.denied).keys().cloned().collect()
    }

    /// Returns `true` when the server has refused a message to `subject` on this connection, within the last minute.
    pub fn is_denied(&self, subject: &str) -> bool {
        lock(&self.denied).get(subject).is_some_and(|at| at.elapsed() < DENIED_FOR)
    }

    /// Returns `true` while the client has a connection.
    pub fn is_up(&self) -> bool {
        !self.has_ended() && self.client.connection_state() == State::Connected
    }

    /// Number of connections that this client and those before it have made. A client that takes over for unanswered requests
    /// connects as the one before it was connected, so its first connection is not counted.
    pub fn connects(&self) -> u64 {
        self.connects_before + self.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Notes that a request had no answer in time.
    pub fn note_unanswered(&self) {
        if self.unanswered.fetch_add(1, Ordering::Relaxed) + 1 >= UNANSWERED_MAX {
            self.worn.cancel();
        }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({})", self.0.shared.program)
    }
}

impl Link {
    /// See [`crate::stream::NatsSettings::connect`].
    pub(crate) async fn open(
        connection: &Connection,
        stream: &str,
        program: &str,
        queue: usize,
        readiness: &Readiness,
    ) -> anyhow::Result<Self> {
        let changes = Arc::<watch::Sender<u64>>::default();
        let first = make(connection, program, queue, readiness, &changes, 0).await?;
        let shared = Arc::new(Shared {
            connection: connection.clone(),
            stream: stream.to_owned(),
            program: program.to_owned(),
            queue,
            readiness: readiness.clone(),
            changes,
            current: watch::Sender::new(Arc::new(first)),
            replaced: AtomicU64::new(0),
        });
        let kept = shared.clone();
        let keeper = AbortOnDropHandle::new(tokio::spawn(async move { kept.keep().await }));
        Ok(Link(Arc::new(Kept { shared, _keeper: keeper })))
    }

    /// The client as it is now. To be asked for again after a failure: it may have been replaced.
    pub fn current(&self) -> Arc<Linked> {
        self.0.shared.current.borrow().clone()
    }

    /// Changes with each connection that is made or lost, and with each client that is replaced. The client tells of a
    /// connection just before it calls itself connected.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.shared.changes.subscribe()
    }

    /// Returns once another client has taken the place of this one.
    pub async fn succeeded(&self, linked: &Arc<Linked>) {
        let mut current = self.0.shared.current.subscribe();
        // The sender is ours, so it is there.
        let _ = current.wait_for(|current| !Arc::ptr_eq(current, linked)).await;
    }

    /// Number of clients that were replaced.
    pub fn replaced(&self) -> u64 {
        self.0.shared.replaced.load(Ordering::Relaxed)
    }
}

/// A JetStream context with this project's time limits.
pub fn jetstream(client: Client) -> jetstream::Context {
    let mut context = jetstream::new(client);
    context.set_timeout(ANSWER_WITHIN);
    context
}

/// A client, and a token that is cancelled when its task ends.
async fn make(
    connection: &Connection,
    program: &str,
    queue: usize,
    readiness: &Readiness,
    changes: &Arc<watch::Sender<u64>>,
    connects_before: u64,
) -> anyhow::Result<Linked> {
    let (ended, has_ended) = (CancellationToken::new(), Arc::<AtomicBool>::default());
    // The client's task owns the sender of events. When the task ends, however it ends, the library drops the callback
    // for events, and the guard with it.
    let guard = Ended(ended.clone(), has_ended.clone());
    let (changes, denied) = (changes.clone(), Arc::<Denied>::default());
    let refusals = denied.clone();
    let on_event = move |event: &Event| {
        let _ = &guard;
        if let Some(subject) = refused_subject(event) {
            lock(&refusals).insert(subject.to_owned(), Instant::now());
        }
        if *event == Event::Connected {
            lock(&refusals).clear(); // the login may have other permissions now
        }
        if matches!(event, Event::Connected | Event::Disconnected) {
            changes.send_modify(|changes| *changes += 1);
        }
    };
    let retired = Arc::<AtomicBool>::default();
    let client = connection.connect(program, queue, readiness, &retired, on_event).await?;
    let context = jetstream(client.clone());
    let (unanswered, worn) = (AtomicUsize::new(0), CancellationToken::new());
    Ok(Linked { client, context, ended, has_ended, unanswered, worn, retired, denied, connects_before })
}

fn lock(denied: &Denied) -> MutexGuard<'_, BTreeMap<String, Instant>> {
    denied.lock().unwrap_or_else(PoisonError::into_inner) // nothing that holds this can panic half-way
}

/// The subject of `Permissions Violation for Publish to "$JS.API.STREAM.INFO.SIGNALS"`.
fn refused_subject(event: &Event) -> Option<&str> {
    let Event::ServerError(ServerError::Other(text)) = event else { return None };
    text.split_once("Permissions Violation for Publish to \"").map(|(_, subject)| subject.trim_end_matches('"'))
}

impl Shared {
    /// Asks for answers, and replaces the client when it has ended or keeps too many places for answers. Never returns.
    async fn keep(&self) {
        let mut changes = self.changes.subscribe();
        loop {
            let linked = self.current.borrow().clone();
            let asking = async {
                loop {
                    // A request does not outlive its connection: on a new one, another is made.
                    tokio::select! {
                        () = self.ask(&linked) => {}
                        _ = changes.changed() => continue,
                    }
                    let _ = timeout(ASK_EVERY, changes.changed()).await;
                }
            };
            tokio::select! {
                () = linked.ended() => {
                    self.readiness.set("nats", Err("the client has ended; a new one is being made".into()));
                }
                () = linked.worn.cancelled() => {}
                () = asking => {}
            }
            sleep(REPLACE_AFTER).await;
            self.replace(&linked).await;
        }
    }

    async fn replace(&self, old: &Linked) {
        let before = old.connects().saturating_sub(u64::from(old.is_up()));
        let made = make(&self.connection, &self.program, self.queue, &self.readiness, &self.changes, before);
        let new = match made.await {
            Ok(new) => new,
            Err(error) => return tracing::error!("cannot make a new NATS client, will try again: {error:#}"),
        };
        if old.has_ended() {
            tracing::error!(
                "the NATS client had ended, as it does over a message that it cannot read; a new one takes its place. If it \
                 panicked, the panic stands above"
            );
        } else {
            tracing::warn!(
                "{UNANSWERED_MAX} requests to NATS had no answer; a new connection takes the place of the old one. Look at \
                 the server's log, and at the space on its disk"
            );
        }
        old.retired.store(true, Ordering::Relaxed);
        self.replaced.fetch_add(1, Ordering::Relaxed);
        self.current.send_replace(Arc::new(new));
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Asks the server for something that both programs may ask for, and sets the check `nats`. Any answer will do, also
    /// one that says no.
    async fn ask(&self, linked: &Linked) {
        if !linked.is_up() {
            return; // the client's events have said why
        }
        let subject = format!("$JS.API.STREAM.INFO.{}", self.stream);
        let begin = Instant::now();
        let answered = match timeout(ANSWER_WITHIN, linked.client.request(subject, bytes::Bytes::new())).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => error.kind() == RequestErrorKind::NoResponders, // JetStream's own check says that
            Err(_) => false,
        };
        if !linked.is_up() {
            return;
        }
        let state = match answered {
            true => Ok(format!("connected, answers within {} ms", begin.elapsed().as_millis().max(1))),
            false => Err(format!("connected, and no answer within {} s", ANSWER_WITHIN.as_secs())),
        };
        self.readiness.set("nats", state);
    }
}
