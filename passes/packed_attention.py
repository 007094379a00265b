"""Attention that reads packed caches as a whole, in full precision, reads them packed.

A caller may give caches that are packed already (`aograph.PackedCache`): the graph stores tokens in them by
`aograph::kv_update`, and unpacks them by `aograph::kv_dequantize` for attention. Where attention is all that reads what
was unpacked, the two become `aograph::kv_attention`. Such caches are the caller's, and no rule decides about them.
They are filled from the first position on, so that a mask which is passed on need not be read behind the newest token.
"""

from __future__ import annotations

import math

from torch.fx import Node

from ..kernels.kv_dequantize import kv_dequantize
from ..kernels.kv_update import kv_update
from ..patterns.attention import ATTENTIONS, may_attend
from ..patterns.cache import memory
from ..patterns.language import Match, Miss, match, mutates
from ..program import Program
from ..report import NEAR_MISS, REWRITTEN
from ..schemes import preset_of
from .base import Pass, Stage
from .quantized_kv_cache import attend, keep_nearest, unknown
from .remove_noops import erase_dead


class PackedAttention(Pass):
    """Rewrites attentions whose caches came packed, and says of each other such cache why it is unpacked."""

    name = "packed_attention"
    stage = Stage.CACHE
    after = ("quantized_kv_cache",)

    def run(self, program: Program, context) -> int:
        caches = {cache.node: cache for cache in program.caches if cache.format is not None}
        whole = {node: memory(node.args[0]) for node in program.graph.nodes if node.target is kv_dequantize.overload}
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        found, misses = attentions(program, whole)
        ran: dict[Node, tuple[str, list[str]]] = {}
        for m in found:
            stores = {node: stored(node, order) for node in (m.key, m.value)}
            if all(order[m.root] < later for _, later in stores.values()):
                keys = [*m.key.args[:2], *m.key.args[3:]]  # its dtype is between
                last = [stores[node][0] for node in (m.key, m.value)]
                done = attend(program, m, keys, m.value.args[:2], last, filled=True)
                ran |= dict.fromkeys((whole[m.key], whole[m.value]), done)
                program.graph.erase_node(m.root)
        erase_dead(program)
        for node, codes in whole.items():
            if codes in caches and node.users:
                row, user = caches[codes].row, next(iter(node.users))
                row.outcome = NEAR_MISS
                row.notes.append(f"{unknown(user, node, misses)}: it is unpacked as a whole at each call")
                ran.pop(codes, None)
        for codes in caches.keys() - set(whole.values()):
            if caches[codes].row.outcome != REWRITTEN:  # by a rule, in this graph
                caches[codes].row.notes.append("attention reads the new tokens as they are, and not the cache")
        for codes in ran.keys() & caches.keys():
            row = caches[codes].row
            row.outcome, row.scheme = REWRITTEN, preset_of(caches[codes].format)
            row.kernel, notes = ran[codes]
            row.notes += notes
        return len(ran)


def attentions(program: Program, whole: dict[Node, Node]) -> tuple[list[Match], dict[Node, Miss]]:
    """Those that read two caches which were unpacked, values by token, and the nearest misses of nodes that may be."""
    found, misses = [], {}
    for node in program.graph.nodes:
        for pattern in ATTENTIONS:
            if may_attend(pattern, node):
                m = match(pattern, node)
                if isinstance(m, Match) and m.key in whole and m.value in whole and len(m.value.args) == 3:
                    found.append(m)
                else:
                    keep_nearest(misses, node, m)
    return found, misses


def stored(node: Node, order: dict[Node, int]) -> tuple[Node | None, float]:
    """The `kv_update` that wrote a cache last before a node unpacks it, and where it is written next."""
    codes = node.args[0]
    writes = sorted((user for user in codes.users if codes in mutates(user)), key=order.__getitem__)
    before = [each for each in writes if order[each] < order[node]]
    last = before[-1] if before and before[-1].target is kv_update.overload else None
    return last, min((order[each] for each in writes if order[each] > order[node]), default=math.inf)
