"""Everything about the paper's numbers. Nothing at the top level imports it.

Commands        reproduce: the paper's tables beside ours
                eval_humaneval, eval_safety: scores of a model
                pages: fills README.md and docs/
                figures: draws the figures
                walkthrough: follows one token
                plan: which GPUs a run needs, and what it sends between them
                first_gpu: ten minutes on a GPU
                real_size: a model of real size on a CPU
runs/           grid: runs what is missing
                parallel: runs several commands at once
                rates: each method's learning rate
                stats: spread, intervals, Student's t
studies/        tables: the paper's tables, as data
                comparison: our tables, row by row
                claims: the paper's claims, tested on our runs
                forgetting: what a model loses on other text
                merging: two tasks in one model
                stability: how much lists of hot experts differ
                placement: do hot experts matter? (placement_runs: its runs, placement.md: its plan)
                routing: how uneven OLMoE's real routing is
                mechanism: what the adapters change besides the task, at equal loss on it
scoring/        sandbox: runs programs that a model wrote, in bubblewrap
                confined: the program inside the sandbox
                refusals: decides whether an answer is a refusal
bench/          __main__: python -m paper.bench
                worlds: weights and batch
                measure: time and memory
                peers: transformers and PEFT
                report: prints the results
"""

import sys

if sys.argv[:1] == ["-m"]:  # python -m is starting one of its commands
    import plumbing.quiet  # noqa: F401
