//! The pool of connections.

use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, PoolError, RecyclingMethod, Runtime, TimeoutType};
use tokio_postgres::config::{LoadBalanceHosts, TargetSessionAttrs};

use super::connect::{self, Connector};
use super::url::DatabaseUrl;
use super::{Class, Outage, StoreError};

/// How long one host may take to accept a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long a new connection may take, over all hosts, login included; and how long a caller waits for a free one.
pub(super) const CLIENT_WITHIN: Duration = Duration::from_secs(10);
/// How long the server may take to answer one statement, or two that were sent together. Longer than twice its own
/// `statement_timeout`, so that it is the server that gives up first and says why.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(130);
/// TCP finds a dead peer after idle + 3 intervals, some 14 s. A slow server is alive to TCP: its kernel answers.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
/// The same for what was sent and not received, which keepalives do not watch.
const RECEIVED_WITHIN: Duration = Duration::from_secs(15);

/// A pool that connects when first asked.
pub(super) fn pool(url: &DatabaseUrl, connections: usize) -> Pool {
    let mut config = url.config().clone();
    config
        .application_name("loop-worker")
        .connect_timeout(CONNECT_WITHIN)
        .keepalives_idle(KEEPALIVE_IDLE)
        .keepalives_interval(KEEPALIVE_INTERVAL)
        .keepalives_retries(3)
        .tcp_user_timeout(RECEIVED_WITHIN)
        .target_session_attrs(TargetSessionAttrs::ReadWrite) // of several hosts, the primary: we only ever write
        .load_balance_hosts(LoadBalanceHosts::Random); // of one host's addresses, as of hosts: see `Connector`
    let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    Pool::builder(Manager::from_connect(config, Connector(url.clone()), recycling))
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
        PoolError::Backend(err) => connect::outage(&err),
        // Says nothing of PostgreSQL.
        PoolError::Timeout(TimeoutType::Wait) => {
            let words = "all connections of this program are in use, and none became free within";
            Outage::new(Class::Pool, format!("{words} {} s", CLIENT_WITHIN.as_secs()))
        }
        PoolError::Timeout(TimeoutType::Create | TimeoutType::Recycle) => {
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
        let url = "postgres://loop:hunter2@db.example/loop".parse().unwrap();
        assert!(!format!("{:?}", pool(&url, 1)).contains("hunter2"));
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
