"""Training speed and memory, beside transformers and PEFT."""
