"""Films and labels of stores as torch data sets, and the seeded order in which an epoch sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.utils.data import Dataset, Sampler

from lungscope.data.store import Store
from lungscope.stages.classification import equalised
from lungscope.stages.severity import NORMAL


class MaskedFilms(Dataset[tuple[Tensor, Tensor, int, bool]]):
    """Films that have a lung mask: (film u8 [1, S, S], mask u8 [1, S, S] 0/255, index of the store, whether its lungs
    are clear, which those of the class Normal are). Strata are the classes of each store."""

    def __init__(self, chosen: Sequence[tuple[Store, Sequence[int]]]) -> None:
        self.stores = [store for store, _ in chosen]
        self.items = [(s, i) for s, (store, indices) in enumerate(chosen) for i in indices if store.records[i].mask]
        kinds = [(s, self.stores[s].records[i].label) for s, i in self.items]
        self.clear = sum(label == NORMAL for _, label in kinds)
        self.strata = _numbered(kinds)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, int, bool]:
        s, i = self.items[n]
        store = self.stores[s]
        film, mask = (torch.from_numpy(array[i][None].copy()) for array in (store.images, store.masks))
        return film, mask, s, store.records[i].label == NORMAL


class LabelledViews(Dataset[tuple[Tensor, int]]):
    """Classifier inputs: (view u8 [1, V, V], class index). `views` is u8 [N, V, V], `labels` i64 [N].

    equalise: see `ViewSpec.equalised`. sources: where each of the N films came from. Strata are the classes, and
    `by_source` the sources of each class.
    """

    def __init__(
        self,
        views: NDArray[np.uint8],
        labels: NDArray[np.int64],
        indices: Sequence[int],
        *,
        equalise: bool = False,
        sources: Sequence[str] = (),
    ) -> None:
        self.views, self.labels, self.indices, self.equalise = views, labels, list(indices), equalise
        self.strata = [int(labels[i]) for i in self.indices]
        self.sources = [sources[i] for i in self.indices] if sources else [""] * len(self.indices)

    @property
    def by_source(self) -> list[int]:
        return _numbered(list(zip(self.strata, self.sources, strict=True)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        i = self.indices[n]
        view = equalised(self.views[i]) if self.equalise else self.views[i].copy()
        return torch.from_numpy(view[None]), int(self.labels[i])


def _numbered(kinds: Sequence[Hashable]) -> list[int]:
    """The number of each item's kind, in the order in which kinds first come."""
    number = {kind: n for n, kind in enumerate(dict.fromkeys(kinds))}
    return [number[kind] for kind in kinds]


class EpochSampler(Sampler[int]):
    """The order of one epoch: a function of the seed and the epoch alone, so that a resumed run sees what it would
    have seen.

    `strata` given: films are drawn with replacement, each stratum equally often; else no film twice, shuffled.
    `films`: how many are drawn; 0 is as many as there are. Of several processes that train together each takes its
    share of the same order, all shares of one length.
    """

    def __init__(self, n: int, *, seed: int, strata: Sequence[int] | None = None, films: int = 0) -> None:
        self.n, self.seed, self.epoch = n, seed, 0
        self.films = films if strata is not None and films else min(films or n, n)
        self.weights: Tensor | None = None
        if strata is not None:
            count = Counter(strata)
            self.weights = torch.tensor([1 / count[s] for s in strata], dtype=torch.float64)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.films // rank_and_world_size()[1]

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.weights is None:
            order = torch.randperm(self.n, generator=generator)[: self.films]
        else:
            order = torch.multinomial(self.weights, self.films, replacement=True, generator=generator)
        rank, size = rank_and_world_size()
        yield from order[rank::size][: len(self)].tolist()


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and how many processes train together: (0, 1) where one trains alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
