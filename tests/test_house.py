"""The house: which room may know of which, how large a room may grow, and what the front door says.

Each module states its floor in its docstring ("Floor 3"); imports are read from the source, whether they stand at the
top, inside a function, or under TYPE_CHECKING.
"""

import ast
import doctest
import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = CHECKOUT / "src" / "regard"
MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
TOP = 7
# The rooms from the ground up, as DESIGN draws them: a floor may grow, but none may stand below one that it stands on.
PLAN = [
    {"positions", "masks", "biases", "check"},
    {"reference", "plan", "cache"},
    {"op"},
    {"attention", "linear", "additive"},
    {"nn", "parallel", "huggingface"},
    {"models", "lens"},
    {"cli"},
]


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or ""


def floor(name: str) -> int:
    """The floor that a module's docstring states; the front door is level with the highest room that it shows."""
    if name == "regard":
        return floor("regard.attention")
    if name not in MODULES:
        return 0  # the compiled kernels
    stated = re.search(r"\bfloor:? (\d|top)|\b(top)(?: floor|\.)", docstring(name), re.IGNORECASE)
    assert stated, f"{name} must state its floor in its docstring; got none. Write 'Floor N.' there."
    return TOP if (stated[1] or stated[2]).lower() == "top" else int(stated[1])


def imports(name: str) -> set[str]:
    """Every module that a module imports, anywhere in its source, under full names."""
    found = set()
    inside = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = inside.split(".")
            package = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (package, node.module)))
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in MODULES or inner == "regard._kernels" else source)
    return found


def rooms(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    return {found for found in imports(name) if found.partition(".")[0] == "regard"}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "regard"])
def test_imports_go_down_only(name):
    above = {other: floor(other) for other in rooms(name) if floor(other) > floor(name)}
    assert not above, f"{name} stands on floor {floor(name)} and imports from above: {above}"


def test_the_floors_rise_in_the_order_of_the_plan():
    def floors(group: set[str]) -> set[int]:
        return {floor(name) for name in MODULES if name != "regard" and name.split(".")[1] in group}

    built = [group for group in PLAN if floors(group)]
    for lower, upper in itertools.pairwise(built):
        assert max(floors(lower)) <= min(floors(upper)), f"{sorted(lower)} must not stand above {sorted(upper)}"


def test_no_room_leads_back_to_itself():
    # A folder's door may show its rooms, which may know of one another: what counts is that no chain of rooms closes.
    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"these import one another: {' -> '.join((*path, name))}"
        if name in done:
            return
        for other in rooms(name) & set(MODULES) - {"regard"}:
            walk(other, (*path, name))
        done.add(name)

    done: set[str] = set()
    for name in MODULES:
        if name != "regard":
            walk(name, ())


def behind_the_door() -> set[str]:
    """The modules that `import regard` reaches."""
    reached, waiting = set(), ["regard"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += rooms(name) & set(MODULES)
    return reached


def test_the_rooms_behind_the_front_door_import_torch_and_numpy_alone():
    for name in behind_the_door():
        foreign = {found.partition(".")[0] for found in imports(name)} - set(sys.stdlib_module_names)
        assert foreign <= {"torch", "numpy", "regard", "typing_extensions"}, name  # torch itself needs the last


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[1:2] in (["models"], ["huggingface"])])
def test_models_never_import_the_lens(name):
    assert not any(other.startswith("regard.lens") for other in rooms(name))


def distributions_of_torch() -> set[str]:
    """The distributions that torch needs, and those that they need."""
    names, waiting = set(), ["torch"]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in names:
            continue
        names.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need]
    return names


@functools.cache
def loaded(statement: str) -> set[str]:
    """Top-level modules that are loaded after a statement ran in a fresh interpreter."""
    program = f"{statement}; import sys; print(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return set(
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_import_regard_loads_torch_and_numpy_alone():
    start = loaded("import torch, numpy")  # and what they take along where it is there
    allowed = distributions_of_torch() | {"numpy", "regard"}
    owners = metadata.packages_distributions()
    foreign = {
        name: owners[name]
        for name in loaded("import regard") - start - set(sys.stdlib_module_names)
        if name in owners and not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners[name]} & allowed
    }
    assert not foreign
    assert "regard" in loaded("import regard")


@pytest.mark.parametrize(
    "heavy", ["transformers", "starlette", "uvicorn", "typer", "rich", "matplotlib", "safetensors"]
)
def test_import_regard_does_not_load(heavy):
    assert heavy not in loaded("import regard")


@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name].name == "__init__.py"])
def test_a_door_shows_at_most_fifteen_names(name):
    shown = []
    for node in ast.parse(MODULES[name].read_text(encoding="utf-8")).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            shown = ast.literal_eval(node.value)
    assert len(shown) <= 15
    assert name != "regard" or shown


@pytest.mark.parametrize("name", MODULES)
def test_a_room_says_what_enters_what_leaves_and_its_floor(name):
    words = docstring(name)
    assert words, f"{name} must open with a docstring"
    assert words.partition("\n")[0].rstrip(".").count(" ") >= 2, f"{name}: the first line must say what the room is for"
    if name != "regard":
        assert floor(name) >= 0


def source_files() -> list[Path]:
    """Files under version control, or all of them where there is no git."""
    try:
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=CHECKOUT, capture_output=True, text=True, check=True,
        ).stdout.split("\0")  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        skipped = {".git", ".venv", ".cache", "build", "node_modules", "__pycache__"}
        return [
            file
            for file in CHECKOUT.rglob("*")
            if file.is_file() and not skipped & set(file.relative_to(CHECKOUT).parts)
        ]
    return [CHECKOUT / name for name in names if name and (CHECKOUT / name).is_file()]


def test_no_room_grows_past_twice_its_size_without_saying_why():
    # About 300 lines of Python and 500 of kernel make a room; past double it is split, or says why at its head.
    sizes = {".py": 600, ".cc": 1000, ".h": 1000, ".js": 600}
    for file in source_files():
        if file.suffix in sizes and file.relative_to(CHECKOUT).parts[0] in {"src", "kernels", "web"}:
            if "page" in file.parts:
                continue  # built
            text = file.read_text(encoding="utf-8")
            lines, limit = text.count("\n"), sizes[file.suffix]
            assert lines <= limit or "one room because" in text[:2000], (
                f"{file.relative_to(CHECKOUT)} must hold at most {limit} lines; got {lines}. Split it by concept, or "
                "say at its head why it is 'one room because ...'."
            )


def test_no_file_names_a_place_of_one_machine():
    places = [re.escape(str(CHECKOUT)) + r"\b", *(f"/{top}/" for top in ("work", "root")), r"/home/[a-z]+/"]
    if len(Path.home().parts) > 1:
        places.append(re.escape(f"{Path.home()}/"))
    pattern = re.compile(r"(?<![\w.\\])(?:" + "|".join(places) + ")")
    found = []
    for file in source_files():
        if file.suffix in {".png", ".safetensors", ".woff2", ".npz"} or file == Path(__file__):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        found += [f"{file.relative_to(CHECKOUT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found


def test_no_file_waits_to_be_finished():
    left = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b")
    for file in source_files():
        if file.suffix in {".py", ".cc", ".h", ".mjs"} or file.name in {"Makefile", "CMakeLists.txt"}:
            assert not left.search(file.read_text(encoding="utf-8")), f"{file.relative_to(CHECKOUT)} is unfinished"


def test_the_readme_shows_the_tree_and_the_help_as_they_are():
    run = subprocess.run(
        [sys.executable, CHECKOUT / "docs" / "readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_examples_of_the_readme_give_what_they_say(monkeypatch):
    from regard.lens import embedded
    from regard.lens.embedded.package import PackageUnavailable

    monkeypatch.setenv("REGARD_CACHE", os.environ.get("REGARD_CACHE") or str(CHECKOUT / ".cache"))
    try:
        embedded.folder("minilm")
    except PackageUnavailable as error:
        pytest.skip(f"needs tool: package {embedded.FAMILIES['minilm'].package.requirement} ({error})")
    failed, tried = doctest.testfile(
        str(CHECKOUT / "README.md"),
        module_relative=False,
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert tried > 0
    assert failed == 0


def test_the_readme_leads_with_the_two_commands_and_the_picture():
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    top = text.partition("\n## ")[0]
    assert "make look" in top
    assert "make test" in top
    pictures = re.findall(r"!\[[^]]+\]\((docs/[^)]+)\)", top)
    assert pictures
    for picture in pictures:
        assert (CHECKOUT / picture).is_file(), f"{picture} is missing"


def test_every_link_inside_the_documents_leads_somewhere():
    for document in [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"


def test_every_requirement_is_pinned_by_the_constraints():
    import tomllib

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    needs = project["build-system"]["requires"] + project["project"]["dependencies"]
    needs += [need for extra in project["project"]["optional-dependencies"].values() for need in extra]

    def plain(need: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", need)[0]).lower()

    pins = [
        line for line in (CHECKOUT / "constraints.txt").read_text("utf-8").splitlines() if line[:1] not in ("", "#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(?: *;.*)?", pin) for pin in pins)
    assert {plain(need) for need in needs} - {"regard"} <= {plain(pin) for pin in pins}
    assert "torch==2.13.0" in pins


def test_the_version_is_one_everywhere():
    import tomllib

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["project"]["version"]
    assert f"## {version}" in (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- a skip for want of a tool --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ci", "outcome"), [("true", "failed"), ("", "skipped")])
@pytest.mark.parametrize("where", ["test", "file"])
def test_a_skip_for_want_of_a_tool_fails_under_ci_and_only_there(tmp_path, ci, outcome, where):
    (tmp_path / "conftest.py").write_bytes((CHECKOUT / "conftest.py").read_bytes())
    skip = "pytest.skip('needs tool: a hammer'"
    body = f"def test_nail():\n    {skip})\n" if where == "test" else f"{skip}, allow_module_level=True)\n"
    (tmp_path / "test_nail.py").write_text(f"import pytest\n{body}")
    (tmp_path / "test_other.py").write_text("import pytest\ndef test_data():\n    pytest.skip('no data here')\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        env={**os.environ, "CI": ci}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if outcome == "failed":
        assert run.returncode in (1, 2), run.stdout
        assert "needs tool: a hammer. Under CI every tool must be there" in run.stdout
    else:
        assert run.returncode in (0, 5), run.stdout
        assert "needs tool: a hammer" in run.stdout
        assert "no data here" in run.stdout


def test_the_built_package_holds_the_page(tmp_path):
    spec = importlib.util.find_spec("regard")
    assert spec is not None
    assert spec.origin is not None
    page = Path(spec.origin).parent / "lens" / "page"
    assert (page / "index.html").is_file()
