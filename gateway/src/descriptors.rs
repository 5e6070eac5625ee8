//! File descriptors: each connection needs one, and a process may have so many.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use shared::ops;

/// Descriptors of a gateway beside its connections: listeners, the journal's files that are in use, NATS, connections that
/// are turned away.
const OTHERS: u64 = 1024;

/// How many a gateway with that many public connections may need.
pub fn needed(connections: usize) -> u64 {
    (connections + ops::MAX_CONNECTIONS) as u64 + OTHERS
}

/// How many this process may have now, and may allow itself. `None` where the system does not tell.
pub fn limits() -> Option<(u64, u64)> {
    getrlimit(Resource::RLIMIT_NOFILE).ok()
}

/// Allows this process what it needs, as far as it may: systems start programs with a low limit that they may raise
/// themselves (often 1024, of half a million), for the sake of old programs that could not bear more.
pub fn raise(connections: usize) {
    let Some((soft, hard)) = limits() else { return };
    let wanted = needed(connections).min(hard);
    if wanted > soft
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard)
    {
        tracing::warn!(%error, "cannot raise the limit of file descriptors");
    }
    if needed(connections) > soft.max(wanted) {
        tracing::warn!(
            limit = soft.max(wanted),
            "fewer file descriptors than GATEWAY_MAX_CONNECTIONS needs: connections beyond them wait in the system's queue"
        );
    }
}
