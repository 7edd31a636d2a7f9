"""The ways in: a notebook alone, the package without the clone, the command, images, what says how to cite."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from datetime import date

import pytest
import yaml

import lddyn
from lddyn.__main__ import parser
from lddyn.engine import store

ROOT = store.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Repository"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "lddyn", "book", "notebooks")


def call(*command, cwd, **environment):
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install_cell(path):
    cells = json.loads(path.read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert codes[0]["id"] == "install" and codes[0]["metadata"]["tags"] == ["remove-cell"]
    assert codes[1]["metadata"]["tags"] == ["parameters"]
    return "".join(codes[0]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_installs_the_package_only_where_it_is_missing(path, monkeypatch, capsys):
    cell, calls = install_cell(path), []
    monkeypatch.setattr(subprocess, "run", lambda *words, **how: calls.append((words, how)))
    exec(cell, here := {})
    assert not calls and here.keys() == {"__builtins__", "importlib"}  # nothing is left behind
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(cell, {})
    words = [sys.executable, "-m", "pip", "install", "-q", f"lddyn[train] @ git+{ADDRESS}"]
    assert calls == [((words,), {"check": True})] and capsys.readouterr() == ("", "")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the package alone: from the sources to an sdist, to a wheel, to what pip installs."""
    clone, made, place = (tmp_path_factory.mktemp(name) for name in ("clone", "made", "place"))
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "_build", "generated")
            shutil.copytree(ROOT / name, clone / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, clone / name)
    call(sys.executable, "-c", f"from setuptools import build_meta as b; b.build_sdist({str(made)!r})", cwd=clone)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    offline = ("--no-index", "--no-deps")
    call(*pip, "wheel", *offline, "--no-build-isolation", "-w", made, *made.glob("*.tar.gz"), cwd=made)
    call(*pip, "install", *offline, "--target", place, *made.glob("*.whl"), cwd=made)
    return place


@pytest.mark.slow
def test_a_notebook_alone_in_an_empty_folder_runs_on_the_package_alone(alone, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "04_squeezing.ipynb", folder)
    environment = {"PYTHONPATH": str(alone), "LDDYN_RUNS": str(folder / "runs")}
    words = ("04_squeezing.ipynb", "out.ipynb", "-p", "scale", "smoke", "-k", "python3", "--no-progress-bar")
    call(sys.executable, "-m", "papermill", *words, cwd=folder, **environment)
    text = (folder / "out.ipynb").read_text()
    assert "td class=" in text and "application/vnd.lddyn+json" in text  # judged by the rules of the package
    manifests = [json.loads(path.read_text()) for path in folder.glob("runs/*/manifest.json")]
    assert manifests and {m["git"]["commit"] for m in manifests} == {""}  # not that of the folder it lies in


COMMANDS = """
import sys, lddyn
from lddyn.__main__ import main
print(lddyn.__file__)
for line in sys.stdin:
    print("exit code", main(line.split()))
"""


@pytest.mark.slow
def test_the_package_alone_has_the_command_its_notebooks_its_settings_and_its_claims(alone, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(alone)}
    lines = ("parameters 01_mnist", "estimate pythia-410m --memory 1000", "claims", "book")
    run = {"input": "\n".join(lines), "env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", COMMANDS], **run)
    where, *answers = re.split(r"(?:^|\n)exit code (\d)", done.stdout)
    assert where.startswith(str(alone)) and "eta = 0.01" in where
    assert answers[::2] == ["0", "0", "0", "2"], done.stderr
    assert "GiB" in answers[1] and answers[3].count("no record") > 40
    assert "needs a clone of the repository" in done.stderr and done.stderr.count("\n") == 1
    assert "usage: lddyn [-h]" in call(alone / "bin" / "lddyn", "--help", cwd=tmp_path, PYTHONPATH=str(alone))


def test_help_names_the_command_as_it_was_called(monkeypatch):
    for called, name in (("/usr/bin/lddyn", "lddyn"), ("lddyn/__main__.py", "python -m lddyn")):
        monkeypatch.setattr(sys, "argv", [called])
        assert parser().format_usage().startswith(f"usage: {name} [-h]")


def test_the_repository_has_one_address():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    zenodo = json.loads((ROOT / ".zenodo.json").read_text())
    assert citation["repository-code"] == ADDRESS
    assert ADDRESS in {related["identifier"] for related in zenodo["related_identifiers"]}


def test_an_address_is_written_wherever_it_stands(tmp_path):
    new = "https://github.com/somebody/a.fork-1"
    named = ["pyproject.toml", "CITATION.cff", ".zenodo.json", "README.md", "book/run_it.md"]
    named += [str(path.relative_to(ROOT)) for path in NOTEBOOKS]
    for name in ("Makefile", *named):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    call("git", "init", "-q", cwd=tmp_path)
    call("git", "add", ".", cwd=tmp_path)
    call("make", "address", f"ADDRESS={new}", cwd=tmp_path, MAKEFLAGS="")
    for name in named:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text().replace(ADDRESS, new)


def test_colab_is_offered_only_where_its_notebooks_install_this_package(monkeypatch):
    extension = runpy.run_path(str(ROOT / "book" / "_ext" / "launch_buttons.py"))
    for repository, offered in ((ADDRESS.removeprefix("https://github.com/"), True), ("somebody/fork", False)):
        monkeypatch.setenv("GITHUB_REPOSITORY", repository)
        config = type("Config", (), {"html_theme_options": {}})
        extension["_configure"](None, config)
        assert ("colab_url" in config.html_theme_options["launch_buttons"]) == offered


IMAGE = (ROOT / "Dockerfile").read_text()


def test_the_image_and_the_workflow_have_the_oldest_python_and_the_workflow_the_newest():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    matrix = workflow["jobs"]["check"]["strategy"]["matrix"]
    assert matrix == {"os": ["ubuntu-latest", "macos-latest"], "python": ["3.11", "3.14"]}
    assert PROJECT["requires-python"] == ">=3.11,<3.15" and "FROM python:3.11-slim\n" in IMAGE


def test_the_image_holds_the_environment_of_make():
    assert "RUN make env\n" in IMAGE
    assert IMAGE.count("pip install") == 1  # PyTorch in another build; the rest is the Makefile's, from the lock
    pattern = re.search(r"grep -o '(.*)' locks/constraints.txt", IMAGE)[1]
    assert re.findall(pattern, (ROOT / "locks" / "constraints.txt").read_text(), re.M)
    flags = re.search(r'MAKEFLAGS="(.*)"', IMAGE)[1]
    told = call("make", "-nB", "env", cwd=ROOT, MAKEFLAGS=flags)
    assert f"{flags.removeprefix('VENV=')}/bin/python -m pip" in told and "-r locks/requirements.txt" in told


def test_the_dev_container_is_the_image_with_the_clone_in_its_place():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["build"] == {"dockerfile": "../Dockerfile", "context": ".."}
    assert f"USER {container['remoteUser']}\n" in IMAGE and f"WORKDIR {container['workspaceFolder']}\n" in IMAGE
    assert f"target={container['workspaceFolder']}," in container["workspaceMount"]
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert f"ENV VENV={interpreter.removesuffix('/bin/python')} " in IMAGE


def test_what_git_ignores_does_not_enter_the_image():
    entries = [(ROOT / name).read_text().split() for name in (".gitignore", ".dockerignore")]
    assert [entry.strip("/") for entry in entries[0]] == [entry.removeprefix("**/") for entry in entries[1]]


def test_one_version_and_one_paper_whatever_one_cites():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    zenodo = json.loads((ROOT / ".zenodo.json").read_text())
    assert lddyn.__version__ == PROJECT["version"] == citation["version"] == zenodo["version"]
    assert zenodo["publication_date"] == citation["date-released"].isoformat() <= date.today().isoformat()
    assert all(zenodo[field] == citation[field] for field in ("title", "license", "keywords"))
    paper = citation["preferred-citation"]
    assert paper["title"] == "Learning Dynamics of LLM Finetuning" and paper["url"] == PROJECT["urls"]["Paper"]
    assert paper["url"].rpartition("/")[2] in zenodo["related_identifiers"][0]["identifier"]
    intro = (ROOT / "book" / "intro.md").read_text()
    assert "## Cite this\n\n```{include} generated/citation.md" in intro
