"""What serves the paper's tables only: nothing at the top level imports it."""
