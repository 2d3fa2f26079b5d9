"""What serves the paper's tables only: nothing at the top level imports it.

The tables      tables: what the paper prints; reproduce: the command that sets ours beside it
                grid, over parallel: runs what is missing; methods: learning rates
                studies: rows of runs; stats: their intervals; claims: what they say of the paper's
                table8, forgetting, merge, stability: what more the runs show
                pages, figures: fill README.md and docs/; collect: finished runs as one file
Scores          eval_humaneval, over sandbox and confined; eval_safety, over refusals
Speed           bench, over bench_worlds, bench_measure, bench_peers and bench_report; plan: what fits where
One token       walkthrough: the numbers of docs/walkthrough.md
"""
