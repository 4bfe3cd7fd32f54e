//! The compiled program and its types, as libbpf-cargo generates them from bpf/, and the few
//! system calls about programs and maps that libbpf-rs 0.27 lacks: information about and runs of a
//! program that is known by its descriptor alone, run time statistics, tcx, XDP.

pub mod tcx;
pub mod xdp;

use std::ffi::{CStr, c_void};
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io};

use anyhow::{Context, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapInfo, MapType, OpenMap, OpenMapMut};
use rustix::mm::{self, MapFlags as MmapFlags, ProtFlags};

#[allow(clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks, dead_code)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/udplb.skel.rs"));
}

pub use skeleton::{OpenUdplbSkel, UdplbSkel, UdplbSkelBuilder, types};

use types::verdict as Verdict;

/// SHA-256 of the full and the small object, one after the other, in hexadecimal.
pub const OBJECT_SHA256: &str = env!("UDPLB_OBJECT_SHA256");

/// The object without the code of extras, for kernels from 6.2 on.
pub static SMALL_OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/small.bpf.o"));

/// One more than the highest id of a rule or upstream: entries of `counters` in udplb.h.
pub const ID_LIMIT: u32 = 2048 * 1024;

/// The verdicts and their names in output, in the order in which they are shown.
pub const VERDICTS: [(Verdict, &str); Verdict::VERDICTS.0 as usize] = [
    (Verdict::VERDICT_FORWARDED, "forwarded"),
    (Verdict::VERDICT_STALE_NEIGHBOUR, "stale-neighbour"),
    (Verdict::VERDICT_NO_ROUTE, "no-route"),
    (Verdict::VERDICT_NO_NEIGHBOUR, "no-neighbour"),
    (Verdict::VERDICT_MTU, "mtu"),
    (Verdict::VERDICT_TTL, "ttl"),
    (Verdict::VERDICT_FRAGMENT, "fragment"),
    (Verdict::VERDICT_NO_UPSTREAM, "no-upstream"),
    (Verdict::VERDICT_CLONE_FAILED, "clone-failed"),
    (Verdict::VERDICT_MALFORMED, "malformed"),
    (Verdict::VERDICT_NOT_FOR_US, "not-for-us"),
    (Verdict::VERDICT_FRAGMENT_EARLY, "fragment-early"),
    (Verdict::VERDICT_FRAGMENT_FULL, "fragment-full"),
    (Verdict::VERDICT_UNRESOLVED, "unresolved"),
    (Verdict::VERDICT_LOOP, "loop"),
    (Verdict::VERDICT_MARTIAN, "martian"),
    (Verdict::VERDICT_NO_CHECKSUM, "no-checksum"),
    (Verdict::VERDICT_LOCAL_SOCKET, "local-socket"),
    (Verdict::VERDICT_NO_FLOW, "no-flow"),
];

/// Note of packets of no rule whose outer headers were taken off.
pub const DECAPSULATED: &str = "decapsulated";

/// Counters besides verdicts, and their names in output.
pub const NOTES: [(Verdict, &str); 4] = [
    (Verdict::NOTE_DECAPSULATED, DECAPSULATED),
    (Verdict::NOTE_SHORT_PAYLOAD, "short-payload"),
    (Verdict::NOTE_SEVERAL_METRICS, "several-metrics"),
    (Verdict::NOTE_TEMPLATES, "templates"),
];

/// Returns true if packets with this verdict went to the upstream.
pub fn is_forwarded(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::VERDICT_FORWARDED | Verdict::VERDICT_STALE_NEIGHBOUR)
}

/// A C struct of the contract that is written to a map or read from one.
///
/// # Safety
/// Every bit pattern is a value and there is no padding.
pub unsafe trait Pod: Copy + Default {}

macro_rules! pod {
    ($($name:ident),+ $(,)?) => {
        // SAFETY: integers, transparent enums and arrays of them; udplb.h asserts each size, so that there
        // is no implicit padding.
        $(unsafe impl Pod for types::$name {})+
    };
}

pod!(
    extras,
    rule,
    table_place,
    table_place6,
    sender_key,
    key_address,
    sender,
    sender_bucket,
    sequences,
    destination_key,
    destination,
    slot_line,
    upstream,
    spare,
    answer_key,
    server_key,
    device,
    flow_bucket,
    flow_bucket6,
    flow4,
    flow6,
    port_line,
    vlan_key,
    vlan,
    counters,
    line,
    retired,
    nexthop,
    nexthop_slot,
    heartbeat,
    gate,
    held,
    origin,
    pending,
    mark,
    announcement_key,
    probe,
    trace,
    event,
);

// SAFETY: a number.
unsafe impl Pod for u32 {}

/// Returns the bytes of a value, in the kernel's layout.
pub fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: a Pod has no padding, so every byte is initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Returns the bytes of values, one after the other.
pub fn bytes_of_all<T: Pod>(values: &[T]) -> &[u8] {
    // SAFETY: a Pod has no padding, so every byte is initialised.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Returns the value in bytes of a map; `None` if their number is not its size.
pub fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    // SAFETY: the length is right, any bytes are a value, and the read may be unaligned.
    (bytes.len() == size_of::<T>())
        .then(|| unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

impl types::extras {
    /// Returns true if a feature is in use that the small object lacks.
    pub fn any(&self) -> bool {
        bytes_of(self).iter().any(|extra| *extra != 0)
    }
}

/// Keeps a map for as long as a program, also if the program does not use it.
pub fn bind_map(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes descriptors, and no options.
    let result =
        unsafe { libbpf_sys::bpf_prog_bind_map(program.as_raw_fd(), map.as_raw_fd(), ptr::null()) };
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}

/// Restricts the programs that are loaded to these.
pub fn load_only(skeleton: &mut OpenUdplbSkel<'_>, wanted: &[&str]) {
    use libbpf_rs::skel::OpenSkel;
    for mut program in skeleton.open_object_mut().progs_mut() {
        let is_wanted = wanted.iter().any(|wanted| program.name() == *wanted);
        program.set_autoload(is_wanted);
    }
}

/// Restricts the maps that loading creates to these and the constants.
pub fn create_only(skeleton: &mut OpenUdplbSkel<'_>, wanted: &[&str]) -> libbpf_rs::Result<()> {
    use libbpf_rs::skel::OpenSkel;
    let constants = skeleton.maps.rodata.name().to_owned();
    let mut maps = skeleton.open_object_mut().maps_mut();
    maps.try_for_each(|mut map| {
        let name = map.name();
        map.set_autocreate(name == constants || wanted.iter().any(|wanted| name == *wanted))
    })
}

/// Opens a pinned map that has type, sizes and entries of a definition; `None` if there is none.
pub fn pinned_alike(path: &Path, definition: &OpenMapMut<'_>) -> Option<MapHandle> {
    let pinned = MapHandle::from_pinned_path(path).ok()?;
    let alike = pinned.max_entries() == definition.max_entries()
        && pinned.value_size() == definition.value_size()
        && pinned.map_type() == definition.map_type();
    alike.then_some(pinned)
}

/// Returns the number of CPUs that the kernel may ever use: one more than the highest number of one.
///
/// # Errors
/// The kernel's list cannot be read.
pub fn possible_cpus() -> anyhow::Result<u32> {
    const LIST: &str = "/sys/devices/system/cpu/possible";
    let list = fs::read_to_string(LIST).context(LIST)?;
    cpus_of(&list).with_context(|| format!("{LIST}: {list:?} is no list of CPUs"))
}

/// Returns one more than the highest number of a list such as `0-3,8-11`.
fn cpus_of(list: &str) -> Option<u32> {
    let last = list.trim_end().rsplit([',', '-']).next()?;
    last.parse::<u32>().ok()?.checked_add(1)
}

/// Bytes that one system call reads at most.
const BATCH: usize = 1 << 20;

/// Passes the first entries of an array to `each`, in order; in a per-CPU array an entry is the values of all
/// possible CPUs. Reads many with one system call where the kernel can (per-CPU arrays: 5.13).
pub fn read_array(map: &MapHandle, entries: u32, each: impl FnMut(&[u8])) -> libbpf_rs::Result<()> {
    read_values(map, entries, MapFlags::ANY, each)
}

/// Passes all entries of an array to `each`, in order, each copied under its spin lock.
pub fn read_locked(map: &MapHandle, each: impl FnMut(&[u8])) -> libbpf_rs::Result<()> {
    read_values(map, map.max_entries(), MapFlags::LOCK, each)
}

fn read_values(
    map: &MapHandle,
    entries: u32,
    flags: MapFlags,
    mut each: impl FnMut(&[u8]),
) -> libbpf_rs::Result<()> {
    let options = libbpf_sys::bpf_map_batch_opts {
        sz: size_of::<libbpf_sys::bpf_map_batch_opts>() as libbpf_sys::size_t,
        elem_flags: flags.bits(),
        ..Default::default()
    };
    let cpus = match map.map_type() {
        MapType::PercpuArray => libbpf_rs::num_possible_cpus()?,
        _ => 1,
    };
    let width = map.value_size().next_multiple_of(8) as usize * cpus;
    let most = (BATCH / width).clamp(1, entries.max(1) as usize) as u32;
    let mut values = vec![0; most as usize * width];
    let mut keys = vec![0_u32; most as usize];
    let (mut place, mut last) = (0, None::<u32>);
    while place < entries {
        let wanted = most.min(entries - place);
        let (mut read, mut next) = (wanted, 0_u32);
        // SAFETY: keys and values have room for `read` entries, the other pointers are to one key
        // each, and all of them outlive the call.
        let result = unsafe {
            libbpf_sys::bpf_map_lookup_batch(
                map.as_fd().as_raw_fd(),
                last.as_mut().map_or(ptr::null_mut(), |key| ptr::from_mut(key).cast()),
                ptr::from_mut(&mut next).cast(),
                keys.as_mut_ptr().cast(),
                values.as_mut_ptr().cast(),
                &mut read,
                &options,
            )
        };
        if result == 0 && read == wanted {
            values.chunks_exact(width).take(read as usize).for_each(&mut each);
            (place, last) = (place + read, Some(next));
        } else {
            each(&read_entry(map, place, flags)?);
            (place, last) = (place + 1, Some(place));
        }
    }
    Ok(())
}

/// Writes values to an array, from its first entry on, many with one system call. Leaves out spin locks.
pub fn write_array(
    map: &MapHandle,
    mut values: impl Iterator<Item = Vec<u8>>,
) -> libbpf_rs::Result<()> {
    let width = map.value_size() as usize;
    let mut first = 0_u32;
    loop {
        let bytes: Vec<u8> = values.by_ref().take((BATCH / width).max(1)).flatten().collect();
        let next = first + (bytes.len() / width) as u32;
        if next == first {
            return Ok(());
        }
        let keys: Vec<u8> = (first..next).flat_map(u32::to_ne_bytes).collect();
        map.update_batch(&keys, &bytes, next - first, MapFlags::ANY, MapFlags::ANY)?;
        first = next;
    }
}

/// Returns an entry of an array, of a per-CPU array the values of all CPUs; empty if there is none.
pub fn read_entry(map: &MapHandle, index: u32, flags: MapFlags) -> libbpf_rs::Result<Vec<u8>> {
    let key = index.to_ne_bytes();
    Ok(match map.map_type() {
        MapType::PercpuArray => map.lookup_percpu(&key, flags)?.unwrap_or_default().concat(),
        _ => map.lookup(&key, flags)?.unwrap_or_default(),
    })
}

/// Returns the kernel's number of a map.
pub fn map_id(map: &MapHandle) -> libbpf_rs::Result<u32> {
    Ok(MapInfo::new(map.as_fd())?.info.id)
}

/// The kernel's information about a loaded program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    pub id: u32,
    /// Cut to the kernel's 15 bytes.
    pub name: String,
    pub tag: [u8; 8],
    pub map_ids: Vec<u32>,
    pub runs: Runs,
}

/// Number and duration of a program's runs while the kernel measured them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    pub count: u64,
    pub nanoseconds: u64,
}

/// Returns id, name, tag, maps and runs of a program.
pub fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    const MAX_MAPS: usize = 64;
    let mut map_ids = [0_u32; MAX_MAPS];
    let mut info = libbpf_sys::bpf_prog_info {
        nr_map_ids: MAX_MAPS as u32,
        map_ids: map_ids.as_mut_ptr() as u64,
        ..Default::default()
    };
    let mut length = size_of::<libbpf_sys::bpf_prog_info>() as u32;
    let pointer = std::ptr::from_mut(&mut info).cast();
    // SAFETY: the kernel writes `length` bytes of `info` and at most `nr_map_ids` numbers to `map_ids`,
    // both of which outlive the call.
    let result =
        unsafe { libbpf_sys::bpf_obj_get_info_by_fd(program.as_raw_fd(), pointer, &mut length) };
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    let maps = (info.nr_map_ids as usize).min(MAX_MAPS);
    let name = info.name.map(|byte| byte as u8);
    let name = CStr::from_bytes_until_nul(&name).map_or_else(|_| "".into(), CStr::to_string_lossy);
    Ok(ProgramInfo {
        id: info.id,
        name: name.into_owned(),
        tag: info.tag,
        map_ids: map_ids[..maps].to_vec(),
        runs: Runs { count: info.run_cnt, nanoseconds: info.run_time_ns },
    })
}

/// Measures the runs of all programs until the descriptor is closed, at some nanoseconds a run. Needs
/// CAP_SYS_ADMIN.
pub fn measure_runs() -> io::Result<OwnedFd> {
    // SAFETY: takes a plain number and returns a new descriptor, or a negative error.
    unsafe {
        match libbpf_sys::bpf_enable_stats(libbpf_sys::BPF_STATS_RUN_TIME) {
            fd if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    }
}

/// Returns the program's clock: jiffies, shifted to the right. User space cannot read it.
pub fn shifted_jiffies(shift: u32) -> io::Result<u32> {
    const BPF_FUNC_JIFFIES64: i32 = 118;
    let instruction = |code, imm| libbpf_sys::bpf_insn { code, imm, ..Default::default() };
    // r0 = bpf_jiffies64(); r0 >>= shift; return r0
    let program = [
        instruction(0x85, BPF_FUNC_JIFFIES64),
        instruction(0x77, shift as i32),
        instruction(0x95, 0),
    ];
    // SAFETY: the kernel reads the strings and so many instructions, which outlive the call, and returns a
    // new descriptor or a negative error.
    let program = unsafe {
        match libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_SOCKET_FILTER,
            c"udplb_clock".as_ptr(),
            c"GPL".as_ptr(),
            program.as_ptr(),
            program.len() as libbpf_sys::size_t,
            ptr::null_mut(),
        ) {
            fd if fd >= 0 => OwnedFd::from_raw_fd(fd),
            error => return Err(io::Error::from_raw_os_error(-error)),
        }
    };
    run_program(program.as_fd(), [0; 5])
}

/// Runs a tc program on 64 zero bytes with this `skb->cb`; returns its result.
pub fn run_program(program: BorrowedFd<'_>, cb: [u32; 5]) -> io::Result<u32> {
    run(program, &[0; 64], |context| context.cb = cb)
}

/// Runs a tc program on a frame as if it came in on an interface; returns its result. Changes of the
/// frame are lost.
pub fn run_on_frame(program: BorrowedFd<'_>, ifindex: u32, frame: &[u8]) -> io::Result<i32> {
    run(program, frame, |context| context.ifindex = ifindex).map(|result| result as i32)
}

fn run(
    program: BorrowedFd<'_>,
    packet: &[u8],
    set: impl FnOnce(&mut types::__sk_buff),
) -> io::Result<u32> {
    // not `Default`: the kernel refuses a context whose padding is not zero
    let mut context = MaybeUninit::<types::__sk_buff>::zeroed();
    // SAFETY: all zeroes are a __sk_buff.
    set(unsafe { context.assume_init_mut() });
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: packet.as_ptr().cast(),
        data_size_in: packet.len() as u32,
        ctx_in: context.as_ptr().cast(),
        ctx_size_in: size_of::<types::__sk_buff>() as u32,
        ..Default::default()
    };
    // SAFETY: the kernel reads packet and context, as much of them as their sizes say, and both
    // outlive the call.
    match unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &mut options) } {
        0 => Ok(options.retval),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Returns the address in words of [`wire`].
pub fn unwire(words: [u32; 4], ipv6: bool) -> IpAddr {
    let mut octets = [0; 16];
    for (octets, word) in octets.chunks_mut(4).zip(words) {
        octets.copy_from_slice(&word.to_ne_bytes());
    }
    match ipv6 {
        true => Ipv6Addr::from(octets).into(),
        false => Ipv4Addr::from(words[0].to_ne_bytes()).into(),
    }
}

/// Returns an address as `__be32 [4]`: an IPv4 address is the first word, and the rest is 0.
pub fn wire(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(address) => [u32::from_ne_bytes(address.octets()), 0, 0, 0],
        IpAddr::V6(address) => {
            let octets = address.octets();
            [0, 4, 8, 12].map(|at| {
                u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]])
            })
        }
    }
}

/// The first bytes of an array that is made to be mapped (`BPF_F_MMAPABLE`), in this process' memory. Programs and
/// other processes may read and write it at the same time.
pub struct Mapped {
    memory: NonNull<c_void>,
    length: usize,
}

// SAFETY: the memory belongs to no thread, and is only accessed atomically or before anybody else has the map.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps whole pages that hold `bytes` bytes, at least one.
    pub fn new(map: BorrowedFd<'_>, bytes: usize, access: ProtFlags) -> io::Result<Mapped> {
        let length = bytes.max(1).next_multiple_of(rustix::param::page_size());
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let memory =
            unsafe { mm::mmap(ptr::null_mut(), length, access, MmapFlags::SHARED, map, 0)? };
        let memory = NonNull::new(memory).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Mapped { memory, length })
    }

    /// Returns the address, which is that of a page.
    pub fn memory(&self) -> NonNull<c_void> {
        self.memory
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nobody else has the address any more.
        let _ = unsafe { mm::munmap(self.memory.as_ptr(), self.length) };
    }
}

/// Copies values to the beginning of a mapped array that no program reads yet: one copy instead of a system
/// call's two. The size of a value must be a multiple of 8.
pub fn fill_mapped(map: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    let mapped = Mapped::new(map, bytes.len(), ProtFlags::READ | ProtFlags::WRITE)?;
    // SAFETY: the mapping holds `bytes`, and nobody else accesses it.
    unsafe {
        ptr::copy_nonoverlapping(bytes.as_ptr(), mapped.memory().as_ptr().cast(), bytes.len());
    }
    Ok(())
}

/// Sets values of a mapped array of `values` values to zero; nobody else writes them. `T` as for [`read_mapped`].
///
/// # Errors
/// The array cannot be mapped, or a place is beyond its end.
pub fn zero_mapped<T: Pod>(map: BorrowedFd<'_>, values: usize, places: &[usize]) -> io::Result<()> {
    if places.iter().any(|place| *place >= values) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mapped = Mapped::new(map, values * size_of::<T>(), ProtFlags::READ | ProtFlags::WRITE)?;
    let first: *mut T = mapped.memory().as_ptr().cast();
    for place in places {
        // SAFETY: the mapping holds `values` values, all zeroes are one, and nobody else accesses this one.
        unsafe { first.add(*place).write_unaligned(T::default()) };
    }
    Ok(())
}

/// Passes the first values of a mapped array to `each`, in order, while programs may write them: each word of
/// eight bytes is whole. The size of `T` is that of a value, a multiple of 8.
pub fn read_mapped<T: Pod>(
    map: BorrowedFd<'_>,
    values: usize,
    mut each: impl FnMut(&T),
) -> io::Result<()> {
    if values == 0 {
        return Ok(());
    }
    let width = size_of::<T>() / size_of::<u64>();
    let mapped = Mapped::new(map, values * size_of::<T>(), ProtFlags::READ)?;
    // SAFETY: the mapping holds the values, aligned to a page, and is read as atomic words only.
    let words: &[AtomicU64] =
        unsafe { std::slice::from_raw_parts(mapped.memory().as_ptr().cast(), values * width) };
    for words in words.chunks_exact(width) {
        let mut value = T::default();
        let target: *mut u64 = ptr::from_mut(&mut value).cast();
        for (index, word) in words.iter().enumerate() {
            // SAFETY: the value has `width` words, and any bytes are a value.
            unsafe { target.add(index).write_unaligned(word.load(Ordering::Relaxed)) };
        }
        each(&value);
    }
    Ok(())
}

/// Creates a map outside an object, as the object defines it.
pub fn create(
    definition: &OpenMap<'_>,
    inner: Option<BorrowedFd<'_>>,
) -> anyhow::Result<MapHandle> {
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        map_flags: definition.map_flags(),
        inner_map_fd: inner.map_or(0, |fd| fd.as_raw_fd() as u32),
        ..Default::default()
    };
    let context = || format!("map {}", definition.name().display());
    let map = MapHandle::create(
        definition.map_type(),
        Some(definition.name()),
        definition.key_size(),
        definition.value_size(),
        definition.max_entries(),
        &options,
    )
    .with_context(context)?;
    // libbpf probes whether the kernel supports names. The probe also fails for lack of memory; the map
    // then has no name, and no later program could use it.
    if MapInfo::new(map.as_fd()).with_context(context)?.info.name[0] == 0 {
        bail!("{}: the kernel kept no name for it; try again", context());
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::cpus_of;

    #[test]
    fn possible_cpus_end_at_the_highest() {
        assert_eq!(cpus_of("0\n"), Some(1));
        assert_eq!(cpus_of("0-127\n"), Some(128));
        assert_eq!(cpus_of("0-3,8-11\n"), Some(12));
        assert_eq!(cpus_of("0,2\n"), Some(3));
        for bad in ["", "\n", "0-", "x", "4294967295"] {
            assert_eq!(cpus_of(bad), None, "{bad:?}");
        }
    }
}
