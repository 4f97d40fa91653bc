"""Which code the actors import: on a local Ray the driver's folders, on a cluster copies that Ray sends to every node.

Ray names a copy by its content and starts new processes for new content, so no worker keeps an older module. What is sent:

| started by | our packages | the user's own modules |
|---|---|---|
| `launch.py` in a `ray job submit` | the job's working directory | the same |
| `launch.py` with cluster.address | the checkout, as working directory | the same |
| `sightline` in a `ray job submit` | the nine packages, as Ray's py_modules | the job's working directory |
| `sightline` with cluster.address | the nine packages, as Ray's py_modules | their folder, if used, as working directory |

Invariants:
* Our packages come before anything of the same name on a worker's path.
* Nothing of site-packages is sent but our packages; of a folder, no virtual environment, .git or outputs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from conf.platform import RAY_JOB_VARIABLE
from streams.support.files import MODULES_VARIABLE, PACKAGES, PROJECT

UPLOAD_EXCLUDES = (
    *(".git/", ".venv/", ".venv-*/", "venv/", "site-packages/", "__pycache__/"),
    *("/outputs/", "/.*_cache/", "/.hypothesis/"),
)
"""Never sent, as patterns of .gitignore; what a folder's own .gitignore names is not sent either."""


def modules_folder() -> Path:
    """Return the folder of the user's own modules: that of `launch.py`, or where the `sightline` command was typed."""
    named = os.environ.get(MODULES_VARIABLE)
    return Path(named).absolute() if named else PROJECT


def local_path() -> str:
    """Return the PYTHONPATH of actors on this machine."""
    folders = [str(PROJECT), str(modules_folder()), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(dict.fromkeys(filter(None, folders)))


def cluster_environment(run_root: Path) -> dict[str, Any]:
    """Return Ray's runtime_env for actors on a cluster. Raises ValueError if run_root cannot be kept out of it."""
    environment: dict[str, Any] = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
    excludes = list(UPLOAD_EXCLUDES)
    folder = modules_folder()
    together = folder == PROJECT  # our packages lie in the same folder
    if not together:
        environment |= {"py_modules": [str(PROJECT / package) for package in PACKAGES], "excludes": excludes}
    if RAY_JOB_VARIABLE in os.environ:
        # The job's own working directory stays in force; Ray puts it on every process's path.
        return environment
    if inherited := os.environ.get("PYTHONPATH"):
        environment["env_vars"]["PYTHONPATH"] = inherited
    if together or uses_modules_of(folder):
        if run_root.is_relative_to(folder):
            excludes.append(_left_out(run_root.relative_to(folder), together))
        environment |= {"working_dir": str(folder), "excludes": excludes}
    return environment


def uses_modules_of(folder: Path) -> bool:
    """Return whether a module directly in `folder` has been imported. By now every reward term and policy has been."""
    for name, module in list(sys.modules.items()):
        if "." in name or name == "__main__":
            continue
        places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
        if any(place is not None and Path(place).absolute().parent == folder for place in places):
            return True
    return False


def _left_out(run_root: Path, together: bool) -> str:
    """Return the pattern that keeps run_root from being sent.

    Ray applies it to each of our packages, too. Raises ValueError if it would leave a part of one out.
    """
    inside = [package for package in PACKAGES if run_root.parts and (PROJECT / package / run_root).exists()]
    if inside and not together:
        raise ValueError(
            f"run_root={run_root}, in the folder of your own modules, has the name of a part of Sightline "
            f"({inside[0]}/{run_root}), and what is sent to the cluster is chosen by name: call it otherwise, for example "
            f"outputs/{run_root.name}"
        )
    return f"/{run_root}/"
