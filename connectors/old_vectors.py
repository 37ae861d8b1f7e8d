"""The vectors that another program searches in its own collection, and how a collection of d2llm keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .schema import SPARSE, VECTOR, KeptVector

UNNAMED = "old"
"""What the vector of a collection is called that has no name there."""


@dataclass(frozen=True)
class OldVectors:
    """The vectors of a collection: `names` are those that can be kept, `{name: name in the new collection}`, `kept` are
    their size and distance by the new name, and `left_out` the others, `{name: kind}`."""

    names: Mapping[str, str]
    kept: Mapping[str, KeptVector]
    left_out: Mapping[str, str]

    @classmethod
    def of(cls, params: Any) -> OldVectors:
        """Those of a collection with the parameters `params`, as qdrant-client has them."""
        dense = params.vectors if isinstance(params.vectors, dict) else {"": params.vectors} if params.vectors else {}
        left_out = {name: "multi-vectors" for name, vector in dense.items() if vector.multivector_config}
        names, kept = dict[str, str](), dict[str, KeptVector]()
        for name in sorted(dense.keys() - left_out.keys()):
            new = name or UNNAMED
            while new in (VECTOR, SPARSE) or (new != name and new in dense):
                new = f"{UNNAMED}-{new}"
            names[name] = new
            kept[new] = KeptVector(size=dense[name].size, distance=dense[name].distance.value)
        return cls(names, kept, {**left_out, **dict.fromkeys(params.sparse_vectors or {}, "sparse vectors")})

    @property
    def selector(self) -> list[str] | bool:
        """What to ask the client for."""
        return True if "" in self.names else sorted(self.names)

    def of_point(self, vector: Any) -> dict[str, list[float]]:
        """The vectors of a point, by their new names, from the `vector` of its record.

        Raises:
            ValueError: one is missing, or has another size than the collection says.
        """
        found = vector if isinstance(vector, dict) else {"": vector}
        vectors = dict[str, list[float]]()
        for name, new in self.names.items():
            if (one := found.get(name)) is None:
                raise ValueError(f"it has no vector {name!r} to keep" if name else "it has no vector to keep")
            if len(one) != self.kept[new].size:
                raise ValueError(f"its vector {name!r} has size {len(one)}, its collection says {self.kept[new].size}")
            vectors[new] = list(one)
        return vectors
