"""From a task to a circuit: what the record says is what its arrays and fresh interventions say; files checked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heredity.circuits.circuit_record import CircuitRecord, load_arrays, load_circuit, save_circuit
from heredity.circuits.discover import Discovered, Unkept, discover
from heredity.circuits.drawable import GridPointLike, IntervalLike, NodeLike
from heredity.circuits.edge_patching import CircuitRunner, patch_edges
from heredity.circuits.faithfulness import Faithfulness, top
from heredity.circuits.node_patching import patch_nodes
from heredity.circuits.tasks import Task, load_task, prepare
from heredity.circuits.views import circuit_figure
from heredity.interp.errors import GraphError
from heredity.interp.load import load
from heredity.interp.model import Model
from heredity.zoo import shipped

REPORT = """
name: report
about: The value of a log entry.
fillers:
  numbers: [one, two, three, four, five, six, seven, eight, nine]
  owners: [moss, reed, wade, lane, park, frost, hart, Zanzibar]
  places: [cove, mill, dock, farm, gate, tower, lodge]
slots: {N: numbers, M: numbers, O: owners, P: places}
single: [numbers, owners, places]
templates:
  - clean: "log : owner {O} ; place {P} ; value {N} ; report"
    counterfactual: "log : owner {O} ; place {P} ; value {M} ; report"
    right: " {N}"
    wrong: " {M}"
"""


@pytest.fixture(scope="module")
def model() -> Model:
    return load(str(shipped() / "parent"))


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    path = tmp_path_factory.mktemp("task") / "report.yaml"
    path.write_text(REPORT)
    return load_task(path)


@pytest.fixture(scope="module")
def found(model: Model, task: Task) -> Discovered:
    return discover(model, task, pairs=32)


def test_the_circuit_does_what_the_record_says(found: Discovered, model: Model, task: Task) -> None:
    record, half = found.record, prepare(model, task, 16).testing
    layout = record.layout
    circuit = torch.from_numpy(found.circuit)
    f = Faithfulness(CircuitRunner(model, layout, half.pairs, half.metric))
    assert f(circuit).estimate == pytest.approx(record.proof.faithfulness.estimate, abs=1e-5)
    assert f(layout.edges & ~circuit).estimate == pytest.approx(record.proof.complement.estimate, abs=1e-5)
    assert bool((circuit == top(torch.from_numpy(found.scores), layout, record.requested)).all())
    assert record.size == int(circuit.sum()) and record.share == record.size / layout.n_edges
    assert record.proof.faithfulness.estimate > 0.6 and record.attribution.completeness <= 0.02
    named = {(edge.source, edge.destination): edge for edge in record.edges}
    assert len(named) == record.size
    for (source, destination), edge in named.items():
        at = layout.source_index[source], layout.destination_index[destination]
        assert found.circuit[at] and found.scores[at] == edge.score
    scores = [abs(edge.score) for edge in record.edges]
    assert scores == sorted(scores, reverse=True)


def test_effects_are_those_of_real_exchanges_on_the_other_half(found: Discovered, model: Model, task: Task) -> None:
    record, half = found.record, prepare(model, task, 16).testing
    layout = record.layout
    edges = [edge for edge in (*record.edges, *record.others) if edge.effect is not None]
    assert len(edges) == 20 and all(edge.confirmed is None for edge in record.edges if edge.effect is None)
    at = [(layout.source_index[e.source], layout.destination_index[e.destination]) for e in edges]
    for edge, effect in zip(edges, patch_edges(model, layout, half.pairs, half.metric, at).mean(1), strict=True):
        assert edge.effect == pytest.approx(float(effect), abs=1e-5)
        assert edge.low is not None and edge.high is not None and edge.low <= edge.effect <= edge.high
        assert edge.confirmed == (edge.low > 0 if edge.score > 0 else edge.high < 0)
    nodes = [node for node in record.nodes if node.effect is not None]
    exact = patch_nodes(model, layout, half.pairs, half.metric, [layout.source_index[n.name] for n in nodes]).mean(1)
    for node, effect in zip(nodes, exact, strict=True):
        assert node.effect == pytest.approx(float(effect), abs=1e-5)
        assert node.share == pytest.approx(float(effect) / record.task.effect.estimate, rel=1e-4)
    embedding = next(node for node in record.nodes if node.name == "embed")
    assert embedding.share == pytest.approx(1, abs=1e-4) and embedding.confirmed


def test_what_the_task_is_stands_in_the_record(found: Discovered, model: Model, task: Task) -> None:
    about = found.record.task
    assert (about.discovery_pairs, about.testing_pairs, about.accuracy) == (16, 16, 1.0)
    assert about.sha256 == task.sha256 and found.record.model.sha256 == model.digest
    assert about.dropped == {"numbers": (0, 9), "owners": (1, 8), "places": (0, 7)}
    kinds = {one.kind: one for one in found.record.curves}
    assert set(kinds) == {"CMD", "CPR"} and kinds["CPR"].curve.signed and not kinds["CMD"].curve.signed
    assert kinds["CMD"].area == pytest.approx(kinds["CMD"].curve.area)
    assert found.record.proof.stability.draws >= 100 and 0 < found.record.proof.stability.jaccard <= 1
    assert found.record.seconds > 0 and "torch" in found.record.versions


def test_the_same_seed_finds_the_same_and_nothing_depends_on_being_recalled(
    found: Discovered, model: Model, task: Task
) -> None:
    class Recalled(Unkept):
        """Steps as a run finds them that was interrupted after the last one."""

        def __init__(self) -> None:
            self.values: dict[str, Any] = {}
            self.computed = 0

        def step(self, name: str, compute: Any) -> Any:
            if name not in self.values:
                self.computed += 1
                self.values[name] = json.dumps(compute())
            return json.loads(self.values[name])

        def arrays(self, name: str, compute: Any) -> Any:
            if name not in self.values:
                self.computed += 1
                self.values[name] = compute()
            return self.values[name]

    steps = Recalled()
    runs = [discover(model, task, pairs=32, steps=steps)]
    computed = steps.computed
    runs.append(discover(model, task, pairs=32, steps=steps))
    assert steps.computed == computed > 10
    for run in runs:
        assert np.array_equal(run.scores, found.scores) and np.array_equal(run.circuit, found.circuit)
        assert run.record.model_copy(update={"seconds": 0.0}) == found.record.model_copy(update={"seconds": 0.0})


def test_files_come_back_whole(found: Discovered, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    saved = save_circuit(found.record, found.scores, found.circuit, path)
    assert load_circuit(path) == saved and saved.arrays_sha256
    scores, circuit = load_arrays(path, saved)
    assert np.array_equal(scores, found.scores) and np.array_equal(circuit, found.circuit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["circuit.json", "circuit.safetensors"]
    CircuitRecord.model_json_schema()


def broken(record: dict[str, Any], case: str) -> dict[str, Any]:
    match case:
        case "format":
            record["format"] = "heredity circuit 99"
        case "unknown":
            record["surprise"] = 1
        case "missing":
            del record["proof"]
        case "name":
            record["edges"][0]["source"] = "attn_head@99.0"
        case "node":
            record["nodes"][0]["name"] = "<script>"
        case "sizes":
            record["sizes"]["n_layers"] = 10**12
        case "number":
            record["target"] = float("nan")
    return record


@pytest.mark.parametrize("case", ["format", "unknown", "missing", "name", "node", "sizes", "number"])
def test_files_that_say_what_cannot_be_are_refused(case: str, found: Discovered, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    save_circuit(found.record, found.scores, found.circuit, path)
    path.write_text(json.dumps(broken(json.loads(path.read_text()), case)))
    with pytest.raises(GraphError) as refused:
        load_circuit(path)
    assert "circuit.json" in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for name in ("absent.json", "deep.json", "list.json", "bytes.json"):
        with pytest.raises(GraphError, match=name):
            load_circuit(tmp_path / name)


def test_arrays_of_another_run_are_refused(found: Discovered, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    saved = save_circuit(found.record, found.scores, found.circuit, path)
    save_circuit(found.record, found.scores * 2, found.circuit, tmp_path / "other.json")
    (tmp_path / "other.safetensors").replace(tmp_path / "circuit.safetensors")
    with pytest.raises(GraphError, match="not the arrays of this circuit"):
        load_arrays(path, saved)
    (tmp_path / "circuit.safetensors").unlink()
    with pytest.raises(GraphError, match="No such file"):
        load_arrays(path, saved)


def test_a_record_can_be_drawn(found: Discovered) -> None:
    record = found.record
    assert all(isinstance(node, NodeLike) for node in record.nodes)
    assert all(isinstance(point, GridPointLike) for point in record.grid)
    assert isinstance(record.proof.faithfulness, IntervalLike)
    assert {point.node for point in record.grid} <= {node.name for node in record.nodes}
    # Nothing is carried before the first token that differs, the value.
    assert record.tokens[10].strip() in "one two three four five six seven eight nine".split()
    assert min(point.position for point in record.grid) == 10
    figure = circuit_figure(record.tokens, record.grid, record.nodes)
    assert len(figure.data) > 2
