//! Nothing we start outlives us, however we end.
//!
//! A process that is killed cannot clean up after itself, so each process that starts servers also starts one small
//! `sh`, in a process group of its own (what the terminal sends us at Ctrl-C does not reach it), that does nothing but
//! read from a pipe whose other end only we hold. The kernel closes that end when we are gone, at `kill -9` too; the
//! shell then ends the processes and removes the folders it was last told of, and itself.
//!
//! We tell it the whole list at every change, as one line of shell that it evaluates in the end: it has no state to
//! keep, and a line that was cut short by our death is not taken (`read` reports it as the end).

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

static WATCHDOG: Mutex<Watchdog> = Mutex::new(Watchdog::new());

struct Watchdog {
    shell: Option<Child>,
    /// Removed first.
    files: Vec<PathBuf>,
    /// Ended next.
    processes: Vec<(u32, Signal)>,
    /// Removed last.
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

/// When we are gone, the file `path` (absolute) is removed, before anything else is done: for what says that we run.
///
/// # Errors
/// When the shell cannot be started.
pub fn guard_file(path: &Path) -> io::Result<()> {
    change(|watchdog| watchdog.files.push(path.to_path_buf()))
}

/// Takes back [`guard_file`].
pub fn release_file(path: &Path) {
    let _ = change(|watchdog| watchdog.files.retain(|guarded| guarded != path)); // see release_process
}

fn change(change: impl FnOnce(&mut Watchdog)) -> io::Result<()> {
    let mut watchdog = WATCHDOG.lock().unwrap_or_else(PoisonError::into_inner);
    change(&mut watchdog);
    let line = watchdog.line();
    if watchdog.tell(&line).is_err() {
        watchdog.begin()?; // none yet, or somebody killed it
        watchdog.tell(&line)?;
    }
    Ok(())
}

impl Watchdog {
    const fn new() -> Watchdog {
        Watchdog { shell: None, files: Vec::new(), processes: Vec::new(), folders: Vec::new() }
    }

    fn begin(&mut self) -> io::Result<()> {
        if let Some(mut old) = self.shell.take() {
            drop(old.stdin.take());
            old.wait()?;
        }
        let mut command = Command::new("/bin/sh");
        // Null, not inherited: who reads our output must see its end when we end. `/`: no file system is kept busy.
        command.args(["-c", SHELL, "watchdog"]).current_dir("/").process_group(0);
        self.shell = Some(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        Ok(())
    }

    fn tell(&mut self, line: &str) -> io::Result<()> {
        let pipe = self.shell.as_mut().and_then(|shell| shell.stdin.as_mut());
        pipe.ok_or(io::ErrorKind::NotFound)?.write_all(line.as_bytes())
    }

    /// All there is to do, as one line for the shell, with its line feed.
    fn line(&self) -> String {
        // A line feed in a name would end the line, and a name that is no text cannot be written: left as they are.
        let names = |paths: &[PathBuf]| -> Vec<String> {
            let names = paths.iter().filter_map(|path| path.to_str()).filter(|name| !name.contains('\n'));
            names.map(|name| format!("'{}'", name.replace('\'', r"'\''"))).collect()
        };
        let mut steps: Vec<String> = names(&self.files).iter().map(|name| format!("rm -f -- {name}; ")).collect();
        let end = |(pid, signal): &(u32, Signal)| format!("end {} {pid}; ", signal.as_str().trim_start_matches("SIG"));
        steps.extend(self.processes.iter().map(end));
        let pids: String = self.processes.iter().map(|(pid, _)| format!(" {pid}")).collect();
        steps.push(format!("gone{pids}; "));
        steps.extend(names(&self.folders).iter().map(|name| format!("rid {name}; ")));
        steps.concat() + ":\n"
    }
}

/// A folder of a test's own: empty, in the system's temporary folder, and gone when this is dropped or we are killed.
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
        let folders = ["/tmp/it's $HOME `x`", "/a\nb"].map(PathBuf::from).to_vec();
        let processes = vec![(7, Signal::SIGINT), (8, Signal::SIGTERM)];
        let watchdog = Watchdog { files: vec!["/f g".into()], processes, folders, ..Watchdog::new() };
        let expected = "rm -f -- '/f g'; end INT 7; end TERM 8; gone 7 8; rid '/tmp/it'\\''s $HOME `x`'; :\n";
        assert_eq!(watchdog.line(), expected);
        assert_eq!(Watchdog::new().line(), "gone; :\n");
    }

    /// A shell of the test's own, so that closing its pipe is our death to it.
    #[test]
    fn at_the_end_of_the_pipe_it_ends_and_removes_what_it_was_last_told_of() {
        let mut watchdog = Watchdog::new();
        watchdog.begin().unwrap();
        let folder = std::env::temp_dir().join(format!("watch'dog {}", uuid::Uuid::new_v4()));
        let file = folder.with_extension("file");
        fs::create_dir(&folder).unwrap();
        fs::write(&file, "").unwrap();
        let sleeper = || Command::new("sleep").arg("1000").spawn().unwrap();
        let (mut asked, mut stopped, mut released) = (sleeper(), sleeper(), sleeper());
        nix::sys::signal::kill(crate::process::nix_pid(stopped.id()), Signal::SIGSTOP).unwrap();
        watchdog.processes = [asked.id(), stopped.id(), released.id()].map(|pid| (pid, Signal::SIGTERM)).to_vec();
        watchdog.tell(&watchdog.line()).unwrap();
        watchdog.processes.pop();
        watchdog.folders.push(folder.clone());
        watchdog.files.push(file.clone());
        watchdog.tell(&watchdog.line()).unwrap();
        watchdog.tell("end KILL 1; a line that was never finish").unwrap();
        let mut shell = watchdog.shell.take().unwrap();
        drop(shell.stdin.take());
        // They are our children: without a `wait` they would stay visible to the shell as zombies.
        asked.wait().unwrap();
        stopped.wait().unwrap();
        assert!(shell.wait().unwrap().success());
        assert!(!folder.exists() && !file.exists());
        assert!(released.try_wait().unwrap().is_none(), "what was released must be left alone");
        released.kill().unwrap();
        released.wait().unwrap();
    }
}
