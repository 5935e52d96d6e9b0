"""Small SAELens 6 dictionaries, saved by SAELens, with the features and reconstructions SAELens computes.

Run in an environment with sae-lens: ``python make_sae_lens.py``. Writes ``sae_lens/``.
"""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

HERE = Path(__file__).parent / "sae_lens"
D, D_OUT, F, T = 12, 10, 32, 15


def random(module, g):
    """Every parameter away from its initial zero; some thresholds below zero."""
    for name, parameter in module.named_parameters():
        scale = 0.4 if parameter.ndim > 1 else 0.3
        parameter.data = (torch.randn(parameter.shape, generator=g) * scale).to(parameter.dtype)
        if name == "threshold":
            parameter.data += 0.3


def inputs(g):
    return torch.randn(T, D, generator=g) * 2 + torch.randn(D, generator=g)


def keep(case, x, features, output):
    tensors = {"x": x, "features": features, "output": output}
    save_file({k: v.detach().float().contiguous() for k, v in tensors.items()}, HERE / f"{case}.safetensors")


@torch.no_grad()
def make(case, architecture, seed, hook="blocks.3.hook_resid_pre", load=None, scale=None, **options):
    g = torch.Generator().manual_seed(seed)
    cls, config = get_sae_class(architecture)
    meta = SAEMetadata(model_name="tiny", hook_name=hook, context_size=16, prepend_bos=False)
    if "transcoder" in architecture:
        options |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
        meta.hook_name, meta.hook_name_out = "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"
    sae = cls(config(d_in=D, d_sae=F, metadata=meta, **options))
    random(sae, g)
    sae.save_model(HERE / case)
    sae = SAE.load_from_disk(HERE / case, **(load or {}))
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    x = inputs(g)
    if hook.endswith("_z"):
        heads = x.view(T, 3, 4)
        keep(case, x, sae.encode(heads), sae(heads).reshape(T, D))
        return
    keep(case, x, sae.encode(x), sae(x))


@torch.no_grad()
def make_batchtopk(case, seed, rescale):
    """As a training run saves it: to be used, and to be continued."""
    g = torch.Generator().manual_seed(seed)
    meta = SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_out")
    config = BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=4, rescale_acts_by_decoder_norm=rescale, metadata=meta)
    sae = BatchTopKTrainingSAE(config)
    random(sae, g)
    sae.topk_threshold.fill_(1.5)
    sae.save_inference_model(HERE / case)
    sae.save_model(HERE / f"{case}_checkpoint")
    x = inputs(g)
    used = SAE.load_from_disk(HERE / case)
    for name in (case, f"{case}_checkpoint"):
        keep(name, x, used.encode(x), used(x))


@torch.no_grad()
def make_gemma(case, repository, folder, params, loader, shapes, **overrides):
    """Files laid out as in ``repository``, read by the loader of SAELens without its download."""
    place = HERE / case / repository.split("/")[1] / folder
    place.mkdir(parents=True)
    params(place)

    def local(*args, **named):
        return str(place / Path(named["filename"] if "filename" in named else args[-1]).name)

    def converter(path, device, cfg_overrides):
        del path
        return loader(repository, folder, device, False, {**(cfg_overrides or {}), **overrides})[:2]

    with (
        patch.object(loaders, "hf_hub_download", local),
        patch.object(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes),
    ):
        sae = SAE.load_from_disk(place, converter=converter)
    x = inputs(torch.Generator().manual_seed(99))
    keep(case, x, sae.encode(x), sae(x))


def arrays(seed, d_out=D, skip=False, lower=False):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "W_dec": (F, d_out), "b_enc": (F,), "b_dec": (d_out,), "threshold": (F,)}
    found = {k: (rng.standard_normal(s) * 0.4).astype(np.float32) for k, s in shapes.items()}
    found["threshold"] = np.abs(found["threshold"])
    if skip:
        found["affine_skip_connection"] = (rng.standard_normal((D, d_out)) * 0.4).astype(np.float32)
    return {k.lower() if lower else k: v for k, v in found.items()}


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    make("standard", "standard", 1)
    make("standard_uncentred", "standard", 2, hook="blocks.3.hook_mlp_out", apply_b_dec_to_input=False)
    make("topk", "topk", 3, k=5)
    make("topk_rescaled", "topk", 4, k=5, rescale_acts_by_decoder_norm=True)
    make(
        "topk_rescaled_layer_norm",
        "topk",
        5,
        k=5,
        rescale_acts_by_decoder_norm=True,
        normalize_activations="layer_norm",
    )
    make("jumprelu", "jumprelu", 6, hook="blocks.3.hook_attn_out")
    make("gated", "gated", 7)
    make("layer_norm", "standard", 8, normalize_activations="layer_norm")
    make("constant_norm", "jumprelu", 9, normalize_activations="constant_norm_rescale")
    make("expected_average", "topk", 10, scale=0.7, k=6, normalize_activations="expected_average_only_in",
         rescale_acts_by_decoder_norm=True)  # fmt: skip
    make("bfloat16", "standard", 11, load={"dtype": "float32"}, dtype="bfloat16")
    make("hook_z", "standard", 12, hook="blocks.3.attn.hook_z", reshape_activations="hook_z")
    for i, architecture in enumerate(
        ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
    ):
        make(architecture, architecture, 20 + i)
    make_batchtopk("batchtopk", 30, rescale=False)
    make_batchtopk("batchtopk_rescaled", 31, rescale=True)
    make_gemma("gemma_scope_res", "google/gemma-scope-2b-pt-res", "layer_5/width_16k/average_l0_9",
               lambda place: np.savez(place / "params.npz", **arrays(40)),
               loaders.gemma_2_sae_huggingface_loader, {}, d_in=D, d_sae=F)  # fmt: skip

    def second(place, transcoder=False):
        found = arrays(41, lower=True, skip=transcoder, d_out=D_OUT if transcoder else D)
        save_file({k: torch.from_numpy(v) for k, v in found.items()}, place / "params.safetensors")
        raw = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "affine_connection": transcoder}
        raw["hf_hook_point_in"] = "model.layers.5.output"
        if transcoder:
            raw["hf_hook_point_in"] = "model.layers.5.pre_feedforward_layernorm.output"
            raw["hf_hook_point_out"] = "model.layers.5.post_feedforward_layernorm.output"
        (place / "config.json").write_text(json.dumps(raw))

    make_gemma("gemma_scope_2_res", "google/gemma-scope-2-1b-pt", "resid_post/layer_5_width_16k_l0_small", second,
               loaders.gemma_3_sae_huggingface_loader, {"w_enc": (D, F), "w_dec": (F, D)})  # fmt: skip
    make_gemma("gemma_scope_2_transcoder", "google/gemma-scope-2-1b-pt", "transcoder/layer_5_width_16k_l0_small_affine",
               lambda place: second(place, transcoder=True), loaders.gemma_3_sae_huggingface_loader,
               {"w_enc": (D, F), "w_dec": (F, D_OUT)})  # fmt: skip


if __name__ == "__main__":
    main()
