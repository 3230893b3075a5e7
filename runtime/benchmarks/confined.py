"""Runs one program in a process that can only compute. A script of its own, with nothing but the standard library.

`python -I -S confined.py FD CPU_SECONDS BYTES` reads a token on the first line of stdin and the program from the rest, and
writes the token to file descriptor FD when the program has come to its end without an error. Before that the process gives
up, for good:

- the network, files to write, other programs and other processes: system calls for them fail (seccomp, with the numbers of
  x86-64 and 64-bit Arm; another machine is refused);
- more than CPU_SECONDS of processor time and BYTES of memory, and core dumps (resource limits).

Reading files is left to it: what is read cannot be told to anyone, for stdout and stderr lead nowhere.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

REFUSED = 97
"""The exit status where the process could not be confined, so that the program was not started."""

# System calls that fail with "operation not permitted", by (x86-64, arm64) number; None: there is none of that name.
_FORBIDDEN = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "creat": (85, None), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
    "mkdir": (83, None), "mkdirat": (258, 34), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "execve": (59, 221), "execveat": (322, 281),
    "fork": (57, None), "vfork": (58, None), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117), "prlimit64": (302, 261),
    "setrlimit": (160, 164), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "memfd_create": (319, 279), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "reboot": (169, 142), "init_module": (175, 105),
    "kexec_load": (246, 104), "swapon": (167, 224), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "sethostname": (170, 161), "ioctl": (16, 29), "quotactl": (179, 60), "acct": (163, 89),
    "open_by_handle_at": (304, 265), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "fsopen": (430, 430), "open_tree": (428, 428), "move_mount": (429, 429), "mount_setattr": (442, 442),
    "pidfd_getfd": (438, 438), "finit_module": (313, 273), "delete_module": (176, 106), "setdomainname": (171, 162),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "shmat": (30, 196), "swapoff": (168, 225),
}  # fmt: skip
# These fail as if the kernel did not know them, and the C library falls back to those above and below.
_UNKNOWN = {"clone3": (435, 435), "openat2": (437, 437)}
_OPEN = {"open": ((2, None), 1), "openat": ((257, 56), 2)}  # the number of the argument that holds the flags
_CLONE = (56, 220)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_WRITES = (
    os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | getattr(os, "O_TMPFILE", 0) & ~os.O_DIRECTORY
)
_THREAD = 0x00010000  # CLONE_THREAD
_X32 = 0x40000000  # numbers of the x32 system calls, which are other names for the same things

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2


def instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """Builds the filter for a machine, as a list of (code, jump if true, jump if false, operand)."""
    column, architecture = _ARCHITECTURES[machine]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for calls, error in ((_FORBIDDEN, _EPERM), (_UNKNOWN, _ENOSYS)):
        for numbers in calls.values():
            if (number := numbers[column]) is not None:
                program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]
    for numbers, argument in _OPEN.values():
        if (number := numbers[column]) is not None:
            program += [
                (_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument),
                (_ANY_BIT, 0, 1, _WRITES),
                (_RETURN, 0, 0, _ERRNO | _EPERM),
                (_RETURN, 0, 0, _ALLOW),
            ]
    program += [
        (_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _ARGUMENTS_AT),
        (_ANY_BIT, 1, 0, _THREAD),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return program


def confine(cpu_seconds: int, memory_bytes: int) -> None:
    """Gives up everything that this file's docstring lists. OSError where the system does not allow it."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ARCHITECTURES or sys.maxsize < 2**32:
        raise OSError(f"no confinement for {sys.platform} on {machine}")
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    code = b"".join(struct.pack("=HBBI", *one) for one in instructions(machine))
    buffer = ctypes.create_string_buffer(code, len(code))
    table = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER, ctypes.addressof(table), 0, 0)):
        if libc.prctl(arguments[0], *(ctypes.c_ulong(one) for one in arguments[1:])) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"seccomp is not possible here: {os.strerror(number)}")


def main() -> None:
    """Reads the program, confines the process, runs the program, and reports that the program came to its end."""
    answer, cpu_seconds, memory_bytes = (int(argument) for argument in sys.argv[1:])
    token, _, program = sys.stdin.buffer.read().partition(b"\n")
    try:
        confine(cpu_seconds, memory_bytes)
    except (OSError, ValueError) as error:
        os.write(answer, str(error).encode())
        os._exit(REFUSED)
    exec(compile(program, "program", "exec", dont_inherit=True), {"__name__": "__main__"})
    os.write(answer, token)


if __name__ == "__main__":
    main()
