//! The one way to use a connection: a transaction with its settings, on a connection that goes back to the pool only when
//! it is sound.
//!
//! A connection is unsound after an outage: it may lead to a server that hangs, or that is no primary any more. It is
//! unsound as well where its user stopped waiting for it. Such a connection is closed. The next user connects anew and
//! finds the server that takes writes now.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use deadpool_postgres::{ClientWrapper, Object, Pool};
use futures_util::future::join;
use tokio::time::timeout;

use super::pool::{self, ANSWER_WITHIN};
use super::{Class, Outage, StoreError};

/// An error of work in a transaction.
pub(crate) trait Failure: From<StoreError> {
    /// Returns `true` where the connection may be unsound.
    fn is_outage(&self) -> bool;
}

impl Failure for StoreError {
    fn is_outage(&self) -> bool {
        StoreError::is_outage(self)
    }
}

/// The end of a transaction whose work has ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Commit,
    Rollback,
}

/// Runs `work` in one transaction on a connection of `pool`, after `settings`. Commits, or rolls back, as `end` says; rolls
/// back where `work` fails.
pub(super) async fn transact<T, E: Failure, F: Future<Output = Result<T, E>>>(
    pool: &Pool,
    settings: &str,
    end: End,
    work: impl FnOnce(Tx) -> F,
) -> Result<T, E> {
    let tx = Tx::begin(pool).await?;
    let set = async { Ok(within(tx.batch_execute(settings)).await?) };
    // Boxed, because the work is large and this is at the bottom of many calls.
    let done = in_order(set, Box::pin(work(tx.clone()))).await;
    let end = if done.is_ok() { end } else { End::Rollback };
    if !done.as_ref().is_err_and(E::is_outage) {
        within(tx.batch_execute(end.as_sql())).await?;
        tx.0.give_back();
    }
    done.map(|((), done)| done)
}

impl End {
    fn as_sql(self) -> &'static str {
        match self {
            End::Commit => "COMMIT",
            End::Rollback => "ROLLBACK",
        }
    }
}

/// An open transaction. Clones are the same one; work drops its clone before it ends. The connection is closed when the
/// last clone is dropped before the end, and PostgreSQL rolls back.
#[derive(Clone)]
pub(crate) struct Tx(Arc<Lease>);

impl Tx {
    /// READ COMMITTED, whatever the role's default: under a stricter level, two workers with the same delivery would get an
    /// error where waiting for each other is enough.
    ///
    /// Nothing is sent before PostgreSQL has confirmed the transaction. It would otherwise stand alone where this fails.
    async fn begin(pool: &Pool) -> Result<Tx, StoreError> {
        let lease = Lease::of(pool).await?;
        within(lease.batch_execute("START TRANSACTION ISOLATION LEVEL READ COMMITTED")).await?;
        Ok(Tx(Arc::new(lease)))
    }
}

impl Deref for Tx {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.0
    }
}

/// Sends two requests together, which PostgreSQL runs in this order. If both fail, the first has the cause: the second
/// was only refused because the transaction had failed (SQLSTATE 25P02).
pub(super) async fn in_order<A, B, E>(
    first: impl Future<Output = Result<A, E>>,
    second: impl Future<Output = Result<B, E>>,
) -> Result<(A, B), E> {
    // Not `try_join`: it gives the error that it sees first.
    let (first, second) = join(first, second).await;
    Ok((first?, second?))
}

/// Runs `work` in a savepoint. If PostgreSQL refuses a row, the changes of `work` are undone and the transaction goes on.
pub(super) async fn savepoint<T>(tx: &Tx, work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    within(tx.batch_execute("SAVEPOINT delivery")).await?;
    let outcome = work.await;
    match &outcome {
        Ok(_) => within(tx.batch_execute("RELEASE SAVEPOINT delivery")).await?,
        Err(error) if error.may_be_of_one_row() => {
            within(tx.batch_execute("ROLLBACK TO SAVEPOINT delivery; RELEASE SAVEPOINT delivery")).await?;
        }
        Err(_) => {} // the transaction ends
    }
    outcome
}

/// One exchange with the server, bounded on our side as well: a server that is frozen, not gone, answers nothing and
/// breaks no connection.
pub(crate) async fn within<T>(
    exchange: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, StoreError> {
    match timeout(ANSWER_WITHIN, exchange).await {
        Ok(answer) => answer.map_err(|err| StoreError::from_sql(&err)),
        Err(_) => {
            let silence = format!("no answer within {} s", ANSWER_WITHIN.as_secs());
            Err(StoreError::Outage(Outage::new(Class::NoAnswer, silence)))
        }
    }
}

/// A connection that is closed when it is dropped, unless it was given back.
pub(super) struct Lease {
    object: Option<Object>,
    sound: AtomicBool,
}

impl Lease {
    pub(super) async fn of(pool: &Pool) -> Result<Lease, StoreError> {
        Ok(Lease { object: Some(pool.get().await.map_err(pool::outage)?), sound: false.into() })
    }

    /// Puts it back into the pool, to be used again, once it is dropped.
    pub(super) fn give_back(&self) {
        self.sound.store(true, Ordering::Relaxed);
    }
}

impl Deref for Lease {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        self.object.as_ref().expect("only `drop` takes it")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let object = self.object.take();
        if !*self.sound.get_mut() {
            drop(object.map(Object::take)); // out of the pool, and closed
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{poll_fn, ready};
    use std::task::Poll;

    use super::*;

    #[tokio::test]
    async fn of_two_errors_the_cause_wins_also_when_it_is_seen_later() {
        let mut polls = 0;
        // Its answer arrives between the two looks.
        let first = poll_fn(|context| {
            polls += 1;
            context.waker().wake_by_ref();
            if polls == 1 { Poll::Pending } else { Poll::Ready(Err::<(), _>("42P01")) }
        });
        assert_eq!(in_order(first, ready(Err::<(), _>("25P02"))).await, Err("42P01"));
        assert_eq!(in_order(ready(Ok::<_, &str>(1)), ready(Err::<(), _>("23505"))).await, Err("23505"));
    }
}
