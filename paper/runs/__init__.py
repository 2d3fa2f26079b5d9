"""Many runs of train.py, and what is made of their numbers."""
