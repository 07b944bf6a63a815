"""Rewrites a checkpoint of the hivemind family in our format, holding one tensor at a time.

Codes, scales and tables stay bit for bit what they are, but that a table whose levels are not in
ascending order gets sorted and the codes renumbered: they decode to the same bits.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptj_q8 import checks, convert
from gptj_q8.checkpoint import adapters, naming, old, stored
from gptj_q8.checkpoint.report import ConversionReport, LayerError, kind
from gptj_q8.checkpoint.shards import Entry, Shard
from gptj_q8.checkpoint.source import empty_model
from gptj_q8.config import Q8Config
from gptj_q8.nn.parts import (
    HIVEMIND_BLOCK_SIZE,
    HIVEMIND_NAMES,
    check_stored_parts,
    sort_levels,
)


class Rewriting:
    """One such conversion: which tensors there are and what becomes of each.

    directory: of the model; entries: all that its weight files hold; dtype: for what is float,
    None to leave it. ValueError or TypeError, naming file and tensor, for what does not fit.
    """

    def __init__(
        self, directory: Path, entries: dict[str, Entry], dtype: torch.dtype | None
    ) -> None:
        self.model_config, self._model = empty_model(directory)
        old.check(entries)
        old.check_model(entries, self._model)
        self._adapters = adapters.find(entries, self._model)
        self._stored = entries
        self._renamed = old.renamed(entries)
        self._dtype = dtype
        self._shards = {file: Shard(file) for file in {entry.file for entry in entries.values()}}
        self._modules = old.quantized_names(entries)
        # What will be read, in this order.
        self.entries = {n: entry for n, entry in entries.items() if not old.is_dropped(n)}
        self.guard = stored.guard(self._modules[0])
        self.model_config.quantization_config = Q8Config(HIVEMIND_BLOCK_SIZE, old.CODEBOOK)
        if dtype is not None or self.model_config.dtype is None:
            # Where config.json says nothing, Transformers would go by absmax, which is float32.
            dtypes = [entry.dtype for entry in self._renamed.values() if not entry.name]
            floats = [each for each in dtypes if each in checks.FLOATS]
            self.model_config.dtype = dtype or next(iter(floats), torch.float32)

    def announce(self) -> dict[str, Entry]:
        """Returns what will be written."""
        written = {name: self._as_written(entry) for name, entry in self._renamed.items()}
        guard, empty = self.guard
        written[guard] = Entry(empty.dtype, tuple(empty.shape), "")
        return written

    def _as_written(self, entry: Entry) -> Entry:
        if entry.name or self._dtype is None or entry.dtype not in checks.FLOATS:
            return entry
        return Entry(self._dtype, entry.shape, entry.file)

    def run(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Gives the name of each source tensor with what becomes of it."""
        parts = {f"{m}.{part}": m for m in self._modules for part in HIVEMIND_NAMES.values()}
        for name, entry in self.entries.items():
            if name not in parts:
                yield name, {name: self._read(name).to(self._as_written(entry).dtype)}
            elif name.endswith(f".{HIVEMIND_NAMES['codes']}"):
                yield name, self._quantized(parts[name])
            else:
                yield name, {}  # goes with its codes

    def _quantized(self, module: str) -> dict[str, Tensor]:
        codes, absmax, codebook = (
            self._read(f"{module}.{part}") for part in HIVEMIND_NAMES.values()
        )
        codes, codebook = sort_levels(codes, codebook.float())
        tensors = {"codes": codes, "absmax": absmax.float(), "codebook": codebook}
        file = self._stored[f"{module}.{HIVEMIND_NAMES['absmax']}"].file
        check_stored_parts(f"{file}: {module}", tensors, "")
        return {f"{module}.{part}": tensor for part, tensor in tensors.items()}

    def _read(self, name: str) -> Tensor:
        return self._shards[self._stored[name].file].read(name)

    def write_adapters(self, directory: Path, base: str) -> bool:
        """Writes the adapters as PEFT's; False if there are none. base: where the model will be."""
        if self._adapters:
            config = adapters.peft_config(self._adapters, self._model, base)
            state = adapters.peft_state(self._adapters, self._stored, self._shards)
            adapters.save(directory, config, state)
        return bool(self._adapters)

    def report(self, bytes_before: int, bytes_after: int) -> ConversionReport:
        """Returns the report: nothing was quantized, so no layer has an error."""
        sizes: dict[str, list[int]] = {}
        for module in self._modules:
            weights = self._renamed[f"{module}.codes"].numel
            sizes.setdefault(kind(module), []).append(weights)
        layers = [LayerError(name, len(each), sum(each), 0.0) for name, each in sizes.items()]
        weights = sum(layer.weights for layer in layers)
        size = sum(entry.bytes for entry in self._renamed.values() if entry.name)
        prefix, modules = self._model.base_model_prefix, dict(self._model.named_modules())
        taken = [[naming.module_name(name, prefix, modules) or name] for name in self._modules]
        return ConversionReport(
            block_size=HIVEMIND_BLOCK_SIZE,
            codebook=old.CODEBOOK,
            bytes_before=bytes_before,
            bytes_after=bytes_after,
            weights=weights,
            bits_per_weight=8 * size / weights,
            layers=layers,
            kept=sorted(convert.left_in_float(self._model, taken)),
            rewritten=True,
            adapters=len(self._adapters),
        )
