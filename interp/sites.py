"""Site names and the TransformerBridge hook each one stands for: the only place that knows both.

``embed`` · ``final`` (input of the last norm) · ``resid_pre@L`` · ``resid_mid@L`` · ``resid_post@L`` ·
``attn_out@L`` · ``attn_q@L``, ``attn_k@L``, ``attn_v@L`` (what the projections return, before rotation,
[batch, pos, head, d_head]; keys and values have a row per key-value head) · ``attn_z@L`` (head values before the output
projection, [batch, pos, head, d_head]) · ``mlp_in@L`` · ``mlp_post@L`` (the MLP's neurons: what its last projection
reads, [batch, pos, d_mlp]) · ``mlp_out@L`` · ``attn_head@L.H`` (one head's write to the residual stream).
Unless said otherwise a site's value is [batch, pos, d_model].

``embed`` is the token embedding alone: learned positions (GPT-2) and Gemma's scaling come after it, before
``resid_pre@0``. ``attn_out`` and ``mlp_out`` are what the modules return: Gemma norms them once more before it adds
them to the stream. Parallel blocks (GPT-NeoX) have no ``resid_mid``.
"""

import re
from dataclasses import dataclass

_HOOKS = {
    "embed": "embed.hook_out",
    "final": "ln_final.hook_in",
    "resid_pre": "blocks.{layer}.hook_in",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "resid_post": "blocks.{layer}.hook_out",
    "attn_out": "blocks.{layer}.attn.hook_out",
    "attn_q": "blocks.{layer}.attn.q.hook_out",
    "attn_k": "blocks.{layer}.attn.k.hook_out",
    "attn_v": "blocks.{layer}.attn.v.hook_out",
    "attn_z": "blocks.{layer}.attn.o.hook_in",
    "mlp_in": "blocks.{layer}.mlp.hook_in",
    "mlp_post": "blocks.{layer}.mlp.out.hook_in",
    "mlp_out": "blocks.{layer}.mlp.hook_out",
    "attn_head": "blocks.{layer}.attn.o.hook_in",
}
_GLOBAL = ("embed", "final")
_IN_A_BLOCK: tuple[str, ...] = tuple(
    "resid_pre attn_q attn_k attn_v attn_z attn_head attn_out resid_mid mlp_in mlp_post mlp_out resid_post".split()
)
_PATTERN = re.compile(r"(?P<kind>[a-z_]+)(?:@(?P<layer>0|[1-9][0-9]{0,8})(?:\.(?P<head>0|[1-9][0-9]{0,8}))?)?")


@dataclass(frozen=True)
class Site:
    """A named place in the residual computation."""

    kind: str
    layer: int | None = None
    head: int | None = None

    @property
    def hook(self) -> str:
        """The TransformerBridge hook point that carries this site."""
        return _HOOKS[self.kind].format(layer=self.layer)

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        return f"{self.kind}@{self.layer}" + ("" if self.head is None else f".{self.head}")


def parse_site(name: str) -> Site | None:
    """The site called ``name``, or None where the grammar does not allow it."""
    match = _PATTERN.fullmatch(name)
    if not match or match["kind"] not in _HOOKS:
        return None
    kind, layer, head = match["kind"], match["layer"], match["head"]
    if (kind in _GLOBAL) != (layer is None) or (kind == "attn_head") != (head is not None):
        return None
    return Site(kind, None if layer is None else int(layer), None if head is None else int(head))


def order(name: str) -> tuple[int, int, int]:
    """Where in the forward the site called ``name`` stands: a key to sort by."""
    site = parse_site(name)
    assert site is not None, name
    if site.layer is None:
        return (-1 if site.kind == "embed" else 2**31), 0, 0
    return site.layer, _IN_A_BLOCK.index(site.kind), site.head or 0
