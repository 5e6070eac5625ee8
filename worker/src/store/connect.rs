//! One connection to PostgreSQL: which server, with or without TLS, and what to say where it fails.

use std::convert::Infallible;
use std::error::Error as _;
use std::fmt;
use std::pin::Pin;

use deadpool_postgres::Connect;
use shared::tls;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Client, Config, Error, NoTls, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::pool::CLIENT_WITHIN;
use super::tls::{Mode, NAMES};
use super::url::{DatabaseUrl, Server};
use super::{Outage, sqlstate};

type Connected = Result<(Client, JoinHandle<()>), Error>;

/// Connects to the first server that takes us.
pub(super) struct Connector(pub(super) DatabaseUrl);

impl Connect for Connector {
    /// `config` is everything but hosts and TLS.
    fn connect(&self, config: &Config) -> Pin<Box<dyn Future<Output = Connected> + Send + '_>> {
        let config = config.clone();
        Box::pin(async move {
            // In any order: a primary that hangs takes connections and says nothing, and may not be the first each time.
            // And none of several gets all the time there is.
            let mut servers: Vec<_> = self.0.servers().iter().collect();
            fastrand::shuffle(&mut servers);
            let share = CLIENT_WITHIN / u32::try_from(servers.len()).unwrap_or(u32::MAX);
            let last = servers.pop().expect("a DatabaseUrl has a server");
            for server in servers {
                if let Ok(Ok(connected)) = timeout(share, self.server(server, &server.configure(&config))).await {
                    return Ok(connected);
                }
            }
            self.server(last, &last.configure(&config)).await
        })
    }
}

/// One of the ways in which a mode may try a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    IfOffered,
    Encrypted,
}

impl Mode {
    /// The first way, and the one that is left when TLS fails (`prefer`), or when the server takes nobody that way
    /// (`prefer`, `allow`). `exposed`: a password leaves this machine.
    ///
    /// The server chooses the form in which the password is sent. A machine on the way can play a server that does no TLS
    /// and wants it in clear. So a password goes to another machine encrypted, unless the operator wrote `disable`.
    fn ways(self, exposed: bool) -> (Way, Option<Way>) {
        match self {
            Mode::Disable => (Way::Plain, None),
            Mode::Allow | Mode::Prefer if exposed => (Way::Encrypted, None),
            Mode::Allow => (Way::Plain, Some(Way::Encrypted)),
            Mode::Prefer => (Way::IfOffered, Some(Way::Plain)),
            Mode::Require | Mode::VerifyCa | Mode::VerifyFull => (Way::Encrypted, None),
        }
    }
}

impl Connector {
    async fn server(&self, server: &Server, config: &Config) -> Connected {
        let exposed = config.get_password().is_some() && server.is_remote();
        let (first, second) = if server.is_local() { (Way::Plain, None) } else { self.0.security.mode.ways(exposed) };
        let failed = match (self.try_one(first, server, config).await, second) {
            (Err(error), Some(_)) if tls_failure(&error).is_some() || takes_nobody(&error) => error,
            (tried, _) => return tried,
        };
        let second = second.expect("matched above");
        if let Some(failure) = tls_failure(&failed) {
            tracing::warn!("{failure}; going on without encryption, as this sslmode allows");
        }
        // Of two failures the one that is not just the server wanting the other way.
        match self.try_one(second, server, config).await {
            Err(error) if takes_nobody(&error) => Err(failed),
            tried => tried,
        }
    }

    async fn try_one(&self, way: Way, server: &Server, config: &Config) -> Connected {
        let mut config = config.clone();
        config.ssl_mode(match way {
            Way::Plain => SslMode::Disable,
            Way::IfOffered => SslMode::Prefer,
            Way::Encrypted => SslMode::Require,
        });
        if way == Way::Plain {
            let (client, connection) = config.connect(NoTls).await?;
            return Ok((client, tokio::spawn(drive(connection))));
        }
        let tls = Named { server: server.to_string(), mode: self.0.security.mode, rustls: self.rustls() };
        let (client, connection) = config.connect(tls).await?;
        Ok((client, tokio::spawn(drive(connection))))
    }

    fn rustls(&self) -> Result<MakeRustlsConnect, String> {
        self.0.security.client_config().map(MakeRustlsConnect::new)
    }
}

/// Carries what a connection says and hears, until it ends. Whoever waits for an answer then is told why.
async fn drive(connection: impl Future<Output = Result<(), Error>>) {
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection to PostgreSQL ended");
    }
}

/// Whether pg_hba.conf has nothing for a connection like this one: not encrypted, or encrypted, or from here.
fn takes_nobody(error: &Error) -> bool {
    error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION)
}

/// TLS did not come about. For a person: which server, under which mode, what is wrong, what to do.
#[derive(Debug)]
pub(super) struct TlsFailure {
    server: String,
    mode: Mode,
    cause: String,
}

impl fmt::Display for TlsFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TlsFailure { server, mode, cause } = self;
        let advice = tls::explain(cause, NAMES).map(|advice| format!("{advice}; ")).unwrap_or_default();
        write!(f, "no TLS with {server} (sslmode {mode}): {advice}{cause}")
    }
}

impl std::error::Error for TlsFailure {}

fn tls_failure(error: &Error) -> Option<&TlsFailure> {
    error.source()?.downcast_ref()
}

/// Why there is no connection.
pub(super) fn outage(error: &Error) -> Outage {
    Outage::new(sqlstate::outage(error).class(), describe(error))
}

/// The same for a person.
fn describe(error: &Error) -> String {
    if let Some(failure) = tls_failure(error) {
        return failure.to_string();
    }
    let text = sqlstate::describe(error);
    if text.ends_with("server does not support TLS") {
        return "the server does no TLS, and sslmode or a password for another machine needs it: turn on ssl in its \
                postgresql.conf, or allow an unencrypted password with sslmode=disable"
            .into();
    }
    let advice = if takes_nobody(error) && text.contains("client certificate") {
        Some(format!("set {}", NAMES.client))
    } else if takes_nobody(error) && text.contains("no encryption") {
        Some("sslmode must be require or more, if it is encryption that the server wants".into())
    } else {
        tls::explain(&text, NAMES)
    };
    advice.map_or(text.clone(), |advice| format!("{text}; {advice}"))
}

/// tokio-postgres-rustls, whose failures say whose they are.
#[derive(Clone)]
struct Named {
    server: String,
    mode: Mode,
    /// Or what is wrong with its files.
    rustls: Result<MakeRustlsConnect, String>,
}

type Rustls = <MakeRustlsConnect as MakeTlsConnect<Socket>>::TlsConnect;

/// [`Named`], for one connection.
struct NamedConnect {
    server: String,
    mode: Mode,
    rustls: Result<Rustls, String>,
}

impl MakeTlsConnect<Socket> for Named {
    type Stream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;
    type TlsConnect = NamedConnect;
    type Error = Infallible;

    fn make_tls_connect(&mut self, domain: &str) -> Result<NamedConnect, Infallible> {
        let rustls = match &mut self.rustls {
            Ok(rustls) => Ok(MakeTlsConnect::<Socket>::make_tls_connect(rustls, domain)?),
            Err(problem) => Err(problem.clone()),
        };
        Ok(NamedConnect { server: self.server.clone(), mode: self.mode, rustls })
    }
}

impl TlsConnect<Socket> for NamedConnect {
    type Stream = <Rustls as TlsConnect<Socket>>::Stream;
    type Error = TlsFailure;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Stream, TlsFailure>> + Send>>;

    fn connect(self, stream: Socket) -> Self::Future {
        let NamedConnect { server, mode, rustls } = self;
        Box::pin(async move {
            let connected = match rustls {
                Ok(rustls) => rustls.connect(stream).await.map_err(|error| error.to_string()),
                Err(problem) => Err(problem),
            };
            connected.map_err(|cause| TlsFailure { server, mode, cause })
        })
    }
}
