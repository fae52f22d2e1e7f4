"""Counters of energy, of processors and of GPUs that are not here."""

import pynvml
import pytest

from moeits.study import energy, records
from moeits.study.measurement import Measurement


@pytest.fixture
def no_counters(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: fail_nvml(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))


def fail_nvml(code):
    raise pynvml.NVMLError(code)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs as NVML shows them, with their millijoules."""
    millijoules = [1_500, 2_500]
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: i)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda i: millijoules[i])
    return millijoules


def add_packages(folder):
    for name, microjoules in [("intel-rapl:0", 2_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 9)]:
        (folder / name).mkdir()
        (folder / name / "energy_uj").write_text(f"{microjoules}\n")


@pytest.mark.usefixtures("no_counters")
def test_no_counter_no_energy():
    assert energy.joules() == {}
    assert energy.spent({}, {}) is None


@pytest.mark.usefixtures("no_counters")
def test_processors_are_the_sum_of_the_packages(tmp_path):
    add_packages(tmp_path)
    assert energy.joules() == {"processors": 2.5}


@pytest.mark.usefixtures("no_counters", "gpus")
def test_gpus_are_added_in_joules():
    assert energy.joules() == {"GPUs": 4.0}


@pytest.mark.usefixtures("no_counters", "gpus")
def test_a_gpu_without_a_counter_is_no_error(monkeypatch):
    refuse = lambda _: fail_nvml(pynvml.NVML_ERROR_NOT_SUPPORTED)  # noqa: E731
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    assert energy.joules() == {}


def test_a_counter_that_began_anew_tells_nothing():
    assert energy.spent({"processors": 5.0, "GPUs": 1.0}, {"processors": 7.5, "GPUs": 1.0}) == {
        "processors": 2.5,
        "GPUs": 0.0,
    }
    assert energy.spent({"processors": 5.0}, {"processors": 1.0}) is None


@pytest.mark.usefixtures("no_counters")
def test_a_record_has_the_energy_of_its_measurement(gpus, tmp_path):
    def measure():
        gpus[0] += 3_000
        return [records.row(model="m", value=1.0)], {}

    record = Measurement(tmp_path / "records", "step", {}, measure).record()
    assert record.provenance["joules"] == {"GPUs": 3.0}
