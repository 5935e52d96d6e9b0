"""What a discovery found, as one JSON file with the arrays beside it in safetensors."""

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from heredity.interp.errors import GraphError, one_line

from .faithfulness import Curve
from .intervals import Interval
from .layout import NodeLayout
from .necessity import Band, Missed
from .stability import Stability

FORMAT = "heredity circuit 1"
_BYTES = 2**28


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelAbout(_Record):
    """The model a circuit is of."""

    spec: str
    architecture: str
    sha256: str
    """Over weights, configuration and tokenizer."""
    n_params: int


class TaskAbout(_Record):
    """The task, and how well the model does it."""

    name: str
    about: str
    sha256: str
    """Of the task file."""
    metric: str
    discovery_pairs: int
    testing_pairs: int
    data_sha256: str
    """Over the token ids of all pairs."""
    dropped: dict[str, tuple[int, int]]
    """Fillers left out because they are no single token, and all, per list."""
    accuracy: float | None
    """Share of clean prompts of both halves on which right answers are ahead; None if the metric has no answers."""
    clean: float
    """The metric on clean prompts of the testing half."""
    corrupt: float
    """On counterfactual ones."""
    effect: Interval
    """Their difference."""
    examples: tuple[tuple[str, str], ...]
    """A few clean and counterfactual prompts."""


class Attribution(_Record):
    """How edges were scored."""

    method: str
    steps: int
    completeness: float
    """|Σ scores out of the embedding − (m(x) − m(x′))| as a share of the latter."""
    tolerance: float


class Edge(_Record):
    """An edge of the circuit. ``effect`` is m(x) − m(x with the edge exchanged) on the testing half."""

    source: str
    destination: str
    score: float
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    confirmed: bool | None = None
    """Whether the interval lies on the score's side of 0; None where it was not re-measured."""


class Node(_Record):
    """A source that the circuit has edges out of."""

    name: str
    layer: int
    """−1 for the embedding."""
    attribution: float
    """Sum of the scores of all edges out of it."""
    share: float | None = None
    """``effect`` as a share of the effect of the counterfactual prompts."""
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    confirmed: bool | None = None

    @property
    def id(self) -> str:
        """The name (:class:`.drawable.NodeLike`)."""
        return self.name

    @property
    def patch(self) -> float | None:
        """Share of the effect that goes when the node is exchanged."""
        return self.share

    @property
    def ablation(self) -> float | None:
        """Not measured."""
        return None

    @property
    def selected(self) -> bool:
        """It is in the circuit."""
        return True


class GridPoint(_Record):
    """What a node carries at one position of the example."""

    node: str
    layer: int
    position: int
    attribution: float


class CurveRecord(_Record):
    """A faithfulness curve and the area under it."""

    kind: Literal["CMD", "CPR"]
    area: float
    curve: Curve


class Proof(_Record):
    """What interventions on the testing half say of the circuit."""

    faithfulness: Interval
    """With counterfactual values outside the circuit."""
    faithfulness_mean: Interval
    """With mean values over counterfactual prompts outside it."""
    faithfulness_zero: Interval
    """With zeros outside it."""
    complement: Interval
    """f of everything but the circuit."""
    minimality: tuple[Band, ...]
    missed: Missed
    stability: Stability


class Sizes(_Record):
    """What :class:`.layout.NodeLayout` is made from."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    parallel: bool


class CircuitRecord(_Record):
    """A circuit for one task in one model, and the evidence for it."""

    format: Literal["heredity circuit 1"] = FORMAT
    model: ModelAbout
    task: TaskAbout
    attribution: Attribution
    sizes: Sizes
    target: float
    """Faithfulness asked for when the size was chosen, on the discovery half."""
    requested: int
    """Edges of largest absolute score it was taken from."""
    size: int
    """Edges it has, after those on no path were dropped."""
    share: float
    """Of all edges."""
    proof: Proof
    curves: tuple[CurveRecord, ...]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    """Of the circuit, largest absolute score first."""
    others: tuple[Edge, ...]
    """Edges outside the circuit that were re-measured."""
    tokens: tuple[str, ...]
    """Of the first clean prompt of the discovery half."""
    grid: tuple[GridPoint, ...]
    seed: int
    arrays_sha256: str
    """Of the file of the same name that ends in .safetensors: ``scores`` float64 and ``circuit`` uint8, [sources,
    destinations]."""
    seconds: float
    versions: dict[str, str]

    @property
    def layout(self) -> NodeLayout:
        """Names of the arrays' rows and columns."""
        return NodeLayout(**self.sizes.model_dump())


def save_circuit(record: CircuitRecord, scores: np.ndarray, circuit: np.ndarray, path: Path) -> CircuitRecord:
    """Write ``path`` (JSON) and, beside it, the arrays; each whole or not at all, arrays first.

    Returns:
        The record with the arrays' digest.

    Raises:
        StoreError: they cannot be written.
    """
    from safetensors.numpy import save

    from heredity.interp.store import replacing

    data = save({"scores": scores.astype(np.float64), "circuit": circuit.astype(np.uint8)}, {"format": FORMAT})
    record = record.model_copy(update={"arrays_sha256": hashlib.sha256(data).hexdigest()})
    with replacing(path.with_suffix(".safetensors")) as partial:
        partial.write_bytes(data)
    with replacing(path) as partial:
        partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return record


def load_circuit(path: str | Path) -> CircuitRecord:
    """Read a circuit file and check it; its arrays are not read.

    Raises:
        GraphError: it is missing, too large, of another format or says what cannot be.
    """
    path = Path(path)
    remedy = f"Give a file that `heredity circuit` wrote, of the format {FORMAT!r}."
    try:
        if path.stat().st_size > _BYTES:
            raise ValueError(f"larger than {_BYTES >> 20} MiB")
        content = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("another format")
        record = CircuitRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = one_line(".".join(map(str, first["loc"])), 80)
        raise GraphError(f"field {field}: {one_line(first['msg'], 200)}", where=str(path), remedy=remedy) from None
    except (OSError, ValueError, RecursionError) as error:
        what = error.strerror if isinstance(error, OSError) else one_line(str(error), 200)
        raise GraphError(what or type(error).__name__, where=str(path), remedy=remedy) from None
    _check_names(record, path)
    return record


def load_arrays(path: str | Path, record: CircuitRecord) -> tuple[np.ndarray, np.ndarray]:
    """``scores`` float64 and ``circuit`` bool, [sources, destinations], of the circuit file ``path``.

    Raises:
        GraphError: the arrays are missing, damaged, or another circuit's.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    beside = Path(path).with_suffix(".safetensors")
    layout = record.layout
    shape = (len(layout.sources), len(layout.destinations))
    remedy = "Keep the .json and the .safetensors of one run together."
    try:
        data = beside.read_bytes()
        if hashlib.sha256(data).hexdigest() != record.arrays_sha256:
            raise ValueError("not the arrays of this circuit (digests differ)")
        arrays = load(data)
        scores, circuit = arrays["scores"], arrays["circuit"].astype(bool)
        if scores.shape != shape or circuit.shape != shape or scores.dtype != np.float64:
            raise ValueError(f"arrays must be {list(shape)}")
        if not np.isfinite(scores).all():
            raise ValueError("scores are not finite")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) else one_line(str(error), 200)
        raise GraphError(what or type(error).__name__, where=str(beside), remedy=remedy) from None
    return scores, circuit


def _check_names(record: CircuitRecord, path: Path) -> None:
    sizes = record.sizes
    small = all(0 < n <= 1000 for n in (sizes.n_layers, sizes.n_heads, sizes.n_kv_heads))
    layout = record.layout if small and sizes.n_heads % sizes.n_kv_heads == 0 else None
    for edge in (*record.edges, *record.others):
        if layout is None or edge.source not in layout.source_index or edge.destination not in layout.destination_index:
            raise GraphError(
                f"an edge {one_line(edge.source, 40)!r} → {one_line(edge.destination, 40)!r} that a model of its sizes "
                "does not have",
                where=str(path),
                remedy="Write the file anew with `heredity circuit`.",
            )
    for node in record.nodes:
        if layout is None or node.name not in layout.source_index:
            raise GraphError(
                f"a node {one_line(node.name, 40)!r} that a model of its sizes does not have",
                where=str(path),
                remedy="Write the file anew with `heredity circuit`.",
            )
