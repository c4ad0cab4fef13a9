"""What a scheduler must do, as a plain model that any sequence of calls is checked against. To be read first.

The toy model of the world: a cache row is a hash of the row before it, its token and its namespace, so of its whole
prefix; the next token is a function of the last row. Rows lie in two caches, as latent rows and index keys do, and are
read back through the block tables of a step alone. A row that is stale, another sequence's, another salt's, half
copied, not fetched or left by a rejected draft differs from the row that the request has when it is served alone, and
is found when it is read.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heedful import Scheduler, SchedulerConfig, Step

VOCAB = 7
GARBAGE = -1


def row_after(before: int, token: int, space: str) -> int:
    return hash((before, token, space)) & (2**62 - 1)


def next_token(row: int) -> int:
    return row % VOCAB


@dataclass(eq=False)
class Request:
    """A request as the model knows it."""

    name: str
    tokens: list[int]
    prompt_len: int
    max_len: int
    stops: tuple[int, ...]
    salt: str
    shared: int  # tokens at the start whose rows are in the public namespace
    skip_cache: bool
    deadline: float | None
    branch: int = 0
    computed: int = 0
    kept: int = 0  # rows kept over a preemption
    exact: bool = True  # whether `computed` is known, or only not exceeded
    drafts: list[int] = field(default_factory=list)
    forks: list[tuple[int, str]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def row(self, position: int, tokens: list[int]) -> int:
        """The row at a position when the request is served alone."""
        while len(self.rows) < len(self.tokens):
            at = len(self.rows)
            self.rows.append(row_after(self.rows[-1] if at else 0, self.tokens[at], self.space(at)))
        if position < len(self.rows):
            return self.rows[position]
        row = self.rows[-1]
        for at in range(len(self.rows), position + 1):
            row = row_after(row, tokens[at], self.space(at))
        return row

    def space(self, position: int) -> str:
        return "" if position < self.shared else self.salt

    def ends(self) -> str | None:
        if self.tokens[-1] in self.stops:
            return "stop"
        return "length" if len(self.tokens) >= self.max_len else None


@dataclass
class Flight:
    step: Step
    requests: list[Request]
    rows: list[tuple[int, int]]  # place and branch of each sample row
    sampled: np.ndarray


class Model:
    """A scheduler and the world around it; every call checks what came of it."""

    def __init__(self, config: SchedulerConfig, seed: int) -> None:
        self.config = config
        self.s = Scheduler(config)
        self.rng = random.Random(seed)
        slots = config.num_blocks * config.block_size
        self.index = np.full(slots, GARBAGE, np.int64)
        # With a host tier, latent rows have pages and hot rows on the device; the host has places for
        # each block, and for index keys of preempted requests.
        pages = config.num_latent_blocks
        self.latent = np.full(
            slots if pages is None else pages * config.block_size + config.hot_rows, GARBAGE, np.int64
        )
        self.host = np.full(config.host_blocks * config.block_size, GARBAGE, np.int64)
        self.swapped = np.full(config.swap_blocks * config.block_size, GARBAGE, np.int64)
        self.restored = 0  # tokens that preempted requests got back
        self.live: dict[str, Request] = {}
        self.flight: Flight | None = None
        self.names = 0
        self.now = 0.0
        self.stored: set[bytes] = set()
        self.finished = self.aborted = self.forked = self.abandoned = self.operations = 0
        self.snapshots: int | None = 0
        self.reused = 0  # tokens reused from snapshots
        capacity = min(config.num_blocks, config.num_draft_blocks or config.num_blocks) * config.block_size
        self.longest = min(config.max_model_len or capacity, capacity)
        # Few beginnings, so that prompts share them.
        self.stems = [[self.rng.randrange(VOCAB) for _ in range(self.longest)] for _ in range(3)]

    # Operations

    def operate(self) -> None:
        """One random call."""
        self.operations += 1
        draw = self.rng.random()
        if draw < 0.18:
            self.add()
        elif draw < 0.22:
            self.abort()
        elif draw < 0.25:
            self.fork()
        elif draw < 0.29:
            self.speculate()
        elif draw < 0.305:
            self.abandon()
        elif draw < 0.31:
            self.expire()
        elif draw < 0.313:
            self.s.clear_cache()
        elif draw < 0.3145:
            self.snapshot()
        elif draw < 0.33:
            self.explain()
        elif self.flight is None:
            self.schedule()
        else:
            self.update()
        if self.operations % 4 == 0:
            self.check()

    def new_name(self) -> str:
        self.names += 1
        return f"r{self.names}"

    def add(self) -> None:
        rng, size = self.rng, self.config.block_size
        if len(self.live) > 3 * self.config.max_num_seqs:
            return
        stem = rng.choice(self.stems)
        most = self.longest - 1
        length = max(1, min(most, rng.choice([1, rng.randint(1, most), rng.randint(1, 3) * size + rng.randint(-1, 1)])))
        kept = rng.choice([length, length, rng.randint(0, length)])
        prompt = stem[:kept] + [rng.randrange(VOCAB) for _ in range(length - kept)]
        max_tokens = rng.choice([1, rng.randint(1, 4 * size), rng.randint(1, 16 * size)])
        salt = rng.choice(["", "", "a", "b"])
        shared = rng.choice([0, 0, 2 * size + 1])
        forks = rng.choice([0, 0, 0, 1, 2])
        if forks >= self.config.max_num_seqs:
            forks = 0
        request = Request(
            name=self.new_name(),
            tokens=prompt,
            prompt_len=length,
            max_len=min(length + max_tokens, self.longest),
            stops=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 1]))),
            salt=salt,
            shared=shared // size * size,
            skip_cache=rng.random() < 0.05,
            deadline=rng.choice([None, None, self.now + rng.randint(1, 40)]),
            forks=[(branch + 1, self.new_name()) for branch in range(forks)],
        )
        self.s.add(
            request.name,
            prompt,
            max_tokens=max_tokens,
            priority=rng.randint(-2, 2),
            stop_token_ids=request.stops,
            fork_ids=[name for _, name in request.forks],
            cache_salt=salt or None,
            shared_prefix_len=shared,
            skip_cache=request.skip_cache,
            tenant=rng.choice(["x", "y", "z"]),
            weight=rng.choice([1.0, 2.0]),
            deadline=request.deadline,
        )
        self.live[request.name] = request
        self.live.update((name, request) for _, name in request.forks)

    def drop(self, name: str) -> None:
        """What abort() means for the model."""
        request = self.live.pop(name)
        if request.name != name:
            request.forks = [fork for fork in request.forks if fork[1] != name]
        elif request.forks:
            request.branch, request.name = request.forks.pop(0)

    def abort(self) -> None:
        if not self.live:
            assert not self.s.abort("nobody")
            return
        name = self.rng.choice(list(self.live))
        assert self.s.abort(name)
        self.drop(name)
        self.aborted += 1
        assert not self.s.abort(name)

    def expire(self) -> None:
        self.now += self.rng.randint(0, 10)
        late = [n for n, r in self.live.items() if r.deadline is not None and r.deadline <= self.now]
        assert sorted(self.s.expire(self.now)) == sorted(late)
        for name in late:
            self.drop(name)

    def fork(self) -> None:
        if self.flight is not None or not self.live:
            return
        name = self.rng.choice(list(self.live))
        origin, new = self.live[name], self.new_name()
        stats = self.s.stats()
        seats = sum(1 + len(r.forks) for r in {*self.live.values()} if self.s.explain(r.name)["state"] == "running")
        try:
            self.s.fork(name, new)
        except ValueError:
            assert origin.name != name  # a fork that has not begun
        except RuntimeError:
            assert seats >= self.config.max_num_seqs
        else:
            assert origin.name == name
            fork = Request(**{**vars(origin), "name": new, "branch": 0, "kept": 0, "forks": [], "drafts": []})
            fork.tokens, fork.rows = list(origin.tokens), list(origin.rows)
            self.live[new] = fork
            self.forked += 1
            return
        assert self.s.stats() == stats

    def speculate(self) -> None:
        if self.flight is not None or not self.live or not self.config.num_speculative_tokens:
            return
        request = self.live[self.rng.choice(list(self.live))]
        drafts = self.draw_drafts(request)
        self.s.speculate(request.name, drafts)
        self.set_drafts(request, drafts)

    def draw_drafts(self, request: Request) -> list[int]:
        """Drafts of which the first ones are right."""
        count = self.rng.randint(0, self.config.num_speculative_tokens)
        drafts: list[int] = []
        row = request.row(len(request.tokens) - 1, request.tokens)
        right = self.rng.randint(0, count)
        for place in range(count):
            token = (next_token(row) + (place >= right)) % VOCAB
            drafts.append(token)
            row = row_after(row, token, request.space(len(request.tokens) + place))
        return drafts

    def set_drafts(self, request: Request, drafts: list[int]) -> None:
        request.drafts = []
        decoding = 0 < self.s.explain(request.name)["computed_tokens"] == len(request.tokens) - 1
        if decoding and not request.forks:
            request.drafts = drafts[: max(request.max_len - len(request.tokens) - 1, 0)]
        assert self.s.explain(request.name)["draft_tokens"] == len(request.drafts)

    def explain(self) -> None:
        if not self.live:
            return
        name = self.rng.choice(list(self.live))
        request, account = self.live[name], self.s.explain(name)
        assert account["prompt_tokens"] == request.prompt_len
        assert account["output_tokens"] == len(request.tokens) - request.prompt_len
        assert (account["waits_for"] == "origin") == (request.name != name)
        if self.flight is None and request.exact:
            assert account["computed_tokens"] == request.computed

    def schedule(self) -> None:
        step = self.s.schedule()
        if step is None:
            assert not self.live, "nothing runs although requests are there"
            return
        for name in step.preempted:
            request = self.live[name]
            assert request.name == name
            request.kept = self.s.explain(name)["kept_tokens"]
            assert (request.kept > 0) == (name in step.swapped)
            assert not request.kept or request.kept == request.computed or not request.exact
            request.computed, request.exact, request.drafts = 0, True, []
        assert set(step.swapped) <= set(step.preempted)
        self.move(self.index, self.swapped, step.swap_outs)
        self.move(self.swapped, self.index, step.swap_ins)
        self.move(self.latent, self.host, step.stores)
        self.move(self.host, self.latent, step.loads)
        self.move(self.latent, self.latent, step.latent_copies)
        self.move(self.index, self.index, step.copies)
        requests = [self.live[name] for name in step.request_ids]
        assert [r.name for r in requests] == step.request_ids
        self.check_shape(step, requests)
        for place, request in enumerate(requests):
            self.compute(step, place, request)
        rows = list(zip(step.sample_request.tolist(), step.sample_branch.tolist(), strict=True))
        sampled = [
            self.sample(requests[place], int(step.positions[row]), int(self.index[step.slot_mapping[row]]), branch)
            for (place, branch), row in zip(rows, step.sample_rows.tolist(), strict=True)
        ]
        self.flight = Flight(step, requests, rows, np.array(sampled, np.int32))

    def blocks(self, cache: np.ndarray) -> np.ndarray:
        size = self.config.block_size
        return cache[: len(cache) // size * size].reshape(-1, size)

    def move(self, sources: np.ndarray, targets: np.ndarray, moves: np.ndarray) -> None:
        self.blocks(targets)[moves[:, 1]] = self.blocks(sources)[moves[:, 0]]

    def read_latent(self, slots: np.ndarray) -> list[int]:
        """Latent rows through the fetch plan, as many at a time as surely fit."""
        if self.config.num_latent_blocks is None:
            return self.latent[slots].tolist()
        rows: list[int] = []
        for first in range(0, len(slots), self.config.hot_rows):
            places, sources, targets = self.s.plan_fetch(0, slots[first : first + self.config.hot_rows])
            assert len(set(targets.tolist())) == len(targets)
            self.latent[targets] = self.host[sources]
            rows += self.latent[places].tolist()
        return rows

    def sample(self, request: Request, position: int, row: int, branch: int) -> int:
        """Completions of one prompt begin differently."""
        return (next_token(row) + (branch if position == request.prompt_len - 1 else 0)) % VOCAB

    def check_shape(self, step: Step, requests: list[Request]) -> None:
        config = self.config
        n, b = step.num_tokens, step.num_seqs
        assert 1 <= n <= config.max_batched_tokens
        assert b <= config.max_num_seqs
        assert len(set(step.request_keys.tolist())) == b == len({id(r) for r in requests})
        assert not set(step.preempted) & set(step.request_ids)
        starts = step.query_start_loc
        assert starts[0] == 0
        assert starts[-1] == n == len(step.token_ids) == len(step.positions)
        assert len(set(step.slot_mapping.tolist())) == n, "two tokens are written to one slot"
        samples = []
        for place, request in enumerate(requests):
            end, known, last = int(step.seq_lens[place]), len(request.tokens), int(starts[place + 1]) - 1
            assert step.num_drafts[place] == max(end - known, 0)
            if end >= known:
                samples += [(row, place, request.branch) for row in range(last - (end - known), last + 1)]
                samples += [(last, place, branch) for branch, _ in request.forks]
        assert samples == list(
            zip(step.sample_rows.tolist(), step.sample_request.tolist(), step.sample_branch.tolist(), strict=True)
        )
        if config.max_batched_cost is not None and b > 1:
            cost = n + config.context_cost * step.positions.sum()
            assert cost <= config.max_batched_cost * (1 + 1e-9)

    def compute(self, step: Step, place: int, request: Request) -> None:
        """Reads every row before the request's tokens, then writes theirs; in both caches."""
        size = self.config.block_size
        first, last = step.query_start_loc[place : place + 2].tolist()
        end = int(step.seq_lens[place])
        start = end - (last - first)
        if request.computed:
            assert start <= request.computed
            assert start == request.computed or not request.exact
        elif request.skip_cache:
            assert start == request.kept
        assert start >= request.kept, "rows that were kept are computed anew"
        self.restored += request.kept > 0
        request.computed, request.kept, request.exact = start, 0, True
        tokens = request.tokens + request.drafts
        assert end <= len(tokens)
        assert step.token_ids[first:last].tolist() == tokens[start:end]
        assert step.positions[first:last].tolist() == list(range(start, end))
        table = step.block_tables[place]
        blocks = -(-end // size)
        assert (table[blocks:] == -1).all()
        assert (table[:blocks] >= 0).all()
        assert len(set(table[:blocks].tolist())) == blocks
        positions = np.arange(end)
        slots = table[positions // size].astype(np.int64) * size + positions % size
        assert (slots[start:] == step.slot_mapping[first:last]).all()
        if start:
            request.row(start - 1, tokens)
            assert self.index[slots[:start]].tolist() == request.rows[:start], f"{request.name} reads a wrong index key"
            assert self.read_latent(slots[:start]) == request.rows[:start], f"{request.name} reads a wrong latent row"
        pages = step.latent_tables[place][positions[start:] // size].astype(np.int64)
        assert (pages * size + positions[start:] % size == step.latent_slot_mapping[first:last]).all()
        for position, latent_slot in zip(range(start, end), step.latent_slot_mapping[first:last], strict=True):
            self.index[slots[position]] = self.latent[latent_slot] = request.row(position, tokens)

    def update(self) -> None:
        flight, self.flight = self.flight, None
        assert flight is not None
        drafts: np.ndarray | None = None
        width = self.config.num_speculative_tokens
        ended: dict[str, str] = {}
        new_tokens = []
        alive = {id(r) for r in self.live.values()}
        for place, request in enumerate(flight.requests):
            rows = [i for i, (owner, _) in enumerate(flight.rows) if owner == place]
            new_tokens.append(0)
            if id(request) not in alive:
                continue
            request.computed = int(flight.step.seq_lens[place])
            if not rows:
                continue
            branches = {flight.rows[i][1]: int(flight.sampled[i]) for i in rows}
            for branch, name in request.forks:
                self.begin(request, branch, name, branches[branch], ended)
            drafted = int(flight.step.num_drafts[place])
            known = len(request.tokens)
            got = [branches[request.branch]] if len(branches) > 1 else [int(flight.sampled[i]) for i in rows]
            offered, request.drafts, request.forks = request.drafts[:drafted], [], []
            reason = None
            for at, token in enumerate(got):
                if at and offered[at - 1] != got[at - 1]:
                    break
                request.tokens.append(token)
                new_tokens[place] += 1
                reason = request.ends()
                if reason is not None:
                    break
            assert new_tokens[place] >= 1
            del request.rows[known:]
            request.computed = len(request.tokens) - 1
            if reason is not None:
                ended[request.name] = reason
        if width and self.rng.random() < 0.5:
            drafts = np.full((len(flight.requests), width), -1, np.int32)
            drawn = {}
            for place, request in enumerate(flight.requests):
                if self.live.get(request.name) is request and request.name not in ended:
                    drawn[place] = self.draw_drafts(request)
                    drafts[place, : len(drawn[place])] = drawn[place]
        assert dict(self.s.update(flight.sampled, drafts)) == ended
        assert self.s.new_tokens.tolist() == new_tokens
        for name in ended:
            del self.live[name]
            self.finished += 1
        for request in {id(r): r for r in self.live.values()}.values():
            assert self.s.token_ids(request.name).tolist() == request.tokens
        if drafts is not None:
            for place, mine in drawn.items():
                self.set_drafts(flight.requests[place], mine)

    def begin(self, origin: Request, branch: int, name: str, token: int, ended: dict[str, str]) -> None:
        """A fork gets its first token."""
        fork = Request(**{**vars(origin), "name": name, "branch": branch, "forks": [], "drafts": []})
        fork.tokens, fork.rows = [*origin.tokens, token], origin.rows[: len(origin.tokens)]
        self.live[name] = fork
        self.forked += 1
        reason = fork.ends()
        if reason is not None:
            ended[name] = reason

    def abandon(self) -> None:
        """The executor fails somewhere: what it should have written is anything."""
        if self.flight is None:
            return
        flight, self.flight = self.flight, None
        step = flight.step
        self.index[step.slot_mapping] = GARBAGE
        self.latent[step.latent_slot_mapping] = GARBAGE
        self.blocks(self.index)[step.copies[:, 1]] = GARBAGE
        self.blocks(self.host)[step.stores[:, 1]] = GARBAGE
        self.blocks(self.swapped)[step.swap_outs[:, 1]] = GARBAGE
        self.blocks(self.index)[step.swap_ins[:, 1]] = GARBAGE
        for name in step.swapped:
            if name in self.live:
                self.live[name].kept = 0
        for moves in (step.loads, step.latent_copies):
            self.blocks(self.latent)[moves[:, 1]] = GARBAGE
        if self.config.num_latent_blocks is not None:
            self.latent[self.config.num_latent_blocks * self.config.block_size :] = GARBAGE
        self.s.abandon()
        self.abandoned += 1
        for request in flight.requests:
            request.exact, request.drafts = False, []

    def snapshot(self) -> None:
        """Another process begins with the rows of this one; a damaged file is refused."""
        if not self.config.enable_prefix_caching or self.snapshots is None:
            return
        other = Model(self.config, self.rng.randrange(2**32))
        other.stems, other.snapshots = self.stems, None
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "cache"
            count = self.s.snapshot(path, self.parts(), model="toy")
            assert count == self.s.stats()["cached_blocks"]
            data = bytearray(path.read_bytes())
            place = self.rng.randrange(len(data) // 2, len(data))
            data[place] ^= 1
            (Path(directory) / "damaged").write_bytes(data)
            if count:
                with pytest.raises(ValueError, match="damaged"):
                    other.s.restore(Path(directory) / "damaged", other.parts(), model="toy")
            other.check()
            # A part of a block that another one holds too does not come back.
            restored = other.s.restore(path, other.parts(), model="toy")
            assert min(count, 1) <= restored <= count
            assert restored == other.s.stats()["cached_blocks"]
        for _ in range(40):
            other.operate()
        other.drain()
        self.snapshots += 1
        self.reused += other.s.stats()["cached_tokens"]

    def parts(self) -> dict[str, Any]:
        latent, host, index = (self.blocks(cache).view(np.uint8) for cache in (self.latent, self.host, self.index))
        return {"latent": latent if self.config.num_latent_blocks is None else (latent, host), "index": index}

    # What must hold

    def check(self) -> None:
        self.s.check_invariants()
        stats = self.s.stats()
        assert stats["running"] + stats["waiting"] == len({id(r) for r in self.live.values()})
        assert self.s.has_unfinished() == bool(self.live)
        assert stats["free_blocks"] + stats["used_blocks"] == stats["total_blocks"]
        size = self.config.block_size
        kept = sum(-(-request.kept // size) for request in {id(r): r for r in self.live.values()}.values())
        if self.flight is None:
            assert stats["swap_blocks"] - stats["free_swap_blocks"] == kept
        for event in self.s.events():
            if event["type"] == "BlockStored":
                assert event["parent_block_hash"] is None or event["parent_block_hash"] in self.stored
                assert len(event["token_ids"]) == len(event["block_hashes"]) * event["block_size"]
                assert not self.stored & set(event["block_hashes"])
                self.stored |= set(event["block_hashes"])
            elif event["type"] == "BlockRemoved":
                assert self.stored >= set(event["block_hashes"])
                self.stored -= set(event["block_hashes"])
            else:
                self.stored.clear()
        assert len(self.stored) <= stats["cached_blocks"]

    def drain(self) -> None:
        """Serves all that is left; then every block is free."""
        for _ in range(100_000):
            if self.flight is not None:
                self.update()
            if not self.live:
                break
            self.schedule()
        assert not self.live
        self.check()
        stats = self.s.stats()
        assert (stats["running"], stats["waiting"], stats["used_blocks"]) == (0, 0, 0)
        assert stats["finished"] == self.finished
        self.s.clear_cache()
        self.check()
        stats = self.s.stats()
        assert (stats["cached_blocks"], stats["free_blocks"]) == (0, stats["total_blocks"])
        assert stats["free_swap_blocks"] == stats["swap_blocks"]
        assert not self.stored


def draw_config(rng: random.Random) -> SchedulerConfig:
    """Small worlds under pressure, all settings drawn."""
    size, blocks = rng.choice([(1, 30), (2, 14), (4, 5), (4, 8), (4, 12), (16, 6)])
    options: dict[str, Any] = {
        "max_batched_tokens": rng.choice([1, 5, 16, 200]),
        "max_num_seqs": rng.choice([1, 3, 8, 8]),
        "policy": rng.choice(["fcfs", "priority", "longest_prefix", "fair", "deadline"]),
        "watermark": rng.choice([0.0, 0.0, 0.1]),
        "max_model_len": rng.choice([None, 2 * size + 3]),
        "enable_prefix_caching": rng.random() < 0.85,
        "eviction": rng.choice(["lru", "reuse"]),
        "hash_seed": 7,
        "enable_events": rng.random() < 0.5,
        "num_draft_blocks": rng.choice([None, None, blocks - 1]),
        "num_speculative_tokens": rng.choice([0, 1, 3]),
        "context_cost": rng.choice([0.0, 0.1]),
        "max_batched_cost": rng.choice([None, None, 10.0]),
        "ageing_steps": rng.choice([1, 20, 1024]),
    }
    if rng.random() < 0.6:
        # As few pages as may be, for more blocks than they hold or so few that requests are preempted.
        seqs = min(options["max_num_seqs"], options["max_batched_tokens"])
        pages = 2 * (-(-options["max_batched_tokens"] // size) + 3 * seqs)
        if pages < 200:
            blocks = max(blocks, rng.choice([0, 0, pages + rng.randint(0, 40), pages + 40]))
            options |= {"num_latent_blocks": pages, "hot_rows": rng.choice([3, 50])}
            options["max_model_len"] = rng.choice([10, 40]) * size
            options["num_draft_blocks"] = None
            options["preemption"] = rng.choice(["auto", "auto", "recompute", "swap"])
            options["num_swap_blocks"] = rng.choice([3, 40, 40])
            options["swap_cost"] = rng.choice([0.01, 0.5])
    return SchedulerConfig(blocks, block_size=size, **options)


def run(seed: int, operations: int) -> Model:
    """One world: random calls, then all that is left is served."""
    model = Model(draw_config(random.Random(seed)), seed)
    try:
        for _ in range(operations):
            model.operate()
        model.drain()
    except BaseException as error:
        error.add_note(f"seed {seed}, operation {model.operations}, {model.config}") if hasattr(
            error, "add_note"
        ) else None
        raise
    return model
