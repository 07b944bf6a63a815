"""GPT-J: every matrix is a plain nn.Linear or nn.Embedding, and nothing is tied."""

from gptj_q8.models.rule import Rule

GPTJ = Rule(
    model_type="gptj",
    matrices=(
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "attn.out_proj",
        "mlp.fc_in",
        "mlp.fc_out",
    ),
)
