"""Small SAELens 5 dictionaries, saved by SAELens 5, with the features and reconstructions it computes.

Run in an environment with sae-lens 5.11: ``python make_sae_lens_v5.py``. Writes ``sae_lens_v5/``.
"""

import shutil
from pathlib import Path

import sae_lens
import torch
from sae_lens.sae import SAE, SAEConfig
from safetensors.torch import save_file

HERE = Path(__file__).parent / "sae_lens_v5"
D, F, T = 12, 32, 15


@torch.no_grad()
def make(case, seed, architecture="standard", hook="blocks.2.hook_resid_post", **options):
    g = torch.Generator().manual_seed(seed)
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "context_size": 16,
        "model_name": "tiny",
        "hook_name": hook,
        "hook_layer": 2,
        "hook_head_index": None,
        "prepend_bos": True,
        "dataset_path": "none",
        "dataset_trust_remote_code": False,
        "normalize_activations": "none",
        "dtype": "float32",
        "device": "cpu",
        "sae_lens_training_version": sae_lens.__version__,
    }
    sae = SAE(SAEConfig(**(config | options)))
    for name, parameter in sae.named_parameters():
        scale = 0.4 if parameter.ndim > 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=g) * scale
        if name in ("threshold", "finetuning_scaling_factor"):
            parameter.data += 0.8
    sae.save_model(HERE / case)
    x = torch.randn(T, D, generator=g) * 2 + torch.randn(D, generator=g)
    features = sae.encode(x)
    tensors = {"x": x, "features": features, "output": sae.decode(features)}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, HERE / f"{case}.safetensors")


def main():
    assert sae_lens.__version__.startswith("5.")
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    make("standard", 1)
    make("finetuned", 2, finetuning_scaling_factor=True)
    make("gated", 3, "gated")
    make("jumprelu", 4, "jumprelu", apply_b_dec_to_input=False)
    make("topk", 5, "topk", activation_fn_str="topk", activation_fn_kwargs={"k": 5})
    make("layer_norm", 6, normalize_activations="layer_norm")
    make("constant_norm", 7, normalize_activations="constant_norm_rescale")


if __name__ == "__main__":
    main()
