//! A disk that is slow or fails: strace puts faults into the system calls of the journal's threads, or into all reads of a
//! process, for a while.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use local::process::Process;
use nix::sys::signal::Signal;
use world::{World, eventually};

/// The name of the thread that writes (<https://man7.org/linux/man-pages/man5/proc_pid_comm.5.html>).
pub(super) const WRITER: &str = "journal-writer";
/// The name of the thread that makes, seals and removes segments.
pub(super) const KEEPER: &str = "journal-keeper";

/// What can be done to a file that changes it or makes a change last.
const CALLS: &str = "fdatasync,fsync,write,writev,pwrite64,pwritev,ftruncate,fallocate";

/// Faults in the system calls of a gateway's journal until [`Faults::end`].
///
/// strace is attached to the gateway as it runs, and to these threads alone: the rest of it is neither slowed nor touched. If
/// strace is killed, the kernel lets go of the threads.
pub(super) struct Faults {
    strace: Process,
    /// Where it writes what it saw.
    seen: PathBuf,
}

impl Faults {
    /// Begins, in the thread that writes. `fault` is what strace(1) calls an injection, such as `fdatasync:error=EIO`. `None`
    /// where this machine does not allow it.
    pub(super) async fn begin(drill: &str, world: &World, fault: &str) -> Option<Self> {
        Self::begin_in(&[WRITER], drill, world, fault).await
    }

    /// The same in the threads of these names.
    pub(super) async fn begin_in(threads: &[&str], drill: &str, world: &World, fault: &str) -> Option<Self> {
        Self::begin_in_process(world.gateway.process().pid(), threads, drill, world, fault).await
    }

    /// The same in the process with this number.
    pub(super) async fn begin_in_process(
        pid: u32,
        threads: &[&str],
        drill: &str,
        world: &World,
        fault: &str,
    ) -> Option<Self> {
        let (trace, inject) = (format!("trace={CALLS}"), format!("inject={fault}"));
        let threads: Vec<_> = threads.iter().map(|name| thread(pid, name)).collect();
        let attach = threads.iter().flat_map(|thread| ["-p", thread]);
        let arguments: Vec<_> = ["-e", &trace, "-e", &inject].into_iter().chain(attach).collect();
        Faults::attach(drill, world, &arguments, threads.len()).await
    }

    /// Begins: the disk gives this process nothing of any file, whichever of its threads reads. `None` where this machine
    /// does not allow it.
    pub(super) async fn no_reads(drill: &str, world: &World, pid: u32) -> Option<Self> {
        let fault = ["-f", "-e", "trace=pread64", "-e", "inject=pread64:error=EIO", "-p", &pid.to_string()];
        Faults::attach(drill, world, &fault, 1).await
    }

    /// Starts strace with these arguments, and waits until it is attached to so many threads or processes.
    async fn attach(drill: &str, world: &World, arguments: &[&str], count: usize) -> Option<Self> {
        if Command::new("strace").arg("-V").output().is_err() {
            world::skipped(drill, "there is no `strace` on PATH");
            return None;
        }
        let tag = uuid::Uuid::new_v4().simple().to_string();
        let (seen, log) =
            (world.folder().join(format!("seen-{tag}")), world.folder().join(format!("strace-{tag}.log")));
        let mut command = Command::new("strace");
        command.args(["-y", "-s", "0", "-o"]).arg(&seen); // paths beside descriptors, and no data
        command.args(arguments);
        let strace = Process::spawn("strace", command, &log, Signal::SIGTERM).unwrap();
        let attached = || async {
            let ended = !strace.is_alive();
            let said = fs::read_to_string(&log).unwrap();
            if ended {
                assert!(said.contains("not permitted") || said.contains("denied"), "{said}");
                return Some(false);
            }
            (said.matches(" attached").count() >= count).then_some(true)
        };
        if eventually("strace to be attached", attached).await {
            return Some(Faults { strace, seen });
        }
        world::skipped(drill, "this process may not trace another");
        None
    }

    /// The calls on this segment, by their names, of a gateway that has ended.
    pub(super) async fn calls_on(&self, number: u64) -> Vec<&'static str> {
        eventually("strace to end with the gateway", async || (!self.strace.is_alive()).then_some(())).await;
        let seen = fs::read_to_string(&self.seen).unwrap();
        let call = |line: &str| CALLS.split(',').find(|call| is_on(line, call, number));
        seen.lines().filter_map(call).collect()
    }

    /// Ends the faults. Gives how many there were, and has seen to it that no file was written or synced after its first.
    pub(super) async fn end(self) -> usize {
        self.strace.end(Signal::SIGTERM, Duration::from_secs(10)).await.unwrap();
        never_again(&fs::read_to_string(self.seen).unwrap())
    }

    /// Ends the faults in reads.
    pub(super) async fn end_reads(self) {
        self.strace.end(Signal::SIGTERM, Duration::from_secs(10)).await.unwrap();
    }
}

/// A line of a trace that is of a call on this segment.
fn is_on(line: &str, call: &str, number: u64) -> bool {
    line.contains(&format!("{call}(")) && line.contains(&format!("/{number:012}.journal>"))
}

/// How many calls on segments failed in a trace. After a failed sync the kernel may call the next one a success
/// although the pages are gone, so there must be none.
fn never_again(trace: &str) -> usize {
    let mut failed = HashSet::new();
    let mut failures = 0;
    for line in trace.lines() {
        // `fdatasync(12</tmp/x/000000000003.journal>) = -1 EIO (Input/output error) (INJECTED)`
        let Some((_, rest)) = line.split_once('<') else { continue };
        let Some((path, _)) = rest.split_once('>') else { continue };
        if !path.contains(".journal") {
            continue;
        }
        assert!(!failed.contains(path), "a segment that had failed was used again: {line}");
        if line.contains(" = -1 ") && line.ends_with("(INJECTED)") {
            failed.insert(path.to_owned());
            failures += 1;
        }
    }
    failures
}

/// The number in this process of the thread with this name.
fn thread(pid: u32, name: &str) -> String {
    let mut threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|thread| thread.unwrap());
    let named =
        |thread: &fs::DirEntry| fs::read_to_string(thread.path().join("comm")).is_ok_and(|comm| comm.trim() == name);
    threads.find(named).unwrap().file_name().into_string().unwrap()
}
