"""Random changes to a batch of films, on tensors, so that they run where the network runs.

All draws come from torch's global generator, which the training loop seeds at the start of each epoch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lungscope.training.recipe import Augment


def to_float(films: Tensor, size: int) -> Tensor:
    """u8 [N, 1, S, S] in 0..255 → f32 [N, 1, size, size] in 0..1, antialiased where it shrinks."""
    x = films.float() / 255
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=x.shape[-1] > size, align_corners=False)
    return x


def uniform(n: int, low: float, high: float, like: Tensor) -> Tensor:
    return torch.empty(n, device=like.device).uniform_(low, high)


def random_affine(n: int, spec: Augment, like: Tensor) -> Tensor:
    """n random maps [N, 2, 3] from output to input coordinates, in affine_grid's convention (-1..1)."""
    angle = uniform(n, -spec.rotation, spec.rotation, like) * (math.pi / 180)
    shear = uniform(n, -spec.shear, spec.shear, like)
    zoom = uniform(n, 1 - spec.zoom, 1 + spec.zoom, like)
    aspect = uniform(n, -spec.aspect, spec.aspect, like).exp().sqrt()
    mirror = torch.where(torch.rand(n, device=like.device) < spec.flip, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack(
        [
            torch.stack(
                [
                    cos * zoom * aspect * mirror,
                    (shear * cos - sin) * zoom / aspect,
                    2 * uniform(n, -spec.shift, spec.shift, like),
                ],
                1,
            ),
            torch.stack(
                [
                    sin * zoom * aspect * mirror,
                    (shear * sin + cos) * zoom / aspect,
                    2 * uniform(n, -spec.shift, spec.shift, like),
                ],
                1,
            ),
        ],
        1,
    )


def warp(x: Tensor, theta: Tensor, fill: str) -> Tensor:
    """Resample [N, C, S, S] by the maps `theta` [N, 2, 3], bilinear."""
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    padding = "border" if fill == "nearest" else "zeros"
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def random_tone(x: Tensor, spec: Augment) -> Tensor:
    """Change exposure, contrast, gamma, sharpness and noise of films [N, 1, S, S] in 0..1. Black (0) stays black."""
    n = len(x)
    shape = (n, 1, 1, 1)
    lit = (x > 0).to(x.dtype)
    y = x.clamp_min(1e-6) ** torch.exp2(uniform(n, -spec.gamma, spec.gamma, x)).view(shape)
    y = (y - 0.5) * (1 + uniform(n, -spec.contrast, spec.contrast, x).view(shape)) + 0.5
    y = y + uniform(n, -spec.brightness, spec.brightness, x).view(shape)
    if spec.blur:
        soft = F.avg_pool2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), 3, 1)
        y = torch.where((torch.rand(n, device=x.device) < spec.blur).view(shape), soft, y)
    if spec.noise:
        y = y + torch.randn_like(y) * uniform(n, 0, spec.noise, x).view(shape)
    return y.clamp(0, 1) * lit


def smooth_noise(n: int, size: int, cells: int, like: Tensor) -> Tensor:
    """A smooth random field [N, 1, size, size] of about unit variance with `cells` cells a side."""
    coarse = torch.randn(n, 1, cells, cells, device=like.device)
    field = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return field / field.std((1, 2, 3), keepdim=True)


def paint_opacities(x: Tensor, lungs: Tensor, chance: float) -> tuple[Tensor, Tensor]:
    """Paint synthetic disease into films [N, 1, S, S], guided by lung masks [N, 1, S, S] in 0..1; the masks stay as
    they are. Returns the films, and how much of what was there is covered, [N, 1, S, S] in 0..1.

    Three kinds, mixed at random: patches with soft borders (consolidation), a faint field over most of a lung (ground
    glass), and a level that rises from the base (effusion). Each is as bright as soft tissue of the same film and
    reaches a little over the lung's border, so that a segmenter has to learn where an opaque lung ends from the rest
    of the thorax.
    """
    n, _, size, _ = x.shape
    shape = (n, 1, 1, 1)
    widened = F.max_pool2d(lungs, 2 * (size // 48) + 1, 1, size // 48)
    reach = F.avg_pool2d(widened, 2 * (size // 32) + 1, 1, size // 32, count_include_pad=False)

    field = smooth_noise(n, size, int(torch.randint(3, 9, ())), x)
    level = uniform(n, -1.2, 1.4, x).view(shape)
    patches = torch.sigmoid((field - level) * uniform(n, 3, 10, x).view(shape))
    veil = torch.sigmoid(smooth_noise(n, size, 3, x) * 2 + 2) * uniform(n, 0.5, 1.0, x).view(shape)
    rows = torch.linspace(0, 1, size, device=x.device).view(1, 1, size, 1)
    surface = uniform(n, 0.35, 0.75, x).view(shape) + 0.05 * smooth_noise(n, size, 3, x)
    effusion = torch.sigmoid((rows - surface) * 30)
    side = torch.sigmoid((torch.linspace(-1, 1, size, device=x.device).view(1, 1, 1, size)) * 20)
    pick = torch.rand(n, device=x.device).view(shape)
    side = torch.where(pick < 0.25, side, torch.where(pick < 0.5, 1 - side, torch.ones_like(side)))
    kind = torch.rand(n, device=x.device).view(shape)
    alpha = torch.where(kind < 0.5, patches, torch.where(kind < 0.75, veil, effusion))
    # Faint ones, too, but dense ones more often.
    alpha = alpha * side * reach * uniform(n, 0.03, 1.0, x).sqrt().view(shape)
    alpha = alpha * (torch.rand(n, device=x.device) < chance).view(shape)

    tissue = (1 - widened) * (x > 0.05)
    mean = ((x * tissue).sum((1, 2, 3)) / tissue.sum((1, 2, 3)).clamp_min(1)).view(shape)
    tone = (mean * uniform(n, 0.95, 1.3, x).view(shape)).clamp(0.3, 0.95)
    texture = tone * (1 + 0.08 * smooth_noise(n, size, max(4, size // 8), x) + 0.10 * smooth_noise(n, size, 6, x))
    painted = (x * (1 - alpha) + texture.clamp(0, 1) * alpha).clamp(0, 1)
    return torch.maximum(painted, x * 0.8), alpha
