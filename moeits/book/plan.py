"""What a profile will take before it is run: seconds, memory, disk and energy of every step, on a machine.

Upper estimates from the models' configurations alone: a pruned model counts like the unpruned one, and
nothing is taken to be remembered from an earlier run. How long a computation takes follows from its
multiplications and from what the machine can do, of which a program of this kind reaches about a third.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moeits.book import run
from moeits.errors import MoeitsError
from moeits.healing.recipe import Recipe
from moeits.machine import devices
from moeits.machine.paths import CACHE, DATA
from moeits.study import comparison, paper, profiles, records, standin
from moeits.study.profiles import ModelSettings, Profile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DOWNLOAD, DISK = 50e6, 500e6  # bytes per second
_STARTING = 20  # seconds until a process has loaded its libraries
_CHARACTERS = 4  # per token
_WORKING = 2**30  # bytes of activations and libraries beside a model that is scored
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}  # of a weight
_LOGITS = 10  # bytes for each logit of a training batch: 16 and 32 bits, and the gradient


@dataclass(frozen=True)
class Machine:
    """What there is to compute with.

    Attributes
    ----------
    name : str
        In words.
    memory : float
        Bytes that models may fill: of the GPU, or the machine's own without one.
    flops : float
        Operations per second in `dtype`, at best.
    watts : float
        Power under load.
    cores : int
        Processor cores, for what runs on them alone.
    disk : float
        Free bytes where models are kept.
    dtype : str, default="bfloat16"
        The type that models compute in, as :func:`moeits.machine.devices.choose` takes it.
    """

    name: str
    memory: float
    flops: float
    watts: float
    cores: int
    disk: float
    dtype: str = "bfloat16"


# Memory, dense bfloat16 (T4: float16) operations per second and power, as the makers' data sheets have them.
GPUS = {
    "t4": (16e9, 65e12, 70),
    "rtx-4090": (24e9, 165e12, 450),
    "a100-80gb": (80e9, 312e12, 400),
    "h100": (80e9, 989e12, 700),
    "h200": (141e9, 989e12, 700),
}


@dataclass(frozen=True)
class Demand:
    """What one step takes: seconds, bytes of memory, bytes that stay on disk, and where the memory is."""

    label: str
    seconds: float
    memory: float
    disk: float
    on_gpu: bool


def find_machine(gpu: str | None = None) -> Machine:
    """Look at this machine, or take a GPU from its data sheet.

    Parameters
    ----------
    gpu : str, optional
        A key of :data:`GPUS`: this machine's processors and disk with that GPU. By default what is here.

    Raises
    ------
    MoeitsError
        If there is no such entry.
    """
    place = next(folder for folder in (CACHE, *CACHE.parents) if folder.exists())
    here = {"cores": len(os.sched_getaffinity(0)), "disk": shutil.disk_usage(place).free}
    if gpu is not None:
        if gpu not in GPUS:
            raise MoeitsError(f"no data of the GPU {gpu!r}: there are those of {', '.join(GPUS)}")
        return Machine(gpu, *GPUS[gpu], **here)
    import torch

    device, dtype, _ = devices.choose()
    flops = devices.flops(device, dtype)
    here["dtype"] = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        name = torch.cuda.get_device_name(0)
        memory = sum(torch.cuda.get_device_properties(i).total_memory for i in range(count))
        return Machine(f"{count} x {name}", memory, count * flops, count * _power_limit(), **here)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    watts = 10.0 * here["cores"]  # a guess: few machines without a GPU say
    return Machine(f"{here['cores']} CPU cores", memory, flops, watts, **here)


def demands(profile: Profile, machine: Machine) -> list[Demand]:
    """Estimate what each step of a profile takes, in the order of the run.

    Parameters
    ----------
    profile : Profile
        The settings. Its models must be the paper's, of the small profile, or folders that exist.
    machine : Machine
        Where it shall run.

    Raises
    ------
    MoeitsError
        If a model has yet to be made, so that there is no configuration to count on.
    """
    costs = {
        name: _Costs(
            profile,
            _config(settings),
            machine,
            sum(_tokens(task, profile) for task in settings.tasks or profile.tasks),
        )
        for name, settings in profile.models.items()
    }
    found = []
    for step in run.measurements(profile):
        cost = costs[step.model]
        found.append(Demand(step.label, *getattr(cost, step.stage.lower())(step.way)))
    return found


def standin_memory(name: str, layers: int, recipe: Recipe) -> dict[str, float]:
    """Estimate the memory of steps on a stand-in for one of the paper's models.

    Parameters
    ----------
    name : str
        A key of :func:`moeits.study.standin.names`.
    layers : int
        Its decoder layers.
    recipe : Recipe
        How it is healed.

    Returns
    -------
    dict of str to float
        Bytes for ``nmi``, ``heal`` and ``evaluate``, the commands of the package.
    """
    config = _paper_config(standin.shapes()[standin.names()[name]], num_hidden_layers=layers)
    profile = profiles.load("paper").model_copy(update={"healing": recipe})
    costs = _Costs(profile, config, find_machine("h100"), 0)
    return {"nmi": costs.nmi("")[1], "heal": costs.healing("lora")[1], "evaluate": costs.scores("")[1]}


def shortages(found: Iterable[Demand], machine: Machine, *, offload: bool = False) -> list[str]:
    """Say what is short, and what would help.

    Parameters
    ----------
    found : iterable of Demand
        What is needed.
    machine : Machine
        What is there.
    offload : bool
        Whether models that are scored may lie partly outside the GPU.
    """
    found = list(found)
    short = []
    for demand in found:
        scored = "lora" not in demand.label or demand.label.endswith("scores")
        if demand.on_gpu and demand.memory > machine.memory and not (offload and scored):
            help_ = (
                "take a larger or a second GPU, or device_map: auto"
                if scored
                else "take a larger GPU, fewer sequences at a time (batch_size down, accumulation up), "
                "or several GPUs (device_map: auto)"
            )
            needed, there = demand.memory / 1e9, machine.memory / 1e9
            short.append(f"{demand.label}: needs {needed:.0f} GB of {there:.0f} GB: {help_}")
    if (disk := sum(demand.disk for demand in found)) > machine.disk:
        short.append(
            f"disk: {disk / 1e9:.0f} GB of {machine.disk / 1e9:.0f} GB free in {CACHE}: make room, "
            "or set HF_HOME to a larger disk"
        )
    return short


def table(found: Sequence[Demand], machine: Machine) -> pd.DataFrame:
    """Tabulate demands: hours, GB of memory and of disk, kWh; the last row is the sum."""
    rows = [
        {
            "step": demand.label,
            "hours": demand.seconds / 3600,
            "memory (GB)": demand.memory / 1e9,
            "disk (GB)": demand.disk / 1e9,
            "energy (kWh)": demand.seconds * machine.watts / 3.6e6,
        }
        for demand in found
    ]
    frame = pd.DataFrame(rows)
    sums = frame.drop(columns=["step", "memory (GB)"]).sum()
    last = {"step": "in all", "memory (GB)": frame["memory (GB)"].max()} | sums.to_dict()
    return pd.concat([frame, pd.DataFrame([last])], ignore_index=True)


class _Costs:
    """Demands of one model, a method for each stage: (seconds, memory, disk, whether on the GPU)."""

    def __init__(
        self, profile: Profile, config: "PreTrainedConfig", machine: Machine, questions: float
    ) -> None:
        from moeits.models.families import expert_block, moe_layers, sizes
        from moeits.models.folder import hollow_model

        self.profile, self.machine, self.questions = profile, machine, questions
        model = hollow_model(config)
        self.size = sizes(model)
        self.held = self.size.total * _BYTES[machine.dtype]  # in memory; on disk as they are stored
        layers = moe_layers(model)
        self.matrices = [
            (layer.num_experts, tuple(weights.shape[1:]))
            for layer in layers
            for weights in expert_block(layer).values()
        ]
        self.model, self.config = model, model.config.get_text_config()

    @property
    def _loading(self) -> float:
        return _STARTING + self.size.bytes / DISK

    def _computing(self, tokens: float, passes: float = 1) -> float:
        return 2 * passes * self.size.active * tokens / (devices.REACHED * self.machine.flops)

    def models(self, _: str | None) -> tuple[float, float, float, bool]:
        return self.size.bytes / DOWNLOAD, 0, self.size.bytes, False

    def nmi(self, _: str | None) -> tuple[float, float, float, bool]:
        pairs = sum(experts * (experts - 1) / 2 * prod(shape) for experts, shape in self.matrices)
        codes = max(2 * experts * prod(shape) for experts, shape in self.matrices)
        return pairs * _seconds_per_weight() / self.machine.cores, codes + _WORKING, 0, False

    def scores(self, _: str | None) -> tuple[float, float, float, bool]:
        tokens = self.questions + (self.profile.heldout_tokens or 2**14)
        return self._loading + self._computing(tokens), self.held + _WORKING, 0, True

    protocols = scores  # at most: most have fewer shots

    def controls(self, _: str | None) -> tuple[float, float, float, bool]:
        tokens = self.profile.heldout_tokens or 2**14
        once = self._loading + self._computing(tokens)
        return self.profile.random_draws * once, self.held + _WORKING, 0, True

    def green(self, _: str | None) -> tuple[float, float, float, bool]:
        from moeits.study.cost import VARIANTS

        return len(VARIANTS) * (2 * self._loading + 60), self.held + _WORKING, self.size.bytes, True

    def rivals(self, _: str | None) -> tuple[float, float, float, bool]:
        tokens = self.profile.calibration_tokens + (self.profile.heldout_tokens or 2**14)
        return self._loading + self._computing(tokens), self.held + _WORKING, 0, True

    def finals(self, _: str | None) -> tuple[float, float, float, bool]:
        methods, ways = len(comparison.FINALISTS) + 1, self.profile.rival_healings
        scored, memory, *_ = self.scores(None)
        healed = [self.healing(way) for way in ways]
        seconds = (1 + methods * (1 + len(ways))) * scored + methods * sum(cost[0] for cost in healed)
        return seconds, max([memory, *(cost[1] for cost in healed)]), 0, True

    def healing(self, way: str | None) -> tuple[float, float, float, bool]:
        way = way or ""
        seconds, memory = 2 * self._loading, float(self.held + _WORKING)
        if "refit" in way:
            seconds += 2 * self._computing(self.profile.refit_tokens)
            memory += self.held
        if "lora" in way and (recipe := self.profile.healing):
            at_once = recipe.batch_size * recipe.max_tokens
            # Backward costs twice the forward pass, and with checkpointing that is done again.
            passes = 4 if recipe.gradient_checkpointing else 3
            seconds += self._computing(recipe.steps * recipe.accumulation * at_once, passes)
            # Adapters with gradient and two moments in 32 bits.
            trained = 16 * self._adapters(recipe.preset, recipe.rank)
            layers = self.config.num_hidden_layers * (1 if recipe.gradient_checkpointing else 12)
            activations = at_once * (2 * self.config.hidden_size * layers + _LOGITS * self.config.vocab_size)
            memory = max(memory, self.held + _WORKING + trained + activations)
        return seconds, memory, self.size.bytes, True

    def _adapters(self, preset: str, rank: int) -> int:
        """Parameters of the adapters: of the experts, and by the preset "official" of all linear maps."""
        from torch.nn import Linear

        maps = [shape for experts, shape in self.matrices for _ in range(experts)]
        if preset == "official":
            maps += [
                tuple(module.weight.shape)
                for name, module in self.model.named_modules()
                if isinstance(module, Linear) and name != "lm_head"
            ]
        return rank * sum(map(sum, maps))


def _config(settings: ModelSettings) -> "PreTrainedConfig":
    from transformers import AutoConfig

    from moeits.models.folder import read_config

    kind, _, rest = settings.source.partition(":")
    if kind == "miniature":
        raise MoeitsError(
            f"{settings.title} is made by the run itself, so there is nothing to count on yet; the laptop "
            "profile takes about ten minutes on two cores"
        )
    if kind == "trained":
        from moeits.study import trained

        return read_config(trained.finished_folder(rest))
    if kind == "hub":
        for model in standin.shapes().values():
            if rest in [model["checkpoint"], *model.get("like", [])]:
                return _paper_config(model)
        return AutoConfig.from_pretrained(rest, revision=settings.revision)
    return read_config(Path(settings.source).expanduser())


def _paper_config(model: Mapping[str, Any], **changes: Any) -> "PreTrainedConfig":
    """Make the configuration of one of :func:`moeits.study.paper.models`, with some settings changed."""
    from transformers import CONFIG_MAPPING

    shape = model["config"] | changes
    return CONFIG_MAPPING[shape.pop("model_type")](**shape, dtype="bfloat16")


def _seconds_per_weight() -> float:
    """Processor seconds of the NMI for each weight of a pair of matrices, as the benchmark measured them."""
    bench = records.latest("bench-nmi", DATA / "reference" / "laptop")
    found = {(row["model"], row["metric"], row["variant"]): row["value"] for row in bench.rows}
    shape = paper.models()["Qwen1.5-MoE"]["config"]
    per_pair = found["Qwen1.5-MoE", "processor time per pair", "normal"]
    return per_pair / (shape["hidden_size"] * shape["moe_intermediate_size"])


def _tokens(task: str, profile: Profile) -> float:
    """Tokens that a model reads to answer a task's questions, from the length of packaged questions."""
    from moeits import evaluation

    loaded = evaluation.load_task(task)
    documents = list(loaded.eval_docs)
    sample = [documents[i] for i in evaluation.sample_questions(task, len(documents), 32, 0)]
    length = sum(len(str(loaded.doc_to_text(doc))) + 20 for doc in sample) / len(sample) / _CHARACTERS
    asked = min(profile.questions_at_page_tau or profile.questions or inf, len(documents))
    return asked * length * (profile.shots + 1)


def _power_limit() -> float:
    """Power limit of the first GPU in watts, by the driver's own tool; 400 where that does not say."""
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return 400.0
