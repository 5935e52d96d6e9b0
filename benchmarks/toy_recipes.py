"""Published recipes for dictionaries of two models, small: what ``toy_dictionaries.py`` compares.

    l1           ReLU, penalty on f·Σ‖d‖ (Lindsey et al. 2024)
    batchtopk    the n·k largest f·Σ‖d‖ of a batch, dead latents revived by AuxK (Minder et al. 2504.02922)
    dsf          part of the latents share one decoder row between the models, at a lower penalty (Anthropic, Feb 2025)
    dfc          BatchTopK with latents dedicated to one model, encoder and decoder zero in the other (2602.11729)
    difference   BatchTopK SAE of successor minus parent

All are trained on activations in each model's own units (root mean square 1), by Adam, with encoder and decoder equal
at the start.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.interp.dictionaries import Dictionary, Port
from heredity.kernels import BatchTopK, ReLU

PORTS = (Port("resid_post@0", 0), Port("resid_post@0", 1))


@dataclass(frozen=True)
class Recipe:
    """Attributes:
    penalty: of l1 and dsf; 0 means BatchTopK.
    k: mean number of active latents of BatchTopK.
    tied: share of latents whose two decoder rows are one, and ``tied_penalty`` of them over that of the others.
    dedicated: share of latents of the parent alone, and the same of the successor.
    difference: whether the difference is what is decomposed.
    """

    penalty: float = 0.0
    k: float = 8
    tied: float = 0.0
    tied_penalty: float = 0.2
    dedicated: float = 0.0
    difference: bool = False


RECIPES = {
    "L1": Recipe(penalty=0.7),
    "BatchTopK": Recipe(),
    "DSF": Recipe(penalty=0.7, tied=0.5),
    "DFC": Recipe(dedicated=0.05),
    "difference SAE": Recipe(k=0.5, difference=True),
}


def train(
    recipe: Recipe, parent: Tensor, successor: Tensor, *, latents: int, seed: int, steps: int = 1200
) -> Dictionary:
    """A crosscoder of the pair, or an SAE of the difference; ``seed`` fixes start and batches."""
    streams = [successor - parent] if recipe.difference else [parent, successor]
    units = [float(x.square().mean().sqrt()) or 1.0 for x in streams]
    streams = [x / unit for x, unit in zip(streams, units, strict=True)]
    widths = [x.shape[1] for x in streams]
    x = torch.cat(streams, 1)
    generator = torch.Generator().manual_seed(seed)
    allowed, tied = _blocks(recipe, latents, widths)
    decoder = torch.randn(latents, sum(widths), generator=generator) * allowed
    if tied:
        decoder[:tied, widths[0] :] = decoder[:tied, : widths[0]]
    # Rows of one length in every model they may write to.
    decoder = torch.cat(
        [START * torch.nn.functional.normalize(part, dim=1) for part in decoder.split(widths, dim=1)], 1
    )
    W_dec, W_enc = decoder.clone().requires_grad_(), decoder.clone().requires_grad_()
    b_enc = torch.zeros(latents, requires_grad=True)
    b_dec = x.mean(0).requires_grad_()
    optimizer = torch.optim.Adam([W_dec, W_enc, b_enc, b_dec], lr=LEARNING_RATE, fused=True)
    weight = torch.ones(latents)
    weight[:tied] = recipe.tied_penalty
    quiet, threshold = torch.zeros(latents), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / 50, (steps - step) / (0.3 * steps))
        batch = x[torch.randint(len(x), (BATCH,), generator=generator)]
        raw = torch.relu(batch @ W_enc.T + b_enc)
        length = _lengths(W_dec, widths)
        if recipe.penalty:
            f = raw
        else:
            k = recipe.k * max(1.0, 3 - 2 * step / (0.3 * steps))
            ranked = (raw * length).detach()
            cut = float(ranked.flatten().topk(int(k * BATCH), sorted=False).values.min())
            threshold = 0.98 * threshold + 0.02 * cut if step > 0.5 * steps else cut
            f = raw * (ranked >= max(cut, 1e-6))
        error = batch - f @ W_dec - b_dec
        loss = error.square().sum(1).mean()
        quiet = torch.where((f > 0).any(0), 0, quiet + 1)
        if recipe.penalty:
            warmth = min(1.0, step / (0.3 * steps))
            loss = loss + recipe.penalty * warmth * (f * length * weight).sum(1).mean()
        elif bool((quiet > QUIET).any()):
            revived = raw.masked_fill(quiet <= QUIET, 0)
            best = revived.topk(min(32, latents), dim=1, sorted=False)
            revived = torch.zeros_like(revived).scatter(1, best.indices, best.values)
            loss = loss + (error.detach() - revived @ W_dec).square().sum(1).mean() / 32
        optimizer.zero_grad()
        loss.backward()
        for part in (W_dec, W_enc):
            # Before Adam sees them: its moments would carry what leaks into the forbidden blocks.
            part.grad.mul_(allowed)
        if tied:
            both = W_dec.grad[:tied, : widths[0]] + W_dec.grad[:tied, widths[0] :]
            W_dec.grad[:tied] = both.repeat(1, 2)
        optimizer.step()
    return _folded(recipe, [p.detach() for p in (W_enc, b_enc, W_dec, b_dec)], widths, units, threshold)


LEARNING_RATE, BATCH, QUIET, START = 6e-3, 384, 40, 0.4


def _blocks(recipe: Recipe, latents: int, widths: list[int]) -> tuple[Tensor, int]:
    """Which entries of the rows may differ from 0 [latents, Σ widths]: the dedicated come last; how many are tied."""
    allowed = torch.ones(latents, sum(widths))
    own = round(recipe.dedicated * latents)
    if own:
        allowed[-2 * own : -own, widths[0] :] = 0
        allowed[-own:, : widths[0]] = 0
    # One row for both models needs one width.
    return allowed, round(recipe.tied * latents) if len(set(widths)) == 1 and len(widths) == 2 else 0


def _lengths(rows: Tensor, widths: list[int]) -> Tensor:
    return sum((part.norm(dim=1) for part in rows.split(widths, dim=1)), rows.new_zeros(()))


@torch.no_grad()
def _folded(
    recipe: Recipe, arrays: list[Tensor], widths: list[int], units: list[float], threshold: float
) -> Dictionary:
    W_enc, b_enc, W_dec, b_dec = arrays
    ports = PORTS[:1] if recipe.difference else PORTS
    return Dictionary(
        kind="sae" if recipe.difference else "crosscoder",
        reads=ports,
        writes=ports,
        W_enc=tuple((part / unit).T.contiguous() for part, unit in zip(W_enc.split(widths, 1), units, strict=True)),
        b_enc=b_enc,
        W_dec=tuple((part * unit).contiguous() for part, unit in zip(W_dec.split(widths, 1), units, strict=True)),
        b_dec=tuple(part * unit for part, unit in zip(b_dec.split(widths), units, strict=True)),
        activation=ReLU() if recipe.penalty else BatchTopK(threshold=threshold),
        norm=None if recipe.penalty else _lengths(W_dec, widths),
        provenance={"rms": units},
    )
