"""A model as the Hub stores it: config.json, tensor names, safetensors. Read here, and nowhere else.

moe_model.py holds what is computed with them. Sizes have the letters that are defined there.
"""

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from run import LARGEST_JSON, read_json, read_run, sha256

BESIDE = (  # of a model's files, besides its weights; nothing here runs the Python ones
    "*.json", "tokenizer.model", "merges.txt", "*.jinja", "configuration_*.py", "modeling_*.py", "LICENSE*",
)  # fmt: skip
CHECKPOINT = "a folder with config.json and model.safetensors (or shards and their index), as on the Hub"

LARGEST = {"n_layers": 200, "n_experts": 1000, "n_shared": 1000}  # more would only take time and memory


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Everything in which the supported backbones differ. There is no other switch on the model's name."""

    family: str  # the Hub's model_type: decides the checkpoint's tensor names, and nothing else
    vocab_size: int  # V
    dim: int  # D
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # G
    n_experts: int  # E
    top_k: int  # K
    expert_dim: int  # F
    norm_topk: bool  # rescale the K routing weights of a token so that they sum to 1
    qk_norm: bool  # RMSNorm on the whole query and key vectors, before they are split into heads
    max_len: int
    rope_theta: float
    norm_eps: float
    linear_router: bool = True  # False: the Hub's router is a bare parameter, which adapters leave alone
    n_shared: int = 0  # experts that every token visits, kept as one MLP of width n_shared * F
    n_dense: int = 0  # leading layers with one MLP of width dense_dim in place of the experts
    dense_dim: int = 0

    def __post_init__(self):
        for name, kind in ((field.name, field.type) for field in fields(self)):
            value, may_be_0 = getattr(self, name), name in ("n_shared", "n_dense", "dense_dim")
            good = isinstance(value, (int, float) if kind is float else kind)
            if kind in (int, float) and good:
                largest = LARGEST.get(name, 1e9 if kind is float else 2**24)
                good = not isinstance(value, bool) and (0 < value <= largest or (may_be_0 and value == 0))
            if not good:
                raise ValueError(f"config.json: {name} is {short(value)}, want a sensible {kind.__name__}")
        for whole, part in ((self.dim, 2 * self.n_heads), (self.n_heads, self.n_kv_heads)):
            if whole % part:  # rotary embedding turns pairs of channels, hence the 2
                raise ValueError(f"config.json: {whole} is no multiple of {part}, the heads need that")
        if self.family == "deepseek" and self.norm_topk and self.top_k == 1:
            raise ValueError(
                "config.json: norm_topk_prob with one expert per token does nothing there: omit it"
            )
        if self.top_k > self.n_experts:
            raise ValueError(
                f"config.json: {self.top_k} experts per token, but only {self.n_experts} experts"
            )

    @property
    def head_dim(self) -> int:
        """C"""
        return self.dim // self.n_heads

    @property
    def moe_layers(self) -> range:
        """The layers with experts."""
        return range(self.n_dense, self.n_layers)

    def by_layer(self, lists: dict[str, list[int]], path: Path) -> dict[int, list[int]]:
        """{layer: ids, ascending} of the experts in `path`. Raises ValueError if they are another model's."""
        found = {layer: sorted(set(lists.get(str(layer), []))) for layer in self.moe_layers}
        highest = max((ids[-1] for ids in found.values() if ids), default=0)
        if not lists.keys() <= {str(layer) for layer in found} or highest >= self.n_experts:
            raise ValueError(
                f"{path} lists experts up to {highest} in layers {short([*lists])}, but the model has "
                f"{self.n_experts} in each of {len(found)}: want a list made for this model"
            )
        return {layer: ids for layer, ids in found.items() if str(layer) in lists}


# Our field -> (key of config.json, the family's class default when the key is absent); key "": it is fixed.
# Sources: transformers' OlmoeConfig and MixtralConfig, configuration_deepseek.py of deepseek-moe-16b-base.
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
        "norm_eps": ("rms_norm_eps", 1e-5),
    },
    "deepseek": {
        "vocab_size": ("vocab_size", 102400), "dim": ("hidden_size", 4096),
        "n_layers": ("num_hidden_layers", 30), "n_heads": ("num_attention_heads", 32),
        "n_kv_heads": ("num_key_value_heads", None), "n_experts": ("n_routed_experts", None),
        "top_k": ("num_experts_per_tok", None), "expert_dim": ("moe_intermediate_size", 1407),
        "norm_topk": ("norm_topk_prob", False), "qk_norm": ("", False), "linear_router": ("", False),
        "max_len": ("max_position_embeddings", 2048), "rope_theta": ("rope_theta", 1e4),
        "norm_eps": ("rms_norm_eps", 1e-6), "n_shared": ("n_shared_experts", 0),
        "n_dense": ("first_k_dense_replace", 0), "dense_dim": ("intermediate_size", 11008),
    },
}  # fmt: skip

# Keys of config.json that would change the computation, which we do not follow -> values that change nothing
# (besides null, false and 0)
UNSUPPORTED = {
    "attention_bias": (), "clip_qkv": (), "hidden_act": ("silu",), "mlp_bias": (), "moe_layer_freq": (1,),
    "partial_rotary_factor": (1,), "pretraining_tp": (1,), "quantization_config": (),
    "router_jitter_noise": (), "routed_scaling_factor": (1,), "scoring_func": ("softmax",),
    "sliding_window": (), "tie_word_embeddings": (), "topk_method": ("greedy",),
}  # fmt: skip


def parse_config(hub: dict) -> MoEConfig:
    """The Hub's config.json -> MoEConfig.

    Raises ValueError for an architecture we do not know, and for settings that we would silently get wrong.
    """
    family = hub.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"config.json: model_type is {family!r}, want one of {', '.join(FAMILIES)}")
    rope = {}
    for part in (hub.get("rope_scaling"), hub.get("rope_parameters")):  # transformers 4; 5
        if part and not isinstance(part, dict):
            raise ValueError(f"config.json: rope settings are {part!r}, want an object or null")
        if part and (part.get("rope_type") or part.get("type") or "default") != "default":
            raise ValueError(f"config.json: rope scaling {part!r} is not implemented, want 'default' or none")
        rope |= part or {}
    found = {key: value for key, value in (hub | rope).items() if value is not None}
    for key, harmless in UNSUPPORTED.items():
        if (value := found.get(key)) and value not in harmless:
            raise ValueError(f"config.json: {key} is {value!r}, which moe_model.py does not implement")

    fields = {ours: found.get(key, default) for ours, (key, default) in FAMILIES[family].items()}
    if fields["n_kv_heads"] is None:
        fields["n_kv_heads"] = fields["n_heads"]
    cfg = MoEConfig(family=family, **fields)
    if (head_dim := found.get("head_dim", cfg.head_dim)) != cfg.head_dim:
        raise ValueError(f"config.json: head_dim is {head_dim}, want hidden size / heads = {cfg.head_dim}")
    return cfg


class Backbone(NamedTuple):
    """A model of the paper: where its weights are, and how its config.json differs from the class default."""

    repo: str
    hub: dict

    @property
    def cfg(self) -> MoEConfig:
        """Its sizes, without any download."""
        return parse_config(self.hub)


BACKBONES = {
    "olmoe-1b-7b": Backbone("allenai/OLMoE-1B-7B-0924", {"model_type": "olmoe", "intermediate_size": 1024}),
    "mixtral-8x7b": Backbone(
        "mistralai/Mixtral-8x7B-v0.1", {"model_type": "mixtral", "max_position_embeddings": 32768}
    ),
    "deepseekmoe-16b": Backbone(
        "deepseek-ai/deepseek-moe-16b-base",
        {
            "model_type": "deepseek", "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
            "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
            "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
            "max_position_embeddings": 4096,
        },
    ),
}  # fmt: skip


def locate(model: str | Path) -> Path:
    """The folder of a model: "tiny", a BACKBONES name, a folder, or a Hub id (downloaded once, then cached).

    A Hub id may end in @ and a revision, such as a commit: that one is taken then, and not the newest.
    Raises FileNotFoundError if there is no such model, or no network to fetch it through.
    """
    if model == "tiny":
        return Path(__file__).parent / "tiny"
    if Path(model).is_dir():
        return Path(model)
    name = BACKBONES[model].repo if model in BACKBONES else str(model)
    repo, _, revision = name.partition("@")
    wanted = (
        f"want tiny, {', '.join(BACKBONES)}, a folder, or a Hub id such as {BACKBONES['olmoe-1b-7b'].repo}"
    )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise FileNotFoundError(f"there is no model {repo!r}: {wanted}")
    try:
        wanted_files = ["*.safetensors", *BESIDE]
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted_files))
    except Exception as error:  # the Hub's client passes on errors of several HTTP libraries
        raise FileNotFoundError(
            f"there is no folder {repo}, and the Hub did not give it ({type(error).__name__}): {wanted}; "
            "without a network, give the folder of a checkpoint that is here"
        ) from error


def read_config(folder: str | Path) -> MoEConfig:
    """The MoEConfig of folder/config.json."""
    return parse_config(read_json(Path(folder) / "config.json", CHECKPOINT))


# Our parameter name -> the checkpoint's. The first match wins; {e} stands for each expert in turn.
NAMES = [
    (r"embed\.weight", r"model.embed_tokens.weight"),
    (r"norm\.weight", r"model.norm.weight"),
    (r"head\.weight", r"lm_head.weight"),
    (r"layers\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"layers\.(\d+)\.attn\.([qkvo])\.weight", r"model.layers.\1.self_attn.\2_proj.weight"),
    (r"layers\.(\d+)\.attn\.([qk])_norm\.weight", r"model.layers.\1.self_attn.\2_norm.weight"),
    (r"layers\.(\d+)\.moe\.router\.weight", r"model.layers.\1.mlp.gate.weight"),
    (r"layers\.(\d+)\.moe\.experts\.(\w+)\.weight", r"model.layers.\1.mlp.experts.{e}.\2_proj.weight"),
    (r"layers\.(\d+)\.moe\.shared\.(\w+)\.weight", r"model.layers.\1.mlp.shared_experts.\2_proj.weight"),
    (r"layers\.(\d+)\.dense\.(\w+)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
]
MIXTRAL_NAMES = [
    (r"layers\.(\d+)\.moe\.router\.weight", r"model.layers.\1.block_sparse_moe.gate.weight"),
    (r"layers\.(\d+)\.moe\.experts\.gate\.weight", r"model.layers.\1.block_sparse_moe.experts.{e}.w1.weight"),
    (r"layers\.(\d+)\.moe\.experts\.up\.weight", r"model.layers.\1.block_sparse_moe.experts.{e}.w3.weight"),
    (r"layers\.(\d+)\.moe\.experts\.down\.weight", r"model.layers.\1.block_sparse_moe.experts.{e}.w2.weight"),
    *NAMES,
]


def hub_names(name: str, cfg: MoEConfig) -> list[str]:
    """The checkpoint's tensors behind our parameter `name`: one, or one for each expert of a stack."""
    for ours, theirs in MIXTRAL_NAMES if cfg.family == "mixtral" else NAMES:
        if match := re.fullmatch(ours, name):
            pattern = match.expand(theirs)
            n = cfg.n_experts if "{e}" in pattern else 1
            return [pattern.replace("{e}", str(e)) for e in range(n)]
    raise KeyError(f"parameter {name!r} has no entry in NAMES")


class Stored(NamedTuple):
    """Where a tensor's bytes are."""

    path: Path
    start: int  # bytes from the start of the file
    dtype: torch.dtype
    shape: tuple[int, ...]


STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name.

    The format: 8 bytes, the length n of the header; n bytes of JSON, {name: {"dtype", "shape",
    "data_offsets": [begin, end]}}; then the tensors. Raises ValueError unless they fill the file to its end.
    """
    try:
        with path.open("rb") as file:
            n = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size - 8 - n  # of the tensors
            if size < 0 or n > LARGEST_JSON:
                raise ValueError(f"a header of {n} bytes")
            entries = json.loads(file.read(n).decode("utf-8"), object_pairs_hook=unique)
        entries.pop("__metadata__", None)
        found, end = {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, after) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if len(shape) > 8 or not all(type(x) is int and 0 <= x < 2**48 for x in (*shape, begin, after)):
                raise ValueError(f"tensor {name!r:.80} has a shape or place that is none")
            if dtype not in STORED_DTYPES:
                raise ValueError(f"tensor {name!r:.80} is {dtype!r:.20}, want {', '.join(STORED_DTYPES)}")
            found[name] = Stored(path, 8 + n + begin, STORED_DTYPES[dtype], shape)
            if begin != end or after - begin != math.prod(shape) * STORED_DTYPES[dtype].itemsize:
                raise ValueError(f"tensor {name!r:.80} is not where it should be")
            end = after
        if end != size:
            raise ValueError(f"the tensors take {end} bytes, but there are {size}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON of other forms
        raise ValueError(
            f"{path} is truncated or corrupt, or not of a model ({error}): download it again"
        ) from error
    return found


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; raises ValueError if a key is there twice."""
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return value


def fingerprint(folder: Path) -> str:
    """sha256 of a model: config.json and all weights."""
    return sha256(folder / "config.json", *shard_paths(folder))


def base_of(folder: Path) -> Path:
    """The folder of a run's base model. Raises FileNotFoundError or ValueError unless it is as it was."""
    run = read_run(folder, "hashes")
    try:
        source = locate(run["model"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} was trained on {run['model']}, which is not there any more: put it back"
        ) from error
    if fingerprint(source) != run["hashes"]["model"]:
        raise ValueError(f"{run['model']} is not any more what {folder} was trained on: put it back")
    return source


class Checkpoint:
    """A folder of safetensors, single or sharded, whose tensors are read one by one, straight into place.

    (The safetensors package maps files into memory: a copy more, 2.4 times the CPU time; LOG.md.)
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        for path in shard_paths(folder):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: want the weights as safetensors, all shards")
            found = read_header(path)
            if both := self.tensors.keys() & found.keys():
                raise ValueError(f"{path}: tensor {min(both)} is in another shard as well: download it again")
            self.tensors |= found

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the files hold exactly the tensors `wanted`, in these shapes."""
        found = {name for name in self.tensors if not name.endswith("rotary_emb.inv_freq")}  # old: a constant
        for names, what in ((wanted.keys() - found, "lacks"), (found - wanted.keys(), "has unexpected")):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(
                    f"{self.folder} {what} tensor {min(names)}{more}: "
                    "want the config.json and the weights of one model that moe_model.py knows"
                )
        for name, shape in wanted.items():
            if (got := self.tensors[name].shape) != shape:
                raise ValueError(f"{self.folder}: tensor {name} is {got}, but config.json makes it {shape}")

    def read(self, name: str) -> Tensor:
        """The tensor `name`, as it is stored."""
        stored = self.tensors[name]
        return self.read_into(name, torch.empty(stored.shape, dtype=stored.dtype))

    def read_into(self, name: str, out: Tensor, first_row: int = 0) -> Tensor:
        """Fill `out` with the tensor `name`, or with as many of its rows as `out` has; returns `out`.

        The bytes go over a buffer only if dtype or device differ. Nothing else of the tensor is read.
        """
        stored = self.tensors[name]
        assert out.shape[1:] == stored.shape[1:], name
        if out.dtype != stored.dtype or out.device.type != "cpu" or not out.is_contiguous():
            return out.copy_(self.read_into(name, torch.empty(out.shape, dtype=stored.dtype), first_row))
        room = memoryview(out.detach().flatten().view(torch.uint8).numpy())
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start + first_row * math.prod(stored.shape[1:]) * stored.dtype.itemsize)
            while room:
                if not (n := file.readinto(room)):
                    raise ValueError(f"{stored.path} ends within {name}: it was changed while it was read")
                room = room[n:]
        return out


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    weight_map = read_json(index, CHECKPOINT).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(f, str) and re.fullmatch(r"[\w.-]+", f) for f in weight_map.values()
    ):
        raise ValueError(f"{index} has no weight_map from tensors to file names: download it again")
    return [folder / shard for shard in sorted(set(weight_map.values()))]
