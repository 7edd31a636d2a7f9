"""The project's own promises: environments agree, notebooks are clean, imports only go down."""

import ast
import json
import re
import tomllib

import pytest
import yaml

from lddyn import records, runner

ROOT = records.ROOT
FLOORS = [
    {"records", "logprobs", "residuals", "influence", "first_order", "kernels", "squeezing", "reuse"},
    {"probes", "models", "preferences", "prose", "digits", "world", "chat", "estimate"},
    {"training", "sft", "dpo", "decomposition", "variants", "extend", "tune", "rephrase", "judging"},
    {"claims", "kept", "evidence", "figures", "display"},
    {"runner", "book", "pdf", "bench", "launch", "sweep", "report", "__main__"},
]
MODULES = sorted((ROOT / "lddyn").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_yml_gives_what_pyproject_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    assert plain == [f"python{project['requires-python']}", "pip"]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    extras = re.fullmatch(r"-e \.\[(.*)\]", pip[0])[1].split(",")
    assert len(pip) == 1 and set(extras) == set(project["optional-dependencies"]) - {"sweep"}
    assert f"'.[{','.join(extras)}]'" in (ROOT / "Makefile").read_text()


def floor_name(path):
    """`sft` for lddyn/sft.py, `evidence` for lddyn/evidence/sft.py."""
    return path.relative_to(ROOT / "lddyn").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "lddyn").with_suffix("")))
def test_imports_only_go_down(path):
    floor = {name: n for n, names in enumerate(FLOORS) for name in names}
    imported = {
        name.split(".")[1] for name in records.imports(ast.parse(path.read_text())) if name.startswith("lddyn.")
    }
    imported &= {floor_name(p) for p in MODULES}
    if path.parent.name != "lddyn" or path.stem != "__init__":
        assert floor_name(path) in floor, f"{path.name} has no floor"
        above = [name for name in imported if floor[name] > floor[floor_name(path)]]
        assert not above, f"{path.name} imports {above} from a higher floor"


def test_only_one_module_imports_trl():
    users = [p.stem for p in MODULES if re.search(r"^\s*(from|import) trl", p.read_text(), re.M)]
    assert users in ([], ["training"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_carry_no_outputs_and_stable_ids(path):
    cells = json.loads(path.read_text())["cells"]
    assert not any(c.get("outputs") or c.get("execution_count") for c in cells)
    ids = [c["id"] for c in cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z0-9-]+", i) for i in ids)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_parameter_has_a_type_a_comment_and_an_allowed_default(path):
    found = runner.parameters(path)
    assert found["scale"].allowed == "{smoke, laptop, paper}"
    for p in found.values():
        assert p.help, f"{p.name} has no comment"
        assert p.parse(p.default) == p.default


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_has_alt_text(path):
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^figures\.(?!use_style)", source, re.M):
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) > 20, f"no alt text: {source[:60]}"


def test_every_notebook_is_in_the_table_of_contents():
    from lddyn import book

    assert sorted(book.chapters()) == [p.stem for p in NOTEBOOKS]


def test_book_configuration_has_each_key_once():
    keys = re.findall(r"^(\w+):", (ROOT / "book" / "_config.yml").read_text(), re.M)
    assert len(keys) == len(set(keys)) and "execute" in keys


def test_citation_names_the_paper_first():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["preferred-citation"]["title"] == "Learning Dynamics of LLM Finetuning"


def test_a_missing_or_too_old_python_is_one_clear_line(tmp_path):
    import subprocess

    for python, message in (("no-such-python", "not found"), ("/bin/false", "Python 3.11 to 3.14 is needed")):
        command = ["make", "env", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("lddyn:")]
        assert done.returncode == 2 and len(lines) == 1 and message in lines[0]
