"""A call's buffers: apart from each other, aligned, and the same by address as by view."""

from __future__ import annotations

import itertools

import pytest
import torch
from lora_problem import triton

if not triton.available():
    pytest.skip("triton is not installed", allow_module_level=True)

from fedms.kernels.triton.workspace import Workspace


def test_buffers_lie_apart_and_an_address_is_the_views():
    workspace = Workspace()
    shapes = [((3, 5), torch.bfloat16), ((7,), torch.float32), ((0, 4), torch.float32)]
    shapes += [((2, 3, 4), torch.float32), ((1,), torch.bfloat16)]
    buffers = [workspace.add(*one) for one in shapes]
    memory = workspace.new(torch.empty(0))
    spans = []
    for buffer, (shape, dtype) in zip(buffers, shapes, strict=True):
        view = buffer.at(memory)
        assert (view.shape, view.dtype) == (shape, dtype)
        assert buffer.at(memory.data_ptr()) == memory.data_ptr() + buffer.offset
        if view.numel():
            assert view.data_ptr() == buffer.at(memory.data_ptr())
            spans.append((buffer.offset, buffer.offset + view.numel() * view.element_size()))
        assert buffer.offset % 16 == 0
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= memory.numel()
