"""What requests reuse of each other, in statements; `test_scheduler_model.py` tries everything at random."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import BlockPool, PrefixCache, Scheduler, SchedulerConfig, Step

SIZE = 4


def scheduler(num_blocks: int = 16, **limits: Any) -> Scheduler:
    return Scheduler(SchedulerConfig(num_blocks, block_size=SIZE, **{"watermark": 0.0, "hash_seed": 1, **limits}))


def update(s: Scheduler, step: Step | None, token: int = 7) -> list[tuple[str, Any]]:
    assert step is not None
    ended = s.update(np.full(len(step.sample_rows), token, np.int32))
    s.check_invariants()
    return ended


def first_step(s: Scheduler, name: str, prompt: list[int], **options: Any) -> Step:
    s.add(name, prompt, **{"max_tokens": 4, **options})
    step = s.schedule()
    assert step is not None
    return step


def serve(s: Scheduler, name: str, prompt: list[int], **options: Any) -> Step:
    """Serves a request to its end; its first step."""
    first = first_step(s, name, prompt, **options)
    update(s, first)
    while s.has_unfinished():
        update(s, s.schedule())
    return first


def test_full_blocks_are_reused_and_the_last_token_is_computed() -> None:
    s = scheduler()
    serve(s, "a", list(range(8)))
    step = first_step(s, "b", list(range(8)))
    # The first block as it is; of the second one the first three rows, in a copy.
    assert step.positions.tolist() == [7]
    assert step.block_tables[0, 0] == 0
    assert step.copies.tolist() == [[1, step.block_tables[0, 1]]]
    assert s.explain("b")["reused_tokens"] == 7
    update(s, step)


def test_a_conversation_reuses_its_answer() -> None:
    s = scheduler()
    serve(s, "a", [0, 1, 2, 3, 4, 5], max_tokens=7)
    step = first_step(s, "b", [0, 1, 2, 3, 4, 5, *[7] * 7, 9])
    # Of the seven ids that were sampled, the last one was never computed.
    assert step.positions.tolist() == [12, 13]


def test_salts_part_and_a_public_prefix_is_shared() -> None:
    s = scheduler()
    prompt = list(range(12))

    def computed(name: str, **options: Any) -> int:
        step = first_step(s, name, prompt, max_tokens=1, **options)
        update(s, step)
        return step.num_tokens

    assert computed("a", cache_salt="x") == 12
    assert computed("b", cache_salt="y") == 12
    assert computed("c", cache_salt="x") == 1
    assert computed("d") == 12
    # Two whole blocks stand in the public prefix, which "d" computed.
    assert computed("e", cache_salt="v", shared_prefix_len=9) == 4
    assert computed("f", cache_salt="w", shared_prefix_len=9) == 4
    assert computed("g", cache_salt="w", shared_prefix_len=9) == 1


def test_skip_cache_computes_everything() -> None:
    s = scheduler()
    serve(s, "a", list(range(8)))
    assert first_step(s, "b", list(range(8)), skip_cache=True).num_tokens == 8


def test_forks_share_the_prompt_and_copy_its_last_block() -> None:
    s = scheduler()
    step = first_step(s, "a", list(range(6)), fork_ids=["b", "c"])
    assert step.request_ids == ["a"]
    assert (step.sample_rows.tolist(), step.sample_branch.tolist()) == ([5, 5, 5], [0, 1, 2])
    assert s.explain("c")["waits_for"] == "origin"
    s.update(np.array([10, 11, 12], np.int32))
    assert [s.token_ids(name)[-1] for name in "abc"] == [10, 11, 12]
    assert s.stats()["used_blocks"] == 2
    assert s.explain("b")["shared_blocks"] == 2
    step = s.schedule()
    assert step is not None
    assert step.request_ids == ["a", "b", "c"]
    assert step.token_ids.tolist() == [10, 11, 12]
    assert [source for source, _ in step.copies.tolist()] == [1, 1]  # the last of them writes to the block itself
    assert len(set(step.block_tables[:, 1].tolist())) == 3
    update(s, step)
    assert s.stats()["used_blocks"] == 4


def test_an_aborted_origin_leaves_its_place_to_a_fork() -> None:
    s = scheduler()
    step = first_step(s, "a", list(range(6)), fork_ids=["b", "c"])
    assert s.abort("a")
    s.update(np.array([10, 11, 12], np.int32))
    assert [s.token_ids(name)[-1] for name in "bc"] == [11, 12]
    assert step.request_ids == ["a"]
    s.check_invariants()


def test_a_fork_of_a_running_request_goes_on_from_its_tokens() -> None:
    s = scheduler()
    update(s, first_step(s, "a", list(range(6))), token=3)
    s.fork("a", "b", max_tokens=9)
    step = s.schedule()
    assert step is not None
    assert (step.request_ids, step.positions.tolist(), step.token_ids.tolist()) == (["a", "b"], [6, 6], [3, 3])
    with pytest.raises(RuntimeError, match="fork: the last step has not been updated"):
        s.fork("a", "c")
    update(s, step)
    with pytest.raises(ValueError, match="max_tokens: expected more than the 2 tokens"):
        s.fork("a", "c", max_tokens=2)
    with pytest.raises(ValueError, match='new_request_id: "b" is in use'):
        s.fork("a", "b")


def test_accepted_drafts_are_kept_and_rejected_ones_leave_no_row() -> None:
    s = scheduler(num_speculative_tokens=3)
    update(s, first_step(s, "a", list(range(3)), max_tokens=20), token=3)
    s.speculate("a", [4, 5, 9])
    step = s.schedule()
    assert step is not None
    assert (step.token_ids.tolist(), step.num_drafts.tolist()) == ([3, 4, 5, 9], [3])
    assert step.sample_rows.tolist() == [0, 1, 2, 3]
    s.update(np.array([4, 5, 6, 7], np.int32), np.array([[8, -1, -1]], np.int32))
    assert s.new_tokens.tolist() == [3]
    assert s.token_ids("a").tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert s.stats()["used_blocks"] == 2
    step = s.schedule()
    assert step is not None
    assert (step.token_ids.tolist(), step.positions.tolist()) == ([6, 8], [6, 7])
    s.update(np.array([7, 1], np.int32))
    # The block that the rejected draft filled is not cached.
    assert s.abort("a")
    assert first_step(s, "b", [0, 1, 2, 3, 4, 5, 6, 8, 1]).positions.tolist() == [7, 8]


def test_drafts_before_the_first_step_are_dropped() -> None:
    s = scheduler(num_speculative_tokens=3)
    s.add("a", [1], max_tokens=9)
    s.speculate("a", [2, 3])
    assert s.explain("a")["draft_tokens"] == 0
    step = s.schedule()
    assert step is not None
    assert step.num_tokens == 1
    update(s, step)


def test_an_abandoned_step_counts_for_nothing() -> None:
    s = scheduler()
    serve(s, "a", list(range(6)), max_tokens=1)
    step = first_step(s, "b", list(range(7)))
    assert len(step.copies) == 1
    s.abandon()
    s.check_invariants()
    step = s.schedule()
    assert step is not None
    assert step.positions.tolist() == [4, 5, 6]  # the copy did not happen
    update(s, step)
    with pytest.raises(RuntimeError, match="update: there is no step"):
        s.abandon()


def test_deadlines_end_requests() -> None:
    s = scheduler(policy="deadline", max_num_seqs=1)
    s.add("late", [1], max_tokens=9, deadline=5.0)
    s.add("early", [1], max_tokens=9, deadline=2.0)
    s.add("never", [1], max_tokens=9)
    step = s.schedule()
    assert step is not None
    assert step.request_ids == ["early"]
    update(s, step)
    assert (s.expire(1.0), s.expire(2.0)) == ([], ["early"])
    assert s.schedule().request_ids == ["late"]  # type: ignore[union-attr]
    assert s.stats()["expired"] == 1


def test_the_longest_cached_prefix_goes_first_and_age_before_that() -> None:
    s = scheduler(policy="longest_prefix", max_num_seqs=1, ageing_steps=6)
    serve(s, "seed", list(range(8)), max_tokens=1)
    s.add("cold", [9, 9, 9], max_tokens=1)
    order = []
    for number in range(8):
        s.add(f"warm{number}", [*range(8), number], max_tokens=1)
        step = s.schedule()
        assert step is not None
        order += step.request_ids
        update(s, step)
    assert order[0] == "warm0"
    assert "cold" in order[:7]


def test_a_cost_budget_cuts_chunks_deep_in_the_context() -> None:
    s = scheduler(64, max_batched_cost=40.0, context_cost=0.5, max_batched_tokens=100)
    s.add("a", list(range(60)), max_tokens=1)
    lengths = []
    while s.has_unfinished():
        step = s.schedule()
        assert step is not None
        lengths.append(step.num_tokens)
        assert step.num_tokens == 1 or step.num_tokens + 0.5 * step.positions.sum() <= 40
        update(s, step)
    assert sum(lengths) == 60
    assert lengths[0] > 2 * lengths[-2]


def test_the_waiting_queue_counts_tokens() -> None:
    s = scheduler(max_waiting_tokens=10)
    s.add("a", list(range(20)), max_tokens=1)  # alone, any prompt may wait
    with pytest.raises(RuntimeError, match=r"20 tokens wait, 1 more are above 10 \(max_waiting_tokens\)"):
        s.add("b", [1], max_tokens=1)


def test_explain_says_what_a_request_waits_for() -> None:
    s = scheduler(4, max_num_seqs=2)
    update(s, first_step(s, "a", list(range(12))))
    s.add("b", list(range(30, 38)), max_tokens=4)
    s.add("c", [1], max_tokens=4)
    assert s.explain("a")["state"] == "running"
    assert (s.explain("b")["waits_for"], s.explain("b")["missing_blocks"]) == ("blocks", 2)
    assert (s.explain("c")["waits_for"], s.explain("c")["ahead"]) == ("order", 1)
    s.abort("b")
    assert s.explain("c")["waits_for"] == "nothing"


def test_events_tell_what_is_cached() -> None:
    s = scheduler(4, enable_events=True)
    serve(s, "a", list(range(9)), max_tokens=1)
    (stored,) = s.events()
    assert (stored["type"], stored["token_ids"], stored["block_size"]) == ("BlockStored", list(range(8)), SIZE)
    assert stored["parent_block_hash"] is None
    first, second = stored["block_hashes"]
    assert len(first) == 16
    serve(s, "b", [50 + i for i in range(13)], max_tokens=1)
    removed = [event for event in s.events() if event["type"] == "BlockRemoved"]
    assert [block for event in removed for block in event["block_hashes"]] == [second, first]
    assert s.clear_cache() == 4
    assert [event["type"] for event in s.events()][-1] == "AllBlocksCleared"
    cache = PrefixCache(4, SIZE, hash_seed=1)
    assert [bytes(row) for row in cache.hash_blocks(list(range(9)))] == [first, second]


# Fairness


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([1.0, 2.0, 5.0]), st.sampled_from([1, 3, 8]))
def test_no_tenant_gets_less_than_its_share(seed: int, weight: float, seats: int) -> None:
    """The bound on the counters: a prompt, and the answers of what a tenant can have running, over its weight."""
    rng = np.random.default_rng(seed)
    s = scheduler(200, policy="fair", max_num_seqs=seats, max_batched_tokens=32, enable_prefix_caching=False)
    weights = {"small": 1.0, "large": weight}
    served = dict.fromkeys(weights, 0.0)
    owner: dict[str, str] = {}
    prompts, answers = 30, 12
    for number in range(400):
        for tenant in weights:
            waiting = sum(name.startswith(tenant) for name in owner)
            while waiting < seats + 2:  # both always want more
                name = f"{tenant}{number}.{waiting}"
                prompt, output = int(rng.integers(1, prompts)), int(rng.integers(1, answers))
                s.add(name, [1] * prompt, max_tokens=output, tenant=tenant, weight=weights[tenant])
                owner[name] = tenant
                waiting += 1
        step = s.schedule()
        assert step is not None
        for name, count in zip(step.request_ids, np.diff(step.query_start_loc), strict=True):
            served[owner[name]] += int(count) / weights[owner[name]]
        for name, _ in update(s, step):
            del owner[name]
        counters = [s.explain(next(n for n in owner if n.startswith(tenant)))["tenant_counter"] for tenant in weights]
        assert abs(counters[0] - counters[1]) <= prompts + seats * answers
        # What is charged and not yet computed is the prompt of those that run.
        assert abs(served["small"] - served["large"]) <= prompts + seats * (prompts + answers)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["fcfs", "priority", "longest_prefix", "fair", "deadline"]),
    st.sampled_from([1, 2, 6]),
)
def test_no_request_waits_for_longer_than_the_bound(seed: int, policy: Any, seats: int) -> None:
    """With new requests in every step: the work that was there or may go before it, plus the steps of ageing."""
    rng = np.random.default_rng(seed)
    # A request takes 12 steps from when it is the first in order: 2 for its prompt, 1 for each further token.
    ageing, longest, tenants = 10, 12, 3
    s = scheduler(64, policy=policy, max_num_seqs=seats, max_batched_tokens=16, ageing_steps=ageing)
    came: dict[str, int] = {}
    ahead: dict[str, int] = {}
    for number in range(1500):
        # Always enough of both kinds, so that one could starve the other.
        hurries = bool(rng.random() < 0.6)
        if sum(name.startswith(f"{hurries}") for name in came) < 12:
            name = f"{hurries}{number}"
            ahead[name] = len(came)
            s.add(
                name,
                rng.integers(0, 3, int(rng.integers(1, 30))),
                max_tokens=int(rng.integers(1, 10)),
                priority=int(rng.integers(-2, 3)),
                tenant=str(rng.integers(tenants)),
                deadline=number + float(rng.integers(20)) if hurries else None,
            )
            came[name] = number
        step = s.schedule()
        assert step is not None
        for name, _ in update(s, step):
            del came[name]
        for name, since in came.items():
            # Each step computes a token or more of the first in order. At most 4 units of priority are made up for in
            # 4 * ageing steps; under "fair", a tenant's turn comes when each other one got what may run at once; under
            # "deadline", those that come in 20 steps may have earlier ones, and every second admission goes by age.
            passing = {"fcfs": 0, "priority": 4 * ageing, "longest_prefix": ageing, "fair": 12 * (tenants - 1)}
            passing["deadline"] = ahead[name] + 2 * 20 + 1
            assert number - since <= (ahead[name] + passing[policy] + 1) * longest, (name, s.explain(name))


# Files


def world(tmp_path: Path, **limits: Any) -> tuple[Scheduler, dict[str, np.ndarray]]:
    s = scheduler(8, **limits)
    parts = {"latent": np.zeros((8, 24), np.uint8), "index": np.zeros((8, 5), np.uint8)}
    return s, parts


def filled(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    s, parts = world(tmp_path)
    serve(s, "a", list(range(10)), max_tokens=1)
    serve(s, "b", [*range(8), 50, 51, 52, 53, 54], max_tokens=1)
    serve(s, "c", [5, 5, 5, 5], max_tokens=1, cache_salt="x")
    rng = np.random.default_rng(0)
    for part in parts.values():
        part[:] = rng.integers(0, 256, part.shape)
    path = tmp_path / "cache"
    assert s.snapshot(path, parts, model="m") == s.stats()["cached_blocks"]
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    return path, parts


def test_a_snapshot_brings_blocks_and_rows_back(tmp_path: Path) -> None:
    path, old = filled(tmp_path)
    s, parts = world(tmp_path)
    assert s.restore(path, parts, model="m") == 6
    s.check_invariants()
    step = first_step(s, "a", [*range(8), 50, 51, 52, 53, 54])
    assert step.positions.tolist() == [12]
    for name, part in parts.items():
        rows = {bytes(row) for row in part}
        assert rows >= {bytes(old[name][block]) for block in range(2)}
    s.abandon()
    assert s.abort("a")
    assert first_step(s, "c", [5, 5, 5, 5], cache_salt="x").num_tokens == 1
    with pytest.raises(RuntimeError, match="the prefix cache is not empty"):
        s.restore(path, parts, model="m")


def test_salts_of_another_key_stay_out(tmp_path: Path) -> None:
    path, _ = filled(tmp_path)
    s, parts = world(tmp_path, hash_seed=2)
    assert s.restore(path, parts, model="m") == 5
    s.check_invariants()


def test_a_smaller_pool_takes_what_fits(tmp_path: Path) -> None:
    path, _ = filled(tmp_path)
    s = scheduler(2)
    parts = {"latent": np.zeros((2, 24), np.uint8), "index": np.zeros((2, 5), np.uint8)}
    assert s.restore(path, parts, model="m") == 2
    s.check_invariants()


@pytest.mark.parametrize(
    ("limits", "parts", "model", "message"),
    [
        ({}, {}, "n", 'model: expected "n", the snapshot has "m"'),
        ({"block_size": 8}, {}, "m", "block_size: expected 8, the snapshot has 4"),
        ({}, {"latent": np.zeros((8, 23), np.uint8)}, "m", "parts: expected these caches"),
        ({}, {"more": np.zeros((8, 2), np.uint8)}, "m", "parts: expected these caches"),
        ({}, {"latent": np.zeros((7, 24), np.uint8)}, "m", "parts: expected rows of 8 blocks, "),
        ({}, {"latent": np.zeros((8, 24), np.int8)}, "m", "parts: expected contiguous uint8 arrays"),
    ],
)
def test_a_foreign_snapshot_is_refused(
    tmp_path: Path, limits: Any, parts: dict[str, np.ndarray], model: str, message: str
) -> None:
    path, _ = filled(tmp_path)
    s = Scheduler(SchedulerConfig(8, **{"block_size": SIZE, **limits}))
    mine = {"latent": np.zeros((8, 24), np.uint8), "index": np.zeros((8, 5), np.uint8), **parts}
    with pytest.raises(ValueError, match=re.escape(message)):
        s.restore(path, mine, model=model)
    assert s.stats()["cached_blocks"] == 0


def test_a_damaged_snapshot_is_refused_wherever_it_is_damaged(tmp_path: Path) -> None:
    path, _ = filled(tmp_path)
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        for bad in (good[:place], good[:place] + bytes([good[place] ^ 0x40]) + good[place + 1 :]):
            path.write_bytes(bad)
            s, parts = world(tmp_path)
            try:
                s.restore(path, parts, model="m")
            except ValueError:
                assert s.stats()["cached_blocks"] == 0
            else:
                pytest.fail(f"byte {place} is damaged and nobody noticed")
            s.check_invariants()
    path.write_bytes(good + b"\0")
    with pytest.raises(ValueError, match="it goes on behind its end"):
        s.restore(path, parts, model="m")
    with pytest.raises(FileNotFoundError):
        s.restore(tmp_path / "none", parts, model="m")


# The parts alone


def test_a_pool_hands_out_and_takes_back() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(3)
    assert (blocks.dtype, blocks.tolist(), pool.num_free) == (np.int32, [0, 1, 2], 2)
    with pytest.raises(RuntimeError, match="count: 2 blocks are free, not 3"):
        pool.allocate(3)
    for bad in ([0, 0], [4], [-1], [1, 9]):
        with pytest.raises(ValueError, match="is not in use"):
            pool.release(np.array(bad, np.int32))
    with pytest.raises(TypeError, match="blocks: expected an int32 array"):
        pool.release([0])  # type: ignore[arg-type]
    pool.release(blocks[::-1])
    assert pool.num_free == 5


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 30)), max_size=40), st.integers(1, 12))
def test_a_prefix_cache_finds_the_longest_prefix(calls: list[tuple[bool, int, int]], blocks: int) -> None:
    """Against a set of prefixes, as long as nothing is evicted; and sound in any case."""
    cache, known = PrefixCache(blocks, SIZE, eviction="lru"), set()
    for insert, stem, length in calls:
        tokens = np.array([stem] * (length // 2) + [9] * (length - length // 2), np.int32)
        full = [tuple(tokens[: end + SIZE]) for end in range(0, length - SIZE + 1, SIZE)]
        if insert:
            new = cache.insert(tokens)
            if cache.stats()["evicted_blocks"] == 0:
                assert new == min(len(set(full) - known), blocks - len(known))
                known |= set(full[: sum(prefix in known for prefix in full) + new])
        else:
            found = cache.match(tokens)
            assert len(found) <= len(full)
            if cache.stats()["evicted_blocks"] == 0:
                assert len(found) == sum(prefix in known for prefix in full)
        cache.check_invariants()


@pytest.mark.parametrize("bad", [-1, 2**31, 2**40])
@pytest.mark.parametrize("place", [0, 5, 9])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, list])
def test_ids_that_are_no_tokens_are_refused(bad: int, place: int, dtype: Any) -> None:
    cache = PrefixCache(8, SIZE)
    tokens = list(range(10))
    cache.insert(tokens)
    before = cache.stats()
    tokens[place] = bad
    if dtype is np.int32 and bad > 0:
        pytest.skip("no int32 holds it")
    given = tokens if dtype is list else np.array(tokens, dtype)
    for call in (cache.match, cache.insert, cache.hash_blocks):
        with pytest.raises(ValueError, match=r"^token_ids: expected ids from 0 to 2147483647, got "):
            call(given)
    assert cache.stats() == before
