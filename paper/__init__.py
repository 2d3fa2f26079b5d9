"""What serves the paper's numbers only: nothing at the top level imports it.

Commands        reproduce: the paper's tables beside ours; eval_humaneval, eval_safety: scores
                pages: fills README.md and docs/; figures: draws; walkthrough: one token's way
                plan: what fits where, and what goes over the wire
                first_gpu: ten minutes on a GPU; real_size: a model of real size on a CPU
runs/           grid: runs what is missing; parallel: several commands at a time
                rates: each method's learning rate; stats: spread, intervals, Student's t
studies/        tables: what the paper prints, as data; comparison: tables of ours, row by row
                claims: what our runs say of the paper's; forgetting: what tuning costs elsewhere
                merging: two tasks in one model; stability: how lists of hot experts differ
                placement: do hot experts matter? placement_runs: its runs; placement.md: its plan
                routing: how skewed OLMoE's real routing is
                mechanism: what the arms change besides the task, at equal task loss
scoring/        sandbox: programs that a model wrote, in bubblewrap; confined: what runs in there
                refusals: what counts as one
bench/          __main__: python -m paper.bench; worlds: weights and batch; measure: time, memory
                peers: transformers and PEFT; report: what the numbers say
"""

import sys

if sys.argv[:1] == ["-m"]:  # python -m: a command of it is being started
    import plumbing.quiet  # noqa: F401
