"""sae-lens's ``SAETrainer``, with its defaults and what its tutorials add to them.

Defaults: rate 3e-4, no warm-up, decoder's initial norm 0.1, coefficient 1 of the auxiliary loss. From the tutorials:
activations scaled to mean norm √D, the rate going down to zero over the last fifth. It calls a latent dead after 1000
steps, meant for some 30 thousand: after ``Job.window`` here, or its auxiliary loss would never do anything. Its sparse
activations train on the CPU only without ``rescale_acts_by_decoder_norm``, which is its default: a row of their own.
"""

import json
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from safetensors.torch import load_file
from train_worker import Job, Learned

ESTIMATE = 100
"""Batches its scaling is estimated from, where there are as many."""


def imports() -> None:
    import sae_lens.config
    import sae_lens.training.sae_trainer  # noqa: F401


def train(job: Job, variant: str, sparse: bool = False) -> Learned:
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(job.seed)
    options: dict[str, Any] = {
        "d_in": job.width,
        "d_sae": job.latents,
        "k": job.k,
        "device": "cpu",
        "dtype": "float32",
        "normalize_activations": "expected_average_only_in",
    }
    if variant == "BatchTopK":
        sae: Any = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**options))
    else:
        options |= {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**options))
    estimated = min(ESTIMATE, job.steps)
    config = SAETrainerConfig(
        total_training_samples=job.steps * job.batch,
        train_batch_size_samples=job.batch,
        lr_decay_steps=job.steps // 5,
        # What its runner fills in; only the shape of other schedules depends on it.
        lr_end=3e-5,
        dead_feature_window=job.window // job.batch,
        n_batches_for_norm_estimate=estimated,
    )
    provider = chain.from_iterable(part() for part in (lambda: islice(job.batches(), estimated), job.batches))
    trainer = SAETrainer(config, sae, provider)
    # Decoder norms and the scaling are folded into what it saves, as they are into what it loads for inference.
    weights, settings = trainer.fit().save_inference_model(job.out / "saved")
    arrays, saved = load_file(weights), json.loads(settings.read_text())
    assert saved["normalize_activations"] == "none", saved
    if saved["apply_b_dec_to_input"]:
        arrays["b_enc"] -= arrays["b_dec"] @ arrays["W_enc"]
    return Learned(
        **{name: arrays[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
        threshold=arrays["threshold"] if variant == "BatchTopK" else None,
        settings=f"rate {config.lr:.0e}, no warm-up, decay over {config.lr_decay_steps} steps, AuxK 1, dead after "
        f"{job.window} tokens",
        infer=SAE.load_from_disk(job.out / "saved"),
    )


VARIANTS = {
    "BatchTopK": partial(train, variant="BatchTopK"),
    "TopK": partial(train, variant="TopK"),
    "TopK, use_sparse_activations": partial(train, variant="TopK", sparse=True),
}
