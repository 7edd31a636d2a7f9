"""Binder and Colab buttons, when it is known where the repository lives: on GitHub Actions, or from the git remote.

Colab opens a notebook alone, which then installs the package from the address in pyproject.toml: no button where that
is not this repository (see `make address`).
"""

import os
import re
import subprocess
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def _repository() -> str | None:
    if os.environ.get("GITHUB_REPOSITORY"):
        return os.environ["GITHUB_REPOSITORY"]
    done = subprocess.run(["git", "remote", "get-url", "origin"], capture_output=True, text=True)
    found = re.search(r"github\.com[:/]([^/]+/[^/]+?)(\.git)?\s*$", done.stdout)
    return found[1] if found else None


def _configure(app, config):
    if repository := _repository():
        address = f"https://github.com/{repository}"
        buttons = {"binderhub_url": "https://mybinder.org"}
        if address == tomllib.loads(PROJECT.read_text())["project"]["urls"]["Repository"]:
            buttons["colab_url"] = "https://colab.research.google.com"
        config.html_theme_options |= {
            "repository_url": address,
            "repository_branch": "main",
            "path_to_docs": "",  # the sources of the notebooks lie in notebooks/, not in book/
            "use_repository_button": True,
            "launch_buttons": buttons,
        }


def setup(app):
    app.connect("config-inited", _configure)
    return {"parallel_read_safe": True}
