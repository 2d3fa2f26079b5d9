"""What the paper prints, and what the embedded model shows beside it."""
