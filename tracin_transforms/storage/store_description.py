"""What the gradient factors of a store are of, and whether others belong into the same one."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import Shard
from tracin_transforms.core.sketching import Sketch
from tracin_transforms.storage.manifest import differences

FORMAT = 2


@dataclass(frozen=True)
class StoreDescription:
    """What the factors of a store are of.

    Attributes:
        factors: What determines them but for checkpoints and shards: model, layers, loss,
            precision, dtype, sketch if they are sketches, source of the examples; JSON values.
        checkpoints: id, path, step, learning rate and content hash of each, in order.
        shards: The shards of the source.
        loading: How checkpoints become models, for queries; not part of what tells stores apart.
    """

    factors: dict[str, Any]
    checkpoints: tuple[dict[str, Any], ...]
    shards: tuple[Shard, ...]
    loading: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoint_ids(self) -> tuple[str, ...]:
        """The checkpoints' ids, in order."""
        return tuple(checkpoint["id"] for checkpoint in self.checkpoints)

    @property
    def sketch(self) -> Sketch | None:
        """How the factors were projected; None where they are the gradients' own."""
        return Sketch.from_json(self.factors["sketch"]) if "sketch" in self.factors else None

    @property
    def sorting_weights(self) -> dict[str, float]:
        """Weights by checkpoint id, by which a shard's rows are sorted: η_k, if all are known."""
        rates = [checkpoint["learning_rate"] for checkpoint in self.checkpoints]
        alike = None in rates
        return {
            name: 1.0 if alike else rate
            for name, rate in zip(self.checkpoint_ids, rates, strict=True)
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the description as JSON values."""
        return {
            "format": FORMAT,
            "factors": self.factors,
            "checkpoints": list(self.checkpoints),
            "shards": [[shard.name, shard.count, shard.size] for shard in self.shards],
            "loading": self.loading,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "StoreDescription":
        """Returns the description that `to_json` gave."""
        return cls(
            document["factors"],
            tuple(document["checkpoints"]),
            tuple(Shard(name, count=n, size=size) for name, n, size in document["shards"]),
            document["loading"],
        )

    def extended(
        self, wanted: "StoreDescription", stored: Mapping[str, Collection[str]]
    ) -> "StoreDescription":
        """Returns the description of a store that holds what both describe.

        What no shard holds in full and is not wanted any more is left out: shards that were
        never complete, and checkpoints that some shards lack.

        Args:
            wanted: What a command would add.
            stored: The ids of the checkpoints of each shard that is there.

        Raises:
            InputError: The two do not belong into one store, or what is wanted would leave shards
                without some of the checkpoints; the message says what differs.
        """
        self._check_same(wanted, stored)
        ids = set(wanted.checkpoint_ids)
        kept = [
            c
            for c in self.checkpoints
            if c["id"] not in ids and all(c["id"] in there for there in stored.values())
        ]
        new = [shard.name for shard in wanted.shards if shard.name not in stored]
        if kept and new:
            raise InputError(
                f"has factors at checkpoint {kept[0]['id']!r}, too, which this command does not "
                f"name, and no factors of {len(new)} of its shards (first: {new[0]}): name all "
                "checkpoints of the store"
            )
        checkpoints = [*kept, *wanted.checkpoints]
        return StoreDescription(
            self.factors,
            tuple(sorted(checkpoints, key=lambda c: (c["step"], c["id"]))),
            wanted.shards,
            self.loading,
        )

    def _check_same(
        self, wanted: "StoreDescription", stored: Mapping[str, Collection[str]]
    ) -> None:
        found = differences(self.factors, wanted.factors)
        for kind in ("checkpoints", "shards"):
            known, others = self._by_name(kind), wanted._by_name(kind)
            for name in known.keys() & others.keys():
                if kind == "checkpoints" or name in stored:
                    found += differences(known[name], others[name], f"{kind[:-1]} {name!r}")
        gone = stored.keys() - wanted._by_name("shards").keys()
        found += [f"shard {name!r} is not among the examples here" for name in sorted(gone)[:1]]
        if found:
            raise InputError(
                f"holds other gradient factors: {'; '.join(sorted(found)[:3])}. Choose another "
                "directory, or replace it with --overwrite"
            )

    def _by_name(self, kind: str) -> dict[str, Any]:
        if kind == "shards":
            return {shard.name: [shard.count, shard.size] for shard in self.shards}
        # Where a file lies does not make it another.
        return {c["id"]: {k: c[k] for k in c if k != "path"} for c in self.checkpoints}
