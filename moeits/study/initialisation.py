"""How the experts of a Mixture-of-Experts model begin: at random, or as slices and copies of a dense FFN.

All functions work on plain tensors: a dense FFN of m neurons on a residual stream of width d is
``{"gate": (m, d), "up": (m, d), "down": (d, m)}``, the experts of a layer are the same with a leading E.
"""

from collections.abc import Mapping, Sequence

import torch

from moeits.errors import MoeitsError

Block = Mapping[str, torch.Tensor]


def slices(ffn: Block, count: int, copies: int, *, scale: float) -> dict[str, torch.Tensor]:
    """Cut a dense FFN into slices of neurons and copy each.

    With routers that pick all slices of one copy, equally weighted, and ``scale=count`` the experts compute
    what the FFN does: fine-grained upcycling with virtual groups (doi:10.48550/arXiv.2410.07524).

    Parameters
    ----------
    ffn : mapping of str to Tensor
        Dense FFN, m neurons.
    count : int
        Slices; m is a multiple of it.
    copies : int
        Copies of each slice.
    scale : float
        Factor of the down projections: one over the routing weight that an expert gets.

    Returns
    -------
    dict of str to Tensor
        E = copies x count experts of m / count neurons. Expert ``c * count + s`` is copy c of slice s.

    Raises
    ------
    MoeitsError
        If the slices would not be equal.
    """
    neurons = ffn["up"].shape[0]
    if neurons % count:
        raise MoeitsError(f"{neurons} neurons cannot be cut into {count} equal slices")
    cut = {
        "gate": torch.stack(ffn["gate"].chunk(count)),
        "up": torch.stack(ffn["up"].chunk(count)),
        "down": torch.stack(ffn["down"].chunk(count, dim=1)) * scale,
    }
    return {name: weight.repeat(copies, 1, 1) for name, weight in cut.items()}


def branches(ffns: Sequence[Block], count: int, *, scale: float) -> dict[str, torch.Tensor]:
    """Cut several FFNs into slices, one copy of each: :func:`slices` where each copy has its own weights.

    The FFNs of branch-train-mix (doi:10.48550/arXiv.2403.07816) are one network's, each trained on its own
    domains.
    """
    cut = [slices(ffn, count, 1, scale=scale) for ffn in ffns]
    return {name: torch.cat([one[name] for one in cut]) for name in cut[0]}


def redraw(experts: Block, share: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw a share of each expert's neurons anew: Drop-Upcycling (doi:10.48550/arXiv.2502.19261).

    Parameters
    ----------
    experts : mapping of str to Tensor
        E experts of m neurons.
    share : float
        Share of the neurons, between 0 and 1; each expert has its own.
    generator : torch.Generator
        Source of chance.

    Returns
    -------
    dict of str to Tensor
        Copies of the experts. A neuron's new weights are normal, with mean and standard deviation of its
        expert's projection.
    """
    drawn = {name: weight.clone() for name, weight in experts.items()}
    count, neurons = experts["up"].shape[:2]
    for expert in range(count):
        chosen = torch.randperm(neurons, generator=generator)[: round(share * neurons)]
        for name, weight in drawn.items():
            rows = weight[expert].T if name == "down" else weight[expert]
            old = experts[name][expert]
            noise = torch.randn(len(chosen), rows.shape[1], generator=generator)
            rows[chosen] = noise * old.std() + old.mean()
    return drawn


def router_rows(width: int, count: int, copies: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """One row for every copy, repeated for its slices, so that a token picks all slices of one copy.

    Returns
    -------
    Tensor, shape (copies x count, width)
        Normal with standard deviation `std`, in the order of :func:`slices`.
    """
    return (torch.randn(copies, width, generator=generator) * std).repeat_interleave(count, 0)
