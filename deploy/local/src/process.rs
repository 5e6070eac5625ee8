//! One child process: started with its output in a file, watched until it ends, ended when asked or when we end.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System};
use tokio::sync::watch;

use crate::watchdog;

/// A child process. Dropping it kills it at once and waits until it is gone.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: u32,
    log: PathBuf,
    /// Where in the log this life of the program begins.
    log_start: u64,
    ended: watch::Receiver<Option<ExitStatus>>,
}

impl Process {
    /// Starts `command` in a process group of its own (Ctrl-C at the terminal reaches us, and we end it in order),
    /// its output appended to the file `log`. If we are killed, the watchdog sends it `farewell`.
    ///
    /// # Errors
    /// When the program cannot be started or its log not be opened.
    pub fn spawn(name: &str, mut command: Command, log: &Path, farewell: Signal) -> anyhow::Result<Process> {
        let at = || format!("cannot write the log {}", log.display());
        let output = File::options().create(true).append(true).open(log).with_context(at)?;
        let log_start = output.metadata().with_context(at)?.len();
        let errors = output.try_clone().with_context(at)?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        let program = PathBuf::from(command.get_program());
        let mut child = command.spawn().with_context(|| format!("cannot start {name} ({})", program.display()))?;
        let pid = child.id();
        let guarded = watchdog::guard_process(pid, farewell).context("cannot start the watchdog (/bin/sh)");
        let (tell, ended) = watch::channel(None);
        // A thread and not a task: whoever holds this may outlive the runtime it was made in (tests do).
        thread::spawn(move || {
            // `wait` fails only when somebody else has waited for the child; it has ended then, too.
            let status = child.wait().unwrap_or_else(|_| ExitStatus::from_raw(0));
            watchdog::release_process(pid);
            let _ = tell.send(Some(status)); // nobody may be left to care
        });
        let process = Process { name: name.to_owned(), pid, log: log.to_path_buf(), log_start, ended };
        guarded?; // after the thread is there, so that dropping `process` ends the child
        Ok(process)
    }

    /// Its number; another program may have it once this one has ended.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The file that holds its output.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Whether it runs (or is stopped), that is, has not ended.
    pub fn is_alive(&self) -> bool {
        self.ended.borrow().is_none()
    }

    /// Sends a signal, if it has not ended.
    pub fn signal(&self, signal: Signal) {
        if self.is_alive() {
            let _ = kill(nix_pid(self.pid), signal); // it may end at this moment
        }
    }

    /// Waits until it has ended by itself or otherwise.
    pub async fn ended(&self) -> ExitStatus {
        let mut ended = self.ended.clone();
        // The sender says how it ended before it goes.
        let status = ended.wait_for(Option::is_some).await.ok().and_then(|status| *status);
        status.unwrap_or_else(|| ExitStatus::from_raw(0))
    }

    /// Asks it to end and waits until it has; kills it when it has not within `patience`.
    ///
    /// # Errors
    /// When it had to be killed.
    pub async fn end(&self, signal: Signal, patience: Duration) -> anyhow::Result<()> {
        self.signal(signal);
        self.signal(Signal::SIGCONT); // one that is stopped would not hear it
        if tokio::time::timeout(patience, self.ended()).await.is_ok() {
            return Ok(());
        }
        self.kill().await;
        anyhow::bail!("{} did not end within {patience:?} of {signal} and was killed; {}", self.name, self.last_words())
    }

    /// `kill -9`, for it and all its children, and waits until none is left.
    pub async fn kill(&self) {
        // Stopped first, so that it neither starts another child nor cleans up after the ones that go.
        self.signal(Signal::SIGSTOP);
        // Without a process table it goes alone, and its children notice.
        let family = self.descendants().unwrap_or_default();
        for pid in &family {
            let _ = kill(*pid, Signal::SIGKILL); // it may have ended
        }
        self.signal(Signal::SIGKILL);
        self.ended().await;
        for pid in family {
            while !has_ended(pid) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            watchdog::release_process(pid.as_raw().unsigned_abs());
        }
    }

    /// SIGSTOP for it and all its children: it keeps its connections and answers nothing, until [`Process::thaw`].
    ///
    /// # Errors
    /// When the children cannot be found, or the watchdog not be told of them (they would stay stopped if we died).
    pub fn freeze(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGSTOP); // first, so that no child is added
        for pid in self.descendants()? {
            watchdog::guard_process(pid.as_raw().unsigned_abs(), Signal::SIGKILL)?;
            let _ = kill(pid, Signal::SIGSTOP); // it may have ended
        }
        Ok(())
    }

    /// Lets it and its children go on.
    ///
    /// # Errors
    /// When the children cannot be found.
    pub fn thaw(&self) -> anyhow::Result<()> {
        for pid in self.descendants()? {
            let _ = kill(pid, Signal::SIGCONT);
            watchdog::release_process(pid.as_raw().unsigned_abs());
        }
        self.signal(Signal::SIGCONT);
        Ok(())
    }

    /// How it ended (if it has) and the last lines of its log, for a person.
    pub fn last_words(&self) -> String {
        let how = match *self.ended.borrow() {
            None => "still running".to_owned(),
            Some(status) => status.to_string(),
        };
        let tail = tail(&self.log, self.log_start);
        format!("{} ({how}); the end of its log {}:\n{tail}", self.name, self.log.display())
    }

    /// Whether its log has these words, in this life of the program.
    pub(crate) fn said(&self, words: &str) -> bool {
        read_from(&self.log, self.log_start).is_ok_and(|log| log.contains(words))
    }

    fn descendants(&self) -> anyhow::Result<Vec<Pid>> {
        let system = table(ProcessesToUpdate::All, ProcessRefreshKind::nothing())?;
        let mut family = vec![sysinfo::Pid::from_u32(self.pid)];
        let mut next = 0;
        while let Some(parent) = family.get(next).copied() {
            let children = system.processes().iter().filter(|(_, process)| process.parent() == Some(parent));
            family.extend(children.map(|(pid, _)| *pid));
            next += 1;
        }
        Ok(family.iter().skip(1).map(|pid| nix_pid(pid.as_u32())).collect())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        let patience = Instant::now() + Duration::from_secs(5);
        while self.is_alive() && Instant::now() < patience {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The number as nix takes it. The kernel's numbers fit (at most 2^22 on Linux, 99,999 on macOS).
pub(crate) fn nix_pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).expect("a process number is below 2^31"))
}

/// Ended, whether or not somebody has waited for it.
fn has_ended(pid: Pid) -> bool {
    let pid = sysinfo::Pid::from_u32(pid.as_raw().unsigned_abs());
    let Ok(system) = table(ProcessesToUpdate::Some(&[pid]), ProcessRefreshKind::nothing()) else { return false };
    system.process(pid).is_none_or(|process| process.status() == sysinfo::ProcessStatus::Zombie)
}

/// The machine's processes as they are now, with `what` known of each.
pub(crate) fn table(which: ProcessesToUpdate<'_>, what: ProcessRefreshKind) -> anyhow::Result<System> {
    let mut system = System::new().context("cannot read which processes there are")?;
    system.refresh_processes_specifics(which, true, what);
    Ok(system)
}

/// The last lines of a log, from byte `start` on; some words instead when there are none.
fn tail(log: &Path, start: u64) -> String {
    const BYTES: u64 = 4096;
    const LINES: usize = 12;
    let end = fs::metadata(log).map_or(0, |found| found.len());
    let text = read_from(log, end.saturating_sub(BYTES).max(start));
    let text = text.unwrap_or_else(|err| format!("(not readable: {err})"));
    let lines: Vec<&str> = text.lines().collect();
    match lines.len() {
        0 => "  (empty)".to_owned(),
        count => lines[count.saturating_sub(LINES)..].iter().map(|line| format!("  {line}\n")).collect(),
    }
}

fn read_from(log: &Path, start: u64) -> io::Result<String> {
    let mut file = File::open(log)?;
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;

    fn shell(script: &str, log: &Path) -> Process {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        Process::spawn("the script", command, log, Signal::SIGTERM).unwrap()
    }

    #[tokio::test]
    async fn how_it_ended_is_told_with_the_end_of_this_lifes_log() {
        let scratch = Scratch::new("process").unwrap();
        let log = scratch.path().join("log");
        shell("echo a former life", &log).ended().await;
        let process = shell("seq 1 100; exit 3", &log);
        assert_eq!(process.ended().await.code(), Some(3));
        let words = process.last_words();
        assert!(words.contains("exit status: 3") && words.ends_with("  99\n  100\n"), "{words}");
        assert_eq!(words.lines().count(), 13);
        assert!(!words.contains("former"));
    }

    #[tokio::test]
    async fn kill_leaves_no_child_behind_and_freeze_stops_them_all() {
        let scratch = Scratch::new("process").unwrap();
        let (log, ticks) = (scratch.path().join("log"), scratch.path().join("ticks"));
        let process = shell(&format!("(while :; do echo . >> {}; sleep 0.01; done) & wait", ticks.display()), &log);
        let size = || fs::metadata(&ticks).map_or(0, |found| found.len());
        let grows_from = |from| {
            let begin = Instant::now();
            while size() == from && begin.elapsed() < Duration::from_secs(20) {
                thread::sleep(Duration::from_millis(5));
            }
            size() > from
        };
        assert!(grows_from(0));
        process.freeze().unwrap();
        // The state that the kernel reports, rather than a wait in which nothing happens.
        let stopped = |pid: &Pid| {
            let state = Command::new("ps").args(["-o", "state=", "-p", &pid.to_string()]).output().unwrap().stdout;
            state.starts_with(b"T")
        };
        let children = process.descendants().unwrap();
        assert!(!children.is_empty());
        assert!(stopped(&nix_pid(process.pid())));
        let begin = Instant::now();
        while !children.iter().all(|pid| stopped(pid) || has_ended(*pid)) {
            assert!(begin.elapsed() < Duration::from_secs(20), "its children must stop, too");
        }
        let frozen_at = size();
        process.thaw().unwrap();
        assert!(grows_from(frozen_at));
        process.kill().await;
        assert!(!process.is_alive());
        assert!(children.iter().all(|pid| has_ended(*pid)));
    }

    #[tokio::test]
    async fn one_that_will_not_end_is_killed() {
        let scratch = Scratch::new("process").unwrap();
        let log = scratch.path().join("log");
        let process = shell("trap '' TERM; echo ready; while :; do sleep 1; done", &log);
        while !process.last_words().contains("ready") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let ended = process.end(Signal::SIGTERM, Duration::from_millis(50)).await;
        assert!(ended.unwrap_err().to_string().contains("was killed"));
        assert!(!process.is_alive());
    }
}
