"""Speed and memory of gptj_q8 beside PyTorch and its peers: one timer, one schema, one registry.

From the repository's root: `python -m benchmarks` for all of it, `python -m benchmarks.ops --help`
for the ops, `pytest benchmarks` for pytest-benchmark. `gptj-q8 bench` shows it on one screen.
"""
