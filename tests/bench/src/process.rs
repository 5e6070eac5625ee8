//! What a process has used so far, from Linux's `/proc` (<https://man7.org/linux/man-pages/man5/proc.5.html>).
//! Elsewhere there is no such thing, and the numbers are left out.

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

fn status(pid: u32, field: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix(field))?.trim().strip_suffix("kB")?;
    Some(kib.trim().parse::<f64>().ok()? * 1024.0 / 1e6)
}
