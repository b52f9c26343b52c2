"""Valid files with something changed: for the law that a reader gives what the reference reads, or a clean error."""

import os

from hypothesis import HealthCheck, settings, strategies as st

from ..full import FULL

COUNT = int(os.environ.get("EQX_TRANSFORMERS_MUTATIONS", 2000 if FULL else 100))
# Numbers at which sizes and offsets go wrong.
EDGES = (0, 1, 7, 8, 63, 64, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)

many = settings(
    max_examples=COUNT,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def mutated(draw: st.DrawFn, whole: bytes, regions: tuple[tuple[int, int], ...] = ()) -> bytes:
    """One to three changes; three out of four in `regions`, where the file says what it holds."""
    for _ in range(draw(st.integers(1, 3))):
        start, end = (0, len(whole))
        if regions and draw(st.integers(0, 3)):
            start, end = draw(st.sampled_from(regions))
        at = draw(st.integers(min(start, len(whole)), max(min(start, len(whole)), min(end, len(whole)) - 1)))
        whole = draw(st.sampled_from(CHANGES))(draw, whole, at)
    return whole


def flip(draw, whole, at):
    if at >= len(whole):
        return whole
    return whole[:at] + bytes([whole[at] ^ 1 << draw(st.integers(0, 7))]) + whole[at + 1 :]


def put(draw, whole, at):
    new = draw(st.binary(min_size=1, max_size=4))
    return whole[:at] + new + whole[at + len(new) :]


def put_number(draw, whole, at):
    size, order = draw(st.sampled_from((1, 2, 4, 8))), draw(st.sampled_from(("little", "big")))
    new = (draw(st.sampled_from(EDGES)) % 2 ** (8 * size)).to_bytes(size, order)
    return whole[:at] + new + whole[at + size :]


def insert(draw, whole, at):
    return whole[:at] + draw(st.binary(min_size=1, max_size=9)) + whole[at:]


def remove(draw, whole, at):
    return whole[:at] + whole[at + draw(st.integers(1, 40)) :]


def repeat(draw, whole, at):
    size = draw(st.integers(1, 60))
    return whole[: at + size] + whole[at:]


def move(draw, whole, at):
    size, to = draw(st.integers(1, 20)), draw(st.integers(0, len(whole)))
    part, rest = whole[at : at + size], whole[:at] + whole[at + size :]
    return rest[:to] + part + rest[to:]


def cut(draw, whole, at):
    return whole[:at]


# The first ones are those that a file survives most often: what hypothesis prefers.
CHANGES = (flip, put, put_number, flip, put_number, insert, remove, repeat, move, cut)
