"""The memory of normal features: distances, what is left out, what is remembered."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from almrr_pipeline.model.memory import FeatureMemory, choose_core, pool_cells


def constant(*values: float, channels: int = 3) -> Tensor:
    """Features (B, C, 4, 6), each image of one value: pooling leaves them as they are."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, channels, 4, 6).clone()


@pytest.fixture
def memory() -> FeatureMemory:
    """Remembers 0 of image 0, 10 of image 1 and 20 of image 2."""
    memory = FeatureMemory(3, 3)
    memory.fill([(constant(0.0, 10.0, 20.0), torch.arange(3))], per_image=1, seed=0)
    return memory


def test_what_was_seen_is_remembered_with_its_owner(memory: FeatureMemory) -> None:
    by_owner = memory.core[memory.owner.argsort()]
    torch.testing.assert_close(by_owner[:, 0], torch.tensor([0.0, 10.0, 20.0]), rtol=0, atol=1e-4)
    assert sorted(memory.owner.tolist()) == [0, 1, 2]


def test_the_unit_is_the_mean_distance_without_ones_own(memory: FeatureMemory) -> None:
    assert 1 / float(memory.factor) == pytest.approx(10.0 * 3**0.5, rel=1e-5)


def test_distances_are_to_the_nearest_that_counts(memory: FeatureMemory) -> None:
    cells = constant(1.0, 12.0)
    near = memory.relative(memory(cells))
    assert near.shape == (2, 1, 4, 6)
    for image, expected in zip(near, (0.1, 0.2), strict=True):
        torch.testing.assert_close(image, torch.full_like(image, expected), rtol=1e-3, atol=1e-3)
    without = memory.relative(memory(cells, torch.tensor([0, 1])))
    for image, expected in zip(without, (0.9, 0.8), strict=True):
        torch.testing.assert_close(image, torch.full_like(image, expected), rtol=1e-3, atol=1e-3)


def test_distances_are_those_of_cdist() -> None:
    generator = torch.Generator().manual_seed(0)
    memory = FeatureMemory(5, 40)
    seen = torch.randn(6, 5, 8, 8, generator=generator)
    memory.fill([(seen[:4], torch.arange(4)), (seen[4:], torch.arange(4, 6))], per_image=16, seed=1)
    new = torch.randn(2, 5, 8, 8, generator=generator)
    for owners in (None, torch.tensor([3, 0])):
        found = memory.relative(memory(new, owners))
        for image, cells in enumerate(pool_cells(new).flatten(2).mT):
            kept = memory.core if owners is None else memory.core[memory.owner != owners[image]]
            nearest = torch.cdist(cells, kept).amin(1).view(4, 4) * memory.factor
            large = nearest.repeat_interleave(2, 0).repeat_interleave(2, 1)
            torch.testing.assert_close(found[image, 0], large, rtol=1e-4, atol=1e-4)


def test_half_precision_is_as_fine_as_its_features(memory: FeatureMemory) -> None:
    exact = memory(constant(1.0, 13.0))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = memory(constant(1.0, 13.0).bfloat16())
    torch.testing.assert_close(coarse, exact, rtol=0.02, atol=0)


def test_fewer_features_than_room_are_repeated() -> None:
    memory = FeatureMemory(3, 7)
    memory.fill([(constant(1.0), torch.tensor([4]))], per_image=2, seed=0)
    torch.testing.assert_close(memory.core, torch.ones(7, 3))
    assert memory.owner.tolist() == [4] * 7


def test_what_one_specimen_alone_was_seen_of_says_nothing() -> None:
    memory = FeatureMemory(3, 2)
    memory.fill([(constant(1.0, 2.0), torch.tensor([4, 4]))], per_image=2, seed=0)
    assert not memory.relative(memory(constant(9.0))).any()
    assert not memory.relative(memory(constant(9.0), torch.tensor([4]))).any()


def test_an_image_that_owns_all_features_is_at_the_mean_distance(memory: FeatureMemory) -> None:
    memory.owner.fill_(5)
    distances = memory(constant(9.0), torch.tensor([5]))
    assert bool((distances == torch.inf).all())
    assert bool((memory.relative(distances) == 1.0).all())


def test_the_mean_evidence_of_new_normal_images_is_one(memory: FeatureMemory) -> None:
    """As the mean of every likelihood ratio is where the hypothesis it speaks against is true."""
    memory.exponent = 3.0
    unseen = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert bool((memory.evidence(memory(unseen)) == 1.0).all())  # not measured yet
    memory.fit_neutral([(unseen[:1],), (unseen[1:],)])
    evidence = memory.evidence(memory(unseen)).pow(3.0)
    assert float(evidence.mean()) == pytest.approx(1.0, rel=1e-5)
    assert float(evidence.max()) > 1.5


def test_without_new_images_the_remembered_ones_measure_the_evidence() -> None:
    memory = FeatureMemory(3, 3, exponent=4.0)
    memory.fill([(constant(0.0, 10.0, 30.0), torch.arange(3))], per_image=1, seed=0)
    mean = (10.0**4 + 10.0**4 + 20.0**4) / 3  # to the nearest of the others
    assert float(memory.neutral) == pytest.approx(3**0.5 * mean**0.25, rel=1e-4)
    memory.fit_neutral([])
    assert float(memory.neutral) == pytest.approx(3**0.5 * mean**0.25, rel=1e-4)


def test_the_choice_follows_the_seed_alone() -> None:
    seen = [(torch.randn(4, 5, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(4))]
    one, same, other = (FeatureMemory(5, 12) for _ in range(3))
    for memory, seed in ((one, 0), (same, 0), (other, 1)):
        memory.fill(seen, per_image=8, seed=seed)
    assert torch.equal(one.core, same.core)
    assert not torch.equal(one.core, other.core)


def test_the_core_covers_what_is_far_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 100.0 * torch.eye(5, 64)
    features = centers.repeat_interleave(200, dim=0) + torch.randn(1000, 64, generator=generator)
    core = features[choose_core(features, 5, generator)]
    assert torch.cdist(core, centers).argmin(dim=1).sort().values.tolist() == [0, 1, 2, 3, 4]


def test_the_core_covers_rare_features() -> None:
    """Greedy k-center takes what is far from all others, which a random choice would miss."""
    features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 0.01
    features[123] += 5.0
    assert 123 in choose_core(features, 3, torch.Generator().manual_seed(1)).tolist()
    assert choose_core(features[:3], 5, torch.Generator()).tolist() == [0, 1, 2]
