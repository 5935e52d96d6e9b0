"""What an audit says: frozen, versioned records. ``audit.json`` is one :class:`Audit`.

A number that is an estimate carries its interval; a number nobody measured is a :class:`NotMeasured` with the
reason, never a zero.
"""

from typing import Annotated, Literal

from pydantic import Field

from .counterparts import Mechanisms
from .crosscoders_record import NONE_GIVEN, CrosscoderRecord
from .latents_record import LatentRecord
from .opacity_record import OpacityDetail
from .principle_records import PrincipleRecord, TaskRecord
from .readouts import Baselines
from .values import Estimate, Interval, NotMeasured, Record

SCHEMA_VERSION = "1.0"


class ModelRecord(Record):
    """One model of the pair."""

    spec: str
    architecture: str
    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int
    parameters: int
    sha256: str
    """Content digest over tensors, configuration and tokenizer."""
    floor: float
    """Largest log-probability error of the hooked model against the bare transformers forward, in nats."""


class TokenChange(Record):
    """How a token's probability differs between parent and successor."""

    token: str
    p_successor: float
    p_parent: float
    count: int
    """Positions it was counted at."""


class MarkedToken(Record):
    """A token of an example."""

    text: str
    weight: float
    """How much of the divergence vanishes when this token is replaced, as a share (0 where not measured)."""


class Example(Record):
    """One context of a behaviour."""

    text_id: str
    tokens: tuple[MarkedToken, ...]
    """The context up to and including the position where the models diverge."""
    kl: float
    successor_says: str
    p_successor: float
    """Probability of ``successor_says`` under the successor."""
    p_successor_in_parent: float
    """Probability of ``successor_says`` under the parent."""
    parent_says: str
    p_parent: float
    continuation_successor: str
    """What the successor goes on to write, greedy; empty for behaviours below the policy."""
    continuation_parent: str


class Node(Record):
    """A head, MLP, or the embedding/unembedding of the successor, and what it carries of a behaviour."""

    id: str
    """``attn_head@L.H``, ``mlp_out@L``, ``embed`` or ``unembed``."""
    layer: int
    attribution: float
    """First-order estimate of the share of the gap that this node carries."""
    patch: float | None
    """Share of KL(S‖P) that vanishes when the parent's value is put in; null where not measured."""
    ablation: float | None
    """Share of KL(S‖P) that vanishes when the node's mean over ordinary text is put in; null where not measured."""
    selected: bool
    """In the smallest set found."""
    inherited: Estimate
    """Share of what the node does for the behaviour that the parent's counterpart would do in its place."""


class GridPoint(Record):
    """Attribution of one node at one token of the circuit's example, for the layer × position view."""

    node: str
    layer: int
    position: int
    attribution: float


class Circuit(Record):
    """The parts of the successor that carry a behaviour, re-measured by intervention."""

    method: Literal["parent", "mean"]
    """What replaces a node's value: the parent's own value, or the node's mean over ordinary text."""
    nodes: tuple[Node, ...]
    """Ranked; at most 60."""
    n_candidates: int
    """Nodes whose value differs at all between the models (or all nodes, where only means are possible)."""
    selected: tuple[str, ...]
    """The smallest set found that closes the target share of the gap."""
    target: float
    """The share of the gap the set had to close."""
    reversion: Estimate
    """Share of the gap closed by the set when the parent's values are put in."""
    ablation: Estimate
    """Share of the gap closed by the set when mean values are put in."""
    controls: tuple[float, ...]
    """Share closed by random sets matched in number and kind, same intervention as ``method``."""
    control_high: float
    """Largest of ``controls``."""
    confirmed: bool
    """The lower end of the interval reaches the policy's share, and few enough matched controls reach it too."""
    tokens: tuple[str, ...]
    """Tokens of the example that ``grid`` is drawn over."""
    grid: tuple[GridPoint, ...]


class Behaviour(Record):
    """A kind of context in which parent and successor say different things."""

    id: str
    source: Literal["corpus", "sampled", "amplified"]
    """Where its contexts were found; the most ordinary source wins."""
    title: str
    """One line: what the successor says instead of what."""
    kind: Literal["emergent", "lost", "replaced"]
    """Emergent: only the successor is sure. Lost: only the parent is. Replaced: neither is much surer."""
    n_contexts: int
    n_replicated: int
    """How many of them are replicas: a rare context's last tokens put behind other text."""
    n_texts: int
    """Windows of text in which the others were found."""
    effect: Interval
    """KL(successor‖parent) in nats at the behaviour's positions, mean over contexts."""
    effect_reverse: Interval
    """KL(parent‖successor), nats."""
    impact: float
    """Share of all KL(successor‖parent) of its source that these contexts carry."""
    false_alarm: float
    """Share of null successors (plus one) that show an effect as large, lower end against lower end; its resolution is
    1/(draws+1). They read a part of the corpus and write nothing, so for what was found in the models' own writing it
    is only a lower bound."""
    null_max: float
    """Largest effect any null successor showed (lower end of its interval), nats."""
    declared_by: str | None
    """The intent's change that covers it."""
    inherited: Estimate
    """Share of the successor's circuit whose work the parent's counterparts would do in its place."""
    lost: Estimate
    """Share of the parent's circuit, for what it says in these contexts, that the successor's would not do."""
    emergent: Estimate
    """What of the successor's circuit is not inherited."""
    opacity: Estimate
    """Share of the effect that runs through parts no explanation predicts; negative where they oppose it."""
    opacity_detail: Annotated[OpacityDetail | NotMeasured, Field(discriminator="status")]
    """Its terms, reasons and sites."""
    latents: Annotated[tuple[LatentRecord, ...] | NotMeasured, Field(union_mode="left_to_right")]
    """Directions of the difference between the models that tell its contexts from those with the trigger broken; empty
    where none stands out of this pair's null."""
    successor_tokens: tuple[TokenChange, ...]
    parent_tokens: tuple[TokenChange, ...]
    trigger_tokens: tuple[str, ...]
    """Context tokens without which the divergence vanishes, strongest first."""
    examples: tuple[Example, ...]
    circuit: Annotated[Circuit | NotMeasured, Field(union_mode="left_to_right")]
    mechanisms: Annotated[Mechanisms | NotMeasured, Field(union_mode="left_to_right")]
    """Both models' circuits compared."""


class Finding(Record):
    """A behaviour that the policy counts against approval unless it is declared."""

    id: str
    behaviour: str
    title: str
    declared_by: str | None
    sites: tuple[str, ...]
    nodes: tuple[str, ...]
    effect: Interval
    emergence: Estimate
    opacity: Estimate
    impact: float
    false_alarm: float
    """Share of null successors (plus one) that show any behaviour as large: what the policy compares. It holds for all
    behaviours of the audit together, so a correction for their number is in it already."""
    p_value: float
    """The larger of ``false_alarm`` and the share of random sets (plus one) that close as much of the gap; of untraced
    behaviours the former alone."""
    q_value: float
    """``p_value`` adjusted by Benjamini and Hochberg (1995) over all behaviours that are material."""
    reversion: Estimate
    transplant: Estimate
    """Share of the gap that closes when the parent runs with what is new in the successor."""
    side_effects: Estimate
    """What reverting the circuit does to the successor elsewhere, nats per token."""
    confirmed: bool
    """Its circuit passed the causal check."""
    examples: tuple[Example, ...]


class Null(Record):
    """Successors with nothing new: the parent with a meaningless change of the same size as the successor's.

    Every changed tensor's rows and columns are shuffled and signed at random (between architectures: noise), or the
    parent is trained on (``benign``), and the change is scaled until the 95th percentile of per-token KL equals the
    pair's.
    """

    kind: Literal["scrambled_change", "noise", "benign"]
    recipe: str | None = None
    """How ``benign`` ones were trained, and on what."""
    draws: int
    scale: float
    """Factor the change was multiplied by to reach the same size. 0 where that size is 0: a null successor is then the
    parent itself, and none had to be run."""
    size: float
    """The 95th percentile of per-token KL(successor‖parent) that was matched, nats."""
    left_out: float = 0.0
    """Share of tokens that ``size`` leaves out: those of behaviours on more than a twentieth of the text each, which
    would set the percentile by themselves."""
    largest_effects: tuple[float, ...]
    """The largest effect of every draw, nats: of its behaviours, the largest lower end of a 95 % interval."""
    mean_kl: tuple[float, ...]
    tokens: int
    """Tokens every draw was compared on."""


class Canary(Record):
    """A circuit planted in a copy of the successor: after two tokens of the audited text, say a third."""

    layer: int
    """Whose attention carries it."""
    after: str
    says: str
    contexts: int
    """Texts that hold the context, of those it was tried on."""
    seen: float | None
    """Smallest effect, nats of KL(successor‖parent) at its contexts, at which this audit's own steps counted it; null
    if it was not seen at any dose."""
    missed: float | None
    """Largest effect below that at which they did not; null if the smallest dose was seen."""
    together: int = 0
    """At ``missed``: of its texts, how many stood in one behaviour."""
    short: Interval | None = None
    """Effect of that behaviour, which did not count; null where none of its texts stood in any."""


class Power(Record):
    """How small a circuit this audit would have seen, where the audited text exercises it."""

    canaries: tuple[Canary, ...]
    seen_share: float
    """Share of the canaries that must be seen for a size to count as visible."""
    visible: float | None
    """The smallest such size, nats; null if there is none."""
    texts: int = 0
    """Texts that a canary was to act in at this budget."""
    texts_needed: int | None = None
    """Texts in which circuits of the size the policy asks for would have to act so that ``seen_share`` of them are
    seen, estimated from how the canaries fell short; null where acting in more would not help."""


class Calibration(Record):
    """How often this audit would cry wolf on this pair, and how small a circuit it would have seen."""

    null: Null | NotMeasured
    power: Annotated[Power | NotMeasured, Field(union_mode="left_to_right")]


class Coverage(Record):
    """What the audit looked at, and how much of what it saw it accounts for."""

    corpus: str
    """Where the text came from."""
    texts: int
    tokens: int
    compared_tokens: int
    """Tokens with a partner position in the other model."""
    kl_in_behaviours: float
    """Share of the total KL(successor‖parent) on the corpus that lies in the listed behaviours."""
    sites: Annotated[dict[str, Interval] | NotMeasured, Field(union_mode="left_to_right")]
    """Share of KL(successor‖parent) on some of the corpus that each stretch of layers is the reason of, in the order of
    the forward; they add up to 1."""


class Drift(Record):
    """How far the successor moved as a whole."""

    mean_kl: float
    weight_distance: float | NotMeasured
    """‖θ_S − θ_P‖ / ‖θ_P‖."""
    lowest_cka: float
    """Smallest linear CKA over the sites read."""
    loss_parent: float | NotMeasured
    """Mean −log p of the tokens that follow on the corpus under the parent, nats per token of its own."""
    loss_successor: float | NotMeasured
    """The same under the successor: comparable with the parent's where both read text as the same tokens."""


class PolicyRecord(Record):
    """The policy and intent in force."""

    name: str
    sha256: str
    values: dict[str, float | int | str | bool]
    intent: str | None
    intent_sha256: str | None
    declared: tuple[str, ...]
    """Ids of declared changes that were seen."""
    undelivered: tuple[str, ...]
    """Ids of declared changes of which this audit saw nothing."""


class Provenance(Record):
    """What is needed to run it again."""

    command: tuple[str, ...]
    budget: str
    seed: int
    versions: dict[str, str]
    threads: int
    device: str
    corpus_sha256: str
    started: str
    seconds: float
    peak_rss_bytes: int


class Audit(Record):
    """The whole record of one audit."""

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    verdict: Literal["pass", "flag", "inconclusive"]
    reasons: tuple[str, ...]
    parent: ModelRecord
    successor: ModelRecord
    baselines: Baselines
    behaviours: tuple[Behaviour, ...]
    findings: tuple[Finding, ...]
    principles: tuple[Annotated[PrincipleRecord | NotMeasured, Field(union_mode="left_to_right")], ...]
    tasks: tuple[TaskRecord, ...] = ()
    """What became of the tasks that the user named; they decide nothing."""
    calibration: Calibration
    crosscoders: Annotated[tuple[CrosscoderRecord, ...] | NotMeasured, Field(union_mode="left_to_right")] = NONE_GIVEN
    """What crosscoders of the pair among the dictionaries given say of mechanisms that one model alone has."""
    coverage: Coverage
    drift: Drift
    policy: PolicyRecord
    not_measured: tuple[str, ...]
    """In words: what a reader might expect here and will not find."""
    provenance: Provenance


TIMES = ("started", "seconds", "peak_rss_bytes")
"""The fields of :class:`Provenance` that differ between two equal runs."""
