"""A seccomp filter for untrusted programs: no processes, no sockets, no kernel interfaces.

Namespaces take away what a program could see; this takes away what it could ask for. The filter
is a list of refusals, since a Python interpreter needs a hundred harmless calls: a refused call
fails with EPERM, and a new process with it (threads stay, bounded by the memory limit).
"""

from __future__ import annotations

import errno
import platform
import struct

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_CLONE_THREAD = 0x00010000

# Calls with one number on every architecture (those added since 2019).
_COMMON = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
}
_DENIED: dict[str, dict[str, int]] = {
    "x86_64": _COMMON
    | {
        "fork": 57,
        "vfork": 58,
        "socket": 41,
        "socketpair": 53,
        "connect": 42,
        "ptrace": 101,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "mount": 165,
        "umount2": 166,
        "pivot_root": 155,
        "chroot": 161,
        "unshare": 272,
        "setns": 308,
        "keyctl": 250,
        "add_key": 248,
        "request_key": 249,
        "bpf": 321,
        "perf_event_open": 298,
        "userfaultfd": 323,
        "open_by_handle_at": 304,
        "name_to_handle_at": 303,
        "memfd_create": 319,
        "shmget": 29,
        "mq_open": 240,
        "personality": 135,
        "kexec_load": 246,
        "init_module": 175,
        "finit_module": 313,
        "delete_module": 176,
        "reboot": 169,
        "swapon": 167,
        "acct": 163,
        "quotactl": 179,
        "iopl": 172,
        "ioperm": 173,
    },
    "aarch64": _COMMON
    | {
        "socket": 198,
        "socketpair": 199,
        "connect": 203,
        "ptrace": 117,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "mount": 40,
        "umount2": 39,
        "pivot_root": 41,
        "chroot": 51,
        "unshare": 97,
        "setns": 268,
        "keyctl": 219,
        "add_key": 217,
        "request_key": 218,
        "bpf": 280,
        "perf_event_open": 241,
        "userfaultfd": 282,
        "open_by_handle_at": 265,
        "name_to_handle_at": 264,
        "memfd_create": 279,
        "shmget": 194,
        "mq_open": 180,
        "personality": 92,
        "kexec_load": 104,
        "init_module": 105,
        "finit_module": 273,
        "delete_module": 106,
        "reboot": 142,
        "swapon": 224,
        "acct": 89,
        "quotactl": 60,
    },
}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """Return the compiled filter of a machine, None for one that has none here.

    Args:
        machine: As `platform.machine()` names it; by default this one's.
    """
    machine = machine or platform.machine()
    if machine not in _AUDIT:
        return None
    deny = _ERRNO | errno.EPERM
    program = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, _AUDIT[machine], true=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":  # the x32 numbers would be a way round the list
        program += [_step(_AT_LEAST, 0x40000000, false=1), _step(_RETURN, deny)]
    for number in sorted(_DENIED[machine].values()):
        program += [_step(_EQUAL, number, false=1), _step(_RETURN, deny)]
    program += [
        # clone3 takes its flags by pointer, which no filter can read; libc falls back to clone.
        _step(_EQUAL, _CLONE3, false=1),
        _step(_RETURN, _ERRNO | errno.ENOSYS),
        _step(_EQUAL, _CLONE[machine], false=3),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_ANY_BIT, _CLONE_THREAD, true=1),
        _step(_RETURN, deny),
        _step(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _step(code: int, value: int, *, true: int = 0, false: int = 0) -> bytes:
    """Return one instruction: operation, jumps when true and when false, operand."""
    return struct.pack("=HBBI", code, true, false, value)
