"""Training: what is learned, the gradients against plain torch, and what must hold of the latents at every step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.interp.dictionaries import Dictionary, Port, delta_norm
from heredity.interp.dictionaries.training import Recipe, figure, train
from heredity.interp.dictionaries.training import loop as loop_module
from heredity.interp.dictionaries.training.recipe import check
from heredity.interp.dictionaries.training.step import BANDWIDTH, Settings, gradients
from heredity.interp.dictionaries.training.streams import Streams, ordinary
from heredity.interp.dictionaries.training.weights import Layout, begin, confine, empty, settle
from heredity.interp.errors import TrainingError

CONCEPTS, TOKENS = 48, 8192


def concepts(*widths: int, scales: tuple[float, ...] = (), seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Activations of sparse concepts in models of these widths, and their directions, with a mean far from zero."""
    draws = torch.Generator().manual_seed(seed)
    present = torch.rand(TOKENS, CONCEPTS, generator=draws) < 0.06
    z = present * (0.5 + torch.rand(TOKENS, CONCEPTS, generator=draws))
    directions = [
        torch.nn.functional.normalize(torch.randn(CONCEPTS, width, generator=draws), dim=1) for width in widths
    ]
    offset = [3 * torch.randn(width, generator=draws) for width in widths]
    scales = scales or (1.0,) * len(widths)
    x = [scale * (z @ rows + mean) for rows, mean, scale in zip(directions, offset, scales, strict=True)]
    return x, directions


@dataclass
class Rows:
    """Rows in memory as a source, drawn at random."""

    x: list[Tensor]
    ports: tuple[Port, ...] = ()
    digest: str = "made up"
    drawn: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ports = self.ports or tuple(Port("resid_post@1", m) for m in range(len(self.x)))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(x.shape[1] for x in self.x)

    @property
    def n_tokens(self) -> int:
        return len(self.x[0])

    def batches(self, *, batch: int, seed: int, skip: int = 0) -> Iterator[tuple[Tensor, ...]]:
        number = skip
        while True:
            self.drawn.append(number)
            draws = torch.Generator().manual_seed(1000 * seed + number)
            rows = torch.randint(self.n_tokens, (batch,), generator=draws)
            yield tuple(x[rows] for x in self.x)
            number += 1


def recipe(kind: str = "sae", **changes: Any) -> Recipe:
    given = {"kind": kind, "latents": 64, "k": 3, "batch": 256, "tokens": 256 * 100, "rate": 0.02, "seed": 1}
    return Recipe(**{**given, **changes})


def explained(dictionary: Dictionary, read: list[Tensor], written: list[Tensor]) -> list[float]:
    made = dictionary.reconstruct(*read)
    return [
        1 - float((y - each).square().sum() / (y - y.mean(0)).square().sum())
        for each, y in zip(made, written, strict=True)
    ]


def found(rows: Tensor, directions: Tensor) -> float:
    """Mean over concepts of the largest cosine with a decoder row."""
    return float((torch.nn.functional.normalize(rows, dim=1) @ directions.T).amax(0).mean())


class TestWhatIsLearned:
    @pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu"])
    def test_planted_concepts_are_found_and_k_holds_at_inference(self, activation: str) -> None:
        (x,), (directions,) = concepts(32)
        trained = train(recipe(activation=activation), Rows([x]))
        dictionary = trained.dictionary
        assert found(dictionary.W_dec[0], directions) > 0.95
        assert explained(dictionary, [x], [x])[0] > 0.8
        active = dictionary.encode(x).mean_active
        assert active <= 3 if activation == "topk" else 2.4 < active < 3.6
        last = trained.history[-1]
        assert last.fve[0] == pytest.approx(explained(dictionary, [x], [x])[0], abs=0.05)
        assert last.step == 100 and last.tokens == 256 * 100 and last.k == 3

    def test_a_crosscoder_of_models_of_other_widths_and_sizes(self) -> None:
        x, directions = concepts(48, 72, scales=(1.0, 40.0))
        trained = train(recipe("crosscoder"), Rows(x))
        dictionary = trained.dictionary
        assert dictionary.widths == (48, 72)
        assert min(explained(dictionary, x, x)) > 0.85
        assert all(found(rows, true) > 0.95 for rows, true in zip(dictionary.W_dec, directions, strict=True))
        # Sizes are noted, so that norms compare: what both models have is shared.
        active = torch.bincount(dictionary.encode(*x).indices.long(), minlength=64) > 100
        assert bool(((delta_norm(dictionary)[active] - 0.5).abs() < 0.15).all())

    def test_a_crosscoder_of_three_models(self) -> None:
        x, directions = concepts(24, 24, 32)
        dictionary = train(recipe("crosscoder", dedicated=0.05), Rows(x)).dictionary
        assert [port.model for port in dictionary.reads] == [0, 1, 2]
        assert found(dictionary.W_dec[2], directions[2]) > 0.85

    @pytest.mark.parametrize("skip", [False, True])
    def test_a_transcoder(self, skip: bool) -> None:
        x, _ = concepts(32, 32)
        draws = torch.Generator().manual_seed(5)
        linear = torch.randn(32, 32, generator=draws) / 6
        written = x[1] + (x[0] @ linear if skip else 0)
        ports = (Port("mlp_in@1"), Port("mlp_out@1"))
        dictionary = train(recipe("transcoder", skip=skip), Rows([x[0], written], ports)).dictionary
        assert (dictionary.reads, dictionary.writes) == (ports[:1], ports[1:])
        assert (dictionary.W_skip is not None) == skip
        assert explained(dictionary, [x[0]], [written])[0] > 0.75

    def test_a_difference(self) -> None:
        (parent, extra), directions = concepts(32, 32)
        kept = train(recipe("difference"), Rows([parent, parent + extra])).dictionary
        assert kept.kind == "sae" and found(kept.W_dec[0], directions[1]) > 0.95

    def test_a_model_against_itself_has_no_difference(self) -> None:
        (x,), _ = concepts(32)
        trained = train(recipe("difference", tokens=256 * 5), Rows([x, x]))
        assert trained.history[-1].fve == (None,)
        assert trained.dictionary.encode(x - x).nnz == 0


class TestUnits:
    def test_the_dictionary_acts_on_activations_as_they_are(self) -> None:
        """In training's units the same arrays give the same latents, and scaled the same reconstruction."""
        x, _ = concepts(16, 24, scales=(1.0, 50.0))
        source, few = Rows([each.double() for each in x]), recipe("crosscoder", tokens=256 * 30)
        run = loop_module._Run(few, source, torch.empty(0, dtype=torch.float64))
        state, batches, _ = run.start(None)
        for _ in range(20):
            run.advance(state, next(batches))
        dictionary = run.dictionary(state)
        taken = next(batches)
        inside = state.units.apply(Streams(torch.cat(taken, 1), torch.cat(taken, 1)))
        weights = state.weights
        pre = (inside.x @ weights.W_enc.T + weights.b_enc).detach().relu()
        kept = pre * (pre * run.layout.score_per_activation(weights.W_dec.detach()) > run.threshold(state))
        torch.testing.assert_close(dictionary.encode(*taken).to_dense(), kept)
        made = (kept @ weights.W_dec + weights.b_dec).detach().split([16, 24], 1)
        for m, each in enumerate(dictionary.reconstruct(*taken)):
            scale = dictionary.provenance["rms"][m]
            torch.testing.assert_close(each, made[m] * scale + state.units.x_mean.split([16, 24])[m])
            spread = (x[m] - x[m].mean(0)).square().mean().sqrt()
            assert scale == pytest.approx(float(spread), rel=0.05)

    def test_scaling_a_model_changes_nothing_but_the_scale(self) -> None:
        (x,), _ = concepts(32)
        plain, large = (train(recipe(tokens=256 * 20), Rows([x * size])).dictionary for size in (1.0, 1024.0))
        assert torch.equal(plain.W_dec[0] * 1024, large.W_dec[0])
        assert torch.equal(plain.encode(x[:500]).indices, large.encode(x[:500] * 1024).indices)


class TestMassiveTokens:
    def test_they_have_no_influence(self) -> None:
        (x,), _ = concepts(32)
        massive = torch.arange(len(x)) % 50 == 0
        trained = [
            train(recipe(tokens=256 * 20), Rows([torch.where(massive[:, None], x * size, x)])) for size in (1e3, 5e5)
        ]
        assert trained[0].history[-1].massive > 0
        assert torch.equal(trained[0].dictionary.W_dec[0], trained[1].dictionary.W_dec[0])
        assert torch.equal(trained[0].dictionary.W_enc[0], trained[1].dictionary.W_enc[0])

    def test_in_any_place_and_only_there(self) -> None:
        x = torch.ones(9, 4)
        x[2], x[5] = 3.5, 2.5
        assert ordinary([x, torch.ones(9, 2)], 3.0).tolist() == [i != 2 for i in range(9)]
        assert ordinary([torch.ones(9, 2), x], 2.0).tolist() == [i not in (2, 5) for i in range(9)]


# --- one step against plain torch ---


def dense_loss(
    weights: dict[str, Tensor], widths: list[int], batch: Streams, dead: Tensor, settings: Settings
) -> Tensor:
    """The loss by its definition, with the [tokens, latents] matrix."""
    norm = sum(part.norm(dim=1) for part in weights["W_dec"].detach().split(widths, 1))
    pre = batch.x @ weights["W_enc"].T + weights["b_enc"]
    scores = pre.detach() * norm
    n, k = len(batch.x), settings.k
    penalty = torch.zeros((), dtype=pre.dtype)
    if settings.activation == "topk":
        cut = scores.topk(k, dim=1).values[:, -1:]
        acts = pre * ((scores >= cut) & (scores > 0))
    elif settings.activation == "batchtopk":
        cut = scores.flatten().topk(k * n).values[-1]
        acts = pre * ((scores >= cut) & (scores > 0))
    else:
        gate = Step.apply(pre, weights["log_threshold"].exp())
        acts = pre * gate
        penalty = len(widths) * (gate.sum(1).mean() / k - 1).square()
    made = acts @ weights["W_dec"] + weights["b_dec"]
    if "W_skip" in weights:
        made = made + batch.x @ weights["W_skip"]
    error = batch.y - made
    loss = sum(part.square().mean() for part in error.split(widths, 1)) + penalty
    if len(dead) and settings.aux:
        fixed = error.detach()
        chosen = scores[:, dead].topk(min(settings.aux_k, len(dead)), dim=1)
        some = torch.zeros_like(pre[:, dead]).scatter(1, chosen.indices, (chosen.values > 0).to(pre.dtype))
        revived = (pre[:, dead] * some) @ weights["W_dec"][dead]
        loss = loss + settings.aux * (fixed - revived).square().mean() / fixed.square().mean()
    return loss


class Step(torch.autograd.Function):
    """H(pre − θ) with the pseudo-derivative of the paper with respect to θ; none with respect to pre."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2).to(pre.dtype)
        # Of pre·H it is −θ/ε near the threshold, of H −1/ε; here pre is as good as θ.
        return None, (-near / BANDWIDTH * grad * threshold / pre.where(near > 0, 1.0)).sum(0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("kind", "activation", "widths"),
    [
        ("sae", "topk", [24]),
        ("sae", "batchtopk", [24]),
        ("crosscoder", "batchtopk", [16, 24]),
        ("transcoder", "batchtopk", [24]),
    ],
)
def test_gradients_are_those_of_the_definition(kind: str, activation: str, widths: list[int], seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    asked = recipe(kind, latents=40, activation=activation, skip=kind == "transcoder")
    width, layout = sum(widths), Layout.of(asked, widths)
    batch = noise(32, width)
    streams = Streams(batch, noise(32, width) if kind == "transcoder" else batch)
    weights = empty(asked, width, width, torch.empty(0, dtype=torch.float64))
    begin(asked, layout, weights, streams, streams, 4)
    for value in weights.named().values():
        value.data += 0.1 * noise(*value.shape)
    plain = {name: value.detach().clone().requires_grad_() for name, value in weights.named().items()}
    dead, settings = torch.tensor([3, 7, 20, 21, 33]), Settings(activation, 4, 1 / 32, 3)
    outcome = gradients(weights, layout, streams, dead, settings)
    dense_loss(plain, widths, streams, dead, settings).backward()
    for name, value in weights.named().items():
        torch.testing.assert_close(value.grad, plain[name].grad, msg=lambda m, name=name: f"{name}: {m}")
    assert outcome.aux is not None and 0 < outcome.aux < 2


def test_thresholds_learn_as_the_paper_says() -> None:
    draws = torch.Generator().manual_seed(3)
    asked = recipe(latents=40, activation="jumprelu")
    layout = Layout.of(asked, [24])
    x = torch.randn(64, 24, generator=draws, dtype=torch.float64)
    weights = empty(asked, 24, 24, torch.empty(0, dtype=torch.float64))
    begin(asked, layout, weights, Streams(x, x), Streams(x, x), 4)
    assert weights.log_threshold is not None
    weights.log_threshold.data += torch.rand(40, generator=draws, dtype=torch.float64).log()
    settings = Settings("jumprelu", 4, 0.0, 3)
    gradients(weights, layout, Streams(x, x), torch.tensor([], dtype=torch.int64), settings)
    # By hand: d loss/dθ_j = Σ_t (−near/ε) (θ_j · dL/da + dP/dL0 / T), and dθ/d log θ = θ.
    theta = weights.log_threshold.detach().exp()
    pre = (x @ weights.W_enc.T + weights.b_enc).detach()
    on = (pre > theta).double()
    error = x - (pre * on) @ weights.W_dec.detach() - weights.b_dec.detach()
    of_activation = (-2 * error / error.numel()) @ weights.W_dec.detach().T
    of_count = 2 * (on.sum(1).mean() / 4 - 1) / 4 / len(x)
    near = ((pre - theta).abs() < BANDWIDTH / 2).double()
    expected = (-near / BANDWIDTH * (theta * of_activation + of_count)).sum(0) * theta
    torch.testing.assert_close(weights.log_threshold.grad, expected)


# --- dead latents ---


def test_dead_latents_are_revived_and_the_loss_really_contains_it() -> None:
    (x,), _ = concepts(32)
    alive = {}
    for aux in (0.0, 1 / 32):
        run = loop_module._Run(recipe(aux=aux, dead_after=512), Rows([x]), torch.empty(0))
        state, batches, _ = run.start(None)
        with torch.no_grad():
            # Half of the latents start too weak to be selected, reading nothing in particular.
            state.weights.W_dec[:32] *= 1e-3
            state.weights.W_enc[:32] *= 1e-2
        for _ in range(60):
            run.advance(state, next(batches))
        alive[aux] = int((state.quiet[:32] < 2048).sum())
    assert alive[0.0] < 8 and alive[1 / 32] > 16, alive


# --- partitions ---


def stepped(asked: Recipe, x: list[Tensor], steps: int) -> Iterator[tuple[Any, Any]]:
    run = loop_module._Run(asked, Rows(x), torch.empty(0))
    state, batches, _ = run.start(None)
    yield run, state
    for _ in range(steps):
        run.advance(state, next(batches))
        yield run, state


def test_dedicated_latents_never_touch_the_other_model() -> None:
    x, _ = concepts(24, 32)
    # Dead after a batch: the loss of dead latents, which knows nothing of models, is at work from the second step on.
    asked = recipe("crosscoder", dedicated=0.125, dead_after=256, aux=1.0)
    revived = 0
    for run, state in stepped(asked, x, 40):
        assert run.layout.forbidden == (
            (slice(48, 56), slice(24, 56)),
            (slice(56, 64), slice(0, 24)),
        )
        moments = [state.adam.state.get(w, {}) for w in (state.weights.W_enc, state.weights.W_dec)]
        tensors = [state.weights.W_enc.detach(), state.weights.W_dec.detach()]
        tensors += [each[name] for each in moments for name in ("exp_avg", "exp_avg_sq") if each]
        for block in run.layout.forbidden:
            assert all(float(tensor[block].abs().max()) == 0 for tensor in tensors)
        revived += int((state.quiet[48:] >= 256).sum())
    assert revived, "the test did not reach the loss of dead latents"
    dictionary = run.dictionary(state)
    delta = delta_norm(dictionary)
    assert delta[48:56].tolist() == [0.0] * 8 and delta[56:].tolist() == [1.0] * 8
    assert bool(((delta[:48] > 0) & (delta[:48] < 1)).all())
    assert not dictionary.W_enc[1][:, 48:56].any() and not dictionary.W_enc[0][:, 56:].any()


def test_a_leak_is_noticed() -> None:
    asked = recipe("crosscoder", dedicated=0.125)
    layout = Layout.of(asked, [8, 8])
    weights = empty(asked, 16, 16, torch.empty(0))
    weights.W_dec.data[50, 12] = 1e-9
    with pytest.raises(AssertionError, match="leaked into another model"):
        settle(layout, [weights.W_dec], weights.W_dec)


def test_shared_latents_are_one_row_in_each_models_units() -> None:
    x, _ = concepts(32, 32, scales=(1.0, 7.0))
    for run, state in stepped(recipe("crosscoder", shared=0.5), x, 40):
        rows = state.weights.W_dec.detach()
        assert torch.equal(rows[:32, :32], rows[:32, 32:]) and not torch.equal(rows[32:, :32], rows[32:, 32:])
        dictionary = run.dictionary(state)
    dictionary = run.dictionary(state)
    torch.testing.assert_close(delta_norm(dictionary)[:32], torch.full((32,), 0.5, dtype=torch.float64))
    units = dictionary.provenance["rms"]
    torch.testing.assert_close(dictionary.W_dec[0][:32] / units[0], dictionary.W_dec[1][:32] / units[1])


def test_a_shared_row_moves_by_what_all_models_ask_of_it() -> None:
    asked = recipe("crosscoder", shared=0.5)
    layout = Layout.of(asked, [8, 8])
    weights = empty(asked, 16, 16, torch.empty(0))
    draws = torch.Generator().manual_seed(0)
    weights.W_enc.grad = torch.zeros_like(weights.W_enc)
    weights.W_dec.grad = grad = torch.randn(64, 16, generator=draws)
    before = grad.clone()
    confine(layout, weights)
    torch.testing.assert_close(grad[:32, :8], before[:32, :8] + before[:32, 8:])
    assert torch.equal(grad[:32, 8:], grad[:32, :8]) and torch.equal(grad[32:], before[32:])


def test_a_shared_latent_is_cheaper_to_select() -> None:
    layout = Layout.of(recipe("crosscoder", shared=0.5, shared_penalty=0.5), [8, 8])
    scores = layout.score_per_activation(torch.ones(64, 16))
    assert scores[0] == pytest.approx(2 * scores[63])


# --- the same again ---


def same(a: Dictionary, b: Dictionary) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*a.W_enc, *a.W_dec), (*b.W_enc, *b.W_dec), strict=True))


def test_a_seed_fixes_everything() -> None:
    (x,), _ = concepts(32)
    few = recipe(tokens=256 * 12)
    once, again, other = (train(r, Rows([x])).dictionary for r in (few, few, few.model_copy(update={"seed": 2})))
    assert same(once, again) and once.activation == again.activation
    assert not same(once, other)


def test_the_figure_shows_what_the_history_says() -> None:
    x, _ = concepts(24, 32)
    shares = iter([0.25, 0.5, 0.75, 1.0])
    trained = train(recipe("crosscoder", tokens=256 * 40), Rows(x), probe=lambda dictionary: next(shares))
    drawn = {trace.name: trace for trace in figure(trained.history).data}
    assert list(drawn["active per token"].y) == [row.l0 for row in trained.history]
    assert list(drawn["variance explained, model 1"].y) == [row.fve[1] for row in trained.history]
    assert list(drawn["loss recovered"].y) == [0.25, 0.5, 0.75, 1.0]
    assert list(drawn["loss recovered"].x) == [256 * n for n in (10, 20, 30, 40)]
    with pytest.raises(ValueError, match="no rows"):
        figure([])


# --- refusals ---


@pytest.mark.parametrize(
    ("kind", "changes", "widths", "fault"),
    [
        ("sae", {"k": 65}, (8,), "k: 65 active of 64 latents"),
        ("sae", {}, (8, 8), "source: a sae is not trained on 2 place"),
        ("crosscoder", {}, (8,), "source: a crosscoder is not trained on 1 place"),
        ("transcoder", {}, (8, 12), "source: a transcoder needs places of one width, not 8 and 12"),
        ("difference", {}, (8, 12), "source: a difference needs places of one width"),
        ("sae", {"skip": True}, (8,), "skip: a sae has no skip path"),
        ("sae", {"dedicated": 0.1}, (8,), "shared, dedicated: a sae is of one model"),
        ("crosscoder", {"shared": 0.9, "dedicated": 0.1}, (8, 8), "58 shared and 2 times 6 dedicated latents are more"),
        ("crosscoder", {"shared": 0.5}, (8, 12), "shared: one decoder row cannot serve widths 8, 12"),
        ("sae", {"tokens": 255}, (8,), "tokens: 255 do not fill one batch of 256"),
    ],
)
def test_settings_that_cannot_be_trained(kind: str, changes: dict, widths: tuple[int, ...], fault: str) -> None:
    with pytest.raises(TrainingError, match=fault) as caught:
        check(recipe(kind, **changes), widths, 10_000)
    assert "docs/errors/training.md" in str(caught.value)


@pytest.mark.parametrize("changes", [{"k": 0}, {"rate": float("nan")}, {"shared": 1.5}, {"kind": "clt"}, {"typo": 1}])
def test_values_out_of_range(changes: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        recipe(**changes)
