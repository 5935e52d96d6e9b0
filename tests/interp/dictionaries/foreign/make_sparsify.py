"""Small sparsify dictionaries, saved by sparsify, with the features and reconstructions it computes.

Run in an environment with eai-sparsify: ``python make_sparsify.py``. Writes ``sparsify/``.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

HERE = Path(__file__).parent / "sparsify"
D, T = 12, 15


@torch.no_grad()
def make(case, hookpoint, seed, **options):
    g = torch.Generator().manual_seed(seed)
    coder = SparseCoder(D, SparseCoderConfig(**options))
    for parameter in coder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * (0.4 if parameter.ndim > 1 else 0.3)
    coder.save_to_disk(HERE / case / hookpoint)
    coder = SparseCoder.load_from_disk(HERE / case / hookpoint)
    x = torch.randn(T, D, generator=g) * 2 + torch.randn(D, generator=g)
    active = coder.encode(x)
    features = torch.zeros(T, coder.num_latents).scatter_(1, active.top_indices, active.top_acts)
    tensors = {"x": x, "features": features, "output": coder(x).sae_out}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, HERE / f"{case}.safetensors")


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    make("sae", "layers.3", 1, k=5, num_latents=32)
    # More latents asked for than are above zero on most tokens.
    make("sae_wide", "h.3.mlp", 2, k=30, expansion_factor=3)
    make("transcoder", "layers.1.mlp", 3, k=5, num_latents=32, transcode=True)
    make("skip_transcoder", "layers.1.mlp", 4, k=5, num_latents=32, transcode=True, skip_connection=True)


if __name__ == "__main__":
    main()
