"""Segments as the CUDA kernels' tables."""

from __future__ import annotations

import struct

import torch

from fedms.kernels import Segments
from fedms.kernels.cuda_tables import routes_of
from fedms.kernels.segments import read_runs

CPU = torch.device("cpu")


def test_routes_by_hand():
    """Two segments of experts (0, 2) share a group; expert 2 comes after ranks of 0 there."""
    segments = Segments([0, 3, 10, 12, 15], [(0, 2), 1, (), (2, 0)])
    runs = read_runs(*segments.tensors, None, 15, 3)
    routes = routes_of(runs, (8, 4, 16), 4)
    counts = (routes.num_groups, routes.num_members, routes.group_tiles, routes.member_tiles)
    assert counts == (2, 3, 4, 6)
    assert routes.max_rows == 7
    words = struct.unpack(f"{len(routes.words) // 4}i", routes.words)
    assert words[:12] == (0, 6, 0, 2, 0, 2, 2, 7, 2, 3, 2, 3)  # groups of 6 and of 7 rows
    assert words[12:27] == (0, 0, 0, 0, 0, 2, 0, 2, 8, 2, 4, 1, 1, 0, 1)  # members
    assert words[27:36] == (6, 3, 5, 7, 5, 6, 6, 6, 8)  # row sets
    ranges = [words[at : at + 6] for at in range(36, len(words), 6)]
    assert [r[:3] for r in ranges[:3]] == [(0, 0, 0), (3, 12, 0), (0, 3, 0)]  # of the groups
    assert [r[:3] for r in ranges[3:]] == [
        (0, 0, 0), (3, 12, 0), (0, 3, 0), (0, 0, 8), (3, 12, 8),
    ]  # and of the experts  # fmt: skip
    assert {r[3:5] for r in ranges} == {(0, 0)}
    assert [r[5] for r in ranges[3:]] == [0, 0, 1, 2, 2]


def test_a_seed_a_segment_counts_from_its_own_rows_and_experts():
    segments = Segments([0, 3, 10], [(1, 2), (0, 2)])
    seeds = torch.zeros(2, dtype=torch.int64)
    routes = routes_of(read_runs(*segments.tensors, seeds, 10, 3), (8, 4, 16), 4)
    words = struct.unpack(f"{len(routes.words) // 4}i", routes.words)
    ranges = [words[at : at + 6] for at in range(len(words) - 6 * 6, len(words), 6)]
    assert [r[1:] for r in ranges[:2]] == [(0, 0, 0, 0, 0), (3, 0, 1, 3, 0)]
    assert [r[3:] for r in ranges[2:]] == [(1, 3, 0), (0, 0, 0), (0, 0, 1), (1, 3, 1)]


def test_segments_without_experts_are_no_group():
    routes = routes_of(read_runs(*Segments([0, 5], [()]).tensors, None, 5, 1), (8,), 4)
    assert (routes.num_groups, routes.group_tiles) == (0, 0)
