"""Arrays into safetensors of a bounded size, written as they fill."""

import json
from pathlib import Path

import mlx.core as mx

_LARGEST = 1 << 30  # bytes held, and written to one file


class ShardWriter:
    """Collects arrays; a full shard goes to the disk at once. A single one gets the plain name and no index."""

    def __init__(self, folder: Path, largest: int = _LARGEST) -> None:
        """Write into this folder, files of at most this many bytes where a tensor isn't larger itself."""
        self._folder, self._largest = folder, largest
        self._held: dict[str, mx.array] = {}
        self._written: list[list[str]] = []  # names of the tensors in each file
        self.bytes = 0

    def add(self, arrays: dict[str, mx.array]) -> None:
        """Take evaluated arrays."""
        size = sum(array.nbytes for array in arrays.values())
        if self._held and sum(array.nbytes for array in self._held.values()) + size > self._largest:
            self._flush()
        self._held.update(arrays)
        self.bytes += size

    def finish(self) -> None:
        """Write what is left, name the files by their count, write the index."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        places = {}
        for number, names in enumerate(self._written):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / name)
            places.update(dict.fromkeys(names, name))
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(places.items()))}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"

    def _flush(self) -> None:
        if self._held:
            mx.save_safetensors(str(self._part(len(self._written))), self._held, metadata={"format": "mlx"})
            self._written.append(sorted(self._held))
            self._held = {}
