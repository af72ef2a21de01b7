"""Networks in a state in which nothing is zero by chance: what a fresh one has at zero would hide a mistake."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from films import draw
from lungscope.training.networks import CLASSIFIERS, build_classifier, build_segmenter, head_of
from lungscope.training.weights import save_weights

CLASSES = 3
#: The smallest side that each classifier is tested at.
SMALL = {name: 96 if name == "inceptionresnetv2" else 64 for name in CLASSIFIERS}


def blotches(n: int, size: int) -> torch.Tensor:
    """n random films f32 [n, 1, size, size] in 0..1, coarse and fine, no two alike."""
    coarse = nn.functional.interpolate(torch.rand(n, 1, 5, 5), (size, size), mode="bilinear", align_corners=False)
    return 0.8 * coarse + 0.2 * torch.rand(n, 1, size, size)


def awake_classifier(name: str, size: int, seed: int = 0) -> nn.Module:
    """A classifier in eval mode with random batch-norm scales and shifts, statistics near those of `blotches`, and a
    head with a bias."""
    torch.manual_seed(seed)
    network = build_classifier(name, classes=CLASSES, size=size)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0, 0.1)
        update_bn([blotches(8, size)], network)
        for norm in norms:
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.2)
        head = head_of(network, name)
        head.weight.normal_(0, 0.1)
        head.bias.copy_(torch.linspace(-0.5, 0.8, CLASSES))
    return network.eval()


def trained_segmenter(folder: Path, size: int, name: str = "fpn-mobilenetv2") -> Path:
    """The folder of a run whose weights were fitted for a few steps to drawn lungs, so that the network finds some."""
    torch.manual_seed(0)
    network = build_segmenter(name)
    film = torch.from_numpy(draw(size, size))[None, None]
    x = (film + 0.03 * torch.randn(8, 1, size, size)).clamp(0, 1)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(15):
        loss = nn.functional.binary_cross_entropy_with_logits(network(x)[:, :1], (film < 0.5).float().expand_as(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    update_bn([x], network)
    save_weights(network, folder / "weights.safetensors", {"network": name, "size": size})
    return folder
