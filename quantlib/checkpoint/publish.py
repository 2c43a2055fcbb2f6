"""An output that appears under its name whole or not at all, whatever stops the process that makes it.

The output is made in a scratch folder beside its place, ``.NAME.xxxxxxxx/new``, and then takes its place in one step:
``renameat2`` refuses a place that is taken, or exchanges what is there for the new one. Where the kernel or the file
system has no such step, what was there waits in ``.NAME.xxxxxxxx/old`` until the new one is in place.

The process holds a lock on its scratch folder. A scratch folder that nobody holds is left of a process that was
killed; the next one with the same output removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)

INDEX = ".safetensors.index.json"  # how the name of an index ends
WEIGHTS = (".safetensors", INDEX)  # what a model folder is replaced by; other files of it stay
NOREPLACE, EXCHANGE = 1, 2  # flags of renameat2
AT_FDCWD = -100
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)  # EPERM: a filter of system calls


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool, folder: bool) -> Iterator[Path]:
    """A path to write to that becomes ``path`` when the block ends well, and nothing when it does not.

    Parameters
    ----------
    path : Path
    overwrite : bool
        Whether a model that is there is replaced. Other files in its folder stay.
    folder : bool
        Whether the output is a folder, which is there when the block begins, or a file.

    Raises
    ------
    FileExistsError
        If ``path`` exists, now or at the end, unless ``overwrite``; if it is no model of the same kind in any case.
    FileNotFoundError
        If the folder that ``path`` is to be in does not exist.
    """
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} must be a folder to write {path.name} in, got none")
    with Signals() as signals:
        clear(path)
        check(path, overwrite, folder)
        scratch = Scratch(path)
        try:
            if folder:
                scratch.new.mkdir()
            try:
                signals.let()
                yield scratch.new
            finally:
                signals.open = False
            if folder:
                sync(scratch.new)
            check(path, overwrite, folder, again=True)
            if overwrite and os.path.lexists(path):
                put_over(scratch, path)
            else:
                put(scratch.new, path)
            sync(path.parent)
        finally:
            scratch.remove()


def check(path: Path, overwrite: bool, folder: bool, again: bool = False) -> None:
    """Raise FileExistsError unless the output may take its place at ``path``."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise appeared(path) if again else FileExistsError(f"{path} must not exist yet, or overwrite must be asked for")
    if path.is_symlink() and (folder or path.is_dir()):
        raise FileExistsError(f"{path} must be a model to be overwritten, got a link to {os.readlink(path)}: name that")
    if folder != path.is_dir() or not (folder or path.is_file()):
        got = "a folder" if path.is_dir() else "a file" if path.is_file() else "something that is no file"
        kind = "a model folder" if folder else "a safetensors file"
        raise FileExistsError(f"{path} must be {kind} to be overwritten, got {got}")
    if folder and not any(path.glob("*.safetensors")) and any(path.iterdir()):
        raise FileExistsError(f"{path} must be a model to be overwritten, got a folder without a safetensors file")
    if os.path.ismount(path):
        raise FileExistsError(f"{path} must not be a mount point, which cannot be replaced: name a folder in it")


def appeared(path: Path) -> FileExistsError:
    return FileExistsError(
        f"{path} must not exist yet, but has appeared since the work began: it stays, and the new model is discarded"
    )


def put(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; FileExistsError, and nothing changed, where something is there."""
    try:
        if renameat2(new, path, NOREPLACE):
            return
        if not new.is_dir():
            link_or_claim(new, path)
        elif os.path.lexists(path):
            raise FileExistsError
        else:
            os.rename(new, path)  # over an empty folder at most: it fails over anything else
    except FileExistsError:
        raise appeared(path) from None


def link_or_claim(new: Path, path: Path) -> None:
    """A file under a name that must be free, without a rename that respects it."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.replace(new, path)


def put_over(scratch: Scratch, path: Path) -> None:
    """``scratch.new`` in place of the model at ``path``, whose other files come along."""
    new = scratch.new
    if not new.is_dir():
        os.replace(new, path)
        return
    carry(path, new)
    if renameat2(new, path, EXCHANGE):
        try:
            carry(new, path)  # what came into the old folder meanwhile
        except BaseException:
            renameat2(new, path, EXCHANGE)
            raise
        return
    os.rename(path, scratch.old)
    try:
        put(new, path)
    except BaseException:
        put(scratch.old, path)
        raise


def carry(old: Path, new: Path, top: bool = True) -> None:
    """Files of an old output that are no weights and that the new one does not have, into the new one."""
    for entry in sorted(os.scandir(old), key=lambda entry: entry.name):
        target = new / entry.name
        if entry.is_dir(follow_symlinks=False):
            if not os.path.lexists(target):
                target.mkdir()
                shutil.copystat(entry.path, target)
            if target.is_symlink() or not target.is_dir():
                raise FileExistsError(f"{entry.path}, a folder, must make room for a file of the new model: move it")
            carry(Path(entry.path), target, top=False)
        elif not os.path.lexists(target) and not (top and entry.name.endswith(WEIGHTS)):
            try:
                os.link(entry.path, target, follow_symlinks=False)
            except OSError:  # a file system without links, too many of them, or a file of somebody else
                shutil.copy2(entry.path, target, follow_symlinks=False)


def renameat2(source: Path, target: Path, flag: int) -> bool:
    """Rename in one step with ``flag``; False where the system does not have that."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(target))


def sync(folder: Path) -> None:
    """What is in ``folder`` is on the disk under its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do so for a folder
            raise
    finally:
        os.close(descriptor)


class Scratch:
    """``.NAME.xxxxxxxx`` beside an output, locked as long as its process lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            self.folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            try:
                descriptor = lock(self.folder)
            except BaseException:
                self.folder.rmdir()
                raise
            if descriptor is not None and self.folder.exists():  # else another process took it for a leftover
                self.descriptor = descriptor
                return
            if descriptor is not None:
                os.close(descriptor)

    @property
    def new(self) -> Path:
        return self.folder / "new"

    @property
    def old(self) -> Path:
        return self.folder / "old"

    def remove(self) -> None:
        try:
            discard(self.folder, self.path)
        finally:
            os.close(self.descriptor)


def lock(folder: Path) -> int | None:
    """A descriptor of ``folder``, locked where the file system has locks; None where another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        log.debug("no lock on %s: %s", folder, error)
    return descriptor


def clear(path: Path) -> None:
    """Remove what killed processes left beside ``path``, and put back what one had just moved away."""
    ours = re.compile(re.escape(f".{path.name}.") + "[a-z0-9_]{8}")
    for entry in list(os.scandir(path.parent)):
        if not ours.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        folder = Path(entry.path)
        try:
            if not {"new", "old"}.issuperset(os.listdir(folder)):
                continue
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:  # of another user, or gone by now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            discard(folder, path)
            log.warning("removed %s, which a process that was killed had left", folder)
        except BlockingIOError:
            pass  # at work
        except OSError as error:
            log.warning("left %s of an earlier run alone: %s", folder, error)
        finally:
            os.close(descriptor)


def discard(folder: Path, path: Path) -> None:
    """Remove a scratch folder, but not the only copy of what was at ``path``, which goes back there."""
    new, old = folder / "new", folder / "old"
    if os.path.lexists(old) and os.path.lexists(new):  # the new one never took the place of the old one
        try:
            put(old, path)
        except OSError as error:
            raise FileExistsError(f"{old} holds what was at {path}, which is taken: move one of them") from error
        log.warning("put %s back, which was on its way out", path)
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
    log.warning("%s could not be removed", folder)


class Signals:
    """Inside the block signals that have a handler in Python wait; while `open` they are handled as ever.

    The first one that is handled closes it again: the work that it stops is cleaned up without another interruption.
    """

    def __init__(self) -> None:
        self.open = False
        self.done = False
        self.waiting: list[int] = []
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other thread ever runs a handler
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                handler = signal.getsignal(number)
                if callable(handler):
                    self.handlers[number] = handler
                    signal.signal(number, self._arrived)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done = True
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for number in self.waiting:
            signal.raise_signal(number)

    def let(self) -> None:
        """Open, and handle what has waited."""
        self.open = True
        while self.waiting:
            self._arrived(self.waiting.pop(0), None)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.done:
            self.handlers[number](number, frame)
        elif self.open:
            self.open = False
            self.handlers[number](number, frame)
            self.open = True
        else:
            self.waiting.append(number)


def keep_mode(source: Path, target: Path) -> None:
    """The permissions of ``source`` for ``target``; a folder stays one that its owner can change."""
    mode = stat.S_IMODE(os.stat(source).st_mode) & 0o777
    os.chmod(target, mode | (0o700 if target.is_dir() else 0))
