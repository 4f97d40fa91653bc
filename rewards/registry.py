"""Reward terms by name, or by the dotted path of a user's own.

A term is `(outcome: StreamOutcome) -> array of one value in [0, 1] per expected answer`: an instance of a class that is
constructed with the term's parameters, or a function that takes them as keyword arguments after the outcome.

Invariants:
* there is one factory per name;
* a wrong name, path or parameter is a ValueError with the config key.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from rewards.outcome import StreamOutcome
from streams.support.plugins import check_params, construct, load, origin

Term = Callable[[StreamOutcome], np.ndarray]
Factory = TypeVar("Factory", bound=Callable[..., Any])

_factories: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Register a class or function as term `name`, a key of `reward.terms`. Raises ValueError if the name is taken."""

    def add(factory: Factory) -> Factory:
        known = _factories.get(name)
        # The same definition may come again when its module is reloaded.
        if known is not None and origin(known) != origin(factory):
            raise ValueError(
                f"reward term {name!r} is already {origin(known)}: register {origin(factory)} under another name"
            )
        _factories[name] = factory
        return factory

    if not name or ":" in name:
        raise ValueError(f"reward term name {name!r} must not be empty or hold ':' (that marks a dotted path)")
    return add


def get(name: str, key: str = "reward.terms") -> Callable[..., Any]:
    """Return the class or function registered as `name`, or found at the dotted path "package.module:attribute"."""
    if ":" in name:
        return load(name, key)
    if name not in _factories:
        raise ValueError(
            f"{key}: no reward term is called {name!r}; known: {', '.join(sorted(_factories))}. "
            "For your own, set target to package.module:attribute"
        )
    return _factories[name]


def build(name: str, params: Mapping[str, Any], key: str) -> Term:
    """Return the term `name` with its parameters. Raises ValueError that begins with `key`, its config key."""
    factory = get(name, key)
    is_class = inspect.isclass(factory)
    check_params(factory, params, key, skip=0 if is_class else 1)
    term: Term = construct(factory, params, key) if is_class else functools.partial(factory, **params)
    if not callable(term):
        raise ValueError(f"{key}: {origin(factory)} has no __call__(outcome); give it one")
    try:
        inspect.signature(term).bind(None)
    except TypeError as error:
        wanted = "__call__(self, outcome)" if is_class else f"{getattr(factory, '__name__', 'f')}(outcome, ...)"
        raise ValueError(
            f"{key}: {origin(factory)} cannot be called with a stream's outcome ({error}); write it as {wanted}"
        ) from error
    return term
