"""Independent tasks, one after the other or spread over processes and machines; joblib schedules them."""

from collections.abc import Iterable, Iterator
from typing import Any

import joblib

from moeits.errors import MoeitsError


def unordered(tasks: Iterable[Any], backend: str | None = None, **options: Any) -> Iterator[Any]:
    """Do tasks; their results come as they are done, with Ray when all are.

    Parameters
    ----------
    tasks : iterable
        Made by ``joblib.delayed``.
    backend : str, optional
        Backend of joblib: ``"loky"`` for processes of this machine, ``"dask"`` or ``"ray"`` for a cluster
        whose machines share this folder. None does one task after the other, here.
    **options
        For the backend, such as ``scheduler_host`` for Dask, or ``n_jobs``.

    Raises
    ------
    MoeitsError
        If the backend is Ray, and Ray is not installed.
    """
    if backend == "ray":  # which joblib does not know by itself
        try:
            from ray.util.joblib import register_ray
        except ModuleNotFoundError as error:
            raise MoeitsError(
                "the backend ray needs Ray on every machine, which is no part of this environment "
                f"({error}): install it beside the package (uv pip install ray), or take --backend loky or "
                "dask"
            ) from error
        register_ray()
    kind = "list" if backend == "ray" else "generator_unordered"  # Ray's backend has no generators
    with joblib.parallel_config(backend or "sequential", **{"n_jobs": -1} | options):
        yield from joblib.Parallel(return_as=kind)(tasks)
