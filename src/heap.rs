//! The heap of this process.

/// Has the kernel back the heap with huge pages, where the system leaves that to each process. Commands that handle
/// 10,000 rules spend a sixth of their time on faults of small pages otherwise.
pub fn use_huge_pages() {
    #[cfg(target_env = "gnu")]
    glibc::use_huge_pages();
}

/// Returns free memory to the system, which glibc otherwise keeps between parts that are in use.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    glibc::trim();
}

#[cfg(target_env = "gnu")]
mod glibc {
    use rustix::mm::{self, Advice};

    /// Size of the heap that is advised, in bytes; beyond it pages are small again.
    const ROOM: usize = 64 << 20;
    /// Size of a block that lies in a mapping of its own; the highest that glibc takes.
    const MAPPED: usize = 32 << 20;
    const HUGE_PAGE: usize = 2 << 20;

    pub fn use_huge_pages() {
        // SAFETY: plain numbers; other threads are not started yet.
        unsafe {
            libc::mallopt(libc::M_TOP_PAD, ROOM as i32);
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED as i32);
            libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        }
        // larger than what is left: the heap grows by it and by ROOM
        let block: Vec<u8> = Vec::with_capacity(1 << 20);
        let first = block.as_ptr().map_addr(|address| address.next_multiple_of(HUGE_PAGE));
        // SAFETY: with 0 it only returns the end of the heap.
        let end = unsafe { libc::sbrk(0) }.addr();
        // a heap that could not grow lies elsewhere
        if let Some(length) = end.checked_sub(first.addr()).filter(|length| *length <= 2 * ROOM) {
            // SAFETY: the advice changes no contents, and the range belongs to the heap.
            let _ = unsafe { mm::madvise(first.cast_mut().cast(), length, Advice::LinuxHugepage) };
        }
    }

    pub fn trim() {
        // SAFETY: it takes a plain number and changes no block that is in use.
        unsafe { libc::malloc_trim(0) };
    }
}
