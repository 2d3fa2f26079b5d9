"""Many runs of train.py, and the statistics of their results."""
