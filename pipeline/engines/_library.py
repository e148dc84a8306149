"""`_decode.cpp`, compiled once for this machine, and loaded.

The library is kept in the user's own cache (`$XDG_CACHE_HOME/boxed`, or `~/.cache/boxed`). Its name
holds a hash of what it was made from (source, compiler, flags, processor) and one of what it is:
another compiler or another machine with the same home makes one of its own, and a file that was
cut off or changed is made again. Loading it runs it, so the folder must be ours alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("_decode.cpp")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    # a · b + c is rounded once wherever it stands: a row's bits do not depend on the loop it is in.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
)
TIMEOUT_S = 120

log = logging.getLogger(__name__)


class Unbuilt(Exception):
    """There is no library on this machine; the message says why."""


def library_for(device: torch.device, dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library for float32 on a CPU, which is what it computes in.

    Raises:
        Unbuilt: The device or dtype is another, or there is no library.
    """
    if device.type != "cpu" or dtype != torch.float32:
        raise Unbuilt(f"it computes in float32 on a CPU, not in {dtype} on {device.type}")
    found = _library_or_reason()
    if isinstance(found, str):
        raise Unbuilt(found)
    return found


@functools.cache
def _library_or_reason() -> ctypes.CDLL | str:
    """Return the library, or why there is none; tried once a process."""
    try:
        found = _load()
    except Unbuilt as reason:
        log.info("the embedded engine computes with torch: %s", reason)
        return str(reason)
    log.info("the embedded engine computes with %s", found._name)
    return found


def _load() -> ctypes.CDLL:
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise Unbuilt(f"no C++ compiler is on the path ({', '.join(COMPILERS)})")
    folder, origin = _folder(), _origin(compiler)
    made = next(filter(_is_whole, folder.glob(f"decode-{origin}-*.so")), None)
    try:
        return ctypes.CDLL(str(made or _build(compiler, folder, origin)))
    except OSError as error:
        raise Unbuilt(str(error)) from None


def _folder() -> Path:
    """Return the folder of libraries, made if need be, that nobody else may write to."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "boxed"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found, link = folder.stat(), folder.lstat()
    except (OSError, RuntimeError) as error:
        raise Unbuilt(f"no folder for what is compiled: {error}") from None
    if {found.st_uid, link.st_uid} != {os.getuid()}:
        raise Unbuilt(f"{folder} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unbuilt(f"{folder} can be written to by others: chmod go-w")
    return folder


def _origin(compiler: str) -> str:
    """Return a hash of all that decides the library."""
    digest = hashlib.blake2b(digest_size=12)
    try:
        source = SOURCE.read_text(encoding="utf-8")
    except OSError as error:
        raise Unbuilt(f"its source cannot be read: {error}") from None
    words = (source, _run(compiler, "--version"), _processor(), *FLAGS)
    for word in words:
        digest.update(f"{len(word)}:{word}".encode())
    return digest.hexdigest()


def _processor() -> str:
    """Return what the flag "native" stands for here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    telling = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))


def _content(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        return path.stem.endswith(_content(path))
    except OSError:
        return False


def _build(compiler: str, folder: Path, origin: str) -> Path:
    """Compile, and give the file its name when it is whole."""
    for left in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):  # of a process that was killed, or another's to remove
            if time.time() - left.stat().st_mtime > 2 * TIMEOUT_S:
                left.unlink()
    handle, name = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        _run(compiler, *FLAGS, "-o", name, str(SOURCE))
        made = folder / f"decode-{origin}-{_content(Path(name))}.so"
        os.replace(name, made)
    finally:
        Path(name).unlink(missing_ok=True)
    return made


def _run(*command: str) -> str:
    """Return what a command prints."""
    try:
        done = subprocess.run(  # noqa: S603 - the compiler, with arguments of ours
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unbuilt(str(error)) from None
    if done.returncode:
        raise Unbuilt(f"{command[0]} ended with status {done.returncode}: {done.stderr[-400:]}")
    return done.stdout
