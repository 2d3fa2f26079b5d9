"""The house: which file may import which, what importing one loads, whether the pages are right."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import paper

ORDER = [  # a file may import only files before it
    "plumbing.__init__",
    "plumbing.quiet", "plumbing.ranks", "plumbing.files", "plumbing.hub", "plumbing.device",
    "plumbing.cli", "plumbing.flags", "plumbing.bpe", "plumbing.tokenizer",
    "moe_model",
    "plumbing.checkpoint", "plumbing.downloads", "plumbing.rows", "plumbing.data",
    "plumbing.answer_loss", "plumbing.base_model", "plumbing.run_folder", "plumbing.saves",
    "catcher", "hellora", "plumbing.memory", "generate", "eval_gsm8k", "settings", "report",
    "train", "export",
]  # fmt: skip
UPWARDS = {("moe_model", "plumbing.checkpoint")}  # inside a function: MoEModel.from_pretrained
WINGS = ("tiny", "paper", "examples")
ALLOWED = {
    "torch", "safetensors", "huggingface_hub", "tiktoken", "numpy", "tqdm", "filelock", "jinja2",
}  # fmt: skip
PEERS = {  # used where installed
    "paper/bench/peers.py": {"transformers", "peft"},
    "paper/real_size.py": {"transformers"},
    "paper/figures.py": {"matplotlib"},
}


def name_of(path):
    """plumbing/ranks.py -> plumbing.ranks"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def files(*folders):
    """All Python files at the top level and below these folders."""
    below = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted([*ROOT.glob("*.py"), *below])


def imported(path, at_module_level_only=False):
    """Names of the modules that a file imports, a package's own also as package.name."""
    tree, names = ast.parse(path.read_text()), set()
    for node in tree.body if at_module_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: an import that starts with a dot"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_file_imports_only_what_stands_below_it():
    house = files("plumbing")
    assert {name_of(path) for path in house} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))
    upwards = set()
    for path in house:
        name = name_of(path)
        higher = ORDER[ORDER.index(name) :]
        upwards |= {(name, other) for other in imported(path) & set(higher)}
    assert upwards == UPWARDS


@pytest.mark.parametrize("name", ["plumbing.ranks", "moe_model"])
def test_the_two_files_below_all_others_import_nothing_of_ours(name):
    path = ROOT / f"{name.replace('.', '/')}.py"
    ours = {*ORDER, "plumbing", *WINGS}
    assert not imported(path, at_module_level_only=True) & ours


def test_the_house_imports_nothing_of_its_wings():
    for path in files("plumbing"):
        assert not {name.partition(".")[0] for name in imported(path)} & set(WINGS), path


def test_the_method_in_one_file_needs_nothing_else():
    outside = {name.partition(".")[0] for name in imported(ROOT / "examples" / "one_file.py")}
    assert outside - set(sys.stdlib_module_names) == {"torch", "safetensors", "tiktoken"}


def test_no_framework_stands_between_the_reader_and_a_step():
    ours = {"plumbing", *WINGS, *(path.stem for path in ROOT.glob("*.py"))}
    for path in files("plumbing", "tiny", "paper"):
        outside = {name.partition(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        peers = PEERS.get(path.relative_to(ROOT).as_posix(), set())
        assert outside <= ALLOWED | ours | peers, path


# ---- one file of the house, by itself ------------------------------------------------------------


def elsewhere(folder, code):
    """What `code` prints in a fresh interpreter that knows this repository by PYTHONPATH alone."""
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = """
import sys
from pathlib import Path

sys.modules["fcntl"] = sys.modules["resource"] = None  # what Windows lacks
import hellora

root = Path(hellora.__file__).parent
found = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
ours = [Path(file) for file in found if file and root in Path(file).parents]
print(*(path.relative_to(root).as_posix() for path in ours if "site-packages" not in path.parts))
"""


def test_importing_hellora_loads_little_else_and_nothing_of_unix(tmp_path):
    most = {"hellora.py", "moe_model.py", "plumbing/__init__.py", "plumbing/ranks.py"}
    loaded = set(elsewhere(tmp_path, LOADED).split())
    assert {"hellora.py", "moe_model.py"} <= loaded <= most


ALONE = """
import sys
import torch
from hellora import attach, init_adapters, merge, parse_method
from moe_model import MoEModel

model = MoEModel.from_pretrained(sys.argv[1])
attach(model, parse_method("hellora"), dict.fromkeys(model.cfg.moe_layers, [0, 5]), 4, 8)
init_adapters(model, 0)
merge(model)
model(torch.tensor([[1, 2, 3]]))
"""


def test_four_files_are_all_that_a_port_copies(tmp_path):
    (tmp_path / "plumbing").mkdir()
    for name in ("hellora.py", "moe_model.py", "plumbing/checkpoint.py", "plumbing/ranks.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", ALONE, str(ROOT / "tiny")]
    subprocess.run(words, cwd=tmp_path, env=env | {"OMP_NUM_THREADS": "1"}, check=True)


IN_ANOTHER_PROJECT = """
import torch
from moe_model import MoEConfig, MoEModel
from hellora import attach, init_adapters, parse_method

torch.manual_seed(0)
cfg = MoEConfig(
    family="olmoe", vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=4, n_experts=8,
    top_k=2, expert_dim=16, norm_topk=False, qk_norm=True, max_len=32, rope_theta=1e4,
    norm_eps=1e-5,
)
model = MoEModel(cfg)
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.3)
tokens = torch.randint(64, (4, 16))
with torch.no_grad():
    before = model(tokens)[0]
attach(model, parse_method("hellora"), {0: [1, 6], 1: [0, 3]}, rank=4, alpha=8)
init_adapters(model, seed=0)
with torch.no_grad():
    assert torch.allclose(model(tokens)[0], before, atol=1e-5)  # B = 0: still the base model
loss, routing = model(tokens, targets=tokens)
loss.backward()
for name, p in model.named_parameters():
    assert (p.grad is not None) == (".lora." in name), name
    if name.endswith("experts.down.lora.B"):
        assert p.shape[0] == 2 and p.grad.flatten(1).norm(dim=1).gt(0).all(), name
print("trained" if loss.isfinite() else loss)
"""


def test_another_project_can_attach_hellora_to_two_experts_and_train(tmp_path):
    assert elsewhere(tmp_path, IN_ANOTHER_PROJECT) == "trained\n"
    assert not [*tmp_path.iterdir()]  # and nothing is written


def test_the_model_knows_nothing_of_adapters():
    """Below its opening docstring: its seam is that a module may be replaced, no more."""
    text = (ROOT / "moe_model.py").read_text()
    below = "\n".join(text.splitlines()[ast.parse(text).body[0].end_lineno :])
    assert "class MoEModel" in below
    assert not re.findall(r"(?i)adapter|adapted|lora|\bhot\b", below)


# ---- pages ---------------------------------------------------------------------------------------


def test_no_result_names_a_place_on_the_machine_that_measured_it():
    files = sorted((ROOT / "docs" / "results").rglob("*.json"))
    assert len(files) > 500
    # An absolute path, also within a command. Packed scores have slashes too, so it is by name.
    places = re.compile(r'(?<=[" =])/(?:home|root|work|tmp|mnt|opt|var|data|Users)/[^" ]*')
    for file in files:
        found = places.findall(file.read_text())
        assert not found, (file.name, found)


def test_results_quoted_in_tiny_s_readme_are_the_committed_ones():
    page = (ROOT / "tiny" / "README.md").read_text()
    assert (ROOT / "docs/results/tiny-report.txt").read_text().rstrip() in page
    seeds = json.loads((ROOT / "docs/results/tiny-math-hellora.json").read_text())["seeds"]
    for task in ("tiny-math", "tiny-math-reworded"):
        assert ", ".join(f"{100 * of[task]['accuracy']:.1f}" for of in seeds.values()) in page


def test_nothing_private_is_committed():
    """No path of a machine on which this was made, in code or in a page, however deep."""
    folders = ("docs", "plumbing", "tests", *WINGS)
    below = [path for folder in folders for path in (ROOT / folder).rglob("*.[pm][yd]")]
    looked_at = [*ROOT.glob("*.[pm][yd]"), *below]
    assert {"bench", "plumbing", "studies"} <= {path.parent.name for path in looked_at}
    for path in looked_at:
        assert not re.search(r"(?<![\w.])/(work|root|home)/", path.read_text()), path


def test_papers_page_of_contents_names_every_file_under_its_folder():
    found = re.split(r"^(\w+)/? {2,}", paper.__doc__, flags=re.M)
    parts = zip(found[1::2], found[2::2], strict=True)
    told = {name: set(re.findall(r"\w+", text)) for name, text in parts}
    folders = {path.parent for path in (ROOT / "paper").rglob("*.py")}
    assert told.keys() == {"Commands", *(f.name for f in folders - {ROOT / "paper"})}
    for folder in folders:
        of = told["Commands" if folder == ROOT / "paper" else folder.name]
        assert {path.stem for path in folder.glob("*.py")} - {"__init__"} <= of, folder
