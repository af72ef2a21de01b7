"""Stage 3: which class the segmented lungs belong to (paper, "Classification")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lungscope.errors import LungscopeError
from lungscope.radiograph import Geometry, Pixels, Radiograph
from lungscope.stages.segmentation import LungMask

if TYPE_CHECKING:
    from lungscope.runtime import Network, Weights

Input = Literal["lungs", "image", "background", "outline"]
INPUTS: tuple[Input, ...] = get_args(Input)
INPUT_NAMES: dict[Input, str] = {
    "lungs": "the lungs alone",
    "image": "the whole film",
    "background": "the background, lungs blacked out",
    "outline": "the outline of the lungs, filled with white",
}


@dataclass(frozen=True)
class ViewSpec:
    """What a classifier is shown: the lungs alone, the whole film, the film with the lungs blacked out, or nothing of
    the film but where the lungs are.

    crop: show the square around the lungs, widened by `margin` of its side on each end, and not the whole film.
    size: side of the network's grid. equalised: give what is shown the same grey levels on every film (`equalised`).
    aligned: of what is cut out, bring the lungs of every film to one pose and size (`Geometry.along`).
    """

    input: Input
    crop: bool
    margin: float
    size: int
    equalised: bool = False
    aligned: bool = False


def view_name(view: ViewSpec) -> str:
    """What a classifier is shown, in words."""
    ways = {"cut out close": view.crop, "in one pose": view.aligned, "grey levels equalised": view.equalised}
    return ", ".join([INPUT_NAMES[view.input], *(way for way, holds in ways.items() if holds)])


def lung_view(pixels: Pixels, lungs: LungMask, spec: ViewSpec) -> tuple[Pixels, Geometry]:
    """Cut a classifier's input f32 [size, size] in 0..1 out of a film [H, W] and its lungs.

    Pixels are blacked out on the film's own grid, before resampling, so that no trace of them is averaged in.
    """
    height, width = pixels.shape
    if not spec.crop:
        geometry = Geometry.letterbox((height, width), spec.size)
    elif spec.aligned:
        geometry = Geometry.along(lungs.right, lungs.left, spec.size, spec.margin)
    else:
        geometry = Geometry.around((height, width), lungs.box, spec.size, spec.margin)
    if spec.input in ("image", "outline"):
        view = geometry.to_network(pixels if spec.input == "image" else lungs.mask)
    else:
        view = geometry.masked(pixels, lungs.mask if spec.input == "lungs" else ~lungs.mask)
    if spec.equalised:
        view = equalised(np.rint(view * 255).astype(np.uint8)).astype(np.float32) / np.float32(255)
    return view, geometry


def equalised(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Histogram equalisation of a view u8 [V, V], leaving out what is black: 0 stays 0, and the other levels are spread
    evenly over 1..255 by their ranks. What exposure and processing made of a film's greys goes, their order stays."""
    counts = np.bincount(view.ravel(), minlength=256)
    counts[0] = 0
    below = np.cumsum(counts) - counts
    levels = np.rint(1 + 254 * (below + counts / 2) / max(1, counts.sum())).astype(np.uint8)
    levels[0] = 0
    return np.asarray(levels[view], np.uint8)


@dataclass(frozen=True)
class Conformal:
    """A class is in a film's set where its probability reaches the class's threshold.

    coverage: the share of each class's films whose set is to hold the true class, 0..1. thresholds: K probabilities.
    Class-conditional split conformal prediction: Vovk 2012, "Conditional validity of inductive conformal predictors".
    """

    coverage: float
    thresholds: tuple[float, ...]

    def holds(self, probabilities: ArrayLike) -> NDArray[np.bool_]:
        """Probabilities [..., K] → bool [..., K], the classes that are in the set."""
        return np.asarray(np.asarray(probabilities) >= np.asarray(self.thresholds), np.bool_)

    def answers(self, probabilities: ArrayLike) -> NDArray[np.bool_]:
        """Probabilities [..., K] → bool [...], whether the set is the most probable class alone."""
        held, leading = self.holds(probabilities), np.asarray(probabilities).argmax(-1)
        return np.asarray((held.sum(-1) == 1) & np.take_along_axis(held, leading[..., None], -1)[..., 0], np.bool_)


@dataclass(frozen=True)
class ClassifierSpec:
    """weights: the file. labels: K names. bias: K numbers, logits = mean(cam) + bias. view: what the network is shown.

    temperature: divides the logits before softmax (Guo et al. 2017, "On Calibration of Modern Neural Networks").
    conformal: None where none was fitted; the classifier then never abstains.
    mirror: logits; a view on which the largest leads by less than this is shown as its mirror image, too, and the mean
    of both answers counts. 0 never is.
    """

    weights: Weights
    labels: tuple[str, ...]
    bias: tuple[float, ...]
    view: ViewSpec
    temperature: float
    conformal: Conformal | None
    mirror: float = 0.0


@dataclass(frozen=True)
class Classification:
    """What the classifier says of one film.

    labels: K names. logits, bias: f32 [K]. probabilities: f32 [K], softmax(logits / temperature).
    cam: f32 [K, h, w] in logit units over the field of view of `geometry`; mean over the cells + bias = logits.
    label: the most probable one, also where `abstained`. mirrored: whether logits and cam are the mean of two answers,
    to the view and to its mirror image (`ClassifierSpec.mirror`).
    """

    labels: tuple[str, ...]
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    label: str
    cam: NDArray[np.float32]
    bias: NDArray[np.float32]
    geometry: Geometry
    view: ViewSpec
    temperature: float
    conformal: Conformal | None
    mirrored: bool = False

    @property
    def index(self) -> int:
        """Position of `label` in `labels`."""
        return self.labels.index(self.label)

    @property
    def lead(self) -> float:
        """How far the largest logit is above the next one."""
        return lead(self.logits)

    @property
    def conformal_set(self) -> tuple[str, ...] | None:
        """The classes that can not be ruled out at the stated coverage; None where none was fitted."""
        if self.conformal is None:
            return None
        held = self.conformal.holds(self.probabilities)
        return tuple(label for label, is_in in zip(self.labels, held, strict=True) if is_in)

    @property
    def abstained(self) -> bool:
        """Whether the conformal set is anything but the most probable class alone."""
        return self.conformal is not None and not self.conformal.answers(self.probabilities)

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "probability": float(self.probabilities[self.index]),
            "probabilities": dict(zip(self.labels, self.probabilities.tolist(), strict=True)),
            "logits": dict(zip(self.labels, self.logits.tolist(), strict=True)),
            "abstained": self.abstained,
            "conformal_set": None if self.conformal_set is None else list(self.conformal_set),
            "conformal_coverage": None if self.conformal is None else self.conformal.coverage,
            "temperature": self.temperature,
            "mirrored": self.mirrored,
            "input": self.view.input,
        }


class Classifier:
    """A compiled classifier. Safe to call from several threads."""

    def __init__(self, spec: ClassifierSpec, network: Network) -> None:
        self._spec = spec
        self._network = network

    def classify(self, film: Radiograph, lungs: LungMask) -> Classification:
        """Classify a film by its lungs. Raises LungscopeError if the network answers with NaN or infinity."""
        spec = self._spec
        image, geometry = lung_view(film.pixels, lungs, spec.view)
        logits, cam = self._answer(image)
        mirrored = lead(logits) < spec.mirror
        if mirrored:
            other, flipped = self._answer(np.ascontiguousarray(image[:, ::-1]))
            logits, cam = _mean(logits, other), _mean(cam, flipped[..., ::-1])
        probabilities = softmax(logits / np.float32(spec.temperature))
        best = int(np.argmax(probabilities))
        return Classification(
            labels=spec.labels,
            logits=logits,
            probabilities=probabilities,
            label=spec.labels[best],
            cam=cam,
            bias=np.asarray(spec.bias, np.float32),
            geometry=geometry,
            view=spec.view,
            temperature=spec.temperature,
            conformal=spec.conformal,
            mirrored=mirrored,
        )

    def _answer(self, image: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits f32 [K] and cam f32 [K, h, w] of a view f32 [S, S]."""
        result = self._network({"image": image[None, None]})
        logits, cam = result["logits"][0], result["cam"][0]
        if not (np.isfinite(logits).all() and np.isfinite(cam).all()):
            raise LungscopeError(
                f"The network {self._spec.weights.network} answered with numbers that are not finite. Try --device "
                "cpu; `lungscope doctor` tests the installation.",
                code="not-finite",
            )
        return logits, cam


def _mean(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray((one + other) / 2, np.float32)


def lead(logits: NDArray[np.float32]) -> float:
    """How far the largest of K logits is above the next one."""
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """exp(x) / sum exp(x) over the first axis of f32 [K, ...]."""
    shifted = np.exp(logits - logits.max(axis=0, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=0, keepdims=True), np.float32)
