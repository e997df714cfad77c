"""Augmentation against references: torch's own operations, or a slow loop, for the same draw."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from searchfm.config import AugmentConfig
from searchfm.learn import augment as augmentation
from searchfm.learn.augment import augment

ALL = AugmentConfig(flip=0.5, crop=2, erase=0.5, mixup=0.2, cutmix=1.0, mix=0.8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 64, channels: int = 3, height: int = 12, width: int = 10) -> Tensor:
    # Never black, so that what comes in from outside can be told apart.
    return torch.randint(1, 256, (count, channels, height, width), generator=generator(1), dtype=torch.uint8)


def test_defaults_touch_nothing_and_draw_nothing() -> None:
    images, labels, draws = pictures(), torch.arange(64) % 7, generator()
    treated, targets = augment(images, labels, 7, AugmentConfig(), draws)
    assert treated is images
    assert targets is labels
    assert torch.equal(draws.get_state(), generator().get_state())


def test_flip_is_torch_flip_for_the_chosen_ones() -> None:
    images = pictures()
    assert torch.equal(augmentation.flip(images, 1.0, generator()), images.flip(-1))
    assert torch.equal(augmentation.flip(images, 0.0, generator()), images)
    some = augmentation.flip(pictures(4000), 0.3, generator())
    flipped = (some == pictures(4000).flip(-1)).flatten(1).all(1)
    kept = (some == pictures(4000)).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert flipped.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_crop_is_pad_and_slice() -> None:
    images, shift = pictures(500), 3
    height, width = images.shape[2:]
    moved = augmentation.crop(images, shift, generator())
    assert moved.dtype == torch.uint8
    padded = F.pad(images, (shift,) * 4)
    seen = set()
    for image, outcome in zip(padded, moved, strict=True):
        matches = [
            (down, across)
            for down in range(2 * shift + 1)
            for across in range(2 * shift + 1)
            if torch.equal(image[:, down : down + height, across : across + width], outcome)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == (2 * shift + 1) ** 2  # every shift occurs


def test_crop_may_shift_by_more_than_the_image() -> None:
    assert augmentation.crop(pictures(8, 1, 4, 4), 9, generator()).shape == (8, 1, 4, 4)


def test_erased_is_one_rectangle_of_the_stated_area() -> None:
    # Zeros under random pixels: an erased pixel is black in all channels only once in 256 ** 3.
    images = torch.zeros(2000, 3, 32, 24)
    erased = augmentation.erase(images, 0.6, generator()).any(1)
    hit = erased.flatten(1).any(1)
    assert hit.float().mean().item() == pytest.approx(0.6, abs=0.04)
    areas = []
    for mask in erased[hit]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        areas.append(mask.float().mean().item())
    rounding = 0.02  # of sides to whole pixels
    assert augmentation.ERASED_AREA[0] - rounding < min(areas)
    assert max(areas) < augmentation.ERASED_AREA[1] + rounding
    assert sum(areas) / len(areas) == pytest.approx(sum(augmentation.ERASED_AREA) / 2, abs=0.02)
    assert torch.equal(augmentation.erase(images, 0.0, generator()), images)


def test_erased_rectangles_reach_every_corner_and_the_noise_every_value() -> None:
    erased = augmentation.erase(torch.zeros(4000, 1, 8, 8, dtype=torch.uint8), 1.0, generator())
    assert erased.dtype == torch.uint8
    assert len(erased.unique()) == 256
    assert (erased > 0).float().mean(0).min() > 0.02


def test_mixing_with_a_fraction_of_one_is_the_identity() -> None:
    images, targets = pictures(), F.one_hot(torch.arange(64) % 5, 5).float()
    mixed, soft = augmentation.mix(images, targets, torch.ones(()))
    assert torch.equal(mixed, images.float())
    assert torch.equal(soft, targets)
    mixed, soft = augmentation.mix(images, targets, torch.zeros(12, 10))
    assert torch.equal(mixed, images.float().roll(1, 0))
    assert torch.equal(soft, targets.roll(1, 0))


def test_mixup_is_the_papers_sum() -> None:
    images, labels = pictures(), torch.arange(64) % 5
    draws = generator()
    torch.rand(2, generator=draws)  # whether the batch is mixed, and by what
    weight = augmentation.mixup_weight(1.0, draws)
    mixed, soft = augment(images, labels, 5, AugmentConfig(mixup=1.0), generator())
    torch.testing.assert_close(mixed, weight * images + (1 - weight) * images.roll(1, 0))
    hot = F.one_hot(labels, 5).float()
    torch.testing.assert_close(soft, weight * hot + (1 - weight) * hot.roll(1, 0))


def test_cutmix_weighs_targets_by_the_pixels_that_stay() -> None:
    # Image i is all i, and has class i: a pixel names the image it is from.
    count = 6
    images = torch.arange(count).view(-1, 1, 1, 1).expand(count, 1, 9, 7).to(torch.uint8)
    draws, clipped = generator(), 0
    for _ in range(300):
        mixed, soft = augment(images, torch.arange(count), count, AugmentConfig(cutmix=1.0), draws)
        for i in range(count):
            own = (mixed[i] == i).float().mean()
            other = (mixed[i] == (i - 1) % count).float().mean()
            assert own + other == 1
            torch.testing.assert_close(soft[i, i], own)
            torch.testing.assert_close(soft[i, (i - 1) % count], other)
        foreign = (mixed[0, 0] != 0).nonzero()
        if len(foreign):
            top, left = foreign.min(0).values.tolist()
            bottom, last = foreign.max(0).values.tolist()
            assert len(foreign) == (bottom - top + 1) * (last - left + 1)  # one box
            clipped += top == 0 or left == 0 or bottom == 8 or last == 6
    assert clipped > 50


def test_cutmix_boxes_lie_as_the_paper_draws_them_cut_at_the_border() -> None:
    """Its centre is uniform over the image, its side sqrt(1 - lambda), and what falls outside is cut off."""
    size, draws = 48, generator()
    boxes = torch.stack([1 - augmentation.cutmix_weights(1.0, size, size, draws) for _ in range(3000)])
    # alpha = 1 makes 1 - lambda uniform. A side s covers place t of the unit interval where the centre is within s / 2.
    sides = ((torch.arange(500) + 0.5) / 500).sqrt()[:, None]
    positions = (torch.arange(size) + 0.5) / size
    covers = (positions + sides / 2).clamp(max=1) - (positions - sides / 2).clamp(min=0)
    expected = torch.einsum("sy,sx->yx", covers, covers) / len(sides)
    assert expected[0, 0].item() == pytest.approx(1 / 8, abs=0.02)
    assert expected[size // 2, size // 2].item() == pytest.approx(1 / 2, abs=0.02)
    torch.testing.assert_close(boxes.mean(0), expected, atol=0.04, rtol=0)
    areas = boxes.mean((1, 2))
    assert areas.mean().item() == pytest.approx(77 / 240, abs=0.015)  # E (s - s^2 / 4)^2; uncut it would be 1/2


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 4.0])
def test_lambda_is_beta_distributed(alpha: float) -> None:
    draws = generator()
    weights = torch.stack([augmentation.mixup_weight(alpha, draws) for _ in range(4000)])
    assert weights.mean().item() == pytest.approx(0.5, abs=0.03)
    assert weights.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


@pytest.mark.parametrize("alpha", [1e-9, 1e-3])
def test_tiny_alphas_are_a_coin_and_no_number_gets_lost(alpha: float) -> None:
    draws = generator()
    weights = torch.stack([augmentation.mixup_weight(alpha, draws) for _ in range(500)])
    assert ((weights < 0.01) | (weights > 0.99)).float().mean() > 0.9


@pytest.mark.parametrize(
    "config", [AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0), ALL], ids=["mixup", "cutmix", "all"]
)
def test_soft_targets_sum_to_one(config: AugmentConfig) -> None:
    draws = generator()
    for _ in range(30):
        images, soft = augment(pictures(), torch.arange(64) % 5, 5, config, draws)
        assert images.shape == (64, 3, 12, 10)
        assert images.dtype == soft.dtype == torch.float32
        assert images.isfinite().all()
        assert images.min() >= 0
        assert images.max() <= 255
        assert (soft >= 0).all()
        torch.testing.assert_close(soft.sum(1), torch.ones(64))


def test_mix_is_the_fraction_of_batches_mixed_half_of_each_kind() -> None:
    images, labels, draws = pictures(4), torch.arange(4), generator()
    config = AugmentConfig(mixup=1.0, cutmix=1.0, mix=0.6)
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for _ in range(1500):
        mixed, soft = augment(images, labels, 4, config, draws)
        if torch.equal(soft, F.one_hot(labels, 4).float()):
            kinds["none"] += 1  # or a box that has no pixel
        else:
            kinds["cutmix" if ((mixed == images) | (mixed == images.roll(1, 0))).all() else "mixup"] += 1
    assert kinds["none"] / 1500 == pytest.approx(0.4, abs=0.05)
    assert kinds["mixup"] / 1500 == pytest.approx(0.3, abs=0.05)
    assert kinds["cutmix"] / 1500 == pytest.approx(0.3, abs=0.05)


def test_the_generator_alone_decides() -> None:
    images, labels = pictures(), torch.arange(64) % 5
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = augment(images, labels, 5, ALL, generator(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = augment(images, labels, 5, ALL, generator(3))
    other = augment(images, labels, 5, ALL, generator(4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_bytes_and_floats_are_treated_alike() -> None:
    images, labels = pictures(), torch.arange(64) % 5
    for config in (AugmentConfig(flip=0.5, crop=2, erase=0.5), ALL):
        as_bytes, _ = augment(images, labels, 5, config, generator())
        as_floats, _ = augment(images.float(), labels, 5, config, generator())
        assert torch.equal(as_bytes.float(), as_floats)


def test_the_input_batch_is_not_written_to() -> None:
    images, labels = pictures(), torch.arange(64) % 5
    kept = images.clone()
    augment(images, labels, 5, ALL, generator())
    assert torch.equal(images, kept)
