"""Explanations by a language model, against a server on this machine that speaks the protocol well or badly."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from heredity.interp.errors import HeredityError
from heredity.interp.explain import Contexts, Endpoint, Example, explain_by_model
from heredity.interp.model import Encoded
from heredity.kernels import FeatureCSR

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
HERE = Example(before="ab ", token="cd", after=" ef\n", activation=1.0)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[tuple[str, dict[str, Any], dict[str, str]]]]]:
    seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body, dict(self.headers)))
            answer(self, body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def says(text: str) -> Answer:
    return lambda handler, body: send(handler, completion(text))


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    with serving(says("At cd.")) as (url, seen):
        assert Endpoint(url + "/", "tiny", key_variable="SOME_KEY").propose([HERE]) == "At cd."
        assert Endpoint(url, "tiny").propose([HERE]) == "At cd."
    path, body, headers = seen[0]
    assert path == "/v1/chat/completions" and body["model"] == "tiny" and body["temperature"] == 0
    assert body["messages"][1]["content"] == "1. ab «cd» ef\\n"
    assert headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in seen[1][2]


def test_the_judge_names_numbers() -> None:
    with serving(says("Those are [2, 3]")) as (url, seen):
        said = Endpoint(url, "tiny").active("words {braces}", [HERE] * 13)
    assert said == [False, True, True, *[False] * 7, False, True, True]
    assert len(seen) == 2 and "words {braces}" in seen[0][1]["messages"][0]["content"]


def trickle(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(30):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return
        time.sleep(0.05)


def redirected(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    handler.send_response(302)
    handler.send_header("Location", "http://127.0.0.1:1/elsewhere")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


BAD: dict[str, tuple[Answer, str]] = {
    "500": (lambda h, b: send(h, b"oops", 500), "HTTP status 500"),
    "redirect": (redirected, "HTTP status 302"),
    "no JSON": (lambda h, b: send(h, b"<html>"), "something else than a chat completion"),
    "no UTF-8": (lambda h, b: send(h, b"\xff\xfe\xff"), "something else than a chat completion"),
    "no choices": (lambda h, b: send(h, b'{"choices": []}'), "something else than a chat completion"),
    "a list": (lambda h, b: send(h, b"[1]"), "something else than a chat completion"),
    "nested": (lambda h, b: send(h, b"[" * 100_000), "something else than a chat completion"),
    "null": (lambda h, b: send(h, b'{"choices": [{"message": {"content": null}}]}'), "without text"),
    "huge": (lambda h, b: send(h, b"x" * 1_100_000), "more than 1000000 bytes"),
    "silent": (lambda h, b: time.sleep(0.8), "within 0.3 s"),
    "trickle": (trickle, "within 0.3 s"),
    "prose": (says("all of them\x1b[31m"), "instead of a JSON list"),
    "out of range": (says("[1, 7]"), "no number from 1 to 2"),
    "not numbers": (says('["1"]'), "no number from 1 to 2"),
    "true": (says("[true]"), "no number from 1 to 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_answers_are_errors_of_one_line(name: str) -> None:
    answer, words = BAD[name]
    with serving(answer) as (url, _), pytest.raises(HeredityError) as caught:
        Endpoint(url, "tiny", timeout=0.3).active("x", [HERE, HERE])
    assert words in str(caught.value) and str(caught.value).isprintable()


def test_no_server_no_key_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(says("x")) as (url, _):
        pass
    with pytest.raises(HeredityError, match="cannot be reached"):
        Endpoint(url, "tiny").propose([HERE])
    for key in ("", "a\nb"):
        monkeypatch.setenv("SOME_KEY", key)
        with pytest.raises(HeredityError, match="holds no API key"):
            Endpoint(url, "tiny", key_variable="SOME_KEY").propose([HERE])
    for address in ("file:///etc/passwd", "localhost:80", ""):
        with pytest.raises(HeredityError, match="not an http or https address"):
            Endpoint(address, "tiny")


# --- scoring ---


def contexts_and_features() -> tuple[Contexts, FeatureCSR]:
    """80 texts of 30 words out of ten; active at w3."""
    rng, texts = np.random.default_rng(4), []
    for _ in range(80):
        ids = rng.integers(0, 10, 30)
        text = " ".join(f"w{i}" for i in ids)
        texts.append(Encoded(text, tuple(ids.tolist()), tuple(m.span() for m in re.finditer(r"\S+", text))))
    contexts = Contexts(tuple(texts))
    dense = torch.from_numpy((contexts.ids == 3).astype(np.float32))[:, None]
    rare = torch.zeros_like(dense)
    rare[5] = 1
    return contexts, FeatureCSR.from_dense(torch.cat([dense, rare], dim=1))


class Reader:
    """Explains by the commonest token, or always by one; judges by whether the token is named."""

    def __init__(self, always: str | None = None) -> None:
        self.always = always
        self.shown: list[Example] = []
        self.judged: list[Example] = []

    def propose(self, examples: Sequence[Example]) -> str:
        self.shown += examples
        return self.always or f"at {max({e.token for e in examples}, key=[e.token for e in examples].count)}\n"

    def active(self, explanation: str, contexts: Sequence[Example]) -> list[bool]:
        self.judged += contexts
        return [e.token in explanation for e in contexts]


def test_a_right_explanation_scores_and_a_wrong_one_does_not() -> None:
    contexts, features = contexts_and_features()
    right, wrong = Reader(), Reader("at w5")
    found, rare = explain_by_model(features, contexts, [0, 1], explainer=right, judge=right, seed=1)
    assert found.rule == "at w3" and found.program is None and found.balanced_accuracy == 1.0
    assert found.q is not None and 0.6 < found.q < 1 and found.null is not None and found.null < 0.25
    assert rare.status == "too few contexts" and rare.q is None
    again = explain_by_model(features, contexts, [0], explainer=Reader(), judge=Reader(), seed=1)
    assert again[0] == found
    other = explain_by_model(features, contexts, [0], explainer=wrong, judge=wrong, seed=1)[0]
    assert other.q == 0.0 and other.balanced_accuracy is not None and other.balanced_accuracy < 0.5


def test_the_judge_sees_no_text_of_the_explainer_and_no_activations() -> None:
    contexts, features = contexts_and_features()
    reader = Reader()
    explain_by_model(features, contexts, [0], explainer=reader, judge=reader, seed=2)
    whole = [t.text for t in contexts.texts]
    learned = {t for t in whole for e in reader.shown if e.before + e.token + e.after in t}
    judged = {t for t in whole for e in reader.judged if e.before + e.token + e.after in t}
    assert learned and judged and not learned & judged
    assert {e.activation for e in reader.judged} == {0.0}
    assert sum(e.token == "w3" for e in reader.judged) == len(reader.judged) / 2


def test_over_http() -> None:
    contexts, features = contexts_and_features()

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        asked, shown = (message["content"] for message in body["messages"])
        numbers = [int(line.split(".")[0]) for line in shown.splitlines() if "«w3»" in line]
        send(handler, completion("at w3" if "Say in one" in asked else json.dumps(numbers)))

    with serving(answer) as (url, _):
        endpoint = Endpoint(url, "tiny")
        (found,) = explain_by_model(features, contexts, [0], explainer=endpoint, judge=endpoint, seed=1)
    assert found.rule == "at w3" and found.balanced_accuracy == 1.0


def test_a_judge_that_leaves_contexts_out_is_refused() -> None:
    contexts, features = contexts_and_features()

    class Short(Reader):
        def active(self, explanation: str, contexts: Sequence[Example]) -> list[bool]:
            return [True]

    with pytest.raises(ValueError, match="1 answers"):
        explain_by_model(features, contexts, [0], explainer=Short(), judge=Short(), seed=1)
