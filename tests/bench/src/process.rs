//! What a process has used so far, and what memory the machine has, from Linux's `/proc`
//! (<https://man7.org/linux/man-pages/man5/proc.5.html>). Elsewhere there is no such thing, and the numbers are left out.

use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};

/// CPU time of all threads of a process, in user and system mode. The clock of it ticks every 10 ms.
pub(crate) fn cpu(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; `utime` and `stime` are fields 14 and 15.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    let used = ticks()? + ticks()?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok()??;
    Some(Duration::from_secs_f64(used / per_second as f64))
}

/// Memory that a process takes now, in MB (10^6 bytes).
pub(crate) fn rss(pid: u32) -> Option<f64> {
    status(pid, "VmRSS:")
}

/// The most it ever took, in MB.
pub(crate) fn peak_rss(pid: u32) -> Option<f64> {
    status(pid, "VmHWM:")
}

/// Takes so much memory, but not more than half of what is available, writes to all of it, and gives it back.
///
/// A virtual machine may have given what it did not use back to its host (free page reporting,
/// <https://docs.kernel.org/mm/free_page_reporting.html>), and whoever uses that first pays for it: the broker's share
/// of the page cache then costs twice as much the one time as the other. So before both.
pub(crate) fn warm_memory(bytes: u64) {
    let Some(available) = kib("/proc/meminfo", "MemAvailable:") else { return };
    let bytes = bytes.min((available * 1024.0 / 2.0) as u64);
    std::hint::black_box(vec![1_u8; usize::try_from(bytes).unwrap_or(0)]);
}

fn status(pid: u32, field: &str) -> Option<f64> {
    Some(kib(&format!("/proc/{pid}/status"), field)? * 1024.0 / 1e6)
}

fn kib(file: &str, field: &str) -> Option<f64> {
    let lines = std::fs::read_to_string(file).ok()?;
    let kib = lines.lines().find_map(|line| line.strip_prefix(field))?.trim().strip_suffix("kB")?;
    kib.trim().parse().ok()
}
