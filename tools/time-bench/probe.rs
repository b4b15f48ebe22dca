//! What the machine and the nodes say about themselves: `/proc`, data directories, `/metrics`.
//!
//! A sample is taken at each end of the measured window; figures are differences.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Milliseconds of one tick of `/proc`: Linux counts in hundredths of a second for programs,
/// on every architecture that this runs on.
const MS_PER_TICK: u64 = 10;
/// Bytes of one block of `st_blocks`, and of one sector of `/proc/diskstats`.
const BLOCK_BYTES: u64 = 512;
/// How long an operator's port may take to answer.
const HTTP_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an answer of an operator's port.
const MAX_HTTP_BYTES: u64 = 4 * 1024 * 1024;

/// A process at one moment.
#[derive(Debug, Clone, Default)]
pub struct ProcessSample {
    pub cpu_ms: u64,
    /// CPU by what the living threads are called, without their numbers.
    pub threads_ms: BTreeMap<String, u64>,
    pub resident_bytes: u64,
    pub peak_resident_bytes: u64,
}

/// The whole machine at one moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct MachineSample {
    pub busy_ms: u64,
    pub idle_ms: u64,
    /// What the hypervisor gave to others.
    pub stolen_ms: u64,
}

/// A node at one moment.
#[derive(Debug, Clone, Default)]
pub struct NodeSample {
    pub process: Option<ProcessSample>,
    pub metrics: BTreeMap<String, u64>,
    pub disk_bytes: u64,
}

/// User and system time in a line of `/proc/.../stat`.
fn cpu_of(stat: &str) -> Option<u64> {
    // The name in parentheses may contain anything; fields are counted from behind it.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = |n: usize| fields.split_whitespace().nth(n)?.parse::<u64>().ok();
    Some((ticks(11)? + ticks(12)?) * MS_PER_TICK)
}

/// The value of `name:` in a file of such lines, in its own unit.
fn value_of(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// A thread's name without its number: `verify-3` is one of `verify`.
fn group_of(name: &str) -> String {
    name.trim().trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('-').to_owned()
}

/// Looks at a process; `self` is this one.
pub fn process(pid: &str) -> anyhow::Result<ProcessSample> {
    let base = Path::new("/proc").join(pid);
    let text = |name: &str| {
        let path = base.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}; does process {pid} run?", path.display()))
    };
    let cpu_ms = cpu_of(&text("stat")?).context("/proc/PID/stat is not as expected")?;
    let status = text("status")?;
    let kilobytes = |name| value_of(&status, name).unwrap_or(0) * 1024;
    let mut threads_ms = BTreeMap::new();
    for task in fs::read_dir(base.join("task")).with_context(|| format!("cannot list the threads of {pid}"))? {
        let task = task.with_context(|| format!("cannot list the threads of {pid}"))?.path();
        // A thread may end at any time, and its time is in the process's sum all the same.
        let (Ok(name), Ok(stat)) = (fs::read_to_string(task.join("comm")), fs::read_to_string(task.join("stat")))
        else {
            continue;
        };
        *threads_ms.entry(group_of(&name)).or_default() += cpu_of(&stat).unwrap_or(0);
    }
    Ok(ProcessSample {
        cpu_ms,
        threads_ms,
        resident_bytes: kilobytes("VmRSS"),
        peak_resident_bytes: kilobytes("VmHWM"),
    })
}

/// Looks at all cores together.
pub fn machine() -> anyhow::Result<MachineSample> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    machine_of(&text).context("/proc/stat is not as expected")
}

fn machine_of(text: &str) -> Option<MachineSample> {
    let line = text.lines().find(|line| line.starts_with("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; what guests use is in user already.
    let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = ticks[..] else { return None };
    let ms = |ticks: u64| ticks * MS_PER_TICK;
    Some(MachineSample {
        busy_ms: ms(user + nice + system + irq + softirq),
        idle_ms: ms(idle + iowait),
        stolen_ms: ms(steal),
    })
}

/// Bytes that a directory and all in it take on disk.
pub fn disk_bytes(path: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        // A database removes files while it is looked at.
        let Ok(metadata) = entry.metadata() else { continue };
        bytes += metadata.blocks() * BLOCK_BYTES;
        if metadata.is_dir() {
            bytes += disk_bytes(&entry.path())?;
        }
    }
    Ok(bytes)
}

/// Bytes that were written to the device of a directory, by whomever; `None` where that
/// cannot be told. A process's own `write_bytes` would be no measure: it counts a whole large
/// folio of the page cache for a write of a few bytes into it.
pub fn device_written_bytes(path: &Path) -> Option<u64> {
    let device = fs::metadata(path).ok()?.dev();
    written_of(&fs::read_to_string("/proc/diskstats").ok()?, device)
}

fn written_of(diskstats: &str, device: u64) -> Option<u64> {
    let (major, minor) = ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xf_ff00));
    let line = diskstats.lines().find(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        numbers.next() == Some(Ok(major)) && numbers.next() == Some(Ok(minor))
    })?;
    Some(line.split_whitespace().nth(9)?.parse::<u64>().ok()? * BLOCK_BYTES)
}

/// A GET of an operator's port: the status code and the body.
pub async fn http(address: &str, path: &str) -> anyhow::Result<(u16, String)> {
    let asking = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(MAX_HTTP_BYTES).read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = timeout(HTTP_TIMEOUT, asking).await.with_context(|| format!("http://{address} does not answer"))?;
    let answer = answer.with_context(|| format!("http://{address}{path}"))?;
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { bail!("http://{address}{path}: no HTTP answer") };
    let code = head.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    Ok((code.with_context(|| format!("http://{address}{path}: no HTTP answer"))?, body.to_owned()))
}

/// A node's counters and gauges by name, without `time_` and `_total`.
pub async fn metrics(address: &str) -> anyhow::Result<BTreeMap<String, u64>> {
    Ok(metrics_of(&http(address, "/metrics").await?.1))
}

fn metrics_of(text: &str) -> BTreeMap<String, u64> {
    let parse = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        let name = name.strip_prefix("time_")?;
        Some((name.strip_suffix("_total").unwrap_or(name).to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_contain_anything() {
        let stat = "42 (a) b) c) S 1 42 42 0 -1 4194560 1 0 0 0 150 25 0 0 20 0 9 0 5 1 1";
        assert_eq!(cpu_of(stat), Some(1_750));
        assert_eq!(cpu_of("nonsense"), None);
    }

    #[test]
    fn this_process_can_be_looked_at() {
        let mut spun = 0_u64;
        while process("self").unwrap().cpu_ms < 20 {
            spun += 1;
        }
        let sample = process("self").unwrap();
        assert!(!sample.threads_ms.is_empty(), "{spun} {sample:?}");
        assert!(sample.resident_bytes > 100_000 && sample.peak_resident_bytes >= sample.resident_bytes);
        assert!(machine().unwrap().busy_ms >= sample.cpu_ms);
        assert!(process("no-such-process").is_err());
    }

    #[test]
    fn lines_of_proc_and_metrics_are_read() {
        let machine = machine_of("cpu  1 2 3 400 50 6 7 8 0 0\ncpu0 9 9 9 9 9 9 9 9\n").unwrap();
        assert_eq!((machine.busy_ms, machine.idle_ms, machine.stolen_ms), (190, 4_500, 80));
        assert_eq!(value_of("VmHWM:\t  12 kB\nVmRSS:\t 7 kB\n", "VmRSS"), Some(7));
        assert_eq!((group_of("verify-12\n"), group_of("ledger")), ("verify".into(), "ledger".into()));
        let disks = "   8       0 sda 1 2 3 4 5 6 7 8\n 254       3 vda3 11 0 90 4 12 13 1000 5 0 9 9\n";
        assert_eq!(written_of(disks, (254 << 8) | 3), Some(512_000));
        assert_eq!(written_of(disks, 1), None);
        let text = "# HELP time_commits Durable commits.\n# TYPE time_commits counter\ntime_commits_total 12\ntime_ready 1\n# EOF\n";
        assert_eq!(metrics_of(text), BTreeMap::from([("commits".into(), 12), ("ready".into(), 1)]));
    }

    #[test]
    fn a_directory_is_as_large_as_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let before = disk_bytes(dir.path()).unwrap();
        fs::create_dir(dir.path().join("deeper")).unwrap();
        let path = dir.path().join("deeper").join("file");
        fs::write(&path, vec![1; 100_000]).unwrap();
        // Some file systems find a place for the bytes only then.
        fs::File::open(path).unwrap().sync_all().unwrap();
        assert!(disk_bytes(dir.path()).unwrap() >= before + 100_000);
        assert!(disk_bytes(&dir.path().join("missing")).is_err());
    }
}
