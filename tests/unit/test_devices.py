"""Which device and number format are taken."""

import pytest
import torch

from moeits.machine import devices


@pytest.fixture
def gpus(monkeypatch):
    """Let torch find CUDA devices that multiply bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"GPU {place.index}")
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("fast", [True, False])
def test_a_processor_without_bfloat16_computes_in_float32(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    place, dtype, reason = devices.choose("cpu")
    assert (place.type, dtype) == ("cpu", torch.bfloat16 if fast else torch.float32)
    assert reason == f"this processor {'multiplies' if fast else 'does not multiply'} bfloat16 in hardware"


@pytest.mark.usefixtures("gpus")
def test_auto_takes_a_gpu():
    place, dtype, reason = devices.choose()
    assert (place.type, dtype) == ("cuda", torch.bfloat16)
    assert "GPU" in reason


@pytest.mark.usefixtures("gpus")
def test_each_of_several_processes_takes_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert devices.choose()[0] == torch.device("cuda", 2)
    assert devices.choose("cuda:1")[0] == torch.device("cuda", 1)
    assert devices.choose("cpu")[0] == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("abacus", "auto", "device 'abacus' is none that torch knows"),
        ("cuda", "auto", "this machine has no CUDA device"),
        ("cpu", "bf16", "dtype 'bf16' is none that torch knows"),
    ],
)
def test_what_is_not_there_is_an_error(monkeypatch, device, dtype, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        devices.choose(device, dtype)
