from __future__ import annotations

import math

import pytest
import torch

from lungscope.training.augment import paint_opacities, random_affine, random_tone, to_float, warp
from lungscope.training.recipe import Augment


def test_no_change_asked_for_is_no_change() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 1, 32, 32)
    spec = Augment()
    assert torch.allclose(warp(x, random_affine(4, spec, x), "zero"), x, atol=1e-5)
    assert torch.allclose(random_tone(x, spec), x, atol=1e-5)


def test_a_mirror_image() -> None:
    x = torch.rand(3, 1, 32, 32)
    assert torch.allclose(warp(x, random_affine(3, Augment(flip=1.0), x), "zero"), x.flip(3), atol=1e-5)


def test_every_change_stays_within_its_bounds() -> None:
    torch.manual_seed(0)
    spec = Augment(rotation=20, shift=0.2, zoom=0.2)
    theta = random_affine(2000, spec, torch.zeros(1))
    scale = theta[:, :, :2].det().sqrt()
    angle = torch.atan2(theta[:, 1, 0], theta[:, 0, 0]) * 180 / math.pi
    assert 0.79 < scale.min() < 0.83
    assert 1.17 < scale.max() < 1.21
    assert 19 < angle.abs().max() <= 20.01
    # affine_grid's unit is half a side.
    assert 0.38 < theta[:, :, 2].abs().max() <= 0.4


def test_fill_repeats_the_edge_or_is_black() -> None:
    x = torch.ones(1, 1, 16, 16)
    theta = torch.tensor([[[1.0, 0, 1.0], [0, 1, 0]]])
    assert warp(x, theta, "nearest").min() == 1
    assert warp(x, theta, "zero")[0, 0, :, -4:].max() == 0


def test_black_stays_black_under_a_change_of_tone() -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 1, 32, 32)
    x[:, :, :16] = 0
    y = random_tone(x, Augment(gamma=0.8, contrast=0.3, brightness=0.2, noise=0.1))
    assert y[:, :, :16].abs().max() == 0
    assert y.min() >= 0 and y.max() <= 1


def test_shrinking_is_antialiased() -> None:
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).to(torch.uint8)
    small = to_float(board[None, None], 16)
    assert (small - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("size", [64, 192])
def test_opacities_make_lungs_dense_and_spare_the_rest(size: int) -> None:
    torch.manual_seed(0)
    lungs = torch.zeros(32, 1, size, size)
    lungs[:, :, size // 5 : -size // 5, size // 6 : size // 2 - 4] = 1
    x = torch.where(lungs > 0, 0.2, 0.6)
    y, covered = paint_opacities(x, lungs, 1.0)
    inside = (y - x)[lungs > 0].view(32, -1).mean(1)
    far = torch.zeros_like(lungs, dtype=torch.bool)
    far[..., -size // 4 :] = True
    assert inside.mean() > 0.08
    assert inside.max() > 0.2
    assert covered.shape == x.shape
    assert covered.min() >= 0
    assert covered.max() <= 1
    assert covered[far].max() == 0
    # What is covered more is brighter.
    per_film = covered[lungs > 0].view(32, -1).mean(1)
    assert torch.corrcoef(torch.stack([per_film, inside]))[0, 1] > 0.8
    assert torch.equal(y[far], x[far])
    none, uncovered = paint_opacities(x, lungs, 0.0)
    assert torch.equal(none, x)
    assert uncovered.max() == 0
