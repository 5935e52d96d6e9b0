"""``heredity.interp.dictionaries.training`` with the defaults of its recipe."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from train_worker import Job


def imports() -> None:
    import heredity.interp.dictionaries.training.loop  # noqa: F401


@dataclass(frozen=True)
class Rows:
    """The job's rows as a source. Their order is the job's, whatever the seed, so that all contestants see the same."""

    job: Job

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.job.width,)

    @property
    def n_tokens(self) -> int:
        return self.job.batch * self.job.steps

    @property
    def digest(self) -> str:
        return f"{self.job.data}"

    def batches(self, *, batch: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
        assert batch == self.job.batch, "the batches of the file are not of this size"
        for rows in self.job.batches():
            yield (rows,)


VARIANTS = {}
