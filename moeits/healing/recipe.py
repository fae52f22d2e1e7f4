"""Settings of the healing."""

from typing import Literal

from pydantic import Field

from moeits.settings import Strict


class Recipe(Strict):
    """Settings of the healing; the defaults, but for `data`, are those of section 5.2 of arXiv 2604.10603.

    Attributes
    ----------
    preset : {"paper", "official"}
        What is adapted, see :func:`moeits.healing.lora.targets`.
    rank, alpha, dropout : int, float, float
        Settings of LoRA (doi:10.48550/arXiv.2106.09685).
    neftune : float
        Alpha of the noise on the embeddings (doi:10.48550/arXiv.2310.05914); 0 for none.
    learning_rate, warmup, weight_decay : float
        Settings of AdamW with a cosine schedule; warmup is a share of the steps.
    batch_size, accumulation : int
        Sequences in one pass, and passes in one step.
    steps : int
        Steps of the optimizer.
    max_tokens : int
        Longest sequence.
    data : str
        ``packaged``, the default, which needs no network; the path of a plain text in UTF-8;
        ``hub:OWNER/NAME``; or the folder of a data set of conversations, such as the paper's own subset of
        OpenHermes-2.5 after its download (doi:10.5281/zenodo.19535551).
    gradient_checkpointing : bool
        Trade time for memory.
    save_every : int
        Steps between two checkpoints.
    seed : int
        Seed of the adapters, the order of the text, dropout and noise.
    """

    preset: Literal["paper", "official"] = "paper"
    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    neftune: float = Field(default=5, ge=0)
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0)
    batch_size: int = Field(default=16, ge=1)
    accumulation: int = Field(default=4, ge=1)
    steps: int = Field(default=500, ge=1)
    max_tokens: int = Field(default=2048, ge=2)
    data: str = Field(default="packaged", pattern=r"^(packaged|hub:[^/]+/[^/]+|[./~].*)$")
    gradient_checkpointing: bool = False
    save_every: int = Field(default=50, ge=1)
    seed: int = 0
