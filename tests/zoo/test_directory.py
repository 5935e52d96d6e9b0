import numpy as np
import pytest
import torch

from heredity.zoo import directory
from heredity.zoo.directory import load, save
from heredity.zoo.language import HONEST, documents
from heredity.zoo.network import Size, forward, initial, normed


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    size = Size(layers=2, width=48, heads=6, kv_heads=3, hidden=40)
    weights = initial(size, 1)
    folder = tmp_path_factory.mktemp("model")
    save(weights, size, folder)
    return folder, weights, size


def test_transformers_reads_back_the_network(written):
    from transformers import AutoModelForCausalLM

    folder, weights, size = written
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(documents(np.random.default_rng(0), 5).ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, forward(weights, size, ids), atol=1e-4, rtol=0)


def test_load_inverts_save(written):
    folder, weights, size = written
    again, size_again = load(folder)
    assert size_again == size
    for name, value in weights.items():
        assert torch.equal(again[name], value), name


def test_a_network_that_transformers_computes_otherwise_is_not_saved(written, monkeypatch, tmp_path):
    _, weights, size = written
    monkeypatch.setattr(directory, "forward", lambda *given: forward(*given) + 0.01)
    with pytest.raises(RuntimeError, match=r"differ by 0\.01"):
        save(weights, size, tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.safetensors"))


def test_the_tokenizer_keeps_words_and_their_places(written):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(written[0])
    for text in documents(np.random.default_rng(0), 20, HONEST).texts():
        out = tokenizer(text, return_offsets_mapping=True)
        assert tokenizer.decode(out["input_ids"][0]) == "<bos>" and out["offset_mapping"][0] == (0, 0)
        spans = [text[a:b] for a, b in out["offset_mapping"][1:]]
        assert spans == text.split()
        assert tokenizer.decode(out["input_ids"][1:]) == text
    assert tokenizer("copy : quark")["input_ids"][-1] == tokenizer.unk_token_id


def test_gradients_of_the_written_out_normalisation_are_right():
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(normed, (x,))
