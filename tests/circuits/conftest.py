"""Pairs of tiny models: a parent with a successor that moved everywhere, a twin to plant in, and other families."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from heredity.circuits.attribution import Prompts
    from heredity.circuits.behaviours import Piece
    from heredity.interp.dictionaries.record import DictionarySet
    from heredity.interp.model import Model

    Pair = tuple[Model, Model]

MOVED = 0.15
"""Change of every tensor of the successor, as a share of its root mean square."""

LATENTS = 40
"""Of each random dictionary."""

FLOATS = ("reverse", "p_successor", "p_successor_in_parent", "p_parent", "p_parent_in_successor")
FLOATS += ("surprise", "surprise_parent")


def _parameters(model: "Model") -> "list[Tensor]":
    return [value.detach() for value in model.bridge.original_model.parameters()]


def _perturbed(bare: Any, size: float, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    for value in bare.parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.data += size * value.data.square().mean().sqrt() * noise


@contextmanager
def _kept(model: "Model") -> "Iterator[None]":
    """Give ``model`` its weights back at the end."""
    import torch

    before = [value.clone() for value in _parameters(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, old in zip(_parameters(model), before, strict=True):
                value.copy_(old)


def _from_file(path: Path) -> Any:
    """The module in a file that is in no package."""
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def beds() -> Any:
    """``benchmarks/beds/model.py``: small transformers of any shape and precision."""
    return _from_file(Path(__file__).parents[2] / "benchmarks" / "beds" / "model.py")


@pytest.fixture(scope="session")
def plain() -> Any:
    """``plain_transformer.Plain``: the same transformers written out edge by edge in float64."""
    return _from_file(Path(__file__).parent / "plain_transformer.py").Plain


@pytest.fixture(scope="session")
def bed_of(beds: Any) -> "Callable[[str], tuple[Model, Any, Any]]":
    """By kind of architecture: a random bed in float64, four pairs of prompts of two lengths, a logit difference."""
    import torch

    from heredity.circuits.pairs import LogitDifference, Pairs

    kinds: dict[str, dict[str, Any]] = {
        "bare": {},
        "layer": {"norm": "layer", "activation": "gelu"},
        "grouped": {"norm": "rms", "activation": "silu", "gated": True, "rotary": True, "n_kv_heads": 2},
    }

    def build(kind: str) -> "tuple[Model, Any, Any]":
        heads = 4 if kind == "grouped" else 2
        config = beds.BedConfig(2, heads, 8, 4, 12, 9, 9, 6, **kinds[kind])
        model = beds.bed(config, seed=3, scale=0.5, dtype=torch.float64)
        generator = torch.Generator().manual_seed(4)
        clean, corrupt = (torch.randint(9, (4, 6), generator=generator) for _ in range(2))
        pairs = Pairs(clean, corrupt, torch.tensor([5, 4, 5, 4]))
        return model, pairs, LogitDifference(pairs.last, [[1], [2, 3], [4], [5]], [[6], [7], [8], [0, 1]])

    return build


@pytest.fixture(scope="session")
def parent(tiny_model: "Model") -> "Model":
    return tiny_model


@pytest.fixture(scope="session")
def successor(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> "Model":
    """The parent with noise in every tensor."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from heredity.interp.load import load

    directory = tmp_path_factory.mktemp("successor")
    bare = AutoModelForCausalLM.from_pretrained(tiny_dir)
    _perturbed(bare, MOVED, 1)
    bare.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(directory)
    return load(str(directory))


@pytest.fixture(scope="session")
def _twin(tiny_dir: Path) -> "Model":
    from heredity.interp.load import load

    return load(str(tiny_dir))


@pytest.fixture
def twin(_twin: "Model") -> "Iterator[Model]":
    """A second copy of the parent to plant changes in; its weights come back after the test."""
    with _kept(_twin):
        yield _twin


def _config(family: str) -> Any:
    import transformers as t

    common = {
        "vocab_size": 200,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    grouped = {**common, "num_key_value_heads": 2}
    match family:
        case "neox":
            return t.GPTNeoXConfig(**common)
        case "phi3":
            return t.Phi3Config(**grouped)
        case "gemma2":
            return t.Gemma2Config(**grouped, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
        case "olmo2":
            return t.Olmo2Config(**grouped)
        case "granite":
            return t.GraniteConfig(**grouped, logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0)
        case "cohere":
            return t.CohereConfig(**grouped, logit_scale=0.25)
        case "bloom":
            return t.BloomConfig(vocab_size=200, hidden_size=48, n_layer=2, n_head=4, initializer_range=0.2)
        case _:
            return t.GPT2Config(
                vocab_size=200, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
                bos_token_id=0, eos_token_id=1,
            )  # fmt: skip


@pytest.fixture(scope="session")
def pair_of(
    tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory, parent: "Model", successor: "Model"
) -> "Callable[[str], Pair]":
    """A family's parent and successor, built once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from heredity.interp.load import load

    built: dict[str, Pair] = {"llama": (parent, successor)}

    def build(family: str) -> "Pair":
        if family in built:
            return built[family]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            bare: Any = AutoModelForCausalLM.from_config(_config(family)).eval()
            for name, value in bare.named_parameters():  # biases and norms start as constants, which hides mistakes
                if name.endswith("bias") or "norm" in name or "ln_" in name:
                    value.data += 0.1 * torch.randn_like(value)
        models = []
        for role, size in (("parent", 0.0), ("successor", MOVED)):
            directory = tmp_path_factory.mktemp(f"{family}-{role}")
            _perturbed(bare, size, 2)
            bare.save_pretrained(directory)
            AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(directory)
            models.append(load(str(directory)))
        built[family] = (models[0], models[1])
        return built[family]

    return build


@pytest.fixture
def nearer() -> "Callable[..., Any]":
    """A context in which a successor is only the share ``size`` of its way from its parent."""

    @contextmanager
    def move(parent: "Model", successor: "Model", size: float) -> "Iterator[None]":
        import torch

        ends = [(p.clone(), s.clone()) for p, s in zip(_parameters(parent), _parameters(successor), strict=True)]
        with _kept(successor):
            with torch.no_grad():
                for value, (p, s) in zip(_parameters(successor), ends, strict=True):
                    value.copy_(p + size * (s - p))
            yield

    return move


@pytest.fixture(scope="session")
def draw() -> "Callable[..., Tensor]":
    """Random token ids [rows, length], special tokens left out."""
    import torch

    def ids(rows: int, length: int, seed: int = 0) -> "Tensor":
        return torch.randint(2, 140, (rows, length), generator=torch.Generator().manual_seed(seed))

    return ids


@pytest.fixture(scope="session")
def random_dictionaries() -> "Callable[..., DictionarySet]":
    """Random dictionaries of every layer: (model, kind, activation, skip, seed)."""
    import torch

    from heredity.interp.dictionaries.record import Dictionary, DictionarySet, Port
    from heredity.kernels import ReLU

    def make(model: "Model", kind: str, activation: Any = None, skip: bool = False, seed: int = 0) -> "DictionarySet":
        generator = torch.Generator().manual_seed(seed)
        n_layers, width = model.shape.n_layers, model.shape.d_model

        def draw(*shape: int) -> "Tensor":
            return torch.randn(*shape, generator=generator)

        found = []
        for layer in range(n_layers):
            read = f"mlp_out@{layer}" if kind == "sae" else f"mlp_in@{layer}"
            written = range(layer, n_layers) if kind == "cross_layer_transcoder" else [layer]
            found.append(
                Dictionary(
                    kind,  # pyright: ignore
                    (Port(read),),
                    tuple(Port(f"mlp_out@{i}") for i in written),
                    (draw(width, LATENTS) / width**0.5,),
                    0.2 * draw(LATENTS) - 0.4,
                    tuple(0.3 * draw(LATENTS, width) for _ in written),
                    tuple(0.1 * draw(width) for _ in written),
                    activation or ReLU(),
                    W_skip=0.2 * draw(width, width) if skip else None,
                )
            )
        return DictionarySet(tuple(found))

    return make


@pytest.fixture(scope="session")
def prompts_at() -> "Callable[[Model, Model, Tensor], Prompts]":
    """Contexts that end at the last position, with what each model says there."""
    import torch

    from heredity.circuits.attribution import Prompts

    def make(parent: "Model", successor: "Model", tokens: "Tensor") -> "Prompts":
        says = [model.logits(tokens)[:, -1].argmax(-1) for model in (successor, parent)]
        return Prompts(tokens, torch.full((len(tokens),), tokens.shape[1] - 1), *says)

    return make


@pytest.fixture(scope="session")
def piece() -> "Callable[..., Piece]":
    """A scanned piece of text made by hand: columns that are not given are uneventful."""
    from heredity.circuits.behaviours import Piece
    from heredity.circuits.divergence import TextScan
    from heredity.interp.model import Encoded

    def make(
        kl: Sequence[float],
        *,
        ids: Sequence[int] | None = None,
        name: str = "0",
        source: Any = "corpus",
        **columns: Any,
    ) -> "Piece":
        n = len(kl)
        read = Encoded("x" * n, tuple(ids or range(n)), tuple((i, i + 1) for i in range(n)))
        plain: dict[str, Any] = {
            "position": list(range(n)),
            "position_parent": list(range(n)),
            "reverse": [0.0] * n,
            "top_successor": [5] * n,
            "p_successor": [0.5] * n,
            "p_successor_in_parent": [0.5] * n,
            "top_parent": [5] * n,
            "p_parent": [0.5] * n,
            "p_parent_in_successor": [0.5] * n,
            "surprise": [0.0] * n,
            "surprise_parent": [0.0] * n,
        }
        given = {key: list(map(float, values)) if key in FLOATS else list(values) for key, values in columns.items()}
        return Piece(source, read, read, TextScan(name, kl=list(map(float, kl)), **{**plain, **given}))

    return make
