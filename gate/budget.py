"""How much an audit looks at: sizes that follow from a name and the size of the models."""

from dataclasses import dataclass
from typing import Literal

Name = Literal["quick", "standard", "thorough"]

_WORK = {"quick": 1.2e12, "standard": 6e12, "thorough": 3e13}
"""Parameters × tokens spent on the divergence scan; the other sizes are in proportion."""

CANARY_TEXTS: dict[Name, int] = {"quick": 6, "standard": 12, "thorough": 24}


@dataclass(frozen=True)
class Budget:
    """Sizes of one audit."""

    name: Name
    small: bool
    """Models of less than five million parameters, on which everything can be measured."""
    scan_tokens: int
    """Corpus tokens compared."""
    window: int
    """Tokens per piece of text."""
    batch_tokens: int
    """Padded tokens per forward."""
    amplified: int
    """Texts decoded per amplification."""
    amplifications: tuple[tuple[float, ...], ...]
    """Those of a group are decoded together, which on large models costs as much as one of them."""
    amplified_length: int
    swept: int
    """Words forced after each opening; none for small models, whose own writing covers what they can say."""
    replicate: bool
    """Try rare behaviours again in other text: for text that people wrote. In text that a model wrote, a rare context
    is mostly one that no model was trained on, and stays one behind other text."""
    null_draws: int
    null_tokens: int
    canaries: int
    canary_texts: int
    """Texts that a canary acts in: what is as rare per token acts in more texts of a larger budget."""
    canaries_when_flagged: bool
    """Also where the verdict is decided without them; on large models they cost a minute."""
    drift_tokens: int
    behaviours: int
    """Behaviours whose circuit is looked for."""
    contexts: int
    """Contexts per behaviour used for its circuit."""
    measured: int
    """Nodes measured one by one."""
    controls: int
    marked: int
    """Examples whose tokens are replaced one by one."""


def budget(name: Name, parameters: int, vocabulary: int, context: int, *, given: bool) -> Budget:
    """The sizes for models of ``parameters`` parameters, ``vocabulary`` tokens and ``context`` positions, on a corpus
    that was ``given`` or else sampled from the parent."""
    level = ("quick", "standard", "thorough").index(name)
    small = parameters < 5_000_000
    tokens = int(min(40_000 * 3**level, max(4_000, _WORK[name] / parameters)))
    return Budget(
        name=name,
        small=small,
        scan_tokens=tokens,
        window=min(96, context),
        batch_tokens=max(256, min(8192, 50_000_000 // vocabulary)),
        amplified=(128 if small else 24) * 2**level,
        amplifications=((0.0,), (1.0,)) if small else ((1.0, 4.0),),
        amplified_length=min(40, context - 4),
        swept=0 if small else 3072 * 2**level,
        replicate=given,
        null_draws=19 if small else (10, 19, 39)[level],
        null_tokens=max(1_500, tokens // 4),
        canaries=10 if small else 5 * 2**level,
        canary_texts=CANARY_TEXTS[name],
        canaries_when_flagged=small or level > 0,
        drift_tokens=max(1_000, tokens // 4),
        behaviours=4 * 2**level,
        contexts=(24 if small else 8) * 2**level,
        measured=400 if small else 20 * 2**level,
        controls=19 if small else 9,
        marked=3,
    )
