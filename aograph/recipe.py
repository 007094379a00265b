"""Recipes: an ordered list of rules (match → scheme), the last rule that matches winning, as in a style sheet.

As a string, presets compose with `+`, take parameters in parentheses and selectors in front; `SHIPPED` names lists of
rules::

    int4wo
    int4wo(group_size=128, algorithm=mse) + lm_head:int8wo + re:.*layers\\.0\\..*:none
    vit

As TOML, one `[[rule]]` each, with the keys of `Rule` and the parameters of the scheme::

    [[rule]]
    scheme = "int4wo"
    group_size = 128

    [[rule]]
    name = "lm_head"
    scheme = "none"

A recipe that was calibrated names the file of its statistics, which lies beside it, above the rules::

    statistics = "recipe.statistics.safetensors"
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from . import statistics
from .errors import RecipeError
from .predicate import Shape, holds, parse
from .schemes import PRESETS, Int8Dynamic, Int8DynamicSparse24, Scheme, Sparse24, nearest
from .statistics import LinearStatistics


class Candidate(Protocol):
    """What a rule can ask about."""

    @property
    def name(self) -> str: ...
    @property
    def operator(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def shape(self) -> Shape | None: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class Rule:
    """Gives `scheme` to the candidates that all given selectors match, of those that the scheme is for.

    name: glob on the qualified name ("model.layers.*.mlp.*"), or a regular expression after "re:" (full match).
    operator: the operator as the model wrote it: "linear", "addmm", "einsum", "conv2d" …
    module: class of the innermost module, short ("Linear") or qualified ("torch.nn.modules.linear.Linear").
    shape: a predicate on M, N and K: text ("K >= 1024 and M <= 16") or a function of a `Shape`.
    optional: a rule with selectors that matches nothing is an error unless it is optional.
    """

    scheme: Scheme
    name: str | None = None
    operator: str | None = None
    module: str | None = None
    shape: str | Callable[[Shape], bool] | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, Scheme):
            raise RecipeError(f"a rule's scheme must be a scheme such as Int4WeightOnly(), not {self.scheme!r}")
        if self.name is not None and self.name.startswith("re:"):
            try:
                re.compile(self.name[3:])
            except re.error as error:
                raise RecipeError(f"the selector {self.name!r} is no regular expression: {error}") from None
        if isinstance(self.shape, str):
            parse(self.shape)

    @property
    def selective(self) -> bool:
        return any(s is not None for s in (self.name, self.operator, self.module, self.shape))

    def matches(self, candidate: Candidate) -> bool | None:
        """Whether it matches; None where a shape predicate cannot be decided for a dynamic M."""
        if self.scheme.kind not in (None, candidate.kind):
            return False
        if self.name is not None:
            glob = self.name.startswith("re:") or fnmatch.fnmatchcase(candidate.name, self.name)
            if not (re.fullmatch(self.name[3:], candidate.name) if self.name.startswith("re:") else glob):
                return False
        if self.operator is not None and self.operator != candidate.operator:
            return False
        if self.module is not None and self.module not in (candidate.module, candidate.module.rpartition(".")[2]):
            return False
        if self.shape is None:
            return True
        if candidate.shape is None:
            return False
        if isinstance(self.shape, str):
            return holds(self.shape, candidate.shape)
        try:
            return bool(self.shape(candidate.shape))
        except TypeError:  # a relation on a symbolic M has no truth value
            return None

    def __str__(self) -> str:
        selectors = {k: getattr(self, k) for k in SELECTORS if getattr(self, k) is not None}
        return " ".join([*(f"{k}={v!r}" for k, v in selectors.items()), f"→ {self.scheme}"])


SELECTORS = ("name", "operator", "module", "shape")

# Recipes that have a name. "vit" is for vision transformers, their linears named as in timm, transformers, torchvision,
# Segment Anything, DINOv2 or torch itself.
SHIPPED = {
    "vit": (
        Rule(Int8Dynamic(), name=r"re:(.*\.)?(self_)?(attn|attention)\..*"),
        Rule(Int8DynamicSparse24(), name=r"re:(.*\.)?(mlp\.(fc1|lin1|0|w12|weights_in)|intermediate\.dense|linear_?1)"),
        Rule(Sparse24(), name=r"re:(.*\.)?(mlp\.(fc2|lin2|3|w3|weights_out)|(?<!attention\.)output\.dense|linear_?2)"),
    ),
}


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; after `aograph.calibrate` with statistics of linears, by the names of their weights."""

    rules: tuple[Rule, ...]
    statistics: Mapping[str, LinearStatistics] = field(default_factory=dict, hash=False, repr=False)

    @classmethod
    def of(cls, source: Any) -> Recipe:
        """From a recipe, a scheme, a list of rules, a preset string, or a `.toml` file."""
        if isinstance(source, cls):
            return source
        if isinstance(source, Scheme):
            return cls((Rule(source),))
        if isinstance(source, Path) or (isinstance(source, str) and source.endswith(".toml")):
            return cls.read(Path(source))
        if isinstance(source, str):
            parts = (part.strip() for part in re.split(r"\+(?![^(]*\))", source))
            return cls(tuple(rule for part in parts for rule in SHIPPED.get(part) or [parse_part(part)]))
        if isinstance(source, Iterable):
            rules = tuple(source)
            if rules and all(isinstance(r, Rule) for r in rules):
                return cls(rules)
        raise RecipeError(f"{source!r} is no recipe: give a preset, a scheme, a list of rules, a Recipe or a .toml")

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """A recipe that was written by hand, or by `save`."""
        try:
            text = path.read_text()
        except OSError as error:
            raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from None
        rules, beside = parse_toml(text)
        return cls(rules, {} if beside is None else statistics.read(path.parent / beside))

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `.toml` file that `Recipe.of` reads back; statistics go to `STEM.statistics.safetensors` beside it.

        Raises `RecipeError` for other paths, those that cannot be written, and rules that have no text.
        """
        path = Path(path)
        if path.suffix != ".toml":
            raise RecipeError(f"a recipe is a .toml file, not {path.name}: give {path.with_suffix('.toml')}")
        text, beside = self.to_toml(), path.with_suffix(".statistics.safetensors")
        try:
            if self.statistics:
                text = f"statistics = {quoted(beside.name)}\n\n{text}"
                replace_file(beside, lambda fresh: statistics.write(fresh, self.statistics))
            replace_file(path, lambda fresh: fresh.write_text(text))
        except OSError as error:
            raise RecipeError(f"the recipe {path} cannot be written: {error.strerror}") from None

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        rules, beside = parse_toml(text)
        if beside is not None:
            raise RecipeError(f"the recipe has statistics in {beside!r}, beside its file: give the path of that file")
        return cls(rules)

    def to_toml(self) -> str:
        """The rules as TOML, which `from_toml` reads back; those whose shape is a function have no text."""
        lines: list[str] = []
        for rule in self.rules:
            if callable(rule.shape):
                raise RecipeError(f"a shape predicate that is a function cannot be written as TOML: {rule}")
            table = {k: getattr(rule, k) for k in SELECTORS if getattr(rule, k) is not None}
            table |= {"optional": True} if rule.optional else {}
            settings = rule.scheme.settings(changed_only=False)
            table |= {"scheme": rule.scheme.preset, **{k: v for k, v in settings.items() if v is not None}}
            lines += ["[[rule]]", *(f"{k} = {quoted(v)}" for k, v in table.items()), ""]
        return "\n".join(lines)

    def decide(self, candidate: Candidate) -> tuple[int, Rule] | None:
        """The number (from 1) and the rule that wins, or None if none matches."""
        winners = [(i, r) for i, r in enumerate(self.rules, 1) if r.matches(candidate)]
        return winners[-1] if winners else None

    def undecided(self, candidate: Candidate) -> list[int]:
        """The numbers of the rules whose shape predicate a dynamic M leaves open."""
        return [i for i, r in enumerate(self.rules, 1) if r.matches(candidate) is None]

    def check_selectors(self, candidates: Iterable[Candidate]) -> None:
        """Raises `RecipeError` for a rule with selectors that matches no candidate and is not optional."""
        for complaint in self.unmatched(candidates):
            raise RecipeError(complaint)

    def unmatched(self, candidates: Iterable[Candidate]) -> Iterator[str]:
        """A complaint for each rule with selectors that matches no candidate and is not optional."""
        candidates = list(candidates)
        for i, rule in enumerate(self.rules, 1):
            if not rule.selective or rule.optional or any(rule.matches(c) is not False for c in candidates):
                continue
            found = f" among {len(candidates)} candidates"
            for key in reversed(SELECTORS[:3]):
                wanted = getattr(rule, key)
                seen = list(dict.fromkeys(getattr(c, key) for c in candidates))
                if wanted is not None and not any(Rule(rule.scheme, **{key: wanted}).matches(c) for c in candidates):
                    found = f": no {key} {wanted!r}; {nearest(wanted, seen)}"
            yield f"rule {i} ({rule}) matches nothing{found}"

    def lenient(self) -> Recipe:
        """The same, with all rules optional: for graphs that are parts of a model."""
        return replace(self, rules=tuple(replace(rule, optional=True) for rule in self.rules))

    def __str__(self) -> str:
        return "; ".join(map(str, self.rules))


def parse_part(text: str) -> Rule:
    """One part of a recipe string: `[selector:]preset[(parameter=value, …)]`."""
    found = re.fullmatch(r"\s*(?:(?P<name>\S+):)?(?P<preset>[\w-]+)\s*(?:\((?P<settings>.*)\))?\s*", text)
    if not found:
        raise RecipeError(f"{text.strip()!r} is no recipe; {nearest(text.strip(), PRESETS)}")
    table: dict[str, Any] = {"scheme": found["preset"]}
    for setting in filter(None, map(str.strip, (found["settings"] or "").split(","))):
        key, equals, value = map(str.strip, setting.partition("="))
        if not equals:
            raise RecipeError(f"{setting!r} in {text.strip()!r} is no parameter=value")
        table[key] = int(value) if value.isdecimal() else value.strip("\"'")
    if found["name"]:
        table["name"] = found["name"]
    return rule_from(table, repr(text.strip()))


def parse_toml(text: str) -> tuple[tuple[Rule, ...], str | None]:
    """The rules of a recipe as TOML, and the name of the file of its statistics, if it has some."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"the recipe is no TOML: {error}") from None
    for key in document:
        if key not in ("rule", "statistics"):
            raise RecipeError(f"unknown key {key!r} in the recipe; {nearest(key, ['rule', 'statistics'])}")
    rules, beside = document.get("rule", []), document.get("statistics")
    if not isinstance(rules, list) or not rules:
        raise RecipeError("the recipe has no [[rule]]")
    if not isinstance(beside, str | None):
        raise RecipeError(f"statistics = {beside!r} is a {type(beside).__name__}: give the name of a file")
    return tuple(rule_from(dict(table), f"rule {i}") for i, table in enumerate(rules, 1)), beside


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Puts a whole new file in place of an old one, or leaves that as it is."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def quoted(value: Any) -> str:
    """A string, number or boolean as TOML writes it: as JSON, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def rule_from(table: dict[str, Any], where: str) -> Rule:
    for key, value in table.items():
        kind = {"optional": bool}.get(key, str if key in ("scheme", *SELECTORS) else (str, int, float, bool))
        if not isinstance(value, kind):
            raise RecipeError(f"{where}: {key} = {value!r} is a {type(value).__name__}, which it cannot be")
    preset = table.pop("scheme", None)
    if preset not in PRESETS:
        raise RecipeError(f"{where}: unknown scheme {preset!r}; {nearest(preset, PRESETS)}")
    own = {k: table.pop(k) for k in (*SELECTORS, "optional") if k in table}
    valid = PRESETS[preset].parameters()
    for key in table:
        if key not in valid:
            keys = (*valid, *SELECTORS, "optional", "scheme")
            raise RecipeError(f"{where}: unknown key {key!r} for {preset}; {nearest(key, keys)}")
    return Rule(PRESETS[preset](**table), **own)
