"""How much of a model's loss survives when a dictionary's reconstruction takes the place of the activations.

recovered = (L_ablated − L_spliced) / (L_ablated − L_original): 1 where the reconstruction is as good as the activations
themselves, 0 where it is no better than their mean. Most papers ablate to zero instead (Rajamanoharan et al. 2024,
arXiv:2404.16014, §4.1), which is far from any activation the model has met, and so flatters; both are given.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..capture import batches
from ..errors import CorpusError, DictionaryError
from ..model import Edit, Encoded, Model, pad
from .record import Dictionary, DictionarySet, Port
from .splicing import layers_of, splice


@dataclass(frozen=True)
class LossRecovered:
    """Next-token cross-entropies over the same tokens, nats per token.

    Attributes:
        original: of the model as it is.
        spliced: with the reconstruction (no errors) at every site the dictionary writes.
        mean_ablated: with each of these sites held at its mean over the tokens.
        zero_ablated: with zero there.
        n_tokens: predicted tokens.
    """

    original: float
    spliced: float
    mean_ablated: float
    zero_ablated: float
    n_tokens: int

    @property
    def recovered(self) -> float | None:
        """Share of what ablation to the mean costs that is not lost; None where that costs nothing."""
        return _share(self.mean_ablated, self.spliced, self.original)

    @property
    def recovered_from_zero(self) -> float | None:
        """The same for ablation to zero."""
        return _share(self.zero_ablated, self.spliced, self.original)

    def __str__(self) -> str:
        share = "unmeasurable" if self.recovered is None else f"{self.recovered:.1%}"
        return (
            f"loss {self.original:.3f} → {self.spliced:.3f} nats (mean-ablated {self.mean_ablated:.3f}): "
            f"{share} recovered over {self.n_tokens} tokens"
        )


@torch.no_grad()
def loss_recovered(
    models: Model | Sequence[Model],
    dictionary: Dictionary | DictionarySet,
    texts: Sequence[Encoded],
    *,
    side: int = 0,
    batch_tokens: int = 1024,
) -> LossRecovered:
    """The loss of one model with ``dictionary`` spliced in, beside its loss with the same sites ablated.

    Nothing is drawn at random. Memory holds the logits of ``batch_tokens`` padded tokens.

    Args:
        models: the model, or a crosscoder's models in the order of :attr:`Port.model`.
        dictionary: what is spliced.
        texts: as the models read them.
        side: the model whose loss is measured.
        batch_tokens: padded tokens in one forward.

    Raises:
        CorpusError: no text has two tokens.
        DictionaryError: as :func:`.splicing.splice`; or the models read a text as different tokens.
    """
    models = [models] if isinstance(models, Model) else list(models)
    model = models[side]
    texts = [text for text in texts if len(text.ids) > 1]
    if not texts:
        raise CorpusError("no text of two tokens", where=model.spec, remedy="Give texts that predict something.")
    sites = sorted({port.site for d in layers_of(dictionary) for port in d.writes if port.model == side})
    splice(dictionary, given=dict.fromkeys(_elsewhere(dictionary, side), torch.empty(0)), side=side)  # refuses early
    middle = means(model, texts, sites, batch_tokens=batch_tokens)
    to_mean: dict[str, Edit] = {site: lambda x, site=site: middle[site].to(x).expand_as(x) for site in sites}
    to_zero: dict[str, Edit] = dict.fromkeys(sites, torch.zeros_like)
    total = torch.zeros(4, dtype=torch.float64)
    for members, tokens, mask in grouped(texts, batch_tokens):
        given = other_activations(models, dictionary, side, [texts[i] for i in members], tokens)
        into = splice(dictionary, keep_error=False, side=side, given=given)
        for k, edits in enumerate(({}, into, to_mean, to_zero)):
            total[k] += _loss(model.logits(tokens.to(_device(model)), edits=edits).cpu(), tokens, mask)
    n = sum(len(text.ids) - 1 for text in texts)
    return LossRecovered(*(total / n).tolist(), n_tokens=n)


@torch.no_grad()
def means(
    model: Model, texts: Sequence[Encoded], sites: Sequence[str], *, batch_tokens: int = 1024
) -> dict[str, Tensor]:
    """The mean over all tokens of ``texts`` at each site, float64 [*site shape].

    Raises:
        SiteError: a site that the model does not have.
    """
    total: dict[str, Tensor] = {}
    for _, tokens, mask in grouped(texts, batch_tokens):
        for site, value in model.capture(tokens.to(_device(model)), sites).items():
            total[site] = total.get(site, 0.0) + value.cpu()[mask].double().sum(0)
    n = sum(len(text.ids) for text in texts)
    return {site: value / n for site, value in total.items()}


def grouped(texts: Sequence[Encoded], batch_tokens: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Numbers of the texts in each batch, their tokens [batch, pos] and the mask of real ones."""
    for members in batches(texts, batch_tokens):
        yield members, *pad([texts[i].ids for i in members])


def other_activations(
    models: Sequence[Model],
    dictionary: Dictionary | DictionarySet,
    side: int,
    texts: Sequence[Encoded],
    tokens: Tensor,
) -> Mapping[Port, Tensor]:
    """What a crosscoder reads from models other than ``side``, [batch, pos, *site shape], for the same tokens.

    Raises:
        DictionaryError: a model is missing, or reads one of ``texts`` as other tokens.
    """
    found: dict[Port, Tensor] = {}
    ports = _elsewhere(dictionary, side)
    for number in sorted({port.model for port in ports}):
        if number >= len(models):
            raise DictionaryError(
                f"it reads model {number}", where=repr(dictionary), remedy=f"Give {number + 1} models or more."
            )
        other = models[number]
        different = [text.text for text in texts if other.encode(text.text).ids != text.ids]
        if different:
            raise DictionaryError(
                f"it reads other tokens than the first model where the text is {different[0][:40]!r}",
                where=other.spec,
                remedy="Only models of one tokenizer can be read side by side here.",
            )
        here = [port for port in ports if port.model == number]
        captured = other.capture(tokens.to(_device(other)), [port.site for port in here])
        found |= {port: captured[port.site] for port in here}
    return found


def _elsewhere(dictionary: Dictionary | DictionarySet, side: int) -> list[Port]:
    every = [port for layer in layers_of(dictionary) for port in layer.reads if port.model != side]
    return list(dict.fromkeys(every))


def _loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> float:
    """Summed cross-entropy of each real token but a text's first; text by text, to copy no more logits than that."""
    total = 0.0
    for row, ids, real in zip(logits, tokens, mask.sum(1).tolist(), strict=True):
        total += float(torch.nn.functional.cross_entropy(row[: real - 1].float(), ids[1:real], reduction="sum"))
    return total


def _share(ablated: float, spliced: float, original: float) -> float | None:
    return (ablated - spliced) / (ablated - original) if ablated > original else None


def _device(model: Model) -> torch.device:
    return next(model.bridge.original_model.parameters()).device
