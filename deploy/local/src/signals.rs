//! Ctrl-C and its like: the first one asks for an orderly stop, the second one ends us at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that is cancelled by the first SIGINT, SIGTERM or SIGHUP (the terminal was closed). The next one ends the
/// process; the watchdog then ends the servers.
///
/// # Errors
/// When the process cannot listen for signals.
pub(crate) fn listen() -> std::io::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let stop = CancellationToken::new();
    let first = stop.clone();
    tokio::spawn(async move {
        loop {
            let number = tokio::select! {
                _ = interrupt.recv() => 2,
                _ = terminate.recv() => 15,
                _ = hang_up.recv() => 1,
            };
            if first.is_cancelled() {
                std::process::exit(128 + number); // as a shell reports it
            }
            first.cancel();
        }
    });
    Ok(stop)
}
