"""Times the ops beside PyTorch and its peers: GPT-J's shapes, cold weights, checked numbers.

    python -m benchmarks.ops                                  # every op
    python -m benchmarks.ops --op linear --m 1 --shapes fc_in --backend cpu reference
    python -m benchmarks.ops --op quantize --codebook dynamic --block-size 4096
    python -m benchmarks.ops --tiny --device cpu              # does it run at all?

A system whose numbers are wrong gets no time. One that is not installed is named as skipped.
"""

import sys

from benchmarks import registry
from benchmarks.arguments import add_system_options, make_bench, parser, selection
from benchmarks.report import finish


def main(argv: list[str]) -> int:
    made = parser("benchmarks.ops", __doc__)
    made.add_argument("--op", nargs="+", choices=registry.OPS, default=list(registry.OPS))
    add_system_options(made)
    options = made.parse_args(argv)
    bench = make_bench("benchmarks.ops", options, argv)
    for case, makers in registry.cases(options.op, selection(options)):
        bench.run(case, makers)
    return finish(bench.results, options.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
