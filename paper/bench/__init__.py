"""The speed and memory of training, beside transformers and PEFT."""
