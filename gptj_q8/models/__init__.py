"""What is particular to a family of models; one small file each, listed in `RULES`."""

from gptj_q8.models.gptj import GPTJ
from gptj_q8.models.rule import Rule

RULES: dict[str, Rule] = {rule.model_type: rule for rule in (GPTJ,)}

__all__ = ["RULES", "Rule"]
