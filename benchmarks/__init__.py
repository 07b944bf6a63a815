"""Speed and memory of gptj_q8 beside PyTorch, bitsandbytes and torchao.

Run from the repository's root: `python -m benchmarks.bench_linear --help`.
"""
