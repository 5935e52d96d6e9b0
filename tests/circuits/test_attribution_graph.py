"""Direct effects: against autograd through a plain restatement of the model, entry by entry, and by both identities."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution_graph import attribution_graph, sources_at
from heredity.circuits.attribution_graph_record import AttributionGraph
from heredity.circuits.attribution_graph_targets import Target, logit_difference, logit_targets, salient_logits
from heredity.interp.dictionaries.record import Dictionary, DictionarySet, Port
from heredity.interp.errors import DictionaryError
from heredity.interp.model import Model
from heredity.kernels import BatchTopK, JumpReLU, ReLU, TopK

LATENTS = 40  # of each random dictionary


class Plain:
    """Llama and GPT-2 once more in float64, patterns and scales detached, every MLP output a leaf of its own."""

    def __init__(self, model: Model, tokens: Tensor, parts: DictionarySet, constant_positions: int) -> None:
        from transformers import AutoModelForCausalLM

        bare = AutoModelForCausalLM.from_pretrained(model.spec)
        self.w = {name: value.double() for name, value in bare.state_dict().items()}
        self.config, self.parts, self.constant = (
            bare.config,
            [d.to(dtype=torch.float64) for d in parts.layers],
            constant_positions,
        )
        self.llama = "model.embed_tokens.weight" in self.w
        embedding = self.w["model.embed_tokens.weight" if self.llama else "transformer.wte.weight"]
        self.embedded = embedding[tokens].requires_grad_()
        self.out: list[Tensor] = []
        self.errors: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.before: list[Tensor] = []
        self._run(len(tokens))
        for layer, out in enumerate(self.out):
            made = torch.zeros_like(out)
            for source, d in enumerate(self.parts):
                sites = [port.site for port in d.writes]
                if f"mlp_out@{layer}" in sites:
                    j = sites.index(f"mlp_out@{layer}")
                    made = made + self.latents[source] @ d.W_dec[j] + d.b_dec[j]
                    if d.W_skip is not None:
                        made = made + self.reads[layer].detach() @ d.W_skip
            error = (out - made).detach()
            error[:constant_positions] = 0
            self.errors.append(error)

    def effects(self, value: Tensor) -> Tensor:
        """Effects of latents (all, active or not, layer by position by latent), errors and tokens on a number."""
        grads = torch.autograd.grad(value, [*self.out, self.embedded], retain_graph=True, allow_unused=True)
        g = [torch.zeros_like(self.embedded) if grad is None else grad for grad in grads]
        latents = []
        for source, d in enumerate(self.parts):
            slope = sum(g[int(port.site.split("@")[1])] @ d.W_dec[j].T for j, port in enumerate(d.writes))
            latents.append((self.latents[source] * slope).flatten())
        errors = [(error * grad).sum(1) for error, grad in zip(self.errors, g[:-1], strict=True)]
        return torch.cat([*latents, *errors, (self.embedded * g[-1]).sum(1)]).detach()

    def _run(self, n: int) -> None:
        x = self.embedded if self.llama else self.embedded + self.w["transformer.wpe.weight"][:n]
        self.reads: list[Tensor] = []
        for layer, d in enumerate(self.parts):
            at = f"model.layers.{layer}." if self.llama else f"transformer.h.{layer}."
            x = x + self._attention(self._norm(x, at + ("input_layernorm" if self.llama else "ln_1")), at)
            y = self._norm(x, at + ("post_attention_layernorm" if self.llama else "ln_2"))
            out, frozen = self._mlp(y, at)
            self.reads.append(y)
            read = frozen if d.kind == "sae" else y
            pre = read @ d.W_enc[0] + d.b_enc
            self.before.append(pre)
            active = _activate(pre.detach(), d)
            active[: self.constant] = 0
            self.latents.append(active)
            leaf = out.detach().requires_grad_()
            self.out.append(leaf)
            x = x + leaf
            if d.W_skip is not None:
                x = x + y @ d.W_skip - (y @ d.W_skip).detach()
        self.last = self._norm(x, "model.norm" if self.llama else "transformer.ln_f")[-1]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        if self.llama:
            scale = (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt().detach()
            return x * scale * self.w[name + ".weight"]
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.config.layer_norm_epsilon).rsqrt().detach()
        return centred * scale * self.w[name + ".weight"] + self.w[name + ".bias"]

    def _attention(self, x: Tensor, at: str) -> Tensor:
        n, heads = len(x), self.config.num_attention_heads
        if self.llama:
            groups, d = self.config.num_key_value_heads, x.shape[1] // heads
            q, k, v = (x @ self.w[f"{at}self_attn.{part}_proj.weight"].T for part in "qkv")
            q, k, v = q.view(n, heads, d), k.view(n, groups, d), v.view(n, groups, d)
            angles = torch.arange(n).double()[:, None] / 10000 ** (torch.arange(0, d, 2).double() / d)
            cos, sin = (f(torch.cat([angles, angles], 1))[:, None] for f in (torch.cos, torch.sin))
            q, k = (t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * sin for t in (q, k))
            k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        else:
            d = x.shape[1] // heads
            joint = x @ self.w[at + "attn.c_attn.weight"] + self.w[at + "attn.c_attn.bias"]
            q, k, v = (t.view(n, heads, d) for t in joint.chunk(3, -1))
        scores = torch.einsum("qhd,khd->hqk", q, k) / d**0.5
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(hidden, float("-inf")).softmax(-1).detach()
        z = torch.einsum("hqk,khd->qhd", pattern, v).flatten(1)
        if self.llama:
            return z @ self.w[at + "self_attn.o_proj.weight"].T
        return z @ self.w[at + "attn.c_proj.weight"] + self.w[at + "attn.c_proj.bias"]

    def _mlp(self, y: Tensor, at: str) -> tuple[Tensor, Tensor]:
        """What it returns, and the same with its gates detached."""
        if self.llama:
            gate, up, down = (self.w[f"{at}mlp.{part}_proj.weight"].T for part in ("gate", "up", "down"))
            act = torch.nn.functional.silu(y @ gate)
            return (act * (y @ up)) @ down, (act.detach() * (y @ up)) @ down
        z = y @ self.w[at + "mlp.c_fc.weight"] + self.w[at + "mlp.c_fc.bias"]
        act = torch.nn.functional.gelu(z, approximate="tanh")
        weight, bias = self.w[at + "mlp.c_proj.weight"], self.w[at + "mlp.c_proj.bias"]
        return act @ weight + bias, (z * (act / z).detach()) @ weight + bias


def _activate(pre: Tensor, d: Dictionary) -> Tensor:
    match d.activation:
        case TopK(k=k):
            least = pre.topk(k, -1).values[:, -1:]
            return torch.where(pre >= least, pre.clamp_min(0), 0.0)
        case JumpReLU(threshold=threshold):
            return torch.where(pre > threshold, pre, 0.0)
        case _:
            return pre.clamp_min(0)


def check_entries(graph: AttributionGraph, plain: Plain, targets: list[Target]) -> None:
    n, n_positions = graph.n_latents, len(plain.embedded)
    layer, position, latent = graph.latents.T
    flat = (layer * n_positions + position) * LATENTS + latent
    dense = torch.cat([part.flatten() for part in plain.latents])
    assert torch.equal(dense.nonzero()[:, 0], flat)
    assert torch.allclose(dense[flat], graph.activations.double(), rtol=1e-4, atol=1e-5)
    every = torch.cat([flat, torch.arange(len(dense), len(dense) + len(graph.errors) + len(graph.tokens))])
    values = [plain.before[i][p, f] for i, p, f in graph.latents.tolist()]
    values += [plain.last @ t.direction.double() for t in targets]
    wanted = torch.stack([plain.effects(value)[every] for value in values])
    size = wanted.abs().amax(1, keepdim=True)
    assert ((graph.weights - wanted).abs() <= 1e-5 * size).all()
    assert n and (wanted != 0).float().mean() > 0.05


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, pair_of: Callable[[str], tuple[Model, Model]]) -> Model:
    return pair_of(request.param)[0]


@pytest.fixture
def gemma(pair_of: Callable[[str], tuple[Model, Model]]) -> Model:
    return pair_of("gemma2")[0]


@pytest.mark.parametrize(
    ("kind", "activation", "skip", "constant"),
    [
        ("transcoder", ReLU(), False, 0),
        ("transcoder", TopK(6), False, 1),
        ("transcoder", JumpReLU(0.3), True, 1),
        ("cross_layer_transcoder", TopK(6), False, 0),
        ("sae", TopK(6), False, 0),
    ],
)
def test_every_direct_effect_is_that_of_autograd(
    model: Model,
    draw: Callable[..., Tensor],
    random_dictionaries: Callable[..., DictionarySet],
    kind: str,
    activation: Any,
    skip: bool,
    constant: int,
) -> None:
    tokens = draw(1, 7, seed=3)[0]
    parts = random_dictionaries(model, kind, activation, skip, seed=5)
    direction = torch.randn(model.shape.d_model, generator=torch.Generator().manual_seed(9))
    targets = [*logit_targets(model, [3, 9]), logit_difference(model, [5], [6, 7]), Target("a probe", direction)]
    graph = attribution_graph(model, parts, tokens, targets=targets, constant_positions=constant)
    check_entries(graph, Plain(model, tokens, parts, constant), targets)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
@pytest.mark.parametrize("kind", ["transcoder", "cross_layer_transcoder", "sae", "skip"])
def test_rows_and_roots_add_up(
    pair_of: Callable[[str], tuple[Model, Model]],
    draw: Callable[..., Tensor],
    random_dictionaries: Callable[..., DictionarySet],
    family: str,
    kind: str,
) -> None:
    model = pair_of(family)[0]
    parts = random_dictionaries(model, "transcoder" if kind == "skip" else kind, skip=kind == "skip", seed=1)
    for constant in (0, 2):
        graph = attribution_graph(model, parts, draw(1, 11, seed=2)[0], constant_positions=constant)
        assert graph.residuals().max() < 1e-5
        roots, logits = graph.roots(), graph.read[graph.n_latents :].double()
        assert (roots.total - logits).abs().max() < 1e-5 * logits.abs().max()
        assert (roots.dropped == 0).all()
        assert graph.kept.reason == "" and graph.kept.nodes == graph.kept.active == graph.n_latents


def test_logit_nodes_are_logits_less_their_mean(
    model: Model, draw: Callable[..., Tensor], random_dictionaries: Callable[..., DictionarySet]
) -> None:
    tokens = draw(1, 9)[0]
    graph = attribution_graph(model, random_dictionaries(model, "transcoder"), tokens)
    logits = model.logits(tokens[None])[0, -1]
    expected = (logits - logits.mean())[list(graph.logit_tokens)]
    assert torch.allclose(graph.read[graph.n_latents :], expected, atol=1e-4)
    p = logits.double().softmax(-1)
    assert torch.allclose(graph.logit_weights, p[list(graph.logit_tokens)], atol=1e-6)
    ordered = p.sort(descending=True).values.cumsum(0)
    n = len(graph.logits)
    assert n == 10 or (ordered[n - 1] >= 0.95 and (n == 1 or ordered[n - 2] < 0.95))
    assert len(salient_logits(model, torch.tensor([0.0, 30.0, 1.0]))) == 1


def test_layers_without_a_dictionary_are_error_nodes(
    model: Model, draw: Callable[..., Tensor], random_dictionaries: Callable[..., DictionarySet]
) -> None:
    tokens = draw(1, 8)[0]
    only = random_dictionaries(model, "transcoder").layers[1]
    graph = attribution_graph(model, only, tokens)
    assert (graph.latents[:, 0] == 1).all() and len(graph.latents)
    assert graph.residuals().max() < 1e-5
    first_errors = graph.weights[:, graph.n_latents : graph.n_latents + 8]
    assert first_errors.abs().max() > 0


def test_effects_behind_norms_after_attention_and_mlp(
    gemma: Model, draw: Callable[..., Tensor], random_dictionaries: Callable[..., DictionarySet]
) -> None:
    """Gemma 2, against pushing each source through the frozen forward, which the model itself is the check of."""
    tokens = draw(1, 8, seed=4)[0]
    nodes = sources_at(gemma, random_dictionaries(gemma, "transcoder", TopK(4)), tokens)
    graph = attribution_graph(gemma, random_dictionaries(gemma, "transcoder", TopK(4)), tokens)
    zero = [torch.zeros(8, gemma.shape.d_model) for _ in range(gemma.shape.n_layers)]
    for s in range(0, graph.n_latents, 3):
        layer, position, latent = graph.latents[s].tolist()
        d = nodes.part(layer).dictionary
        written = [z.clone() for z in zero]
        written[layer][position] = graph.activations[s] * d.W_dec[0][latent]
        run = nodes.frozen.run(torch.zeros_like(zero[0]), written.__getitem__, {}, biases=False)
        pushed = [at.value for at in run if at.where == "mlp"]
        for t in range(graph.n_latents):
            at, p, f = graph.latents[t].tolist()
            read = nodes.frozen.layers[at].mlp_norm.forward(pushed[at], biases=False)[p]
            expected = read @ nodes.part(at).dictionary.W_enc[0][:, f]
            assert abs(float(graph.weights[t, s] - expected)) < 1e-5 * float(graph.weights[t].abs().max() + 1)


def test_dictionaries_that_do_not_fit_are_refused(
    model: Model, draw: Callable[..., Tensor], random_dictionaries: Callable[..., DictionarySet]
) -> None:
    from dataclasses import replace

    tokens, good = draw(1, 5)[0], random_dictionaries(model, "transcoder").layers[0]
    two = DictionarySet((good, good))
    elsewhere = replace(good, reads=(Port("resid_pre@0"),))
    foreign = replace(good, reads=(Port("blocks.0.hook_in"),))
    backward = replace(good, reads=(Port("mlp_in@1"),))
    beyond = replace(good, writes=(Port("mlp_out@9"),))
    for parts, fault in (
        (two, "another dictionary reads layer 0"),
        (elsewhere, "needs dictionaries that read"),
        (foreign, "needs dictionaries that read"),
        (backward, "reads layer 1 and writes layers"),
        (beyond, "reads layer 0 and writes layers"),
        (replace(good, scaling="layer_norm"), "scaled before it is encoded"),
        (replace(good, activation=BatchTopK(k=3)), "depends on the other tokens"),
    ):
        with pytest.raises(DictionaryError, match=fault):
            sources_at(model, parts, tokens)
    with pytest.raises(ValueError, match="token ids of one prompt"):
        sources_at(model, good, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs a target"):
        attribution_graph(model, good, tokens, targets=[])
