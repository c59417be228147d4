"""How package and tests are built: which way imports go, what is public, how long a file is."""

import ast
import doctest
import importlib.metadata
import inspect
import pathlib
import subprocess
import sys
import typing
from collections import Counter

import pytest
import torch
import typing_extensions
from torch import nn

import funcjac
from tests.conftest import LONGEST

ROOT = pathlib.Path(funcjac.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
every_file = pytest.mark.parametrize("name", FILES)
MOST_LINES, MOST_LINES_OF_A_CLASS, MOST_LINES_OF_A_FUNCTION = 400, 150, 40
MOST_FILES_OF_A_TEST_FOLDER = 12
MOST_NESTING, MOST_FILES_OF_A_FOLDER, MOST_LINES_OF_THE_PACKAGE = 4, 9, 8763

# Names of the contract that exist today: others join with their modules.
PUBLIC = {
    "batch_jacobian",
    "batch_jacobian_of",
    "batch_hessian",
    "batch_hessian_diagonal",
    "batch_laplacian",
    "batch_divergence",
    "batch_partials",
    "check_batched",
    "check_derivative",
    "explain",
    "Explanation",
    "BatchMixingError",
    "VerificationError",
    "EngineFallbackWarning",
}
# The stages, from the ground up: a folder may import from those before it.
STAGES = [
    "errors",
    "_environment",
    "_torch_faults",
    "_arguments",
    "_engines",
    "_taylor",
    "_verification",
    "_dispatch",
    "_operators",
    "_diagnostics",
    "__init__",
    "_demo",
    "__main__",
]


def module_of(name):
    """``_engines/sum.py -> funcjac._engines.sum``."""
    parts = ["funcjac", *name.removesuffix(".py").split("/")]
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(name): name for name in FILES}


def tree_of(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(name):
    """Every module that a file imports, inside functions too, with relative ones resolved."""
    found = set()
    package = module_of(name).split(".") if name.endswith("__init__.py") else None
    package = package or module_of(name).split(".")[:-1]
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def own_imports(name):
    """Imports from within the package: the deepest module each one names."""
    found = {module for module in imports(name) if module in MODULES}
    parents = {module.rpartition(".")[0] for module in found}
    return found - (parents & {"funcjac"}) - {module_of(name)}


GRAPH = {module_of(name): own_imports(name) for name in FILES}


# --- imports -----------------------------------------------------------------------------


def test_the_graph_is_not_empty():
    """The tests below would pass on a graph without edges."""
    assert sum(map(len, GRAPH.values())) > 30
    assert any(module.startswith("funcjac._operators") for module in GRAPH["funcjac"])


@pytest.mark.quick
def test_imports_have_no_cycles():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for other in sorted(GRAPH[module]):
            visit(other, [*path, module])
        done.add(module)

    for module in GRAPH:
        visit(module, [])


def stage(module):
    return STAGES.index(module.split(".")[1] if "." in module else "__init__")


def test_every_module_belongs_to_a_stage():
    found = {module.split(".")[1] if "." in module else "__init__" for module in GRAPH}
    assert found <= set(STAGES)
    assert {"_operators", "_dispatch", "_engines", "_verification", "_taylor"} <= found


@pytest.mark.quick
@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_down(module):
    for other in GRAPH[module]:
        assert stage(other) <= stage(module), f"{module} -> {other}"


def test_one_module_imports_optree():
    users = [name for name in FILES if any(m.split(".")[0] == "optree" for m in imports(name))]
    assert len(users) == 1, users


# What is private to torch and stands in one place of its own, where a comment says why.
_NAMED_WHERE_USED = {
    "_arguments/pytree.py": {"torch.utils._pytree"},
    "_diagnostics/explain.py": {"torch.utils._pytree"},
}


@every_file
def test_private_torch_in_one_place(name):
    """``torch._C`` and the like are used in ``torch_private``, where a comment says why."""
    private = {
        ast.unparse(node)
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node).startswith("torch.")
    }
    private |= {module for module in imports(name) if module.startswith("torch._")}
    private -= _NAMED_WHERE_USED.get(name, set())
    assert not private or name == "_environment/torch_private.py", private


def test_importing_is_light():
    """``import funcjac`` loads nothing heavy that ``import torch`` has not loaded."""
    code = (
        "import sys, torch; before = set(sys.modules); import funcjac; "
        "print(*sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    loaded = out.stdout.split()
    assert "funcjac._operators" in loaded
    heavy = ("torch._dynamo", "torch._inductor", "torch._functorch.aot", "torch.fx.experimental")
    heavy += ("torch.utils.flop_counter", "sympy", "matplotlib", "numpy", "pandas", "sklearn")
    assert not [module for module in loaded if module.startswith(heavy)]
    strangers = {m.split(".")[0] for m in loaded} - {"funcjac", "optree", "torch"}
    assert strangers <= set(sys.stdlib_module_names) | {"typing_extensions"}


FIRST_CALLS = """
import sys, torch
import funcjac
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
x = torch.randn(4, 3)
for transform in (funcjac.batch_jacobian, funcjac.batch_laplacian, funcjac.batch_hessian):
    transform(net)(x)
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules))
"""


def test_a_first_call_is_light():
    command = [sys.executable, "-W", "error", "-c", FIRST_CALLS]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.split() == []


# --- what is public ----------------------------------------------------------------------


@pytest.mark.quick
def test_the_public_names_are_those_of_the_contract():
    named = {
        alias.asname or alias.name
        for node in ast.walk(tree_of("__init__.py"))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert named == PUBLIC
    public = {name for name in vars(funcjac) if not name.startswith("_")}
    assert public - {"errors"} == PUBLIC
    assert funcjac.__version__ == importlib.metadata.version("funcjac")


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_have_docstrings(name):
    thing = getattr(funcjac, name)
    text = inspect.getdoc(thing)
    assert text
    if isinstance(thing, type):
        return
    assert doctest.DocTestParser().get_examples(thing.__doc__), f"{name} has no example"
    for part in ("Args:", "Raises:", "Example:"):
        assert part in text
    parameters = [p for p in inspect.signature(thing).parameters if p not in ("args", "kwargs")]
    for parameter in parameters:
        assert f"{parameter}:" in text, f"{name} does not document {parameter}"


def test_the_words_of_batch_jacobian_are_those_of_the_contract():
    parameters = inspect.signature(funcjac.batch_jacobian).parameters
    assert list(parameters) == [
        "func",
        "argnums",
        "in_dims",
        "out_dims",
        "mode",
        "engine",
        "chunk_size",
        "has_aux",
        "return_value",
        "randomness",
        "check",
    ]
    defaults = {name: p.default for name, p in parameters.items() if name != "func"}
    assert defaults == {
        "argnums": 0,
        "in_dims": 0,
        "out_dims": 0,
        "mode": "auto",
        "engine": "auto",
        "chunk_size": None,
        "has_aux": False,
        "return_value": False,
        "randomness": "error",
        "check": "auto",
    }
    keywords = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keywords == list(parameters)[2:]


@pytest.mark.parametrize("name", sorted(n for n in PUBLIC if n.startswith("batch_")))
def test_types_of_keywords_are_those_that_a_type_checker_sees(name):
    """A type checker reads ``**keywords``, a reader the signature that is shown."""
    function = getattr(funcjac, name)
    hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
    for keywords in typing_extensions.get_args(hints.pop("keywords", None)):
        hints |= typing.get_type_hints(keywords)
    shown = {
        n: eval(p.annotation, vars(inspect.getmodule(function))) for n, p in parameters.items()
    }
    assert hints.pop("return") is not None
    assert hints == shown


# --- style -------------------------------------------------------------------------------


@every_file
def test_a_file_is_short(name):
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    assert ast.get_docstring(tree_of(name))


@every_file
def test_a_class_is_short(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ClassDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MOST_LINES_OF_A_CLASS, f"{name}: {node.name} has {length} lines"


def test_folders_are_small():
    count = Counter(path.parent for path in FILES.values())
    large = {folder.name: size for folder, size in count.items() if size > MOST_FILES_OF_A_FOLDER}
    assert not large


def test_the_package_is_small():
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in FILES.values())
    assert lines <= MOST_LINES_OF_THE_PACKAGE


def functions(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@every_file
def test_a_function_is_short(name):
    for node in functions(name):
        first = node.body[0]
        documented = ast.get_docstring(node) is not None
        length = node.end_lineno - node.lineno + 1
        length -= first.end_lineno - first.lineno + 1 if documented else 0
        assert length <= MOST_LINES_OF_A_FUNCTION, f"{name}: {node.name} has {length} lines"


BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def nesting(node):
    inside = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        # elif is written as an if inside of else
        chained = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        inside.append(nesting(child) + (isinstance(child, BLOCKS) and not chained))
    return max(inside, default=0)


@every_file
def test_nesting_is_shallow(name):
    for node in functions(name):
        assert nesting(node) <= MOST_NESTING, f"{name}: {node.name}"


@every_file
def test_transforms_stay_pure(name):
    """No ``.backward()``, and no ``print`` outside of the demonstration."""
    calls = [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.Call)]
    named = {node.func.attr for node in calls if isinstance(node.func, ast.Attribute)}
    plain = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    if not name.startswith(("__main__", "_demo")):
        assert "backward" not in named
        assert "print" not in plain
        assert not plain & {"eval", "exec", "globals", "setattr"}


def test_errors_bring_their_remedy():
    """Every exception and warning tells whoever meets it what to do about it."""
    for kind in (
        funcjac.BatchMixingError,
        funcjac.VerificationError,
        funcjac.EngineFallbackWarning,
    ):
        assert len(inspect.getdoc(kind).splitlines()) >= 4


def test_the_package_is_typed():
    assert (ROOT / "py.typed").exists()


# --- the tests themselves ----------------------------------------------------------------

TESTS = pathlib.Path(__file__).parent
TEST_TREES = {
    path.relative_to(TESTS).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(TESTS.rglob("*.py"))
}
MOST_LINES_OF_A_TEST_FILE = 700
# Calls that fail where something is not as it should be, beside ``assert`` itself.
CHECKS = {"raises", "warns", "assert_close", "gradcheck", "gradgradcheck"}


def called_names(tree):
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {getattr(func, "attr", getattr(func, "id", "")) for func in calls}


def functions_of_tests():
    """Each function by file and name, and by which file and name another file knows it."""
    defined, names = {}, {}
    for file, tree in TEST_TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                defined[file, node.name] = node
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                source = node.module.removeprefix("tests.").replace(".", "/") + ".py"
                names |= {(file, a.asname or a.name): (source, a.name) for a in node.names}
    return defined, names


def functions_that_assert():
    defined, names = functions_of_tests()
    calls = {key: called_names(node) for key, node in defined.items()}
    able = {
        key
        for key, node in defined.items()
        if any(isinstance(part, ast.Assert) for part in ast.walk(node))
        or any(name in CHECKS or name.startswith("assert_") for name in calls[key])
    }
    size = 0
    while size < len(able):
        size = len(able)
        for (file, name), called in calls.items():
            if any(names.get((file, other), (file, other)) in able for other in called):
                able.add((file, name))
    return able


def test_every_test_asserts():
    defined, _ = functions_of_tests()
    tests = {(f, n) for f, n in defined if n.startswith("test_") and "/test_" in f"/{f}"}
    assert len(tests) > 700
    assert tests - functions_that_assert() == set()


def private_names(tree):
    """Private modules of the package that a file imports or reaches by attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("funcjac._"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("funcjac"):
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            name = ast.unparse(node)
            yield from [name] * name.startswith("funcjac.")


@pytest.mark.parametrize("file", TEST_TREES)
def test_private_names_are_met_in_the_folder_of_their_module(file):
    """A test in ``tests/taylor`` may import ``funcjac._taylor``; others ask public names."""
    own = {f"_{file.split('/')[0]}"} if "/" in file else {"_demo"} & {f"_{file[5:-3]}"}
    for name in private_names(TEST_TREES[file]):
        parts = [part for part in name.split(".")[1:] if part[0] == "_" and part[:2] != "__"]
        assert not parts or (parts[0] in own and len(parts) == 1), f"{file}: {name}"


def test_tests_lie_as_the_package_does():
    folders = {file.split("/")[0] for file in TEST_TREES if "/" in file}
    assert folders - {"cases", "clients", "sweeps"} <= {name.split("/")[0][1:] for name in FILES}
    assert set(LONGEST) <= set(TEST_TREES)
    files = Counter(file.rpartition("/")[0] for file in TEST_TREES)
    assert max(files.values()) <= MOST_FILES_OF_A_TEST_FOLDER, files


@pytest.mark.parametrize("file", TEST_TREES)
def test_a_test_file_is_short(file):
    assert len((TESTS / file).read_text("utf-8").splitlines()) <= MOST_LINES_OF_A_TEST_FILE


# --- the way of a settled call ------------------------------------------------------------------


def passed(transform, x):
    """Names of files and functions of the package that a settled call enters, in order."""
    for _ in range(20):
        transform(x)
    entered = []

    def enter(frame, event, _):
        path = pathlib.Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            entered.append((path.relative_to(ROOT).as_posix(), frame.f_code.co_name))

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        transform(x)
    finally:
        sys.setprofile(before)
    return entered


@pytest.mark.quick
def test_jacobian():
    net = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 10)).requires_grad_(False)
    entered = passed(funcjac.batch_jacobian(net), torch.randn(3, 5))
    assert ("_engines/sum.py", "jacobian") in entered
    assert len(entered) <= 40, entered
    assert len({file for file, _ in entered}) <= 8, entered


@pytest.mark.quick
def test_laplacian_of_one_hidden_layer():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).requires_grad_(False)
    entered = passed(funcjac.batch_laplacian(net), torch.randn(3, 5))
    assert ("_operators/laplacian.py", "directions") in entered
    assert len({file for file, _ in entered}) <= 12, entered


@pytest.mark.quick
def test_laplacian_by_taylor():
    net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)).requires_grad_(False)
    entered = passed(funcjac.batch_laplacian(net), torch.randn(7, 10))
    files = {file for file, _ in entered}
    assert len(files) <= 12, files
    assert {file for file in files if file.startswith("_taylor")} == {
        "_taylor/recorder.py",
        "_taylor/propagation.py",
        "_taylor/rules.py",
    }
