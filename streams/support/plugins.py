"""Loads a user's class or function by its dotted path and calls it with parameters from the configuration.

Used for reward terms and memory policies.

Invariant: a wrong path or parameter, and any exception of a user's constructor, is raised as a ValueError with the config
key.
"""

from __future__ import annotations

import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any


def load(path: str, key: str) -> Callable[..., Any]:
    """Return what is at "package.module:attribute". Raises ValueError; `key`.target is the config key that it names."""
    module_name, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # named boundary: a user's code; importing it may raise anything
        plain = isinstance(error, ImportError | AttributeError | ValueError)
        cause = str(error) if plain else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{key}.target={path!r} cannot be loaded ({cause}); "
            "write package.module:attribute, of a module on the Python path"
        ) from error
    if not callable(found):
        raise ValueError(f"{key}.target={path!r} is of type {type(found).__name__}; name a function or a class")
    return found


def check_params(factory: Callable[..., Any], params: Mapping[str, Any], key: str, *, skip: int = 0) -> None:
    """Raise ValueError for a parameter that `factory` does not take, or that it requires and is missing.

    skip: leading arguments of `factory` that do not come from the configuration.
    """
    accepted = list(inspect.signature(factory).parameters.values())[skip:]
    named = {p.name: p for p in accepted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for param, value in params.items():
        if param not in named and not any(p.kind is p.VAR_KEYWORD for p in accepted):
            raise ValueError(
                f"{key}.{param}={value!r}: there is no such parameter; {origin(factory)} takes "
                f"{', '.join(sorted(named)) or 'none'}"
            )
    for param, spec in named.items():
        if spec.default is spec.empty and param not in params:
            raise ValueError(f"{key}.{param} is missing: {origin(factory)} has no default for it; set it")


def construct(factory: Callable[..., Any], params: Mapping[str, Any], key: str) -> Any:
    """Return `factory(**params)`. Any exception is raised as a ValueError that begins with the config key."""
    try:
        return factory(**params)
    except ValueError as error:
        # "slack=-1 must be ..." becomes "reward.terms.timing.slack=-1 must be ...".
        first = re.match(r"\w*", str(error))
        joint = "." if first is not None and first[0] in params else ": "
        raise ValueError(f"{key}{joint}{error}") from error
    except Exception as error:  # named boundary: a user's code; whatever it raises is a wrong setting
        given = ", ".join(f"{name}={value!r}" for name, value in params.items())
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{key}: {origin(factory)}({given}) raised {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        ) from error


def origin(factory: Callable[..., Any]) -> str:
    """Return where `factory` is defined, as module:name."""
    return f"{factory.__module__}:{getattr(factory, '__qualname__', type(factory).__name__)}"
