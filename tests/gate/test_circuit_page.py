"""Pages of circuits: in a real browser, filters move, nothing is fetched, and text of a model stays text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from heredity.circuits.attribution_graph_json import GraphFile, write_graph_file
from heredity.circuits.eap_ig_json import EdgeGraph, write_eap_ig
from heredity.circuits.layout import NodeLayout
from heredity.gate.circuit_page import write_circuit
from heredity.gate.cli import app
from heredity.interp.errors import GraphError, OutputError

LAYOUT = NodeLayout(3, 4, 2, 8)


def circuit(path: Path, seed: int, layout: NodeLayout = LAYOUT) -> Path:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(layout.sources), len(layout.destinations), generator=g, dtype=torch.float64)
    scores = scores.masked_fill(~layout.edges, 0)
    write_eap_ig(EdgeGraph(layout, scores, scores.abs() > 1.5), path)
    return path


def graph(path: Path, word: str) -> Path:
    """A graph file whose every text is ``word``."""
    common = {"feature": 1, "jsNodeId": word, "clerp": word}
    nodes = [
        {**common, "node_id": "E_1_0", "layer": "E", "ctx_idx": 0, "feature_type": "embedding"},
        {
            **common,
            "node_id": "0_5_0",
            "layer": "0",
            "ctx_idx": 0,
            "feature_type": "cross layer transcoder",
            "activation": 2,
        },
        {**common, "node_id": "0_-1_1", "layer": "0", "ctx_idx": 1, "feature_type": "mlp reconstruction error"},
        {**common, "node_id": "2_9_1", "layer": "2", "ctx_idx": 1, "feature_type": "logit", "token_prob": 0.5},
    ]
    links = [
        {"source": "E_1_0", "target": "0_5_0", "weight": 2.0},
        {"source": "0_5_0", "target": "2_9_1", "weight": -1.5},
        {"source": "0_-1_1", "target": "2_9_1", "weight": 0.5},
    ]
    about = {"slug": "g", "scan": word, "prompt": word, "prompt_tokens": [word, word]}
    file = GraphFile.model_validate({"metadata": about, "qParams": {}, "nodes": nodes, "links": links})
    return write_graph_file(file, path)


def names(browser: Any) -> list[str]:
    return browser.execute_script(
        "const d = document.querySelector('[data-figure]');"
        "const on = d.data.filter(t => t.meta === 'part' && t.visible !== false && t.opacity !== 0);"
        "return on.flatMap(t => t.customdata)"
    )


def test_the_filters_of_a_page_work(tmp_path: Path, open_page: Callable[[Path], Any]) -> None:
    assert write_circuit(circuit(tmp_path / "a.json", 0), None, tmp_path / "view.html")
    browser = open_page(tmp_path / "view.html")
    before = names(browser)
    slide = "Plotly.restyle(d, ...d.layout.sliders[0].steps[0].args)"
    browser.execute_script(f"const d = document.querySelector('[data-figure]'); return {slide}")
    few = names(browser)
    assert 0 < len(few) < len(before) and set(few) < set(before)
    menu = "Plotly.restyle(d, ...d.layout.updatemenus[0].buttons[4].args)"
    browser.execute_script(f"const d = document.querySelector('[data-figure]'); return {menu}")
    assert set(names(browser)) <= set(few)
    logged = [entry["message"] for entry in browser.get_log("browser")]
    assert not logged, logged
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"}
    assert all(url.startswith(("file:", "data:", "blob:")) for url in urls)


def test_text_of_a_model_is_text(tmp_path: Path, open_page: Callable[[Path], Any]) -> None:
    evil = "<img src=x onerror='document.title=\"gone\"'></script><b>\u202ebold"
    path = graph(tmp_path / "files", evil)
    write_circuit(path, path, tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text()
    assert "<img" not in page and "\u202e" not in page
    browser = open_page(tmp_path / "view.html")
    assert browser.title == "Circuit" and not browser.find_elements("css selector", "img, main b b")
    assert "onerror" in browser.find_element("tag name", "h1").text


def test_the_command_draws_one_and_lays_two_over_one_another(tmp_path: Path) -> None:
    first, second = circuit(tmp_path / "parent.json", 0), circuit(tmp_path / "successor.json", 1)
    run = CliRunner().invoke(app, ["view", str(first)])
    assert run.exit_code == 0 and run.stdout.strip() == str(tmp_path / "view.html")
    assert "Largest effects" in (tmp_path / "view.html").read_text()
    run = CliRunner().invoke(app, ["view", str(first), str(second), "--out", str(tmp_path / "both.html")])
    page = (tmp_path / "both.html").read_text()
    assert run.exit_code == 0 and "laid over one another" in page and "lost: only in parent.json" in page


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for side in ("parent", "successor"):
        (tmp_path / side).mkdir()
        circuit(tmp_path / side / "ioi.json", 0)
    write_circuit(tmp_path / "parent/ioi.json", tmp_path / "successor/ioi.json", tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text()
    assert "<b>parent/ioi.json</b> and <b>successor/ioi.json</b>" in page


def test_two_that_cannot_be_laid_over_one_another_are_refused(tmp_path: Path) -> None:
    first, wide = circuit(tmp_path / "a.json", 0), circuit(tmp_path / "b.json", 0, NodeLayout(3, 6, 2, 8))
    drawn = graph(tmp_path / "files", "x")
    (tmp_path / "audit.json").write_text('{"verdict": "pass"}')
    for other, fault in (
        (wide, "cannot be laid over"),
        (drawn, "cannot be laid over"),
        (tmp_path / "audit.json", "no circuit"),
    ):
        with pytest.raises(GraphError, match=fault):
            write_circuit(first, other, tmp_path / "view.html")
    assert not write_circuit(tmp_path / "audit.json", None, tmp_path / "view.html")
    assert not (tmp_path / "view.html").exists()
    with pytest.raises(OutputError):
        write_circuit(first, None, tmp_path / "absent" / "view.html")
