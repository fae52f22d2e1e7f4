"""Where the tensors of a safetensors checkpoint lie, and its fingerprint."""

import hashlib
import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moeits.errors import MissingError, MoeitsError
from moeits.machine.keys import once_for_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes
    ----------
    name : str
        Its name in the checkpoint.
    file : Path
        The safetensors file that holds it.
    dtype : str
        Its type as safetensors spells it: ``"BF16"``, ``"F32"``, ...
    shape : tuple of int
        Its shape.
    start, stop : int
        First byte in the file, and the one behind the last.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def inside(folder: Path, name: str, named_by: str) -> Path:
    """Path of a file of a folder, after checking that it lies there.

    Parameters
    ----------
    folder : Path
        The folder.
    name : str
        Name of a file in it; it may be a link to a blob of the hub's cache.
    named_by : str
        What names it, for the error.

    Raises
    ------
    MoeitsError
        If the name, or the link that it is, leaves the folder.
    """
    file = folder / name
    target, home = file.resolve(), folder.resolve()
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    leaves = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name
    if leaves or not (target.is_relative_to(home) or (file.is_symlink() and cached)):
        raise MoeitsError(
            f"{named_by} names {name!r}, which lies outside {folder}: a model is read from its own folder "
            "alone; put the file there and correct the name"
        )
    return file


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Find every tensor of a checkpoint, from the headers of its files.

    Parameters
    ----------
    folder : str or Path
        Folder with ``model.safetensors``, or with several files and their index.

    Returns
    -------
    dict of str to StoredTensor
        By name.

    Raises
    ------
    MissingError
        If there is no safetensors checkpoint, or a file that the index names is missing.
    MoeitsError
        If a file is cut short or is no safetensors file, does not hold what the index says, no more and no
        less, or lies outside the folder.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise MissingError(f"{folder} has neither {SINGLE} nor {INDEX}: only safetensors are read")
        return read_header(inside(folder, SINGLE, "the folder"))
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MoeitsError(f"{folder / INDEX} is not an index of safetensors files: {error!r}") from error
    for file in files:
        entry = next(name for name, place in places.items() if place == file)
        inside(folder, file, f"{folder / INDEX} ({entry})")
        if not (folder / file).is_file():
            count = sum(place == file for place in places.values())
            raise MissingError(f"{folder / file} is missing: the index says it holds {count} tensors")
    headers = {file: read_header(folder / file) for file in files}
    for name, file in places.items():
        if name not in headers[file]:
            raise MoeitsError(f"{folder / file} does not hold {name}, which the index says it does")
    for file, header in headers.items():
        if unnamed := sorted(set(header) - set(places)):
            raise MoeitsError(
                f"{folder / file} holds {unnamed[0]}, which the index does not name: add it there"
            )
    return {name: headers[file][name] for name, file in places.items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file, and check that the file is complete.

    Parameters
    ----------
    file : Path
        A safetensors file.

    Returns
    -------
    dict of str to StoredTensor
        Its tensors by name.

    Raises
    ------
    MoeitsError
        If it is cut short or is no safetensors file.

    References
    ----------
    The format: https://github.com/huggingface/safetensors#format
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        data = 8 + length
        if data > size:
            raise MoeitsError(f"{file} is cut short, or is no safetensors file")
        try:
            tensors = {
                name: StoredTensor(
                    name,
                    file,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    *(data + n for n in entry["data_offsets"]),
                )
                for name, entry in json.loads(stream.read(length)).items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MoeitsError(f"{file} is no safetensors file: {error!r}") from error
    end = max((tensor.stop for tensor in tensors.values()), default=data)
    if end > size:
        raise MoeitsError(f"{file} is cut short: it has {size:,} bytes of {end:,}")
    return tensors


def fingerprint(folder: str | Path) -> str:
    """Fingerprint a checkpoint: its configuration and all of its tensors.

    The digests of a file's tensors are remembered in the cache while the file keeps its size, time of change
    and inode.

    Parameters
    ----------
    folder : str or Path
        Folder of a checkpoint.

    Returns
    -------
    str
        64 hexadecimal digits. The same wherever the folder lies and however the tensors are spread over
        files; another one when the configuration or any weight changes.

    Raises
    ------
    MoeitsError
        As :func:`stored_tensors`.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    hashed = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors = stored_tensors(folder)
    by_file = defaultdict(list)
    for tensor in tensors.values():
        by_file[tensor.file].append(tensor)
    digests = {}
    with ThreadPoolExecutor() as threads:
        for file, held in by_file.items():
            names = [tensor.name for tensor in held]
            found = once_for_file(file, ["tensors", *names], lambda of=held: list(threads.map(_digest, of)))
            digests |= zip(names, found, strict=True)
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tensor.shape} {digests[name]}".encode())
    return hashed.hexdigest()


def _digest(tensor: StoredTensor) -> str:
    hashed = hashlib.sha256()
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        while left := tensor.stop - stream.tell():
            hashed.update(stream.read(min(left, _CHUNK)))
    return hashed.hexdigest()
