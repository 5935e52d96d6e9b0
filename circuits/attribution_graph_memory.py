"""What an attribution graph needs in memory, and what to leave out where that is too much."""

from dataclasses import dataclass

from heredity.interp.model import Shape

MATRIX_SHARE = 0.5
"""Of the budget, for direct effects; the rest is for the prompt's activations, patterns and buffers."""


@dataclass(frozen=True)
class Memory:
    """Bytes, beside those of the model and the dictionaries.

    Attributes:
        patterns: attention patterns; kept in a temporary file where they exceed a quarter of the budget.
        activations: what is recorded of the prompt, and active latents.
        matrix: direct effects, while latents are chosen and after.
    """

    patterns: int
    activations: int
    matrix: int

    @property
    def total(self) -> int:
        """All together, without the buffer of an eighth of the budget."""
        return self.patterns + self.activations + self.matrix


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
    recorded = (6 + 2 + 1) * shape.n_layers * n_tokens * shape.d_model
    return Memory(
        patterns=itemsize * shape.n_layers * shape.n_heads * n_tokens**2,
        activations=itemsize * recorded + active * (4 + itemsize + 3 * 8) + dictionaries * 8 * (n_tokens + 1),
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
    numbers = size // 4

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
            f"{size / 2**20:.3g} MiB for direct effects hold no latent at all: there are {fixed} errors and tokens; "
            "raise the budget"
        )
    columns = min(active, ranked(nodes))
    if columns < active:
        reasons.append(f"only the {columns} latents with the largest total effects were ranked")
    return nodes, columns, "; ".join(reasons)
