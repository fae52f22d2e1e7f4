"""Work spread over processes: a Dask cluster of two workers on this machine, one of which is killed."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import joblib
import pytest
from distributed import Client, LocalCluster

from moeits.study import pipeline, records
from moeits.study.measurement import Measurement
from moeits.study.pipeline import Step

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster():
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield cluster, client


def measure(folder: Path, number: int, victim: Path | None = None) -> records.Record:
    """Remember a square. The first one to find the victim's name ends its own process."""

    def square():
        if victim is not None and number == 3:
            try:
                victim.unlink()
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return [records.row(metric="square", value=number**2)], {}

    return Measurement(folder, "square", {"number": number}, square).record()


def steps(folder, **options):
    return [
        Step("scores", f"number {number}", partial(measure, folder, number, **options)) for number in range(6)
    ]


def test_a_killed_worker_loses_nothing(cluster, tmp_path):
    victim = tmp_path / "victim"
    victim.touch()
    said = []
    found = pipeline.do(
        steps(tmp_path / "records", victim=victim),
        say=said.append,
        backend="dask",
        scheduler_host=cluster[0].scheduler_address,
    )
    assert not victim.exists()  # so that a worker was killed
    assert [record.rows[0]["value"] for record in found] == [0, 1, 4, 9, 16, 25]
    assert len(said) == 6
    assert len(list((tmp_path / "records").glob("square-*.json"))) == 6


def test_without_a_scheduler_the_next_run_does_what_is_left(cluster, tmp_path):
    folder = tmp_path / "records"
    address = cluster[0].scheduler_address
    pipeline.do(steps(folder)[:4], say=lambda _: None, backend="dask", scheduler_host=address)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    cluster[1].close()
    cluster[0].close()
    found = pipeline.do(steps(folder), say=lambda _: None)
    assert [record.rows[0]["value"] for record in found] == [0, 1, 4, 9, 16, 25]
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert before.items() <= after.items()
    assert len(after) == 6


def test_later_phases_wait_for_earlier_ones(tmp_path):
    marks = tmp_path / "marks"

    def second():
        return marks.read_text()

    found = pipeline.do(
        [
            Step("scores", "reads", second, phase=2),
            Step("models", "writes", lambda: marks.write_text("made"), phase=0),
        ],
        say=lambda _: None,
        backend="loky",
        n_jobs=2,
    )
    assert found == ["made", 4]


def test_a_backend_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="install it beside the package"):
        pipeline.do(steps(tmp_path / "records"), say=lambda _: None, backend="ray")
    assert not (tmp_path / "records").exists()


def layers_of_the_nmi(tmp_path, monkeypatch, **spread):
    """Measure the NMI of a small model with a backend and without."""
    from tiny import tiny_model

    from moeits.models import checkpoint

    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    for name, options in {"cache": spread, "other": {}}.items():
        monkeypatch.setattr(checkpoint, "CACHE", tmp_path / name)
        yield checkpoint.measure_nmi(tmp_path / "model", **options)[0]


def test_layers_of_the_nmi_are_spread_over_workers(cluster, tmp_path, monkeypatch):
    address = cluster[0].scheduler_address
    spread, here = layers_of_the_nmi(tmp_path, monkeypatch, backend="dask", scheduler_host=address)
    assert joblib.hash(spread) == joblib.hash(here)


def test_layers_of_the_nmi_are_spread_by_ray(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is no part of the environment")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        spread, here = layers_of_the_nmi(tmp_path, monkeypatch, backend="ray")
    finally:
        ray.shutdown()
    assert joblib.hash(spread) == joblib.hash(here)
