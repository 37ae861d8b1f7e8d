"""What searches have read of the points of an embedded collection, kept in memory for the next search.

The engine reads and parses a whole payload for each candidate, which takes longer than to find it. The features of a
point do not change until somebody stores or removes it, and only this process can do so.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from d2llm.types import RESERVED, Bytes

from .points import FEATURES, POINT, decoded_features

Payloads: TypeAlias = Mapping[uuid.UUID, dict[str, Any]]
CACHE_BYTES = 256 * 2**20
"""Memory that the cache of a collection may take. It takes no more than the points need that were found."""
HEAD_BYTES = 600
"""Memory of a point beside its features, roughly."""


class Known(NamedTuple):
    """What a cache knows of K points.

    `payloads` hold the reserved key alone, without features and with `POINT`, the point's own id. Nobody may change
    them. `features` are [K, P] uint8.
    """

    payloads: list[dict[str, Any]]
    features: Bytes


class FeatureCache:
    """Features, ids and versions of points that searches found. It holds `most` points; those it took in first go
    first. Not thread-safe."""

    def __init__(self, feature_bytes: int) -> None:
        self.most = max(1, CACHE_BYTES // (feature_bytes + HEAD_BYTES))
        self._rows: dict[int, int] = {}  # by the number of the point's id: a number is compared faster than a UUID
        self._points: list[int] = []  # of each row
        self._payloads: list[dict[str, Any]] = []
        self._features = np.empty((self.most, feature_bytes), np.uint8)  # the system gives memory for rows in use
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def known(self, points: Sequence[uuid.UUID], read: Callable[[list[uuid.UUID]], Payloads]) -> Known:
        """Return what is known of `points`, at most `most`. `read` returns the payloads of those that are not known.

        Raises:
            LookupError: `read` does not return all of them.
        """
        while -1 in (rows := [self._rows.get(point.int, -1) for point in points]):
            missing = [point for point, row in zip(points, rows, strict=True) if row < 0]
            payloads = read(missing)
            if len(payloads) < len(missing):
                raise LookupError(f"the engine found {len(missing)} points and read {len(payloads)} of them")
            self.keep(payloads)  # this may drive out other points of these, so look again
        return Known([self._payloads[row] for row in rows], self._features.take(rows, axis=0))

    def forget(self, points: Iterable[str]) -> None:
        """Forget points, which are about to change."""
        if self._rows:
            for point in points:
                self._rows.pop(uuid.UUID(point).int, None)

    def fill(self, payloads: Payloads) -> bool:
        """Take in as many points as there is room for, and say whether there is room for more."""
        new = [(point, payload) for point, payload in payloads.items() if point.int not in self._rows]
        self.keep(dict(new[: self.most - len(self)]))
        return len(self) < self.most

    def keep(self, payloads: Payloads) -> None:
        """Take in the payloads of points, of which the reserved key is read."""
        reserved = [payload[RESERVED] for payload in payloads.values()]
        features = decoded_features(reserved, self._features.shape[1])
        for point, values, features_P in zip(payloads, reserved, features, strict=True):
            row, self._next = self._next, (self._next + 1) % self.most
            if row == len(self._points):
                self._points.append(point.int)
                self._payloads.append({})
            elif self._rows.get(former := self._points[row]) == row:
                del self._rows[former]
            self._rows[point.int], self._points[row] = row, point.int
            head = {key: value for key, value in values.items() if key != FEATURES}
            self._payloads[row] = {RESERVED: {**head, POINT: point}}
            self._features[row] = features_P
