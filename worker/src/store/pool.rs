//! The connection string and the pool.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, PoolError, RecyclingMethod, Runtime};
use tokio_postgres::config::{Config, Host, LoadBalanceHosts, TargetSessionAttrs};
use tokio_postgres::{NoTls, Socket};

use super::{Class, Outage, StoreError, sqlstate};

/// How long one host may take to accept a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long a new connection may take, over all hosts, login included; and how long a caller waits for a free one.
const CLIENT_WITHIN: Duration = Duration::from_secs(10);
/// How long the server may take to answer one statement, or two that were sent together. Longer than twice its own
/// `statement_timeout`, so that it is the server that gives up first and says why.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(130);
/// TCP finds a dead peer after idle + 3 intervals, some 14 s. A slow server is alive to TCP: its kernel answers.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
/// The same for what was sent and not received, which keepalives do not watch.
const RECEIVED_WITHIN: Duration = Duration::from_secs(15);

/// Where the database is and how to log in. Shows itself without the password.
#[derive(Clone)]
pub struct DatabaseUrl(Config);

/// `DATABASE_URL` cannot be read. Says nothing of its value, which holds a password: a parser's own words could quote
/// a piece of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadDatabaseUrl {
    /// Neither of the two forms.
    #[error(
        "not a PostgreSQL connection string: write postgres://USER:PASSWORD@HOST:PORT/DATABASE (percent-encode special \
         characters of the password) or `host=... port=... user=... password=... dbname=...`"
    )]
    Syntax,
    /// Well formed, but leads nowhere.
    #[error("no host in it: write postgres://USER:PASSWORD@HOST:PORT/DATABASE")]
    NoHost,
}

impl FromStr for DatabaseUrl {
    type Err = BadDatabaseUrl;

    fn from_str(url: &str) -> Result<DatabaseUrl, BadDatabaseUrl> {
        let config: Config = url.parse().map_err(|_| BadDatabaseUrl::Syntax)?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(BadDatabaseUrl::NoHost);
        }
        Ok(DatabaseUrl(config))
    }
}

impl fmt::Display for DatabaseUrl {
    /// `host:port/database`, hosts separated by commas.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = self.0.get_ports();
        for (index, host) in self.0.get_hosts().iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            // libpq's rule: no port is 5432, one port is every host's.
            let port = ports.get(index).or(ports.first()).unwrap_or(&5432);
            match host {
                Host::Tcp(name) => write!(f, "{comma}{name}:{port}")?,
                #[cfg(unix)]
                Host::Unix(folder) => write!(f, "{comma}{}:{port}", folder.display())?,
            }
        }
        write!(f, "/{}", self.0.get_dbname().unwrap_or_default())
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A pool that connects when first asked.
pub(super) fn pool(url: &DatabaseUrl, connections: usize) -> Pool {
    let mut config = url.0.clone();
    config
        .application_name("loop-worker")
        .connect_timeout(CONNECT_WITHIN)
        .keepalives_idle(KEEPALIVE_IDLE)
        .keepalives_interval(KEEPALIVE_INTERVAL)
        .keepalives_retries(3)
        .tcp_user_timeout(RECEIVED_WITHIN)
        .target_session_attrs(TargetSessionAttrs::ReadWrite) // of several hosts, the primary: we only ever write
        // In any order: a primary that hangs takes connections and says nothing, and may not be the first each time.
        .load_balance_hosts(LoadBalanceHosts::Random);
    // The one place to hand in a TLS connector.
    build(config, NoTls, connections)
}

fn build<T>(config: Config, tls: T, connections: usize) -> Pool
where
    T: tokio_postgres::tls::MakeTlsConnect<Socket> + Clone + Sync + Send + 'static,
    T::Stream: Sync + Send,
    T::TlsConnect: Sync + Send,
    <T::TlsConnect as tokio_postgres::tls::TlsConnect<Socket>>::Future: Send,
{
    let manager = Manager::from_config(config, tls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
    Pool::builder(manager)
        .max_size(connections)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(CLIENT_WITHIN))
        .create_timeout(Some(CLIENT_WITHIN))
        .recycle_timeout(Some(CLIENT_WITHIN))
        .build()
        .expect("only a pool with time limits and no runtime is refused, and this one has a runtime")
}

/// No connection: an outage in any case, also when the password is wrong (somebody may be changing it right now).
pub(super) fn outage(err: PoolError) -> StoreError {
    StoreError::Outage(match err {
        PoolError::Backend(err) => sqlstate::outage(&err),
        PoolError::Timeout(_) => {
            Outage::new(Class::Pool, format!("no connection within {} s", CLIENT_WITHIN.as_secs()))
        }
        PoolError::Closed | PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
            Outage::new(Class::Pool, err.to_string())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_never_shown() {
        for url in [
            "postgres://loop:hunter2@db.example:5433/loop",
            "host=db.example port=5433 user=loop password=hunter2 dbname=loop",
        ] {
            let url: DatabaseUrl = url.parse().unwrap();
            assert_eq!(format!("{url} {url:?}"), "db.example:5433/loop db.example:5433/loop");
            assert!(!format!("{:?}", pool(&url, 1)).contains("hunter2"));
        }
        for url in ["postgres://loop:hun ter2=@[db/", "host=db password=hunter2 hunter2=x", "hunter2"] {
            let err = url.parse::<DatabaseUrl>().unwrap_err();
            assert!(!format!("{err} {err:?}").contains("ter2"), "{err:?}");
        }
    }

    #[test]
    fn every_host_is_shown_with_its_port() {
        let shown = |url: &str| url.parse::<DatabaseUrl>().map(|url| url.to_string());
        assert_eq!(shown("postgres://loop@a,b:5433/x").unwrap(), "a:5432,b:5433/x");
        assert_eq!(shown("host=/run/pg dbname=x").unwrap(), "/run/pg:5432/x");
        assert_eq!(shown("postgres:///x"), Err(BadDatabaseUrl::NoHost));
    }

    #[tokio::test]
    async fn a_database_that_is_not_there_is_an_outage() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap(); // dropped at once
        let url = format!("postgres://loop:hunter2@{closed}/loop").parse().unwrap();
        let err = super::super::Store::new(&url, 1).ping().await.unwrap_err();
        assert!(err.is_outage(), "{err}");
        assert!(err.to_string().contains("refused") && !err.to_string().contains("hunter2"), "{err}");
    }
}
