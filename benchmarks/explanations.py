"""How well planted rules are recovered, and what is "explained" where there is nothing to explain.

    python benchmarks/explanations.py [--record] [--seeds 5000 5001 5002]

Planted latents: one per family of rule and corpus, the rule evaluated here by plain loops over strings (none of the
package's rule code), graded activations, and noise: a share of its tokens silent, and as many others active. The
ceiling is what the planted rule itself scores (2·low − 1) against the same noisy labels.

Nothing to explain: labels drawn without looking at the text, singly or in runs, at the same rates. Beside them,
directions of a model with random weights, which are functions of the tokens and therefore partly explained, rightly:
the baseline that latents of a dictionary have to beat.
"""

import argparse
import ast
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from heredity.interp.explain import Contexts, explain
from heredity.interp.explain.halves import halves
from heredity.interp.explain.score import score, weigh
from heredity.interp.model import Encoded
from heredity.kernels import FeatureCSR
from heredity.zoo import language

NOISE = (0.0, 0.02, 0.05)
RATES = (0.01, 0.02, 0.05)
RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass(frozen=True)
class Token:
    """What a planted rule sees: a text, its tokens as strings, their spans, and which one it is asked about."""

    tokens: list[str]
    spans: tuple[tuple[int, int], ...]
    text: str
    at: int

    @property
    def this(self) -> str:
        return self.tokens[self.at].strip()

    def other(self, offset: int) -> str:
        at = self.at + offset
        return self.tokens[at].strip() if 0 <= at < len(self.tokens) else ""

    @property
    def line_before(self) -> str:
        a, b = self.spans[self.at]
        start = b - len(self.text[a:b].lstrip()) if self.text[a:b].strip() else a
        return self.text[:start].rpartition("\n")[2]

    @property
    def line(self) -> str:
        a = self.spans[self.at][0]
        return self.text[self.text.rfind("\n", 0, a) + 1 :].partition("\n")[0]


Truth = Callable[[Token], bool]


# --- corpora ---


def docstrings() -> list[str]:
    """Different docstrings of the standard library, of 100 characters or more, cut at 1200."""
    found: dict[str, None] = {}
    for path in sorted(Path(ast.__file__).parent.glob("*.py")) + sorted(Path(ast.__file__).parent.glob("[a-z]*/*.py")):
        if "test" in str(path) or "site-packages" in str(path):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= 100:
                    found[text[:1200]] = None
    return list(found)


def tokenised(texts: list[str], vocabulary: int = 2000) -> tuple[Encoded, ...]:
    """Texts under a byte-level BPE trained on them."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False))
    out = [tokenizer.encode(text) for text in texts]
    return tuple(Encoded(t, tuple(e.ids), tuple(e.offsets)) for t, e in zip(texts, out, strict=True))


def english(seed: int, n: int) -> tuple[Encoded, ...]:
    texts = docstrings()
    return tokenised([texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:n]])


def chats(seed: int, n: int) -> tuple[Encoded, ...]:
    """The same under ChatML: first sentence asked, the rest answered."""
    rng, texts, out = np.random.default_rng(seed), docstrings(), []
    for i in rng.permutation(len(texts))[:n]:
        asked, _, told = texts[i][:500].partition(". ")
        turn = [("system", "You explain code."), ("user", asked), ("assistant", told or asked)]
        out.append("".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turn))
    return tokenised(out)


def zoo(seed: int, n: int) -> tuple[Encoded, ...]:
    """Documents of the zoo's language, a token a word."""
    out = []
    for text in language.documents(np.random.default_rng(seed), n).texts():
        spans = tuple(found.span() for found in re.finditer(r"\S+", text))
        out.append(Encoded(text, tuple(language.ID[text[a:b]] for a, b in spans), spans))
    return tuple(out)


# --- planted rules ---


def words_of(rng: np.random.Generator, texts: tuple[Encoded, ...], n: int) -> list[str]:
    """``n`` words drawn from those that make up between 0.1 % and 2 % of the tokens."""
    strings = [t.text[a:b].strip() for t in texts for a, b in t.spans]
    known, counts = np.unique([s for s in strings if s.isalpha() and len(s) > 1], return_counts=True)
    share = counts / len(strings)
    return sorted(rng.choice(known[(share > 0.001) & (share < 0.02)], n, replace=False).tolist())


def in_brackets(t: Token) -> bool:
    before = t.text[: t.spans[t.at][1]].rpartition("\n\n")[2]
    before = before[: len(before) - len(t.tokens[t.at].lstrip())]
    depth = 0
    for c in before:
        depth = max(0, depth + (c == "(") - (c == ")"))
    return depth > 0 and not t.this.startswith(")")


def after_pair(t: Token, at: int) -> bool:
    ids = t.tokens
    return 0 < at < len(ids) and any(ids[i - 1] == ids[at - 1] and ids[i] == ids[at] for i in range(1, at))


def planted(rng: np.random.Generator, texts: tuple[Encoded, ...], corpus: str) -> dict[str, Truth]:
    """Rules by name, with words drawn afresh."""
    sets = [words_of(rng, texts, 6) for _ in range(6)]
    common = words_of(rng, texts, 1)
    first = int(rng.integers(4, 12))
    rules: dict[str, Truth] = {
        "this token": lambda t: t.this in sets[0],
        "the token before": lambda t: t.other(-1) in sets[1],
        "the next token": lambda t: t.other(1) in sets[2],
        "two before": lambda t: t.other(-2) in sets[3],
        "position, first": lambda t: t.at < first,
        "position, range": lambda t: first <= t.at < first + 6,
        "copy: seen before": lambda t: t.tokens[t.at] in t.tokens[: t.at],
        "copy: induced": lambda t: after_pair(t, t.at),
        "copy: next induced": lambda t: after_pair(t, t.at + 1),
        "word in the last 4": lambda t: common[0] in [t.other(-k) for k in (1, 2, 3, 4)],
        "promoted": lambda t: t.other(1) in sets[4],
        "two families (or)": lambda t: t.this in sets[0][:3] or t.other(-1) in sets[5][:3],
    }
    if corpus == "zoo":
        rules |= {
            "sequence": lambda t: (t.other(-1), t.this) in {("fact", ":"), ("say", ":"), ("log", ":")},
            "this token and before": lambda t: t.this in language.NUMBERS and t.other(-1) in ("value", "report"),
            "ending": lambda t: t.this.endswith("day"),
        }
    if corpus == "docstrings":
        rules |= {
            "sequence": lambda t: (t.other(-1), t.this) in {("of", "the"), ("to", "the"), ("in", "the"), ("is", "a")},
            "capital": lambda t: t.this[:1].isupper(),
            "digit": lambda t: any(c.isdigit() for c in t.this),
            "punctuation": lambda t: bool(t.this) and not any(c.isalnum() for c in t.this),
            "ending": lambda t: t.this.isalnum() and len(t.this) > 3 and t.this.lower().endswith("ing"),
            "line break": lambda t: "\n" in t.tokens[t.at],
            "in round brackets": in_brackets,
            "after a colon": lambda t: ":" in t.line_before,
            "list item": lambda t: (
                "\n" not in t.tokens[t.at] and bool(re.match(r"[ \t]*([-*+•]|\d{1,3}[.)]|[a-z][.)])[ \t]", t.line))
            ),
            "capital, in brackets": lambda t: t.this[:1].isupper() and in_brackets(t),
        }
    if corpus == "chats":
        rules = {
            "role: user": lambda t: (
                t.this != "<|im_end|>"
                and (said := t.text[: t.spans[t.at][0]]).rfind("<|im_start|>user\n") > said.rfind("<|im_end|>")
            ),
            "role: template": lambda t: (
                t.this in ("<|im_start|>", "<|im_end|>")
                or t.other(-1) == "<|im_start|>"
                or t.other(-2) == "<|im_start|>"
            ),
        }
    return rules


def labels(texts: tuple[Encoded, ...], rule: Truth) -> np.ndarray:
    """Where a rule holds, bool [T]."""
    out = []
    for text in texts:
        tokens = [text.text[a:b] for a, b in text.spans]
        out += [rule(Token(tokens, text.spans, text.text, at)) for at in range(len(tokens))]
    return np.array(out, dtype=bool)


def noisy(rng: np.random.Generator, clean: np.ndarray, noise: float) -> np.ndarray:
    """Activations [T], log-normal: a share ``noise`` of the active tokens silent, as many inactive ones active."""
    active = clean & (rng.random(len(clean)) >= noise)
    off = np.flatnonzero(~clean)
    active[rng.choice(off, min(len(off), round(noise * clean.sum())), replace=False)] = True
    return np.where(active, np.exp(rng.normal(0, 1, len(clean))), 0).astype(np.float32)


@dataclass(frozen=True)
class Row:
    """One planted latent: what was found and what could have been."""

    corpus: str
    rule: str
    noise: float
    q: float | None
    ceiling: float | None
    null: float | None


def run_planted(seed: int) -> list[Row]:
    rows = []
    for corpus, make, n in (("zoo", zoo, 2000), ("docstrings", english, 700), ("chats", chats, 400)):
        rng = np.random.default_rng(seed)
        texts = make(seed, n)
        contexts = Contexts(texts)
        rules = planted(rng, texts, corpus)
        clean = [labels(texts, rule) for rule in rules.values()]
        promoted = {}
        if "promoted" in rules:
            at = list(rules).index("promoted")
            promoted[at] = np.unique(contexts.shifted(1)[clean[at]]).tolist()
        _, test = halves(contexts, seed)
        for noise in NOISE:
            activations = np.stack([noisy(rng, held, noise) for held in clean], axis=1)
            found = explain(
                FeatureCSR.from_dense(torch.from_numpy(activations)),
                contexts,
                range(len(rules)),
                seed=seed,
                promoted=promoted,
            )
            for name, each, held, activation in zip(rules, found, clean, activations.T, strict=True):
                active = activation != 0
                best = score(held, active, weigh(active, test, contexts), contexts.text) if each.q is not None else None
                rows.append(Row(corpus, name, noise, each.q, best and 2 * best.low - 1, each.null))
    return rows


def thresholded(values: np.ndarray, rates: tuple[float, ...] = RATES) -> list[np.ndarray]:
    return [np.where(values > np.quantile(values, 1 - rate), values - values.min(), 0) for rate in rates]


def hidden(texts: tuple[Encoded, ...], seed: int) -> np.ndarray:
    """The residual stream in the middle of a Llama with random weights, [T, 64]."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    vocabulary = max(max(text.ids, default=0) for text in texts) + 1
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.2,
        max_position_embeddings=1024,
    )
    model = LlamaModel(config).eval()
    with torch.no_grad():
        out = [model(torch.tensor([t.ids]), output_hidden_states=True).hidden_states[2][0] for t in texts if t.ids]
    return torch.cat(out).double().numpy()


def run_random(seed: int) -> dict[str, list[float]]:
    """q of what has nothing to do with the text, and of random directions, by kind."""
    kinds: dict[str, list[float]] = {}
    for corpus, texts in (("zoo", zoo(seed, 1000)), ("docstrings", english(seed, 400))):
        rng, contexts = np.random.default_rng(seed), Contexts(texts)
        n = len(contexts)
        residual = hidden(texts, seed)
        code = np.unique(contexts.ids, return_inverse=True)[1]
        means = np.stack([np.bincount(code, column) / np.bincount(code) for column in residual.T], axis=1)
        columns: dict[str, list[np.ndarray]] = {
            "labels drawn singly": [c for _ in range(6) for c in thresholded(rng.normal(size=n))],
            "labels in runs of about 8": [
                c for _ in range(6) for c in thresholded(np.convolve(rng.normal(size=n + 7), np.ones(8), "valid"))
            ],
            "random direction": [c for _ in range(6) for c in thresholded(residual @ rng.normal(size=64))],
            "random direction, token means taken off": [
                c for _ in range(6) for c in thresholded((residual - means[code]) @ rng.normal(size=64))
            ],
        }
        for kind, made in columns.items():
            features = FeatureCSR.from_dense(torch.from_numpy(np.stack(made, axis=1).astype(np.float32)))
            found = explain(features, contexts, range(len(made)), seed=seed)
            kinds[f"{kind}, {corpus}"] = [each.q for each in found if each.q is not None]
    return kinds


def run_speed(seed: int) -> tuple[int, int, float]:
    """(latents, tokens, seconds) for 100 latents: directions of the random model, at 2 %."""
    texts = zoo(seed, 1200)
    contexts = Contexts(texts)
    directions = hidden(texts, seed) @ np.random.default_rng(seed).normal(size=(64, 100))
    features = np.stack([thresholded(column, (0.02,))[0] for column in directions.T], axis=1)
    csr = FeatureCSR.from_dense(torch.from_numpy(features.astype(np.float32)))
    began = time.perf_counter()
    explain(csr, contexts, range(100), seed=seed)
    return 100, len(contexts), time.perf_counter() - began


def table(
    rows: list[Row], kinds: dict[str, list[float]], speed: tuple[int, int, float], seeds: list[int]
) -> Iterator[str]:
    yield f"## Explanations, seeds {' '.join(map(str, seeds))}"
    yield ""
    yield f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread, Python {platform.python_version()}, numpy "
    yield f"{np.__version__}, torch {torch.__version__}; `benchmarks/explanations.py --record`. Noise: that share of a"
    yield "planted latent's tokens silent and as many others active. Ceiling: 2·low − 1 of the planted rule itself on"
    yield "the same labels. A cell: median q (lowest q; median ceiling)."
    yield ""
    yield "| corpus | planted rule | " + " | ".join(f"noise {noise:.0%}" for noise in NOISE) + " |"
    yield "|---|---|" + "---:|" * len(NOISE)
    for corpus, name in dict.fromkeys((row.corpus, row.rule) for row in rows):
        cells = []
        for noise in NOISE:
            mine = [r for r in rows if (r.corpus, r.rule, r.noise) == (corpus, name, noise)]
            known = [(r.q, r.ceiling) for r in mine if r.q is not None and r.ceiling is not None]
            if not known:
                cells.append("too few contexts")
                continue
            q, ceiling = (np.array(part) for part in zip(*known, strict=True))
            missing = f"; {len(mine) - len(known)} too few contexts" if len(known) < len(mine) else ""
            cells.append(f"{np.median(q):.3f} ({q.min():.3f}; {np.median(ceiling):.3f}{missing})")
        yield f"| {corpus} | {name} | " + " | ".join(cells) + " |"
    yield ""
    for noise in NOISE:
        known = [r for r in rows if r.noise == noise and r.q is not None and r.ceiling is not None]
        good = sum(r.q >= 0.9 for r in known if r.q is not None)
        reachable = sum(r.ceiling >= 0.9 for r in known if r.ceiling is not None)
        yield f"Noise {noise:.0%}: q ≥ 0.9 in {good} of {len(known)}; the planted rule itself in {reachable}."
    nulls = [r.null for r in rows if r.null is not None]
    yield f"Moved labels: mean {np.mean(nulls):.3f}, largest {max(nulls):.3f}."
    yield ""
    yield "| 1, 2 and 5 % active | latents | mean q | 95 % of them below | largest q | share ≤ 0.05 |"
    yield "|---|---:|---:|---:|---:|---:|"
    for kind, q in kinds.items():
        yield (
            f"| {kind} | {len(q)} | {np.mean(q):.3f} | {np.quantile(q, 0.95):.3f} | {max(q):.3f} "
            f"| {np.mean(np.array(q) <= 0.05):.2f} |"
        )
    yield ""
    yield f"Speed: {speed[0]} latents over {speed[1]} tokens, {speed[2]:.0f} s ({speed[2] / speed[0]:.2f} s each)."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5000, 5001, 5002])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, kinds = [], {}
    for seed in arguments.seeds:
        rows += run_planted(seed)
        for kind, q in run_random(seed).items():
            kinds.setdefault(kind, []).extend(q)
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    text = "\n".join(table(rows, kinds, run_speed(arguments.seeds[0]), arguments.seeds))
    print(text)
    if arguments.record:
        with RESULTS.open("a") as file:
            file.write(f"\n{text}\n")


if __name__ == "__main__":
    main()
