"""Streaming generation and its clock, on a tiny random GPT-J."""

from __future__ import annotations

import pytest
from tiny import gptj

from gptj_q8.generate import decode_speeds


def test_decode_speeds_give_one_speed_a_model() -> None:
    model = gptj()
    speeds = decode_speeds([model, model], [1, 2, 3], new_tokens=4, rounds=2)
    assert len(speeds) == 2
    assert all(speed > 0 for speed in speeds)


def test_decode_speeds_need_two_tokens_to_time() -> None:
    with pytest.raises(ValueError, match="decode_speeds: new_tokens must be at least 2, got 1"):
        decode_speeds([gptj()], [1], new_tokens=1)
