//! Connections: how many, how slow they may be, and how they end.

use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::pace::{Pace, Paced};
use crate::receive::Gateway;
use crate::reject::Reject;
use crate::settings::Limits;

/// What hyper may hold of each connection at once, in bytes read and in bytes written, where headers may not be larger: more
/// saves calls of the kernel on large bodies, less bounds the memory of many connections more tightly.
const BUFFER_BYTES: usize = 64 * 1024;
/// How many connections beyond the limit are told so at once; more are closed without a word.
const MAX_TURNED_AWAY: usize = 256;
/// How long a connection that gets an answer outside of HTTP's usual course may take to read it.
const LINGER: Duration = Duration::from_secs(1);

/// Serves `listener` until `shutdown`; then no connection is taken any more, each ends after the request it is in, and
/// this returns when all have.
pub async fn run(listener: TcpListener, gateway: Arc<Gateway>, limits: &Limits, shutdown: CancellationToken) {
    let connections = Arc::new(Semaphore::new(limits.connections));
    let turned_away = Arc::new(Semaphore::new(MAX_TURNED_AWAY));
    let tasks = TaskTracker::new();
    loop {
        let socket = tokio::select! {
            connection = listener.accept() => match connection {
                Ok((socket, _)) => socket,
                Err(error) => {
                    // Out of file descriptors, most likely: trying at once again would only burn CPU.
                    gateway.metrics().not_connected();
                    tracing::error!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = shutdown.cancelled() => break,
        };
        if let Ok(slot) = connections.clone().try_acquire_owned() {
            tasks.spawn(serve(socket, gateway.clone(), limits.clone(), shutdown.clone(), slot));
        } else if let Ok(slot) = turned_away.clone().try_acquire_owned() {
            gateway.refused(&Reject::TooManyConnections);
            tasks.spawn(turn_away(socket, slot));
        }
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

/// One connection, request by request.
async fn serve(
    socket: TcpStream,
    gateway: Arc<Gateway>,
    limits: Limits,
    shutdown: CancellationToken,
    slot: OwnedSemaphorePermit,
) {
    let _counted = gateway.metrics().connected();
    // Answers are one small write each; waiting to fill a packet would only delay them. A failure costs just that.
    let _ = socket.set_nodelay(true);
    let pace = Pace::new(limits.header_timeout, limits.idle_timeout);
    // Boxed, because only a connection that may be moved gives its socket back after a time-out.
    let service = service_fn(|request| {
        let answer = gateway.clone().handle(request, pace.request());
        Box::pin(async move { Ok::<_, Infallible>(answer.await) })
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None) // see `pace`
        .max_header_size(limits.header_bytes)
        .max_headers(limits.headers)
        .max_buf_size(BUFFER_BYTES.max(limits.header_bytes))
        .serve_connection(TokioIo::new(Paced { socket, pace: pace.clone() }), service);
    let mut stopping = false;
    let ended = loop {
        tokio::select! {
            biased; // what has come in the meantime is read before the connection is found too slow
            ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => break Some(ended),
            () = pace.overdue() => break None,
            () = shutdown.cancelled(), if !stopping => {
                stopping = true;
                std::pin::Pin::new(&mut connection).graceful_shutdown();
            }
        }
    };
    let parts = connection.into_parts();
    let mut socket = parts.io.into_inner().socket;
    match ended {
        Some(Ok(())) => {}
        // hyper has answered already.
        Some(Err(error)) if error.is_parse_too_large() => gateway.refused(&Reject::LargeHeaders),
        Some(Err(error)) if error.is_parse() => gateway.refused(&Reject::BrokenHeaders),
        // The sender is gone.
        Some(Err(_)) => {}
        // A connection that idles between requests is closed without a word.
        None if parts.read_buf.is_empty() => {}
        None => {
            gateway.refused(&Reject::SlowHeaders);
            let _ = tokio::time::timeout(LINGER, socket.write_all(&Reject::SlowHeaders.to_wire())).await;
        }
    }
    close(socket).await;
    drop(slot);
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
async fn close(mut socket: TcpStream) {
    let read_out = async {
        socket.shutdown().await?;
        let mut discarded = [0; 4096];
        while socket.read(&mut discarded).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    let _ = tokio::time::timeout(LINGER, read_out).await;
}
