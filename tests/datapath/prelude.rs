//! Packet changes that BPF_PROG_TEST_RUN does not support, made by a program that tail-calls the one
//! under test: a VLAN tag in the metadata, and frames shorter than the kernel accepts.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};
use libbpf_sys::*;

use crate::common::wire::Tag;

/// Changes of one prelude: a length to truncate the frame to, and a tag.
pub type Change = (Option<usize>, Option<Tag>);

/// Return value of a prelude that failed itself.
pub const FAILED: i32 = 99;

/// Offset in `__sk_buff.cb` of the tag after the run: its presence, control information and protocol.
pub const TAG_PRESENT: usize = 0;
pub const TAG_CONTROL: usize = 1;
pub const TAG_PROTOCOL: usize = 2;

const CONTEXT: u8 = 6;
const RESULT: u8 = 7;

/// Offsets in `__sk_buff`.
const VLAN_PRESENT: i16 = 20;
const VLAN_TCI: i16 = 24;
const VLAN_PROTO: i16 = 28;
const CB: i16 = 48;

pub struct Prelude {
    programs: MapHandle,
    functions: Functions,
}

impl Prelude {
    /// Creates a prelude for the program under test.
    pub fn new(program: BorrowedFd<'_>) -> Prelude {
        let options = bpf_map_create_opts {
            sz: size_of::<bpf_map_create_opts>() as size_t,
            ..Default::default()
        };
        let programs = MapHandle::create(MapType::ProgArray, Some("programs"), 4, 4, 1, &options)
            .expect("a map");
        let program = program.as_raw_fd().to_ne_bytes();
        programs.update(&[0; 4], &program, MapFlags::ANY).expect("the program in the map");
        Prelude { programs, functions: Functions::new() }
    }

    /// Loads a prelude with these changes.
    pub fn load(&self, (length, tag): Change) -> OwnedFd {
        let mut code = vec![mov(CONTEXT, 1)];
        if let Some(length) = length {
            let arguments = [set(2, length as i32), set(3, 0)];
            code.extend(call_or_fail(BPF_FUNC_skb_change_tail, arguments));
        }
        if let Some(tag) = tag {
            let arguments = [set(2, tag.protocol.to_be().into()), set(3, tag.control.into())];
            code.extend(call_or_fail(BPF_FUNC_skb_vlan_push, arguments));
        }
        let reports =
            [(VLAN_PRESENT, TAG_PRESENT), (VLAN_TCI, TAG_CONTROL), (VLAN_PROTO, TAG_PROTOCOL)].map(
                |(field, index)| {
                    [load(1, CONTEXT, field), store(CONTEXT, CB + 4 * index as i16, 1)]
                },
            );
        let end = [mov(0, RESULT), exit()];
        let after = [mov(RESULT, 0)].into_iter().chain(reports.concat()).chain(end);
        let after: Vec<Instruction> = after.collect();
        code.push(mov(1, CONTEXT));
        code.push(call_function(after.len()));
        code.extend(after);
        let second = code.len();
        code.extend(tail_call(&self.programs));
        load_program(&code, &self.functions, second)
    }
}

/// An instruction in the kernel's format: operation, registers, offset and constant.
type Instruction = [u8; 8];

fn instruction(operation: u32, to: u8, from: u8, offset: i16, constant: i32) -> Instruction {
    let [offset_low, offset_high] = offset.to_ne_bytes();
    let [a, b, c, d] = constant.to_ne_bytes();
    [operation as u8, from << 4 | to, offset_low, offset_high, a, b, c, d]
}

fn mov(to: u8, from: u8) -> Instruction {
    instruction(BPF_ALU64 | BPF_MOV | BPF_X, to, from, 0, 0)
}

fn set(to: u8, constant: i32) -> Instruction {
    instruction(BPF_ALU64 | BPF_MOV | BPF_K, to, 0, 0, constant)
}

fn load(to: u8, from: u8, offset: i16) -> Instruction {
    instruction(BPF_LDX | BPF_MEM | BPF_W, to, from, offset, 0)
}

fn store(to: u8, offset: i16, from: u8) -> Instruction {
    instruction(BPF_STX | BPF_MEM | BPF_W, to, from, offset, 0)
}

fn exit() -> Instruction {
    instruction(BPF_JMP | BPF_EXIT, 0, 0, 0, 0)
}

fn call(helper: u32) -> Instruction {
    instruction(BPF_JMP | BPF_CALL, 0, 0, 0, helper as i32)
}

/// Calls the function that begins `distance` instructions after this one.
fn call_function(distance: usize) -> Instruction {
    instruction(BPF_JMP | BPF_CALL, 0, BPF_PSEUDO_CALL as u8, 0, distance as i32)
}

/// Calls a helper on the context; returns [`FAILED`] if the helper fails.
fn call_or_fail(helper: u32, arguments: [Instruction; 2]) -> [Instruction; 7] {
    let [second, third] = arguments;
    let success = instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 2, 0);
    [mov(1, CONTEXT), second, third, call(helper), success, set(0, FAILED), exit()]
}

/// Returns a function that tail-calls the program in the map and returns its result.
fn tail_call(programs: &MapHandle) -> [Instruction; 6] {
    let map = programs.as_fd().as_raw_fd();
    [
        instruction(BPF_LD | BPF_DW | BPF_IMM, 2, BPF_PSEUDO_MAP_FD as u8, 0, map),
        instruction(0, 0, 0, 0, 0), // the upper half of the constant
        set(3, 0),
        call(BPF_FUNC_tail_call),
        set(0, FAILED),
        exit(),
    ]
}

/// Type information of the prelude's two functions; the verifier requires it for a function with a tail
/// call.
struct Functions {
    types: NonNull<btf>,
    first: u32,
    second: u32,
}

impl Functions {
    fn new() -> Functions {
        // SAFETY: the names are C strings that outlive the calls, and the ids come from the calls
        // before.
        unsafe {
            let types = NonNull::new(btf__new_empty()).expect("type information");
            let btf = types.as_ptr();
            let int = btf__add_int(btf, c"int".as_ptr(), 4, BTF_INT_SIGNED as i32);
            let kind = btf__add_func_proto(btf, int);
            let first = btf__add_func(btf, c"prelude".as_ptr(), BTF_FUNC_GLOBAL, kind);
            let second = btf__add_func(btf, c"tail_call".as_ptr(), BTF_FUNC_STATIC, kind);
            assert_eq!(btf__load_into_kernel(btf), 0, "type information");
            Functions { types, first: first as u32, second: second as u32 }
        }
    }
}

impl Drop for Functions {
    fn drop(&mut self) {
        // SAFETY: made in `new` and freed nowhere else.
        unsafe { btf__free(self.types.as_ptr()) };
    }
}

/// Loads a program; `second` is the index of the second function's first instruction.
fn load_program(code: &[Instruction], functions: &Functions, second: usize) -> OwnedFd {
    let starts = [
        bpf_func_info { insn_off: 0, type_id: functions.first },
        bpf_func_info { insn_off: second as u32, type_id: functions.second },
    ];
    let mut options = bpf_prog_load_opts {
        sz: size_of::<bpf_prog_load_opts>() as size_t,
        // SAFETY: the type information lives as long as the borrow.
        prog_btf_fd: unsafe { btf__fd(functions.types.as_ptr()) } as u32,
        func_info: starts.as_ptr().cast(),
        func_info_cnt: starts.len() as u32,
        func_info_rec_size: size_of::<bpf_func_info>() as u32,
        ..Default::default()
    };
    // SAFETY: the code, the options and the C strings outlive the call, which returns a new descriptor.
    unsafe {
        let fd = bpf_prog_load(
            BPF_PROG_TYPE_SCHED_CLS,
            c"prelude".as_ptr(),
            c"GPL".as_ptr(),
            code.as_ptr().cast(),
            code.len() as size_t,
            &raw mut options,
        );
        assert!(fd >= 0, "the prelude: {}", std::io::Error::from_raw_os_error(-fd));
        OwnedFd::from_raw_fd(fd)
    }
}
