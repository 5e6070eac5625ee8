//! Nothing we start outlives us, however we end.
//!
//! A process that is killed cannot clean up after itself, so each process that starts servers also starts one small
//! `sh`, in a process group of its own (what the terminal sends us at Ctrl-C does not reach it), that does nothing but
//! read from a pipe whose other end only we hold. The kernel closes that end when we are gone, at `kill -9` too; the
//! shell then ends the processes and removes the folders it was last told of, and itself.
//!
//! We tell it the whole list at every change, as one line of shell that it evaluates in the end: it has no state to keep,
//! and a line that was cut short by our death is not taken (`read` reports it as the end).

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::account;

/// `end` asks a process to end (CONT, for one that was stopped would never hear it). `gone` waits until all are, ten
/// seconds at most, then kills. `rid` tries twice, because a dying server may still be writing.
const SHELL: &str = r#"
trap '' HUP INT TERM
end() { kill -s "$1" "$2"; kill -s CONT "$2"; }
gone() {
    tries=0
    for pid; do
        while kill -s 0 "$pid" && [ $tries -lt 100 ]; do tries=$((tries + 1)); sleep 0.1 || sleep 1; done
        kill -s KILL "$pid"
    done
}
rid() { rm -rf -- "$@" || { sleep 1; rm -rf -- "$@"; }; }
list=
while IFS= read -r line; do list=$line; done
eval "$list"
"#;

static WATCHDOG: Mutex<Watchdog> = Mutex::new(Watchdog { shell: None, processes: Vec::new(), folders: Vec::new() });

struct Watchdog {
    shell: Option<Child>,
    processes: Vec<(u32, Signal)>,
    folders: Vec<PathBuf>,
}

/// When we are gone, the process `pid` gets `signal`, and SIGKILL if it is still there ten seconds later.
///
/// # Errors
/// When the shell cannot be started.
pub fn guard_process(pid: u32, signal: Signal) -> io::Result<()> {
    change(|watchdog| watchdog.processes.push((pid, signal)))
}

/// Takes back [`guard_process`]; to be called once the process has ended, before its number can be another's.
pub fn release_process(pid: u32) {
    // A shell that cannot be told has no list either: nothing will be ended by mistake.
    let _ = change(|watchdog| watchdog.processes.retain(|(guarded, _)| *guarded != pid));
}

/// When we are gone, `folder` (an absolute path) is removed with all that is in it, after all processes have ended.
///
/// # Errors
/// When the shell cannot be started.
pub fn guard_folder(folder: &Path) -> io::Result<()> {
    change(|watchdog| watchdog.folders.push(folder.to_path_buf()))
}

/// Takes back [`guard_folder`].
pub fn release_folder(folder: &Path) {
    let _ = change(|watchdog| watchdog.folders.retain(|guarded| guarded != folder)); // see release_process
}

fn change(change: impl FnOnce(&mut Watchdog)) -> io::Result<()> {
    let mut watchdog = WATCHDOG.lock().unwrap_or_else(PoisonError::into_inner);
    change(&mut watchdog);
    let line = line(&watchdog.processes, &watchdog.folders);
    if watchdog.tell(&line).is_err() {
        watchdog.begin()?; // none yet, or somebody killed it
        watchdog.tell(&line)?;
    }
    Ok(())
}

impl Watchdog {
    fn begin(&mut self) -> io::Result<()> {
        if let Some(mut old) = self.shell.take() {
            drop(old.stdin.take());
            old.wait()?;
        }
        let mut command = Command::new("/bin/sh");
        // Null, not inherited: who reads our output must see its end when we end. `/`, so that no file system stays busy.
        command.args(["-c", SHELL, "watchdog"]).current_dir("/").process_group(0);
        self.shell = Some(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        Ok(())
    }

    fn tell(&mut self, line: &str) -> io::Result<()> {
        let pipe = self.shell.as_mut().and_then(|shell| shell.stdin.as_mut());
        pipe.ok_or(io::ErrorKind::NotFound)?.write_all(line.as_bytes())
    }
}

/// One line for the shell, with its line feed.
fn line(processes: &[(u32, Signal)], folders: &[PathBuf]) -> String {
    let mut line = String::new();
    for (pid, signal) in processes {
        let name = signal.as_str().trim_start_matches("SIG");
        let _ = write!(line, "end {name} {pid}; "); // writing to a String cannot fail
    }
    if !processes.is_empty() {
        let pids = processes.iter().map(|(pid, _)| format!(" {pid}"));
        let _ = write!(line, "gone{}; ", pids.collect::<String>());
    }
    for folder in folders {
        // A line feed in the name would end the line, and a name that is no text cannot be written: left to the system.
        if let Some(name) = folder.to_str().filter(|name| !name.contains('\n')) {
            let _ = write!(line, "rid '{}'; ", name.replace('\'', r"'\''"));
        }
    }
    line.push_str(":\n");
    line
}

/// A folder of a test's own: empty, under the system's temporary folder, and gone when this is dropped or we are killed.
/// Others may pass through it but not list it, because PostgreSQL may run as another user.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// A new one, with `name` in its name.
    ///
    /// # Errors
    /// When it cannot be made or guarded.
    pub fn new(name: &str) -> io::Result<Scratch> {
        let folder = format!("loop-{name}-{}", uuid::Uuid::new_v4().simple());
        let path = std::env::temp_dir().canonicalize()?.join(folder);
        guard_folder(&path)?;
        account::make_passable(&path)?;
        Ok(Scratch { path })
    }

    /// Its absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A server that was just killed may write for another moment.
        let gone = (0..50).any(|_| {
            let removed = fs::remove_dir_all(&self.path);
            let gone = removed.is_ok() || !self.path.exists();
            if !gone {
                std::thread::sleep(Duration::from_millis(20));
            }
            gone
        });
        if gone {
            release_folder(&self.path); // else the watchdog tries once more
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_reach_the_shell_as_they_are() {
        let odd = PathBuf::from("/tmp/it's $HOME `x`");
        let text = line(&[(7, Signal::SIGINT), (8, Signal::SIGTERM)], &[odd, PathBuf::from("/a\nb")]);
        assert_eq!(text, "end INT 7; end TERM 8; gone 7 8; rid '/tmp/it'\\''s $HOME `x`'; :\n");
    }

    /// A shell of the test's own, so that closing its pipe is our death to it.
    #[test]
    fn at_the_end_of_the_pipe_it_ends_and_removes_what_it_was_last_told_of() {
        let mut watchdog = Watchdog { shell: None, processes: Vec::new(), folders: Vec::new() };
        watchdog.begin().unwrap();
        let folder = std::env::temp_dir().join(format!("watch'dog {}", uuid::Uuid::new_v4()));
        fs::create_dir(&folder).unwrap();
        let sleeper = || Command::new("sleep").arg("1000").spawn().unwrap();
        let (mut asked, mut stopped, mut released) = (sleeper(), sleeper(), sleeper());
        nix::sys::signal::kill(crate::process::nix_pid(stopped.id()), Signal::SIGSTOP).unwrap();
        let all = [asked.id(), stopped.id(), released.id()].map(|pid| (pid, Signal::SIGTERM));
        watchdog.tell(&line(&all, &[])).unwrap();
        watchdog.tell(&line(&all[..2], std::slice::from_ref(&folder))).unwrap();
        watchdog.tell("end KILL 1; a line that was never finish").unwrap();
        let mut shell = watchdog.shell.take().unwrap();
        drop(shell.stdin.take());
        // They are our children: without a `wait` they would stay visible to the shell as zombies.
        asked.wait().unwrap();
        stopped.wait().unwrap();
        assert!(shell.wait().unwrap().success());
        assert!(!folder.exists());
        assert!(released.try_wait().unwrap().is_none(), "what was released must be left alone");
        released.kill().unwrap();
        released.wait().unwrap();
    }
}
