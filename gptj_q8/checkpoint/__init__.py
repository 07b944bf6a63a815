"""Checkpoints on disk: their files, what 8-bit ones hold, and conversion from file to file."""

from gptj_q8.checkpoint.conversion import ADAPTER, convert_checkpoint
from gptj_q8.checkpoint.report import ConversionReport, LayerError

__all__ = ["ADAPTER", "ConversionReport", "LayerError", "convert_checkpoint"]
