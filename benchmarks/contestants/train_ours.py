"""``heredity.interp.dictionaries.training`` with the defaults of its recipe."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from torch import Tensor
from train_worker import Job, Learned


def imports() -> None:
    import heredity.interp.dictionaries.training.loop  # noqa: F401


@dataclass(frozen=True)
class Rows:
    """The job's rows as a source. Their order is the job's, whatever the seed, so that all contestants see the same."""

    job: Job

    @property
    def ports(self) -> tuple:
        from heredity.interp.dictionaries import Port

        return (Port("resid_post@8"),)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.job.width,)

    @property
    def n_tokens(self) -> int:
        return self.job.batch * self.job.steps

    @property
    def digest(self) -> str:
        return f"{self.job.data}"

    def batches(self, *, batch: int, seed: int, skip: int = 0) -> Iterator[tuple[Tensor, ...]]:
        assert batch == self.job.batch, "the batches of the file are not of this size"
        for rows in islice(self.job.batches(), skip, None):
            yield (rows,)


def train(job: Job, rule: str) -> Learned:
    from heredity.interp.dictionaries.training import Recipe
    from heredity.interp.dictionaries.training.loop import train as run
    from heredity.kernels import BatchTopK

    recipe = Recipe(
        kind="sae",
        latents=job.latents,
        k=job.k,
        activation=rule,
        batch=job.batch,
        # Those above the median by more are not in the file.
        massive=None,
        seed=job.seed,
    )
    learned = run(recipe, Rows(job)).dictionary
    threshold = learned.activation.threshold if isinstance(learned.activation, BatchTopK) else None
    return Learned(
        W_enc=learned.W_enc[0],
        b_enc=learned.b_enc,
        W_dec=learned.W_dec[0],
        b_dec=learned.b_dec[0],
        threshold=None if threshold is None else learned.b_enc.new_tensor(threshold),
        norm=learned.norm,
        settings=f"rate {recipe.rate:.0e}, warm-up {recipe.warm:.0%} and decay "
        f"{recipe.decay:.0%} of all steps, k from {recipe.k_start * job.k:.0f}, AuxK {recipe.aux:g}, dead after "
        f"{recipe.window(job.batch * job.steps)} tokens",
        infer=lambda x: learned.reconstruct(x)[0],
    )


VARIANTS = {"BatchTopK": partial(train, rule="batchtopk"), "TopK": partial(train, rule="topk")}
