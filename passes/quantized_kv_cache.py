"""Caches of keys and values under a `KVCache` rule are kept in packed form.

What stores new tokens becomes `aograph::kv_update`, the attention that reads them `aograph::kv_attention`. A cache is
rewritten where all that touches it is known: it is a buffer of the model, or an input that is private, everything that
writes it stores tokens, everything that reads it is attention, and the attention's other cache is rewritten too. In the
place of such an input come several, its codes and its scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import Node

from ..expression import Expression
from ..kernels.kv_attention import kv_attention
from ..kernels.kv_cache import FEW, FLOATS
from ..kernels.kv_update import kv_update
from ..patterns.attention import ATTENTIONS, may_attend, scale_of, sinks_of, softcap_of
from ..patterns.broadcast import sizes
from ..patterns.cache import UPDATES, Update, memory
from ..patterns.language import Builder, Match, Miss, alike, match, mutates, packet, propagate, stays, views_of
from ..patterns.masks import seen
from ..program import CacheSite, Program, expression, hint, nbytes
from ..report import NEAR_MISS, REWRITTEN, SKIPPED
from ..weights import Pack
from .base import Pass, Stage, constant_names, packed_nodes
from .remove_noops import erase_dead

aten = torch.ops.aten
FIELDS = "codes", "scales", "window", "held"  # of what a cache is packed into


@dataclass
class Uses:
    """What is known to touch a cache: the nodes that are the whole of it, updates, and attentions."""

    whole: list[Node]
    updates: list[tuple[Update, Match]] = field(default_factory=list)
    attentions: list[Match] = field(default_factory=list)

    @property
    def keys(self) -> bool:
        """Whether the cache holds keys, and no values, in a buffer: by channel they want tokens in order, and the loop
        that makes the inputs of an artifact's steps may store one twice."""
        return self.whole[0].op == "get_attr" and all(m.value is not self.whole[0] for m in self.attentions)

    @property
    def nodes(self) -> set[Node]:
        """All that the patterns know, and the sizes that nothing else asks for."""
        found = {node for _, m in self.updates for node in m.nodes} | {n for m in self.attentions for n in m.nodes}
        asked = {user for node in found for user in node.users if packet(user.target) is aten.sym_size}
        return found | {each for each in asked if each.users.keys() <= found}

    def written_before(self, node: Node, order: dict[Node, int]) -> Node | None:
        """The last update ahead of a node."""
        before = [m.root for _, m in self.updates if order[m.root] < order[node]]
        return max(before, key=order.__getitem__, default=None)


class QuantizedKVCache(Pass):
    """Rewrites caches in pairs, and says of each other one what keeps it as it is."""

    name = "quantized_kv_cache"
    stage = Stage.CACHE

    def run(self, program: Program, context) -> int:
        sites = {cache.node: cache for cache in program.caches if cache.scheme is not None}
        if not sites:
            return 0
        uses, misses = uses_of(program, sites)
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        for node, cache in list(sites.items()):
            if (found := reason(program, cache, uses[node], misses, order)) is not None:
                refuse(cache, *found)
                del sites[node]
        while (alone := next(unpaired(sites, uses), None)) is not None:
            node, other = alone
            refuse(sites.pop(node), NEAR_MISS, f"its attention reads {other.target} too, which stays as it is")
        packed = {node: pack(program, cache, uses[node].keys) for node, cache in sites.items()}
        stores = {m.root: store(update, m, packed[node]) for node in packed for update, m in uses[node].updates}
        attentions = {found.root: found for node in packed for found in uses[node].attentions}
        for found in attentions.values():
            last = [stores.get(uses[node].written_before(found.root, order)) for node in (found.key, found.value)]
            kernel, notes = attend(program, found, packed[found.key], packed[found.value], last)
            keys = sites[found.key]
            if keys.node.op == "placeholder" and keys.scheme.packed_format(True) != keys.format:
                keys.row.notes.append("keys by token, as in all steps of an artifact")
            for node in dict.fromkeys((found.key, found.value)):
                row = sites[node].row
                row.kernel = row.kernel or kernel
                row.notes += [note for note in notes if note not in row.notes]
        dead = {node for each in packed for node in (each, *uses[each].nodes)}
        for node in sorted(dead, key=order.__getitem__, reverse=True):
            program.graph.erase_node(node)
        if dead:
            erase_dead(program)
        return len(packed)


def uses_of(program: Program, sites: dict[Node, CacheSite]) -> tuple[dict[Node, Uses], dict[Node, Miss]]:
    """The uses of each cache, and the nearest misses of nodes that may be attention."""
    uses = {node: Uses([]) for node in sites}
    misses: dict[Node, Miss] = {}
    for node in program.graph.nodes:
        if (cache := memory(node)) in uses:
            uses[cache].whole.append(node)
        for update in UPDATES:
            if packet(node.target) is update.pattern.target or node.target is update.pattern.target:
                found = match(update.pattern, node)
                if isinstance(found, Match) and found.cache in uses:
                    uses[found.cache].updates.append((update, found))
                    misses.pop(node, None)
                    break
                keep_nearest(misses, node, found)
        for pattern in ATTENTIONS:
            if may_attend(pattern, node):
                found = match(pattern, node)
                if isinstance(found, Match):
                    for cache in {found.key, found.value} & uses.keys():
                        uses[cache].attentions.append(found)
                else:
                    keep_nearest(misses, node, found)
    return uses, misses


def keep_nearest(misses: dict[Node, Miss], node: Node, found: Match | Miss) -> None:
    if isinstance(found, Miss) and (node not in misses or found.progress > misses[node].progress):
        misses[node] = found


def reason(
    program: Program, cache: CacheSite, uses: Uses, misses: dict[Node, Miss], order: dict[Node, int]
) -> tuple[str, str] | None:
    """The outcome and the reason of a cache that stays as it is; None where it can be rewritten."""
    node, value = cache.node, cache.node.meta["val"]
    if node.op == "placeholder" and node.target not in program.private:
        return SKIPPED, (
            "it is an input of the graph: the tensor is the caller's; past_key_values=aograph.PackedCache(model, "
            "recipe, batch_size, max_cache_len) is packed"
        )
    if "source" in node.meta:
        return SKIPPED, "under torch.compile the buffer stays the model's own: use aograph.optimize"
    if value.ndim != 4:
        return NEAR_MISS, f"it has {value.ndim} dimensions, not [B, H, S, D]"
    if value.dtype not in FLOATS:
        return NEAR_MISS, f"unsupported dtype {value.dtype}"
    if (refused := cache.scheme.refuse_head(int(value.shape[3]), uses.keys)) is not None:
        return NEAR_MISS, refused
    known = uses.nodes
    roots = {m.root for m in uses.attentions}
    for each in dict.fromkeys([*uses.whole, *known]):
        for user in each.users if each not in roots else ():
            if user not in known:
                return NEAR_MISS, unknown(user, each, misses)
    if not uses.updates:
        return NEAR_MISS, "nothing stores tokens in it"
    if not uses.attentions:
        return NEAR_MISS, "no attention reads it"
    writes = sorted(order[m.root] for _, m in uses.updates)
    for m in uses.attentions:
        first, last = min(order[n] for n in m.nodes), order[m.root]
        if any(first < write < last for write in writes):
            return NEAR_MISS, "it is written while an attention reads it"
    return None


def unknown(user: Node, read: Node, misses: dict[Node, Miss]) -> str:
    """What a use of a cache that is not known is, and why it is none of those that are.

    The reason is that of the attention that comes nearest, among what follows the use.
    """
    what = f"{'written' if read in mutates(user) else 'read'} by {packet(user.target)}".replace(
        "by output", "by the caller"
    )
    seen, stack, near = set(), [user], []
    while stack:
        node = stack.pop()
        if node in seen or (packet(node.target) is aten.linear and node is not user):
            continue
        seen.add(node)
        if node in misses:
            near.append(misses[node])
        stack += node.users
    nearest = max(near, key=lambda miss: miss.progress, default=None)
    return what.replace("aten.", "") + (f": {nearest.reason}" if nearest is not None else "")


def unpaired(sites: dict[Node, CacheSite], uses: dict[Node, Uses]) -> Iterable[tuple[Node, Node]]:
    for node in sites:
        for m in uses[node].attentions:
            for other in (m.key, m.value):
                if other not in sites:
                    yield node, other


def refuse(cache: CacheSite, outcome: str, why: str) -> None:
    cache.row.close(outcome, why)
    cache.scheme = None


# --- rewriting ---------------------------------------------------------------------------------------------


def pack(program: Program, cache: CacheSite, keys: bool) -> list[Node]:
    """The codes and scales that stand for a cache, whatever is in it when they are made; by channel its window, too."""
    node, form, row = cache.node, cache.scheme.packed_format(keys), cache.row
    name, like = node.target, node.meta["val"]
    with like.fake_mode:
        fakes = form.empty(*like.shape, device=like.device, dtype=like.dtype)
    cache.format = form
    row.outcome, row.scheme, row.bytes_after = REWRITTEN, str(cache.scheme), sum(map(nbytes, fakes))
    names = constant_names(program, [name], FIELDS[: len(fakes)])
    if node.op == "placeholder":
        program.private = (program.private - {name}) | set(names)
        return inputs(program, names, fakes, node)
    kind = f"cache|{cache.scheme}|{'keys' if keys else 'values'}"
    found = Pack(kind, Expression(name), form.pack, names, None, [row], state=True)
    program.packs[found.key] = found
    program.mutated = (program.mutated - {name}) | set(names)
    return packed_nodes(program, found, fakes, node)


def inputs(program: Program, names: Sequence[str], fakes: Sequence[Tensor], before: Node) -> list[Node]:
    nodes = []
    for name, fake in zip(names, fakes, strict=True):
        with program.graph.inserting_before(before):
            nodes.append(program.graph.placeholder(name))
        nodes[-1].meta.update(val=fake, origin=before.meta.get("origin", ("", "")))
    return nodes


def store(update: Update, found: Match, packed: list[Node]) -> Node:
    g = Builder(found.root)
    codes, scales, *window = packed
    return g.call(kv_update.overload, codes, scales, *update.stored(found, g), *window)


def attend(
    program: Program,
    found: Match,
    keys: Sequence[Node],
    values: Sequence[Node],
    stores: Sequence[Node | None],
    filled: bool = False,
) -> tuple[str, list[str]]:
    """Puts `kv_attention` in the place of an attention; what will run, and what is to say of it.

    stores: the `kv_update` that wrote keys, and values, last; filled: whether nothing behind its last token is ever
    seen.
    """
    g, old = Builder(found.root), found.root
    sight = seen(found, g)
    positions, mask = sight.positions, sight.mask
    if filled and stores[0] is not None and mask is not None and not sight.window:
        newest = g.call(aten.select.int, as_stored(stores[0].args[3], stores[0]), -1, -1)  # of all rows, or of each
        positions = g.call(aten.minimum.default, positions, g.call(aten.unsqueeze.default, newest, -1))
    scale, softcap = scale_of(found), softcap_of(found)
    codes, scales, *window = keys
    told = positions, sight.start, mask, scale, softcap, sight.window
    new, notes = fresh(program, found, stores)
    rest = [*window, *[None] * (2 - len(window)), sinks_of(found, g), *new]
    while rest and rest[-1] is None:
        rest.pop()
    made = g.call(kv_attention.overload, found.q, codes, scales, *values, *told, *rest)
    old.replace_all_uses_with(made)
    relay(made)
    case = kv_attention.case_of(*(each.meta["val"] if isinstance(each, Node) else each for each in made.args))
    case = replace(case, rows=hint(case.rows), length=hint(case.length))
    kernel = kv_attention.plan(case, *program.bounds(expression(found.q.meta["val"].shape[2])))
    return kernel, ["the mask is a length" if mask is None else "its mask is passed on", *notes]


def fresh(program: Program, found: Match, stores: Sequence[Node | None]) -> tuple[list[Node], list[str]]:
    """An attention's tokens as they were before they were stored, as `kv_attention` takes them; nothing of few, and
    where they are not known, which is a note."""
    T = found.q.meta["val"].shape[2]
    _, most = program.bounds(expression(T))
    if most is not None and most <= FEW:
        return [], []
    keys, values = stores
    if keys is None or values is None:
        return [], ["tokens are read back rounded: the graph does not store them ahead of the attention"]
    (new_k, positions), (new_v, others) = keys.args[2:4], values.args[2:4]
    if sizes(new_k)[2] != str(T) or sizes(new_v)[2] != str(T):
        return [], [f"tokens are read back rounded: {T} attend, {sizes(new_k)[2]} are stored"]
    if not alike(positions, others):
        return [], ["tokens are read back rounded: keys and values may not be stored at the same positions"]
    return [as_stored(node, keys if node is not new_v else values) for node in (new_k, new_v, positions)], []


def as_stored(node: Node, store: Node) -> Node:
    """What a node holds when it is stored, whatever writes it later."""
    return node if stays(node) else Builder(store).call(aten.clone.default, node)


def relay(node: Node) -> None:
    """Lets what follows take another layout: views of it are copied where they have to be."""
    for user in views_of(node):
        if packet(user.target) is aten.view:
            user.target = aten.reshape.default
        if isinstance(user.meta.get("val"), torch.Tensor):
            user.meta["val"] = propagate(user)
            relay(user)
