"""Class activation maps by autograd: the reference that the runtime's maps are held against, and other CAM methods.

At inference the maps come out of the exported graph (see export.py); nothing here is needed to run a bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lungscope.errors import RecipeError, look_up
from lungscope.training.networks import features

METHODS = ("gradcam", "gradcam++", "layercam", "scorecam")


def features_and_logits(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Last feature maps [N, C, h, w] and logits [N, K] of a timm classifier."""
    maps = features(network, x)
    head = cast(Callable[[Tensor], Tensor], network.forward_head)
    return maps, head(maps)


def class_activation(network: nn.Module, x: Tensor, target: int, method: str = "gradcam") -> NDArray[np.float32]:
    """Activation maps f32 [N, h, w] of class `target` for films f32 [N, 1, S, S] in 0..1; >= 0, in the method's own
    unit.

    gradcam: Selvaraju et al. 2017, equations 1 and 2. gradcam++: Chattopadhay et al. 2018, equation 19 with the
    closed form for an exponential score. layercam: Jiang et al. 2021, equation 3. scorecam: Wang et al. 2020, one
    pass a channel.
    Raises RecipeError for an unknown method.
    """
    look_up(method, METHODS, what="CAM method", error=RecipeError)
    network.eval()
    if method == "scorecam":
        return _score_cam(network, x, target)
    maps, logits = features_and_logits(network, x)
    (gradient,) = torch.autograd.grad(logits[:, target].sum(), maps)
    if method == "layercam":
        cam = (F.relu(gradient) * maps).sum(1)
    else:
        if method == "gradcam":
            weights = gradient.mean((2, 3), keepdim=True)
        else:
            square, cube = gradient**2, gradient**3
            below = 2 * square + (maps * cube).sum((2, 3), keepdim=True)
            alpha = square / torch.where(below == 0, torch.ones_like(below), below)
            weights = (alpha * F.relu(gradient)).sum((2, 3), keepdim=True)
        cam = (weights * maps).sum(1)
    result: NDArray[np.float32] = F.relu(cam).detach().numpy()
    return result


@torch.no_grad()
def _score_cam(network: nn.Module, x: Tensor, target: int, batch: int = 32) -> NDArray[np.float32]:
    maps = []
    for film, channels in zip(x, features(network, x), strict=True):
        masks = F.interpolate(channels[:, None], x.shape[-2:], mode="bilinear", align_corners=False)
        low, high = masks.amin((1, 2, 3), keepdim=True), masks.amax((1, 2, 3), keepdim=True)
        masks = (masks - low) / (high - low).clamp_min(1e-8)
        scores = [network(film * part)[:, target] for part in torch.split(masks, batch)]
        weights = torch.cat(scores).softmax(0)
        maps.append(F.relu((weights[:, None, None] * channels).sum(0)))
    result: NDArray[np.float32] = torch.stack(maps).numpy()
    return result
