import itertools
import os
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_model
from torch.overrides import TorchFunctionMode

from moeits.book import plan
from moeits.cli import main
from moeits.models.families import sizes
from moeits.models.folder import hollow_model, read_config
from moeits.study import profiles

BIG = plan.Machine("big", memory=1e12, flops=1e15, watts=1000, cores=64, disk=1e13)


@pytest.fixture
def profile(tmp_path):
    folder = tmp_path / "model"
    tiny_model("mixtral").save_pretrained(folder)
    paper = profiles.load("paper").model_dump()
    paper["models"] = {"tiny": paper["models"]["mixtral-8x7b"] | {"source": str(folder)}}
    paper["healed"] = {"tiny": {0.5: ["refit", "lora"]}}
    paper["green"] = paper["rival_models"] = paper["protocol_models"] = ["tiny"]
    return profiles.Profile(**paper | {"documents": "packaged"})


def by_label(found):
    return {demand.label: demand for demand in found}


def test_every_step_of_the_paper_profile_has_a_demand():
    found = by_label(plan.demands(profiles.load("paper"), BIG))
    assert found["mixtral-8x7b: checkpoint"].disk == pytest.approx(93.4e9, rel=0.01)
    assert found["qwen1.5-moe: checkpoint"].disk == pytest.approx(28.6e9, rel=0.01)
    scores, healing = found["qwen1.5-moe: tau = 1.25"], found["qwen1.5-moe: tau = 1.25, lora"]
    assert scores.on_gpu
    assert 28.6e9 < scores.memory < healing.memory < 80e9
    assert not found["qwen1.5-moe: NMI"].on_gpu
    assert found["qwen1.5-moe: NMI"].memory < 3e9
    assert not plan.shortages(found.values(), BIG)


def test_the_small_profile_fits_one_gpu_of_24_gb_and_is_counted_without_the_hub():
    profile, machine = profiles.load("small"), plan.find_machine("rtx-4090")
    found = by_label(plan.demands(profile, machine))
    checkpoints = {name: found[f"{name}: checkpoint"].disk for name in profile.models}
    assert checkpoints["llm-jp-btx"] == checkpoints["llm-jp-fs"] == pytest.approx(833e6, rel=0.001)
    assert checkpoints["olmoe-1b-7b"] == pytest.approx(13.84e9, rel=0.001)
    assert checkpoints["granite-1b-a400m"] == pytest.approx(2.67e9, rel=0.01)
    assert max(demand.memory for demand in found.values()) < 24e9
    assert [line for line in plan.shortages(found.values(), machine) if not line.startswith("disk")] == []


def test_the_nmi_costs_as_many_weights_as_there_are_pairs(profile):
    found = by_label(plan.demands(profile, BIG))
    twice = plan.Machine(**vars(BIG) | {"cores": 128})
    one, other = found["tiny: NMI"].seconds, by_label(plan.demands(profile, twice))["tiny: NMI"].seconds
    assert one == pytest.approx(2 * other)


def test_more_shots_and_steps_take_longer_and_a_larger_batch_more_memory(profile):
    slow = plan.Machine(**vars(BIG) | {"flops": 1e6})

    def demand(label, **changes):
        healing = profile.healing.model_copy(update=changes.pop("healing", {}))
        changed = profile.model_copy(update=changes | {"healing": healing})
        return by_label(plan.demands(changed, slow))[label]

    assert demand("tiny: tau = 0.5", shots=15).seconds > 2 * demand("tiny: tau = 0.5", shots=0).seconds
    lora = "tiny: tau = 0.5, lora"
    twice = demand(lora, healing={"steps": 1000}).seconds - demand(lora, healing={"steps": 500}).seconds
    once = demand(lora, healing={"steps": 500}).seconds - demand(lora, healing={"steps": 0}).seconds
    assert twice == pytest.approx(once)
    two, four, eight = (demand(lora, healing={"batch_size": size}).memory for size in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two))
    assert four > two


def test_what_is_short_is_said_with_what_would_help():
    found = plan.demands(profiles.load("paper"), plan.find_machine("h100"))
    short = plan.shortages(found, plan.Machine("one", 80e9, 1e15, 700, 16, 1e9))
    assert any("mixtral-8x7b: whole model: needs 94 GB of 80 GB" in line for line in short)
    assert any(line.startswith("disk: ") and "of 1 GB free" in line for line in short)
    offloaded = plan.shortages(found, plan.Machine("one", 80e9, 1e15, 700, 16, 1e13), offload=True)
    assert offloaded
    assert all("lora" in line and "fewer sequences" in line for line in offloaded)


def test_the_command_prints_the_plan_and_fails_where_it_does_not_fit():
    done = CliRunner().invoke(main, ["run", "--profile", "paper", "--dry-run", "--on", "rtx-4090"])
    assert done.exit_code == 1
    assert "rtx-4090: 24 GB" in done.output
    assert "qwen1.5-moe: tau = 1.25, lora" in done.output
    assert "it does not fit" in done.output
    unknown = CliRunner().invoke(main, ["run", "--profile", "paper", "--dry-run", "--on", "abacus"])
    assert (
        "no data of the GPU 'abacus': there are those of t4, rtx-4090, a100-80gb, h100, h200"
        in unknown.output
    )
    laptop = CliRunner().invoke(main, ["run", "--dry-run"])
    assert "is made by the run itself" in laptop.output


class Products(TorchFunctionMode):
    """The types of the matrices that are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.matmul:
            self.dtypes.add(args[0].dtype)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_machines_speed_is_measured_in_the_type_that_models_compute_in(dtype, monkeypatch):
    monkeypatch.setattr(plan.devices, "choose", lambda: (torch.device("cpu"), dtype, "as the test wants"))
    ticks = itertools.count(step=0.5)  # no clock: how fast this processor is does not matter
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    with Products() as products:
        machine = plan.find_machine()
    assert products.dtypes == {dtype}
    assert f"torch.{machine.dtype}" == str(dtype)
    assert machine.flops == 2 * 1024**3 / 0.5
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.memory > 1e9


def test_models_take_twice_the_memory_in_float32_but_no_more_disk(profile):
    half = by_label(plan.demands(profile, BIG))
    full = by_label(plan.demands(profile, replace(BIG, dtype="float32")))
    config = read_config(profile.models["tiny"].source)
    weights = sizes(hollow_model(config)).total
    for label in ("tiny: whole model", "tiny: tau = 0.5", "tiny: tau = 0.5, refit"):
        models = 2 if "refit" in label else 1
        assert full[label].memory - half[label].memory == models * 2 * weights
        assert full[label].disk == half[label].disk
