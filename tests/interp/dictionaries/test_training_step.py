"""A step of training: its gradients against plain torch, dead latents, and what must hold of latents at every step."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planted_rows import Rows, concepts, recipe
from torch import Tensor

from heredity.interp.dictionaries import delta_norm
from heredity.interp.dictionaries.training import Recipe
from heredity.interp.dictionaries.training import loop as loop_module
from heredity.interp.dictionaries.training.step import BANDWIDTH, Settings, gradients
from heredity.interp.dictionaries.training.streams import Streams
from heredity.interp.dictionaries.training.weights import Layout, begin, confine, empty, settle


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


@pytest.mark.parametrize(
    ("latents", "k", "tokens", "window"),
    [
        (4096, 32, 393_216, 4096),  # 32 times 128, in which a latent of the mean rate is active once
        (16_384, 32, 49_152, 4915),  # a tenth of a short training
        (4096, 32, 100_000_000, 1_000_000),  # a hundredth of a long one
        (4096, 32, 2_000_000_000, 10_000_000),
        (4096, 32, 5_000, 1024),  # a batch
    ],
)
def test_when_a_latent_counts_as_dead(latents: int, k: int, tokens: int, window: int) -> None:
    asked = Recipe(kind="sae", latents=latents, k=k)
    assert asked.window(tokens) == asked.model_copy(update={"tokens": tokens}).window(7) == window
    assert asked.model_copy(update={"dead_after": 9}).window(tokens) == 9
