"""The embedded tiny OLMoE: its tasks, its corpus, and how it is pretrained."""
