from importlib import import_module
from pathlib import Path

import pytest
import torch

from heredity.kernels import FeatureCSR, ReLU, encode, ops, use
from heredity.kernels.dispatch import OPS
from heredity.kernels.ops.encode import run

X, W = torch.ones(2, 3), torch.ones(3, 4)
CALL = ([X], [W], None, ReLU(), None, 0.0)


@pytest.fixture(autouse=True)
def no_gpu_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEREDITY_KERNELS", raising=False)


def test_tensors_on_the_cpu_are_served_there_and_others_are_not() -> None:
    reasons = run.explain(*CALL)
    assert reasons["cpu"] is None and reasons["reference"] is None and reasons["triton"]
    elsewhere = run.explain([X.to("meta")], *CALL[1:])
    assert elsewhere["cpu"] == "the tensors are on meta"


def test_what_was_asked_for_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("cpu", "reference"):
        module = __import__(f"heredity.kernels.ops.encode.{name}", fromlist=["encode"])

        def spy(*args, name=name, real=module.encode) -> FeatureCSR:
            called.append(name)
            return real(*args)

        monkeypatch.setattr(module, "encode", spy)
    encode(X, W, None, ReLU())
    encode(X, W, None, ReLU(), impl="reference")
    with use("reference"):
        encode(X, W, None, ReLU())
        encode(X, W, None, ReLU(), impl="cpu")
    with use("decode:reference"):
        encode(X, W, None, ReLU())
    monkeypatch.setenv("HEREDITY_KERNELS", "decode:cpu,encode:reference")
    encode(X, W, None, ReLU())
    with use("cpu"):
        encode(X, W, None, ReLU())
    assert called == ["cpu", "reference", "reference", "cpu", "cpu", "reference", "cpu"]
    with pytest.raises(ValueError, match="no implementation 'cuda'; there are cpu, triton, reference"):
        encode(X, W, None, ReLU(), impl="cuda")


def test_float64_is_never_given_to_triton() -> None:
    double = ([X.double()], [W.double()], *CALL[2:])
    assert run.explain(*double)["triton"] == "float64 is left to the reference"
    with pytest.raises(ValueError, match="'triton' can't serve this call: float64"):
        encode(X.double(), W.double(), None, ReLU(), impl="triton")


@pytest.mark.parametrize("asked", ["encod:cpu", "cpu,decodes:reference"])
def test_an_op_that_does_not_exist_is_named(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEREDITY_KERNELS", asked)
    with pytest.raises(ValueError, match="the ops are encode, decode, backward, attribute, statistics"):
        encode(X, W, None, ReLU())
    monkeypatch.setenv("HEREDITY_KERNELS", "")
    with use(asked), pytest.raises(ValueError, match="the ops are encode"):
        encode(X, W, None, ReLU())


def test_the_ops_that_can_be_asked_for_are_those_there_are() -> None:
    homes = {path.parent.name for path in Path(str(ops.__path__[0])).glob("*/reference.py")}
    assert homes == set(OPS)
    for name in OPS:
        assert import_module(f"heredity.kernels.ops.{name}").run.name == name
