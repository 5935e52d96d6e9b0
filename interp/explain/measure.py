"""Explanations of latents: a rule learned on one half of the texts and scored on the other.

q = max(0, 2·low − 1 − null): the lower 95 % bound of the balanced accuracy on the half not learned from, rescaled so
that chance is 0, less what the same search reaches when each half's labels are moved along its texts by a random number
of tokens (they keep their number and their clusters, and lose their relation to the text).
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from heredity.kernels import FeatureCSR

from .candidates import Catalogue
from .contexts import Contexts
from .halves import halves
from .learn import learn, sampled
from .record import Example, Explanation
from .rules import Promoted, Rule
from .score import Score, score, weigh

LEAST_ACTIVE = 20
"""Active tokens each half must have, and inactive ones."""
LEAST_TEXTS = 8
"""Texts with an active token that each half must have."""
SHUFFLES = 5
EXAMPLES = 8


def explain(
    features: FeatureCSR,
    contexts: Contexts,
    latents: Sequence[int],
    *,
    seed: int,
    promoted: Mapping[int, Sequence[int]] | None = None,
    names: Mapping[int, str] | None = None,
) -> list[Explanation]:
    """Explanations of ``latents``, in their order.

    A latent is active at a token where a value other than 0 is stored. What comes out for it depends on its values, the
    texts and ``seed``, not on its number or on which others are asked for.

    Args:
        features: T tokens by F latents.
        contexts: the same T tokens.
        latents: which.
        seed: decides the halves, the samples and the shuffles.
        promoted: token ids that a latent makes more likely (the top of its logit effect), where known.
        names: of promoted tokens, for those that do not occur in the texts.

    Raises:
        ValueError: ``features`` are not of these tokens, have no such latent, or hold NaN or infinity.
    """
    if features.n_tokens != len(contexts):
        raise ValueError(f"features of {features.n_tokens} tokens do not belong to contexts of {len(contexts)}")
    absent = [latent for latent in latents if not 0 <= latent < features.n_latents]
    if absent:
        raise ValueError(f"no latent {absent[0]} among {features.n_latents}")
    sides = halves(contexts, seed)
    catalogue = Catalogue(contexts)
    view, values = features.by_latent, features.values.detach().float().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError("features hold NaN or infinity")
    indptr, tokens, order = (array.cpu().numpy() for array in (view.indptr, view.tokens, view.order))
    out = []
    for latent in latents:
        part = slice(int(indptr[latent]), int(indptr[latent + 1]))
        activation = np.zeros(len(contexts), dtype=np.float32)
        activation[tokens[part]] = values[order[part]]
        ids = tuple(int(i) for i in (promoted or {}).get(latent, ()))
        called = tuple(contexts.names.get(i) or (names or {}).get(i, f"<{i}>") for i in ids)
        out.append(
            _explain(latent, activation, catalogue, sides, seed, Promoted(ids=ids, names=called) if ids else None)
        )
    return out


def _explain(
    latent: int,
    activation: np.ndarray,
    catalogue: Catalogue,
    sides: tuple[np.ndarray, np.ndarray],
    seed: int,
    promoted: Promoted | None,
) -> Explanation:
    contexts, active = catalogue.contexts, activation != 0
    base = {
        "latent": latent,
        "n_active": int(active.sum()),
        "n_texts": len(np.unique(contexts.text[active])),
        "examples": examples(activation, contexts),
    }
    if not all(enough(active, side, contexts) for side in sides):
        unmeasured = dict.fromkeys(("program", "q", "balanced_accuracy", "low", "null"))
        return Explanation(status="too few contexts", rule="", **unmeasured, **base)
    rng = np.random.default_rng([seed % 2**32, zlib.crc32(activation.tobytes())])
    program, real = learned(active, catalogue, sides, rng, promoted)
    shuffled = [learned(moved(active, sides, rng), catalogue, sides, rng, promoted)[1] for _ in range(SHUFFLES)]
    null = float(np.mean([max(0.0, 2 * each.balanced_accuracy - 1) for each in shuffled]))
    return Explanation(
        status="measured",
        rule=program.in_words(),
        program=program,
        q=max(0.0, 2 * real.low - 1 - null),
        balanced_accuracy=real.balanced_accuracy,
        low=real.low,
        null=null,
        **base,
    )


def learned(
    active: np.ndarray,
    catalogue: Catalogue,
    sides: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    promoted: Promoted | None = None,
) -> tuple[Rule, Score]:
    """A program learned on the first of ``sides`` from labels ``active`` (bool [T]), and its score on the second."""
    contexts = catalogue.contexts
    first, second = sides
    program = learn(sampled(active & first, weigh(active, first, contexts), contexts.text, rng), catalogue, promoted)
    return program, score(program.holds(contexts), active, weigh(active, second, contexts), contexts.text)


def moved(active: np.ndarray, sides: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """``active`` with the labels of each side rolled along that side by a random number of tokens: bool [T]."""
    out = np.zeros_like(active)
    for side in sides:
        labels = active[side]
        out[side] = np.roll(labels, int(rng.integers(len(labels) // 8, len(labels) - len(labels) // 8)))
    return out


def enough(active: np.ndarray, side: np.ndarray, contexts: Contexts) -> bool:
    """Whether a half holds enough active tokens, in enough texts, and inactive ones, to say anything."""
    on, off = active & side, ~active & side
    counts = min(int(on.sum()), int(off.sum()))
    return counts >= LEAST_ACTIVE and len(np.unique(contexts.text[on])) >= LEAST_TEXTS


def examples(activation: np.ndarray, contexts: Contexts) -> tuple[Example, ...]:
    """Where ``activation`` [T] is largest in absolute value, each in another text, at most ``EXAMPLES``."""
    rows = np.flatnonzero(activation)
    rows = rows[np.argsort(-np.abs(activation[rows]), kind="stable")]
    _, first = np.unique(contexts.text[rows], return_index=True)
    chosen = rows[np.sort(first)[:EXAMPLES]]
    shown = ((contexts.around(int(row)), float(activation[row])) for row in chosen)
    return tuple(Example(before=b, token=t, after=a, activation=value) for (b, t, a), value in shown)
