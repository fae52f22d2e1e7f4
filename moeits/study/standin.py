"""Stand-ins for models of the paper and the small profile: their shapes and names, few layers, random.

What a run on the real model needs can be tried and timed on them without the hub. Their scores mean nothing.
"""

from pathlib import Path

import torch
import yaml
from torch import nn

from moeits.errors import MoeitsError
from moeits.machine.paths import DATA, whole
from moeits.models.folder import check_target
from moeits.study import paper


def shapes() -> dict[str, dict]:
    """Read the shapes of the models, as :func:`moeits.study.paper.models`, and of those in ``data/small``."""
    return paper.models() | yaml.safe_load((DATA / "small" / "models.yaml").read_text(encoding="utf-8"))


def names() -> dict[str, str]:
    """Names of the stand-ins, and of the models in :func:`shapes` that they stand for."""
    return {name.lower().replace(" ", "-"): name for name in shapes()}


def heavy_tailed(shape: tuple[int, ...], generator: torch.Generator, *, scale: float = 0.02) -> torch.Tensor:
    """Random weights with realistic tails: Student's t with 4 degrees of freedom, float32.

    Parameters
    ----------
    shape : tuple of int
        Of the tensor.
    generator : torch.Generator
        Source of randomness.
    scale : float
        Factor; the standard deviation is the square root of two times as large.
    """
    weights = torch.randn(shape, generator=generator)
    # Chi squared with 4 degrees of freedom is -2 log(u v).
    uniform = torch.rand((2, *shape), generator=generator).clamp_min_(1e-12)
    return scale * weights * torch.sqrt(2 / -uniform.log_().sum(0))


def standin(name: str, folder: Path | str, *, layers: int = 2, shrink: int = 1, seed: int = 0) -> Path:
    """Write a stand-in as a checkpoint folder.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    folder : path
        New folder, written whole or not at all.
    layers : int
        Decoder layers; DeepSeek-V2-Lite's first is dense.
    shrink : int
        Divisor of the widths (residual stream and neurons); 1 is the true shape.
    seed : int
        Of the weights.

    Returns
    -------
    Path
        The folder: configuration, weights in bfloat16 under the hub's names, and a tokenizer of bytes.

    Raises
    ------
    MoeitsError
        If there is no such model, or a number is out of range.
    ExistsError
        If the folder exists.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    known = names()
    if name not in known:
        raise MoeitsError(f"no stand-in is called {name!r}: there are {', '.join(known)}")
    folder = check_target(folder)
    settings = dict(shapes()[known[name]]["config"])
    widths = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    first = settings.get("first_k_dense_replace", 0) + 1
    if layers < first or shrink < 1 or any(settings[key] % shrink for key in widths if key in settings):
        raise MoeitsError(
            f"layers is {layers} and shrink is {shrink}: {name} needs {first} or more layers, a divisor of "
            f"{', '.join(str(settings[key]) for key in widths if key in settings)}"
        )
    settings |= {key: settings[key] // shrink for key in widths if key in settings}
    settings["num_hidden_layers"] = layers
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    _fill(model, seed)
    with whole(folder) as part:
        model.save_pretrained(part, max_shard_size="5GB")
        _bytes_tokenizer().save_pretrained(part)
    return folder


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    """Draw the weights, one expert at a time: the whole in float32 would not fit."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.fill_(1)
        else:
            rows = parameter.flatten(0, -3) if parameter.dim() > 2 else parameter[None]
            for matrix in rows:
                matrix.copy_(heavy_tailed(tuple(matrix.shape), generator))


def _bytes_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
