"""dictionary-learning's ``trainSAE``, with the settings of its demonstration.

That is: its own rate for the width, activations normalised, the rate going down to zero over the last fifth. What it
counts in steps or tokens is meant for some 25 thousand steps and cut down to the length of the training: it warms up
for 1000 of them (more than all of them is refused), keeps the threshold for inference from step 1000 on (from half of
the steps here, or there would be none), and calls a latent dead after 10 million tokens (after ``Job.window`` here, or
its auxiliary loss would never do anything).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from train_worker import Job, Learned

WARM_UP = 1 / 24
"""Of all steps; 1000 of the 24 414 of its published dictionaries."""


def imports() -> None:
    pass


class Rows:
    """Batches that can be gone through again: its normalisation reads a hundred beforehand."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self) -> Iterator[Tensor]:
        return self.job.batches()


def train(job: Job, variant: str) -> Learned:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    made: list[Any] = []

    def trainer(**options: Any) -> Any:
        made.append({"BatchTopK": BatchTopKTrainer, "TopK": TopKTrainer}[variant](**options))
        made[0].dead_feature_threshold = job.window
        return made[0]

    options = {
        "trainer": trainer,
        "steps": job.steps,
        "activation_dim": job.width,
        "dict_size": job.latents,
        "k": job.k,
        "layer": 0,
        "lm_name": "none",
        "lr": None,
        "warmup_steps": max(1, round(WARM_UP * job.steps)),
        "decay_start": round(0.8 * job.steps),
        "threshold_start_step": job.steps // 2,
        "seed": job.seed,
        "device": "cpu",
    }
    trainSAE(Rows(job), [options], job.steps, normalize_activations=True, device="cpu")
    ae = made[0].ae
    with torch.no_grad():
        W_enc, b_dec = ae.encoder.weight.T, ae.b_dec
        return Learned(
            W_enc=W_enc,
            # It takes its decoder's bias off before it encodes.
            b_enc=ae.encoder.bias - b_dec @ W_enc,
            W_dec=ae.decoder.weight.T,
            b_dec=b_dec,
            threshold=ae.threshold if variant == "BatchTopK" else None,
            settings=f"rate {made[0].lr:.1e}, warm-up {options['warmup_steps']} steps, decay from "
            f"{options['decay_start']}, AuxK 1/32, dead after {job.window} tokens",
            infer=ae,
        )


VARIANTS = {"BatchTopK": partial(train, variant="BatchTopK"), "TopK": partial(train, variant="TopK")}
