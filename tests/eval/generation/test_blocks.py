"""The pool of blocks never reserves more than it has, so whoever has a reservation can take up to its limit."""

import random
from dataclasses import dataclass, field

import pytest

from mt_eval.generation.blocks import ROOT, BlockPool, Reservation

BLOCKS = 12


@dataclass(eq=False)
class User:
    """A request as the pool sees it: its sequences, each a list of blocks in their order."""

    reservation: Reservation
    sequences: list[list[int]] = field(default_factory=list)


def take_and_register(pool, user, rng, text):
    """Give a sequence a block more, which others may take if the sequence still has all the blocks before it."""
    sequence = rng.choice(user.sequences)
    block = pool.take(user.reservation)
    before = ROOT if not sequence else dict((b, p) for p, b in pool.find_prefix(text, len(sequence))).get(sequence[-1])
    if before is not None and rng.random() < 0.8:
        pool.register(before, text[len(sequence) : len(sequence) + 1], block)
    sequence.append(block)


def leave(pool, user, rng):
    """Give back a first block, or close one of several sequences."""
    sequence = rng.choice(user.sequences)
    if len(user.sequences) > 1 and rng.random() < 0.5:
        pool.release(sequence, user.reservation)
        user.sequences.remove(sequence)
    elif sequence:
        pool.release([sequence.pop(0)], user.reservation)


def fork(pool, user, rng):
    """Copy a sequence."""
    sequence = rng.choice(user.sequences)
    pool.share(sequence, user.reservation)
    user.sequences.append(list(sequence))


def check(pool, users):
    """Blocks in use, and those that all users may still take in the worst case, are never more than there are."""
    used = {block for user in users for sequence in user.sequences for block in sequence}
    assert pool.free == BLOCKS - len(used)
    assert pool.available >= 0
    lacking = sum(user.reservation.limit - len(user.reservation.uses) for user in users)
    assert lacking <= pool.free
    if all(user.reservation.keeps for user in users):
        assert pool.available == pool.free - lacking  # nothing is reserved twice


def end(pool, user):
    """Give everything back."""
    for sequence in user.sequences:
        pool.release(sequence, user.reservation)
    pool.end(user.reservation)


def act(pool, user, rng, text):
    """Let a request do one of the things that requests do."""
    if len(user.reservation.uses) < user.reservation.limit and rng.random() < 0.7:
        take_and_register(pool, user, rng, text)
    elif not user.reservation.keeps:
        rng.choice((leave, fork))(pool, user, rng)


@pytest.mark.parametrize("keeping", [0.0, 0.5, 1.0])
def test_no_request_lacks_a_block_whatever_all_do(keeping):
    """Requests that keep their blocks and such that leave them, in random company, until all have ended."""
    rng, shared, refused = random.Random(f"{keeping}"), 0, 0
    for _ in range(60):
        pool, users = BlockPool(BLOCKS, 1), list[User]()
        for _ in range(120):
            text = rng.choice(([1, 2, 3, 4, 5, 6], [1, 2, 7, 8, 9, 9]))
            if not users or rng.random() < 0.2:
                known = [block for _, block in pool.find_prefix(text, rng.randint(0, 5))]
                limit, keeps = rng.randint(max(len(known), 1), 6), rng.random() < keeping
                reservation = pool.reserve(limit, known, keeps=keeps)
                shared, refused = shared + bool(known), refused + (reservation is None)
                users += [User(reservation, [known])] if reservation else []
            elif rng.random() < 0.1:
                end(pool, users.pop(rng.randrange(len(users))))
            else:
                act(pool, rng.choice(users), rng, text)
            check(pool, users)
        for user in users:
            end(pool, user)
        assert (pool.free, pool.available) == (BLOCKS, BLOCKS)
    assert min(shared, refused) > 100


def test_requests_that_keep_a_shared_block_need_it_once():
    pool = BlockPool(4, 1)
    first = pool.reserve(3, [], keeps=True)
    block = pool.take(first)
    pool.register(ROOT, [1], block)
    assert pool.reserve(2, [block], keeps=False) is None  # once it has left the block, it needs two others
    second = pool.reserve(2, [block], keeps=True)
    assert pool.available == 0
    assert [pool.take(first), pool.take(first), pool.take(second)] == [2, 3, 4]
