"""One language model seen from inside: run it, capture at named sites, edit at named sites. Nothing else."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .errors import SiteError
from .sites import Site, parse_site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Edit = Callable[[Tensor], Tensor]


class _EnoughSeen(Exception):
    """Raised inside a hook to stop the forward pass after the last site asked for."""


@dataclass(frozen=True)
class Shape:
    """The dimensions that decide whether two models can be compared node by node."""

    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int


@dataclass(frozen=True)
class Encoded:
    """A text as this model reads it: ``ids`` and, for each, its character span (start, end) in the text."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Model:
    """A hooked causal language model (built by :func:`heredity.interp.load`).

    Tokens are int64 [batch, pos], padded on the right: attention is causal, so padding never reaches a real token
    and no mask is needed.

    Attributes:
        spec: the model argument it was loaded from.
        digest: content sha256 over weights, configuration and tokenizer.
        floor: largest absolute log-probability error of this wrapper against the bare transformers forward.
    """

    def __init__(self, bridge: "TransformerBridge", tokenizer: Any, *, spec: str, digest: str, floor: float) -> None:
        self.bridge, self.tokenizer = bridge, tokenizer
        self.spec, self.digest, self.floor = spec, digest, floor
        cfg, hf = bridge.cfg, cast(Any, bridge.original_model)
        self.shape = Shape(
            architecture=type(hf).__name__,
            n_layers=int(cfg.n_layers),
            n_heads=int(cfg.n_heads),
            n_kv_heads=int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads),
            d_model=int(cfg.d_model),
            d_head=int(cfg.d_head),
            d_vocab=int(hf.get_output_embeddings().weight.shape[0]),
            n_ctx=int(cfg.n_ctx),
        )
        self.n_params = sum(p.numel() for p in {id(p): p for p in hf.parameters()}.values())

    # --- running ---

    def logits(self, tokens: Tensor, *, edits: Mapping[str, Edit] | None = None) -> Tensor:
        """Next-token logits [batch, pos, d_vocab] with ``edits`` applied at their sites.

        Gradients flow where the caller has enabled them.
        """
        with self._hooked(edits or {}):
            return self.bridge.original_model(tokens, use_cache=False).logits

    def capture(
        self, tokens: Tensor, sites: Sequence[str], *, edits: Mapping[str, Edit] | None = None
    ) -> dict[str, Tensor]:
        """Values at ``sites`` (shapes in :mod:`.sites`); the forward stops after the last one needed.

        Raises:
            SiteError: a name this model does not have.
        """
        seen: dict[str, Tensor] = {}
        with self._hooked(edits or {}, readers=self._readers(sites, seen, stop=True)), suppress(_EnoughSeen):
            self.bridge.original_model(tokens, use_cache=False)
        return {name: seen[name] for name in sites}

    def logits_and_capture(
        self, tokens: Tensor, sites: Sequence[str], *, edits: Mapping[str, Edit] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both of the above in one forward."""
        seen: dict[str, Tensor] = {}
        with self._hooked(edits or {}, readers=self._readers(sites, seen, stop=False)):
            logits = self.bridge.original_model(tokens, use_cache=False).logits
        return logits, {name: seen[name] for name in sites}

    def step(self, tokens: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        """Logits of the last position [batch, d_vocab] and the key-value cache, for decoding token by token.

        All rows of ``tokens`` must be real (no padding).
        """
        out = self.bridge.original_model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    # --- sites ---

    def site(self, name: str) -> Site:
        """The site called ``name`` in this model.

        Raises:
            SiteError: it has none of that name.
        """
        site = parse_site(name)
        known = site is not None and site.hook in self.bridge.hook_dict
        if site is None or not known or (site.head is not None and site.head >= self.shape.n_heads):
            raise SiteError(
                f"no site {name!r} in this {self.shape.architecture}",
                where=self.spec,
                remedy=f"Use one of: embed, final, resid_pre@L, resid_mid@L, resid_post@L, attn_out@L, attn_z@L, "
                f"attn_head@L.H, mlp_in@L, mlp_out@L with L < {self.shape.n_layers}, H < {self.shape.n_heads}.",
            )
        return site

    def head_weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """Output projection of a layer by head, [head, d_head, d_model], and its bias [d_model] (zeros if none)."""
        projection = self.bridge.blocks[layer].attn.o.original_component
        weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
        bias = projection.bias if projection.bias is not None else weight.new_zeros(weight.shape[1])
        return weight.reshape(self.shape.n_heads, self.shape.d_head, -1), bias

    # --- text ---

    def encode(self, text: str) -> Encoded:
        """``text`` as token ids with character spans; special tokens the tokenizer adds have empty spans."""
        out = self.tokenizer(text, return_offsets_mapping=True)
        ids = out["input_ids"][: self.shape.n_ctx]
        return Encoded(text, tuple(ids), tuple((int(a), int(b)) for a, b in out["offset_mapping"][: len(ids)]))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans of all tokens of ``text``, however long."""
        return [(int(a), int(b)) for a, b in self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids as text, special tokens kept."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # --- hooks ---

    def _readers(self, names: Sequence[str], seen: dict[str, Tensor], stop: bool) -> list[tuple[str, Edit]]:
        sites = {name: self.site(name) for name in names}

        def reader(name: str, site: Site) -> Edit:
            def read(value: Tensor) -> Tensor:
                if site.kind == "attn_head":
                    weight, bias = self.head_weights(site.layer or 0)
                    seen[name] = value[:, :, site.head] @ weight[site.head or 0] + bias / self.shape.n_heads
                else:
                    seen[name] = value
                if stop and len(seen) == len(sites):
                    raise _EnoughSeen
                return value

            return read

        return [(site.hook, reader(name, site)) for name, site in sites.items()]

    @contextmanager
    def _hooked(self, edits: Mapping[str, Edit], readers: Sequence[tuple[str, Edit]] = ()) -> Iterator[None]:
        # Edits go in before readers, so that a captured value is the edited one.
        wanted = [(self.site(name).hook, edit) for name, edit in edits.items()] + list(readers)
        points = {hook: self.bridge.hook_dict[hook] for hook, _ in wanted}
        try:
            for hook, function in wanted:
                points[hook].add_hook(lambda tensor, hook, function=function: function(tensor))
            yield
        finally:
            for point in points.values():
                point.remove_hooks()


@torch.no_grad()
def pad(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of token ids as int64 [batch, pos] padded on the right with ``fill``, and the mask of real tokens."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), fill, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    mask = torch.arange(width)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return tokens, mask
