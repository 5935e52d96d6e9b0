from pathlib import Path

import pytest

from heredity.interp.errors import ModelError
from heredity.interp.spec import ModelSpec, parse_spec


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "lora", "a+b", "pair/parent", "pair/successor"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("base", ModelSpec("directory", "base")),
        ("./base/", ModelSpec("directory", "base")),
        ("a+b", ModelSpec("directory", "a+b")),
        ("m.gguf", ModelSpec("gguf", "m.gguf")),
        ("org/name-1.5_x", ModelSpec("hub", "org/name-1.5_x")),
        ("base+lora", ModelSpec("adapter", "base", "lora")),
        ("a+b+lora", ModelSpec("adapter", "a+b", "lora")),
        ("base+a+b", ModelSpec("adapter", "base", "a+b")),
        ("org/name+lora", ModelSpec("adapter", "org/name", "lora")),
        ("m.gguf+lora", ModelSpec("adapter", "m.gguf", "lora")),
        ("pair", ModelSpec("zoo", "pair/parent")),
        ("pair+lora", ModelSpec("adapter", "pair", "lora")),
    ],
)
def test_what_a_text_names(here: Path, text: str, want: ModelSpec) -> None:
    assert parse_spec(text) == want


def test_a_pair_directory_has_a_model_for_each_role(here: Path) -> None:
    assert parse_spec("pair", "successor").base == "pair/successor"
    (here / "pair" / "config.json").write_text("{}")
    assert parse_spec("pair", "successor") == ModelSpec("directory", "pair")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty model argument"),
        (" ", "no such file"),
        ("absent", "no such file"),
        ("base/absent", "no such file"),  # a directory of that name exists, so a mistyped path is meant, not the hub
        ("./org/name", "no such file"),
        ("/org/name", "no such file"),
        ("org/name/more", "no such file"),
        ("org/absent.gguf", "no such file"),
        ("org/..", "no such file"),
        ("x" * 5000, "no such file"),
        ("nul\0byte", "no such file"),
        ("weights.safetensors", "is a file"),
        ("base+", "no adapter directory"),
        ("+lora", "no adapter directory"),
        ("base+absent", "no adapter directory"),
        ("base+m.gguf", "no adapter directory"),
        ("absent+lora", "no such file"),
        ("base+lora+lora", "more than one adapter"),
    ],
)
def test_what_names_nothing_is_refused_in_one_line(here: Path, text: str, why: str) -> None:
    with pytest.raises(ModelError, match=why) as caught:
        parse_spec(text)
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


def test_every_kind_of_refusal_has_its_page() -> None:
    import heredity.interp.errors as errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.HeredityError)]
    pages = Path(__file__).parents[2] / "docs" / "errors"
    assert len(kinds) >= 10
    for kind in kinds:
        assert kind.__name__ in (pages / f"{kind.page}.md").read_text()
        assert f"({kind.page}.md)" in (pages / "README.md").read_text()
    assert str(ModelError("bad\x1b[1m\n", where="f: x", remedy="Mend it.")) == (
        "f: x: bad\\x1b[1m\\n. Mend it. [docs/errors/model.md]"
    )
