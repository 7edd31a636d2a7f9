"""The project's own promises: environments agree, notebooks are clean, imports only go down."""

import ast
import json
import re
import runpy
import shutil
import tomllib

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lddyn.engine import reach, store
from lddyn.publish import notebooks, pages

ROOT = store.ROOT
ROOMS = ["theory", "data", "engine", "chapters", "workshop", "publish", "__main__"]  # theory and data: one floor
MODULES = sorted((ROOT / "lddyn").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_yml_gives_what_pyproject_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    assert plain == [f"python{project['requires-python']}", "pip"]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    lock, parts = pip
    extras = re.fullmatch(r"-e \.\[(.*)\]", parts)[1].split(",")
    assert lock == "--constraint locks/constraints.txt"
    assert set(extras) == set(project["optional-dependencies"]) - {"sweep"}
    assert f"'.[{','.join(extras)}]'" in (ROOT / "Makefile").read_text()


def locked(name):
    """The packages of locks/NAME as (name, version, marker)."""
    return re.findall(r"^([\w.-]+)==([^\s;]+) ; (.*?)(?: \\)?$", (ROOT / "locks" / name).read_text(), re.M)


def test_the_two_locks_differ_by_torch_and_cuda_only():
    constraints, hashed = locked("constraints.txt"), locked("requirements.txt")
    left_out = runpy.run_path(str(ROOT / "locks" / "renew.py"))["TORCH"].fullmatch
    assert hashed == [package for package in constraints if not left_out(package[0])]
    assert "torch" in {name for name, *_ in constraints} - {name for name, *_ in hashed}
    blocks = re.split(r"^(?=\w)", (ROOT / "locks" / "requirements.txt").read_text(), flags=re.M)[1:]
    assert len(blocks) == len(hashed) and all("--hash=sha256:" in block for block in blocks)
    pins = [line for line in (ROOT / "locks" / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert len(pins) == len(constraints)


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_names_one_version_in_range_of_whatever_pyproject_names(python, system):
    parsed = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = parsed["project"]["optional-dependencies"]
    wanted = parsed["build-system"]["requires"] + parsed["project"]["dependencies"]
    wanted += [text for part in parts.keys() - {"sweep"} for text in parts[part]]
    here = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": system}
    pins = [(name, version) for name, version, marker in locked("constraints.txt") if Marker(marker).evaluate(here)]
    assert len({name for name, _ in pins}) == len(pins)
    for requirement in map(Requirement, wanted):
        version = dict(pins).get(canonicalize_name(requirement.name))
        assert version and version in requirement.specifier, f"make upgrade: {requirement}, the lock has {version}"


def test_make_ci_and_the_workflows_install_from_the_lock():
    make = (ROOT / "Makefile").read_text()
    assert "--require-hashes --no-deps -r locks/requirements.txt" in make and "-c locks/constraints.txt" in make
    workflows = {path.stem: path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    for text in ((ROOT / ".ci" / "run").read_text(), *workflows.values()):
        assert "pip install" not in text and "make " in text
    assert "LOCK=" not in (ROOT / ".ci" / "run").read_text() + workflows["book"]
    assert workflows["book"].count("locks/*.txt") == 3  # what pip's cache and the runs are kept by
    weekly = [line for line in workflows["newest"].splitlines() if " make " in line]
    assert len(weekly) == 2 and all("LOCK=newest" in line for line in weekly)


def test_make_pre_commit_and_ci_check_the_same():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [(r["repo"], h["entry"]) for r in repositories for h in r["hooks"]] == [("local", "make check")]
    make = (ROOT / "Makefile").read_text()
    assert re.search(r"^check: .*\n\t(.*)", make, re.M)[1].replace("$(PY) -m ", "").split(" && ") == [
        "ruff check .", "ruff format --check .", "mypy",
    ]  # fmt: skip
    steps = re.findall(r"^make (.*)", (ROOT / ".ci" / "run").read_text(), re.M)
    assert steps == ["check", "book SCALE=smoke STRICT=1", "browser", "test"]
    assert all((ROOT / path).exists() for path in re.findall(r"tests/\S+", make))


def room_of(module: str) -> str:
    """`engine` for lddyn.engine.models."""
    return module.split(".")[1]


def modules_imported(path) -> set[str]:
    """Modules of this package that a file imports, at the top or inside a function."""
    names = set(reach.imported(ast.parse(path.read_text())).values())
    modules = {name if reach.parsed(name) else name.rpartition(".")[0] for name in names if name.startswith("lddyn.")}
    return modules - {"lddyn"}


def module_of(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "lddyn").with_suffix("")))
def test_imports_only_go_down(path):
    if path.parent.name == "lddyn" and path.stem == "__init__":
        assert not modules_imported(path)
        return
    floor = {room: max(1, n) for n, room in enumerate(ROOMS)}
    here = room_of(module_of(path))
    above = [m for m in modules_imported(path) if floor[room_of(m)] > floor[here]]
    assert not above, f"{path.name} imports {above} from a higher floor"
    if here in ("theory", "data"):
        assert not [m for m in modules_imported(path) if room_of(m) not in ("theory", "data")]


@pytest.mark.parametrize("path", sorted((ROOT / "lddyn/chapters").glob("*/run.py")), ids=lambda p: p.parent.name)
def test_no_run_of_a_chapter_imports_another_chapter(path):
    of_chapters = [m.split(".")[2:] for m in modules_imported(path) if room_of(m) == "chapters"]
    assert not [names for names in of_chapters if len(names) > 1 and names[0] != path.parent.name]


def test_only_one_module_imports_trl():
    users = [p.stem for p in MODULES if re.search(r"^\s*(from|import) trl", p.read_text(), re.M)]
    assert users == ["training"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_carry_no_outputs_and_stable_ids(path):
    cells = json.loads(path.read_text())["cells"]
    assert not any(c.get("outputs") or c.get("execution_count") for c in cells)
    ids = [c["id"] for c in cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z0-9-]+", i) for i in ids)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_parameter_has_a_type_a_comment_and_an_allowed_default(path):
    found = notebooks.parameters(path)
    real = path.stem[:2] in ("02", "03", "05", "07")  # the chapters that have runs on a real language model
    assert found["scale"].allowed == ("{smoke, laptop, pretrained, paper}" if real else "{smoke, laptop, paper}")
    for p in found.values():
        assert p.help, f"{p.name} has no comment"
        assert p.parse(p.default) == p.default


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_has_a_name_and_a_caption(path):
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^(figures|style)\.(?!use_style)", source, re.M):
            figure = cell["metadata"].get("mystnb", {}).get("figure", {})
            assert figure.get("name") and len(figure.get("caption", "")) > 40, source[:60]


def test_every_notebook_is_in_the_table_of_contents():

    assert sorted(pages.chapters()) == [p.stem for p in NOTEBOOKS]


def test_book_configuration_has_each_key_once():
    keys = re.findall(r"^(\w+):", (ROOT / "book" / "_config.yml").read_text(), re.M)
    assert len(keys) == len(set(keys)) and "execute" in keys


def test_citation_names_the_paper_first():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["preferred-citation"]["title"] == "Learning Dynamics of LLM Finetuning"


def test_a_missing_or_too_old_python_is_one_clear_line(tmp_path):
    import subprocess

    for python, message in (("no-such-python", "not found"), (shutil.which("false"), "Python 3.11 to 3.14 is needed")):
        command = ["make", "env", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("lddyn:")]
        assert done.returncode == 2 and len(lines) == 1 and message in lines[0]
