"""Converts a checkpoint on disk to 8 bits, file to file, holding one tensor at a time."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptj_q8 import checks, convert, ops
from gptj_q8.checkpoint import adapters, card, naming, old, stored
from gptj_q8.checkpoint.directory import new_directory
from gptj_q8.checkpoint.files import find
from gptj_q8.checkpoint.report import ConversionReport, Errors, kind
from gptj_q8.checkpoint.rewriting import Rewriting
from gptj_q8.checkpoint.shards import Entry, Shard, Writer, parse_size, plan
from gptj_q8.checkpoint.source import copy_companions, empty_model, local_directory
from gptj_q8.codebooks import CODEBOOKS
from gptj_q8.config import FORMAT_VERSION, Q8Config
from gptj_q8.models import LEFTOVERS, RULES


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    config: Q8Config | None = None,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Writes the model in `source` to `target` in 8 bits, with its tokenizer and a model card.

    source: a directory or a Hub id (at `revision`), with safetensors or pytorch_model.bin, sharded
        or not.
    dtype: of the tensors that stay in float and of the layers' arithmetic; None keeps the model's.
    max_shard_size: of a weight file, in bytes or as "5GB".
    on_progress(done, total): called after each tensor, in bytes read.

    A checkpoint of the hivemind/gpt-j-6B-8bit family keeps its codes, scales and tables; `config`
    must ask for nothing else, and any adapters in it go to `target/adapter` as PEFT's.

    `target` comes to be when everything is written and on the disk; after any failure it is as it
    was. FileExistsError if it is not empty, unless `overwrite`, and then only a model directory is
    replaced, with the adapters that an earlier conversion put there, but never the source or other
    adapters. FileNotFoundError without weights or with a shard missing;
    ValueError for NaN or Inf, for damaged files, for a weight that is missing or of another shape,
    for an entry of modules_to_not_convert that matches no module, and for a model that is
    quantized already. TypeError for another dtype.
    """
    config = config or Q8Config()
    if dtype is not None:
        checks.float_dtype("convert_checkpoint", dtype)
    # Of a link, what it points to is replaced.
    target = Path(target).expanduser().resolve()
    if Path(source).is_dir() and Path(source).resolve() == target:
        raise FileExistsError(f"{target} is the source itself; choose another place")
    shard_bytes = parse_size(max_shard_size)
    replaced = [ADAPTER] if adapters.was_converted(target / ADAPTER) else []
    with new_directory(target, overwrite, replaced) as partial:
        directory = local_directory(source, revision)
        files = find(directory)
        stored_entries = stored.entries(files)
        job: Rewriting | _Quantizing
        if old.quantized_names(stored_entries):
            if config.to_dict() != Q8Config().to_dict():
                raise ValueError(
                    f"{source}: is in 8 bits already, which are kept; block_size, codebook and "
                    "modules_to_not_convert are for float models"
                )
            job = Rewriting(directory, stored_entries, dtype)
            if job.write_adapters(partial / ADAPTER, str(target)) and not replaced:
                _check_free(target / ADAPTER)
        else:
            job = _Quantizing(directory, stored_entries, config, dtype)
        entries = job.announce()
        metadata = {"format_version": str(FORMAT_VERSION)}
        writer = Writer(partial, entries, plan(entries, shard_bytes), metadata)
        total = sum(entry.bytes for entry in job.entries.values())
        done = 0
        for name, tensors in job.run():
            for part, tensor in tensors.items():
                writer.write(part, tensor)
            done += job.entries[name].bytes
            if on_progress is not None:
                on_progress(done, total)
        writer.write(*job.guard)
        writer.close()
        job.model_config.save_pretrained(partial)
        copy_companions(directory, partial)
        before = sum(path.stat().st_size for path in files)
        after = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        report = job.report(before, after)
        written = job.model_config.quantization_config
        if not card.is_by_a_person(target):  # else it moves to the new directory
            card.write(partial, written, source, report.weights, report.layers, directory)
    return report


# Where in the target the adapters go.
ADAPTER = "adapter"


def _check_free(place: Path) -> None:
    if place.exists():
        raise FileExistsError(
            f"{place} was not written by a conversion and would be lost; move it elsewhere"
        )


@dataclass(frozen=True)
class _Layer:
    """What is known of a layer to quantize. turn: from its weight's layout to that of codes."""

    kind: str
    turn: Callable[[Tensor], Tensor]

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.turn(torch.empty(shape, device="meta")).shape)


class _Quantizing:
    """One conversion: which tensors there are, what becomes of each, and its error."""

    def __init__(
        self,
        directory: Path,
        entries: dict[str, Entry],
        config: Q8Config,
        dtype: torch.dtype | None,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.errors = Errors()
        self.model_config, skeleton = empty_model(directory)
        convert.check_exemptions("convert_checkpoint", skeleton, config)
        self.rule = RULES.get(self.model_config.model_type)
        self.entries = entries
        self.shards = {file: Shard(file) for file in {entry.file for entry in entries.values()}}
        known = naming.model_names(skeleton, self.entries)
        for name in _leftovers(skeleton, known):
            del self.entries[known.pop(name)]

        groups = convert.targets(skeleton, config, skeleton.all_tied_weights_keys)
        # Weights to quantize, by name; second copies of tied weights -> the first.
        self.layers: dict[str, _Layer] = {}
        self.copies: dict[str, str] = {}
        self._sort(directory, skeleton, groups, known)
        if not self.layers:
            raise ValueError(f"{directory}: holds no weight of an nn.Linear or nn.Embedding")
        convert.warn_of_float(skeleton, groups, config)
        first = next(iter(self.layers))
        self.guard = stored.guard(first.removesuffix(".weight"))
        self.kept = sorted(convert.left_in_float(skeleton, groups))
        self.model_config.quantization_config = config
        if dtype is not None or self.model_config.dtype is None:
            # Where config.json says nothing, Transformers would go by absmax, which is float32.
            self.model_config.dtype = dtype or self.entries[first].dtype

    def _sort(
        self,
        directory: Path,
        skeleton: Any,
        groups: Iterable[Sequence[str]],
        known: Mapping[str, str],
    ) -> None:
        prefix = skeleton.base_model_prefix
        body_alone = hasattr(skeleton, prefix) and not any(
            name.startswith(f"{prefix}.") for name in known
        )
        tied = skeleton.all_tied_weights_keys
        for group in groups:
            sources = [n for n in group if f"{n}.weight" not in tied]
            found = [
                f"{base}.weight"
                for name in [*sources, *(n for n in group if n not in sources)]
                if (base := naming.base_name(name, prefix, "weight", known))
            ]
            module = skeleton.get_submodule(group[0])
            if found:
                for name in found:
                    stored.check_shape(self.entries, name, module.weight.shape)
                turn = convert.stand_in_of(module).turn
                self.layers[found[0]] = _Layer(kind(group[0]), turn)
                self.copies.update(dict.fromkeys(found[1:], found[0]))
            elif not body_alone or group[0].startswith(f"{prefix}."):
                raise ValueError(
                    f"{directory}: lacks {group[0]}.weight; if Transformers makes it of other "
                    "tensors, load the model with quantization_config=Q8Config() and save it"
                )

    def announce(self) -> dict[str, Entry]:
        """Returns what will be written, in the order in which `run` gives it."""
        written = {}
        for name, entry in self.entries.items():
            for part, (dtype, shape) in self._parts(name, entry).items():
                written[part] = Entry(dtype, shape, entry.file)
        guard, empty = self.guard
        written[guard] = Entry(empty.dtype, tuple(empty.shape), "")
        return written

    def _parts(
        self, name: str, entry: Entry
    ) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        if name in self.copies:
            return {}
        if name not in self.layers:
            cast = self.dtype is not None and entry.dtype in checks.FLOATS
            return {name: (self.dtype if cast else entry.dtype, entry.shape)}
        base = name.removesuffix(".weight")
        blocks = math.ceil(entry.numel / self.config.block_size)
        return {
            f"{base}.codes": (torch.uint8, self.layers[name].codes_shape(entry.shape)),
            f"{base}.absmax": (torch.float32, (blocks,)),
            f"{base}.codebook": (torch.float32, (256,)),
        }

    def run(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Gives the name of each source tensor with what becomes of it."""
        for name, entry in self.entries.items():
            tensor = self.shards[entry.file].read(name)
            if name in self.copies:
                first = self.copies[name]
                if not torch.equal(tensor, self.shards[self.entries[first].file].read(first)):
                    raise ValueError(
                        f"{entry.file}: {name} differs from {first}, "
                        "though config.json says that they are tied"
                    )
                yield name, {}
            elif name in self.layers:
                yield name, self._quantize(name, tensor)
            else:
                ((part, (dtype, _)),) = self._parts(name, entry).items()
                yield name, {part: tensor.to(dtype)}

    def _quantize(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        checks.float_dtype(self.entries[name].file, weight.dtype, name)
        convert.refuse_not_finite({name: weight})
        layer, block_size = self.layers[name], self.config.block_size
        weight = layer.turn(weight)
        codebook = CODEBOOKS[self.config.codebook](weight, block_size)
        codes, absmax = ops.quantize(weight, codebook, block_size)
        self.errors.add(layer.kind, weight, codes, absmax, codebook, block_size)
        base = name.removesuffix(".weight")
        parts = (codes, absmax, codebook)
        return {f"{base}.{part}": t for part, t in zip(stored.PARTS, parts, strict=True)}

    def report(self, bytes_before: int, bytes_after: int) -> ConversionReport:
        """Returns the report; the sizes are those of the weight files."""
        size = sum(
            entry.bytes
            for name, entry in self.announce().items()
            if name.rpartition(".")[2] in stored.PARTS
        )
        matrices = self.rule.matrices if self.rule else ()
        layers = self.errors.by_kind(matrices)
        weights = sum(layer.weights for layer in layers)
        return ConversionReport(
            block_size=self.config.block_size,
            codebook=self.config.codebook,
            bytes_before=bytes_before,
            bytes_after=bytes_after,
            weights=weights,
            bits_per_weight=8 * size / weights,
            layers=layers,
            kept=self.kept,
        )


def _leftovers(skeleton: Any, names: Iterable[str]) -> list[str]:
    """Returns those of the names that an old checkpoint has and today's model has no use for."""
    ignored = re.compile(
        "|".join([*(skeleton._keys_to_ignore_on_load_unexpected or ()), *LEFTOVERS])
    )
    prefix = skeleton.base_model_prefix
    own = {name.removeprefix(f"{prefix}.") for name in skeleton.state_dict()}
    return [n for n in names if n.removeprefix(f"{prefix}.") not in own and ignored.search(n)]
