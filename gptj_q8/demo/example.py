"""From a float model to a fine-tuned 8-bit one, step by step: run it whole, or cell by cell.

    python -m gptj_q8.demo.example      # half a minute on the small model; writes to out/example

In a notebook, each part between two lines `# %%` is a cell, after one that installs the package
from its clone (`!pip install --no-build-isolation ./gptj_q8`). With GPT-J-6B itself, change MODEL
and TEXT, and take a GPU.
"""

# %% What to work on
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import gptj_q8
from gptj_q8 import demo
from gptj_q8.optim import AdamW8bit

MODEL = demo.model_dir()  # or "EleutherAI/gpt-j-6b", or a folder of yours
TEXT = demo.proverbs()  # or Path("my.txt").read_text()
PROMPT = "Quien mucho"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, ROWS, TOKENS = 40, 8, 64
OUT = Path("out/example")
logging.disable_progress_bar()

# %% Load it in 8 bits: the float model is never in memory as a whole
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(
    MODEL, quantization_config=gptj_q8.Q8Config(), dtype=torch.float32, device_map=DEVICE
)
print(f"{model.get_memory_footprint() / 1e6:.1f} MB in 8 bits")


# %% Let it write
def write(model: Any, prompt: str = PROMPT) -> str:
    """The prompt with what the model adds to it."""
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt").to(DEVICE)
    out = model.generate(**ids, max_new_tokens=20, do_sample=True, top_p=0.9, pad_token_id=0)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


print("before:", write(model))
model.save_pretrained(OUT / "8bit")
tokenizer.save_pretrained(OUT / "8bit")

# %% Teach it the text: adapters learn, the 8-bit weights stay
model = gptj_q8.add_lora(model, r=16, alpha=32)
gptj_q8.prepare_for_finetuning(model)
optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=4e-3)
lines = tokenizer(TEXT.splitlines(keepends=True)).input_ids
ids = torch.tensor([token for line in lines for token in line])
rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
losses = []
for step in range(STEPS):
    batch = rows[torch.arange(step * ROWS, (step + 1) * ROWS) % len(rows)].to(DEVICE)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 10 == 9:
        print(f"step {step + 1}: loss {sum(losses[-10:]) / 10:.2f}")
model.eval()
print("after:", write(model))

# %% Keep the adapter, and put it on the stored 8-bit model again
model.save_pretrained(OUT / "adapter")
again = peft.PeftModel.from_pretrained(gptj_q8.from_pretrained(OUT / "8bit"), OUT / "adapter")
again = again.to(DEVICE, torch.float32).eval()
print("again:", write(again))

# %% Or make one model of both
gptj_q8.merge(OUT / "8bit", OUT / "adapter", OUT / "merged")
print("merged:", write(gptj_q8.from_pretrained(OUT / "merged").to(DEVICE)))
