"""What an attribution graph needs in memory, and what to leave out where that is too much."""

from dataclasses import dataclass

from heredity.interp.model import Shape

BUFFER_SHARE = 8
"""One part in so many of the budget is for gradients on their way through the model."""
DISK_SHARE = 4
"""Attention patterns larger than one part in so many of the budget are kept in a temporary file."""


@dataclass(frozen=True)
class Memory:
    """Bytes, beside those of the model and the dictionaries.

    Attributes:
        patterns: attention patterns.
        activations: what is recorded of the prompt, and active latents.
        weights: of attention, with the gains of norms folded in.
        matrix: direct effects, while latents are chosen and after.
    """

    patterns: int
    activations: int
    weights: int
    matrix: int

    @property
    def total(self) -> int:
        """All together, but for buffers."""
        return self.patterns + self.activations + self.weights + self.matrix

    def on_disk(self, budget: int) -> bool:
        """Whether patterns go into a temporary file."""
        return self.patterns > budget // DISK_SHARE

    def left(self, budget: int) -> int:
        """What of ``budget`` bytes is left for direct effects; negative if the rest alone is more."""
        held = self.activations + self.weights + (0 if self.on_disk(budget) else self.patterns)
        return budget - budget // BUFFER_SHARE - held


def estimate(
    shape: Shape,
    *,
    n_tokens: int,
    active: int,
    latents: int,
    targets: int = 10,
    dictionaries: int = 1,
    itemsize: int = 4,
) -> Memory:
    """Bytes for a graph of ``latents`` nodes out of ``active`` active latents at a prompt of ``n_tokens``.

    Args:
        shape: of the model.
        n_tokens: length of the prompt.
        active: active latents at all positions and layers.
        latents: nodes.
        targets: logits explained.
        dictionaries: how many there are.
        itemsize: bytes of a number.
    """
    rows, fixed = latents + targets, (shape.n_layers + 1) * n_tokens
    chosen = rows * (latents + fixed) if latents < active else 0
    # Inputs and outputs of MLPs, the stream before them, what attention adds in any case, errors, constants, and what
    # unranked latents write; tokens, positions, and both ends of the stream.
    recorded = (7 * shape.n_layers + 4) * n_tokens * shape.d_model
    return Memory(
        patterns=itemsize * shape.n_layers * shape.n_heads * n_tokens**2,
        activations=itemsize * recorded + active * (4 + itemsize + 3 * 8) + dictionaries * 8 * (n_tokens + 1),
        weights=itemsize * shape.n_layers * shape.d_model * shape.d_head * (shape.n_heads + shape.n_kv_heads),
        matrix=itemsize * (rows * (active + fixed) + chosen),
    )


def room(active: int, fixed: int, latents: int, targets: int, size: int) -> tuple[int, int, str]:
    """How many latents can be nodes, out of how many that are ranked, with ``size`` bytes for direct effects.

    Args:
        active: active latents.
        fixed: columns that are always there.
        latents: nodes at most.
        targets: rows that are always there.
        size: bytes.

    Returns:
        nodes, latents ranked, and the reasons in words if either is less than ``active``.

    Raises:
        ValueError: there is room for no latent.
    """
    nodes = min(latents, active)
    reasons = [f"at most {latents} latents were asked for"] if latents < active else []
    numbers = max(size, 0) // 4

    def ranked(nodes: int) -> int:
        # Rows of all ranked columns, and where some are not chosen the chosen ones once more.
        spare = numbers // (nodes + targets) - fixed
        return active if spare >= active and nodes == active else spare - nodes - fixed

    if ranked(nodes) < active and ranked(nodes) < 2 * nodes:
        low, high = 0, nodes
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if ranked(middle) >= min(active, 2 * middle) else (low, middle - 1)
        nodes = low
        reasons.append(f"{size / 2**20:.3g} MiB for direct effects hold {nodes} latents' rows")
    if active and not nodes:
        raise ValueError(
            f"{max(size, 0) / 2**20:.3g} MiB for direct effects hold no latent at all: there are {fixed} errors and "
            "tokens; raise the budget"
        )
    columns = min(active, ranked(nodes))
    if columns < active:
        reasons.append(f"only the {columns} latents with the largest total effects were ranked")
    return nodes, columns, "; ".join(reasons)
