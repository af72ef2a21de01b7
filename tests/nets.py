"""Networks in a state in which nothing is zero by chance: what a fresh one has at zero would hide a mistake."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lungscope.training.networks import build_classifier, head_of

CLASSES = 3
#: The smallest side that each classifier is tested at.
SMALL = {"coatnet0": 64, "xception": 64, "resnet50": 64, "inceptionresnetv2": 96}


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
