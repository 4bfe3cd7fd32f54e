//! Tables in `state/` that grow while programs of two generations use them: a fixed outer array of inner
//! arrays (chunks) that are created on demand.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle, OpenMap};

use crate::bpf::{self, map_id};

/// A table by id.
pub struct Chunks {
    outer: MapHandle,
    chunks: Vec<MapHandle>,
    state: PathBuf,
    name: &'static str,
}

impl Chunks {
    /// `state` is the directory where the chunks are pinned, as `name-0` and so on: reading
    /// them out of `outer` would take CAP_SYS_ADMIN.
    pub fn open(outer: MapHandle, state: &Path, name: &'static str) -> anyhow::Result<Chunks> {
        let mut chunks = Chunks { outer, chunks: Vec::new(), state: state.into(), name };
        while chunks.pin(chunks.chunks.len()).try_exists()? {
            let path = chunks.pin(chunks.chunks.len());
            let chunk = MapHandle::from_pinned_path(&path);
            chunks.chunks.push(chunk.with_context(|| path.display().to_string())?);
        }
        Ok(chunks)
    }

    fn pin(&self, chunk: usize) -> PathBuf {
        self.state.join(format!("{}-{chunk}", self.name))
    }

    /// Returns true if every chunk that the program uses is pinned; otherwise the table can neither be read
    /// nor grow. A chunk that is pinned but not used stems from an interrupted apply.
    pub fn is_whole(&self) -> anyhow::Result<bool> {
        for index in 0..=self.chunks.len() {
            let key = u32::try_from(index)?.to_ne_bytes();
            let Some(used) = self.outer.lookup(&key, MapFlags::ANY)? else { continue };
            match self.chunks.get(index) {
                Some(chunk) if used == map_id(chunk)?.to_ne_bytes() => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Returns the outer map, which the program looks up.
    pub fn outer(&self) -> &MapHandle {
        &self.outer
    }

    /// Returns the number of ids that have an entry.
    pub fn room(&self) -> u32 {
        self.chunks.iter().map(MapCore::max_entries).sum()
    }

    /// Grows the table to hold ids up to `most`.
    pub fn grow(&mut self, definition: &OpenMap<'_>, most: u32) -> anyhow::Result<()> {
        while self.room() <= most {
            let mut chunk = bpf::create(definition, None)?;
            let path = self.pin(self.chunks.len());
            chunk.pin(&path).with_context(|| path.display().to_string())?;
            self.chunks.push(chunk);
        }
        let mut missing = Vec::new();
        for (index, chunk) in (0_u32..).zip(&self.chunks) {
            let id = map_id(chunk)?;
            let linked = self.outer.lookup(&index.to_ne_bytes(), MapFlags::ANY)?;
            if linked != Some(id.to_ne_bytes().to_vec()) {
                missing.push((index, chunk.as_fd().as_raw_fd()));
            }
        }
        self.link(&missing).with_context(|| self.name)
    }

    /// Inserts chunks in one batch where the kernel can: each write to a map of maps waits for an RCU grace
    /// period.
    fn link(&self, chunks: &[(u32, RawFd)]) -> anyhow::Result<()> {
        if chunks.is_empty() {
            return Ok(());
        }
        let keys: Vec<u8> = chunks.iter().flat_map(|(index, _)| index.to_ne_bytes()).collect();
        let values: Vec<u8> = chunks.iter().flat_map(|(_, fd)| fd.to_ne_bytes()).collect();
        let (any, count) = (MapFlags::ANY, chunks.len() as u32);
        if self.outer.update_batch(&keys, &values, count, any, any).is_ok() {
            return Ok(());
        }
        for (index, fd) in chunks {
            self.outer.update(&index.to_ne_bytes(), &fd.to_ne_bytes(), any)?;
        }
        Ok(())
    }

    /// Waits until every run of a program that has begun is over: the kernel waits for an RCU grace period after
    /// each write to a map of maps, here of the chunk that is there already.
    pub fn settle(&self) -> anyhow::Result<()> {
        let Some(first) = self.chunks.first() else { return Ok(()) };
        let chunk = first.as_fd().as_raw_fd().to_ne_bytes();
        self.outer.update(&0_u32.to_ne_bytes(), &chunk, MapFlags::ANY).context(self.name)
    }

    /// Returns the chunks, each with its first id.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &MapHandle)> {
        let starts = self.chunks.iter().scan(0, |next, chunk| {
            let first = *next;
            *next += chunk.max_entries();
            Some(first)
        });
        starts.zip(&self.chunks)
    }

    /// Returns the chunk of an id and the place in it.
    pub fn place(&self, id: u32) -> Option<(&MapHandle, u32)> {
        let width = self.chunks.first()?.max_entries();
        Some((self.chunks.get((id / width) as usize)?, id % width))
    }
}
