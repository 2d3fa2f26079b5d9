"""A model as the Hub stores it: config.json, tensor names, safetensors. Only this file reads it.

moe_model.py has the computation, and defines the letters of sizes. Read this file from top to
bottom: config.json, where a model is, names of tensors, weights, a model from them.

Two files, or two places in one file, may say the same thing. One rule holds for all of them:
1. If they agree, either is used.
2. An index whose shards are missing is a rest of an older save. It is ignored, as in transformers.
3. In every other case, a ValueError names both places.

    weights      model.safetensors is read if it is there. An index beside it is ignored if its
                 shards are missing. With all of its shards, it is a second model: refused.
                 (transformers then reads the single file. That may be the older one, because it
                 stays when shards are saved over it.)                              `shard_paths`
    experts      Each expert's matrix is a tensor, or a layer's experts are stacked as transformers
                 5 has them. Both for one matrix: refused.                      `Checkpoint.check`
    config.json  rope_theta may also stand in rope_parameters (transformers 5) or in rope_scaling.
                 num_experts may be called num_local_experts. Two values that differ: refused, as
                 transformers 4 and 5 would take different ones.                         `agreed`
    head         lm_head.weight beside tied embeddings: refused unless it is equal to them.
                                                                                  `check_weights`
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from moe_model import MoEConfig, MoEModel
from plumbing import ranks

# Patterns of file names. The Python files are downloaded, but never run.
FILES_BESIDE_WEIGHTS = (
    "*.json", "tokenizer.model", "merges.txt", "*.jinja",
    "configuration_*.py", "modeling_*.py", "LICENSE*",
)  # fmt: skip
CHECKPOINT = (
    "a folder with config.json and model.safetensors (or shards and their index), as on the Hub"
)

LARGEST_JSON = 1 << 24  # bytes. As Python objects they may take a hundred times as many
# The largest values of config.json that are read. Larger ones would only take time and memory.
LARGEST = {"n_layers": 200, "n_experts": 1000, "n_shared": 1000}
MAY_BE_0 = ("n_shared", "n_dense", "dense_dim", "own_head_dim")

# ---- config.json ---------------------------------------------------------------------------------


# Our field -> (key of config.json, the default of the family's class for a config.json without it).
# The key "" means that the value is fixed. "window" is no field: it bounds max_len. Sources:
# transformers' OlmoeConfig, MixtralConfig and Qwen3MoeConfig, and configuration_deepseek.py of
# deepseek-moe-16b-base.
FAMILIES = {
    "olmoe": {
        "vocab_size": ("vocab_size", 50304), "dim": ("hidden_size", 2048),
        "n_layers": ("num_hidden_layers", 16), "n_heads": ("num_attention_heads", 16),
        "n_kv_heads": ("num_key_value_heads", None), "n_experts": ("num_experts", 64),
        "top_k": ("num_experts_per_tok", 8), "expert_dim": ("intermediate_size", 2048),
        "norm_topk": ("norm_topk_prob", False), "qk_norm": ("", True),
        "max_len": ("max_position_embeddings", 4096), "rope_theta": ("rope_theta", 1e4),
        "norm_eps": ("rms_norm_eps", 1e-5),
    },
    "mixtral": {
        "vocab_size": ("vocab_size", 32000), "dim": ("hidden_size", 4096),
        "n_layers": ("num_hidden_layers", 32), "n_heads": ("num_attention_heads", 32),
        "n_kv_heads": ("num_key_value_heads", 8), "n_experts": ("num_local_experts", 8),
        "top_k": ("num_experts_per_tok", 2), "expert_dim": ("intermediate_size", 14336),
        "norm_topk": ("", True), "qk_norm": ("", False),
        "max_len": ("max_position_embeddings", 131072), "rope_theta": ("rope_theta", 1e6),
        "norm_eps": ("rms_norm_eps", 1e-5), "own_head_dim": ("head_dim", 0),
        "window": ("sliding_window", None),
    },
    "qwen3_moe": {
        "vocab_size": ("vocab_size", 151936), "dim": ("hidden_size", 2048),
        "n_layers": ("num_hidden_layers", 24), "n_heads": ("num_attention_heads", 32),
        "n_kv_heads": ("num_key_value_heads", 4), "n_experts": ("num_experts", 128),
        "top_k": ("num_experts_per_tok", 8), "expert_dim": ("moe_intermediate_size", 768),
        "norm_topk": ("norm_topk_prob", False), "qk_norm": ("", False), "qk_head_norm": ("", True),
        "max_len": ("max_position_embeddings", 32768), "rope_theta": ("rope_theta", 1e4),
        "norm_eps": ("rms_norm_eps", 1e-6), "own_head_dim": ("head_dim", 0),
        "tied": ("tie_word_embeddings", False),
    },
    "deepseek": {
        "vocab_size": ("vocab_size", 102400), "dim": ("hidden_size", 4096),
        "n_layers": ("num_hidden_layers", 30), "n_heads": ("num_attention_heads", 32),
        "n_kv_heads": ("num_key_value_heads", None), "n_experts": ("n_routed_experts", None),
        "top_k": ("num_experts_per_tok", None), "expert_dim": ("moe_intermediate_size", 1407),
        "norm_topk": ("norm_topk_prob", False), "qk_norm": ("", False),
        "linear_router": ("", False),
        "max_len": ("max_position_embeddings", 2048), "rope_theta": ("rope_theta", 1e4),
        "norm_eps": ("rms_norm_eps", 1e-6), "n_shared": ("n_shared_experts", 0),
        "n_dense": ("first_k_dense_replace", 0), "dense_dim": ("intermediate_size", 11008),
    },
}  # fmt: skip

# key -> all places in config.json that may have its value, in the words of transformers 4 and 5.
PLACES = {
    "rope_theta": ("rope_theta", "rope_scaling.rope_theta", "rope_parameters.rope_theta"),
    "num_experts": ("num_experts", "num_local_experts"),
    "num_local_experts": ("num_local_experts", "num_experts"),
}

# Keys of config.json that change the computation in a way that moe_model.py does not implement ->
# the values that change nothing. null, false and 0 change nothing either. A key that the family
# reads is supported.
UNSUPPORTED = {
    "attention_bias": (), "clip_qkv": (), "decoder_sparse_step": (1,), "hidden_act": ("silu",),
    "mlp_bias": (), "mlp_only_layers": (), "moe_layer_freq": (1,),
    "partial_rotary_factor": (1,), "pretraining_tp": (1,),
    "router_jitter_noise": (), "routed_scaling_factor": (1,), "scoring_func": ("softmax",),
    "sliding_window": (), "tie_word_embeddings": (), "topk_method": ("greedy",),
    "transformers_weights": ("model.safetensors",), "use_sliding_window": (),
}  # fmt: skip
IGNORED = {"qwen3_moe": {"sliding_window"}}  # has an effect only if use_sliding_window is set

QUANTISED = (
    "quantised weights cannot be trained here: want the same model in bf16, fp16 or fp32, "
    "such as the one that was quantised"
)


def parse_config(hub: dict) -> MoEConfig:
    """The Hub's config.json -> MoEConfig.

    Raises ValueError for an unknown architecture, and for settings that we would get wrong in
    silence.
    """
    family = hub.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"config.json: model_type is {family!r}, want one of {', '.join(FAMILIES)}"
        )
    check_supported(hub, family)

    sizes = {}
    for field, (key, default) in FAMILIES[family].items():
        value = agreed(hub, *PLACES.get(key, (key,))) if key else None
        sizes[field] = default if value is None else value
    if sizes["n_kv_heads"] is None:
        sizes["n_kv_heads"] = sizes["n_heads"]
    # With a sliding window a token sees that many tokens, itself included. In rows up to that
    # length it sees all. So the window is taken as the context.
    window = sizes.pop("window", None) or sizes["max_len"]
    cfg = MoEConfig(family=family, **sizes)
    check_sizes(cfg)
    check_sizes(replace(cfg, max_len=window))
    if (head_dim := hub.get("head_dim") or cfg.head_dim) != cfg.head_dim:
        raise ValueError(
            f"config.json: head_dim is {head_dim}, want hidden size / heads = {cfg.head_dim}"
        )
    return replace(cfg, max_len=min(cfg.max_len, window))


def check_supported(hub: dict, family: str) -> None:
    """Raise ValueError for a setting that changes the computation, and is not implemented."""
    # In transformers 4, and in 5.
    rope = [hub.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    for part in rope:
        if not isinstance(part, dict):
            raise ValueError(f"config.json: rope settings are {part!r}, want an object or null")
        if any((part.get(key) or "default") != "default" for key in ("rope_type", "type")):
            raise ValueError(
                f"config.json: rope scaling {part!r} is not implemented, want 'default' or none"
            )
    if quantised := hub.get("quantization_config"):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(f"config.json: quantization_config is {short(how)}, but {QUANTISED}")
    followed = {key for key, _ in FAMILIES[family].values()} | IGNORED.get(family, set())
    for key, harmless in UNSUPPORTED.items():
        for value in (part.get(key) for part in (hub, *rope)):
            if value and value not in harmless and key not in followed:
                raise ValueError(
                    f"config.json: {key} is {value!r}, which moe_model.py does not implement"
                )


def agreed(hub: dict, *places: str) -> object:
    """The value that config.json has in these places. None if it has none.

    A place is a key, or "rope_parameters.rope_theta" for a key of an object. Raises ValueError if
    two places differ.
    """
    value_at = {}
    for place in places:
        value = hub
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            value_at[place] = value
    values = [*value_at.values()]
    if any(value != values[0] for value in values[1:]):
        both = ", but ".join(f"{place} is {short(value)}" for place, value in value_at.items())
        raise ValueError(f"config.json: {both}: want one value, take out the wrong one")
    return values[0] if values else None


def check_sizes(cfg: MoEConfig) -> None:
    """Raise ValueError unless each value has its type and a sensible size, and all fit together."""
    for field in fields(cfg):
        value, kind = getattr(cfg, field.name), field.type
        if not is_sensible(value, kind, field.name):
            raise ValueError(
                f"config.json: {field.name} is {short(value)}, want a sensible {kind.__name__}"
            )
    heads = (cfg.own_head_dim, 2) if cfg.own_head_dim else (cfg.dim, 2 * cfg.n_heads)
    for whole, part in (heads, (cfg.n_heads, cfg.n_kv_heads)):
        if whole % part:  # the 2 above: rotary embedding turns pairs of channels
            raise ValueError(f"config.json: {whole} is no multiple of {part}, the heads need that")
    if cfg.family == "deepseek" and cfg.norm_topk and cfg.top_k == 1:
        raise ValueError(
            "config.json: norm_topk_prob with one expert per token does nothing there: omit it"
        )
    if cfg.top_k > cfg.n_experts:
        raise ValueError(
            f"config.json: {cfg.top_k} experts per token, but only {cfg.n_experts} experts"
        )


def is_sensible(value: object, kind: type, name: str) -> bool:
    """Whether the value of the field `name` has its type and, if a number, a sensible size."""
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        return False
    largest = LARGEST.get(name, 1e9 if kind is float else 2**24)
    return 0 < value <= largest or (name in MAY_BE_0 and value == 0)


class Backbone(NamedTuple):
    """A model with a short name."""

    repo: str  # its id on the Hub
    hub: dict  # what its config.json sets

    @property
    def cfg(self) -> MoEConfig:
        """Its sizes, without a download."""
        return parse_config(self.hub)


BACKBONES = {
    "olmoe-1b-7b": Backbone(
        "allenai/OLMoE-1B-7B-0924", {"model_type": "olmoe", "intermediate_size": 1024}
    ),
    "mixtral-8x7b": Backbone(
        "mistralai/Mixtral-8x7B-v0.1", {"model_type": "mixtral", "max_position_embeddings": 32768}
    ),
    "deepseekmoe-16b": Backbone(
        "deepseek-ai/deepseek-moe-16b-base",
        {
            "model_type": "deepseek", "hidden_size": 2048, "num_hidden_layers": 28,
            "num_attention_heads": 16, "intermediate_size": 10944,
            "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
            "num_experts_per_tok": 6, "first_k_dense_replace": 1,
            "max_position_embeddings": 4096,
        },
    ),
    "qwen3-30b-a3b": Backbone(  # not in the paper, but many fine-tune it
        "Qwen/Qwen3-30B-A3B",
        {
            "model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128,
            "norm_topk_prob": True, "rope_theta": 1e6,
        },
    ),
}  # fmt: skip

# ---- where a model is ----------------------------------------------------------------------------


def locate(model: str | Path, weights: bool = True) -> Path:
    """The folder of a model: "tiny", a BACKBONES name, a folder, or a Hub id.

    A model of the Hub is downloaded once and then cached. Its id may end in @ and a revision, such
    as a commit, which is then taken in place of the newest. weights: False downloads only the small
    files. Raises FileNotFoundError that says what to do if there is no such model, OSError if the
    Hub does not give it.
    """
    if model == "tiny":
        return Path(__file__).parent.parent / "tiny"
    if model != "" and Path(model).is_dir():  # Path("") would be the working directory
        return Path(model)
    repo, _, revision = full_name(model).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        if repo == "tiny":
            raise FileNotFoundError(f"{model}: tiny is no model of the Hub: want tiny alone")
        example = BACKBONES["olmoe-1b-7b"].repo
        raise FileNotFoundError(
            f"there is no model {repo!r}: want tiny, {', '.join(BACKBONES)}, a folder, "
            f"or a Hub id such as {example}"
        )
    from plumbing import hub  # here, because a checkpoint in a folder is read without it

    last = "*.safetensors" if weights else "tokenizer.*"
    return hub.snapshot(repo, revision or None, "config.json", FILES_BESIDE_WEIGHTS, last)


def full_name(model: str | Path) -> str:
    """The Hub id of a BACKBONES name. The name of any other model stays."""
    return BACKBONES[model].repo if model in BACKBONES else str(model)


def read_config(folder: str | Path) -> MoEConfig:
    """The MoEConfig of folder/config.json."""
    return parse_config(read_object(Path(folder) / "config.json"))


def read_object(path: Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError or ValueError that name the path.

    It is not files.read_json, so that this file and ranks.py are enough to load a model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or no file: want {CHECKPOINT}")
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"{size:,} bytes are too many")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): want {CHECKPOINT}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: want {CHECKPOINT}")
    return value


# ---- names of tensors ----------------------------------------------------------------------------


# Our parameter name -> the checkpoint's. The first match wins. {e} stands for each expert in turn.
NAMES = [
    (r"embed\.weight", r"model.embed_tokens.weight"),
    (r"norm\.weight", r"model.norm.weight"),
    (r"head\.weight", r"lm_head.weight"),
    (r"layers\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"layers\.(\d+)\.attn\.([qkvo])\.weight", r"model.layers.\1.self_attn.\2_proj.weight"),
    (
        r"layers\.(\d+)\.attn\.([qk])(?:_head)?_norm\.weight",
        r"model.layers.\1.self_attn.\2_norm.weight",
    ),
    (r"layers\.(\d+)\.moe\.router\.weight", r"model.layers.\1.mlp.gate.weight"),
    (
        r"layers\.(\d+)\.moe\.experts\.(\w+)\.weight",
        r"model.layers.\1.mlp.experts.{e}.\2_proj.weight",
    ),
    (
        r"layers\.(\d+)\.moe\.shared\.(\w+)\.weight",
        r"model.layers.\1.mlp.shared_experts.\2_proj.weight",
    ),
    (r"layers\.(\d+)\.dense\.(\w+)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
]
MIXTRAL_NAMES = [
    (r"layers\.(\d+)\.moe\.router\.weight", r"model.layers.\1.block_sparse_moe.gate.weight"),
    (
        r"layers\.(\d+)\.moe\.experts\.gate\.weight",
        r"model.layers.\1.block_sparse_moe.experts.{e}.w1.weight",
    ),
    (
        r"layers\.(\d+)\.moe\.experts\.up\.weight",
        r"model.layers.\1.block_sparse_moe.experts.{e}.w3.weight",
    ),
    (
        r"layers\.(\d+)\.moe\.experts\.down\.weight",
        r"model.layers.\1.block_sparse_moe.experts.{e}.w2.weight",
    ),
    *NAMES,
]


def hub_names(name: str, cfg: MoEConfig) -> list[str]:
    """The checkpoint's tensors behind our parameter `name`: one, or one for each expert."""
    for ours, theirs in MIXTRAL_NAMES if cfg.family == "mixtral" else NAMES:
        if match := re.fullmatch(ours, name):
            pattern = match.expand(theirs)
            n = cfg.n_experts if "{e}" in pattern else 1
            return [pattern.replace("{e}", str(e)) for e in range(n)]
    raise KeyError(f"parameter {name!r} has no entry in NAMES")


# ---- weights -------------------------------------------------------------------------------------

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

MOST_DIMENSIONS = 8  # of a stored tensor. Weights have 2, or 3 where experts are stacked

# transformers 5 stacks a layer's experts, and can also write them so (save_original_format=False):
# gate_up_proj [E, 2 F, D] and down_proj [E, D, F]. The name of one matrix -> the name of its stack,
# the number of pieces into which an expert's rows are cut, and which piece the matrix is.
STACKS = [
    (r"(.*)\.experts\.(\d+)\.(?:gate_proj|w1)\.weight", r"\1.experts.gate_up_proj", 2, 0),
    (r"(.*)\.experts\.(\d+)\.(?:up_proj|w3)\.weight", r"\1.experts.gate_up_proj", 2, 1),
    (r"(.*)\.experts\.(\d+)\.(?:down_proj|w2)\.weight", r"\1.experts.down_proj", 1, 0),
]


class Stored(NamedTuple):
    """A tensor of a checkpoint, not yet read: a whole tensor, or one matrix of a stack."""

    path: Path  # of its shard
    name: str  # in that file
    dtype: str  # as the file names it: "BF16"
    shape: tuple[int, ...]
    part: tuple[int | slice, ...] = ()  # the expert and its rows, for one matrix of a stack [E, ..]


class Checkpoint:
    """All tensors of a folder of safetensors, single or sharded. Each is read when asked for.

    Tensors are asked for by the names of the family's own layout (hub_names), however they were
    saved.
    """

    def __init__(self, folder: Path):
        """Read the headers. Raises FileNotFoundError or ValueError that name the shard."""
        self.folder = folder
        self.tensors: dict[str, Stored] = {}  # as they are in the files
        for path in shard_paths(folder):
            tensors = stored_in(path)
            if twice := self.tensors.keys() & tensors.keys():
                other = self.tensors[min(twice)].path.name
                raise ValueError(f"{path}: tensor {min(twice)} is in {other} as well: want it once")
            self.tensors |= tensors

    def find(self, name: str) -> Stored | None:
        """Where the tensor `name` is: by itself, or in a stack of experts. None if nowhere."""
        # transformers 5 also writes Mixtral's block_sparse_moe with the name of the other families.
        for wanted in (name, name.replace(".block_sparse_moe.", ".mlp.")):
            if wanted in self.tensors:
                return self.tensors[wanted]
            for single, stack, n_pieces, piece in STACKS:
                match = re.fullmatch(single, wanted)
                stored = self.tensors.get(match.expand(stack)) if match else None
                if stored and len(stored.shape) == 3 and int(match[2]) < stored.shape[0]:
                    rows = stored.shape[1] // n_pieces
                    part = (int(match[2]), slice(piece * rows, (piece + 1) * rows))
                    return stored._replace(shape=(rows, stored.shape[2]), part=part)
        return None

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the files hold exactly the tensors `wanted`, in these shapes.

        Tensors that are no weights are ignored: integers, booleans, and the rotary angles of old
        checkpoints, which are computed here.
        """
        unused = Counter()  # {stored tensor: how many of its numbers are not wanted}
        for name, stored in self.tensors.items():
            if stored.dtype in DTYPES and not name.endswith("rotary_emb.inv_freq"):
                unused[name] = math.prod(stored.shape)
        stored_as = {name: self.find(name) for name in wanted}
        self.refuse("lacks", [name for name, stored in stored_as.items() if stored is None])
        for name, shape in wanted.items():
            stored = stored_as[name]
            if stored.dtype not in DTYPES:
                raise ValueError(
                    f"{stored.path}: tensor {name} is {stored.dtype}, want {', '.join(DTYPES)}"
                )
            if stored.shape != shape:
                raise ValueError(
                    f"{self.folder}: tensor {name} is {stored.shape}, "
                    f"but config.json makes it {shape}"
                )
            unused[stored.name] -= math.prod(shape)
        self.refuse("has unexpected", [name for name, numbers in unused.items() if numbers > 0])

    def refuse(self, what: str, names: list[str]) -> None:
        """Raise ValueError about the tensors `names`, if there are any. what: "lacks", ..."""
        if not names:
            return
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        if (self.folder / SINGLE).is_file() and (self.folder / INDEX).is_file():
            more += f" (read from {SINGLE}, and not by the {INDEX} beside it)"
        raise ValueError(
            f"{self.folder} {what} tensor {min(names):.200}{more}: "
            "want the config.json and the weights of one model that moe_model.py knows"
        )

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes in which weights are stored."""
        return {DTYPES[stored.dtype] for stored in self.tensors.values() if stored.dtype in DTYPES}

    def read(self, name: str) -> Tensor:
        """The tensor `name` as it is stored."""
        return next(self.read_all([name]))

    def read_all(self, names: Iterable[str]) -> Iterator[Tensor]:
        """These tensors, one after the other. Neighbours in one shard share one opening of it.

        A shard is not opened for each tensor, because an opening parses the header again. It is not
        kept open for all, because what was read of a file stays in memory until it is closed.
        """
        for path, group in groupby(map(self.find, names), key=lambda stored: stored.path):
            with opened(path) as file:
                for stored in group:
                    if stored.part:
                        yield file.get_slice(stored.name)[stored.part]
                    else:  # a view of the file, which is mapped into memory
                        yield file.get_tensor(stored.name)

    def read_rows(self, name: str, first: int, n: int) -> Tensor:
        """n rows of the tensor `name`, from row `first` on [n, ...]. No other row is read."""
        stored = self.find(name)
        with opened(stored.path) as file:
            return file.get_slice(stored.name)[first : first + n]


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file to read from. Raises FileNotFoundError or ValueError that name it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: want the weights as safetensors, all shards")
    path.open("rb").close()  # raises PermissionError. The library would say that there is no file
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!s:.200}): want a whole safetensors file of a model"
        ) from error


def stored_in(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file by name. Raises ValueError if they are quantised."""
    tensors = {}
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            shape = tuple(tensor.get_shape())
            if len(shape) > MOST_DIMENSIONS:
                raise ValueError(f"tensor {name!r:.80} has {len(shape)} dimensions")
            tensors[name] = Stored(path, name, tensor.get_dtype(), shape)
    for name, stored in tensors.items():
        if stored.dtype.startswith(("F8", "F6_", "F4")):
            raise ValueError(f"{path}: tensor {name!r:.80} is {stored.dtype}, but {QUANTISED}")
    return tensors


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or else those of its index.

    Raises ValueError if both are complete: see the rule at the top of this file.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        return [single]
    weight_map = read_object(index).get("weight_map")  # {tensor: file name}
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and re.fullmatch(r"[\w.-]+", file) for file in weight_map.values()
    ):
        raise ValueError(
            f"{index} has no weight_map from tensors to file names: want what was saved with the "
            "shards"
        )
    shards = [folder / shard for shard in sorted(set(weight_map.values()))]
    if not single.is_file() or shards == [single]:
        return shards
    if all(shard.is_file() for shard in shards):
        raise ValueError(
            f"{folder} holds two models, one in {SINGLE}, one in the {len(shards)} shards of "
            f"{INDEX}, and nothing says which is the newer: remove the older one"
        )
    return [single]


# ---- a model from them ---------------------------------------------------------------------------


def empty_model(cfg: MoEConfig, dtype: torch.dtype, matmul: str = "grouped") -> MoEModel:
    """A model of shapes without memory (meta device), to be filled by load_weights."""
    with torch.device("meta"):
        return MoEModel(cfg, dtype, matmul).to(dtype)


def base_parameters(cfg: MoEConfig) -> dict[str, tuple[torch.Size, list[str]]]:
    """{our parameter: its shape, the checkpoint's tensors behind it}, without adapters."""
    bare = empty_model(cfg, torch.float32)
    return {name: (p.shape, hub_names(name, cfg)) for name, p in bare.named_parameters()}


def count_base(cfg: MoEConfig) -> int:
    """How many numbers such a model has, without adapters."""
    return sum(shape.numel() for shape, _ in base_parameters(cfg).values())


def check_weights(cfg: MoEConfig, source: Checkpoint) -> None:
    """Raise ValueError unless `source` has exactly the tensors of such a model.

    Values are read only of an output layer beside tied embeddings.
    """
    base = base_parameters(cfg).values()
    wanted = {tensor: tuple(shape[-2:]) for shape, tensors in base for tensor in tensors}
    head, words = "lm_head.weight", "model.embed_tokens.weight"
    beside = cfg.tied and source.find(head) is not None
    source.check(wanted | ({head: wanted[words]} if beside else {}))
    if beside and not torch.equal(*source.read_all([head, words])):
        raise ValueError(
            f"{source.folder}: config.json has tie_word_embeddings, but {head} differs from "
            f"{words}: set that to false, or take out the wrong tensor"
        )


@torch.no_grad()
def load_weights(model: MoEModel, source: Checkpoint, device: str | torch.device) -> None:
    """Materialise `model` on `device` and fill its base parameters from `source`.

    Each parameter asks for its own tensors, so that at most one parameter is in memory beside the
    model. A rank reads the rows that it holds. Adapters, if attached, are left without values.
    """
    base = base_parameters(model.cfg)
    check_weights(model.cfg, source)
    model.to_empty(device=device)
    for name, (shape, tensors) in tqdm(base.items(), "load", unit="tensor", delay=2, leave=False):
        param = model.get_parameter(name)
        rows, first = ranks.mine(param), ranks.first_row(param)
        if len(shape) < 3:  # one matrix or vector
            rows.copy_(source.read_rows(tensors[0], first, len(rows)))
        else:  # a stack [E, ...], in which a row is the matrix of one expert
            mine = tensors[first : first + len(rows)]
            for matrix, stored in zip(rows, source.read_all(mine), strict=True):
                matrix.copy_(stored)
