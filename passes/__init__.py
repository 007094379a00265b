"""Passes: each file joins a pattern to an op. `PASSES` finds them; a new file needs no registration."""

import importlib
import pkgutil

from .base import Pass, SchemePass, Stage

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def _subclasses(cls: type[Pass]) -> list[type[Pass]]:
    return [s for c in cls.__subclasses__() for s in (c, *_subclasses(c))]


PASSES: tuple[Pass, ...] = tuple(cls() for cls in dict.fromkeys(_subclasses(Pass)) if "name" in vars(cls))

__all__ = ["PASSES", "Pass", "SchemePass", "Stage"]
