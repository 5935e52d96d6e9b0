"""Decoder norms, latent scaling and verdicts, on crosscoders made by hand for activations whose concepts are known."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from heredity.interp.dictionaries import Dictionary, Port
from heredity.interp.dictionaries.exclusive import (
    delta_norm,
    exclusives,
    latent_scaling,
    moments,
    relative_norm,
    same_basis,
)
from heredity.interp.dictionaries.exclusive.scaling import WAYS
from heredity.kernels import JumpReLU, TopK

PORTS = (Port("resid_post@1", 0), Port("resid_post@1", 1))
WIDTH, CONCEPTS = 64, 48


@dataclass(frozen=True)
class Latent:
    """A latent that reads concept ``reads`` from a model and writes rows that are sums of concepts' directions."""

    reads: int
    source: int
    parent: dict[int, float]
    successor: dict[int, float]


@dataclass
class World:
    """Orthogonal concepts, how large each is in the two models, and a rotation between them."""

    sizes: Tensor
    seed: int = 0
    tokens: int = 4000
    scale: float = 1.0
    width: int = WIDTH
    noise: float = 0.01

    def __post_init__(self) -> None:
        self.draws = torch.Generator().manual_seed(self.seed)
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=self.draws, dtype=torch.float64)).Q
        self.parent = basis[:CONCEPTS]
        self.successor = self.parent
        if self.width != WIDTH:
            other = torch.randn(self.width, self.width, generator=self.draws, dtype=torch.float64)
            self.successor = torch.linalg.qr(other).Q[:CONCEPTS]
        shape = (self.tokens, CONCEPTS)
        present = torch.rand(shape, generator=self.draws) < 0.08
        self.z = present * (0.5 + torch.rand(shape, generator=self.draws, dtype=torch.float64))

    def activations(self) -> tuple[Tensor, Tensor]:
        x = [(self.z * size) @ rows for size, rows in zip(self.sizes, (self.parent, self.successor), strict=True)]
        x = [each + self.noise * torch.randn(each.shape, generator=self.draws, dtype=torch.float64) for each in x]
        return x[0].float(), (self.scale * x[1]).float()

    def dictionary(self, latents: list[Latent]) -> Dictionary:
        n = len(latents)
        rows = (self.parent, self.successor)
        encoder = [torch.zeros(r.shape[1], n, dtype=torch.float64) for r in rows]
        decoder = [torch.zeros(n, r.shape[1], dtype=torch.float64) for r in rows]
        for j, latent in enumerate(latents):
            m = latent.source
            encoder[m][:, j] = rows[m][latent.reads] / (self.sizes[m, latent.reads] * (self.scale if m else 1))
            for side, (write, factor) in enumerate(((latent.parent, 1.0), (latent.successor, self.scale))):
                decoder[side][j] = sum((factor * v * rows[side][i] for i, v in write.items()), decoder[side][j])
        return Dictionary(
            kind="crosscoder",
            reads=PORTS,
            writes=PORTS,
            W_enc=(encoder[0].float(), encoder[1].float()),
            b_enc=torch.zeros(n),
            W_dec=(decoder[0].float(), decoder[1].float()),
            b_dec=(torch.zeros(rows[0].shape[1]), torch.zeros(rows[1].shape[1])),
            activation=JumpReLU(0.3),
        )


PARENT_ONLY, SUCCESSOR_ONLY, WEAK, WEAKEST, APART, SPREAD = 0, 1, 2, 3, 4, 5
"""Concepts of :func:`planted`; all others are shared."""


def planted(**changes) -> tuple[World, list[Latent]]:
    """Every kind of latent; number j reads concept j, but for the extra ones at the end.

    WEAK and WEAKEST are 0.3 and 0.06 of the successor's size in the parent, and the dictionary's rows are zero there.
    APART is shared, but a parent-only and a successor-only latent (the last) write it. SPREAD is the successor's latent
    that writes half SPREAD, half SPREAD + 1, which the parent writes through two latents of its own.
    """
    sizes = torch.ones(2, CONCEPTS, dtype=torch.float64)
    sizes[1, PARENT_ONLY] = sizes[0, SUCCESSOR_ONLY] = 0
    sizes[0, WEAK], sizes[0, WEAKEST] = 0.3, 0.06
    world = World(sizes, **changes)
    world.z[:, SPREAD + 1] = world.z[:, SPREAD]
    latents = [Latent(i, 0, {i: 1.0}, {i: 1.0}) for i in range(CONCEPTS)]
    latents[PARENT_ONLY] = Latent(PARENT_ONLY, 0, {PARENT_ONLY: 1.0}, {})
    latents[SUCCESSOR_ONLY] = Latent(SUCCESSOR_ONLY, 1, {}, {SUCCESSOR_ONLY: 1.0})
    for i in (WEAK, WEAKEST):
        latents[i] = Latent(i, 1, {}, {i: 1.0})
    latents[APART] = Latent(APART, 0, {APART: 1.0}, {})
    latents[SPREAD] = Latent(SPREAD, 0, {SPREAD: 1.0}, {})
    latents[SPREAD + 1] = Latent(SPREAD + 1, 0, {SPREAD + 1: 1.0}, {})
    latents += [Latent(APART, 1, {}, {APART: 1.0}), Latent(SPREAD, 1, {}, {SPREAD: 1.0, SPREAD + 1: 1.0})]
    return world, latents


def in_batches(arrays: tuple[Tensor, Tensor], size: int = 700) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(arrays[0]), size):
        yield arrays[0][start : start + size], arrays[1][start : start + size]


def swapped(dictionary: Dictionary) -> Dictionary:
    return replace(dictionary, W_enc=dictionary.W_enc[::-1], W_dec=dictionary.W_dec[::-1], b_dec=dictionary.b_dec[::-1])


def reordered(dictionary: Dictionary, order: Tensor) -> Dictionary:
    return replace(
        dictionary,
        W_enc=tuple(w[:, order] for w in dictionary.W_enc),
        b_enc=dictionary.b_enc[order],
        W_dec=tuple(w[order] for w in dictionary.W_dec),
    )


def random_crosscoder(widths: tuple[int, int], n: int, seed: int) -> Dictionary:
    draws = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64)

    return Dictionary(
        kind="crosscoder",
        reads=PORTS,
        writes=PORTS,
        W_enc=(random(widths[0], n), random(widths[1], n)),
        b_enc=random(n),
        W_dec=(random(n, widths[0]), random(n, widths[1])),
        b_dec=(random(widths[0]), random(widths[1])),
        activation=TopK(5),
    )


class TestNorms:
    def test_the_successors_own_latent_is_at_1_and_the_parents_at_0(self) -> None:
        world, latents = planted()
        dictionary = world.dictionary(latents)
        for measure in (delta_norm, relative_norm):
            found = measure(dictionary)
            assert found[SUCCESSOR_ONLY] == 1
            assert found[PARENT_ONLY] == 0
            assert torch.allclose(found[10:CONCEPTS], torch.tensor(0.5, dtype=found.dtype))

    def test_formulas(self) -> None:
        dictionary = random_crosscoder((7, 9), 20, seed=1)
        parent, successor = (w.norm(dim=1) for w in dictionary.W_dec)
        expected = [0.5 * ((s - p) / max(s, p) + 1) for p, s in zip(parent.tolist(), successor.tolist(), strict=True)]
        assert delta_norm(dictionary).tolist() == pytest.approx(expected)
        assert relative_norm(dictionary).tolist() == pytest.approx((successor / (parent + successor)).tolist())

    def test_models_of_other_sizes_compare_in_their_own_units(self) -> None:
        world, latents = planted(scale=5.0)
        dictionary = world.dictionary(latents)
        assert delta_norm(dictionary)[20] == pytest.approx(0.9)
        in_units = delta_norm(dictionary, scales=moments(dictionary, [world.activations()]).scales)
        assert in_units[20] == pytest.approx(0.5, abs=0.02)

    def test_the_units_of_training_are_read_from_the_provenance(self) -> None:
        dictionary = replace(random_crosscoder((4, 16), 20, seed=2), provenance={"rms": [3.0, 0.5]})
        assert torch.equal(delta_norm(dictionary), delta_norm(dictionary, scales=[6.0, 2.0]))

    def test_a_latent_that_writes_nothing_is_not_given_a_number(self) -> None:
        dictionary = random_crosscoder((4, 4), 3, seed=3)
        for decoder in dictionary.W_dec:
            decoder[1] = 0
        assert delta_norm(dictionary).isnan().tolist() == [False, True, False]

    def test_one_model_alone_has_no_exclusive_latents(self) -> None:
        d = random_crosscoder((4, 4), 3, seed=3)
        alone = Dictionary("sae", PORTS[:1], PORTS[:1], d.W_enc[:1], d.b_enc, d.W_dec[:1], d.b_dec[:1], TopK(2))
        with pytest.raises(ValueError, match="parent and a successor"):
            delta_norm(alone)
        with pytest.raises(ValueError, match="scales"):
            delta_norm(d, scales=[1.0, 0.0])


class TestScaling:
    @pytest.mark.parametrize("sizes", [(63, 1000), (5, 17), (257, 64)])
    def test_equals_least_squares_latent_by_latent(self, sizes: tuple[int, int]) -> None:
        tokens, n = sizes
        dictionary = random_crosscoder((12, 12), n, seed=tokens)
        # Alike enough to count as one basis.
        dictionary.W_dec[1].mul_(0.1).add_(dictionary.W_dec[0] * (0.1 + torch.rand(n, 1, dtype=torch.float64)))
        x = (torch.randn(tokens, 12, dtype=torch.float64), torch.randn(tokens, 12, dtype=torch.float64))
        found = latent_scaling(dictionary, in_batches(x, 19))
        features = dictionary.encode(*x).to_dense()
        out = dictionary.reconstruct(*x)
        scales = [float((each - each.mean(0)).square().sum(1).mean().sqrt()) for each in x]
        norms = [w.norm(dim=1) / s for w, s in zip(dictionary.W_dec, scales, strict=True)]
        for j in (features.sum(0) > 0).nonzero()[:, 0].tolist():
            owner = int(norms[1][j] >= norms[0][j])
            betas = {}
            for m in range(2):
                # Of the owner's length in the model's units; along its own row unless that is negligible.
                own = norms[m][j] >= 0.25 * norms[owner][j]
                row = dictionary.W_dec[m if own else owner][j]
                unit_direction = row / row.norm() * norms[owner][j] * scales[m]
                assert WAYS[found.way[j]] == ("own" if min(n[j] for n in norms) >= 0.25 * norms[owner][j] else "same")
                design = torch.outer(features[:, j], unit_direction).reshape(-1, 1)
                latent = torch.outer(features[:, j], dictionary.W_dec[m][j])
                error = x[m] - (out[m] - latent)
                betas["error", m] = float(torch.linalg.lstsq(design, error.reshape(-1, 1)).solution)
                # The reconstruction's fit has an intercept in every coordinate.
                design = torch.cat([design, torch.eye(12, dtype=torch.float64).repeat(tokens, 1)], 1)
                for name, y in (("reconstruction", out[m]), ("activation", x[m])):
                    betas[name, m] = float(torch.linalg.lstsq(design, y.reshape(-1, 1)).solution[0])
            assert found.owner[j] == owner
            for name in ("error", "reconstruction", "activation"):
                got = getattr(found, f"nu_{name}")
                assert float(got[j]) == pytest.approx(betas[name, 1 - owner] / betas[name, owner], rel=1e-8)
        assert torch.equal(found.nu_error.isnan(), features.sum(0) == 0)

    def test_batches_do_not_matter(self) -> None:
        dictionary = random_crosscoder((10, 14), 40, seed=4)
        x = (torch.randn(333, 10, dtype=torch.float64), torch.randn(333, 14, dtype=torch.float64))
        whole, parts = latent_scaling(dictionary, [x]), latent_scaling(dictionary, in_batches(x, 50))
        assert torch.allclose(whole.nu_error, parts.nu_error, equal_nan=True)
        assert torch.allclose(whole.nu_reconstruction, parts.nu_reconstruction, equal_nan=True)

    @pytest.mark.parametrize("width", [WIDTH, 80])
    def test_signs(self, width: int) -> None:
        world, latents = planted(width=width)
        found = latent_scaling(world.dictionary(latents), in_batches(world.activations()))
        assert found.owner[[PARENT_ONLY, SUCCESSOR_ONLY]].tolist() == [0, 1]
        for j in (PARENT_ONLY, SUCCESSOR_ONLY):
            assert abs(float(found.nu_error[j])) < 0.05
            assert abs(float(found.nu_reconstruction[j])) < 0.2
        assert torch.allclose(found.nu_error[10:CONCEPTS], torch.ones(38, dtype=torch.float64), atol=0.05)
        assert float(found.nu_error[WEAK]) == pytest.approx(0.3, abs=0.05)

    def test_directions_between_unequal_widths(self) -> None:
        world, latents = planted(width=80)
        dictionary = world.dictionary(latents)
        found = latent_scaling(dictionary, [world.activations()])
        assert WAYS[found.way[10]] == "own"
        assert WAYS[found.way[WEAK]] == "response", "where the dictionary says zero"
        assert float(found.direction[0][WEAK] @ world.parent[WEAK]) > 0.95
        assert float(found.carried[WEAK]) == pytest.approx(0.3, abs=0.05)
        assert float(found.trace[WEAK]) == pytest.approx(0.3, abs=0.05)
        assert float(found.trace[SUCCESSOR_ONLY]) < 0.04
        assert not same_basis(dictionary)

    def test_directions_in_one_basis(self) -> None:
        world, latents = planted()
        dictionary = world.dictionary(latents)
        found = latent_scaling(dictionary, [world.activations()])
        assert same_basis(dictionary)
        assert WAYS[found.way[WEAK]] == "same"
        assert torch.allclose(found.direction[0][WEAK], world.parent[WEAK], atol=1e-6)

    def test_no_tokens(self) -> None:
        with pytest.raises(ValueError, match="no tokens"):
            latent_scaling(random_crosscoder((4, 4), 3, seed=0), [])


class TestVerdicts:
    @pytest.mark.parametrize("changes", [{}, {"width": 80}, {"scale": 7.0, "seed": 3}], ids=str)
    def test_planted(self, changes: dict) -> None:
        world, latents = planted(**changes)
        found = exclusives(world.dictionary(latents), in_batches(world.activations()))
        assert [each.latent for each in found.of("parent-only")] == [PARENT_ONLY]
        assert [each.latent for each in found.of("successor-only")] == [SUCCESSOR_ONLY]
        assert found.of("undecided") == ()
        assert [each.latent for each in found.ranked[:2]] in ([0, 1], [1, 0])

    def test_shrinkage_is_cleared_by_the_error(self) -> None:
        world, latents = planted()
        found = exclusives(world.dictionary(latents), in_batches(world.activations())).latents
        assert found[WEAK].delta_norm == found[WEAKEST].delta_norm == 1
        assert found[WEAK].reason == "the parent's error holds it"
        assert found[WEAKEST].reason == "the parent holds it weakly"
        assert found[WEAKEST].nu_error == pytest.approx(0.06, abs=0.02)

    def test_shrinkage_that_tied_rows_hide_from_the_error_is_cleared_by_the_activations(self) -> None:
        """Two tied latents write 0.15 of two concepts in both models, mixed with others that cancel.

        The parent has 0.15 of the one, so that its error is empty; of the other it has nothing, and its error takes
        back what they write.
        """
        world, _ = planted()
        world.sizes[0, WEAK] = 0.15
        hidden = {WEAK: (30, 31), SUCCESSOR_ONLY: (32, 33)}
        latents = [Latent(i, 0, {i: 1.0}, {i: 1.0}) for i in range(2, CONCEPTS)]
        latents += [Latent(j, 1, {}, {j: 0.85}) for j in hidden]
        for j, (one, other) in hidden.items():
            rows = ({j: 0.075, one: 0.5, other: 0.5}, {j: 0.075, one: -0.5, other: -0.5})
            latents += [Latent(j, 1, row, row) for row in rows]
        latents[WEAK - 2] = Latent(40, 0, {40: 0.0}, {40: 0.0})
        dictionary = world.dictionary(latents)
        weak, new = CONCEPTS - 2, CONCEPTS - 1
        x = world.activations()
        blind = exclusives(dictionary, in_batches(x)).latents
        draws = torch.Generator().manual_seed(1)
        little = [w + 1e-4 * torch.randn(w.shape, generator=draws) for w in dictionary.W_enc]
        found = exclusives(replace(dictionary, W_enc=tuple(little)), in_batches(x)).latents
        assert [found[j].nu_reconstruction for j in (weak, new)] == pytest.approx([0.176] * 2, abs=0.03)
        assert [found[j].nu_error for j in (weak, new)] == pytest.approx([0, -0.176], abs=0.03)
        assert [found[j].nu_activation for j in (weak, new)] == pytest.approx([0.15, 0], abs=0.03)
        assert (found[weak].verdict, found[weak].reason) == ("shared", "the parent's activations rise with it")
        assert found[new].verdict == "successor-only"
        # Not asked of latents that read one model only.
        assert blind[weak].verdict == blind[new].verdict == "successor-only"

    def test_decoupled_twins_are_merged(self) -> None:
        world, latents = planted()
        found = exclusives(world.dictionary(latents), in_batches(world.activations())).latents
        assert (found[APART].delta_norm, found[CONCEPTS].delta_norm) == (0, 1)
        assert (found[APART].nearest, found[CONCEPTS].nearest) == (CONCEPTS, APART)
        assert found[APART].verdict == found[CONCEPTS].verdict == "shared"

    def test_what_the_other_model_writes_through_several_latents_is_shared(self) -> None:
        world, latents = planted()
        found = exclusives(world.dictionary(latents), in_batches(world.activations())).latents[CONCEPTS + 1]
        assert found.cosine is not None
        assert found.cosine < 0.75
        assert found.nu_reconstruction == pytest.approx(1, abs=0.1)
        assert (found.verdict, found.reason) == ("shared", "the parent writes it through other latents")

    @pytest.mark.parametrize("width", [WIDTH, 80])
    def test_exchanging_the_models_exchanges_the_classes(self, width: int) -> None:
        world, latents = planted(width=width)
        dictionary, (a, b) = world.dictionary(latents), world.activations()
        one, other = exclusives(dictionary, [(a, b)]), exclusives(swapped(dictionary), [(b, a)])
        names = {"parent-only": "successor-only", "successor-only": "parent-only"}
        assert [names.get(v.verdict, v.verdict) for v in one.latents] == [v.verdict for v in other.latents]
        assert [1 - v.delta_norm for v in one.latents] == pytest.approx([v.delta_norm for v in other.latents])

    def test_the_order_of_latents_does_not_matter(self) -> None:
        world, latents = planted()
        dictionary, x = world.dictionary(latents), world.activations()
        order = torch.randperm(dictionary.n_latents, generator=torch.Generator().manual_seed(9))
        one, other = exclusives(dictionary, [x]), exclusives(reordered(dictionary, order), [x])
        assert [one.latents[int(j)].verdict for j in order] == [v.verdict for v in other.latents]
        assert one.cut_error == pytest.approx(other.cut_error)

    @pytest.mark.parametrize("width", [WIDTH, 80])
    def test_a_model_against_itself(self, width: int) -> None:
        # However one-sided its dictionary is: a third of the latents write to one model only, a third to the other.
        world = World(torch.ones(2, CONCEPTS, dtype=torch.float64), width=width)
        sides = ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
        latents = [Latent(i, 0, {i: sides[i % 3][0]}, {i: sides[i % 3][1]}) for i in range(CONCEPTS)]
        dictionary = world.dictionary(latents)
        assert int(((delta_norm(dictionary) - 0.5).abs() > 0.4).sum()) == 32
        found = exclusives(dictionary, [world.activations()])
        assert {v.verdict for v in found.latents} == {"shared"}

    def test_printed_it_is_a_summary(self) -> None:
        world, latents = planted()
        lines = repr(exclusives(world.dictionary(latents), [world.activations()])).splitlines()
        assert lines[0].startswith(f"Exclusives of {len(latents)} latents: 1 successor-only, 1 parent-only, ")
        assert sorted(line.split()[:2] for line in lines[2:]) == [["0", "parent-only"], ["1", "successor-only"]]

    def test_too_few_tokens_decide_nothing(self) -> None:
        world, latents = planted(tokens=100)
        found = exclusives(world.dictionary(latents), [world.activations()])
        assert {v.verdict for v in found.latents} == {"undecided"}
        assert found.band_error is None
        assert (found.cut_error, found.cut_reconstruction) == (0.2, 0.5)
