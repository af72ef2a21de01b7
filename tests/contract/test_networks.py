"""What every network in the registry promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import nn

from lungscope.errors import RecipeError
from lungscope.evaluation.benchmark import PAPER_CLASSIFIERS, PAPER_SEGMENTERS
from lungscope.training.networks import (
    CLASSIFIERS,
    DECODERS,
    ENCODERS,
    IMAGENET,
    SEGMENTERS,
    build_classifier,
    build_segmenter,
    features,
    finds_grade,
    finds_opacity,
    head_of,
    load_resized,
    maps_of,
)
from nets import CLASSES, SMALL, awake_classifier, blotches

#: segmentation-models-pytorch keeps the end of EfficientNet's classification path in the encoder, and no decoder
#: reads it.
UNREAD = ("encoder._conv_head.", "encoder._bn1.")
TABLE = ".relative_position_bias_table"


def silent(network: nn.Module, x: torch.Tensor) -> list[str]:
    """Parameters that no gradient reaches in three steps; drop-path may leave a block out of one of them."""
    network.train()
    for seed in range(3):
        torch.manual_seed(seed)
        network(x).square().sum().backward()
    return [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_the_papers_networks_are_there() -> None:
    assert len(PAPER_SEGMENTERS) == 15
    lungs_alone = {name for name in SEGMENTERS if not finds_opacity(name)}
    more = {f"{d}-{e}" for d in DECODERS for e in IMAGENET} | {f"slimunet-{e}" for e in ENCODERS}
    assert lungs_alone - set(PAPER_SEGMENTERS) == more
    assert set(SEGMENTERS) - lungs_alone == {f"{name}-opacity" for name in lungs_alone}
    assert set(PAPER_CLASSIFIERS) == {"coatnet0", "xception", "resnet50", "inceptionresnetv2"}
    assert set(CLASSIFIERS) - set(PAPER_CLASSIFIERS) == set(IMAGENET)


#: A twin with a map of opacity differs in its last layer alone, whatever the encoder: one for each decoder will do.
@pytest.mark.parametrize("name", [n for n in SEGMENTERS if not finds_opacity(n) or n.endswith("mobilenetv2-opacity")])
def test_a_segmenter_takes_grey_films_and_learns_everywhere(name: str) -> None:
    torch.manual_seed(0)
    network = build_segmenter(name)
    x = torch.rand(2, 1, 64, 64)
    missed = silent(network, x)
    if name.endswith("efficientnetb2"):
        assert missed and all(parameter.startswith(UNREAD) for parameter in missed)
    else:
        assert missed == []
    last = next(module for module in network.get_submodule("segmentation_head") if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        output = network.eval()(x)
        last.bias += 5
        higher = network(x)
    assert output.shape == (2, 2 if finds_opacity(name) else 1, 64, 64)
    assert output.dtype == torch.float32
    torch.testing.assert_close(higher, output + 5, msg="logits, not probabilities")


#: Grades stand on the encoder alone: one decoder over each will do.
@pytest.mark.parametrize("name", [f"linknet-{encoder}" for encoder in ENCODERS] + ["fpn-mobilenetv2-opacity"])
def test_a_segmenter_with_grades_finds_the_same_lungs_and_weighs_what_its_encoder_sees(name: str) -> None:
    torch.manual_seed(0)
    plain = build_segmenter(name).eval()
    graded = build_segmenter(f"{name}-grade").eval()
    assert finds_grade(f"{name}-grade") and not finds_grade(name)
    assert maps_of(f"{name}-grade") == [*maps_of(name), "grade"]
    graded.load_state_dict(plain.state_dict(), strict=False)
    head = graded.get_submodule("grade_head")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
        x = torch.rand(2, 1, 64, 64)
        maps, lungs = graded(x), plain(x)
        torch.testing.assert_close(maps[:, :-1], lungs)
        # By hand: one level and one doubling after the other, from the coarsest.
        sums = torch.zeros(2, 1, 2, 2)
        for level, found in reversed(list(zip(head.levels, graded.encoder(x)[1:], strict=True))):
            weighed = (found * level.weight).sum(1, keepdim=True)
            sums = weighed + (sums if sums.shape == weighed.shape else doubled(sums))
        torch.testing.assert_close(maps[:, -1:], doubled(sums) + head.bias, rtol=1e-4, atol=1e-4)


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Twice the side, bilinear, cells' corners on corners: three quarters of the nearest cell and one of the next."""
    for axis in (2, 3):
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        before = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
        after = torch.cat([x.narrow(axis, 1, x.shape[axis] - 1), last], axis)
        x = torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1).flatten(axis, axis + 1)
    return x


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_takes_grey_films_and_learns_everywhere(name: str) -> None:
    network = awake_classifier(name, SMALL[name])
    x = blotches(2, SMALL[name])
    with torch.no_grad():
        assert network(x).shape == (2, CLASSES)
    assert silent(network, x) == []


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_head_is_linear_on_averaged_features(name: str) -> None:
    network = awake_classifier(name, SMALL[name])
    x = blotches(2, SMALL[name])
    with torch.no_grad():
        logits = network(x)
        mine = head_of(network, name)(features(network, x).mean((2, 3)))
    assert logits.std() > 0.01
    torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_network_starts_from_random_weights_that_the_seed_decides(name: str) -> None:
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(build_classifier(name, classes=CLASSES, size=SMALL[name]).parameters())

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'unet-vgg16'"):
        build_segmenter("unet-vgg61")
    with pytest.raises(RecipeError, match="coatnet0, xception, resnet50, inceptionresnetv2"):
        build_classifier("vit", classes=3, size=64)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("size", [0, -32, 100])
def test_sizes_off_the_stride_are_refused(name: str, size: int) -> None:
    with pytest.raises(RecipeError, match="multiple of 32"):
        build_classifier(name, classes=3, size=size)


def test_a_size_too_small_for_a_network_is_refused_before_it_is_trained() -> None:
    with pytest.raises(RecipeError, match="at least 96"):
        build_classifier("inceptionresnetv2", classes=3, size=64)


# Relative position tables
# -----------------------------------------------------------------------------------------------


def tables(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in network.state_dict().items() if name.endswith(TABLE)}


def positions(offsets: int, reach: int) -> list[float]:
    """Where timm puts the `offsets` (an odd number) old table entries on a grid that goes to `reach`: a geometric
    progression of steps 1, q, q², … that ends at `reach`, with q at most 1.5 (BEiT, `run_class_finetuning.py`)."""
    half = offsets // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if sum(q**i for i in range(half)) > reach else (q, high)
    out = np.cumsum([q**i for i in range(half)])
    return [*-out[::-1], 0.0, *out]


@pytest.mark.parametrize(("trained", "wanted"), [(64, 96), (96, 160), (160, 256), (128, 64)])
def test_position_tables_are_interpolated_linearly(trained: int, wanted: int) -> None:
    torch.manual_seed(0)
    small = build_classifier("coatnet0", classes=CLASSES, size=trained)
    state = small.state_dict()
    for name in tables(small):
        state[name] = torch.randn_like(state[name])
    large = build_classifier("coatnet0", classes=CLASSES, size=wanted)
    load_resized(large, state)
    for name, table in tables(large).items():
        old, new = (round(len(t) ** 0.5) for t in (state[name], table))
        source = positions(old, new // 2)
        before, after = state[name].view(old, old, -1), table.view(new, new, -1)
        reach = np.clip(np.arange(-(new // 2), new // 2 + 1), source[0], source[-1])
        grid = np.stack(np.meshgrid(reach, reach, indexing="ij"), -1)
        reference = RegularGridInterpolator((source, source), before.numpy())(grid)
        np.testing.assert_allclose(after.numpy(), reference, atol=2e-3)
        torch.testing.assert_close(after[new // 2, new // 2], before[old // 2, old // 2], atol=1e-4, rtol=0)
        if new > old:
            corners = [0, -1]
            torch.testing.assert_close(after[corners][:, corners], before[corners][:, corners], atol=1e-4, rtol=0)
            assert after.amax() <= before.amax() + 1e-6 and after.amin() >= before.amin() - 1e-6


def test_a_table_that_is_a_sum_over_rows_and_columns_stays_one() -> None:
    small, large = (build_classifier("coatnet0", classes=CLASSES, size=size) for size in (64, 128))
    state = small.state_dict()
    for name, table in tables(small).items():
        side = round(len(table) ** 0.5)
        ramp = torch.linspace(-1, 1, side)
        state[name] = (10 * ramp[:, None] + ramp).reshape(-1, 1).expand_as(table).clone()
    load_resized(large, state)
    for table in tables(large).values():
        side = round(len(table) ** 0.5)
        grid = table[:, 0].view(side, side)
        rows, columns = grid[:, side // 2], grid[side // 2]
        torch.testing.assert_close(grid, rows[:, None] + columns, atol=1e-4, rtol=0)
        torch.testing.assert_close(rows, 10 * columns, atol=1e-4, rtol=0)
        torch.testing.assert_close(columns, -columns.flip(0), atol=1e-5, rtol=0)
        assert (columns.diff() >= -1e-6).all()
        assert columns[0] == pytest.approx(-1) and columns[-1] == pytest.approx(1)


def test_the_same_size_keeps_every_weight() -> None:
    torch.manual_seed(0)
    one, other = (build_classifier("coatnet0", classes=CLASSES, size=64) for _ in range(2))
    load_resized(other, one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["coatnet0", "resnet50"])
def test_weights_of_another_network_are_refused(name: str) -> None:
    network = build_classifier(name, classes=CLASSES, size=64)
    state = network.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_resized(network, state)
