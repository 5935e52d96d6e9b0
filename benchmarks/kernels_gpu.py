"""The same ops on one GPU: ours beside plain torch, cuBLAS and what the card can do at best, measured in the same run.

    python benchmarks/kernels_gpu.py [--seconds 240] [--json FILE]
    python benchmarks/kernels_gpu.py --device cpu --tiny      (only to see that it runs)

Ceilings come first: a large copy and an 8192³ product. The floor of an op is the time its operations take at the rate
of that product, or the bytes it can't do without at the rate of that copy, whichever is longer; "of floor" is how near
to it a contestant comes. Times are medians with the 20th and 80th percentile, the L2 cache cleared before each run;
each is taken twice, and the second median shows what differences mean nothing. What ours computes is compared before it
is timed, and rows say where that failed. Packages take part where they can be imported. After ``--seconds`` nothing new
is started.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import torch
from timing_gpu import Ceilings, Run, table
from torch import Tensor
from workload_gpu import Inputs, Shape, draw, faults, fresh, random_features

from heredity.kernels import FeatureCSR, JumpReLU, TopK, attribute, autoencode, decode, encode
from heredity.kernels import statistics as statistics_of
from heredity.kernels.ops.backward import run as backward_op
from heredity.kernels.ops.decode import gpu as decode_gpu
from heredity.kernels.ops.encode import run as encode_op

SHAPES = (
    Shape("Gemma-2-2B", 2304, 65_536, 70),
    Shape("GPT-2 small", 768, 32_768, 32),
    Shape("Llama-8B", 4096, 131_072, 64),
    Shape("Gemma-2-2B, narrow", 2304, 16_384, 70),
    Shape("Gemma-2-2B, wide", 2304, 262_144, 70),
)
CROSSCODER = Shape("crosscoder of two Gemma-2-2B", 2304, 73_728, 100)
TINY, TINY_CROSSCODER = Shape("tiny", 48, 512, 8, 64), Shape("tiny crosscoder", 48, 512, 8, 64)
BATCH, POSITIONS = 256, 100
"""Of the attribution step."""

SHARES = (0.0025, 0.005, 0.01, 0.02, 0.05)
"""Of latents that are active, where decode goes dense for one of them."""

Contestants = list[tuple[str, Callable[[], Any]]]


def main() -> int:
    args = arguments()
    torch.manual_seed(0)
    run = Run(args.device, time.monotonic() + args.seconds, args.json)
    wrong: list[str] = []
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"## Kernels on a GPU\n\n{card}, torch {torch.__version__}, bfloat16.\n")
    ceilings = ceilings_of(run, args.tiny)
    for shape in (TINY,) if args.tiny else SHAPES:
        try:
            wrong += suite(run, shape, ceilings)
        except Exception as error:
            wrong.append(f"{shape.name}: stopped by {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if args.device == "cuda":
            torch.cuda.empty_cache()
    crosscoder(run, TINY_CROSSCODER if args.tiny else CROSSCODER, ceilings)
    crossover(run, TINY if args.tiny else SHAPES[3])
    print(table(run.rows))
    for note in [*run.notes, *wrong]:
        print(f"- {note}")
    return 1 if wrong else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--json", type=Path, help="file that rows are written to as they come")
    return parser.parse_args()


def ceilings_of(run: Run, tiny: bool) -> Ceilings:
    """What the card can do, and two rates that the design of the kernels assumes."""
    side, n = (256, 2**20) if tiny else (8192, 2**30)
    a, b = (torch.randn(side, side, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(n, device=run.device, dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    product = run.time("ceilings", f"{side}³ product", "cuBLAS", lambda: a @ b)
    copy = run.time("ceilings", f"copy of {2 * n / 1e9:.2g} GB", "torch", lambda: target.copy_(source))
    table = source[: 65_536 * 128].view(-1, 128) if not tiny else source[: 2**16].view(-1, 128)
    rows = torch.randint(len(table), (16 * len(table),), device=run.device)
    run.time("ceilings", "gather of 128-wide rows that stay in L2", "torch", lambda: table[rows])
    scores = source[: 2**28].view(2048, -1) if not tiny else source[: 2**16].view(64, -1)
    run.time("ceilings", f"top 64 of {list(scores.shape)}", "torch", lambda: scores.topk(64, sorted=False))
    assert product is not None and copy is not None, run.notes
    return Ceilings(4 * n / copy.ms, 2 * side**3 / product.ms)


# --- one shape ---


def suite(run: Run, shape: Shape, ceilings: Ceilings) -> list[str]:
    """Every op at one shape; what is wrong with ours, whose rows then say so."""
    given = draw(shape, run.device)
    product = ceilings.floor(2.0 * shape.tokens * shape.width * shape.latents)
    written = ceilings.floor(n_bytes=2.0 * 3 * shape.latents * shape.width)
    with torch.no_grad():
        features = encode(given.x, given.W_enc, given.b_enc, TopK(shape.k))
        wrong = [f"{shape.name}: {fault}" for fault in faults(shape, given, features)]

    def measure(op: str, contestants: Contestants, floor: float) -> None:
        for name, each in contestants:
            mark = " (WRONG, see below)" if wrong and name.startswith("ours") else ""
            run.time(shape, op, name + mark, each, floor)

    with torch.no_grad():
        for op, floor, contestants in inference(shape, given, features, ceilings):
            measure(op, contestants, floor)
        measure("encoder's product", [("cuBLAS", lambda: given.x @ given.W_enc)], product)
    measure("training step, TopK", training(shape, given), product + written)
    return wrong


def inference(
    shape: Shape, given: Inputs, features: FeatureCSR, ceilings: Ceilings
) -> Iterator[tuple[str, float, Contestants]]:
    """(op, floor in ms, contestants)."""
    product = ceilings.floor(2.0 * shape.tokens * shape.width * shape.latents)
    x, jump = given.x, JumpReLU(given.threshold)

    def pre() -> Tensor:
        return torch.addmm(given.b_enc, x, given.W_enc)

    def masked() -> Tensor:
        scores = pre()
        return scores * (scores > given.threshold)

    yield (
        "encode, TopK",
        product,
        [
            ("ours", lambda: encode(x, given.W_enc, given.b_enc, TopK(shape.k))),
            ("ours, inputs not checked", lambda: encode_op([x], [given.W_enc], given.b_enc, TopK(shape.k), None, 0.0)),
            ("plain torch", lambda: pre().relu_().topk(shape.k, sorted=False)),
            *encode_peers(shape, given),
        ],
    )
    yield (
        "encode, JumpReLU",
        product,
        [
            ("ours", lambda: encode(x, given.W_enc, given.b_enc, jump)),
            ("plain torch, dense", masked),
            ("plain torch, nonzero", lambda: masked().nonzero()),
        ],
    )
    read = min(features.nnz, shape.latents) * shape.width + shape.tokens * shape.width
    acts = features.to_dense()
    bags, bag_values = features.indices.long(), features.values
    yield (
        "decode",
        ceilings.floor(2.0 * features.nnz * shape.width, 2.0 * read),
        [
            ("ours", lambda: decode(features, given.W_dec, given.b_dec)),
            ("plain torch, dense", lambda: torch.addmm(given.b_dec, acts, given.W_dec)),
            (
                "plain torch, embedding_bag",
                lambda: torch.nn.functional.embedding_bag(
                    bags,
                    given.W_dec,
                    features.indptr,
                    per_sample_weights=bag_values,
                    mode="sum",
                    include_last_offset=True,
                ),
            ),
            *decode_peers(shape, given, features, acts),
        ],
    )
    gradient = torch.randn_like(x)
    yield (
        "backward",
        # The decoder is read, and the gradients of both matrices are written.
        ceilings.floor(4.0 * features.nnz * shape.width, 2.0 * 3 * shape.latents * shape.width),
        [
            (
                "ours",
                lambda: backward_op(fresh(features), None, [gradient], [x], [given.W_enc], [given.W_dec], None, False),
            ),
            ("plain torch, dense", lambda: dense_backward(given, acts, gradient)),
        ],
    )
    yield (
        "statistics",
        ceilings.floor(n_bytes=6.0 * features.nnz),
        [
            ("ours", lambda: statistics_of(fresh(features))),
            ("plain torch, dense", lambda: dense_statistics(acts)),
        ],
    )
    yield attribution(shape, given, features, ceilings)


def attribution(
    shape: Shape, given: Inputs, features: FeatureCSR, ceilings: Ceilings
) -> tuple[str, float, Contestants]:
    n_positions = min(POSITIONS, shape.tokens)
    batch = BATCH if shape.tokens > BATCH else 4
    gradients = torch.randn(batch, n_positions, shape.width, device=given.x.device, dtype=torch.bfloat16)
    spots = features[:n_positions]
    positions, latents = spots.tokens, spots.indices.long()
    n_bytes = 2.0 * (gradients.numel() + spots.nnz * shape.width + spots.nnz * batch)

    def gathered() -> Tensor:
        return torch.einsum("bnd,nd->bn", gradients[:, positions], given.W_dec[latents])

    contestants: Contestants = [
        ("ours", lambda: attribute(gradients, spots, given.W_dec)),
        ("plain torch, gather and einsum (as circuit-tracer does)", gathered),
    ]
    return f"attribution, batch {batch}, {n_positions} positions", ceilings.floor(n_bytes=n_bytes), contestants


def training(shape: Shape, given: Inputs) -> Contestants:
    copies = (given.W_enc.T.contiguous(), given.b_enc.clone(), given.W_dec.clone(), given.b_dec.clone())
    encoder, b_enc, decoder, b_dec = (array.requires_grad_() for array in copies)

    def backward(out: Tensor) -> None:
        for parameter in (encoder, b_enc, decoder, b_dec):
            parameter.grad = None
        (out - given.x).float().square().sum(1).mean().backward()

    def ours() -> None:
        backward(autoencode(given.x, encoder.T, b_enc, decoder, b_dec, TopK(shape.k)).reconstruction)

    def plain() -> None:
        pre = torch.addmm(b_enc, given.x, encoder.T)
        values, indices = pre.topk(shape.k, sorted=False)
        acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
        backward(torch.addmm(b_dec, acts, decoder))

    return [("ours", ours), ("plain torch", plain)]


def crosscoder(run: Run, shape: Shape, ceilings: Ceilings) -> None:
    """Two models, one set of latents: what a second product into the same sums costs."""
    given = [draw(shape, run.device) for _ in range(2)]
    xs, weights, decoders = ([getattr(each, name) for each in given] for name in ("x", "W_enc", "W_dec"))
    b_enc = given[0].b_enc
    product = ceilings.floor(4.0 * shape.tokens * shape.width * shape.latents)

    def plain() -> Any:
        return torch.addmm(xs[0] @ weights[0] + b_enc, xs[1], weights[1]).relu_().topk(shape.k, sorted=False)

    with torch.no_grad():
        run.time(shape, "encode, TopK", "ours", lambda: encode(xs, weights, b_enc, TopK(shape.k)), product)
        run.time(shape, "encode, TopK", "plain torch", plain, product)
        features = encode(xs, weights, b_enc, TopK(shape.k))
        n_bytes = 4.0 * (min(features.nnz, shape.latents) + shape.tokens) * shape.width
        floor = ceilings.floor(n_bytes=n_bytes)
        run.time(shape, "decode", "ours", lambda: decode(features, decoders), floor)
        acts = features.to_dense()
        run.time(shape, "decode", "plain torch, dense", lambda: [acts @ decoder for decoder in decoders], floor)


def crossover(run: Run, shape: Shape) -> None:
    """Both ways of decoding, to set ``DENSE_FROM`` by."""
    shown = f"decode of {shape.tokens} tokens, d {shape.width}, {shape.latents} latents"
    for dtype in (torch.bfloat16, torch.float32):
        decoder = torch.randn(shape.latents, shape.width, device=run.device).to(dtype)
        for share in SHARES:
            features = random_features(shape, share, run.device).to(dtype=dtype)
            for name, start in (("sparse", 1.0), ("dense", 0.0)):
                op, decode_gpu.DENSE_FROM = f"{str(dtype)[6:]}, {share:.2%} active", {2: start, 4: start}
                run.time(shown, op, name, lambda features=features, decoder=decoder: decode(features, decoder))


def dense_backward(given: Inputs, acts: Tensor, gradient: Tensor) -> list[Tensor]:
    inner = (gradient @ given.W_dec.T) * (acts > 0)
    return [acts.T @ gradient, given.x.T @ inner, inner.sum(0)]


def dense_statistics(acts: Tensor) -> list[Tensor]:
    return [(acts > 0).sum(0), acts.sum(0, dtype=torch.float32), acts.float().square().sum(0), acts.amax(0)]


# --- other packages, where they can be imported ---


def encode_peers(shape: Shape, given: Inputs) -> Contestants:
    weight = given.W_enc.T.contiguous()
    found: Contestants = []
    try:
        from sparsify.fused_encoder import fused_encoder

        found.append(("eai-sparsify", lambda: fused_encoder(given.x, weight, given.b_enc, shape.k, "topk")))
    except ImportError:
        pass
    try:
        from flashinfer import top_k

        def with_top_k() -> Any:
            return top_k(torch.addmm(given.b_enc, given.x, given.W_enc).relu_(), shape.k)

        found.append(("plain torch with flashinfer's top_k", with_top_k))
    except ImportError:
        pass
    return found


def decode_peers(shape: Shape, given: Inputs, features: FeatureCSR, acts: Tensor) -> Contestants:
    found: Contestants = []
    try:
        from sparsify.xformers import xformers_embedding_bag

        indices, values = features.indices.view(-1, shape.k).long(), features.values.view(-1, shape.k)
        found.append(("eai-sparsify", lambda: xformers_embedding_bag(indices, given.W_dec, values)))
    except (ImportError, RuntimeError):
        pass
    try:
        from llamascopium.kernels import decode_with_triton_spmm_kernel

        spmm = decode_with_triton_spmm_kernel
        found.append(("llamascopium", lambda: spmm(acts, given.W_dec.T.contiguous())))
    except ImportError:
        pass
    return found


if __name__ == "__main__":
    sys.exit(main())
