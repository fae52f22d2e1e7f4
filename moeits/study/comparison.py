"""All methods at equal budgets on the same models and text: quality, cost, and which experts they agree on.

Each cell (model, method, budget) is one record, so that a comparison that was stopped goes on where it was.
The few methods that matter most are taken further: scored on the benchmarks, as pruned and healed. Beside
them stand the oracle, which tries every subset of small layers, and the speed of what methods leave.
"""

import gc
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeits import criteria, evaluation
from moeits.criteria.controls import subsets
from moeits.criteria.folder import ORACLE_TOKENS
from moeits.errors import BudgetError
from moeits.machine import devices
from moeits.machine.keys import by_value, digest
from moeits.machine.paths import CACHE
from moeits.study import cost, records
from moeits.study.gathered import evenness, read_statistics, write_statistics
from moeits.study.measurement import Measurement
from moeits.study.measurement import found as found_of
from moeits.study.methods import METHODS, method_named
from moeits.study.methods.change import Changing, write_block
from moeits.study.pipeline import Step, Study
from moeits.study.profiles import HEALINGS, Profile
from moeits.study.records import Record

if TYPE_CHECKING:
    from torch import nn

    from moeits.criteria.base import Layer, Statistics

REFERENCE = "moeits"
"""The method that all others are paired with."""

WHOLE = "whole"

OWN = "own"
"""The budget of as many experts in each layer as MoEITS keeps at the model's own tau."""

BUDGETS = (0.25, 0.5, 0.75, OWN)

FINAL = 0.5
"""The budget at which the finalists are healed and scored."""

FINALISTS = (REFERENCE, "reap", "random-token-norm", "random 0")
"""Methods that always are among the finalists, beside the one with the fewest bits per byte."""

DRAWS = 12
"""Random subsets at the budget :data:`FINAL` in a whole comparison: the methods' place is among them."""

ORACLE_LAYERS = 3
"""Layers, spread evenly over a model, whose subsets the oracle tries."""


FORMATS = {
    "whole": ("whole",),
    "pruned": ("moeits", "reap", "random-token-norm", "dern"),
    "sparse": ("moe-pruner",),
    "low-rank": ("moe-i2-low-rank",),
    "int8": ("mc-moe",),
}
"""Ways in which a machine can run what methods leave (see :mod:`moeits.study.cost`), and methods that
leave it."""

INT8_SHARE = 0.5
"""Share of 16 bits that eight are: kernels for fewer bits there are none of on a CPU."""

Budget = float | str


@dataclass(frozen=True)
class Comparison:
    """All methods on one model of a profile.

    Attributes
    ----------
    profile : Profile
        The settings.
    name : str
        Name of one of its models.
    """

    profile: Profile
    name: str

    @cached_property
    def study(self) -> Study:
        """The model's study, whose selection at its own tau is one of the budgets."""
        return Study(self.profile, self.name)

    @property
    def methods(self) -> list[str]:
        """Every method that is measured in cells, a random one for each draw."""
        names = [name for name, criterion in METHODS.items() if not criterion.needs_loss]
        return _with_draws(names, self.profile, DRAWS)

    @by_value
    def statistics(self, text: str) -> "dict[int, Statistics]":
        """Statistics of the calibration text or of random tokens, gathered once.

        Parameters
        ----------
        text : {"calibration", "random"}
            Which one.
        """
        if text not in self._known:
            _ = self.statistics_record(text)
            file = self._statistics_file(text)
            if not file.exists():
                self._gather(text)
            self._known[text] = read_statistics(file)[0]
        return self._known[text]

    def statistics_record(self, text: str) -> Record:
        """Record of the pass over a text: its tokens, and the seconds it took."""
        return self._statistics(text).record()

    def cell(self, method: str, budget: Budget) -> Record:
        """Measure one method at one budget, or find it measured.

        Parameters
        ----------
        method : str
            Name of a criterion, ``"random N"`` for its draw N, or ``"whole"`` for the model as it is.
        budget : float or "own"
            Share of the routed experts to keep (1 for the whole model), or as many in each layer as MoEITS
            keeps at the model's tau.

        Returns
        -------
        Record
            Bits per byte, perplexity, bytes of the routed experts, and the cost of the selection. Where the
            method cannot meet the budget there are no rows, and ``details["impossible"]`` says why.
        """
        return self._cell(method, budget).record()

    def measurements(self, step: str) -> list[Measurement]:
        """List all measurements of a kind that can be taken of this model, as the settings are now.

        Parameters
        ----------
        step : {"rival", "final", "oracle", "speed", "statistics"}
            Step of the records; of others there are none.
        """
        match step:
            case "rival":
                return [
                    self._cell(WHOLE, 1.0),
                    *(self._cell(method, budget) for method, budget in product(self.methods, BUDGETS)),
                ]
            case "final":
                ways = [None, *filter(self.profile.can_heal, HEALINGS)]
                return [self._final(*one) for one in [(WHOLE, None), *product(self.methods, ways)]]
            case "oracle":
                return [self._oracle]
            case "speed":
                return [self._speed(*form) for form in self.forms]
            case "statistics":
                return [self._statistics(text) for text in ("calibration", "random")]
            case _:
                return []

    def found(self, step: str = "rival") -> list[Record]:
        """Find the :meth:`measurements` of a kind that were taken before."""
        return found_of(self.measurements(step))

    def final(self, method: str, way: str | None = None) -> Record:
        """Score a method at the budget of the finalists on the benchmarks too, or find it scored.

        Parameters
        ----------
        method : str
            As in :meth:`cell`; ``"whole"`` is the model as it is.
        way : str, optional
            How the pruned model is healed, one of :data:`moeits.study.profiles.HEALINGS`; not at all by
            default.

        Returns
        -------
        Record
            Bits per byte and perplexity of the held-out text, the benchmarks' scores, and in the details the
            answers by question.
        """
        return self._final(method, way).record()

    def oracle(self) -> Record:
        """Try every subset of half of the experts in a few layers, one layer at a time, or find it done.

        Returns
        -------
        Record
            For each layer its best, median and worst loss of the model on calibration text and that of the
            whole model, in nats per token. The details have, by layer, all subsets in lexicographic order,
            the loss of each in every block of text, and the error of the layer's output. Where a layer has
            too many subsets there are no rows, and ``details["impossible"]`` says so.
        """
        return self._oracle.record()

    def speed(self, form: str, share: float) -> Record:
        """Time a form of the model, or find it timed.

        Parameters
        ----------
        form : str
            Of :data:`FORMATS`.
        share : float
            Of the routed experts' bytes that are left.

        Returns
        -------
        Record
            Tokens per second of reading and writing, and memory.
        """
        return self._speed(form, share).record()

    @property
    def forms(self) -> list[tuple[str, float]]:
        """Forms of the model that can be timed here, with the share of the bytes that each leaves."""
        shares = [budget for budget in BUDGETS if budget != OWN]
        once = {"whole": [1.0], "int8": [INT8_SHARE] if self._place["device"] == "cpu" else []}
        return [(form, share) for form in FORMATS for share in once.get(form, shares)]

    @cached_property
    @by_value
    def counts(self) -> dict[int, int]:
        """Experts that MoEITS keeps in each layer at the model's own tau."""
        tau = self.study.settings.tau
        return {layer: len(chosen.kept) for layer, chosen in self.study.selections(tau).items()}

    @cached_property
    def _place(self) -> dict[str, Any]:
        device, dtype, _ = devices.choose(self.profile.device, self.profile.dtype)
        return {
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "batch_size": self.profile.batch_size,
            "seed": self.profile.seed,
            "context": self.profile.context,
        }

    @by_value
    def _statistics(self, text: str) -> Measurement:
        inputs = {
            "text": text,
            "seed": self.profile.seed if text == "random" else None,
            "calibration_tokens": self.profile.calibration_tokens,
            "device": self._place["device"],
            "dtype": self._place["dtype"],
        }
        measure = partial(self._gather, text)
        return self.study.measurement("statistics", inputs, measure, **self._place)

    def _statistics_file(self, text: str) -> Path:
        return CACHE / "statistics" / f"{self._statistics(text).key}.npz"

    def _gather(self, text: str) -> tuple[list[dict], dict]:
        from moeits import corpus
        from moeits.criteria.statistics import gather, random_tokens

        model, tokens = self.study.load(), self.profile.calibration_tokens
        if text == "random":
            blocks = random_tokens(model, tokens, length=self.profile.context, seed=self.profile.seed)
        else:
            blocks = corpus.blocks(text, self._tokenizer, length=self.profile.context, tokens=tokens)
        found = gather(model, blocks, batch_size=self.profile.batch_size)
        write_statistics(self._statistics_file(text), found, dict(self._statistics(text).inputs))
        even = {str(number): evenness(known.gates) for number, known in found.items()}
        row = partial(records.row, model=self.name, method="statistics", task=text, unit="1", n=len(blocks))
        mean = float(np.mean(list(even.values())))
        rows = [row(metric="tokens", value=int(blocks.size)), row(metric="evenness", value=mean)]
        return rows, {"evenness": even}

    @cached_property
    def _computed(self) -> dict[tuple[str | None, int], dict]:
        """What criteria have computed, by the text that they read and the layer."""
        return defaultdict(dict)

    @cached_property
    def _known(self) -> "dict[str, dict[int, Statistics]]":
        return {}

    @by_value
    def _cell(self, method: str, budget: Budget) -> Measurement:
        """Make the measurement of :meth:`cell`."""
        return self._of_method("rival", method, budget, {}, partial(self._measure, method, budget))

    def _of_method(
        self, step: str, method: str, budget: Budget, more: Mapping[str, Any], measure: Callable
    ) -> Measurement:
        inputs = self._place | {
            "method": method,
            "budget": budget,
            "counts": {str(layer): count for layer, count in self.counts.items()} if budget == OWN else None,
            "heldout_tokens": self.profile.heldout_tokens,
            "statistics": None,
        }
        on, code = {}, ()
        if method != WHOLE:
            criterion = method_named(method.split()[0])
            on["criterion"] = criterion.functions
            code = (criteria.Criterion.keep, Changing.apply, *criterion.parts)
            if text := _text(method):
                statistics = self._statistics(text)
                inputs["statistics"] = statistics.identity
                on["statistics"] = statistics.key
        return self.study.measurement(step, inputs | more, measure, on=on, code=code, **self._place)

    @property
    def _oracle_tokens(self) -> int:
        return min(ORACLE_TOKENS, self.profile.calibration_tokens)

    @property
    @by_value
    def _oracle(self) -> Measurement:
        statistics = self._statistics("calibration")
        inputs = self._place | {
            "layers": ORACLE_LAYERS,
            "tokens": self._oracle_tokens,
            "statistics": statistics.identity,
        }
        on = {"statistics": statistics.key}
        return self.study.measurement("oracle", inputs, self._try_subsets, on=on, **self._place)

    def _try_subsets(self) -> tuple[list[dict], dict]:
        from moeits import corpus
        from moeits.criteria.reconstruction import subset_error

        numbers = sorted(self._layers)
        places = np.linspace(0, len(numbers) - 1, ORACLE_LAYERS).round().astype(int)
        chosen = [numbers[place] for place in dict.fromkeys(places.tolist())]
        known = self.statistics("calibration")
        layers = {number: replace(self._layers[number], calibration=known[number]) for number in chosen}
        try:
            tried = {number: subsets(layer, layer.experts // 2) for number, layer in layers.items()}
        except BudgetError as error:
            return [], {"impossible": str(error)}
        blocks = corpus.blocks("calibration", self._tokenizer, length=128, tokens=self._oracle_tokens)
        model = self.study.load()
        whole, rows, details = evaluation.pruned_losses(model, {}, blocks), [], {}
        for number, layer in layers.items():
            losses = [evaluation.pruned_losses(model, {number: kept}, blocks) for kept in tried[number]]
            means = np.mean(losses, axis=1)
            values = {"best": means.min(), "median": np.median(means), "worst": means.max()}
            rows += [
                records.row(
                    model=self.name,
                    method="oracle",
                    task=f"layer {number}",
                    metric="nats per token",
                    variant=variant,
                    value=float(value),
                    n=len(blocks),
                    unit="nats",
                    higher_is_better=False,
                )
                for variant, value in (values | {"whole": np.mean(whole)}).items()
            ]
            details[str(number)] = {
                "kept": [list(kept) for kept in tried[number]],
                "nats": np.round(losses, 6).tolist(),
                "error": [subset_error(layer, kept) for kept in tried[number]],
            }
        return rows, {"layers": details, "whole": np.round(whole, 6).tolist()}

    @by_value
    def _speed(self, form: str, share: float) -> Measurement:
        inputs = self._place | {"form": form, "share": share}
        return self.study.measurement("speed", inputs, partial(self._time, form, share), **self._place)

    def _time(self, form: str, share: float) -> tuple[list[dict], dict]:
        kept = {n: range(count) for n, count in criteria.base.uniform(self._layers, share).items()}
        place = {key: self._place[key] for key in ("device", "dtype")}
        (found,) = cost.compare_costs(self.study.folder, kept, variants=[form], share=share, **place)
        row = partial(records.row, model=self.name, method=form, kept_share=share, task="speed")
        rows = [
            row(
                metric=metric,
                value=found[metric],
                stderr=found[f"{metric}_stderr"],
                n=found["n"],
                unit="tokens/s",
            )
            for metric in ("prefill", "decode")
        ]
        rows.append(row(metric="memory", value=found["memory_bytes"], unit="bytes", higher_is_better=False))
        return rows, {}

    @cached_property
    def _layers(self) -> "dict[int, Layer]":
        from moeits.criteria.statistics import layers_of

        return layers_of(self.study.load())

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.study.folder)

    @by_value
    def _final(self, method: str, way: str | None) -> Measurement:
        profile = self.profile
        more = {
            "way": way,
            "recipe": profile.healing.model_dump() if way and "lora" in way and profile.healing else None,
            "refit_tokens": profile.refit_tokens if way and "refit" in way else None,
            "tasks": self.study.tasks,
            "questions": self.study.questions,
            "shots": profile.shots,
            "documents": profile.documents,
        }
        budget = 1.0 if method == WHOLE else FINAL
        return self._of_method("final", method, budget, more, partial(self._measure_final, method, way))

    def _choose(self, method: str, budget: Budget) -> "_Choice":
        """Apply a criterion to every layer; a BudgetError says why it cannot meet the budget."""
        if method == WHOLE:
            return _Choice()
        name, _, draw = method.partition(" ")
        criterion = method_named(name)
        text = _text(method)
        statistics = self.statistics(text) if text else None
        layers = {
            number: replace(
                layer,
                seed=int(draw or 0) + self.profile.seed,
                memory=criteria.base.Memory(self._computed[text, number]),
                calibration=statistics and statistics[number],
            )
            for number, layer in self._layers.items()
        }
        _reset_peak()
        start = time.perf_counter()
        counts = self.counts if budget == OWN else criterion.counts(layers, share=budget)
        blocks = {}
        if not isinstance(criterion, Changing):
            kept = {number: criterion.keep(layer, counts[number]) for number, layer in layers.items()}
            stored = sum(map(len, kept.values())) / sum(layer.experts for layer in layers.values())
        else:
            changes = {number: criterion.apply(layer, counts[number]) for number, layer in layers.items()}
            kept = {number: change.kept for number, change in changes.items()}
            blocks = {number: change.block for number, change in changes.items()}
            experts = [layers[number].experts for number in changes]
            stored = float(np.average([change.stored for change in changes.values()], weights=experts))
        seconds = time.perf_counter() - start + sum(layer.memory.spared for layer in layers.values())
        cost = {
            "selection seconds": (seconds, "s"),
            "selection memory": (records.peak_memory(), "bytes"),
            "calibration tokens": (self.profile.calibration_tokens if text == "calibration" else 0, "1"),
        }
        return _Choice(kept, blocks, stored, cost)

    def _model(self, choice: "_Choice") -> "nn.Module":
        """Load the model that a choice leaves."""
        from moeits.models.families import moe_layers
        from moeits.models.surgery import prune_model

        model = self.study.load()
        if choice.blocks:
            for layer in moe_layers(model):
                write_block(layer, choice.blocks[layer.layer])
        return prune_model(model, choice.kept) if choice.kept else model

    def _measure(self, method: str, budget: Budget) -> tuple[list[dict], dict]:
        try:
            choice = self._choose(method, budget)
        except BudgetError as error:
            return [], {"impossible": str(error)}
        details = self._as_chosen(choice)
        rows = _text_rows(details)
        gc.collect()
        rows += [
            {"metric": metric, "value": value, "unit": unit} for metric, (value, unit) in choice.cost.items()
        ]
        return self._finish(method, budget, choice, rows), details | self._who_stays(choice)

    def _measure_final(self, method: str, way: str | None) -> tuple[list[dict], dict]:
        from moeits.healing.lora import heal_model

        profile, healed = self.profile, {}
        budget = 1.0 if method == WHOLE else FINAL
        choice = self._choose(method, budget)
        model = self._model(choice)
        if way:
            with tempfile.TemporaryDirectory() as work:
                healed = heal_model(
                    model,
                    self._tokenizer,
                    profile.healing if "lora" in way else None,
                    Path(work) / "healing",
                    original=self.study.load if "refit" in way else None,
                    refit_tokens=profile.refit_tokens,
                )
        details = self._heldout(model) if way else self._as_chosen(choice, model)
        rows = _text_rows(details)
        items = evaluation.evaluate(
            model,
            self._tokenizer,
            self.study.tasks,
            shots=profile.shots,
            limit=self.study.questions,
            batch_size=profile.batch_size,
            documents=profile.documents,
            seed=profile.seed,
        )
        del model
        gc.collect()
        rows += evaluation.plain(evaluation.summarise(items)).to_dict("records")
        rows += [
            {"task": part, "metric": "seconds", "value": found["seconds"], "unit": "s"}
            for part, found in healed.items()
        ]
        details |= {"items": evaluation.plain(items).to_dict("list")}
        return self._finish(method, budget, choice, rows), details | self._who_stays(choice)

    def _finish(self, method: str, budget: Budget, choice: "_Choice", rows: list[dict]) -> list[dict]:
        common = {"model": self.name, "method": method, "kept_share": choice.stored, "task": "heldout"}
        return [records.row(**common | {"variant": label(budget)} | row) for row in rows]

    def _who_stays(self, choice: "_Choice") -> dict[str, Any]:
        kept = choice.kept and {str(layer): list(ids) for layer, ids in choice.kept.items()}
        return {"kept": kept, "experts": {str(number): of.experts for number, of in self._layers.items()}}

    def _as_chosen(self, choice: "_Choice", model: "nn.Module | None" = None) -> dict[str, Any]:
        """Measure the held-out text with what a choice leaves; the same experts are measured once."""
        if choice.blocks:
            return self._heldout(self._model(choice) if model is None else model)
        asked = dict(self._cell(WHOLE, 1.0).inputs) | {"kept": self._who_stays(choice)["kept"]}
        measure = partial(self._measure_heldout, choice, model)
        heldout = self.study.measurement("heldout", asked, measure)
        return replace(heldout, folder=CACHE / "heldout").record().details

    def _measure_heldout(
        self, choice: "_Choice", model: "nn.Module | None"
    ) -> tuple[list[dict], dict[str, Any]]:
        return [], self._heldout(self._model(choice) if model is None else model)

    def _heldout(self, model: "nn.Module") -> dict[str, Any]:
        """Negative log-likelihood, predicted tokens and their bytes of every block of the held-out text."""
        from moeits import corpus

        blocks = corpus.blocks(
            "heldout", self._tokenizer, length=self.profile.context, tokens=self.profile.heldout_tokens
        )
        texts = [self._tokenizer.decode(block[1:], clean_up_tokenization_spaces=False) for block in blocks]
        return {
            "nats": evaluation.log_losses(model, blocks).tolist(),
            "tokens": [len(block) - 1 for block in blocks],
            "bytes": [len(text.encode()) for text in texts],
        }


def _text_rows(text: Mapping[str, Sequence[float]]) -> list[dict]:
    """Rows of the held-out text, out of what its blocks say one by one."""
    bits = evaluation.ratio(np.array(text["nats"]) / math.log(2), text["bytes"])
    mean = evaluation.ratio(text["nats"], text["tokens"])
    perplexity = math.exp(mean[0])
    rows = [
        {"metric": "bits per byte", "value": bits[0], "stderr": bits[1], "unit": "bits"},
        {"metric": "perplexity", "value": perplexity, "stderr": perplexity * mean[1], "unit": "1"},
    ]
    return [row | {"n": len(text["nats"]), "higher_is_better": False} for row in rows]


@dataclass(frozen=True)
class _Choice:
    """What a criterion leaves of a model: experts by layer, new weights, share of the bytes, and its cost."""

    kept: Mapping[int, Sequence[int]] | None = None
    blocks: Mapping[int, Any] = field(default_factory=dict)
    stored: float = 1.0
    cost: Mapping[str, tuple[float, str]] = field(default_factory=dict)


def label(budget: Budget) -> str:
    """Name a budget in records and tables."""
    return budget if isinstance(budget, str) else f"{budget:.0%}"


def steps(
    profile: Profile,
    *,
    models: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] | None = None,
    draws: int = 0,
) -> Iterator[Step]:
    """List the measurements of a comparison, in order.

    With as many experts per layer as MoEITS keeps, methods that differ only by how they spread a budget over
    the layers are measured once.

    Parameters
    ----------
    profile : Profile
        The settings.
    models, methods, budgets : sequence, optional
        The profile's by default.
    draws : int
        Random subsets at the budget :data:`FINAL`, if more than the profile's.
    """
    methods = profile.rivals if methods is None else methods
    budgets = profile.rival_budgets if budgets is None else budgets
    chosen = _with_draws(methods, profile, draws)
    more = {*chosen} - {*_with_draws(methods, profile)}
    for name in (profile.rival_models or profile.models) if models is None else models:
        call = partial(_call, profile.model_dump_json(), name)
        yield Step("rivals", f"{name}: {WHOLE} model", partial(call, Comparison.cell, WHOLE, 1.0), name)
        for text in sorted({text for method in methods if (text := _text(method))}):
            gather = partial(call, Comparison.statistics_record, text)
            yield Step("rivals", f"{name}: statistics of {text} tokens", gather, name, phase=1)
        same: dict[str, str] = {}
        for method in chosen:
            if method_named(method.split()[0]).needs_loss:
                yield Step("rivals", f"{name}: {method}", partial(call, Comparison.oracle), name)
                continue
            for budget in budgets:
                if budget != FINAL and method in more:
                    continue
                # With the numbers of experts given, what differs by their spread alone is one method.
                functions = method_named(method.split()[0]).functions[:-1]
                first = same.setdefault(digest([functions, method.split()[1:]]), method)
                if budget == OWN and first != method:
                    continue
                measure = partial(call, Comparison.cell, method, budget)
                yield Step("rivals", f"{name}: {method}, {label(budget)}", measure, name)


def speed_steps(profile: Profile, models: Iterable[str]) -> Iterator[Step]:
    """List the timings of what methods leave, which want the machine for themselves.

    Parameters
    ----------
    profile : Profile
        The settings.
    models : iterable of str
        Of the profile; those whose costs it measures (:attr:`Profile.green`) are timed.
    """
    for name in models:
        if name in profile.green:
            for form, share in Comparison(profile, name).forms:
                time_it = partial(_call, profile.model_dump_json(), name, Comparison.speed, form, share)
                yield Step("speeds", f"{name}: speed of {form}, {label(share)}", time_it, name)


@lru_cache(maxsize=1)
def _one(settings: str, name: str) -> Comparison:
    """Find the comparison that this process works on, with what it has loaded, by a profile as JSON."""
    return Comparison(Profile.model_validate_json(settings), name)


def _call(settings: str, name: str, method: Callable[..., Record], *arguments: Any) -> Record:
    """Call a method of a comparison in whatever process this is."""
    return method(_one(settings, name), *arguments)


def finalists(cells: Iterable[Record]) -> dict[str, list[str]]:
    """Name the methods of each model that are taken further.

    Parameters
    ----------
    cells : iterable of Record
        From :meth:`Comparison.cell`.

    Returns
    -------
    dict of str to list of str
        Model -> methods: those of :data:`FINALISTS` that were measured at the budget :data:`FINAL`, and the
        one with the fewest bits per byte of all that leave fewer experts, if it is another and no lucky draw.
    """
    quality: dict[str, dict[str, float]] = {}
    for cell in cells:
        if cell.rows and cell.inputs["budget"] == FINAL and removes(cell):
            (bits,) = (row["value"] for row in cell.rows if row["metric"] == "bits per byte")
            quality.setdefault(cell.inputs["model"], {})[cell.inputs["method"]] = bits
    chosen = {}
    for model, found in quality.items():
        best = min((name for name in found if not name.startswith("random ")), key=found.get, default=None)
        fixed = [name for name in FINALISTS if name in found]
        chosen[model] = list(dict.fromkeys([best, *fixed] if best else fixed))
    return chosen


def final_steps(
    profile: Profile, cells: Iterable[Record], ways: Sequence[str | None] = (None, "refit")
) -> Iterator[Step]:
    """List the measurements of the finalists.

    Parameters
    ----------
    profile : Profile
        The settings.
    cells : iterable of Record
        From :meth:`Comparison.cell`.
    ways : sequence of str or None
        How each is healed; None is as pruned.
    """
    for name, methods in finalists(cells).items():
        call = partial(_call, profile.model_dump_json(), name, Comparison.final)
        # The longest first, so that no process is left with one at the end.
        for way, method in [*product(reversed(ways), methods), (None, WHOLE)]:
            told = f"{name}: {method}, {way or 'as it is'}, benchmarks"
            yield Step("finals", told, partial(call, method, way), name, way or "")


def removes(cell: Record) -> bool:
    """Say whether a cell's model has fewer experts than the whole one."""
    kept = cell.details.get("kept") or {}
    return any(len(ids) < cell.details["experts"][layer] for layer, ids in kept.items())


def _text(method: str) -> str | None:
    """Text that a method reads: calibration, random tokens, or none."""
    return None if method == WHOLE else method_named(method.split()[0]).text


def _with_draws(methods: Iterable[str], profile: Profile, more: int = 0) -> list[str]:
    """Name each draw of the method "random": as many as the profile says, or more."""
    draws = [f"random {draw}" for draw in range(max(profile.random_draws, more, 1))]
    return [name for method in methods for name in (draws if method == "random" else [method])]


def _reset_peak() -> None:
    """Start the count of the largest resident memory anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
