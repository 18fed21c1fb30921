"""Atomic writes, locks, checksums and fingerprints of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factor_transfer.util.errors import RunError

if sys.platform != "win32":  # not supported: `machine.check_supported` says so
    import fcntl

if TYPE_CHECKING:
    from torch import Tensor

ZEROS = 1 << 20
"""Bytes that are written at a time where the system cannot reserve them."""

CANNOT_RESERVE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENODEV}
"""What `posix_fallocate` says on file systems that do not know it."""


def cache_folder(given: str | None) -> Path:
    """Where decoded images and teacher outputs are kept: `given`, or factor-transfer in the user's cache folder."""
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "factor-transfer").expanduser()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` so that a reader, or a crash at any moment, finds the old file or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(
        f".{path.name}.{secrets.token_hex(4)}.tmp"
    )  # process ids are no names: machines may share a disk
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk names no file
        raise
    sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Delete what `write_atomic` had not finished when its process was killed; only while nothing else writes there."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new, renamed, deleted files) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A file's name may be no Unicode: its stray bytes become JSON's own escapes.
    write_atomic(path, text.encode(errors="backslashreplace"))


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        RunError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(str(path), found=f"not JSON ({error})", hint="restore the file, or use another --out") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for one process. The kernel releases it when the process ends, however it ends.

    Raises:
        RunError: another process holds it.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunError(
                str(path.parent),
                found=f"in use by process {file.read().strip() or 'unknown'}",
                hint="wait for it, stop it, or give another --out",
            ) from error
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold a lock file, after waiting for the process that has it.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def reserve(handle: int, size: int) -> None:
    """Give an open file its size, all of it on disk, so that no later write into it meets a full disk.

    Where the system cannot reserve space (macOS, some file systems), zeros are appended, which is slower and as safe.
    `ftruncate` is not enough: it leaves a hole, and a full disk under a memory map kills the process.

    Raises:
        OSError: the disk is too full.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in CANNOT_RESERVE:
                raise
    place = os.fstat(handle).st_size
    while place < size:
        place += os.pwrite(handle, bytes(min(ZEROS, size - place)), place)
    os.fsync(handle)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a plain value (whatever JSON holds), independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of a state dict; memory layout does not matter."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
