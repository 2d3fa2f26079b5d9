"""The paper's numbers, and the studies on the embedded model."""
