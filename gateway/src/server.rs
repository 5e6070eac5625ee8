//! Connections: how many, how slow they may be, and how they end.

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue, TRANSFER_ENCODING};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::pace::{Pace, Paced};
use crate::receive::Gateway;
use crate::reject::Reject;
use crate::said::Said;
use crate::settings::Limits;

/// What hyper may hold of each connection at once, in bytes read and in bytes written, where headers may not be larger: more
/// saves calls of the kernel on large bodies, less bounds the memory of many connections more tightly. A body of 16 KB comes
/// in one piece with its headers.
const BUFFER_BYTES: usize = 24 * 1024;
/// Memory that a connection takes beside these buffers: its task, its headers, its socket.
const TASK_BYTES: usize = 16 * 1024;
/// Time after which a connection beyond the limit is looked at again, before it is answered 503. Sentry waits for a second.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// How many connections beyond the limit are told so at once; more are closed without a word.
const MAX_TURNED_AWAY: usize = 256;
/// How long a connection that gets an answer outside of HTTP's usual course may take to read it.
const LINGER: Duration = Duration::from_secs(1);

/// The most memory that one connection takes beside its bodies, where headers may have `header_bytes`.
pub const fn connection_bytes(header_bytes: usize) -> usize {
    2 * buffer_bytes(header_bytes) + TASK_BYTES
}

const fn buffer_bytes(header_bytes: usize) -> usize {
    if header_bytes > BUFFER_BYTES { header_bytes } else { BUFFER_BYTES }
}

/// How a listener ends: not at once, because whoever sends the deliveries on has to hear of it first.
#[derive(Debug, Clone, Default)]
pub struct Ending {
    /// Everything is still taken; each answer says that its connection is not to be used again.
    pub leaving: CancellationToken,
    /// No connection is taken any more, and those between two requests are closed.
    pub closing: CancellationToken,
}

/// Serves `listener` until it is `closing`; then no connection is taken any more, each ends after the request it is in, and
/// this returns when all have. What had connected by then is answered.
pub async fn run(listener: TcpListener, gateway: Arc<Gateway>, limits: &Limits, ending: Ending) {
    let connections = gateway.connections().clone();
    let turned_away = Arc::new(Semaphore::new(MAX_TURNED_AWAY));
    let tasks = TaskTracker::new();
    let take = |socket: TcpStream, peer: IpAddr| {
        // Answers are one small write each; waiting to fill a packet would only delay them. A failure costs just that.
        let _ = socket.set_nodelay(true);
        let (gateway, limits, ending) = (gateway.clone(), limits.clone(), ending.clone());
        if let Some(admitted) = connections.admit() {
            tasks.spawn(async move {
                let slot = admitted.await;
                serve(socket, peer, gateway, &limits, ending).await;
                drop(slot);
            });
        } else if let Ok(waiting) = turned_away.clone().try_acquire_owned() {
            let connections = connections.clone();
            tasks.spawn(async move {
                // In a burst, the connections that could make room have only just been taken themselves.
                tokio::time::sleep(LOOK_AGAIN_AFTER).await;
                let Some(admitted) = connections.admit() else {
                    gateway.refused(&Reject::TooManyConnections, peer);
                    return turn_away(socket, waiting).await;
                };
                drop(waiting);
                let slot = admitted.await;
                serve(socket, peer, gateway, &limits, ending).await;
                drop(slot);
            });
        } else {
            gateway.metrics().dropped_connection();
        }
    };
    loop {
        tokio::select! {
            connection = listener.accept() => match connection {
                Ok((socket, peer)) => take(socket, peer.ip()),
                Err(error) => {
                    // Out of file descriptors, most likely: trying at once again would only burn CPU.
                    gateway.metrics().not_connected();
                    tracing::error!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            () = ending.closing.cancelled() => break,
        }
    }
    // To its sender a connection is there before we take it; closed with the listener, it would be reset.
    if let Ok(listener) = listener.into_std() {
        while let Ok((socket, peer)) = listener.accept() {
            let socket = socket.set_nonblocking(true).and_then(|()| TcpStream::from_std(socket));
            socket.into_iter().for_each(|socket| take(socket, peer.ip()));
        }
    }
    tasks.close();
    tasks.wait().await;
}

/// Serves one connection, request by request, until it has ended, or has to make room for another (see
/// [`crate::connection_limit`]). On any stream of bytes, so that fuzzing needs no network.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    socket: S,
    peer: IpAddr,
    gateway: Arc<Gateway>,
    limits: &Limits,
    ending: Ending,
) {
    let _counted = gateway.metrics().connected();
    let pace = Pace::new(limits.header_timeout, limits.idle_timeout, gateway.connections().ticket());
    let _guard = TicketGuard(&pace);
    tokio::select! {
        biased; // a request that has come whole meanwhile is answered 503
        () = converse(socket, peer, gateway, limits, ending, pace.clone()) => {}
        // Closed at once: no request has come whole, so no answer is due.
        () = pace.ticket().evicted() => {}
    }
}

/// Takes a connection out of the queue when it ends, also by a panic.
struct TicketGuard<'a>(&'a Pace);

impl Drop for TicketGuard<'_> {
    fn drop(&mut self) {
        self.0.ticket().end();
    }
}

async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    socket: S,
    peer: IpAddr,
    gateway: Arc<Gateway>,
    limits: &Limits,
    ending: Ending,
    pace: Arc<Pace>,
) {
    let said = Arc::<Said>::default();
    // Boxed, because only a connection that may be moved gives its socket back after a time-out.
    let service = service_fn(|request: Request<Incoming>| {
        let (due, leaving) = (said.due(), ending.leaving.clone());
        let in_request = pace.request(request.headers().contains_key(TRANSFER_ENCODING));
        let answer = gateway.clone().handle(request, peer, in_request);
        Box::pin(async move {
            let mut answer = answer.await;
            if leaving.is_cancelled() {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(due.answer(answer))
        })
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None) // see `pace`
        // What came whole is taken even if its sender has stopped listening: Sentry does after a second, and sends nothing
        // twice. And nothing has to be read, into memory of its own, to find out.
        .half_close(true)
        .max_header_size(limits.header_bytes)
        .max_headers(limits.headers)
        .max_buf_size(buffer_bytes(limits.header_bytes))
        .serve_connection(TokioIo::new(Paced { socket, pace: pace.clone(), said: said.clone() }), service);
    let mut closing = false;
    let ended = loop {
        tokio::select! {
            biased; // what has come in the meantime is read before the connection is found too slow
            ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => break Some(ended),
            () = pace.overdue() => break None,
            () = ending.closing.cancelled(), if !closing => closing = true,
        }
        if closing && !pace.is_in_request() && said.is_all() {
            if pace.is_between_requests() {
                break None;
            }
            // A request is on its way here: its headers have begun, or it is what a new connection was made for. Its
            // answer ends the connection.
        } else if closing {
            std::pin::Pin::new(&mut connection).graceful_shutdown(); // once the answer is out
        }
    };
    let parts = connection.into_parts();
    let mut socket = parts.io.into_inner().socket;
    let answer = match ended {
        Some(Ok(())) => None,
        Some(Err(error)) if error.is_parse_too_large() => Some(Reject::LargeHeaders),
        Some(Err(error)) if error.is_parse() => Some(Reject::BrokenHeaders),
        // The sender is gone.
        Some(Err(_)) => None,
        // A connection that idles between requests is closed without a word.
        None if parts.read_buf.is_empty() => None,
        None => Some(Reject::SlowHeaders),
    };
    if let Some(reject) = answer {
        gateway.refused(&reject, peer);
        // Else the sender reads none of its answers, and another behind them would be cut into them.
        if said.is_all() {
            let _ = tokio::time::timeout(LINGER, socket.write_all(&reject.to_wire())).await;
        }
    }
    close(socket).await;
}

/// Tells a connection that there are too many, and closes it.
async fn turn_away(mut socket: TcpStream, slot: OwnedSemaphorePermit) {
    // A sender that is gone, or does not read, needs no answer; the same above.
    let _ = tokio::time::timeout(LINGER, socket.write_all(&Reject::TooManyConnections.to_wire())).await;
    close(socket).await;
    drop(slot);
}

/// Closes a connection so that its sender can read the last answer: our side first, the whole once the sender has
/// closed its own or after a moment. Closed at once with bytes still unread, it would be reset and the answer lost
/// (RFC 9112 section 9.6).
async fn close(mut socket: impl AsyncRead + AsyncWrite + Unpin) {
    let read_out = async {
        socket.shutdown().await?;
        let mut discarded = [0; 4096];
        while socket.read(&mut discarded).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    let _ = tokio::time::timeout(LINGER, read_out).await;
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::Config;
    use crate::journal::Journal;
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn who_has_connected_before_the_listener_closes_is_answered() {
        let folder = tempfile::tempdir().unwrap();
        let set = |variable: &str| (variable == "SENTRY_CLIENT_SECRET").then(|| "a-secret-of-the-tests".to_owned());
        let config = Config::load(&set).unwrap();
        let (journal, _) = Journal::open(folder.path(), config.journal.limits).unwrap();
        let metrics = Metrics::new(&mut Registry::default(), &journal);
        let gateway = Arc::new(Gateway::new(&config, journal, metrics));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut senders = Vec::new();
        for _ in 0..50 {
            let mut socket = TcpStream::connect(address).await.unwrap();
            socket.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            senders.push(socket);
        }
        // The end has come before one of them was taken.
        let ending = Ending::default();
        ending.leaving.cancel();
        ending.closing.cancel();
        run(listener, gateway, &config.limits, ending).await;
        for mut sender in senders {
            let mut answer = String::new();
            sender.read_to_string(&mut answer).await.expect("an answer, not a reset");
            assert!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("connection: close"), "{answer}");
        }
        assert!(TcpStream::connect(address).await.is_err(), "and nobody else");
    }
}
