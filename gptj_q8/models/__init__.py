"""What is particular to families of models; one small file each, listed in `RULES`."""

from gptj_q8.models.gptj import GPTJ
from gptj_q8.models.rule import Rule

RULES: dict[str, Rule] = {rule.model_type: rule for rule in (GPTJ,)}

# Patterns of tensors in old checkpoints that today's models make for themselves: causal masks and
# their fill values (4 MB in each block of EleutherAI/gpt-j-6b), rotary frequencies, positions.
LEFTOVERS = (
    r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$",
    r"(^|\.)rotary_emb\.inv_freq$",
    r"(^|\.)embeddings\.position_ids$",
)


def sdpa_of(model_type: str) -> str | None:
    """What configurations call scaled-dot-product attention for GPT-J, known to Transformers then.

    None for other families, which have what Transformers chooses.
    """
    if model_type != GPTJ.model_type:
        return None
    from gptj_q8.models.gptj_attention import SDPA

    return SDPA


__all__ = ["LEFTOVERS", "RULES", "Rule", "sdpa_of"]
