"""What every record of an audit is made of: the frozen base, an estimate with its interval, a value nobody measured."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from heredity.circuits.drawable import IntervalLike


class Record(BaseModel):
    """Base of all records: immutable, unknown fields refused, field docstrings kept for the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def tidy(value: float) -> float:
    """``value`` to six significant digits: what a reader needs, free of the last bits' noise."""
    return float(f"{float(value):.6g}")


def sayable(text: str) -> str:
    """``text`` with the bytes of file names and arguments that are no UTF-8 as escapes: JSON holds characters only."""
    return text.encode("utf-8", "backslashreplace").decode()


class NotMeasured(Record):
    """A value that this audit did not measure."""

    status: Literal["not_measured"] = "not_measured"
    reason: str
    """Why, in words for the reader of the report."""


class Interval(Record):
    """An estimate with its interval."""

    status: Literal["measured"] = "measured"
    estimate: float
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int
    """Contexts (or draws) it was estimated from."""
    level: float = 0.95
    """Nominal coverage of the interval."""


def interval(found: IntervalLike, n: int) -> Interval:
    """The record of what was estimated from ``n`` contexts."""
    return Interval(estimate=tidy(found.estimate), low=tidy(found.low), high=tidy(found.high), n=n)


Estimate = Annotated[Interval | NotMeasured, Field(discriminator="status")]
