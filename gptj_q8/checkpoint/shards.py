"""Weight files: reads what Transformers reads, writes safetensors.

Nothing here knows what a tensor means.
"""

import errno
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What reading a pickle of random bytes can raise beside what PyTorch means to raise.
_DAMAGED_PICKLE = (AttributeError, LookupError, OverflowError, TypeError, ValueError)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor.

    dtype: None for one that this package has no use for. name: in the file, where that is another
    than the name that the entry is listed by.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: str
    name: str = ""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.numel * (self.dtype.itemsize if self.dtype else 0)


class Shard:
    """One weight file, safetensors or a PyTorch pickle (of which only tensors are read).

    ValueError, naming the file, when it is truncated or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._pickled: dict[str, Tensor] | None = None
        if self.path.suffix == ".safetensors":
            with self._damage_named():
                self._file = safe_open(self.path, framework="pt")
                self.metadata = self._file.metadata() or {}

    def entries(self) -> dict[str, Entry]:
        """Returns what the file holds, by name, without reading the data."""
        file = str(self.path)
        if self.path.suffix != ".safetensors":
            with self._damage_named():
                tensors = _tensors(torch.load(self.path, map_location="meta", weights_only=True))
            return {
                name: Entry(_known(tensor.dtype), tuple(tensor.shape), file)
                for name, tensor in tensors.items()
            }
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        return {
            name: Entry(_DTYPES.get(part.get_dtype()), tuple(part.get_shape()), file)
            for name, part in slices.items()
        }

    def read(self, name: str) -> Tensor:
        """Returns a tensor whose data stays in the file's pages, where the format lets it."""
        if self.path.suffix == ".safetensors":
            tensor: Tensor = self._file.get_tensor(name)
            return tensor
        if self._pickled is None:
            with self._damage_named():
                self._pickled = _load_pickle(self.path)
        return self._pickled[name]

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except pickle.UnpicklingError as error:
            # PyTorch's message advises to load the file unsafely.
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            if wanted is None:
                raise ValueError(
                    f"{self.path}: truncated or damaged, or no plain state dict"
                ) from error
            raise ValueError(
                f"{self.path}: refused, for it is no plain state dict: it asks for {wanted[1]}, "
                "which was not run"
            ) from error
        except (SafetensorError, RuntimeError, EOFError, *_DAMAGED_PICKLE) as error:
            raise ValueError(f"{self.path}: truncated or damaged: {error}") from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # as PyTorch seeks in half a file
                raise
            raise ValueError(f"{self.path}: truncated or damaged") from error


def _tensors(state: object) -> dict[str, Tensor]:
    """The tensors of what a pickle held."""
    if not isinstance(state, Mapping):
        raise RuntimeError(f"it holds no state dict but a {type(state).__name__}")
    found = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if unnamed := [name for name in found if not isinstance(name, str)]:
        raise RuntimeError(f"it holds a tensor whose name is no text but {unnamed[0]!r}")
    if state and not found:  # such as a state dict within a dict
        raise RuntimeError(f"it holds no tensors but {', '.join(map(repr, list(state)[:3]))}")
    return found


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        if "mmap" not in str(error):
            raise
        state = torch.load(path, map_location="cpu", weights_only=True)
    return _tensors(state)


def plan(entries: Mapping[str, Entry], max_shard_size: int) -> list[list[str]]:
    """Deals the tensors, in order, to shards of at most `max_shard_size` bytes where possible."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.bytes
    return shards


class Writer:
    """Writes a checkpoint of safetensors tensor by tensor, holding none of them.

    directory: where; entries: every tensor to come, in the order of coming; shards: from `plan`.
    OSError if the disk has too little room for them.
    """

    def __init__(
        self,
        directory: Path,
        entries: Mapping[str, Entry],
        shards: Sequence[Sequence[str]],
        metadata: Mapping[str, str],
    ) -> None:
        count = len(shards)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            files = [WEIGHTS]
        total = sum(entry.bytes for entry in entries.values())
        _check_space(directory, total)
        self._places: dict[str, tuple[Path, int, Entry]] = {}
        self._pending = set(entries)
        for file, names in zip(files, shards, strict=True):
            self._create(directory / file, {name: entries[name] for name in names}, metadata)
        if count > 1:
            weight_map = {name: place[0].name for name, place in sorted(self._places.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _create(
        self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
        offsets = {}
        end = 0
        # Widest first, as safetensors' own writer has it, so that every tensor is aligned.
        for name, entry in sorted(entries.items(), key=lambda item: -_dtype(*item).itemsize):
            offsets[name] = end
            end += entry.bytes
            header[name] = {
                "dtype": _NAMES[_dtype(name, entry)],
                "shape": list(entry.shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            start = file.tell()
            file.truncate(start + end)
        for name, offset in offsets.items():
            self._places[name] = (path, start + offset, entries[name])

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one of the tensors announced. ValueError if it is not as announced."""
        path, offset, entry = self._places[name]
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"{name}: announced as {entry.dtype} {list(entry.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        with path.open("r+b", buffering=0) as file:
            file.seek(offset)
            if entry.bytes:
                left = tensor.contiguous().flatten().view(torch.uint8).numpy().data
                while left:
                    left = left[file.write(left) :]
        self._pending.discard(name)

    def close(self) -> None:
        """ValueError if a tensor never came."""
        if self._pending:
            raise ValueError(f"not written: {', '.join(sorted(self._pending))}")


def _check_space(directory: Path, size: int) -> None:
    # Told now rather than after minutes of work.
    free = shutil.disk_usage(directory).free
    if free < size:
        message = f"No space left: {size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, message, str(directory))


def _known(dtype: torch.dtype) -> torch.dtype | None:
    return dtype if dtype in _NAMES else None


def _dtype(name: str, entry: Entry) -> torch.dtype:
    if entry.dtype is None:
        raise ValueError(f"{entry.file}: {name} is of a dtype that gptj_q8 cannot copy")
    return entry.dtype


def parse_size(size: int | str) -> int:
    """Returns a number of bytes from an int or a text such as "500MB" or "5GB"."""
    if isinstance(size, int):
        found = size
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B", size.strip().upper())
        if match is None:
            raise ValueError(f'max_shard_size must look like "500MB" or "5GB", got {size!r}')
        found = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))
    if found <= 0:
        raise ValueError(f"max_shard_size must be positive, got {size!r}")
    return found
