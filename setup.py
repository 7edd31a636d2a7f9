"""What pyproject.toml cannot say: the wheel also gets those files of the clone that the package reads.

A copy at build time, so that `book/` and `notebooks/` stay the one place to edit; an editable install reads them there.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("book/claims.yml", "book/times.json", "book/recorded", "book/settings", "book/sweeps", "notebooks")


class WithSources(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "lddyn" / "shipped"
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left
        for name in SHIPPED:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if Path(name).is_dir():
                shutil.copytree(name, target / name, ignore=shutil.ignore_patterns(".*"))  # Jupyter's checkpoints
            else:
                shutil.copy(name, target / name)


setup(cmdclass={"build_py": WithSources})
