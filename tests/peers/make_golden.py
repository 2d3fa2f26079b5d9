"""Writes tests/fixtures/golden: two small random checkpoints, what transformers makes of them.

python tests/peers/make_golden.py        needs requirements-dev.txt
"""

from importlib import import_module
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent.parent / "fixtures" / "golden"
SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip


def main() -> None:
    """Both families that transformers implements."""
    golden = {}
    for family, experts in (("olmoe", {"num_experts": 8}), ("mixtral", {"num_local_experts": 4})):
        config = transformers.AutoConfig.for_model(family, **SHAPE, **experts)
        config.eos_token_id = config.pad_token_id = None
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        draw = torch.Generator().manual_seed(0)
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=draw)
            p.data = 1 + 0.2 * noise if p.dim() == 1 else 1.5 * noise / p.shape[-1] ** 0.5
        model.save_pretrained(HERE / family)
        tokens = torch.randint(0, 96, (3, 11), generator=draw)
        real = torch.ones(3, 11, dtype=torch.long)
        real[1, 8:] = real[2, 3:] = 0
        with torch.no_grad():
            out = model(input_ids=tokens, attention_mask=real, output_router_logits=True)
        aux = import_module(type(model).__module__).load_balancing_loss_func(
            out.router_logits, next(iter(experts.values())), 2, real
        )
        parts = {"tokens": tokens, "real": real, "logits": out.logits, "aux": aux}
        golden |= {f"{family}.{name}": value.contiguous() for name, value in parts.items()}
    save_file(golden, HERE / "transformers.safetensors", {"transformers": transformers.__version__})


if __name__ == "__main__":
    main()
