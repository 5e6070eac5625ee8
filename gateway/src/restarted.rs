//! Runs a task of the gateway again when it has panicked: its fault must not end the process, which takes deliveries.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::time::Duration;

use futures_util::FutureExt as _;
use shared::ops::Readiness;
use tokio::time::{sleep, timeout};

/// Pause before the task runs again, doubled each time up to [`LONGEST`].
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);
/// A task that has run for this time is well again.
const WELL_AFTER: Duration = Duration::from_secs(120);

/// Runs `task`, which never ends by itself, and runs it again after a panic. The check `name` tells.
pub async fn restarted<F>(name: &'static str, readiness: &Readiness, task: impl Fn() -> F)
where
    F: Future<Output = ()>,
{
    let (mut pause, mut panics) = (FIRST, 0_u32);
    readiness.set(name, Ok("runs".into()));
    loop {
        let mut running = pin!(AssertUnwindSafe(task()).catch_unwind());
        if panics > 0 && timeout(WELL_AFTER, &mut running).await.is_err() {
            readiness.set(name, Ok("runs".into()));
            (pause, panics) = (FIRST, 0);
        }
        if panics == 0 {
            let _ = running.await;
        }
        panics += 1;
        tracing::error!(
            task = name,
            again_after = ?pause,
            "a task of the gateway panicked over a fault of the program, and is started again; please report the panic, \
             which stands above"
        );
        let times = if panics == 1 { "once".to_owned() } else { format!("{panics} times") };
        readiness.set(
            name,
            Err(format!("panicked {times} and is started again each time; the log has the panic: please report it")),
        );
        sleep(pause).await;
        pause = LONGEST.min(pause * 2);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_runs_again_and_is_told() {
        let (readiness, runs) = (Readiness::tolerating(&["task"]), AtomicUsize::new(0));
        let task = || async {
            tokio::task::yield_now().await;
            match runs.fetch_add(1, Ordering::Relaxed) {
                0 => panic!("a panic that is meant"),
                _ => std::future::pending().await,
            }
        };
        let is_told = || readiness.states() == [("task", false)];
        let again = async {
            while runs.load(Ordering::Relaxed) < 2 {
                sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = restarted("task", &readiness, task) => unreachable!("it has no end"),
            again = timeout(Duration::from_secs(60), again) => again.unwrap(),
        }
        assert!(is_told(), "it has not run for long");
    }
}
