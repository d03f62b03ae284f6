"""What an RPC server may do on its node, set by the kernel (Landlock) before it begins.

Whoever reaches its port can make it do things that were never meant (its protocol has no authentication), and it runs
as the user who owns the endpoint records. So it may write into its cache and to devices, start no other program,
connect to nobody, and signal nobody. Landlock's parts came with kernels 5.13 to 6.12; an older one enforces what it
knows.
Source: Documentation/userspace-api/landlock.rst and include/uapi/linux/landlock.h of Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import struct
from collections.abc import Iterable
from pathlib import Path

_SYS_CREATE_RULESET, _SYS_ADD_RULE, _SYS_RESTRICT_SELF = 444, 445, 446
_GET_VERSION = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2
_PR_SET_NO_NEW_PRIVS = 38

_EXECUTE, _WRITE_FILE = 1 << 0, 1 << 1
# Removing and making entries of any kind.
_CHANGE = sum(1 << bit for bit in range(4, 13))
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_BIND, _CONNECT = 1 << 0, 1 << 1
_SCOPE_SIGNAL = 1 << 1

_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: object) -> int:
    answer: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return answer


def version() -> int:
    """The version of Landlock that the kernel enforces; 0 for none."""
    try:
        return _syscall(_SYS_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_GET_VERSION))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


class Ruleset:
    """Rules for one program, made where errors can be told, and enforced in the child that becomes the program."""

    def __init__(self, programs: Iterable[Path], writable: Iterable[Path], port: int) -> None:
        """`programs` may be run, or what is in them; files in `writable` may be changed; TCP `port` may be bound."""
        self.version = version()
        self.descriptor: int | None = None
        if self.version == 0:
            return
        write = _WRITE_FILE | _CHANGE
        write |= _REFER if self.version >= 2 else 0
        write |= _TRUNCATE if self.version >= 3 else 0
        handled = [_EXECUTE | write]
        handled += [_BIND | _CONNECT] if self.version >= 4 else []
        handled += [_SCOPE_SIGNAL] if self.version >= 6 else []
        attributes = struct.pack(f"={len(handled)}Q", *handled)
        self.descriptor = _syscall(_SYS_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
        os.set_inheritable(self.descriptor, False)
        for path in programs:
            self._allow(path, _EXECUTE)
        for path in writable:
            self._allow(path, write)
        if self.version >= 4:
            self._add(_RULE_NET_PORT, struct.pack("=QQ", _BIND, port))

    @property
    def lacks(self) -> str:
        """What it cannot keep the program from; empty when nothing."""
        parts = {1: "starting programs, writing", 3: "truncating files", 4: "connecting", 6: "signalling"}
        return ", ".join(words for since, words in parts.items() if self.version < since)

    def _allow(self, path: Path, access: int) -> None:
        # A cache that is not there is not written to, and a program that is not there is missed by who starts it.
        with contextlib.suppress(FileNotFoundError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                self._add(_RULE_PATH_BENEATH, struct.pack("=Qi", access, place))
            finally:
                os.close(place)

    def _add(self, kind: int, attributes: bytes) -> None:
        _syscall(_SYS_ADD_RULE, ctypes.c_int(self.descriptor or 0), ctypes.c_int(kind), attributes, ctypes.c_uint(0))

    def enforce(self) -> None:
        """In the child, for good: no new privileges (not even by a setuid program), no core dump, these rules."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
        if self.descriptor is not None:
            _syscall(_SYS_RESTRICT_SELF, ctypes.c_int(self.descriptor), ctypes.c_uint(0))

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
