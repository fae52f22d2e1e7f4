"""Models of the hub: downloaded at a revision that is written down, and pushed with their cards.

Tokens come from the standard environment alone (``HF_TOKEN``, or what ``hf auth login`` wrote). An
interrupted download goes on where it stopped, and with ``HF_HUB_OFFLINE=1`` only what was downloaded
before is used.
"""

import json
import os
import re
import shutil
from pathlib import Path

from moeits.errors import MissingError, MoeitsError
from moeits.machine.paths import CACHE, whole
from moeits.models.folder import CARRIED
from moeits.models.safetensors import INDEX

FILES = (
    *("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md"),
)
"""What is downloaded: no pickled weights, no code."""

_ID = re.compile(r"(?:hub:)?([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


def find(model: str | Path, *, weights: bool = True) -> Path:
    """Find the folder of a model: a folder as it is given, or a model of the hub, downloaded if need be.

    Parameters
    ----------
    model : str or Path
        A folder, or ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` where there is no such folder.
    weights : bool, default=True
        Download the weights, too.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    MissingError
        If it is neither the one nor the other.
    MoeitsError
        As :func:`download`.
    """
    folder, named = Path(model).expanduser(), _ID.fullmatch(str(model))
    if folder.is_dir():
        return folder
    if named is None or isinstance(model, Path):
        raise MissingError(f"{model} is no model folder: there is no such folder")
    return download(*named.groups(), weights=weights)


def name_of(folder: str | Path) -> str:
    """Name of a model: its name on the hub where the folder is the hub's cache, else the folder's own."""
    folder = Path(folder).resolve()
    cached = re.fullmatch(r"models--(.+)", folder.parent.parent.name)
    return cached[1].replace("--", "/") if cached else folder.name


def download(
    repository: str, revision: str | None = None, *, pins: Path | None = None, weights: bool = True
) -> Path:
    """Download a model, or find it downloaded.

    Parameters
    ----------
    repository : str
        ``OWNER/NAME``.
    revision : str, optional
        Branch, tag or commit. Without it the commit of the first download, which is written down; at first
        the newest.
    pins : Path, optional
        Where the commits are written down; ``revisions.json`` in the cache by default. Delete a line to take
        the newest again.
    weights : bool, default=True
        Download the weights, too.

    Returns
    -------
    Path
        The folder. Its name is the commit.

    Raises
    ------
    MoeitsError
        If there is no such model or revision, its terms must be accepted first, it is not here and cannot be
        downloaded, or the disk is full. The message says what helps.
    """
    from huggingface_hub import errors, snapshot_download

    pins = pins or CACHE / "revisions.json"
    known = json.loads(pins.read_text()) if pins.exists() else {}
    asked = revision or known.get(repository)
    patterns = [pattern for pattern in FILES if weights or pattern != "*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, revision=asked, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise MoeitsError(
            f"{repository} is gated: accept its terms on the page of the model while logged in, then log in "
            "here with `hf auth login`, or set HF_TOKEN to a token that may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MoeitsError(
            f"{repository} has no revision {asked!r}: correct it in the profile or in {pins}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise MoeitsError(
            f"there is no model {repository} on the hub, or it is private: check the name, or log in with "
            "`hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = " HF_HUB_OFFLINE is set: unset it, or" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise MoeitsError(
            f"{repository} is neither a folder here nor a downloaded model, and cannot be downloaded:"
            f"{offline} give the folder of a model that you have, or run again with a network, which resumes "
            "the download"
        ) from error
    except OSError as error:
        free = shutil.disk_usage(next(place for place in (CACHE, *CACHE.parents) if place.exists())).free
        raise MoeitsError(
            f"the download of {repository} failed: {error}; {free / 1e9:.0f} GB are free here. Set HF_HOME "
            "to a larger disk if that is too little, and run again: it goes on where it stopped"
        ) from error
    if revision is None and repository not in known:
        with whole(pins) as part:
            part.write_text(json.dumps(known | {repository: folder.name}, indent=1) + "\n")
    return folder


PUSHED = (*CARRIED, "config.json", "kept.json", "README.md", "*.safetensors", INDEX, "*.py")
"""What is sent: the files that a pruned folder is made of."""


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Send the pruned model in a folder, with its card, to the hub.

    Parameters
    ----------
    folder : Path
        Folder of :func:`moeits.models.checkpoint.prune_checkpoint`.
    repository : str
        ``OWNER/NAME``.
    private : bool
        Make a repository that only its owner sees.

    Returns
    -------
    str
        Address of the upload.

    Raises
    ------
    MoeitsError
        If the folder is no pruned model or has no card, or the hub refuses or cannot be reached.

    Notes
    -----
    Files that moeits does not write into a folder stay at home: what was put there by hand may be private.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    check_pushable(folder)
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(PUSHED)))
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise MoeitsError(
            f"the hub refused: {error}; log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    except (HTTPError, OSError) as error:
        raise MoeitsError(
            f"the hub cannot be reached: {error}; nothing is lost: run again with a network"
        ) from error


def check_pushable(folder: Path) -> None:
    """Raise a ValueError unless a folder holds a pruned model and its card."""
    if not (folder / "kept.json").is_file():
        raise MoeitsError(f"{folder} is no pruned model: it has no kept.json")
    if not (folder / "README.md").is_file():
        raise MoeitsError(f"{folder} has no model card: make the folder anew with `moeits prune`")
