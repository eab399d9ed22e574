"""A model of the time of one small all-reduce, for more ranks than can be measured here.

A message of a few numbers costs latency and hardly any bandwidth. So the time depends on how many
messages follow each other, and over which links. The latencies are those that NCCL uses to choose
its algorithm.

References:
    Hockney, "The communication challenge for MPP" (1994), doi:10.1016/S0167-8191(06)80021-9: a
    message takes a latency plus its size divided by the bandwidth.
    Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH"
    (2005), doi:10.1177/1094342005051521: ring and recursive doubling.
    NCCL 2.20.3, src/graph/tuning.cc. ncclTopoTuneModel: ring and tree over nodes with several ranks
    each. baseLat and hwLat: the latencies of LL, NCCL's protocol for small messages.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

__all__ = ["ALGORITHMS", "Algorithm", "Network", "added_seconds", "all_reduce_seconds"]

Algorithm = Literal["ring", "tree", "recursive doubling"]
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "tree", "recursive doubling")


class Network(NamedTuple):
    """Nodes of eight ranks joined by NVLink, and InfiniBand between them; seconds and bytes."""

    start: float = 6.8e-6
    """time until the first message leaves: the launch of a kernel"""
    within: float = 0.6e-6
    """latency from rank to rank in a node"""
    between: float = 5.0e-6
    """latency from node to node"""
    within_ring: float = 1.0e-6
    """``within`` in a ring over several nodes, because a ring waits for its slowest link"""
    between_ring: float = 2.7e-6
    """``between`` in a ring, in which each rank sends to one neighbour"""
    bytes_per_second: float = 12.5e9 / 4
    """LL uses a quarter of a link's 100 Gbit/s"""
    ranks_in_node: int = 8


def all_reduce_seconds(
    ranks: int, size: float, algorithm: Algorithm, network: Network | None = None
) -> float:
    """How long an all-reduce takes from its launch to its result on every rank.

    Args:
        ranks: number of ranks; a single rank takes no time.
        size: bytes of the message.
        algorithm: ``"ring"`` passes parts of the message around twice. ``"tree"`` sums along a
            chain in each node and a binary tree over the nodes, and sends the sum back the same
            way. ``"recursive doubling"`` exchanges sums with a rank twice as far away each time.
        network: latencies and bandwidth.

    Raises:
        ValueError: if ``ranks`` is not positive, or ``algorithm`` is none of these.

    >>> f"{1e6 * all_reduce_seconds(10_000, 176, 'tree'):.0f} microseconds"
    '126 microseconds'
    """
    if ranks < 1:
        raise ValueError(f"ranks must be positive, got {ranks!r}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
    if ranks == 1:
        return 0.0
    net = network or Network()
    nodes = math.ceil(ranks / net.ranks_in_node)
    in_node = min(ranks, net.ranks_in_node)
    if algorithm == "ring":
        hops_between = 2 * nodes if nodes > 1 else 0
        hops_within = 2 * (ranks - 1) - hops_between
        within = net.within_ring if nodes > 1 else net.within
        latency = hops_within * within + hops_between * net.between_ring
        sent = 2 * size * (ranks - 1) / ranks
    elif algorithm == "tree":
        levels = _doublings(nodes)
        latency = 2 * ((in_node - 1) * net.within + levels * net.between)
        sent = 2 * size * levels
    else:
        levels = _doublings(nodes)
        latency = _doublings(in_node) * net.within + levels * net.between
        sent = size * levels
    return net.start + latency + sent / net.bytes_per_second


def _doublings(count: int) -> int:
    return math.ceil(math.log2(count))


def added_seconds(
    ranks: int, size: float, until_needed: float, network: Network | None = None
) -> float:
    """How much longer a step takes with an all-reduce that starts before the backward pass.

    The all-reduce runs beside the computation. Two operations wait for it: the all-reduces of the
    gradients, if they share its communicator, as in DDP; and the next step's clip. The time depends
    on the operation that comes first. NCCL takes the faster of ring and tree.

    Args:
        ranks: number of ranks.
        size: bytes of the message.
        until_needed: seconds from the start of the backward pass to the first gradients sent.
        network: latencies and bandwidth.

    >>> added_seconds(10_000, 176, until_needed=1e-3)
    0.0
    """
    takes = min(all_reduce_seconds(ranks, size, each, network) for each in ("ring", "tree"))
    return max(0.0, takes - until_needed)
