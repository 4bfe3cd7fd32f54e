//! What a loaded program may return, read off its instructions.

use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a register may hold; `None`: anything.
type Values = Option<BTreeSet<i32>>;
/// More constants than this are anything.
const MOST: usize = 16;

/// The helper that goes on in another program.
const TAIL_CALL: i32 = 12;
const RESULT: usize = 0;
const REGISTERS: usize = 11;

/// An instruction, as linux/bpf.h has it.
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    to: usize,
    from: usize,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    fn new(bytes: [u8; 8]) -> Instruction {
        Instruction {
            code: bytes[0],
            to: usize::from(bytes[1] & 0xf).min(REGISTERS - 1),
            from: usize::from(bytes[1] >> 4).min(REGISTERS - 1),
            offset: i16::from_le_bytes([bytes[2], bytes[3]]),
            immediate: i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        }
    }
}

/// The constants that the main program may return; `None`: it cannot be told.
pub fn constants(program: &[[u8; 8]]) -> Values {
    let mut reached: Vec<Option<[Values; REGISTERS]>> = vec![None; program.len()];
    let unknown: [Values; REGISTERS] = std::array::from_fn(|_| None);
    let mut work = vec![(0_usize, unknown)];
    let mut returned = BTreeSet::new();
    while let Some((place, values)) = work.pop() {
        let known = reached.get_mut(place)?;
        let values = match known {
            None => values,
            Some(before) => {
                let both = merge(before, &values);
                if both == *before {
                    continue;
                }
                both
            }
        };
        *known = Some(values.clone());
        let instruction = Instruction::new(program[place]);
        let Instruction { code, offset, immediate, .. } = instruction;
        let jump = |distance: i32| place.wrapping_add_signed(distance as isize + 1);
        let after = step(instruction, values);
        match (code & 0x07, code & 0xf0) {
            // exit
            (0x05, 0x90) => returned.extend(after[RESULT].clone()?),
            // goto, of which the second kind has a longer distance
            (0x05, 0x00) => work.push((jump(offset.into()), after)),
            (0x06, 0x00) => work.push((jump(immediate), after)),
            // another program's verdict
            (0x05, 0x80) if (instruction.from, immediate) == (0, TAIL_CALL) => return None,
            // a call goes on behind it
            (0x05, 0x80) => work.push((place + 1, after)),
            (0x05 | 0x06, _) => {
                work.push((jump(offset.into()), after.clone()));
                work.push((place + 1, after));
            }
            // a constant of 64 bits takes two places
            (0x00, _) if code == 0x18 => work.push((place + 2, after)),
            _ => work.push((place + 1, after)),
        }
    }
    Some(returned).filter(|returned| !returned.is_empty())
}

/// The registers after an instruction.
fn step(instruction: Instruction, mut values: [Values; REGISTERS]) -> [Values; REGISTERS] {
    const MOVE: u8 = 0xb0;
    let Instruction { code, to, from, offset, immediate } = instruction;
    match (code & 0x07, code & 0xf0, code & 0x08) {
        (0x04 | 0x07, MOVE, 0) => values[to] = Some(BTreeSet::from([immediate])),
        // an offset tells of sign extension
        (0x04 | 0x07, MOVE, _) if offset == 0 => values[to] = values[from].clone(),
        // arithmetic, and what is loaded
        (0x04 | 0x07 | 0x00 | 0x01, ..) => values[to] = None,
        // of what is exchanged with memory
        (0x03, ..) if code & 0xe0 == 0xc0 => {
            (values[RESULT], values[from]) = (None, None);
        }
        (0x05, 0x80, _) => values[..6].fill(None),
        _ => {}
    }
    values
}

fn merge(one: &[Values; REGISTERS], other: &[Values; REGISTERS]) -> [Values; REGISTERS] {
    std::array::from_fn(|register| {
        let both = one[register].as_ref()?.union(other[register].as_ref()?);
        Some(both.copied().collect::<BTreeSet<i32>>()).filter(|values| values.len() <= MOST)
    })
}

/// The instructions of a loaded program, where the kernel shows them.
pub fn instructions(program: BorrowedFd<'_>) -> Option<Vec<[u8; 8]>> {
    let mut code: Vec<[u8; 8]> = Vec::new();
    // how many there are, then they themselves
    for _ in 0..2 {
        let mut info = MaybeUninit::<libbpf_sys::bpf_prog_info>::zeroed();
        let mut length = size_of::<libbpf_sys::bpf_prog_info>() as u32;
        // SAFETY: all zeroes are a bpf_prog_info; the kernel writes `length` bytes of it and at most
        // `xlated_prog_len` bytes of code, both of which outlive the call.
        let info = unsafe {
            let asked = info.assume_init_mut();
            asked.xlated_prog_len = size_of_val(code.as_slice()) as u32;
            asked.xlated_prog_insns = code.as_mut_ptr() as u64;
            let result = libbpf_sys::bpf_obj_get_info_by_fd(
                program.as_raw_fd(),
                info.as_mut_ptr().cast(),
                &mut length,
            );
            if result < 0 {
                return None;
            }
            info.assume_init()
        };
        code.resize(info.xlated_prog_len as usize / 8, [0; 8]);
    }
    Some(code).filter(|code| !code.is_empty())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::constants;

    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];

    fn set(register: u8, value: i32) -> [u8; 8] {
        let [a, b, c, d] = value.to_le_bytes();
        [0xb4, register, 0, 0, a, b, c, d]
    }

    fn copy(to: u8, from: u8) -> [u8; 8] {
        [0xbf, from << 4 | to, 0, 0, 0, 0, 0, 0]
    }

    /// If r1 is 0.
    fn skip(distance: u8) -> [u8; 8] {
        [0x15, 1, distance, 0, 0, 0, 0, 0]
    }

    fn some(values: &[i32]) -> Option<BTreeSet<i32>> {
        Some(values.iter().copied().collect())
    }

    #[test]
    fn what_programs_return() {
        assert_eq!(constants(&[set(0, 0), EXIT]), some(&[0]));
        assert_eq!(constants(&[set(0, -1), skip(1), set(0, 2), EXIT]), some(&[-1, 2]));
        // by way of another register
        assert_eq!(constants(&[set(6, 7), skip(1), set(6, 0), copy(0, 6), EXIT]), some(&[0, 7]));
        // what is overwritten does not count
        assert_eq!(constants(&[set(0, 5), set(0, -1), EXIT]), some(&[-1]));
        // and what nobody reaches
        let forward = [0x05, 0, 1, 0, 0, 0, 0, 0];
        assert_eq!(constants(&[set(0, 1), forward, set(0, 0), EXIT]), some(&[1]));
        // a loop ends
        let back = [0x15, 1, 0xfe, 0xff, 0, 0, 0, 0];
        assert_eq!(constants(&[set(0, 3), back, EXIT]), some(&[3]));
    }

    #[test]
    fn what_cannot_be_told() {
        let call = [0x85, 0, 0, 0, 44, 0, 0, 0];
        assert_eq!(constants(&[call, EXIT]), None);
        let load = [0x61, 0x10, 0, 0, 0, 0, 0, 0];
        assert_eq!(constants(&[set(0, 0), load, EXIT]), None);
        let add = [0x07, 0, 0, 0, 1, 0, 0, 0];
        assert_eq!(constants(&[set(0, 0), add, EXIT]), None);
        assert_eq!(constants(&[]), None);
        assert_eq!(constants(&[[0x05, 0, 99, 0, 0, 0, 0, 0]]), None);
        let mut many: Vec<[u8; 8]> = Vec::new();
        for value in 0..20 {
            many.extend([set(0, value), skip(1), EXIT]);
        }
        assert_eq!(constants(&[many, vec![EXIT]].concat()).map(|values| values.len()), Some(20));
    }
}
