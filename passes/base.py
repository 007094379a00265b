"""What a pass is, and what a pass that carries out a scheme is."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..expression import Expression
from ..kernels.op import Case, Packing, capability
from ..patterns.language import inherit
from ..program import Program, Site, nbytes, set_attribute
from ..report import REWRITTEN
from ..weights import Pack

if TYPE_CHECKING:
    from ..pipeline import Context
    from ..schemes import Scheme


class Stage(enum.IntEnum):
    """The order of passes; within a stage they run in the order in which `after` asks for, then by name."""

    NORMALIZE = 0
    DECIDE = 1
    FUSE = 2
    SPARSIFY = 3
    QUANTIZE = 4
    CACHE = 5
    LOWER = 6
    CLEANUP = 7


class Pass:
    """A rewrite of programs: a name, a stage, and `run(program, context)`, which answers with its matches.

    after: names of passes of the same stage that run before. settings: of Inductor, that suit a graph with matches.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    after: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[Mapping[str, Any]] = {}

    def run(self, program: Program, context: Context) -> int:
        raise NotImplementedError


class SchemePass(Pass):
    """Carries out one scheme at the sites to which the recipe gave it.

    A technique says which `scheme`, and rewrites a site, mostly by `swap`, or `swap_scaled` of `activation.py`. Sites
    that cannot take the scheme (`Scheme.refuse`) do not get it.
    """

    stage = Stage.QUANTIZE
    scheme: ClassVar[type[Scheme]]

    def rewrite(self, site: Site, program: Program, context: Context) -> None:
        raise NotImplementedError

    def run(self, program: Program, context: Context) -> int:
        sites = [site for site in program.sites if type(site.scheme) is self.scheme]
        for site in sites:
            self.rewrite(site, program, context)
        return len(sites)


def swap(program: Program, site: Site, packing: Packing, *rest: Any, group_size: int | None = None) -> None:
    """Puts `op(x, *packed, *rest, bias)`, of the packing's op, in place of a linear; `packed = packing(weight)`."""
    op, x = packing.op, site.x
    names = [argument.name for argument in op.overload._schema.arguments[1:]]
    replace_linear(
        program, site, packing, names,
        arguments=lambda packed, bias: (x, *packed, *rest, bias),
        probe=lambda x, packed: op(x, *packed, *rest, None),
        group_size=group_size,
    )  # fmt: skip


def replace_linear(
    program: Program,
    site: Site,
    packing: Packing,
    names: Sequence[str],
    arguments: Callable[[Sequence[Node], Node | None], tuple],
    probe: Callable[[Tensor, Sequence[Tensor]], Tensor],
    **about: Any,
) -> None:
    """Puts `op(*arguments(packed, bias))`, of the packing's op, in place of a linear; `packed = packing(weight)`.

    names: of what is packed. probe(x, packed): what the op makes of x, without bias, for the error in the report.
    about: what the case that the report asks about says besides sizes and dtype.

    Here the packing sees only a fake weight, for shapes; the weight store runs it. Sites with the same weight, the same
    scheme and the same other settings share what is packed.
    """
    op, weight, like = packing.op, Expression.of(site.weight), site.weight.meta["val"]
    dtype, on = site.x.meta["val"].dtype, like.device
    case = Case(on.type, dtype, None, site.N, site.K, capability=capability(on), **about)
    own = [f"{k}={v}" for k, v in packing.settings.items() if k not in site.scheme.parameters() and v is not None]
    kind = "|".join([op.name, str(site.scheme), *own])
    key = f"{kind}|{weight}"
    with like.fake_mode:
        fakes = packing(like)
    if key not in program.packs:
        filled = constant_names(program, weight.leaves, names[: len(fakes)])
        program.packs[key] = Pack(kind, weight, packing, filled, probe, [])
    pack = program.packs[key]
    pack.rows += site.rows

    old, bias = site.node, site.bias
    constants = packed_nodes(program, pack, fakes, old)
    with program.graph.inserting_before(old):
        site.node = program.graph.call_function(op.overload, arguments(constants, bias))

    before, after = nbytes(like), sum(map(nbytes, fakes))
    for row in site.rows:
        row.outcome, row.scheme = REWRITTEN, str(site.scheme)
        row.kernel = op.plan(case, *row.shape.bounds)
        row.bytes_after = round(row.bytes_before * after / before)
    inherit(site.node, old)
    old.replace_all_uses_with(site.node)
    program.graph.erase_node(old)


def packed_nodes(program: Program, pack: Pack, fakes: Sequence[Tensor], before: Node) -> list[Node]:
    """`get_attr` nodes for what a pack will hold, in front of a node; for now their tensors are fake."""
    nodes = []
    for name, fake in zip(pack.names, fakes, strict=True):
        set_attribute(program.graph_module, name, torch.empty(0, device="meta"))
        with program.graph.inserting_before(before):
            nodes.append(program.graph.get_attr(name))
        nodes[-1].meta["val"] = fake
    return nodes


def constant_names(program: Program, leaves: list[str], fields: Sequence[str]) -> tuple[str, ...]:
    """Free names for packed tensors: those of their weights, with the field's name at the end.

    `a.q_proj.weight` and `a.k_proj.weight` together become `a.q_proj_k_proj.weight`.
    """
    parts = [leaf.split(".") for leaf in leaves]
    columns = itertools.zip_longest(*parts, fillvalue="")
    base = ".".join("_".join(dict.fromkeys(filter(None, column))) for column in columns)
    taken = {name for pack in program.packs.values() for name in pack.names} | program.constants.keys()
    for suffix in itertools.chain([""], (f"_{i}" for i in itertools.count(2))):
        names = tuple(f"{base}{suffix}_{field}" for field in fields)
        if taken.isdisjoint(names):
            return names
    raise AssertionError("unreachable: itertools.count never ends")
