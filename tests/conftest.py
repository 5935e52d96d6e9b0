"""Fixtures shared by all tests: a tiny random Llama with grouped-query attention and a word-level tokenizer."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from jaxtyping import install_import_hook

# Calls into the package are checked against its annotations, in tests only. It must precede every import of heredity.
install_import_hook("heredity", "beartype.beartype")

if TYPE_CHECKING:
    from heredity.interp.model import Model

WORDS = """the a an of and to in on at by with from for as is was are were has had not no one two three four five six
river bridge old new road train coast sea hill town house door window garden tree leaf stone water fire light dark day
night year week month king queen child friend teacher doctor farmer baker sailor book letter song story word name
question answer bread milk salt apple horse dog cat bird fish red green blue white black small large long short first
last next good bad warm cold open closed left right north south east west walked ran saw took gave made said asked
came went found lost kept told wrote read sang knew thought slept woke before after under over between because while
until when where who what why how . , ! ? : ; ' -"""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums in a fixed order, and no contention between test processes."""
    import torch

    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: Llama, 3 layers, 4 query heads over 2 key-value heads, d_model 32, seed 0."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS.split()])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>", model_max_length=256
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        # Wide enough that attention and logits are far from uniform.
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    directory = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_dir: Path) -> "Model":
    """The model of ``tiny_dir``, hooked."""
    from heredity.interp.load import load

    return load(str(tiny_dir))
