"""The sandbox of tool-integrated reasoning: untrusted Python in a process that can only compute.

Built on bubblewrap. A session is one conversation's interpreter: no network (own namespace and
no sockets), no file system but an empty temporary folder of limited size (the interpreter, the
C library and the few packages named in the settings are there read-only), an empty environment,
its own process list, no new processes, no capabilities, and limits on wall time, CPU, memory,
files and output. State lives as long as the session; sessions share nothing.

What this does not protect against: a hole in the kernel, and covert timing between sessions on
one machine. Without bubblewrap nothing is run, unless `isolation = "none"` says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Literal

from pydantic import Field

from data_prep.config import Config
from data_prep.errors import UserError
from eval.seccomp import seccomp_filter

Outcome = Literal["ok", "error", "memory", "timeout", "output", "crashed"]
# bubblewrap dies with its parent, and for the kernel that is the thread that started it: every
# interpreter is started by this one, which lives as long as the process.
_LAUNCHER = ThreadPoolExecutor(1, thread_name_prefix="sandbox-launcher")
WORKER = Path(__file__).with_name("sandbox_worker.py")


class SandboxConfig(Config):
    """Limits of one session.

    Attributes:
        isolation: "bubblewrap", or "none" to run programs with nothing but resource limits.
        wall_s: Longest run of one program.
        cpu_s: CPU time of a whole session.
        memory_mib: Address space.
        disk_mib: The temporary folder, and the largest file in it.
        files: Open files.
        output_chars: Printed characters that are kept.
        packages: Packages that programs may import besides the standard library.
    """

    isolation: Literal["bubblewrap", "none"] = "bubblewrap"
    wall_s: float = Field(5.0, gt=0.0)
    cpu_s: int = Field(30, ge=1)
    memory_mib: int = Field(512, ge=64)
    disk_mib: int = Field(16, ge=1)
    files: int = Field(64, ge=16)
    output_chars: int = Field(4000, ge=1)
    packages: tuple[str, ...] = ("sympy", "mpmath")


@dataclass(frozen=True, slots=True)
class Run:
    """What one program did.

    Attributes:
        outcome: "ok"; "error" and "memory" for exceptions that the program did not catch;
            "timeout", "output" (a flood) and "crashed" for sessions that had to be ended.
        output: What it printed, or the last line of its exception.
        seconds: Wall time.
    """

    outcome: Outcome
    output: str
    seconds: float


class Session:
    """One conversation's interpreter; a context manager.

    Args:
        config: Limits.

    Raises:
        UserError: There is no bubblewrap and the configuration asks for isolation, or it does
            not work here.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        """Start the interpreter."""
        self.config = config or SandboxConfig.model_validate({})
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def __enter__(self) -> Session:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the interpreter."""
        self.close()

    def run(self, code: str) -> Run:
        """Run a program; names that earlier programs of the session bound are still there.

        A program that had to be ended takes the session's state with it; the next one starts
        from nothing.
        """
        if self._process is None:
            self._start()
        began = time.monotonic()
        deadline = began + self.config.wall_s
        # Shows a reply to be that of this very program; one that a program wrote into the pipe
        # would otherwise be taken for the next one's.
        token = os.urandom(8).hex()
        payload = token.encode() + code.encode("utf-8", "replace")
        # JSON may escape every character as \uXXXX; a reply beyond that is a flood.
        most = 12 * self.config.output_chars + 1024
        try:
            self._send(struct.pack(">I", len(payload)) + payload, deadline)
            (length,) = struct.unpack(">I", self._receive(4, deadline))
            if length > most:
                return self._ended("output", "the program wrote past its output limit", began)
            found, outcome, text = json.loads(self._receive(length, deadline))
            known = outcome in ("ok", "error", "memory") and isinstance(text, str)
            if found != token or not known:
                raise ValueError("not a reply of the worker")
        except TimeoutError:
            words = f"TimeoutError: the program ran longer than {self.config.wall_s:g} s"
            return self._ended("timeout", words, began)
        except (OSError, EOFError):
            return self._ended("crashed", "the program ended its interpreter", began)
        except (ValueError, TypeError):
            return self._ended("crashed", "the program wrote to the sandbox's own pipe", began)
        return Run(outcome, text[: self.config.output_chars + 64], time.monotonic() - began)

    def close(self) -> None:
        """End the interpreter and everything in its namespaces."""
        if self._process is None:
            return
        # SIGKILL cannot be caught; the namespaces' first process dies with bubblewrap.
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()
        self._process = None

    def _ended(self, outcome: Outcome, words: str, began: float) -> Run:
        self.close()
        return Run(outcome, words, time.monotonic() - began)

    def _start(self) -> None:
        limits = [
            self.config.memory_mib * 2**20,
            self.config.disk_mib * 2**20,
            self.config.files,
            self.config.output_chars,
            self.config.cpu_s,
        ]
        words = [str(limit) for limit in limits]
        if self.config.isolation == "none":
            command, kept = [sys.executable, "-I", str(WORKER), *words], ()
            self._spawn(command, kept)
        else:
            read, write = os.pipe()
            try:
                os.write(write, seccomp_filter() or b"")
                os.close(write)
                self._spawn([*bubblewrap(self.config, read), *words], (read,))
            finally:
                os.close(read)
        try:
            if self._receive(6, time.monotonic() + 20.0) != b"ready\n":
                raise EOFError
        except (TimeoutError, EOFError, OSError):
            self.close()
            raise UserError(
                "sandbox",
                "bubblewrap could not start an isolated interpreter",
                "a kernel with user namespaces, and /usr/bin/bwrap that may use them",
                "enable them (sysctl kernel.unprivileged_userns_clone=1), or set "
                'sandbox.isolation = "none" on a machine that may be harmed',
            ) from None

    def _spawn(self, command: list[str], descriptors: tuple[int, ...]) -> None:
        self._process = _LAUNCHER.submit(
            subprocess.Popen,
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={"PATH": "/usr/bin", "LANG": "C.UTF-8"},
            pass_fds=descriptors,
            cwd="/",
            start_new_session=True,
        ).result()
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101 - for the type checker
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)

    def _send(self, data: bytes, deadline: float) -> None:
        assert self._process is not None and self._process.stdin is not None  # noqa: S101 - for the type checker
        descriptor = self._process.stdin.fileno()
        while data:
            _wait([], [descriptor], deadline)
            data = data[os.write(descriptor, data) :]

    def _receive(self, count: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None  # noqa: S101 - for the type checker
        descriptor = self._process.stdout.fileno()
        data = b""
        while len(data) < count:
            _wait([descriptor], [], deadline)
            part = os.read(descriptor, count - len(data))
            if not part:
                raise EOFError
            data += part
        return data


def _wait(readable: list[int], writable: list[int], deadline: float) -> None:
    poll = select.poll()
    for descriptor in readable:
        poll.register(descriptor, select.POLLIN)
    for descriptor in writable:
        poll.register(descriptor, select.POLLOUT)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError


def bubblewrap(config: SandboxConfig, filter_descriptor: int) -> list[str]:
    """Return the command line that isolates the worker, up to the worker's own arguments.

    Args:
        config: Limits and packages.
        filter_descriptor: Open descriptor that the seccomp filter is read from.

    Raises:
        UserError: There is no bubblewrap, no filter for this machine, or a package is missing.
    """
    program = shutil.which("bwrap")
    if program is None or seccomp_filter() is None:
        raise UserError(
            "sandbox",
            "no bubblewrap (bwrap) on this machine"
            if program is None
            else "no system call filter for this kind of machine",
            "bubblewrap, which keeps a model's programs from files and network",
            'install it (apt-get install bubblewrap), or set sandbox.isolation = "none" on a '
            "machine that may be harmed",
        )
    words = [
        program,
        "--unshare-all",
        "--unshare-user",
        "--cap-drop",
        "ALL",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        "--hostname",
        "sandbox",
        "--as-pid-1",
        "--seccomp",
        str(filter_descriptor),
    ]
    # The interpreter stands at a neutral place: where it is installed may tell who runs it.
    base = Path(sys.base_prefix)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    executable = Path(sys.base_exec_prefix) / "bin" / version
    library = Path(sysconfig.get_paths(vars={"base": str(base)})["stdlib"])
    words += [
        "--ro-bind",
        str(executable.resolve()),
        f"/python/bin/{version}",
        "--ro-bind",
        str(library),
        f"/python/lib/{version}",
    ]
    for name, path in _libraries(executable, library):
        words += ["--ro-bind", path, name]
    # What is installed beside the standard library is not part of it.
    for name in ("site-packages", "dist-packages"):
        if (library / name).is_dir():
            words += ["--tmpfs", f"/python/lib/{version}/{name}"]
    for package in config.packages:
        folder = _package(package)
        for path in (folder, folder.with_name(f"{folder.name}.libs")):
            if path.is_dir():
                words += ["--ro-bind", str(path), f"/packages/{path.name}"]
    words += [
        "--ro-bind",
        str(WORKER),
        "/worker.py",
        "--dev-bind",
        "/dev/null",
        "/dev/null",
        "--dev-bind",
        "/dev/urandom",
        "/dev/urandom",
        "--size",
        str(config.disk_mib * 2**20),
        "--tmpfs",
        "/tmp",  # noqa: S108 - the sandbox's
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",  # noqa: S108 - the sandbox's
        "--setenv",
        "PYTHONPATH",
        "/packages",
        "--setenv",
        "LD_LIBRARY_PATH",
        "/libraries",
        "--setenv",
        "LANG",
        "C.UTF-8",
        "--setenv",
        "PYTHONDONTWRITEBYTECODE",
        "1",
        "--setenv",
        "OPENBLAS_NUM_THREADS",
        "1",
        "--",
        f"/python/bin/{version}",
        "-s",
        "/worker.py",
    ]
    return words


@lru_cache(maxsize=1)
def _libraries(executable: Path, library: Path) -> tuple[tuple[str, str], ...]:
    """Return (place inside, file) of every shared library that the interpreter may load."""
    files = [str(executable.resolve()), *map(str, sorted(library.glob("lib-dynload/*.so")))]
    listed = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False)  # noqa: S603, S607 - the system's ldd
    found: dict[str, str] = {}
    for name, path in re.findall(r"^\s+(\S+)(?: => (/\S+))? \(0x", listed.stdout, re.MULTILINE):
        if path:
            found[f"/libraries/{name}"] = path
        elif name.startswith("/"):  # the loader, whose place is written into every program
            found[name] = name
    return tuple(found.items())


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "sandbox.packages",
            f"no package {name!r}",
            "an installed package",
            "install it, or take it off the list",
        )
    return Path(next(iter(spec.submodule_search_locations)))
