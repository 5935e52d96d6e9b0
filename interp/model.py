"""One language model seen from inside: run it, capture at named sites, edit at named sites. Nothing else."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .errors import SiteError
from .sites import Site, parse_site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Edit = Callable[[Tensor], Tensor]


# Each set of hooks has a level of its own, so that a forward inside an edit of another leaves the outer hooks alone.
_levels = count(1)


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

    def logits(
        self,
        tokens: Tensor,
        *,
        edits: Mapping[str, Edit] | None = None,
        past: Any = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits [batch, pos, d_vocab] with ``edits`` applied at their sites.

        Gradients flow where the caller has enabled them.

        Args:
            tokens: int64 [batch, pos].
            edits: by site.
            past: a key-value cache of the tokens before; it grows by this forward.
            positions: int64 [n], the only positions to read logits at; the result is [batch, n, d_vocab].
        """
        with self._hooked(edits or {}):
            return self._forward(tokens, past, positions)

    def capture(
        self, tokens: Tensor, sites: Sequence[str], *, edits: Mapping[str, Edit] | None = None, past: Any = None
    ) -> dict[str, Tensor]:
        """Values at ``sites`` (shapes in :mod:`.sites`); the forward stops after the last one needed.

        Raises:
            SiteError: a name this model does not have.
        """
        seen: dict[str, Tensor] = {}
        with self._hooked(edits or {}, sites, seen, stop=True), suppress(_EnoughSeen):
            self.bridge.original_model(tokens, past_key_values=past, use_cache=past is not None)
        return self._taken(sites, seen)

    def logits_and_capture(
        self,
        tokens: Tensor,
        sites: Sequence[str],
        *,
        edits: Mapping[str, Edit] | None = None,
        past: Any = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both of the above in one forward."""
        seen: dict[str, Tensor] = {}
        with self._hooked(edits or {}, sites, seen):
            logits = self._forward(tokens, past, positions)
        return logits, self._taken(sites, seen)

    def step(self, tokens: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        """Logits of the last position [batch, d_vocab] and the key-value cache, for decoding token by token.

        All rows of ``tokens`` must be real (no padding).
        """
        out = self.bridge.original_model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def forced(self, start: Tensor, words: Tensor, *, batch: int) -> Iterator[Tensor]:
        """Logits [n, d_vocab] after the tokens ``start`` [pos] and each of ``words``, ``batch`` of them at a time."""
        past = self.step(start[None])[1]
        for chunk in words.split(batch):
            yield self.step(chunk[:, None], repeated(past, len(chunk)))[0]

    def _forward(self, tokens: Tensor, past: Any, positions: Tensor | None) -> Tensor:
        kept = {} if positions is None else {"logits_to_keep": positions}
        return self.bridge.original_model(tokens, past_key_values=past, use_cache=past is not None, **kept).logits

    # --- sites ---

    def site(self, name: str) -> Site:
        """The site called ``name`` in this model.

        Raises:
            SiteError: it has none of that name.
        """
        return self._site(name, self.bridge.hook_dict)

    def _site(self, name: str, hooks: Mapping[str, Any]) -> Site:
        site = parse_site(name)
        known = site is not None and site.hook in hooks
        if site is None or not known or (site.head is not None and site.head >= self.shape.n_heads):
            raise SiteError(
                f"no site {name!r} in this {self.shape.architecture}",
                where=self.spec,
                remedy=f"Use one of: embed, final, resid_pre@L, resid_mid@L, resid_post@L, attn_out@L, attn_q@L, "
                f"attn_k@L, attn_v@L, attn_z@L, attn_head@L.H, mlp_in@L, mlp_post@L, mlp_out@L "
                f"with L < {self.shape.n_layers}, H < {self.shape.n_heads}.",
            )
        return site

    def head_weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """Output projection of a layer by head, [head, d_head, d_model], and its bias [d_model] (zeros if none)."""
        projection = self.bridge.blocks[layer].attn.o.original_component
        weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
        bias = projection.bias if projection.bias is not None else weight.new_zeros(weight.shape[1])
        return weight.reshape(self.shape.n_heads, self.shape.d_head, -1), bias

    def neuron_weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """Last projection of a layer's MLP, [d_mlp, d_model], and its bias [d_model] (zeros if none).

        Raises:
            SiteError: the MLP has no neurons of its own (``mlp_post@L``).
        """
        self.site(f"mlp_post@{layer}")
        projection = self.bridge.blocks[layer].mlp.out.original_component
        weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
        return weight, projection.bias if projection.bias is not None else weight.new_zeros(weight.shape[1])

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

    @contextmanager
    def edited(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Apply ``edits`` in every forward inside the context.

        Raises:
            SiteError: a name this model does not have.
        """
        with self._hooked(edits):
            yield

    @contextmanager
    def _hooked(
        self,
        edits: Mapping[str, Edit],
        reads: Sequence[str] = (),
        seen: dict[str, Tensor] | None = None,
        stop: bool = False,
    ) -> Iterator[None]:
        """Apply ``edits`` and put the values at ``reads`` into ``seen`` in every forward inside the context."""
        added: dict[str, Tensor] = {}
        # Edits go in before readers, so that a captured value is the edited one; and what an edit must add further
        # down the block goes in before the edits made there.
        known = self.bridge.hook_dict  # collected anew from all modules at every access
        edited = [(self._site(name, known), edit) for name, edit in edits.items()]
        hooks = [pair for site, edit in edited for pair in self._second_half(site, added)]
        hooks += [(site.hook, self._first_half(site, edit, added)) for site, edit in edited]
        seen = {} if seen is None else seen
        read = [self._site(name, known) for name in reads]
        hooks += [(site.hook, self._reader(site, added, seen, reads, stop)) for site in read]
        points = {hook: known[hook] for hook, _ in hooks}
        level = next(_levels)
        try:
            for hook, function in hooks:
                points[hook].add_hook(lambda tensor, hook, function=function: function(tensor), level=level)
            yield
        finally:
            for point in points.values():
                point.remove_hooks(level=level)

    def _taken(self, sites: Sequence[str], seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        silent = [name for name in sites if name not in seen]
        if silent:
            raise SiteError(
                f"the forward never passed {silent[0]!r}", where=self.spec, remedy="Choose another site of this model."
            )
        return {name: seen[name] for name in sites}

    def _first_half(self, site: Site, edit: Edit, added: dict[str, Tensor]) -> Edit:
        def at_head(z: Tensor) -> Tensor:
            own = self._head_write(site, z, added)
            added[str(site)] = added.get(str(site), 0) + edit(own) - own
            return z

        def at_middle(value: Tensor) -> Tensor:
            changed = edit(value)
            added[str(site)] = changed - value
            return changed

        return {"attn_head": at_head, "resid_mid": at_middle}.get(site.kind, edit)

    def _second_half(self, site: Site, added: dict[str, Tensor]) -> list[tuple[str, Edit]]:
        # One head's write is a term of the attention's output. In the middle of a block the hook sits on the MLP's
        # branch, so the skip connection around the MLP gets the change at the block's end.
        end = {"attn_head": "attn_out", "resid_mid": "resid_post"}.get(site.kind)
        if end is None:
            return []
        return [(Site(end, site.layer).hook, lambda value: value + added.pop(str(site)))]

    def _reader(
        self, site: Site, added: Mapping[str, Tensor], seen: dict[str, Tensor], reads: Sequence[str], stop: bool
    ) -> Edit:
        def read(value: Tensor) -> Tensor:
            seen[str(site)] = self._head_write(site, value, added) if site.kind == "attn_head" else value
            if stop and len(seen) == len(set(reads)):
                raise _EnoughSeen
            return value

        return read

    def _head_write(self, site: Site, z: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """One head's write [batch, pos, d_model]: its part of the projection and an equal share of the bias."""
        weight, bias = self.head_weights(site.layer or 0)
        write = z[:, :, site.head] @ weight[site.head or 0] + bias / self.shape.n_heads
        return write + added.get(str(site), 0)


def repeated(past: Any, rows: int) -> Any:
    """A copy of the key-value cache of one row for ``rows`` rows; decoding writes into it."""
    wide = copy.deepcopy(past)
    wide.batch_repeat_interleave(rows)
    return wide


@torch.no_grad()
def pad(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of token ids as int64 [batch, pos] padded on the right with ``fill``, and the mask of real tokens."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), fill, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    mask = torch.arange(width)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return tokens, mask
