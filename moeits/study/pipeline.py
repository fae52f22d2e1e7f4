"""The study of a model: each of its measurements is taken once."""

import gc
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np

from moeits.errors import MoeitsError
from moeits.healing.recipe import Recipe
from moeits.machine import devices
from moeits.machine.keys import by_value, code_digest, digest, versions
from moeits.machine.paths import CACHE, DATA, whole
from moeits.machine.spread import unordered
from moeits.selection import Selection, select_experts
from moeits.study import records
from moeits.study.measurement import Measurement
from moeits.study.profiles import HEALINGS, ModelSettings, Profile, Protocol
from moeits.study.records import Record

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Study:
    """One model in one profile. Every property and method finds what was done before, or does it.

    Attributes
    ----------
    profile : Profile
        The settings.
    name : str
        Name of one of the profile's models.
    """

    profile: Profile
    name: str

    def __post_init__(self) -> None:
        self.profile.model(self.name)

    @property
    def settings(self) -> ModelSettings:
        """The model's part of the profile."""
        return self.profile.model(self.name)

    @property
    def records(self) -> Path:
        """Folder of this profile's records."""
        return DATA / "results" / self.profile.name

    @property
    def source(self) -> str:
        """Where the checkpoint comes from, as the profile says it."""
        return self.settings.source

    @property
    def tasks(self) -> list[str]:
        """Tasks that the model is asked."""
        return self.settings.tasks or self.profile.tasks

    @cached_property
    @by_value
    def folder(self) -> Path:
        """Folder of the unpruned checkpoint: built, downloaded or as given."""
        kind, _, rest = self.source.partition(":")
        if kind == "trained":
            here = DATA / "models" / rest
            if (here / "training.json").exists():
                return here  # without importing what trains, which takes seconds
            from moeits.study import trained

            return trained.finished_folder(rest)
        if kind == "miniature":
            code = code_digest("moeits.study.miniature:build")
            key = digest([self.checkpoint, code, versions()])
            folder = CACHE / "miniature" / f"{rest}-{key}"
            if not folder.exists():
                from moeits.study import miniature

                asked = {"tokens": self.profile.carving_tokens, "layers": self.profile.carving_layers}
                with whole(folder, once=True) as part:
                    miniature.build(rest, part, **asked)
            return folder
        if kind == "hub":
            from moeits.models import hub

            return hub.download(rest, self.settings.revision)
        return Path(self.source).expanduser()

    @property
    def architecture(self) -> str:
        """Class of the model in transformers."""
        return json.loads((self.folder / "config.json").read_text())["architectures"][0]

    @property
    def facts(self) -> dict[str, Any]:
        """What the maker of a split model says of it: layout, shares, perplexities."""
        return json.loads((self.folder / "miniature.json").read_text())

    @property
    def checkpoint(self) -> str | dict[str, Any]:
        """What a split model is made of, the same on every machine; of others the fingerprint."""
        kind, _, rest = self.source.partition(":")
        if kind != "miniature":
            return self.fingerprint
        return {"made": rest, "tokens": self.profile.carving_tokens, "layers": self.profile.carving_layers}

    @cached_property
    @by_value
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint."""
        from moeits.models.safetensors import fingerprint

        return fingerprint(self.folder)

    def measurement(
        self,
        step: str,
        inputs: Mapping[str, Any],
        measure: Callable[[], tuple[list[dict], dict]],
        *,
        on: Mapping[str, str] | None = None,
        code: tuple[Callable, ...] = (),
        **provenance: Any,
    ) -> Measurement:
        """Make a measurement of this model.

        Parameters
        ----------
        step, inputs, measure, code
            As of :class:`Measurement`; the inputs without the model.
        on : mapping of str to str, optional
            Keys of the measurements that it builds on, beside the model's weights.
        **provenance
            Facts about the run.
        """
        if self.source.startswith("hub:"):
            provenance["revision"] = self.folder.name
        asked = {"model": self.name, "checkpoint": self.checkpoint, **inputs}
        built_on = {"fingerprint": self.fingerprint, **(on or {})}
        return Measurement(self.records, step, asked, measure, built_on, code, provenance)

    @property
    def _nmi(self) -> Measurement:
        return self.measurement("nmi", {"preset": self.profile.preset}, self._measure_nmi)

    @cached_property
    @by_value
    def nmi(self) -> Record:
        """Record of the NMI: mean, IQR and extremes of every layer, seconds."""
        return self._nmi.record()

    @property
    @by_value
    def matrices(self) -> dict[int, np.ndarray]:
        """NMI matrix of every Mixture-of-Experts layer, shape (E, E), by the profile's preset."""
        return self._measured[0]

    @by_value
    def selections(self, tau: float) -> dict[int, Selection]:
        """Kept and removed experts of every layer at one tau."""
        matrices, made_by = self._measured
        options = {"diagonal": made_by["diagonal"], "at_least": made_by["minimum"]}
        options["groups"] = made_by.get("groups", 1)
        return {layer: select_experts(R, tau, **options) for layer, R in matrices.items()}

    @by_value
    def scores(self, tau: float | None = None) -> Record:
        """Record of the sizes, the held-out perplexity and the benchmark scores at one tau, unhealed.

        Parameters
        ----------
        tau : float, optional
            Intensity; without it the whole model is measured.
        """
        return self._scores(tau).record()

    @by_value
    def _kept(self, tau: float) -> dict[int, list[int]]:
        return {layer: list(chosen.kept) for layer, chosen in self.selections(tau).items()}

    @property
    def healings(self) -> list[tuple[float, str]]:
        """Tau and way of everything that the profile heals."""
        taus = self.profile.healed.get(self.name, {})
        return [(tau, way) for tau, ways in taus.items() for way in ways]

    @property
    def healings_found(self) -> list[tuple[float, str, int]]:
        """Tau, way and seed of the profile's, and of what else was healed before, as by ``moeits ablate``."""
        wanted = [(tau, way, 0) for tau, way in self.healings]
        ways, seeds = filter(self.profile.can_heal, HEALINGS), range(self.profile.ablation_seeds)
        others = [at for at in product(self.ablation_taus, ways, seeds) if at not in wanted]
        # By their scores: models that keep the same experts at two taus share one healing.
        return wanted + [at for at in others if self._scores(*at).exists()]

    @by_value
    def healing(self, tau: float, way: str, seed: int = 0) -> Record:
        """Record of a healing: seconds and, layer by layer or step by step, what it reached.

        Parameters
        ----------
        tau : float
            Intensity of the pruning.
        way : str
            One of :data:`moeits.study.profiles.HEALINGS`.
        seed : int
            Is added to the recipe's seed.
        """
        return self._healing(tau, way, seed).record()

    @by_value
    def healed_scores(self, tau: float, way: str, seed: int = 0) -> Record:
        """Record of the scores of the model pruned at `tau` and healed.

        Parameters
        ----------
        tau, way, seed
            As in :meth:`healing`.
        """
        return self._scores(tau, way, seed).record()

    @by_value
    def protocol_scores(self, protocol: Protocol, tau: float | None = None, way: str | None = None) -> Record:
        """Record of the scores by another protocol, with the questions of the profile.

        Parameters
        ----------
        protocol : Protocol
            Shots and chat template.
        tau : float, optional
            Intensity; without it the whole model is measured.
        way : str, optional
            How the pruned model is healed, as in :meth:`healing`; not at all by default.
        """
        return self._scores(tau, way, protocol=protocol).record()

    @property
    def protocol_states(self) -> list[tuple[float | None, str | None]]:
        """Tau and way to heal of the models that other protocols score: whole, pruned, healed by LoRA."""
        own = self.settings.tau
        return [(None, None), (own, None), *([(own, "lora")] if (own, "lora") in self.healings else [])]

    def measurements(self, step: str) -> Iterator[Measurement]:
        """Go through all measurements of a kind that can be taken of this model, as the settings are now.

        Parameters
        ----------
        step : str
            Step of the records: ``"nmi"``, ``"scores"``, ``"protocol"``, ``"healing"`` or ``"green"``; of
            others there are none.
        """
        ways = filter(self.profile.can_heal, HEALINGS)
        healed = product(self.ablation_taus, ways, range(self.profile.ablation_seeds))
        match step:
            case "nmi":
                yield self._nmi
            case "scores":
                yield self._scores()
                yield from map(self._scores, self.ablation_taus)
                yield from self._controls(self.settings.tau)
                yield from (self._scores(*at) for at in healed)
            case "protocol":
                for protocol, (tau, way) in product(self.profile.protocols, self.protocol_states):
                    yield self._scores(tau, way, protocol=protocol)
            case "healing":
                yield from (self._healing(*at) for at in healed)
            case "green":
                yield self._green

    def _recipe(self, way: str, seed: int) -> Recipe | None:
        recipe = self.profile.healing
        if "lora" not in way or recipe is None:
            return None
        return recipe.model_copy(update={"seed": recipe.seed + seed})

    @by_value
    def _healing(self, tau: float, way: str, seed: int = 0) -> Measurement:
        if way not in HEALINGS:
            raise MoeitsError(f"no way to heal is called {way!r}: there are {', '.join(HEALINGS)}")
        if "lora" in way and self.profile.healing is None:
            raise MoeitsError(f"profile {self.profile.name!r} has no settings of healing")
        if "refit" in way and not self.profile.refit_tokens:
            raise MoeitsError(f"profile {self.profile.name!r} has no refit_tokens")
        recipe = self._recipe(way, seed)
        inputs = self._place | {
            "kept": _as_json(self._kept(tau)),
            "way": way,
            "recipe": recipe and recipe.model_dump(),
            "refit_tokens": self.profile.refit_tokens if "refit" in way else None,
            "context": self.profile.context,
        }
        return self.measurement("healing", inputs, partial(self._heal, tau, way, seed))

    @property
    def _place(self) -> dict[str, Any]:
        device, dtype, _ = devices.choose(self.profile.device, self.profile.dtype)
        return {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}

    @by_value
    def _healed_folder(self, tau: float, way: str, seed: int) -> Path:
        """Folder of the healed model, which is healed again where it was lost."""
        folder = CACHE / "healed" / f"{self.name}-{self._healing(tau, way, seed).key}"
        if not folder.exists():
            self._heal(tau, way, seed)
        return folder

    def _heal(self, tau: float, way: str, seed: int) -> tuple[list[dict], dict]:
        """Prune, heal and save the model in the cache; return rows and details of its record."""
        import torch
        from transformers import AutoTokenizer

        from moeits.healing.lora import heal_model
        from moeits.models.folder import save_model

        folder = CACHE / "healed" / f"{self.name}-{self._healing(tau, way, seed).key}"
        # With another number of threads a refit ends in other last digits, and the training goes another way.
        work = folder.with_name(f"{folder.name}-{torch.get_num_threads()}.work")
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        model = self._pruned(self._kept(tau))
        details = heal_model(
            model,
            tokenizer,
            self._recipe(way, seed),
            work,
            original=self.load if "refit" in way else None,
            refit_tokens=self.profile.refit_tokens,
            refit_length=self.profile.context,
            progress=True,
        )
        with whole(folder, once=True) as part:
            save_model(model, part, tokenizer=tokenizer)
        shutil.rmtree(work, ignore_errors=True)
        common = {"model": self.name, "method": way, "tau": tau}
        rows = [
            records.row(**common, task=part, metric="seconds", value=found["seconds"], unit="s")
            for part, found in details.items()
        ]
        if "lora" in details:
            last = details["lora"]["losses"][-8:]
            loss = {"value": float(np.mean(last)), "n": len(last), "unit": "nat/token"}
            rows.append(records.row(**common, task="lora", metric="training loss", **loss))
            tokens = {"value": details["lora"]["tokens"], "unit": "tokens"}
            rows.append(records.row(**common, task="lora", metric="training text", **tokens))
        return rows, details

    @by_value
    def green(self) -> Record:
        """Record of what the model costs at its own tau: memory, bytes, speed, energy, by variant."""
        return self._green.record()

    @property
    def _green(self) -> Measurement:
        from moeits.study.cost import VARIANTS

        kept = self._kept(self.settings.tau)
        inputs = self._place | {
            "kept": _as_json(kept),
            "variants": [name for name in VARIANTS if name != "int8" or self._place["device"] == "cpu"],
        }
        measure = partial(self._measure_costs, kept, inputs["variants"])
        return self.measurement("green", inputs, measure, **self._place)

    def _measure_costs(self, kept: dict[int, list[int]], variants: list[str]) -> tuple[list[dict], dict]:
        from moeits.study.cost import compare_costs

        units = {
            "file_bytes": "bytes",
            "memory_bytes": "bytes",
            "multiply_adds": "1/token",
            "prefill": "token/s",
            "decode": "token/s",
            "joules": "J/token",
            "surgery": "s",
        }
        rows = [
            records.row(
                model=self.name,
                method=costs["variant"],
                tau=self.settings.tau,
                metric=metric,
                value=costs[metric],
                unit=unit,
                stderr=costs.get(f"{metric}_stderr"),
            )
            for costs in compare_costs(self.folder, kept, variants=variants, **self._place)
            for metric, unit in units.items()
            if costs[metric] is not None
        ]
        return rows, {}

    def load(self, folder: Path | None = None) -> "nn.Module":
        """Load the model, or that of another folder, as it is scored."""
        from moeits.models.folder import load_model

        device, dtype, _ = devices.choose(self.profile.device, self.profile.dtype)
        if self.profile.device_map:
            return load_model(folder or self.folder, dtype=dtype, device_map=self.profile.device_map)
        return load_model(folder or self.folder, dtype=dtype, device=device)

    def _pruned(self, kept: dict[int, list[int]] | None) -> "nn.Module":
        """Load the model without the experts that go; with None, unpruned."""
        from moeits.models.checkpoint import prune_checkpoint
        from moeits.models.surgery import prune_model

        if kept is None:
            return self.load()
        if not self.profile.device_map:
            return prune_model(self.load(), kept)
        # What lies outside the GPU cannot be cut in memory.
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            return self.load(prune_checkpoint(self.folder, Path(folder) / "pruned", kept))

    @property
    def taus(self) -> list[float]:
        """The profile's taus and the model's own, largest first."""
        grid = self.profile.tau_grid if self.settings.tau_grid is None else self.settings.tau_grid
        return sorted({*grid, self.settings.tau}, reverse=True)

    @property
    def ablation_taus(self) -> list[float]:
        """The taus of ``moeits ablate``, largest first."""
        more = [] if self.settings.tau_grid is not None else self.profile.ablation_taus
        return sorted({*self.taus, *more}, reverse=True)

    def curve(self) -> list[Record]:
        """Measure the whole model and then every tau, as :meth:`scores` does.

        Taus of the ablation come along where they were measured before.
        """
        taus = [tau for tau in self.ablation_taus if tau in self.taus or self._scores(tau).exists()]
        return [self.scores(), *map(self.scores, taus)]

    def controls(self, tau: float) -> list[Record]:
        """Measure the held-out perplexity with as many experts per layer as at `tau`, but random ones.

        The draws are this study's own: ``random 0`` of a :class:`moeits.study.comparison.Comparison` is
        another subset.

        Parameters
        ----------
        tau : float
            Intensity, which sets the number of experts of every layer.
        """
        return [measurement.record() for measurement in self._controls(tau)]

    def _controls(self, tau: float) -> Iterator[Measurement]:
        counts = {layer: len(chosen.kept) for layer, chosen in self.selections(tau).items()}
        for draw in range(self.profile.random_draws):
            rng = np.random.default_rng([self.profile.seed, draw])
            kept = {
                layer: sorted(rng.choice(len(self.matrices[layer]), count, replace=False).tolist())
                for layer, count in counts.items()
            }
            yield self._scores(tau, kept=kept, method=f"random {draw}", tasks=[])

    @property
    def _matrices_file(self) -> Path:
        return CACHE / "nmi" / f"{self._nmi.key}.npz"

    @cached_property
    @by_value
    def _measured(self) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
        """The NMI matrices, and what made them: diagonal, fewest experts per layer, ..."""
        from moeits.nmi import read_matrices

        _ = self.nmi  # which writes the file, unless its record is there already
        if not self._matrices_file.exists():
            self._measure_nmi()
        return read_matrices(self._matrices_file)

    def _measure_nmi(self) -> tuple[list[dict], dict]:
        from moeits.models.checkpoint import measure_nmi
        from moeits.nmi import write_matrices

        matrices, made_by = measure_nmi(self.folder, preset=self.profile.preset)
        write_matrices(self._matrices_file, matrices, made_by)
        rows = []
        for layer, R in matrices.items():
            values = R[np.triu_indices_from(R, 1)]
            low, high = np.percentile(values, [25, 75])
            summary = {"mean": values.mean(), "iqr": high - low, "min": values.min(), "max": values.max()}
            rows += [
                records.row(
                    model=self.name,
                    method="moeits",
                    task=f"layer {layer}",
                    metric="nmi",
                    variant=name,
                    value=float(value),
                    n=values.size,
                    unit="1",
                )
                for name, value in summary.items()
            ]
        return rows, {}

    @property
    def questions(self) -> int | None:
        """Questions per task, where the model's page compares nothing; None is all."""
        return self.settings.questions or self.profile.questions

    def _questions(self, tau: float | None) -> int | None:
        at_page = tau in (None, self.settings.tau) and self.settings.questions is None
        return (self.profile.questions_at_page_tau if at_page else None) or self.questions

    @by_value
    def _scores(
        self,
        tau: float | None = None,
        way: str | None = None,
        seed: int = 0,
        *,
        method: str | None = None,
        kept: dict[int, list[int]] | None = None,
        tasks: list[str] | None = None,
        protocol: Protocol | None = None,
    ) -> Measurement:
        """Scores of a model: unpruned, pruned at `tau` or to `kept`, or healed with a seed.

        By another protocol on the benchmarks alone.
        """
        profile = self.profile
        kept = self._kept(tau) if kept is None and tau is not None else kept
        settings = self._place | {"batch_size": profile.batch_size, "seed": profile.seed}
        inputs = settings | {
            "method": method or way or ("whole" if tau is None else "moeits"),
            "tau": tau,
            "kept": kept and _as_json(kept),
            "tasks": self.tasks if tasks is None else tasks,
            "questions": self.questions if protocol else self._questions(tau),
            "shots": protocol.shots if protocol else profile.shots,
            "documents": profile.documents,
            "heldout_tokens": None if protocol else profile.heldout_tokens,
            "context": profile.context,
            **({"chat_template": protocol.chat_template} if protocol else {}),
        }
        on, load = {}, partial(self._pruned, kept)
        if way is not None:
            healing = self._healing(tau, way, seed)
            inputs |= {"healed": healing.identity, "healing seed": seed}
            on, load = {"healing": healing.key}, partial(self._healed, tau, way, seed)
        measure = partial(self._measure_scores, load, inputs, kept)
        step = "protocol" if protocol else "scores"
        return self.measurement(step, inputs, measure, on=on, **settings)

    def _healed(self, tau: float, way: str, seed: int) -> "nn.Module":
        return self.load(self._healed_folder(tau, way, seed))

    def _measure_scores(
        self, load: Callable[[], "nn.Module"], inputs: Mapping[str, Any], kept: dict[int, list[int]] | None
    ) -> tuple[list[dict], dict]:
        from transformers import AutoTokenizer

        from moeits import corpus, evaluation

        kept_share = 1.0
        if kept is not None:
            kept_share = sum(map(len, kept.values())) / sum(map(len, self.matrices.values()))
        model = load()
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        rows, details = [], {}
        if inputs["heldout_tokens"] is not None:
            blocks = corpus.blocks(
                "heldout", tokenizer, length=inputs["context"], tokens=inputs["heldout_tokens"]
            )
            text = evaluation.perplexity(model, blocks, batch_size=inputs["batch_size"])
            rows = _size_rows(model)
            perplexity = {"metric": "perplexity", "unit": "1", "higher_is_better": False}
            rows.append({"task": "heldout", **perplexity, **text})
        if inputs["tasks"]:
            items = evaluation.evaluate(
                model,
                tokenizer,
                inputs["tasks"],
                shots=inputs["shots"],
                limit=inputs["questions"],
                batch_size=inputs["batch_size"],
                documents=inputs["documents"],
                chat_template=inputs.get("chat_template", False),
                seed=inputs["seed"],
            )
            rows += evaluation.plain(evaluation.summarise(items)).to_dict("records")
            details["items"] = evaluation.plain(items).to_dict("list")
        del model
        gc.collect()
        common = {"model": self.name, "method": inputs["method"], "tau": inputs["tau"]}
        return [records.row(**common, kept_share=kept_share, **row) for row in rows], details


def _as_json(kept: Mapping[int, Iterable[int]]) -> dict[str, list[int]]:
    return {str(layer): list(ids) for layer, ids in kept.items()}


def _size_rows(model: "nn.Module") -> list[dict[str, Any]]:
    from moeits.models.families import sizes

    size = sizes(model)
    found = {
        "parameters": size.total,
        "routed-expert parameters": size.routed,
        "active parameters": size.active,
        "bytes": size.bytes,
        "routed experts": sum(size.experts.values()),
    }
    return [
        {"metric": "size", "variant": variant, "value": value, "unit": "bytes" if variant == "bytes" else "1"}
        for variant, value in found.items()
    ]


@dataclass(frozen=True)
class Step:
    """One step of a profile: what is done, for which model, and the call that does it or finds it done.

    `way` is how the model is healed, where it is. Steps of one `phase` do not depend on each other.
    """

    stage: str
    label: str
    do: Callable[[], object]
    model: str = ""
    way: str = ""
    phase: int = 2


def steps(profile: Profile, only: str | None = None) -> Iterator[Step]:
    """Every measurement of a profile, in the order in which they build on each other.

    Parameters
    ----------
    profile : Profile
        The settings.
    only : str, optional
        One model of the profile; all by default.
    """
    studies = [Study(profile, name) for name in ([only] if only else profile.models)]
    for study in studies:
        yield Step(
            "models", f"{study.name}: checkpoint", lambda study=study: study.folder, study.name, phase=0
        )
    for study in studies:
        yield Step("NMI", f"{study.name}: NMI", lambda study=study: study.nmi, study.name, phase=1)
    for study in studies:
        yield from _study_steps(study)


def _study_steps(study: Study) -> Iterator[Step]:
    """List what is measured of one model after its NMI."""
    name = study.name
    yield Step("scores", f"{name}: whole model", study.scores, name)
    own = study.settings.tau
    for tau in study.taus:
        yield Step("scores", f"{name}: tau = {tau:g}", partial(study.scores, tau), name)
    yield Step("controls", f"{name}: random experts", partial(study.controls, own), name)
    if name in study.profile.green:
        # Timed with nothing beside.
        alone = 10 + study.profile.green.index(name)
        yield Step("green", f"{name}: memory and speed", study.green, name, phase=alone)
    for tau, way in study.healings:
        label = f"{name}: tau = {tau:g}, {way}"
        yield Step("healing", label, partial(study.healing, tau, way), name, way)
        yield Step("scores", f"{label}: scores", partial(study.healed_scores, tau, way), name, way, phase=3)
    if name in study.profile.protocol_models:
        for protocol, (tau, way) in product(study.profile.protocols, study.protocol_states):
            state = "whole model" if tau is None else f"tau = {tau:g}" + (f", {way}" if way else "")
            yield Step(
                "protocols",
                f"{name}: {state}, {protocol}",
                partial(study.protocol_scores, protocol, tau, way),
                name,
                way or "",
                phase=3,
            )


def ablation(profile: Profile, name: str) -> Iterator[Step]:
    """Every tau of a profile for one model, pruned and, where the profile heals, healed by LoRA.

    Parameters
    ----------
    profile : Profile
        The settings.
    name : str
        One of its models.
    """
    study = Study(profile, name)
    for step in steps(profile, name):
        if step.stage in ("models", "NMI") or step.label == f"{name}: whole model":
            yield step
    for tau in study.ablation_taus:
        yield Step("scores", f"{name}: tau = {tau:g}", partial(study.scores, tau), name)
    if profile.healing is None:
        return
    for tau, seed in product(study.ablation_taus, range(profile.ablation_seeds)):
        label = f"{name}: tau = {tau:g}, lora, seed {seed}"
        yield Step("healing", label, partial(study.healing, tau, "lora", seed), name, "lora")
        scores = partial(study.healed_scores, tau, "lora", seed)
        yield Step("scores", f"{label}: scores", scores, name, "lora", phase=3)


def do(
    steps: Iterable[Step], *, say: Callable[[str], None] = print, backend: str | None = None, **options: Any
) -> list[Any]:
    """Do steps, one after the other here or spread over many processes and machines.

    Parameters
    ----------
    steps : iterable of Step
        What to do. What was done before is found in the records.
    say : callable
        Takes the lines of progress.
    backend : str, optional
        See :func:`moeits.machine.spread.unordered`. With one, the steps of a phase run at once. What a lost
        worker did is done again by another; after the loss of all, a second call does what is left.
    **options
        For the backend.

    Returns
    -------
    list
        What the steps return, in their order.
    """
    steps = list(steps)
    found: dict[int, Any] = {}
    for number, result, seconds in each(steps, backend, **options):
        found[number] = result
        say(f"[{len(found):3}/{len(steps)}] {steps[number].label}: {seconds:.1f} s")
    return [found[number] for number in range(len(steps))]


def each(
    steps: Sequence[Step], backend: str | None = None, **options: Any
) -> Iterator[tuple[int, Any, float]]:
    """Do steps, phase by phase, as :func:`do`; yield number, result and seconds of each as it is done."""
    for phase in sorted({step.phase for step in steps}):
        numbered = [(number, step) for number, step in enumerate(steps) if step.phase == phase]
        yield from unordered(itertools.starmap(joblib.delayed(_timed), numbered), backend, **options)


def _timed(number: int, step: Step) -> tuple[int, Any, float]:
    start = time.perf_counter()
    result = step.do()
    return number, result, time.perf_counter() - start
