//! The connection to NATS: where it is, how it is encrypted, as whom we log in; and where there is none, why.
//!
//! What a server asks for decides (`nats://` becomes TLS where the server demands it), but never less than what is set:
//! with a `tls://` URL, a CA file or a client certificate, nothing goes to a server that does not encrypt.
//!
//! Every file is read again at each new connection: rotated certificates, credentials and keys need no restart.

use std::fmt;
use std::future::ready;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use async_nats::{Auth, AuthError, Client, ConnectOptions, Event, ServerAddr};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::{KeyPair, KeyPairType};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::file::read_regular;
use crate::ops::Readiness;
use crate::settings::{self, Setting};
use crate::tls;

/// How often the client asks a silent server for a sign of life; at the third time without one it connects again.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// Where NATS is.
pub const NATS_URL: Setting = Setting::new(
    "NATS_URL",
    "nats://127.0.0.1:4222",
    "NATS servers, separated by commas; tls:// where the connection must be encrypted",
)
.no_flag_with_password(has_login);
/// Who logs in: a user JWT and its key.
pub const NATS_CREDS_FILE: Setting =
    Setting::bare("NATS_CREDS_FILE", "A credentials file (user JWT and nkey seed) to log in to NATS with");
/// Who logs in: a key.
pub const NATS_NKEY_FILE: Setting =
    Setting::bare("NATS_NKEY_FILE", "A file with the seed of a user nkey to log in to NATS with");
/// Whom to trust.
pub const NATS_CA_FILE: Setting =
    Setting::bare("NATS_CA_FILE", "CA certificates (PEM) that may sign NATS's certificate, instead of the system's");
/// Our own certificate.
pub const NATS_CLIENT_CERT: Setting = Setting::bare("NATS_CLIENT_CERT", "The client certificate (PEM) to show to NATS");
/// Its key.
pub const NATS_CLIENT_KEY: Setting = Setting::bare("NATS_CLIENT_KEY", "The private key (PEM) of NATS_CLIENT_CERT");

/// The prefix of the subjects on which answers arrive.
pub const NATS_INBOX_PREFIX: Setting = Setting::bare(
    "NATS_INBOX_PREFIX",
    "The prefix of the subjects on which NATS answers, so that one login cannot read another's; default _INBOX_gateway or _INBOX_worker",
);

/// The settings of the connection.
pub const SETTINGS: [Setting; 7] =
    [NATS_URL, NATS_CREDS_FILE, NATS_NKEY_FILE, NATS_CA_FILE, NATS_CLIENT_CERT, NATS_CLIENT_KEY, NATS_INBOX_PREFIX];

const TLS: tls::Names = tls::Names { roots: "NATS_CA_FILE", client: "NATS_CLIENT_CERT and NATS_CLIENT_KEY" };

/// No server could be connected to, and why, server by server. For a person; holds no secret.
#[derive(Debug, Clone, thiserror::Error)]
#[error("cannot connect to NATS: {0}")]
pub struct CannotConnect(String);

/// How to reach NATS. Shows itself without secrets.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    /// Without user and password.
    servers: Vec<ServerAddr>,
    login: Login,
    /// `NATS_CA_FILE`
    ca: Option<PathBuf>,
    /// `NATS_CLIENT_CERT`, `NATS_CLIENT_KEY`
    client: Option<(PathBuf, PathBuf)>,
    /// `NATS_INBOX_PREFIX`
    inbox_prefix: Option<String>,
}

#[derive(Clone)]
enum Login {
    Nobody,
    Password { user: String, password: String },
    Token(String),
    Creds(PathBuf),
    Nkey(PathBuf),
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Login::Nobody => "Nobody",
            Login::Password { .. } => "Password(not shown)",
            Login::Token(_) => "Token(not shown)",
            Login::Creds(_) => "Creds(a file)",
            Login::Nkey(_) => "Nkey(a file)",
        })
    }
}

impl Connection {
    /// Reads [`SETTINGS`] and looks into the files.
    pub(crate) fn read(reader: &mut settings::Reader<'_>) -> Option<Self> {
        let servers = reader.parse(&NATS_URL, servers);
        let creds = reader.optional(&NATS_CREDS_FILE, |file| Creds::read(file.as_ref()).map(|_| file.into()));
        let nkey = reader.optional(&NATS_NKEY_FILE, |file| nkey(file.as_ref()).map(|_| file.into()));
        let ca = reader.optional(&NATS_CA_FILE, |file| tls::roots(file.as_ref()).map(|_| file.into()));
        let client = client_certificate(reader);
        let inbox_prefix = reader.optional(&NATS_INBOX_PREFIX, inbox_prefix);
        let servers = servers?;
        let logins = [
            named_login(&servers).map(|login| ("a user or a token in NATS_URL", login)),
            creds.map(|file| ("NATS_CREDS_FILE", Login::Creds(file))),
            nkey.map(|file| ("NATS_NKEY_FILE", Login::Nkey(file))),
        ];
        let mut logins: Vec<_> = logins.into_iter().flatten().collect();
        if logins.len() > 1 {
            let names: Vec<_> = logins.iter().map(|(name, _)| *name).collect();
            reader.mistake(format!("{} are both set: keep one login", names.join(" and ")));
        }
        let login = logins.pop().map_or(Login::Nobody, |(_, login)| login);
        Some(Connection {
            servers: servers.into_iter().filter_map(without_login).collect(),
            login,
            ca,
            client,
            inbox_prefix,
        })
    }

    /// What the client is told but for what happens when it fails.
    pub(crate) fn options(&self, program: &str) -> ConnectOptions {
        tls::provider();
        let options = match &self.login {
            Login::Nobody => ConnectOptions::new(),
            Login::Password { user, password } => {
                ConnectOptions::with_user_and_password(user.clone(), password.clone())
            }
            Login::Token(token) => ConnectOptions::with_token(token.clone()),
            Login::Creds(file) => signing(file.clone(), |file, nonce| Creds::read(file)?.answer(nonce)),
            Login::Nkey(file) => signing(file.clone(), |file, nonce| {
                let key = nkey(file)?;
                let mut auth = Auth::new();
                auth.nkey = Some(key.public_key());
                auth.signature = Some(sign(&key, nonce)?);
                Ok(auth)
            }),
        };
        let prefix = self.inbox_prefix.clone().unwrap_or_else(|| default_inbox_prefix(program));
        let mut options = options.name(program).ping_interval(PING_INTERVAL).require_tls(self.must_encrypt());
        options = options.custom_inbox_prefix(prefix);
        if let Some(ca) = &self.ca {
            options = options.add_root_certificates(ca.clone());
        }
        if let Some((certificate, key)) = &self.client {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        options
    }

    /// A client that connects in the background. `queue` messages may wait in each of its subscriptions. `observe` sees
    /// every event. Once `retired` is set, the client says no more: another one has taken its place.
    pub(crate) async fn connect(
        &self,
        program: &str,
        queue: usize,
        readiness: &Readiness,
        retired: &Arc<AtomicBool>,
        observe: impl Fn(&Event) + Send + Sync + 'static,
    ) -> anyhow::Result<Client> {
        readiness.set("nats", Err("not connected yet".into()));
        let told = Arc::new(Told::default());
        let (on_event, before_attempt) = ((told.clone(), readiness.clone()), (told, readiness.clone(), self.clone()));
        let (retired, was_retired) = (retired.clone(), retired.clone());
        let options = self
            .options(program)
            .subscription_capacity(queue)
            .retry_on_initial_connect()
            .max_reconnects(None)
            .reconnect_delay_callback(reconnect_delay)
            .reconnect_to_server_callback(move |servers, _| {
                // Here the client says why the attempts before failed; its events only say that they did.
                let (told, readiness, connection) = &before_attempt;
                let failed = servers.iter().filter_map(|server| Some((&server.addr, server.last_error.as_deref()?)));
                let failed: Vec<_> = failed.map(|(server, error)| connection.explain(server, error)).collect();
                if !was_retired.load(Ordering::Relaxed) {
                    told.failures(&failed.join("; "), readiness);
                }
                ready(None) // the client chooses
            })
            .event_callback(move |event| {
                let (told, readiness) = &on_event;
                if !retired.load(Ordering::Relaxed) {
                    told.event(&event, readiness);
                    observe(&event);
                }
                ready(())
            });
        options.connect(&self.servers[..]).await.context("cannot set up the NATS client")
    }

    /// See [`crate::stream::NatsSettings::try_connect`].
    pub(crate) async fn try_connect(&self, program: &str) -> Result<Client, CannotConnect> {
        let mut failed = Vec::new();
        for server in &self.servers {
            match self.options(program).connect(server).await {
                Ok(client) => return Ok(client),
                Err(error) => failed.push(self.explain(server, &error.to_string())),
            }
        }
        Err(CannotConnect(failed.join("; ")))
    }

    /// `true`: a login or a client certificate is set.
    pub(crate) fn has_login(&self) -> bool {
        !matches!(self.login, Login::Nobody) || self.client.is_some()
    }

    /// The same servers, without login and client certificate.
    pub(crate) fn without_login(&self) -> Connection {
        Connection { login: Login::Nobody, client: None, ..self.clone() }
    }

    /// `true`: nothing is sent to a server that does not encrypt. As in other NATS clients a CA file, a client certificate
    /// or a `tls://` URL means that.
    pub(crate) fn must_encrypt(&self) -> bool {
        self.ca.is_some() || self.client.is_some() || self.servers.iter().any(ServerAddr::tls_required)
    }

    /// `NATS_URL`, server by server, without what logs in.
    pub(crate) fn servers(&self) -> &[ServerAddr] {
        &self.servers
    }

    /// Connects once, to this server and no other; `observe` sees every event.
    ///
    /// # Errors
    /// What is wrong, and what to do, where that is known.
    pub(crate) async fn try_one(
        &self,
        program: &str,
        server: &ServerAddr,
        within: Duration,
        observe: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Client, (String, Option<String>)> {
        let options = self.options(program).connection_timeout(within * 2).ignore_discovered_servers();
        let options = options.event_callback(move |event| {
            observe(event);
            ready(())
        });
        // Our time limit is the shorter one, for its words.
        match tokio::time::timeout(within, options.connect(server)).await {
            Ok(connected) => connected.map_err(|error| {
                let error = error.to_string();
                let (error, advice) = self.advise(&error);
                (error.to_owned(), advice)
            }),
            Err(_) => {
                let seconds = within.as_secs();
                Err((format!("no word within {seconds} s: it hangs, or what is sent to it is lost"), None))
            }
        }
    }

    /// Which server cannot be used, why, and what to do. `error` is all that the client keeps of a failure: its text.
    pub(crate) fn explain(&self, server: &ServerAddr, error: &str) -> String {
        let (host, port) = (server.host(), server.port());
        match self.advise(error) {
            (error, Some(advice)) => format!("{host}:{port}: {advice} ({error})"),
            (error, None) => format!("{host}:{port}: {error}"),
        }
    }

    /// What of the client's text matters, and what to do, where that is known.
    fn advise<'a>(&self, error: &'a str) -> (&'a str, Option<String>) {
        // What our own callbacks said, without the client's wrapping.
        let ours = error.strip_prefix("failed signing nonce: AuthError(").and_then(|rest| rest.strip_suffix(')'));
        let error = ours.or_else(|| error.strip_prefix("IO error: ")).unwrap_or(error);
        let advice = if error.contains("authorization violation") {
            Some(self.login.refused())
        } else {
            // "TLS error" is the client's word for what it finds wrong with our own files.
            self.spoilt_file().filter(|_| error.starts_with("TLS error")).or_else(|| tls::explain(error, TLS))
        };
        (error, advice)
    }
}

impl Connection {
    /// Which of the files of TLS is no longer what it was at the start.
    fn spoilt_file(&self) -> Option<String> {
        let must_be = |setting: Setting, wanted| Some(format!("{} must be {wanted}", setting.variable));
        if let Some(Err(wanted)) = self.ca.as_deref().map(tls::roots) {
            return must_be(NATS_CA_FILE, wanted);
        }
        let (certificate, key) = self.client.as_ref()?;
        match tls::certificates(certificate) {
            Ok(chain) => tls::private_key(key, &chain).err().and_then(|wanted| must_be(NATS_CLIENT_KEY, wanted)),
            Err(wanted) => must_be(NATS_CLIENT_CERT, wanted),
        }
    }
}

impl Login {
    fn refused(&self) -> String {
        match self {
            Login::Nobody => "it wants a login: set NATS_CREDS_FILE, NATS_NKEY_FILE, or a user in NATS_URL".into(),
            Login::Password { .. } => "it refuses the user and the password in NATS_URL".into(),
            Login::Token(_) => "it refuses the token in NATS_URL".into(),
            Login::Nkey(_) => "it refuses the key in NATS_NKEY_FILE: its configuration must name the public key".into(),
            Login::Creds(file) => match Creds::read(file).ok().and_then(|creds| creds.expired()) {
                Some(when) => format!("it refuses the user in NATS_CREDS_FILE, whose JWT expired at {when}"),
                None => "it refuses the user in NATS_CREDS_FILE: unknown to it, revoked, or of another operator".into(),
            },
        }
    }
}

/// `NATS_URL`. The client would take `ws://` as well, and then not speak it.
fn servers(text: &str) -> Result<Vec<ServerAddr>, String> {
    let server = |server: &str| server.trim().parse::<ServerAddr>().ok().filter(|server| !server.is_websocket());
    let servers = text.split(',').map(server).collect::<Option<_>>();
    servers.ok_or_else(|| "NATS URLs separated by commas, such as nats://nats:4222 or tls://nats:4222".into())
}

/// Tells if one of the URLs holds a login: a password, or a token.
fn has_login(text: &str) -> bool {
    text.contains('@')
}

/// The login in `nats://user:password@host` or `nats://token@host`; the client itself does not look there.
fn named_login(servers: &[ServerAddr]) -> Option<Login> {
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let (user, password) = servers.iter().find_map(|server| Some((server.username()?, server.password())))?;
    Some(match password {
        Some(password) => Login::Password { user: decoded(user), password: decoded(password) },
        None => Login::Token(decoded(user)),
    })
}

/// The same server without user and password, so that no log of the client's can show them.
fn without_login(server: ServerAddr) -> Option<ServerAddr> {
    let mut url = server.into_inner();
    url.set_username("").ok()?;
    url.set_password(None).ok()?;
    ServerAddr::from_url(url).ok()
}

/// `NATS_INBOX_PREFIX`: tokens of a subject, without wildcards.
fn inbox_prefix(text: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    let token = |token: &str| !token.is_empty() && token.bytes().all(allowed);
    let prefix = text.split('.').all(token).then(|| text.to_owned());
    prefix.ok_or_else(|| "tokens of letters, digits, _ and - with dots between them, such as _INBOX_gateway".into())
}

/// A prefix for each program: `gateway journal drain` is the gateway's.
fn default_inbox_prefix(program: &str) -> String {
    format!("_INBOX_{}", program.split(' ').next().unwrap_or(program))
}

/// `NATS_CLIENT_CERT` and `NATS_CLIENT_KEY`, which go together.
fn client_certificate(reader: &mut settings::Reader<'_>) -> Option<(PathBuf, PathBuf)> {
    let given = (reader.text(&NATS_CLIENT_CERT), reader.text(&NATS_CLIENT_KEY));
    let (Some(certificate), Some(key)) = &given else {
        if given != (None, None) {
            reader.mistake("NATS_CLIENT_CERT and NATS_CLIENT_KEY go together: set both".into());
        }
        return None;
    };
    let chain = reader.parse(&NATS_CLIENT_CERT, |file| tls::certificates(file.as_ref()))?;
    reader.parse(&NATS_CLIENT_KEY, |file| tls::private_key(file.as_ref(), &chain))?;
    Some((certificate.into(), key.into()))
}

/// A user's JWT and the key that proves it is ours: what `nsc generate creds` writes.
/// <https://docs.nats.io/using-nats/developer/connecting/creds>
struct Creds {
    jwt: String,
    key: KeyPair,
    claims: Claims,
}

/// What a user's JWT says, as far as it concerns us.
#[derive(Deserialize)]
struct Claims {
    /// The public key whose owner it is for.
    sub: String,
    /// Seconds since 1970; none or 0 where it does not expire.
    #[serde(default)]
    exp: i64,
}

impl Creds {
    /// # Errors
    /// What the file must be and is not; the words follow "must be".
    fn read(file: &Path) -> Result<Creds, String> {
        const WANTED: &str = "a NATS credentials file";
        let text = read(file)?;
        let after = |title: &str| {
            let lines =
                text.lines().map(str::trim).skip_while(|line| !(line.starts_with("---") && line.contains(title)));
            lines.skip(1).find(|line| !line.is_empty())
        };
        let jwt = after("BEGIN NATS USER JWT").ok_or_else(|| format!("{WANTED} (there is no user JWT in it)"))?;
        let seed = after("BEGIN USER NKEY SEED").ok_or_else(|| format!("{WANTED} (there is no nkey seed in it)"))?;
        let key = user_key(seed).ok_or_else(|| format!("{WANTED} (its nkey seed is no user's, or damaged)"))?;
        let claims = jwt.split('.').nth(1).and_then(|part| URL_SAFE_NO_PAD.decode(part).ok());
        let claims = claims.and_then(|claims| serde_json::from_slice::<Claims>(&claims).ok());
        let claims = claims.ok_or_else(|| format!("{WANTED} (its user JWT is damaged)"))?;
        if claims.sub != key.public_key() {
            return Err(format!("{WANTED} (its nkey seed is not that of its user JWT)"));
        }
        Ok(Creds { jwt: jwt.to_owned(), key, claims })
    }

    fn answer(self, nonce: &[u8]) -> Result<Auth, String> {
        let mut auth = Auth::new();
        auth.signature = Some(sign(&self.key, nonce)?);
        auth.jwt = Some(self.jwt);
        Ok(auth)
    }

    /// When it expired, if it has.
    fn expired(&self) -> Option<String> {
        let at = OffsetDateTime::from_unix_timestamp(self.claims.exp).ok()?;
        (self.claims.exp > 0 && SystemTime::from(at) < SystemTime::now()).then(|| at.format(&Rfc3339).ok())?
    }
}

/// The key whose seed is the file's first line that looks like one.
fn nkey(file: &Path) -> Result<KeyPair, String> {
    let text = read(file)?;
    let seed = text.lines().map(str::trim).find(|line| line.starts_with("SU"));
    seed.and_then(user_key).ok_or_else(|| "a file with the seed of a user nkey (SU...)".into())
}

fn user_key(seed: &str) -> Option<KeyPair> {
    KeyPair::from_seed(seed).ok().filter(|key| matches!(key.key_pair_type(), KeyPairType::User))
}

fn read(file: &Path) -> Result<String, String> {
    let wanted = |error: std::io::Error| format!("a file that can be read ({error})");
    String::from_utf8(read_regular(file).map_err(wanted)?).map_err(|_| "a text file".into())
}

fn sign(key: &KeyPair, nonce: &[u8]) -> Result<Vec<u8>, String> {
    key.sign(nonce).map_err(|_| "a key that can sign".into())
}

/// Logs in by signing the server's nonce with what `file` holds at that moment.
fn signing(file: PathBuf, answer: fn(&Path, &[u8]) -> Result<Auth, String>) -> ConnectOptions {
    ConnectOptions::with_auth_callback(move |nonce| {
        // A few hundred bytes, once a connection.
        let answered = answer(&file, &nonce);
        ready(answered.map_err(|wanted| AuthError::new(format!("the file to log in with must be {wanted}"))))
    })
}

/// At once, then up to two seconds, so that an outage's end is noticed soon; spread out, so that many clients do not come
/// back in step.
fn reconnect_delay(attempt: usize) -> Duration {
    if attempt <= 1 {
        return Duration::ZERO;
    }
    let longest = 100 << attempt.min(4);
    Duration::from_millis(longest + fastrand::u64(..400))
}

/// What was told last of why there is no connection: each thing is told once, though every attempt meets it.
#[derive(Default)]
struct Told(Mutex<String>);

impl Told {
    /// Tells why the last attempts failed, if they did.
    fn failures(&self, failures: &str, readiness: &Readiness) {
        if failures.is_empty() {
            return;
        }
        readiness.set("nats", Err(format!("not connected: {failures}")));
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *told != failures {
            tracing::warn!("cannot connect to NATS, will try again until it works: {failures}");
            failures.clone_into(&mut told);
        }
    }

    /// Tells what happens to the connection, in the log and on `/readyz`.
    fn event(&self, event: &Event, readiness: &Readiness) {
        match event {
            Event::Connected => {
                tracing::info!("connected to NATS");
                readiness.set("nats", Err("connected, not answered yet".into())); // `crate::link` asks at once
                self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
            }
            Event::Disconnected => {
                tracing::warn!("lost the connection to NATS, connecting again");
                readiness.set("nats", Err("not connected".into()));
            }
            Event::ServerError(error) => tracing::warn!(%error, "NATS reports an error"),
            // That an attempt failed; why is told before the next one.
            Event::ClientError(error) => tracing::debug!(%error, "cannot use NATS at the moment"),
            Event::SlowConsumer(subscription) => tracing::warn!(subscription, "a NATS subscription is read too slowly"),
            Event::LameDuckMode => tracing::info!("this NATS server is about to stop, moving to another"),
            // We are leaving.
            Event::Draining | Event::Closed => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Every container's process may have the same id.
    #[test]
    fn clients_that_lost_one_server_do_not_come_back_in_step() {
        assert_eq!(reconnect_delay(1), Duration::ZERO);
        for attempt in 2..10 {
            let delays: HashSet<_> = (0..100).map(|_| reconnect_delay(attempt)).collect();
            assert!(delays.len() > 20, "{attempt}: {delays:?}");
            assert!(delays.iter().all(|delay| (200..=2_000).contains(&delay.as_millis())), "{attempt}: {delays:?}");
        }
    }
}
