"""Describing latents: one pass over texts for statistics, then what each writes to the logits, then rules in words.

The direct effect of a latent on the logits is its decoder row read through the last norm's gain and the unembedding
(the logit lens: nostalgebraist 2020; of decoder rows: Bloom & Lin 2024). What later layers make of the row is not in
it.

One letter means one dimension: T tokens, D a width, F latents, V tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from heredity.kernels import FeatureCSR, Statistics, statistics

from ..errors import CorpusError, DictionaryError, StoreError
from ..model import Encoded, Model
from ..readout import unembedding
from ..sites import parse_site
from ..store import Store
from .notes import LatentNotes, LogitEffects, digest
from .record import Dictionary
from .recovered import grouped, other_activations
from .splicing import check_token_by_token, check_width

EXPLAINED = 64
"""Latents that are explained where nothing else is said."""
TOP = 16
"""Strongest tokens kept of each latent."""
TOKENS = 10
"""Tokens listed on either side of a logit effect."""
_SCORES = 2**25
"""Scores [latents, V] held at once: 128 MiB."""
_SUMMED = frozenset({"embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "attn_head", "mlp_out", "final"})
"""Sites whose values are terms of the residual stream."""


@torch.no_grad()
def describe(
    dictionary: Dictionary,
    models: Model | Sequence[Model],
    texts: Sequence[Encoded],
    *,
    latents: Sequence[int] | int = EXPLAINED,
    seed: int = 0,
    store: Store | None = None,
    batch_tokens: int = 2048,
) -> LatentNotes:
    """Statistics and logit effects of all latents, explanations of some.

    The texts are run once. Memory holds a batch, the texts, the statistics, and the activations of the latents that
    are explained (where they are drawn, of four times as many).

    Args:
        dictionary: whose latents.
        models: the model, or a crosscoder's models in the order of :attr:`.record.Port.model`.
        texts: as the models read them.
        latents: which are explained, or how many, drawn at random among those that are active.
        seed: of that draw and of the explanations.
        store: a capture of ``texts`` (in any order) at the places read, used instead of running the model.
        batch_tokens: padded tokens in one forward.

    Raises:
        DictionaryError: the dictionary does not fit the models; or which latents are active depends on the batch.
        SiteError: a model does not have a place that is read.
        CorpusError: no text has a token.
        StoreError: the store is of another model, of other texts, or damaged.
        ValueError: a latent the dictionary does not have.
    """
    from ..explain import Contexts, explain

    models = [models] if isinstance(models, Model) else list(models)
    check_token_by_token(dictionary)
    drawn = torch.randperm(dictionary.n_latents, generator=torch.Generator().manual_seed(seed))
    wanted = drawn[: 4 * latents] if isinstance(latents, int) else torch.tensor(list(latents), dtype=torch.int64)
    if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < dictionary.n_latents:
        raise ValueError(f"latents must lie in [0, {dictionary.n_latents})")
    seen: Statistics | None = None
    ordered: list[Encoded] = []
    parts: list[FeatureCSR] = []
    source = _from_store(store, models[0], dictionary, texts) if store else None
    for members, x in source or _from_models(models, dictionary, texts, batch_tokens):
        features = dictionary.encode(*x).to("cpu", torch.float32)
        found = statistics(features, first_token=sum(map(len, parts)), top=TOP)
        seen = found if seen is None else seen.merge(found)
        ordered += members
        parts.append(_only(features, wanted))
    if seen is None:
        raise CorpusError("no text gives a token", where=models[0].spec, remedy="Give text this tokenizer can read.")
    if isinstance(latents, int):
        wanted = wanted[seen.count[wanted] > 0][:latents]
    kept = tuple(dict.fromkeys(wanted.tolist()))
    features, contexts = _only(FeatureCSR.concatenate(parts), wanted), Contexts(tuple(ordered))
    effects = tuple(logit_effects(dictionary, model, side) for side, model in enumerate(models))
    last = next((each for each in reversed(effects) if each is not None), None)
    promoted = None if last is None else {latent: last.raised[latent].tolist() for latent in kept}
    names = _names(models[0], effects)
    explanations = explain(features, contexts, kept, seed=seed, promoted=promoted, names=names)
    return LatentNotes(
        dictionary=digest(dictionary),
        models=tuple(model.digest for model in models),
        seed=seed,
        contexts=contexts,
        statistics=seen,
        effects=effects,
        names=names,
        features=features,
        kept=kept,
        explanations=dict(zip(kept, explanations, strict=True)),
    )


@torch.no_grad()
def logit_effects(dictionary: Dictionary, model: Model, side: int = 0, *, count: int = TOKENS) -> LogitEffects | None:
    """The tokens whose logits each latent changes most in ``model``; None where no place written reaches the stream.

    A latent that writes to several places counts with the sum of its rows. Norms between a module's output and the
    stream, and a scale or cap of the logits (Gemma's, Cohere's), are left out.

    Raises:
        DictionaryError: a decoder row is not as wide as the place it writes to.
    """
    rows = [
        row
        for j, port in enumerate(dictionary.writes)
        if port.model == side
        for row in _to_stream(dictionary, model, j)
    ]
    if not rows:
        return None
    table = unembedding(model)[: len(model.tokenizer)].float()
    direction = torch.stack(rows).sum(0).to(table)
    if isinstance(model.bridge.ln_final.original_component, torch.nn.LayerNorm):
        # It takes the mean off before the gain.
        direction = direction - direction.mean(1, keepdim=True)
    count, found = min(count, len(table)), []
    for part in direction.split(max(1, _SCORES // len(table))):
        scores = part @ table.T
        scores -= scores.mean(1, keepdim=True)
        up, down = scores.topk(count), scores.topk(count, largest=False)
        found.append((up.indices, up.values, down.indices, down.values))
    return LogitEffects(*(torch.cat(each).cpu() for each in zip(*found, strict=True)))


def _to_stream(dictionary: Dictionary, model: Model, j: int) -> list[Tensor]:
    """The rows of the j-th decoder as terms of the residual stream, [F, D of the stream]; none if they are not."""
    port, rows = dictionary.writes[j], dictionary.W_dec[j]
    site = parse_site(port.site)
    if site is not None and site.kind == "attn_z":
        weight, _ = model.head_weights(site.layer or 0)
        check_width(dictionary, port, weight.shape[0] * weight.shape[1], rows.shape[1])
        return [rows @ weight.detach().flatten(0, 1).to(rows)]
    if site is None or site.kind not in _SUMMED:
        return []
    check_width(dictionary, port, model.shape.d_model, rows.shape[1])
    return [rows]


def _from_models(
    models: Sequence[Model], dictionary: Dictionary, texts: Sequence[Encoded], batch_tokens: int
) -> Iterator[tuple[list[Encoded], list[Tensor]]]:
    """Texts of each batch and activations [T, D] of their tokens at each place read."""
    side = min(port.model for port in dictionary.reads)
    own = [port for port in dictionary.reads if port.model == side]
    if side >= len(models):
        raise DictionaryError(f"it reads model {side}", where=repr(dictionary), remedy=f"Give {side + 1} models.")
    device = next(models[side].bridge.original_model.parameters()).device
    for members, tokens, mask in grouped(texts, batch_tokens):
        batch = [texts[i] for i in members]
        captured = models[side].capture(tokens.to(device), [port.site for port in own])
        values = {port: captured[port.site] for port in own}
        values |= other_activations(models, dictionary, side, batch, tokens)
        yield (
            batch,
            [
                _rows(dictionary, m, values[port][mask.to(values[port].device)])
                for m, port in enumerate(dictionary.reads)
            ],
        )


def _from_store(
    store: Store, model: Model, dictionary: Dictionary, texts: Sequence[Encoded]
) -> Iterator[tuple[list[Encoded], list[Tensor]]]:
    """The same from stored activations, a shard at a time."""
    if any(port.model for port in dictionary.reads):
        raise DictionaryError(
            "it reads several models, a store holds one", where=repr(dictionary), remedy="Give texts."
        )
    if store.manifest.weights != model.digest:
        raise StoreError(
            "captured from another model", where=str(store.directory), remedy=f"Capture from {model.spec}."
        )
    known = {text.ids: text for text in texts}
    for shard in range(store.n_shards):
        table = store.index(shard)
        ids, position = table["token"].to_pylist(), table["position"].to_pylist()
        starts = [i for i, p in enumerate(position) if p == 0]
        stored = [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
        absent = [text for text in stored if text not in known]
        if absent:
            raise StoreError(
                f"shard {shard} holds a text that is not among those given",
                where=str(store.directory),
                remedy="Give all texts of the capture.",
            )
        values = [store.read(port.site, shard) for port in dictionary.reads]
        yield [known[text] for text in stored], [_rows(dictionary, m, value) for m, value in enumerate(values)]


def _rows(dictionary: Dictionary, m: int, values: Tensor) -> Tensor:
    weight = dictionary.W_enc[m]
    flat = values.flatten(1).to(weight)
    check_width(dictionary, dictionary.reads[m], flat.shape[1], weight.shape[0])
    return flat


def _only(features: FeatureCSR, latents: Tensor) -> FeatureCSR:
    """The same tokens with ``latents`` alone."""
    of_interest = torch.zeros(features.n_latents, dtype=torch.bool)
    of_interest[latents] = True
    on = of_interest[features.indices.long()]
    counts = torch.bincount(features.tokens[on], minlength=features.n_tokens)
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return FeatureCSR(indptr, features.indices[on], features.values[on], features.n_latents)


def _names(model: Model, effects: Sequence[LogitEffects | None]) -> dict[int, str]:
    ids = [ids for each in effects if each is not None for ids in (each.raised, each.lowered)]
    return {i: model.decode([i]) for i in (torch.cat(ids).unique().tolist() if ids else [])}
