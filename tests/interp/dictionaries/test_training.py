"""Training: what is learned, in which units, the same from the same seed, and what is refused."""

import pytest
import torch
from planted_rows import Rows, concepts, recipe
from torch import Tensor

from heredity.interp.dictionaries import Dictionary, Port, delta_norm
from heredity.interp.dictionaries.training import figure, train
from heredity.interp.dictionaries.training import loop as loop_module
from heredity.interp.dictionaries.training.recipe import check
from heredity.interp.dictionaries.training.streams import Streams, ordinary
from heredity.interp.errors import TrainingError


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
