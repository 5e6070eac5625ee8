//! Another user of the gateway's machine tries to read, change or block the files of the door.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use local::process::Process;
use local::{Scratch, ports};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{User, mkfifo};
use world::{Post, SECRET, eventually};

use crate::{fixture, setup};

const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway-under-test");
/// A file that is longer than any disk here, and takes no space.
const ENDLESS: u64 = 1 << 40;

/// The user `nobody`. `None` where this process may not become another user: the test then prints that it is skipped.
fn nobody(test: &str) -> Option<User> {
    let user = User::from_name("nobody").unwrap().filter(|_| nix::unistd::geteuid().is_root());
    if user.is_none() {
        world::skipped(test, "only root becomes another user");
    }
    user
}

fn run_as(user: &User, program: &str, arguments: &[&Path]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).uid(user.uid.as_raw()).gid(user.gid.as_raw()).output().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// The files of a folder that others than their owner may read, write or list, with their modes.
fn open_to_others(folder: &Path) -> Vec<(PathBuf, String)> {
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    // The gateway writes marks under another name first, and removes them: such a file may be gone by now.
    let modes = files.chain([folder.to_owned()]).filter_map(|path| Some((fs::metadata(&path).ok()?.mode(), path)));
    modes.filter(|(mode, _)| mode & 0o077 != 0).map(|(mode, path)| (path, format!("{mode:o}"))).collect()
}

/// A gateway on a journal that the test made, without a broker.
struct Gateway {
    process: Process,
    port: u16,
    ops_port: u16,
}

impl Gateway {
    fn start(journal: &Path, user: Option<&User>) -> Gateway {
        Gateway::run(&[], journal, user)
    }

    /// The program with these arguments.
    fn run(arguments: &[&str], journal: &Path, user: Option<&User>) -> Gateway {
        let (port, ops_port) = (ports::free().unwrap(), ports::free().unwrap());
        let mut command = Command::new(GATEWAY);
        command.args(arguments).env_clear();
        command.env("SENTRY_CLIENT_SECRET", SECRET).env("GATEWAY_JOURNAL_DIR", journal);
        command.env("GATEWAY_LISTEN", format!("127.0.0.1:{port}"));
        command.env("GATEWAY_OPS_LISTEN", format!("127.0.0.1:{ops_port}"));
        command.env("NATS_URL", "nats://127.0.0.1:1").env("SHUTDOWN_GRACE", "1s");
        if let Some(user) = user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        let log = journal.with_extension("log");
        Gateway { process: Process::spawn("gateway", command, &log, Signal::SIGKILL).unwrap(), port, ops_port }
    }

    /// Waits until it listens, or has ended; `true` where it listens.
    async fn listens(&self) -> bool {
        eventually("the gateway to start or to refuse", || async {
            let healthy = Post::get("/healthz").try_send(self.ops_port).await.is_ok();
            (healthy || !self.process.is_alive()).then_some(healthy)
        })
        .await
    }

    fn log(&self) -> String {
        fs::read_to_string(self.process.log()).unwrap()
    }

    /// The start must have been refused in these words.
    async fn refuses(&self, words: &[&str]) {
        assert!(!self.listens().await, "{words:?} was expected: {}", self.log());
        let log = self.log();
        assert!(words.iter().all(|word| log.contains(word)), "{words:?} was expected: {log}");
        assert_eq!(self.process.ended().await.code(), Some(1), "{log}");
    }
}

#[tokio::test]
async fn the_journal_is_for_its_owner_alone() {
    let mut world = setup().workers(0).gateway_under(&["/bin/sh", "-c", "umask 0; exec \"$0\" \"$@\""]).start().await;
    world.post(fixture!("issue_created")).await.accepted();
    let journal = world.folder().join("gateway-0");
    let names = || fs::read_dir(&journal).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>();
    let with = |extension: &str| names().into_iter().find(|path| path.extension().is_some_and(|it| it == extension));
    eventually("the marks to be written", || async { with("marks") }).await;
    assert_eq!(open_to_others(&journal), []);
    assert_eq!((mode(&journal), mode(&journal.join("lock"))), (0o700, 0o600));
    if let Some(nobody) = nobody("the_journal_is_for_its_owner_alone") {
        let segment = with("journal").unwrap();
        let read = run_as(&nobody, "/bin/cat", &[&segment]);
        assert!(!read.status.success() && read.stdout.is_empty(), "{} bytes were read", read.stdout.len());
    }

    // A journal of an earlier version, and files of it that the gateway does not open.
    assert_eq!(world.gateway.stop().await, Some(0));
    fs::write(journal.join("000000000099.damaged"), "a former payload").unwrap();
    for path in names() {
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    }
    fs::set_permissions(&journal, Permissions::from_mode(0o755)).unwrap();
    world.gateway.start_again();
    world.gateway.ready().await;
    assert_eq!(open_to_others(&journal), []);
}

#[tokio::test]
async fn a_folder_that_others_use_keeps_its_mode() {
    let scratch = Scratch::new("shared").unwrap();
    let journal = scratch.path().join("journal");
    fs::create_dir_all(journal.join("of-another-program")).unwrap();
    fs::set_permissions(&journal, Permissions::from_mode(0o755)).unwrap();
    let gateway = Gateway::start(&journal, None);
    assert!(gateway.listens().await, "{}", gateway.log());
    assert_eq!(mode(&journal), 0o755);
    assert!(gateway.log().contains("of its own"), "{}", gateway.log());
    assert_eq!(mode(&journal.join("gateway-id")), 0o600);
}

#[tokio::test]
async fn a_symbolic_link_in_the_journal_is_not_followed() {
    for name in ["lock", "gateway-id", "000000000001.journal"] {
        let scratch = Scratch::new("link").unwrap();
        let (journal, victim) = (scratch.path().join("journal"), scratch.path().join("victim"));
        fs::create_dir(&journal).unwrap();
        fs::write(&victim, "4242").unwrap();
        symlink(&victim, journal.join(name)).unwrap();
        let gateway = Gateway::start(&journal, None);
        gateway.refuses(&[name, "symbolic link"]).await;
        assert_eq!(fs::read_to_string(&victim).unwrap(), "4242", "{name}");
    }
}

#[tokio::test]
async fn a_fifo_in_the_journal_does_not_hang_the_start() {
    for name in ["lock", "gateway-id", "000000000001.journal"] {
        let scratch = Scratch::new("fifo").unwrap();
        let journal = scratch.path().join("journal");
        fs::create_dir(&journal).unwrap();
        mkfifo(&journal.join(name), Mode::from_bits_truncate(0o600)).unwrap();
        let gateway = Gateway::start(&journal, None);
        gateway.refuses(&[name, "no regular file"]).await;
        if name != "lock" {
            // A command that only looks; it reads no lock.
            Gateway::run(&["journal", "status"], &journal, None).refuses(&["no regular file"]).await;
        }
    }
}

#[tokio::test]
async fn an_endless_file_does_not_hang_the_start() {
    let scratch = Scratch::new("endless").unwrap();
    let journal = scratch.path().join("journal");
    fs::create_dir(&journal).unwrap();
    for name in ["lock", "gateway-id", "000000000001.journal", "000000000002.damaged"] {
        fs::File::create(journal.join(name)).unwrap().set_len(ENDLESS).unwrap();
    }
    let gateway = Gateway::start(&journal, None);
    assert!(gateway.listens().await, "{}", gateway.log());
    let id = fs::read_to_string(journal.join("gateway-id")).unwrap();
    assert_eq!(id.trim().len(), 16, "made anew: {id}");
    assert!(journal.join("000000000001.damaged").exists() && gateway.log().contains("000000000001.journal"));
    // It takes no space, so it takes none of the journal's.
    Post::signed(fixture!("issue_created")).send(gateway.port).await.accepted();
}

#[tokio::test]
async fn endless_marks_do_not_hang_the_start() {
    let mut world = setup().workers(0).start().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.on_stream(1).await;
    assert_eq!(world.gateway.stop().await, Some(0));
    let journal = world.folder().join("gateway-0");
    let mut marks = fs::read_dir(&journal).unwrap().map(|file| file.unwrap().path());
    let marks = marks.find(|path| path.extension().is_some_and(|extension| extension == "marks")).unwrap();
    fs::File::options().write(true).open(marks).unwrap().set_len(ENDLESS).unwrap();
    let (code, out, err) = world.gateway_command_async(&["journal", "status"]).await;
    assert_eq!(code, Some(0), "{out}{err}");
    world.gateway.start_again();
    world.gateway.ready().await;
}

#[tokio::test]
async fn sigterm_ends_a_start_that_reads_its_journal() {
    let scratch = Scratch::new("stop").unwrap();
    let journal = scratch.path().join("journal");
    fs::create_dir(&journal).unwrap();
    for number in 1..=16 {
        // As long as a segment may be, and blank: all of it is read. Together that takes far longer than this test.
        let segment = fs::File::create(journal.join(format!("{number:012}.journal"))).unwrap();
        segment.set_len(2 << 30).unwrap();
    }
    for (arguments, code) in [(&[][..], 0), (&["journal", "drain"], 1)] {
        let gateway = Gateway::run(arguments, &journal, None);
        let lock = journal.join("lock");
        let pid = gateway.process.pid().to_string();
        let holder = || async { fs::read_to_string(&lock).ok().filter(|holder| holder.trim() == pid) };
        eventually("the start to come to the journal", holder).await;
        gateway.process.end(Signal::SIGTERM, Duration::from_secs(60)).await.unwrap();
        assert!(gateway.log().contains("stopped before the journal was open"), "{}", gateway.log());
        assert_eq!(gateway.process.ended().await.code(), Some(code));
    }
}

#[tokio::test]
async fn a_journal_folder_of_another_user_is_refused_and_root_is_warned() {
    let Some(nobody) = nobody("a_journal_folder_of_another_user_is_refused_and_root_is_warned") else { return };
    if !run_as(&nobody, GATEWAY, &[Path::new("--version")]).status.success() {
        return world::skipped(
            "a_journal_folder_of_another_user_is_refused",
            "`nobody` may not run the gateway's program",
        );
    }
    let scratch = Scratch::new("owner").unwrap();
    let journal = |name: &str, owner: u32, mode: u32| {
        let journal = scratch.path().join(name);
        fs::create_dir(&journal).unwrap();
        chown(&journal, Some(owner), None).unwrap();
        fs::set_permissions(&journal, Permissions::from_mode(mode)).unwrap();
        journal
    };
    let others = Gateway::start(&journal("others", 4_000_000, 0o777), Some(&nobody));
    others.refuses(&["belongs to user 4000000", "chown", "GATEWAY_JOURNAL_DIR"]).await;
    // A volume of Kubernetes: root's, and open to the group. Only root could make it narrower.
    let volume = Gateway::start(&journal("volume", 0, 0o2777), Some(&nobody));
    assert!(volume.listens().await, "{}", volume.log());
    let warned = Gateway::start(&journal("theirs", nobody.uid.as_raw(), 0o755), None);
    assert!(warned.listens().await, "{}", warned.log());
    assert!(warned.log().contains(&format!("belongs to user {}", nobody.uid)), "{}", warned.log());
}

#[tokio::test]
async fn a_crash_leaves_no_memory_on_the_disk() {
    let world = setup().start().await;
    for program in [&world.gateway, &world.workers[0]] {
        let Ok(limits) = fs::read_to_string(format!("/proc/{}/limits", program.process().pid())) else {
            return world::skipped("a_crash_leaves_no_memory_on_the_disk", "this system has no /proc");
        };
        let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    }
}
