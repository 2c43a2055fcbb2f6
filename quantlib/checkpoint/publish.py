"""An output that appears under its name whole or not at all, whatever stops the process that makes it.

The output is made in a scratch folder beside its place, ``.NAME.quantlib/new``, and then takes its place in one step:
``renameat2`` refuses a place that is taken, or exchanges what is there for the new one. Where the kernel or the file
system has no such step, what was there waits in ``.NAME.quantlib/old`` until the new one is in place.

A process holds a lock on the scratch folder while it works, so that no other one makes the same output at the same
time. What a process leaves that was killed, interrupted, or met a full disk is kept where the work says what it is (its
``job``): the next process with the same job goes on with it, one with another job removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)

INDEX = ".safetensors.index.json"  # the end of the name of an index
WEIGHTS = (".safetensors", INDEX)  # endings of the files of a model folder that are replaced; others stay
NOREPLACE, EXCHANGE = 1, 2  # flags of renameat2
AT_FDCWD = -100
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)  # EPERM: a filter of system calls


@contextlib.contextmanager
def replacing(
    path: Path, overwrite: bool, folder: bool, job: str | None = None, *, resume: bool = True, join: bool = False
) -> Iterator[Scratch]:
    """A place to make ``path`` in, which becomes ``path`` when the block ends well, and nothing when it does not.

    Parameters
    ----------
    path : Path
    overwrite : bool
        Whether a model that is there is replaced. Other files in its folder stay.
    folder : bool
        Whether the output is a folder, which is there when the block begins, or a file.
    job : str, optional
        All that the output follows from. Work of the same job that was stopped is gone on with; without one, and
        without ``resume``, it begins anew.
    join : bool
        Whether processes of the same job share the work. The one for which `Scratch.last` is true completes it.

    Raises
    ------
    FileExistsError
        If ``path`` exists, now or at the end, unless ``overwrite``; if it is no model of the same kind in any case;
        and while another process makes it.
    FileNotFoundError
        If the folder that ``path`` is to be in does not exist.
    """
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} must be a folder to write {path.name} in, got none")
    with Signals() as signals:
        scratch = Scratch(path, folder, job, resume, join)
        keep = scratch.resumed  # until the work begins
        try:
            check(path, overwrite, folder)
            try:
                signals.let()
                yield scratch
            finally:
                signals.open = False
            if scratch.leads:
                publish(scratch, overwrite, folder)
            keep = False
        except BaseException as error:
            keep = (keep and isinstance(error, FileExistsError)) or stopped(error)
            raise
        finally:
            scratch.leave(keep)


def publish(scratch: Scratch, overwrite: bool, folder: bool) -> None:
    """Move the complete output from the scratch folder to its place."""
    path = scratch.path
    if folder:
        sync(scratch.new)
    check(path, overwrite, folder, again=True)
    if overwrite and os.path.lexists(path):
        put_over(scratch, path)
    else:
        put(scratch.new, path)
    sync(path.parent)


def stopped(error: BaseException) -> bool:
    """True if the same work may go on later: after an interrupt, or when there is room on the disk again."""
    if isinstance(error, (OSError, MemoryError)):
        return not isinstance(error, (FileExistsError, FileNotFoundError))
    return not isinstance(error, Exception)


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
    """Put ``scratch.new`` in place of the model at ``path``, and keep the other files of the old one."""
    new = scratch.new
    if not new.is_dir():
        os.replace(new, path)
        return
    carry(path, new)
    if renameat2(new, path, EXCHANGE):
        try:
            carry(new, path)  # files that came into the old folder meanwhile
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
    """Move files of an old output that are not weights, and that the new one does not have, into the new one."""
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
    """Flush the entries of ``folder`` to the disk, so that its files keep their names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do so for a folder
            raise
    finally:
        os.close(descriptor)


class Scratch:
    """``.NAME.quantlib`` beside an output: its finished part, and the processes that make it.

    Attributes
    ----------
    folder : Path
        In it are ``new`` and ``old``, ``job``, ``lock`` and ``publish``, and a journal for each file in ``journal``.
    resumed : bool
        Whether work of an earlier process is in it.
    leads : bool
        Whether this process completes the output.
    """

    PARTS = ("new", "old", "job", "lock", "publish", "journal")
    PATIENCE = 10.0  # seconds that a process waits for one that tidies up before they share the work

    def __init__(self, path: Path, folder: bool, job: str | None, resume: bool, join: bool) -> None:
        self.path, self.is_folder, self.job, self.join = path, folder, job, join
        self.folder = path.with_name(f".{path.name}.quantlib")
        self.resumed, self.leads, self.descriptors = False, not join, list[int]()
        deadline = time.monotonic() + self.PATIENCE
        while not self._enter(resume):
            if time.monotonic() > deadline:
                raise self._busy()
            time.sleep(0.02)

    @property
    def new(self) -> Path:
        return self.folder / "new"

    @property
    def old(self) -> Path:
        return self.folder / "old"

    def last(self) -> bool:
        """Return True in the one process that is to complete the output, once every file of it is whole.

        The others wait until that is done.
        """
        while not self.leads:
            try:
                descriptor = os.open(self.folder / "publish", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # it is done
                return False
            self.descriptors.append(descriptor)
            if flock(descriptor, fcntl.LOCK_EX) and is_at(descriptor, self.folder / "publish"):
                self.leads = os.path.lexists(self.new)
                return self.leads
            os.close(self.descriptors.pop())
            time.sleep(0.05)
        return True

    def claim(self, name: str) -> Journal | None:
        """The journal of a file, for the process that writes it; None while another one does, or has done so."""
        try:
            (self.folder / "journal").mkdir(exist_ok=True)
            journal = Journal(self.folder / "journal" / name)
        except (BlockingIOError, FileNotFoundError):
            return None
        if self.done:
            journal.close()
            return None
        return journal

    @property
    def done(self) -> bool:
        """True if another process has completed the output."""
        return not (self.folder / "job").exists()

    def leave(self, keep: bool) -> None:
        """Release the folder, and remove it unless others work in it or its work is to be continued."""
        try:
            if keep and self.job is not None and os.path.lexists(self.new) and self._begun():
                log.warning("kept %s: the same call continues with its finished part", self.folder)
            elif self.leads or flock(self.descriptors[0], fcntl.LOCK_EX):
                self._put_back()
                self._remove()
        finally:
            for descriptor in self.descriptors:
                os.close(descriptor)

    def _enter(self, resume: bool) -> bool:
        """Lock the folder; False if another process removes it or tidies it up, so that the caller tries again."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        try:
            if self.folder.is_symlink() or not set(os.listdir(self.folder)) <= set(self.PARTS):
                raise FileExistsError(f"{self.folder} must be free for the work on {self.path.name}: move it away")
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self.folder / "lock", flags, 0o600)
        except FileNotFoundError:
            return False
        self.descriptors = [descriptor]
        try:
            alone = flock(descriptor, fcntl.LOCK_EX)
            if not alone and not self.join and is_at(descriptor, self.folder / "lock"):
                raise self._busy()
            if (not alone and not flock(descriptor, fcntl.LOCK_SH)) or not is_at(descriptor, self.folder / "lock"):
                os.close(descriptor)
                return False
            if alone:
                self._tidy(resume)
                if self.join and not flock(descriptor, fcntl.LOCK_SH):
                    os.close(descriptor)
                    return False
            if self.join and self._told() != self.job:
                raise self._busy()
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        return True

    def _busy(self) -> FileExistsError:
        got = f"another one at work in {self.folder}"
        return FileExistsError(f"{self.path} must be written by one process at a time, got {got}")

    def _tidy(self, resume: bool) -> None:
        """Put back what a killed process had just moved away; keep its work if it is the same, or else remove it."""
        self._put_back()
        left = sorted(set(os.listdir(self.folder)) - {"lock"})
        known = self.job is not None and self._told(whole=True) == self.job
        self.resumed = resume and known and os.path.lexists(self.new)
        if self.resumed:
            return
        if left:
            log.warning("removed %s, which an earlier run had left", self.folder)
        for name in left:
            remove(self.folder / name)
        if self.is_folder:
            self.new.mkdir()
        (self.folder / "job").write_text(f"{self._identity()}\n{self.job or ''}")

    def _identity(self) -> int:
        """Identify the folder of the output: after an exchange the old output is in its place."""
        return os.stat(self.new).st_ino if self.is_folder else 0

    def _told(self, whole: bool = False) -> str | None:
        """Return the job of the output being made here; with ``whole``, None if that output is gone or replaced."""
        identity, _, job = (read(self.folder / "job") or "").partition("\n")
        if whole and (not os.path.lexists(self.new) or identity != str(self._identity())):
            return None
        return job

    def _begun(self) -> bool:
        """True if a batch of any file is written."""
        return any((read(path) or "").count("\n") > 1 for path in (self.folder / "journal").glob("*"))

    def _put_back(self) -> None:
        """The only copy of what was at the place of the output goes back there."""
        if os.path.lexists(self.old) and os.path.lexists(self.new):  # the new one never took the place of the old one
            try:
                put(self.old, self.path)
            except OSError as error:
                raise FileExistsError(
                    f"{self.old} holds the old output of {self.path}, which is taken: move one of them"
                ) from error
            log.warning("put %s back, which was on its way out", self.path)

    def _remove(self) -> None:
        (self.folder / "job").unlink(missing_ok=True)  # first of all: see `done`
        for _ in range(3):
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
        log.warning("%s could not be removed", self.folder)


class Journal:
    """The record of a file being written: a line of JSON for each batch, then its checksum once all is on the disk.

    The file is held by one process. Lines of a machine that was started anew since do not count unless the file was
    whole: what they tell of may never have reached the disk.

    Raises
    ------
    BlockingIOError
        While another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not flock(self._file, fcntl.LOCK_EX) or not is_at(self._file, path):
                raise BlockingIOError
            self.notes: list[Any] = []  # of the batches that are written, in their order
            self.checksum: str | None = None  # of the whole file
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def add(self, note: Any) -> None:
        """Record that another batch is written."""
        self._line({"note": note})
        self.notes.append(note)

    def close_with(self, checksum: str) -> None:
        """The file is whole and on the disk."""
        self._line({"checksum": checksum})
        self.checksum = checksum

    def begin(self) -> None:
        """Record that nothing is written yet."""
        self.notes, self.checksum = [], None
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        self._line({"boot": boot()})

    def _line(self, entry: dict[str, Any]) -> None:
        os.write(self._file, f"{json.dumps(entry)}\n".encode())

    def _read(self) -> None:
        data = b""
        while chunk := os.read(self._file, 1 << 20):
            data += chunk
        whole = data[: data.rfind(b"\n") + 1]
        try:
            first, *rest = [json.loads(line) for line in whole.splitlines()]
            self.notes = [entry["note"] for entry in rest if "note" in entry]
            self.checksum = next((entry["checksum"] for entry in rest if "checksum" in entry), None)
            known = first["boot"] == boot() or self.checksum is not None
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            self.begin()
        elif len(whole) < len(data):  # a line that was cut off
            os.ftruncate(self._file, len(whole))
            os.lseek(self._file, len(whole), os.SEEK_SET)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def boot() -> str:
    """Return an id of the boot of this machine."""
    return read(Path("/proc/sys/kernel/random/boot_id")) or ""


def read(path: Path) -> str | None:
    """The text of a small file; None where there is none."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None


def remove(path: Path) -> None:
    """A file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flock(descriptor: int, how: int) -> bool:
    """Lock an open file where its file system has locks; False where another process holds it."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("no locks: %s", error)
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """True if an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


class Signals:
    """Delay signals that have a handler in Python inside the block; while `open` they are handled as usual.

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
