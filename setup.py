"""Packs the shared copies of configs, cards and DeepSpeed files into a wheel; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RESOURCES = ("configs", "data", "deepspeed", "ds_config.json", "constraints.txt")


class BuildWithResources(build_py):
    """Copies what `lamda.config.resources` looks for when there is no checkout."""

    def run(self) -> None:
        """Build, then add lamda/_resources/."""
        super().run()
        if not self.editable_mode:
            for name in RESOURCES:
                source, target = Path(name), Path(self.build_lib) / "lamda" / "_resources" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, dirs_exist_ok=True)
                else:
                    shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithResources})
