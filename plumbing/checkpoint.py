"""A model as the Hub stores it: config.json, tensor names, safetensors. It is read here alone.

moe_model.py holds what is computed with them. Sizes have the letters that are defined there.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
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

BESIDE = (  # of a model's files, besides its weights; nothing here runs the Python ones
    "*.json", "tokenizer.model", "merges.txt", "*.jinja",
    "configuration_*.py", "modeling_*.py", "LICENSE*",
)  # fmt: skip
CHECKPOINT = (
    "a folder with config.json and model.safetensors (or shards and their index), as on the Hub"
)

LARGEST_JSON = 1 << 24  # bytes: as Python objects they may take a hundred times as many
LARGEST = {
    "n_layers": 200,
    "n_experts": 1000,
    "n_shared": 1000,
}  # more would only take time and memory
MAY_BE_0 = ("n_shared", "n_dense", "dense_dim")

# ---- config.json ---------------------------------------------------------------------------------


# Our field -> (key of config.json, the default of the family's class for a config.json without it).
# The key "" says that the value is fixed. Sources: transformers' OlmoeConfig and MixtralConfig, and
# configuration_deepseek.py of deepseek-moe-16b-base.
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
        "norm_topk": ("norm_topk_prob", False), "qk_norm": ("", False),
        "linear_router": ("", False),
        "max_len": ("max_position_embeddings", 2048), "rope_theta": ("rope_theta", 1e4),
        "norm_eps": ("rms_norm_eps", 1e-6), "n_shared": ("n_shared_experts", 0),
        "n_dense": ("first_k_dense_replace", 0), "dense_dim": ("intermediate_size", 11008),
    },
}  # fmt: skip

# Keys of config.json that would change the computation in a way that moe_model.py does not follow
# -> the values that change nothing. Neither do null, false and 0.
UNSUPPORTED = {
    "attention_bias": (), "clip_qkv": (), "hidden_act": ("silu",), "mlp_bias": (),
    "moe_layer_freq": (1,),
    "partial_rotary_factor": (1,), "pretraining_tp": (1,), "quantization_config": (),
    "router_jitter_noise": (), "routed_scaling_factor": (1,), "scoring_func": ("softmax",),
    "sliding_window": (), "tie_word_embeddings": (), "topk_method": ("greedy",),
}  # fmt: skip


def parse_config(hub: dict) -> MoEConfig:
    """The Hub's config.json -> MoEConfig.

    Raises ValueError for an architecture we do not know, and for settings that we would silently
    get wrong.
    """
    family = hub.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"config.json: model_type is {family!r}, want one of {', '.join(FAMILIES)}"
        )
    rope = {}
    for part in (hub.get("rope_scaling"), hub.get("rope_parameters")):  # transformers 4; 5
        if part and not isinstance(part, dict):
            raise ValueError(f"config.json: rope settings are {part!r}, want an object or null")
        if part and (part.get("rope_type") or part.get("type") or "default") != "default":
            raise ValueError(
                f"config.json: rope scaling {part!r} is not implemented, want 'default' or none"
            )
        rope |= part or {}
    found = {key: value for key, value in (hub | rope).items() if value is not None}
    for key, harmless in UNSUPPORTED.items():
        if (value := found.get(key)) and value not in harmless:
            raise ValueError(
                f"config.json: {key} is {value!r}, which moe_model.py does not implement"
            )

    sizes = {ours: found.get(key, default) for ours, (key, default) in FAMILIES[family].items()}
    if sizes["n_kv_heads"] is None:
        sizes["n_kv_heads"] = sizes["n_heads"]
    cfg = MoEConfig(family=family, **sizes)
    check_sizes(cfg)
    if (head_dim := found.get("head_dim", cfg.head_dim)) != cfg.head_dim:
        raise ValueError(
            f"config.json: head_dim is {head_dim}, want hidden size / heads = {cfg.head_dim}"
        )
    return cfg


def check_sizes(cfg: MoEConfig) -> None:
    """Raise ValueError unless each value has its type and a sensible size, and all fit."""
    for field in fields(cfg):
        value, kind = getattr(cfg, field.name), field.type
        if not is_sensible(value, kind, field.name):
            raise ValueError(
                f"config.json: {field.name} is {short(value)}, want a sensible {kind.__name__}"
            )
    for whole, part in ((cfg.dim, 2 * cfg.n_heads), (cfg.n_heads, cfg.n_kv_heads)):
        if whole % part:  # rotary embedding turns pairs of channels, hence the 2
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
    """Whether the value of the field `name` has its type and, as a number, a sensible size."""
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        return False
    largest = LARGEST.get(name, 1e9 if kind is float else 2**24)
    return 0 < value <= largest or (name in MAY_BE_0 and value == 0)


class Backbone(NamedTuple):
    """A model of the paper: where its weights are, and what its config.json sets."""

    repo: str
    hub: dict

    @property
    def cfg(self) -> MoEConfig:
        """Its sizes, without any download."""
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
}  # fmt: skip


def locate(model: str | Path) -> Path:
    """The folder of a model: "tiny", a BACKBONES name, a folder, or a Hub id.

    A model of the Hub is downloaded once and then cached. Its id may end in @ and a revision, such
    as a commit: that one is taken then, and not the newest. Raises FileNotFoundError if there is no
    such model, or no network to fetch it through.
    """
    if model == "tiny":
        return Path(__file__).parent.parent / "tiny"
    if model != "" and Path(model).is_dir():  # Path("") would be the working directory
        return Path(model)
    name = BACKBONES[model].repo if model in BACKBONES else str(model)
    repo, _, revision = name.partition("@")
    example = BACKBONES["olmoe-1b-7b"].repo
    wanted = f"want tiny, {', '.join(BACKBONES)}, a folder, or a Hub id such as {example}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise FileNotFoundError(f"there is no model {repo!r}: {wanted}")
    from huggingface_hub import snapshot_download  # here, as it takes long to import

    try:
        wanted_files = ["*.safetensors", *BESIDE]
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted_files))
    except Exception as error:  # the Hub's client passes on errors of several HTTP libraries
        raise FileNotFoundError(
            f"there is no folder {repo}, and the Hub did not give it ({type(error).__name__}): "
            f"{wanted}; without a network, give the folder of a checkpoint that is here"
        ) from error


def read_config(folder: str | Path) -> MoEConfig:
    """The MoEConfig of folder/config.json."""
    return parse_config(read_object(Path(folder) / "config.json"))


def read_object(path: Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError or ValueError that name the path.

    It is not files.read_json, so that a model can be loaded with this file and ranks.py alone.
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

MOST_DIMENSIONS = 8  # of a stored tensor; weights have 2, or 3 where experts are stacked


class Stored(NamedTuple):
    """A tensor of a checkpoint, not yet read."""

    path: Path  # of its shard
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """All tensors of a folder of safetensors, single or sharded. Each is read when asked for."""

    def __init__(self, folder: Path):
        """Read the headers. Raises FileNotFoundError or ValueError that name the shard."""
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        for path in shard_paths(folder):
            found = stored_in(path)
            if both := self.tensors.keys() & found.keys():
                raise ValueError(
                    f"{path}: tensor {min(both)} is in another shard as well: download it again"
                )
            self.tensors |= found

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the files hold exactly the tensors `wanted`, in these shapes."""
        # Old checkpoints hold the rotary angles as well, which are computed here.
        found = {name for name in self.tensors if not name.endswith("rotary_emb.inv_freq")}
        for names, what in (
            (wanted.keys() - found, "lacks"),
            (found - wanted.keys(), "has unexpected"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(
                    f"{self.folder} {what} tensor {min(names)}{more}: "
                    "want the config.json and the weights of one model that moe_model.py knows"
                )
        for name, shape in wanted.items():
            if (got := self.tensors[name].shape) != shape:
                raise ValueError(
                    f"{self.folder}: tensor {name} is {got}, but config.json makes it {shape}"
                )

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes in which tensors are stored."""
        return {stored.dtype for stored in self.tensors.values()}

    def read(self, name: str) -> Tensor:
        """The tensor `name` as it is stored: a view of its file, which is mapped into memory."""
        with opened(self.tensors[name].path) as file:
            return file.get_tensor(name)

    def read_all(self, names: list[str]) -> Iterator[Tensor]:
        """These tensors, one after the other. Neighbours in one shard share one opening of it.

        What was read of a file stays in memory until it is closed, so it is not kept open for all.
        An opening parses the header again, so it is not opened for each.
        """
        for path, group in groupby(names, key=lambda name: self.tensors[name].path):
            with opened(path) as file:
                for name in group:
                    yield file.get_tensor(name)

    def read_rows(self, name: str, first: int, n: int) -> Tensor:
        """Rows of the tensor `name`, from `first` on, likewise [n, ...]. No other row is read."""
        with opened(self.tensors[name].path) as file:
            return file.get_slice(name)[first : first + n]


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file to read from. Raises FileNotFoundError or ValueError that name it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: want the weights as safetensors, all shards")
    path.open("rb").close()  # the library says of a file that may not be read that there is none
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated or corrupt, or not of a model ({error!s:.200}): download it again"
        ) from error


def stored_in(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file by name. Raises ValueError for a dtype of no weights."""
    found = {}
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            dtype = tensor.get_dtype()
            if dtype not in DTYPES:
                raise ValueError(f"tensor {name!r:.80} is {dtype}, want {', '.join(DTYPES)}")
            shape = tuple(tensor.get_shape())
            if len(shape) > MOST_DIMENSIONS:
                raise ValueError(f"tensor {name!r:.80} has {len(shape)} dimensions")
            found[name] = Stored(path, DTYPES[dtype], shape)
    return found


def names_in(path: Path) -> list[str]:
    """The names of the tensors of one safetensors file."""
    return [*stored_in(path)]


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, or model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and re.fullmatch(r"[\w.-]+", file) for file in weight_map.values()
    ):
        raise ValueError(f"{index} has no weight_map from tensors to file names: download it again")
    return [folder / shard for shard in sorted(set(weight_map.values()))]


# ---- a model from them ---------------------------------------------------------------------------


def empty_model(cfg: MoEConfig, dtype: torch.dtype, matmul: str = "grouped") -> MoEModel:
    """A model of shapes without memory (meta device), to be filled by load_weights."""
    with torch.device("meta"):
        return MoEModel(cfg, dtype, matmul).to(dtype)


def base_parameters(cfg: MoEConfig) -> dict[str, tuple[torch.Size, list[str]]]:
    """{our parameter: its shape, the checkpoint's tensors behind it}; knows nothing of adapters."""
    bare = empty_model(cfg, torch.float32)
    return {name: (p.shape, hub_names(name, cfg)) for name, p in bare.named_parameters()}


def check_weights(cfg: MoEConfig, source: Checkpoint) -> None:
    """Raise ValueError unless `source` holds just the tensors of such a model. Reads no values."""
    base = base_parameters(cfg).values()
    source.check({tensor: tuple(shape[-2:]) for shape, tensors in base for tensor in tensors})


@torch.no_grad()
def load_weights(model: MoEModel, source: Checkpoint, device: str | torch.device) -> None:
    """Materialise `model` on `device` and fill its base parameters from `source`.

    Each parameter asks for its own tensors, so the memory on top of the model is one parameter's at
    most. A rank reads the rows that it holds. Adapters, if attached, are left without values.
    """
    base = base_parameters(model.cfg)
    check_weights(model.cfg, source)
    model.to_empty(device=device)
    for name, (shape, tensors) in tqdm(base.items(), "load", unit="tensor", delay=2, leave=False):
        param = model.get_parameter(name)
        rows, first = ranks.mine(param), ranks.first_row(param)
        if len(shape) < 3:  # one matrix or vector
            rows.copy_(source.read_rows(tensors[0], first, len(rows)))
        else:  # a stack: a row of it is one expert's matrix
            mine = tensors[first : first + len(rows)]
            for weight, stored in zip(rows, source.read_all(mine), strict=True):
                weight.copy_(stored)
