"""Finds the candidates: a row of the report for each, a site for each that schemes can take, and its scheme.

Caches are candidates where a rule of the recipe is for caches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch.fx import GraphModule, Node

from ..expression import Expression
from ..kernels.kv_update import kv_update
from ..kernels.op import capability
from ..patterns.cache import memory
from ..patterns.language import Miss, arguments, constant, match, packet, written
from ..patterns.linear import LINEAR, MATMULS, underlying, weight_operands
from ..predicate import Shape
from ..program import CacheSite, Program, Site, get_attribute, hint, nbytes
from ..report import EXCLUDED, NEAR_MISS, SKIPPED, Row
from ..schemes import CACHE, Keep
from .base import Pass, Stage

aten = torch.ops.aten
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class FindSites(Pass):
    """Rows, sites, and the recipe's decision on each."""

    name = "find_sites"
    stage = Stage.DECIDE

    def run(self, program: Program, context) -> int:
        for node in program.graph.nodes:
            program.rows += self.inside(program, node)
            for weight in weight_operands(node)[:1]:
                found = match(LINEAR, node)
                row = self.row(program, node, weight, found)
                program.rows.append(row)
                if isinstance(found, Miss):
                    bank = "the weight is picked by data (an expert bank)"
                    picked = not constant(weight) and underlying(weight) == "picked by data"
                    row.close(NEAR_MISS, bank if picked else node.meta.get("miss", found.reason))
                else:
                    program.sites.append(Site(node, [row]))
        wanted = any(rule.scheme.kind == CACHE for rule in context.recipe.rules)
        program.caches = [each for each in caches(program) if wanted or each.format is not None]
        program.rows += [cache.row for cache in program.caches]
        context.recipe.check_selectors(program.rows)
        for site in program.sites:
            self.decide(program, site, context)
        for cache in program.caches:
            if cache.format is None:
                decide_cache(cache, context)
        return len(program.sites) + len(program.caches)

    def row(self, program: Program, node: Node, weight: Node, found) -> Row:
        val = weight.meta["val"]
        path, module = node.meta.get("origin", ("", ""))
        shape = None
        if not isinstance(found, Miss):
            tokens = Site(node, []).M
            shape = Shape(tokens, *map(int, val.shape), bounds=program.bounds(tokens))
        return Row(
            name=candidate_name(weight, path, program.aliases),
            operator=node.meta.get("operator") or str(packet(node.target)).removeprefix("aten."),
            module=module,
            shape=shape,
            dtype=val.dtype,
            bytes_before=nbytes(val),
        )

    def inside(self, program: Program, node: Node) -> Iterator[Row]:
        """Rows for products inside subgraphs that stay whole (cond, while_loop, autocast regions)."""
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            return
        operands = torch.utils._pytree.tree_leaves(node.args)
        for subgraph in operands:
            if not isinstance(subgraph, Node) or subgraph.op != "get_attr":
                continue
            inner = get_attribute(program.graph_module, subgraph.target)
            if not isinstance(inner, GraphModule):
                continue
            placeholders = list(inner.graph.find_nodes(op="placeholder"))
            for placeholder, operand in zip(reversed(placeholders), reversed(operands), strict=False):
                if not isinstance(operand, Node) or not constant(operand):
                    continue
                for user in placeholder.users:
                    given = arguments(user)
                    if any(given[p] is placeholder for p in MATMULS.get(packet(user.target), ()) if p < len(given)):
                        row = self.row(program, user, operand, Miss(""))
                        row.close(NEAR_MISS, f"inside {node.target}, which passes do not enter")
                        yield row

    def decide(self, program: Program, site: Site, context) -> None:
        (row,) = site.rows
        decision = context.recipe.decide(row)
        open_rules = context.recipe.undecided(row)
        leaves = Expression.of(site.weight).leaves
        if open_rules:
            row.notes.append(f"rule {open_rules} is undecided for M = {row.shape.M}")
        if decision is None:
            row.close(SKIPPED, "no rule of the recipe matches")
        elif isinstance(decision[1].scheme, Keep):
            row.close(EXCLUDED, f"excluded by rule {decision[0]}")
        elif site.dtype not in FLOATS:
            row.close(NEAR_MISS, f"unsupported dtype {site.dtype}")
        elif site.x.meta["val"].dtype != site.dtype:
            row.close(NEAR_MISS, f"x is {site.x.meta['val'].dtype}, the weight {site.dtype}")
        elif 0 in site.weight.meta["val"].shape:
            row.close(SKIPPED, "the weight is empty")
        elif role := self.other_role(program, site):
            row.close(SKIPPED, f"its weight is used elsewhere in another role ({role})")
        elif reason := decision[1].scheme.refuse(site.N, site.K):
            row.close(NEAR_MISS, reason)
        elif reason := decision[1].scheme.unsupported(capability(site.weight.meta["val"].device)):
            row.close(SKIPPED, reason)
        elif site.node.meta.get("grad") and not decision[1].scheme.differentiable:
            row.close(SKIPPED, f"gradients are recorded, and {decision[1].scheme.preset} has none: use torch.no_grad()")
        elif decision[1].scheme.calibrated and not context.statistics.keys() >= set(leaves):
            row.close(SKIPPED, "needs calibrated statistics: aograph.calibrate(model, recipe, batches)")
        else:
            site.scheme = decision[1].scheme

    def other_role(self, program: Program, site: Site) -> str | None:
        """A use of the site's weights that is neither a linear's weight nor an embedding's table."""
        weights = program.weights
        linears = {s.node: s.weight for s in program.sites}
        stack = [weights[name] for name in Expression.of(site.weight).leaves]
        while stack:
            node = stack.pop()
            for user in node.users:
                if constant(user):
                    stack.append(user)
                elif linears.get(user) is not node and packet(user.target) is not aten.embedding:
                    return "an output" if user.op == "output" else f"{packet(user.target)}".removeprefix("aten.")
        return None


def caches(program: Program) -> Iterator[CacheSite]:
    """Buffers and inputs with three dimensions and more that the graph writes: rows, heads or both, positions, heads of
    D elements; what is smaller, such as a count or running statistics, is none. Where sizes are dynamic, a row counts
    the bytes of the example that the graph was captured with.

    One that came packed has a format; its row compares it with a cache in the dtype of its tokens.
    """
    updates = {memory(node.args[0]): node for node in program.graph.nodes if node.target is kv_update.overload}
    parts = {memory(part) for node in updates.values() for part in (node.args[1], *node.args[4:])}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op not in ("get_attr", "placeholder") or not isinstance(value, torch.Tensor) or value.ndim < 3:
            continue
        writer = written(node)
        if writer is None or node in parts:
            continue
        sizes = [*map(hint, value.shape)]
        row = Row(
            name=cache_name(node),
            operator=str(packet(writer.target)).removeprefix("aten."),
            module=writer.meta.get("origin", ("", ""))[1],
            shape=None,
            dtype=value.dtype,
            bytes_before=prod(sizes) * value.itemsize,
            tokens=sizes[0] * sizes[2] if value.ndim == 4 else 0,
        )
        form = None
        if node in updates:
            codes, scales, new, _, *window = updates[node].args
            form = kv_update.format_of(*(each.meta["val"] for each in (codes, scales, *window[:1])))
            D, row.dtype = new.meta["val"].shape[3], new.meta["val"].dtype
            row.bytes_before = prod(sizes[:3]) * int(D) * row.dtype.itemsize
            row.bytes_after = sum(
                prod(map(hint, each.meta["val"].shape)) * each.meta["val"].itemsize for each in (codes, scales, *window)
            )
        yield CacheSite(node, row, format=form)


def cache_name(node: Node) -> str:
    """`key_3` for the keys of layer 3 of a cache object of transformers; else the name of the buffer or input."""
    source = getattr(node, "_dynamo_source", None)
    name = node.target if source is None else source.name
    found = re.search(r"layers(?:\[|_)(\d+)(?:\]\.|_)(key|value)s(?:\[0\]|_0)?$", name)
    return f"{found[2]}_{found[1]}" if found else node.target


def decide_cache(cache: CacheSite, context) -> None:
    decision = context.recipe.decide(cache.row)
    if decision is None:
        cache.row.close(SKIPPED, "no rule of the recipe matches")
    elif isinstance(decision[1].scheme, Keep):
        cache.row.close(EXCLUDED, f"excluded by rule {decision[0]}")
    else:
        cache.scheme = decision[1].scheme


def candidate_name(weight: Node, path: str, aliases: Mapping[str, str]) -> str:
    """The qualified name of a weight without a final ".weight", of a tied one that of the module which multiplies.

    A part of a weight says which; an expression of several weights goes by the module.
    """
    expression = Expression.of(weight) if constant(weight) else None
    if expression is None or len(expression.leaves) != 1:
        return path
    (leaf,) = expression.leaves
    name = path if aliases.get(f"{path}.weight") == leaf else leaf.removesuffix(".weight")
    if (part := view_of(weight)) is not None:
        name += part
    return name


def view_of(node: Node) -> str | None:
    """`[64:128]` for a slice or a chunk of a weight; None for the whole of it."""
    while node.op != "get_attr":
        if packet(node.target) is aten.slice:
            _, dim, start, end = [*node.args, *[None] * 4][:4]
            size = node.args[0].meta["val"].shape[dim or 0]
            return f"[{':, ' * (dim or 0)}{start or 0}:{min(end, size) if end is not None else size}]"
        if packet(node.target) in (aten.select,):
            return f"[{':, ' * node.args[1]}{node.args[2]}]"
        if node.target.__name__ == "getitem" and isinstance(node.args[1], int):
            return f"[chunk {node.args[1]}]"
        if len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None
