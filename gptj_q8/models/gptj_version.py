"""Which of Transformers' two GPT-Js is installed: all that differs between them asks this."""

from importlib.metadata import version

from packaging.version import Version

REWRITTEN = Version(version("transformers")) >= Version("5.24")
"""Whether it is that of Transformers 5.24 and later.

There attention is chosen by name, `sdpa` among them, as for other families; what holds the keys and
values of earlier tokens is called `cache`, not `past_key_values`; and the whole model has one table
of the positions' sines and cosines, not each block its own.
"""
