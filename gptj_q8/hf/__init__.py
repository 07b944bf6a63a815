"""8-bit models in Transformers. Importing this package registers its quantizer there."""

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from gptj_q8.config import QUANT_METHOD, Q8Config
from gptj_q8.hf.quantizer import Q8HfQuantizer, layers

# Assigned rather than registered through Transformers' decorators, which raise when this package is
# imported again.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = Q8Config
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = Q8HfQuantizer

__all__ = ["Q8HfQuantizer", "layers"]
