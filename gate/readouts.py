"""Records of the read-outs that need no circuits."""

from .values import NotMeasured, Record


class MinedToken(Record):
    """A token whose log-probability moved most at many positions (diff mining, arXiv 2608.26462)."""

    token: str
    count: int
    """Positions at which it was among the 20 tokens that moved most in this direction."""
    share: float
    """``count`` over all compared positions."""


class Divergence(Record):
    """Per-token KL over the audited text. Source: relative entropy, Kullback & Leibler 1951."""

    texts: int
    tokens: int
    mean: float
    """KL(successor‖parent), nats per token."""
    median: float
    p99: float
    max: float
    mean_reverse: float
    """KL(parent‖successor), nats per token."""
    max_reverse: float
    histogram_edges: tuple[float, ...]
    """Edges of the KL(successor‖parent) histogram, nats."""
    histogram_counts: tuple[int, ...]


class AmplifiedSample(Record):
    """Text decoded from amplified logit differences, ``l_S + a·(l_S − l_P)``, from a vague prompt.

    Sources: model diff amplification (Goodfire 2025); contrastive decoding diffing (arXiv 2605.25902).
    """

    prompt: str
    amplification: float
    text: str
    kl_mean: float
    """Mean unamplified KL(successor‖parent) over the decoded tokens, nats."""
    kl_max: float


class WeightReadout(Record):
    """A leading direction of one weight difference, read through the vocabulary.

    Sources: WeightWatch (arXiv 2508.00161); logit-lens reading of singular vectors (Millidge & Black 2022).
    """

    tensor: str
    rank: int
    """Which singular direction, 0 the largest."""
    singular_value: float
    share: float
    """Its share of the squared Frobenius norm of this tensor's change."""
    relative_change: float
    """‖ΔW‖ / ‖W_parent‖ of the tensor, Frobenius."""
    reads: tuple[str, ...]
    """Tokens whose embedding the direction reads most (empty where it does not read the residual stream)."""
    writes: tuple[str, ...]
    """Tokens whose logit the direction writes most (empty where it does not write the residual stream)."""


class MeanDifference(Record):
    """Mean activation difference at a site through the logit lens. Source: ADL (arXiv 2510.13900)."""

    site: str
    position: str
    """"0".."4" for the first tokens of a text, "all" for every token."""
    relative_norm: float
    """‖mean(S − P)‖ / mean ‖P‖."""
    tokens: tuple[str, ...]
    """Tokens whose logits the difference raises most."""


class LayerSimilarity(Record):
    """Linear CKA of parent and successor at one site. Source: Kornblith et al. 2019. A thermometer, not an alarm."""

    site: str
    cka: float


class Baselines(Record):
    """Cheap read-outs that need no circuits; they also propose the behaviours."""

    divergence: Divergence
    raised_tokens: tuple[MinedToken, ...]
    """Tokens whose log-probability rises most often from parent to successor."""
    lowered_tokens: tuple[MinedToken, ...]
    amplified: tuple[AmplifiedSample, ...]
    weights: tuple[WeightReadout, ...] | NotMeasured
    mean_differences: tuple[MeanDifference, ...] | NotMeasured
    similarity: tuple[LayerSimilarity, ...] | NotMeasured
