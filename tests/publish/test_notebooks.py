import json
import time
from pathlib import Path

import pytest

from lddyn import InputError
from lddyn.__main__ import main
from lddyn.engine import settings
from lddyn.publish import build, notebooks


def notebook(path: Path, *sources: str, parameters: str = "lr: float = 1e-3  # (0, 1] learning rate") -> Path:
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"] if i == 0 else []},
         "execution_count": None, "outputs": [], "source": source}
        for i, source in enumerate([parameters, *sources])
    ]  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "cells": cells,
                "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}},
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        )
    )
    return path


def parameter(line: str) -> settings.Parameter:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return next(iter(notebooks.parameters(notebook(Path(folder) / "n.ipynb", parameters=line)).values()))


@pytest.mark.parametrize(
    ("line", "word", "value"),
    [
        ("lr: float = 1e-3  # (0, 1] learning rate", "5e-7", 5e-7),
        ("n: int | None = None  # [1, 9] count", "none", None),
        ("n: int | None = None  # [1, 9] count", "9", 9),
        ("scale: str = 'laptop'  # {smoke, laptop} dial", "smoke", "smoke"),
        ("quiet: bool = True  # no output", "false", False),
        ("seeds: list[int] = [0]  # seeds", "[1, 2]", [1, 2]),
    ],
)
def test_words_become_values_of_the_declared_type(line, word, value):
    assert parameter(line).parse(word) == value


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("lr: float = 1e-3  # (0, 1] learning rate", "0"),
        ("lr: float = 1e-3  # (0, 1] learning rate", "fast"),
        ("lr: float = 1e-3  # (0, 1] learning rate", "nan"),
        ("n: int = 1  # [1, 9] count", "2.5"),
        ("n: int = 1  # [1, 9] count", "10"),
        ("n: int = 1  # [1, 9] count", "none"),
        ("n: int = 1  # [1, 9] count", True),
        ("scale: str = 'laptop'  # {smoke, laptop} dial", "lapto"),
        ("quiet: bool = True  # no output", "maybe"),
    ],
)
def test_wrong_values_name_the_parameter_and_what_it_takes(line, word):
    p = parameter(line)
    with pytest.raises(InputError, match=f"parameter {p.name} takes .*not"):
        p.parse(word)


def test_number_that_yaml_takes_for_text_is_a_number(tmp_path):
    (tmp_path / "p.yml").write_text("lr: 5e-7\n")
    n = notebook(tmp_path / "n.ipynb")
    assert notebooks.checked(n, settings.read_yaml(tmp_path / "p.yml")) == {"lr": 5e-7}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "01_mnits"], "unknown notebook '01_mnits'; did you mean '01_mnist'?"),
        (
            ["run", "01_mnist", "-p", "epoch", "3"],
            "unknown parameter of 01_mnist 'epoch'; did you mean 'epochs'?",
        ),
        (
            ["run", "01_mnist", "-p", "epochs", "many"],
            "parameter epochs takes int or none in [1, 10000], not 'many'",
        ),
        (
            ["run", "01_mnist", "--scale", "huge"],
            "parameter scale takes str one of {smoke, laptop, paper}, not 'huge'",
        ),
        (["run", "01_mnist", "--params", "nowhere.yml"], "cannot read parameters from nowhere.yml"),
        (["run", "01_mnist", "--out", "/dev/null/x.ipynb"], "cannot write the notebook to /dev/null/x.ipynb"),
        (["book", "--scale", "hugr"], "unknown scale 'hugr'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, capsys, monkeypatch):
    monkeypatch.setattr(notebooks, "execute", lambda *a: pytest.fail("something was started"))
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_failing_cell_is_named_and_the_partial_notebook_kept(tmp_path, capsys):
    n = notebook(tmp_path / "n.ipynb", "print('kept')", "1 / 0", "print('never')")
    out = tmp_path / "out.ipynb"
    out.write_text("earlier success")
    assert main(["run", str(n), "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert "cell 3 failed: ZeroDivisionError: division by zero" in err and "Traceback" not in err
    assert "kept" in (tmp_path / "out.failed.ipynb").read_text()
    assert out.read_text() == "earlier success"


def test_timed_out_cell_is_a_failure_though_papermill_marks_it_completed(tmp_path, capsys):
    n = notebook(tmp_path / "n.ipynb", "import time; time.sleep(60)")
    assert main(["run", str(n), "--out", str(tmp_path / "out.ipynb"), "--timeout", "1"]) == 1
    assert "Timeout" in capsys.readouterr().err
    assert not (tmp_path / "out.ipynb").exists()


def test_parameters_reach_the_notebook_with_their_types(tmp_path):
    n = notebook(tmp_path / "n.ipynb", "print(repr(lr * 2))")
    assert main(["run", str(n), "-p", "lr", "0.25", "--out", str(tmp_path / "out.ipynb")]) == 0
    assert "0.5" in (tmp_path / "out.ipynb").read_text()


@pytest.mark.parametrize("line", ["lr = 1e-3", "lr: float", "lr.x: float = 1e-3"])
def test_a_line_of_the_parameters_cell_without_name_type_and_default_is_refused(tmp_path, line):
    with pytest.raises(InputError, match="line 1: expected `name: type = default"):
        notebooks.parameters(notebook(tmp_path / "n.ipynb", parameters=line))


def test_running_several_notebooks_at_once_does_not_mix_their_outputs(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    n = notebook(tmp_path / "n.ipynb", "print('lr is', lr)")
    with ThreadPoolExecutor(2) as pool:
        outs = [tmp_path / f"{v}.ipynb" for v in (0.25, 0.5)]
        assert list(pool.map(lambda o: notebooks.execute(n, {"lr": float(o.stem)}, o), outs)) == [None, None]
    assert all(f"lr is {o.stem}" in o.read_text() for o in outs)


SCALE = 'scale: str = "smoke"  # {smoke} the one dial'


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("import sys; print('loading', file=sys.stderr)", "output on stderr: loading"),
        ("import warnings; warnings.warn('old name', FutureWarning)", "output on stderr"),
        ("print('lib.py:3: FutureWarning: use cache')", "a warning: lib.py:3: FutureWarning: use cache"),
        ("import sys; print(sys.prefix)", "a path of this machine"),
        ("import torch\ntorch.__path__[0]", "a path of this machine"),
    ],
)
def test_a_strict_build_refuses_what_a_library_printed(tmp_path, monkeypatch, cell, found):
    source = notebook(tmp_path / "source" / "n.ipynb", cell, parameters=SCALE)
    out = tmp_path / "n.ipynb"
    monkeypatch.setattr(notebooks, "notebook_path", lambda name: source)
    problem = build._execute("n", out, "smoke", "fingerprint")
    assert found in problem and not out.exists() and (tmp_path / "n.failed.ipynb").exists()


def test_the_page_has_a_table_of_the_parameters_above_their_folded_cell(tmp_path, monkeypatch):
    more = ["lr: float | None = None  # (0, 1] learning rate; none: by scale", 'log: str = ""  # a|b']
    source = notebook(tmp_path / "source" / "n.ipynb", "print(lr)", parameters="\n".join([SCALE, *more]))
    out = tmp_path / "n.ipynb"
    monkeypatch.setattr(notebooks, "notebook_path", lambda name: source)
    assert build._execute("n", out, "smoke", "fingerprint") is None
    cells = json.loads(out.read_text())["cells"]
    assert [cell["metadata"].get("tags", []) for cell in cells] == [
        [], ["parameters", "hide-input"], ["injected-parameters", "remove-cell"], [],
    ]  # fmt: skip
    assert cells[0]["source"].splitlines()[3:-1] == [
        "| `scale` | `'smoke'` | `{smoke}` | the one dial |",
        "| `lr` | by scale | `float (0, 1]` | learning rate |",
        "| `log` | `''` | `str` | a\\|b |",
    ]


def test_a_caution_of_ours_is_shown_as_one_and_a_clean_notebook_passes(tmp_path, monkeypatch):
    lines = ["import warnings", "from lddyn import Caution", "from lddyn.publish import display", "display.begin()"]
    lines += ["warnings.warn('3 <rows>', Caution)"]
    source = notebook(tmp_path / "source" / "n.ipynb", "\n".join(lines), parameters=SCALE)
    out = tmp_path / "n.ipynb"
    monkeypatch.setattr(notebooks, "notebook_path", lambda name: source)
    assert build._execute("n", out, "smoke", "fingerprint") is None
    assert "Caution.</strong> 3 &lt;rows&gt;" in out.read_text()


def test_a_notebook_says_how_far_it_is_also_where_its_output_is_a_file(tmp_path, capsys):
    running, told = notebook(tmp_path / "n.ipynb", "print(lr)", "lr * 2"), ""
    content = json.loads(running.read_text())
    content["cells"][0]["metadata"]["papermill"] = {"status": "completed"}
    running.write_text(json.dumps(content))
    with notebooks._telling("n", running, every=0.01):
        until = time.monotonic() + 60
        while not told and time.monotonic() < until:
            told = capsys.readouterr().err
    assert told.startswith("lddyn: n: 1 of 3 cells, 0.0 min")


def test_what_a_chapter_takes_here_is_reckoned_from_recorded_times_and_the_rate_of_this_machine(monkeypatch):
    recorded = {"seconds": {"smoke": {"a": 60, "b": 240}}, "gflops": 300}
    monkeypatch.setattr(notebooks, "times", lambda: recorded)
    monkeypatch.setattr(notebooks.estimate, "measured_rate", lambda *_, **__: 100e9)
    assert notebooks.expected(["a", "b"], "smoke") == "about 15 min"
    assert notebooks.expected(["a"], "paper") == "hours to days"
