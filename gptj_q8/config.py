"""Q8Config: how a model is quantized, as `quantization_config` in config.json holds it."""

from collections.abc import Iterable
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from gptj_q8 import checks, codebooks

QUANT_METHOD = "gptj_q8"
FORMAT_VERSION = 1


class Q8Config(QuantizationConfigMixin):
    """What `quantize_` and `from_pretrained(quantization_config=...)` do to a model.

    block_size: weights that share one scale, a power of two from 32 to 4096.
    codebook: "fitted" (to each weight, the least squared error), "dynamic" (bitsandbytes' map) or
        "linear" (int8); see `gptj_q8.codebooks`.
    modules_to_not_convert: names of modules to leave as they are. An entry exempts every module
        whose name contains it as whole components: "lm_head", "h.0", "attn.out_proj".
    format_version: of the stored tensors; this package writes and reads version 1.

    ValueError or TypeError for anything else.
    """

    def __init__(
        self,
        block_size: int = 256,
        codebook: str = "fitted",
        modules_to_not_convert: Iterable[str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(
                f"Q8Config: quant_method must be {QUANT_METHOD!r}, got {quant_method!r}"
            )
        check_format_version(format_version, "Q8Config")
        _check_block_size(block_size)
        codebooks.check_name("Q8Config", codebook)
        self.quant_method = quant_method
        self.format_version = format_version
        self.block_size = block_size
        self.codebook = codebook
        self.modules_to_not_convert = _names(modules_to_not_convert)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Builds from config.json's `quantization_config`; ValueError if it cannot be one of ours.

        The stored tensors carry their own tables, so any codebook name will do here.
        """
        # A newer version may have fields that this one does not know: say the reason first.
        check_format_version(config_dict.get("format_version", FORMAT_VERSION), "config.json")
        stored = dict(config_dict)
        codebook = stored.pop("codebook", "fitted")
        try:
            made = super().from_dict(stored, *args, **kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config.json: its quantization_config is damaged: {error}") from error
        config = made[0] if isinstance(made, tuple) else made
        config.codebook = codebook
        return made


def check_format_version(version: object, where: str) -> None:
    """ValueError unless this package reads format `version`; `where` says where it stands."""
    # config.json holds a number, safetensors metadata a string.
    text = str(version)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{where}: format_version must be a positive integer, got {version!r}")
    if int(text) > FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version {text} is newer than {FORMAT_VERSION}, the newest that this "
            "gptj_q8 reads; upgrade with: pip install --upgrade gptj_q8"
        )


def _check_block_size(block_size: object) -> None:
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"Q8Config: block_size must be an int, got {type(block_size).__name__}")
    checks.block_size_is_valid("Q8Config", block_size)


def _names(entries: Iterable[str] | None) -> list[str] | None:
    if entries is None:
        return None
    if isinstance(entries, str):
        raise TypeError(f"Q8Config: modules_to_not_convert must be a list, got {entries!r}")
    names = list(entries)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"Q8Config: modules_to_not_convert must hold names, got {name!r}")
    return names
