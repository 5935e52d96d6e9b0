"""Triton kernels without a GPU: ``test_*_gpu.py`` under Triton's interpreter, and any kernel compiled for sm_90.

Triton decides when it is first imported, for the whole process, whether kernels are compiled or interpreted. So where
there is no GPU each ``test_*_gpu.py`` is one item that runs the file in a child process with ``TRITON_INTERPRET=1``;
with that variable set, or with a GPU, its tests are collected as usual (which is also how to run a single one):

    TRITON_INTERPRET=1 pytest tests/kernels/test_encode_gpu.py -k ties

The interpreter accepts what the compiler would refuse, hence the ``compiled`` fixture. It knows neither bf16 arithmetic
nor rounding to bf16 (triton-lang/triton#11584), so kernels convert bf16 to fp32 right after loading it.
"""

import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class _Bare(MetaPathFinder):
    """Loads ``*gpu`` modules without argument checks: Triton needs a kernel's own globals, not those of a wrapper."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith("heredity.kernels.") and fullname.endswith("gpu"):
            return PathFinder.find_spec(fullname, path, target)
        return None


sys.meta_path.insert(0, _Bare())


class _File(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield _Child.from_parent(self, name="interpreted")


class _Child(pytest.Item):
    def runtest(self) -> None:
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        config = self.config
        options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(config.rootpath), "-c", str(config.inipath)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, str(self.path)], env=env, text=True, capture_output=True
        )
        if done.returncode:
            pytest.fail(done.stdout + done.stderr, pytrace=False)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if not module_path.name.endswith("_gpu.py") or INTERPRETED:
        return None
    import torch

    return None if torch.cuda.is_available() else _File.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def device() -> str:
    """Where tests of Triton kernels put their tensors."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was allocated but not written holds NaN, or for integers a number that is far out of range."""
    import torch

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            memory = make(*args, **options)
            if memory.dtype == torch.bool:
                return memory.fill_(True)
            limit = None if memory.is_floating_point() else torch.iinfo(memory.dtype).max
            return memory.fill_(float("nan") if limit is None else limit // 2)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(scope="session")
def far_rows() -> Callable[..., "torch.Tensor"]:
    """A copy [n, d] of a matrix [n, d] whose rows lie so far apart that offsets of the last exceed 32 bits."""
    import torch

    # Linux: pages that are never touched take no memory and are not promised any either.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000

    def spread(rows: torch.Tensor, stride: int = 2**30 + 2**20) -> torch.Tensor:
        n, d = rows.shape
        size = (n - 1) * stride + d
        if rows.is_cuda:
            memory = torch.empty(size, dtype=rows.dtype, device=rows.device)
        else:
            memory = torch.frombuffer(mmap.mmap(-1, size * rows.dtype.itemsize, flags=flags), dtype=rows.dtype)
        return memory.as_strided((n, d), (stride, 1)).copy_(rows)

    return spread


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers of a thread, its bytes of local memory (spills), shared bytes of a block.

    An H100 or H200 has 65536 registers and 232448 bytes per block (227 KiB); more shared memory fails at launch.
    """

    registers: int
    spilled: int
    shared: int


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Resources]:
    """Compile a kernel for compute capability 9.0, which needs no GPU: see :func:`_compile` for the arguments."""
    if INTERPRETED:
        pytest.skip("kernels are interpreted in this process")
    pytest.importorskip("triton")
    return _compile


def _compile(
    kernel: Any,
    signature: dict[str, str | tuple[str | int, ...]],
    constexprs: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
) -> Resources:
    """Resources of ``kernel``, a function under ``triton.jit``.

    Types are spelled ``*bf16``, ``*fp32``, ``i32``, ``i64``, ``fp32``; pointers are taken as aligned to 16 bytes, as
    torch allocates them, and so is an integer as ``i32:16`` a multiple of 16. A tuple holds types and constants. The
    two together name every argument; a pointer that is not given is the constexpr None, and an integer 1 the constexpr
    1, as at a real launch.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == set(signature) | set(constexprs), set(names) ^ (set(signature) | set(constexprs))
    constants: dict[tuple[int, ...], Any] = {(names.index(name),): value for name, value in constexprs.items()}
    attrs = {}

    def typed(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return tuple(typed(each, (*path, i)) for i, each in enumerate(kind))
        if not isinstance(kind, str):
            constants[path] = kind
            return "constexpr"
        if kind.startswith("*") or kind.endswith(":16"):
            attrs[path] = [["tt.divisibility", 16]]
        return kind.partition(":")[0]

    types = {name: typed(signature[name], (i,)) if name in signature else "constexpr" for i, name in enumerate(names)}
    done = triton.compile(
        ASTSource(kernel, types, constants, attrs),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    cubin = next(Path(path) for name, path in done.metadata_group.items() if name.endswith(".cubin"))
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)], text=True, capture_output=True, check=True
    )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
    assert found, usage.stdout
    registers, stack, local = map(int, found.groups())
    return Resources(registers, stack + local, done.metadata.shared)
