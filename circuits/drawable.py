"""What the figures ask of the data they draw: attributes only, so that records of any origin will do."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class NodeLike(Protocol):
    """A part of the model and what it carries; ``patch`` and ``ablation`` are shares, None where not measured."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def layer(self) -> int: ...  # noqa: D102
    @property
    def attribution(self) -> float: ...  # noqa: D102
    @property
    def patch(self) -> float | None: ...  # noqa: D102
    @property
    def ablation(self) -> float | None: ...  # noqa: D102
    @property
    def selected(self) -> bool: ...  # noqa: D102


@runtime_checkable
class GridPointLike(Protocol):
    """Attribution of one node at one token position."""

    @property
    def node(self) -> str: ...  # noqa: D102
    @property
    def layer(self) -> int: ...  # noqa: D102
    @property
    def position(self) -> int: ...  # noqa: D102
    @property
    def attribution(self) -> float: ...  # noqa: D102


@runtime_checkable
class IntervalLike(Protocol):
    """An estimate between its ends."""

    @property
    def estimate(self) -> float: ...  # noqa: D102
    @property
    def low(self) -> float: ...  # noqa: D102
    @property
    def high(self) -> float: ...  # noqa: D102


@runtime_checkable
class SimilarityLike(Protocol):
    """Linear CKA at one site."""

    @property
    def site(self) -> str: ...  # noqa: D102
    @property
    def cka(self) -> float: ...  # noqa: D102
