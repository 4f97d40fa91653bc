"""Reward terms by name, or by the dotted path of a user's own.

Owner: rewards. A term is `(outcome: StreamOutcome) -> array of one value in [0, 1] per expected answer`: an
instance of a class that is constructed with the term's parameters, or a function that takes them as keyword
arguments after the outcome. Invariants: one factory per name; a wrong name, path or parameter is a
ValueError that carries the config key.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from rewards.outcome import StreamOutcome

Term = Callable[[StreamOutcome], np.ndarray]
Factory = TypeVar("Factory", bound=Callable[..., Any])

_factories: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Make a class or function known under `name` (as a key of `reward.terms`)."""

    def add(factory: Factory) -> Factory:
        known = _factories.get(name)
        # The same definition may come again when its module is reloaded.
        if known is not None and _origin(known) != _origin(factory):
            raise ValueError(
                f"reward term {name!r} is already {_origin(known)}: register {_origin(factory)} under another name"
            )
        _factories[name] = factory
        return factory

    if not name or ":" in name:
        raise ValueError(f"reward term name {name!r} must not be empty or hold ':' (that marks a dotted path)")
    return add


def get(name: str, key: str = "reward.terms") -> Callable[..., Any]:
    """The class or function registered as `name`, or found at the dotted path "package.module:attribute"."""
    if ":" in name:
        return _load(name, key)
    if name not in _factories:
        raise ValueError(
            f"{key}: no reward term is called {name!r}; known: {', '.join(sorted(_factories))}. "
            "For your own, set target to package.module:attribute"
        )
    return _factories[name]


def build(name: str, params: Mapping[str, Any], key: str) -> Term:
    """The term `name` with its parameters; `key` is its config key, for the errors."""
    factory = get(name, key)
    is_class = inspect.isclass(factory)
    _check_params(factory, is_class, params, key)
    term: Term = _constructed(factory, params, key) if is_class else functools.partial(factory, **params)
    if not callable(term):
        raise ValueError(f"{key}: {_origin(factory)} has no __call__(outcome); give it one")
    try:
        inspect.signature(term).bind(None)
    except TypeError as error:
        wanted = "__call__(self, outcome)" if is_class else f"{getattr(factory, '__name__', 'f')}(outcome, ...)"
        raise ValueError(
            f"{key}: {_origin(factory)} cannot be called with a stream's outcome ({error}); write it as {wanted}"
        ) from error
    return term


def _constructed(factory: Callable[..., Any], params: Mapping[str, Any], key: str) -> Any:
    try:
        return factory(**params)
    except ValueError as error:
        # "slack=-1 must be ..." becomes "reward.terms.timing.slack=-1 must be ...".
        first = re.match(r"\w*", str(error))
        joint = "." if first is not None and first[0] in params else ": "
        raise ValueError(f"{key}{joint}{error}") from error
    except Exception as error:  # a user's code: whatever it raises is a wrong setting
        given = ", ".join(f"{name}={value!r}" for name, value in params.items())
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{key}: {_origin(factory)}({given}) raised {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        ) from error


def _check_params(factory: Callable[..., Any], is_class: bool, params: Mapping[str, Any], key: str) -> None:
    accepted = list(inspect.signature(factory).parameters.values())
    if not is_class:
        accepted = accepted[1:]
    named = {p.name: p for p in accepted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for param, value in params.items():
        if param not in named and not any(p.kind is p.VAR_KEYWORD for p in accepted):
            raise ValueError(
                f"{key}.{param}={value!r}: there is no such parameter; {_origin(factory)} takes "
                f"{', '.join(sorted(named)) or 'none'}"
            )
    for param, spec in named.items():
        if spec.default is spec.empty and param not in params:
            raise ValueError(f"{key}.{param} is missing: {_origin(factory)} has no default for it; set it")


def _load(path: str, key: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a user's module: importing it may raise anything
        plain = isinstance(error, ImportError | AttributeError | ValueError)
        cause = str(error) if plain else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{key}.target={path!r} cannot be loaded ({cause}); "
            "write package.module:attribute, of a module on the Python path"
        ) from error
    if not callable(found):
        raise ValueError(f"{key}.target={path!r} is of type {type(found).__name__}; name a function or a class")
    return found


def _origin(factory: Callable[..., Any]) -> str:
    return f"{factory.__module__}:{getattr(factory, '__qualname__', type(factory).__name__)}"
