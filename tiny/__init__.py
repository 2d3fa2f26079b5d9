"""The embedded tiny OLMoE: its tasks, its corpus, and how it is pretrained."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m: a command of it is being started
    import plumbing.quiet  # noqa: F401
