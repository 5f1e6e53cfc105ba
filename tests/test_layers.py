"""Holds the rooms of `kdloss`: their imports, what `import kdloss` loads, what is public, how many parameters."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdloss
import kdloss.testing

PACKAGE = Path(kdloss.__file__).parent

# A room is a file, or a folder as one. A room imports only from rooms above it, and from its own.
ROOMS = (
    "_docs",
    "_checks",
    "_distributed",
    "_packing",
    "_triton",
    "_softmax",
    "_logprobs",
    "_divergences",
    "_losses",
    "schedules",
    "config",
    "testing",
    "integrations",
)

# These answer different questions, so none of them imports another, except for one: divergences from a few log-probs
# per row, of a teacher's top K and of sampled tokens, read these from the student's head as log-probs of labels.
PEERS = {"_logprobs", "_divergences", "_losses"}
BETWEEN_PEERS = {("_divergences", "_logprobs")}

# Users import these by name; `import kdloss` does not load them, and they may use the public names of `kdloss`.
ON_REQUEST = ("testing", "integrations")

# What may be imported at the top of a file. Everything else is imported where it is used, so that the library can be
# imported without a GPU, without trainers and without test tools.
RUNTIME = {"kdloss", "torch", "numpy", "einops", *sys.stdlib_module_names}
ALSO = {"kdloss._triton": {"triton"}, "kdloss.testing.strategies": {"hypothesis"}}

# The files of the package that tests of this file inject faults into, all empty.
FILES = (
    "__init__.py",
    "_checks.py",
    "_packing/layout.py",
    "_triton/rows.py",
    "_logprobs/fused.py",
    "integrations/_layout.py",
    "integrations/verl.py",
    "testing/__init__.py",
)

# An internal function that needs more takes its options as one value, a NamedTuple. Exempt are public functions,
# oracles (their parameters are those of the function that they check), operators and their autograd, Triton kernels,
# and the functions named here, which a trainer calls with its own arguments.
MOST_PARAMETERS = 10
OF_TRAINERS = {
    "kdloss.integrations.areal.grpo_loss_fn": "AReaL",
    "kdloss.integrations.trl.chunked_divergence_loss": "TRL",
}

LAZY_PACKAGES = ("triton", "transformers", "hypothesis", "pytest")


def module_name(path: Path, package: Path) -> str:
    """`kdloss.testing.reference` for .../kdloss/testing/reference.py."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str, package: Path) -> bool:
    path = package.parent.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def top_level_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs on import: all except the bodies of functions and of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from top_level_nodes(node)


def imports(path: Path, package: Path, *, on_import_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in the file the import stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    base = module_name(path, package).split(".")
    if path.name != "__init__.py":
        base = base[:-1]
    found = set()
    for node in top_level_nodes(tree) if on_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join(parent + (node.module.split(".") if node.module else []))
            # `from . import _checks` names a module, `from ._checks import floating` a name in one.
            for alias in node.names:
                name = f"{module}.{alias.name}"
                found.add(name if name.startswith("kdloss.") and exists(name, package) else module)
    return found


def imported_names(path: Path, package: Path) -> set[tuple[str, str]]:
    """(module of `kdloss`, name) of everything that a file imports from a module; modules themselves do not count."""
    base = module_name(path, package).split(".")
    base = base if path.name == "__init__.py" else base[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parent = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join(parent + (node.module.split(".") if node.module else []))
            if module.split(".")[0] == "kdloss":
                found |= {(module, x.name) for x in node.names if not exists(f"{module}.{x.name}", package)}
    return found


def room(module: str) -> str:
    """`_packing` for `kdloss._packing`, `testing` for `kdloss.testing.reference`, '' for `kdloss` itself."""
    return module.split(".")[1] if "." in module else ""


def faults(package: Path) -> list[str]:
    """Everything in a package that breaks the order of the rooms, one sentence each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        module = module_name(path, package)
        here = room(module)
        if here == "":
            found += [
                f"kdloss/__init__.py imports {name}, which is loaded on request only"
                for name in sorted(imports(path, package))
                if room(name) in (*ON_REQUEST, "_triton") and name.startswith("kdloss.")
            ]
            continue
        if here not in ROOMS:
            found.append(f"{module} is in no room")
            continue
        also = set().union(*(names for prefix, names in ALSO.items() if module.startswith(prefix)))
        for name in sorted(imports(path, package, on_import_only=True)):
            if name.split(".")[0] not in RUNTIME | also or (room(name) == "_triton" and here != "_triton"):
                found.append(f"{module} imports {name} at its top, not where it is used")
        for name in sorted(imports(path, package)):
            if name.split(".")[0] != "kdloss":
                continue
            there = room(name)
            if there == "":
                if here not in ON_REQUEST:
                    found.append(f"{module} imports kdloss itself, which imports it")
            elif there == here:
                adapter = name.split(".")[2] if here == "integrations" and name.count(".") > 1 else "_"
                own = module.split(".")[-1].startswith(f"_{adapter}_")  # a private file of that adapter, as its plug-in
                if not adapter.startswith("_") and not own and name != module:
                    found.append(f"{module} imports {name}: adapters are leaves")
            elif there not in ROOMS:
                found.append(f"{module} imports {name}, which is in no room")
            elif ROOMS.index(there) > ROOMS.index(here):
                found.append(f"{module} imports {name} from below")
            elif {here, there} <= PEERS and (here, there) not in BETWEEN_PEERS:
                found.append(f"{module} imports {name}: {here} and {there} import nothing from each other")
        found += [
            f"{module} imports the private {name} of another room"
            for origin, name in sorted(imported_names(path, package))
            if name.startswith("_") and room(origin) != here
        ]
    return found


def is_exempt(function: ast.FunctionDef, owner: ast.AST, tree: ast.Module, module: str) -> bool:
    """Whether something outside the library sets the signature of a function, or it is public."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    if any(re.match(r"operator\(|torch\.library\.custom_op\(|triton\.jit\b|.*\.register_fake$", x) for x in decorators):
        return True
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    hooks = [call for call in calls if ast.unparse(call.func).endswith(".register_autograd")]
    if any(
        function.name in {ast.unparse(x) for x in [*hook.args, *(k.value for k in hook.keywords)]} for hook in hooks
    ):
        return True
    if isinstance(owner, ast.ClassDef):
        if function.name == "__init__":
            return not owner.name.startswith("_")
        return (
            any(ast.unparse(base) == "torch.autograd.Function" for base in owner.bases) and "staticmethod" in decorators
        )
    public = function.name in kdloss.__all__ and owner is tree
    return public or module.startswith("kdloss.testing._oracles.") or f"{module}.{function.name}" in OF_TRAINERS


def wide_functions(package: Path) -> list[str]:
    """Functions that are not exempt and take more than `MOST_PARAMETERS`, `self` and `cls` not counted."""
    found = []
    for path in sorted(package.rglob("*.py")):
        module, tree = module_name(path, package), ast.parse(path.read_text(encoding="utf-8"))
        for owner in ast.walk(tree):
            for node in ast.iter_child_nodes(owner):
                if isinstance(node, ast.FunctionDef):
                    names = [x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                    count = len(names) - (names[:1] in (["self"], ["cls"]))
                    if count > MOST_PARAMETERS and not is_exempt(node, owner, tree, module):
                        found.append(f"{module}.{node.name} takes {count} parameters")
    return found


def test_a_room_imports_only_from_rooms_above_it():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("_checks.py", "from ._packing import layout", "kdloss._checks imports kdloss._packing.layout from below"),
        ("_checks.py", "from . import _packing", "kdloss._checks imports kdloss._packing from below"),
        ("_checks.py", "def f():\n    import kdloss._packing", "kdloss._checks imports kdloss._packing from below"),
        ("config.py", "from kdloss import pack", "kdloss.config imports kdloss itself, which imports it"),
        ("config.py", "from ._unknown import x", "kdloss.config imports kdloss._unknown, which is in no room"),
        ("_unknown.py", "", "kdloss._unknown is in no room"),
        (
            "_softmax/new.py",
            "from kdloss._triton.rows import f",
            "kdloss._softmax.new imports kdloss._triton.rows at its top, not where it is used",
        ),
        (
            "_losses/new.py",
            "from kdloss._logprobs.fused import f",
            "kdloss._losses.new imports kdloss._logprobs.fused: _losses and _logprobs import nothing from each other",
        ),
        (
            "_losses/new.py",
            "from kdloss._packing.layout import _segments",
            "kdloss._losses.new imports the private _segments of another room",
        ),
        ("_logprobs/new.py", "import triton", "kdloss._logprobs.new imports triton at its top, not where it is used"),
        (
            "config.py",
            "try:\n    import omegaconf\nexcept ImportError:\n    pass",
            "kdloss.config imports omegaconf at its top, not where it is used",
        ),
        (
            "integrations/trl.py",
            "from .verl import f",
            "kdloss.integrations.trl imports kdloss.integrations.verl: adapters are leaves",
        ),
        (
            "__init__.py",
            "from . import testing",
            "kdloss/__init__.py imports kdloss.testing, which is loaded on request only",
        ),
    ],
)
def test_an_injected_fault_is_found(tmp_path, file, line, fault):
    package = tmp_path / "kdloss"
    for name in (*FILES, file):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / file).write_text(line)
    assert faults(package) == [fault]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("_logprobs/new.py", "def f():\n    from kdloss._triton import rows"),
        ("_packing/new.py", "from kdloss import _checks\nfrom .layout import _segments"),
        ("testing/tree.py", "import kdloss\nfrom ..schedules import cosine\nfrom .reference import pack"),
        ("integrations/trl.py", "from kdloss import kdrl_loss\nfrom ._layout import rows"),
        ("integrations/_verl_plugin.py", "from .verl import register"),
        ("_triton/rows.py", "import triton"),
        ("_checks.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"),
    ],
)
def test_an_allowed_import_is_no_fault(tmp_path, file, line):
    package = tmp_path / "kdloss"
    for name in (*FILES, file):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / file).write_text(line)
    assert faults(package) == []


def test_no_internal_function_takes_more_than_ten_parameters():
    assert wide_functions(PACKAGE) == []


def test_a_function_of_eleven_parameters_is_found(tmp_path):
    wide = ", ".join(f"x{i}" for i in range(11))
    file = tmp_path / "kdloss" / "_packing" / "new.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        f"""
def function(x, *, {wide[4:]}): ...
def kdrl_loss({wide}): ...
class _Private:
    def __init__(self, {wide}): ...
    def method(self, {wide[4:]}): ...
class Public:
    def __init__(self, {wide}): ...
class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, {wide}): ...
@operator("name")
def _operator({wide}): ...
@_operator.register_fake
def _({wide}): ...
def _backward(ctx, {wide}): ...
_operator.register_autograd(_backward, setup_context=_save)
@triton.jit(do_not_specialize=["x0"])
def kernel({wide}): ...
""",
        encoding="utf-8",
    )
    module = "kdloss._packing.new"
    assert wide_functions(tmp_path / "kdloss") == [
        f"{module}.function takes 11 parameters",
        f"{module}.__init__ takes 11 parameters",
    ]


def reachable(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """(room, room) wherever arrows lead from the first to the second, directly or through others."""
    found = set(arrows)
    while new := {(a, d) for a, b in found for c, d in found if b == c} - found:
        found |= new
    return found


def test_the_picture_in_contributing_shows_who_may_import_whom():
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = re.search(r"```mermaid\nflowchart LR\n(.+?)```", page, re.DOTALL)
    assert picture is not None
    arrows = set()
    for line in picture[1].splitlines():
        steps = [step.split(" & ") for step in line.strip().split(" --> ")]
        arrows |= {(a, b) for here, there in itertools.pairwise(steps) for a in here for b in there}
    allowed = {
        (here, there)
        for number, here in enumerate(ROOMS)
        for there in ROOMS[:number]
        if not {here, there} <= PEERS or (here, there) in BETWEEN_PEERS
    }
    assert reachable(arrows) == allowed


def test_the_plan_of_the_house_fits_on_a_page():
    """Few rooms, and few arrows between them. Before adding a room, ask whether the code belongs in an existing one."""
    assert len([entry for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]) <= 16
    arrows = {
        (room(module_name(path, PACKAGE)), room(name))
        for path in PACKAGE.rglob("*.py")
        for name in imports(path, PACKAGE)
        if name.split(".")[0] == "kdloss" and room(name)
    }
    assert len({(here, there) for here, there in arrows if here != there}) <= 41


def test_the_oracles_import_neither_torch_nor_the_code_that_they_check():
    oracles = sorted((PACKAGE / "testing" / "_oracles").glob("*.py"))
    assert len(oracles) > 8
    for path in (*oracles, PACKAGE / "testing" / "reference.py"):
        for name in imports(path, PACKAGE):
            assert name.split(".")[0] != "torch", f"{path.name} imports torch"
            own = name.startswith("kdloss.testing._oracles")
            assert own or name.split(".")[0] != "kdloss", f"{path.name} imports {name}"


@pytest.mark.slow
def test_import_loads_no_optional_package():
    # `import kdloss` raises no warning either.
    strict = r"import warnings; warnings.filterwarnings('error', module=r'kdloss(\.|$)')"
    code = f"{strict}; import sys, kdloss; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert loaded.returncode == 0, loaded.stderr
    modules = loaded.stdout.split()
    assert "kdloss" in modules
    assert [name for name in modules if name.split(".")[0] in LAZY_PACKAGES] == []
    assert [name for name in modules if name.startswith(tuple(f"kdloss.{x}" for x in (*ON_REQUEST, "_triton")))] == []


def test_all_lists_exactly_the_reexported_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    reexports = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "kdloss"):
            for alias in node.names:
                assert alias.asname == alias.name, f"line {node.lineno}: write `{alias.name} as {alias.name}`"
                reexports.append(alias.name)
    assert sorted(reexports) == sorted(kdloss.__all__)
    assert len(set(kdloss.__all__)) == len(kdloss.__all__)
    assert [name for name in kdloss.__all__ if name.startswith("_") or not hasattr(kdloss, name)] == []
