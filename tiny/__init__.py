"""The embedded tiny OLMoE: its tasks, its corpus, and its pretraining."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m is starting one of its commands
    import plumbing.quiet  # noqa: F401
