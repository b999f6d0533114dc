"""The engine: state of a batch of sequences, and one round of grow, verify, accept, commit.

Rows are ragged: each has its own length, tree and accepted path. A row that finishes leaves the
batch at once and the last active row takes its place. The one host read of a round is that of the
accepted tokens, which streaming and stopping need anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from treespec import graphs
from treespec.acceptance import RowText, RowVerdict, decide, walk
from treespec.laps import Laps
from treespec.model import PREFILL_CHUNK, TreeModel
from treespec.policy import Outcome, Policy
from treespec.sampling import Breadth, Ranking, TokenPicker, rank_by_kernel
from treespec.sources.base import DraftSource, OneShotSource, Sequences, StepwiseSource
from treespec.sources.model import ModelSource
from treespec.stats import RowStats, SpeculationStats
from treespec.transfer import floats_on_device, on_device
from treespec.tree import (
    Growth,
    Tree,
    packed,
    root_only,
    round_up_nodes,
    sibling_counts,
    with_read,
)

# Where graphs are captured, trees are taken to be as deep as this, lest each depth have its own.
_DEEP = 64


@dataclass
class Request:
    """One call, prepared: what to continue, how to pick tokens, when to stop.

    Attributes:
        input_ids: int64 `[B, W]` as given, left padding included.
        prompts: int64 per row, unpadded.
        max_new_tokens: most new tokens of a row.
        picker: picks tokens.
        eos_ids: tokens that end a row.
        stop: further stopping rule `(ids [1, L]) -> bool` of a row, asked after every token; or
            None.
        pad_id: fills finished rows.
        keep_scores: keep scores and logits of every token.
        warming: record every forward when it is first made, however short the text.
    """

    input_ids: torch.Tensor
    prompts: list[torch.Tensor]
    max_new_tokens: int
    picker: TokenPicker
    eos_ids: frozenset[int] = frozenset()
    stop: Callable[[torch.Tensor], bool] | None = None
    pad_id: int = 0
    keep_scores: bool = False
    warming: bool = False

    @property
    def reads_ids(self) -> bool:
        """Whether anything but the target reads the text as ids while it is written."""
        return self.stop is not None or self.keep_scores or not self.picker.in_one_op

    def ends(self, token: int, ids: torch.Tensor) -> bool:
        """Whether a row with the tokens `ids` `[1, L]` ends with the last of them, `token`."""
        stopped = self.stop is not None and self.stop(ids)
        return stopped or token in self.eos_ids


@dataclass
class Row:
    """One sequence of the call and its place among the active ones."""

    index: int
    new_tokens: list[int] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    finished: bool = False


class Engine:
    """Runs requests on one target with one set of sources.

    Args:
        target: the target, made ready for trees.
        sources: draft sources; lookups are asked before the model.
        policy: decides what is drafted.
    """

    def __init__(self, target: TreeModel, sources: list[DraftSource], policy: Policy) -> None:
        self.target = target
        self.lookups = [source for source in sources if isinstance(source, OneShotSource)]
        self.drafts = [source for source in sources if isinstance(source, StepwiseSource)]
        self.sources = [*self.lookups, *self.drafts]
        self.policy = policy
        self._laps = Laps(target.device)
        self.steps = target.steps
        self.stats = SpeculationStats()
        self._request: Request | None = None
        # what graphs read, kept from call to call
        self._history: torch.Tensor | None = None
        self._lens_held: torch.Tensor | None = None
        self._bare_trees: dict[int, Tree] = {}
        self._bare_on_host: dict[int, Tree] = {}
        own_breadth = type(policy).breadth is not Policy.breadth
        self._breadth: Breadth | None = policy.breadth if own_breadth else None

    def run(self, request: Request) -> Iterator[list[tuple[int, list[int]]]]:
        """Generates; after every round yields `(row index, new tokens)` of the rows that took part.

        The rows' results are in `self.rows` when the iterator is exhausted, and hold what was
        yielded if it is closed early.
        """
        started = time.perf_counter()
        stats = self.stats = SpeculationStats(per_row=[RowStats() for _ in request.prompts])
        self.rows = [Row(index) for index in range(len(request.prompts))]
        self._request = request
        try:
            with torch.inference_mode():
                self._begin(request)
            stats.prefill_ms = 1e3 * (time.perf_counter() - started)
            while self._active:
                with torch.inference_mode():
                    news = self._round(request)
                stats.total_ms += 1e3 * (time.perf_counter() - started)
                yield news
                started = time.perf_counter()
                if self._request is not request:
                    raise RuntimeError(
                        "another call has taken this speculator over; close a stream before the "
                        "next call"
                    )
        except Exception:
            # buffers may hold NaN rows, which later calls would meet with weight 0
            if self._request is request:
                self.target.cache = None
            raise
        finally:
            if self._request is request:
                for source in self.sources:
                    source.end()

    def _begin(self, request: Request) -> None:
        batch, width = request.input_ids.shape
        device = self.target.device
        longest = max(len(prompt) for prompt in request.prompts)
        capacity = longest + request.max_new_tokens
        self._active = list(self.rows)
        self._pads = [width - len(prompt) for prompt in request.prompts]
        self._ids = torch.full(
            (batch, width + request.max_new_tokens + 1), request.pad_id, device=device
        )
        self._ids[:, :width] = request.input_ids
        # unpadded views of the same text, for the models and sources
        self._tokens = self._text_buffer(batch, capacity + 1)
        for row, prompt in enumerate(request.prompts):
            self._tokens[row, : len(prompt)] = prompt
        self._lens = [len(prompt) for prompt in request.prompts]
        widest = round_up_nodes(self.policy.max_nodes)
        slack = widest + (PREFILL_CHUNK if batch > 1 else 0)
        self.target.begin()
        self.target.allocate(batch, _round_up(capacity + slack, 256))
        started = time.perf_counter()
        self.target.ingest(self._tokens, [length - 1 for length in self._lens])
        prefill_ms = 1e3 * (time.perf_counter() - started)
        captured = self.steps.captured
        self.policy.begin(longest, request.picker.do_sample, prefill_ms, captured)
        request.picker.steps = self.steps
        sequences = self._sequences()
        for source in self.sources:
            source.begin(sequences, _round_up(capacity + slack, 256))

    def _text_buffer(self, batch: int, length: int) -> torch.Tensor:
        """int64 `[batch, length]` of zeros, or longer; the same one again where graphs read it."""
        device = self.target.device
        if not self.steps.captured:
            return torch.zeros(batch, length, dtype=torch.long, device=device)
        kept, length = self._history, graphs.roomy(length)
        if kept is None or kept.shape[0] != batch or kept.shape[1] < length:
            kept = torch.zeros(batch, length, dtype=torch.long, device=device)
            self._history = self.steps.hold(kept)
            lens = torch.ones(batch, dtype=torch.long, device=device)
            self._lens_held = self.steps.hold(lens)
        return kept.zero_()

    def _sequences(self) -> Sequences:
        rounds_ahead = None if self.policy.may_record else self._rounds_ahead()
        sequences = Sequences(self._tokens, self._lens, rounds_ahead, self.steps)
        if self._lens_held is not None:
            held = self._lens_held[: len(self._lens)]
            sequences.lens_on_device = held.copy_(on_device(self._lens, held.device))
        return sequences

    def _rounds_ahead(self) -> float | None:
        """About how many rounds of as many rows are still to come, from those so far; None while
        warming up."""
        request, rounds = self._request, self.stats.rounds
        if request is None or request.warming:
            return None
        left = request.max_new_tokens - max(len(row.new_tokens) for row in self._active)
        if not self.sources:
            return left
        written = sum(len(row.new_tokens) for row in self._active) / len(self._active)
        # two tokens a round until something is known
        return left * (rounds + 1) / (written + 2)

    def _drop_finished(self, picker: TokenPicker) -> None:
        for row in reversed(range(len(self._active))):
            if not self._active[row].finished:
                continue
            last = len(self._active) - 1
            states: tuple[list, ...] = (self._active, self._pads, self._lens)
            for state in states:
                state[row] = state[last]
                state.pop()
            if row != last:
                self._ids[row] = self._ids[last]
                self._tokens[row] = self._tokens[last]
            self._ids, self._tokens = self._ids[:last], self._tokens[:last]
            if last:
                self.target.drop_row(row)
                picker.drop_row(row)
                for source in self.sources:
                    source.drop_row(row)

    def _round(self, request: Request) -> list[tuple[int, list[int]]]:
        started = time.perf_counter()
        self._laps.start()
        self.target.rounds_ahead = self._rounds_ahead()
        self.target.start_round()
        budgets = [request.max_new_tokens - len(row.new_tokens) for row in self._active]
        tree, match_lengths, levels = self._grow(request.picker, budgets)
        growth_extra_ms = self.steps.extra_ms
        grown_ms = self.steps.capture_ms + self.steps.first_ms
        self._laps.mark()
        logits = self._verify(tree)
        self._laps.mark()
        verdicts = self._decide(request, tree, logits, budgets)
        if verdicts is None:
            # some node turned NaN, which reaches its siblings: the roots alone
            self.target.cache.clear_nodes()
            roots, self._placed = _roots_placed(self._tokens, request.picker.lens)
            tree = self._bare(roots)
            verdicts = self._decide(request, tree, self._verify(tree), budgets)
            assert verdicts is not None, "a bare root's token is picked or refused"
        news = self._commit(request, tree, verdicts)
        total_ms = 1e3 * (time.perf_counter() - started)
        draft_ms, verify_ms = self._laps.read()
        asked = self.drafts if levels else []
        drafts_recorded = grown_ms + sum(source.recording_ms for source in asked)
        steps, target = self.steps, self.target
        # verdicts are the same from round to round: what they take is no part of a usual one
        others_ms = steps.capture_ms + steps.first_ms + steps.extra_ms - growth_extra_ms - grown_ms
        recorded = target.recording_ms + others_ms
        compiled = target.compile_ms + steps.first_ms + sum(source.compile_ms for source in asked)
        outcome = Outcome(
            tree=self._for_policy(tree),
            paths=[verdict.path for verdict in verdicts],
            match_lengths=match_lengths,
            draft_levels=levels if tree.draft_rows is not None else 0,
            draft_ms=draft_ms - drafts_recorded,
            verify_ms=verify_ms - target.recording_ms,
            total_ms=total_ms - drafts_recorded - recorded,
            num_nodes=tree.tokens.shape[1],
            new_tokens=sum(len(tokens) for _, tokens in news),
            sampled=request.picker.do_sample,
            draft_extra_ms=growth_extra_ms + sum(source.unrecorded_ms for source in asked),
            verify_extra_ms=target.unrecorded_ms,
            settled=target.settled,
            draft_settled=all(source.settled for source in asked),
            overhead_settled=others_ms == 0.0,
            recording_ms=drafts_recorded + recorded - compiled,
            warming=request.warming,
        )
        self.policy.observe(outcome)
        self._count(outcome, sum(verdict.num_nodes for verdict in verdicts))
        self.stats.draft_ms += draft_ms
        self.stats.verify_ms += verify_ms
        self.stats.commit_ms += total_ms - draft_ms - verify_ms
        return news

    def _grow(self, picker: TokenPicker, budgets: list[int]) -> tuple[Tree, list[int] | None, int]:
        drafts = self.policy.begin_round(budgets) and self.sources
        sequences = self._sequences()
        picker.lens = sequences.lens_on_device
        roots, self._placed = self.steps(_roots_placed, sequences.tokens, picker.lens)
        # the bonus token takes one place, so deeper nodes could never be kept
        room = max(budgets) - 1
        depth, length = self.policy.max_depth, self.policy.lookup_length
        if not self.steps.captured:
            # of graphs, every size takes one of its own
            depth, length = min(depth, room), min(length, room)
        deepest = max(depth, length)
        if not drafts or deepest <= 0 or room <= 0:
            return self._bare(roots), None, 0
        match_lengths, growth = self._look(roots, picker, sequences, length)
        levels = 0
        scores = None
        if self.drafts and self.policy.wants_draft(_lookup_scores(growth, roots)):
            growth = growth or self.steps.make(Growth, roots, picker.implementation)
            if (plan := self._plan(picker)) is not None:
                levels = len(plan.children)
                tree, scores = self._grow_ahead(growth, sequences, picker, plan)
                if tree is not None:
                    return tree, match_lengths, levels
            else:
                levels = self._grow_levels(growth, sequences, picker, depth)
        if growth is None or growth.count == 1:
            return self._bare(roots), match_lengths, 0
        if scores is None:
            scores = growth.all_scores()
        # drawn siblings are all verified: leaving some out by what they are would bias the rest
        count = growth.count if picker.rejects else self.policy.nodes_to_verify(scores)
        sizes = self.policy.node_sizes
        if self.steps.captured:
            # as many as the width has places for, which would be padding
            count = round_up_nodes(min(count, sizes[-1]), sizes)
            sizes, deepest = (count,), max(deepest, _DEEP)
        tree = self.steps.on(growth, Growth.select, count, deepest, sizes)
        self._placed = self.steps(_placed, picker.lens, tree.depths)
        return tree, match_lengths, levels

    def _bare(self, roots: torch.Tensor) -> Tree:
        """Trees of nothing but their roots; all but the tokens is the same every time."""
        batch = len(roots)
        tree = self._bare_trees.get(batch)
        if tree is None:
            tree = self._bare_trees[batch] = root_only(roots)
        tree.tokens = roots.view(batch, 1)
        return tree

    def _for_policy(self, tree: Tree) -> Tree:
        """The tree as its policy reads it: where that would wait for one tensor after the other, on
        the host."""
        if not (self.steps.captured and self.policy.reads_trees):
            return tree
        if tree.draft_rows is None and tree.lookup is None:
            batch = len(tree.tokens)
            if batch not in self._bare_on_host:
                self._bare_on_host[batch] = root_only(torch.zeros(batch, dtype=torch.long))
            return self._bare_on_host[batch]
        read = (tree.num_nodes, tree.parents, tree.scores, tree.draft_rows, tree.lookup)
        return with_read(tree, self.steps(packed, *read))

    def _look(
        self, roots: torch.Tensor, picker: TokenPicker, sequences: Sequences, length: int
    ) -> tuple[list[int] | None, Growth | None]:
        """Asks the lookups, if that is wanted: how many last tokens of every row they matched, and
        the growth of what they found, if it becomes candidates."""
        if not self.lookups or not self.policy.wants_lookup():
            return None, None
        proposals = [source.propose(sequences, length) for source in self.lookups]
        match_lengths = [max(lengths) for lengths in zip(*(p.match_lengths for p in proposals))]
        if not self.policy.wants_matches(match_lengths):
            return match_lengths, None
        growth = self.steps.make(Growth, roots, picker.implementation)
        lines = [
            self.steps(_run_on, p.continuations) if p.runs_on else p.continuations
            for p in proposals
        ]
        continuations = torch.cat(lines, dim=1) if len(lines) > 1 else lines[0]
        # a source may propose anything, even tokens that the target does not have
        continuations = continuations.masked_fill(continuations >= self.target.vocab_size, -1)
        chances = np.maximum(self.policy.lookup_chances(match_lengths, length), 1e-9)
        weights = floats_on_device(chances, continuations.device)
        self.steps.on(growth, Growth.add_lookups, continuations, weights)
        return match_lengths, growth

    def _plan(self, picker: TokenPicker) -> _LevelPlan | None:
        """The levels of this round, if they can be grown without a look at them; else None."""
        source, policy = self.drafts[0], self.policy
        if not self.steps.captured or picker.rejects:
            return None
        if not isinstance(source, ModelSource) or not source.can_be_captured:
            return None
        levels, ranking = policy.levels_ahead(), picker.ranking(self._breadth)
        if levels is None or ranking is None:
            return None
        sizes = policy.node_sizes
        return _LevelPlan(
            tuple(policy.children(level) for level in range(levels)),
            tuple(policy.frontier(level) for level in range(1, levels)),
            ranking,
            policy.looks_at_nothing,
            round_up_nodes(min(policy.max_nodes, sizes[-1]), sizes),
        )

    def _grow_ahead(
        self, growth: Growth, sequences: Sequences, picker: TokenPicker, plan: _LevelPlan
    ) -> tuple[Tree | None, torch.Tensor | None]:
        """All levels, the draft's forwards among them, as one step; the tree where its nodes are
        selected too, else the scores `[B, C]` of the root and the likeliest candidates."""
        source = self.drafts[0]
        assert isinstance(source, ModelSource)
        source.start_round()
        grown = source.model.grown
        grown.beside(self.steps)
        entered = source.catch_up(sequences)
        keys = picker.keys_of_rank(self.policy.sharpness(picker), sequences.tokens.device)
        found = grown.on(growth, _grow_levels_ahead, *entered, *keys, source, plan)
        if plan.selects:
            tree, self._placed = found
            return tree, None
        # the one look: at how far the levels reach, and at the likeliest of what they found
        told, further = found.cpu(), len(plan.frontiers)
        self.policy.levels_grown(told[:, :further].tolist())
        return None, told[:, further:]

    def _grow_levels(
        self, growth: Growth, sequences: Sequences, picker: TokenPicker, depth: int
    ) -> int:
        source = self.drafts[0]
        source.start_round()
        logits, root_row, chain, offset = source.root_logits(sequences)
        rows = offset + self.policy.max_rows
        self.steps.on(growth, Growth.begin_levels, rows, root_row, chain)
        sharpness = self.policy.sharpness(picker)
        room = self.policy.node_budget() - 1
        for level in range(depth):
            if picker.rejects:
                # fewer from level to level, and every level some
                limit = max(1, 2 * room // (depth - level + 1))
                room -= self._draw(growth, picker, logits, level, limit)
            else:
                count, breadth = self.policy.children(level), self._breadth
                picker.rank(growth, logits, level, count, self._lens, sharpness, breadth)
            if level + 1 == depth or room <= 0:
                break
            wanted = self.policy.frontier(level + 1)
            scores = self.steps.on(growth, Growth.choose_frontier, level + 1, *wanted)
            if not self.policy.worth_expanding(scores):
                break
            tokens, visible = self.steps.on(growth, Growth.enter_rows, offset)
            logits = source.level_logits(tokens, level + 1, visible, offset)
            offset += tokens.shape[1]
        return level + 1

    def _draw(
        self, growth: Growth, picker: TokenPicker, logits: torch.Tensor, level: int, limit: int
    ) -> int:
        """Gives the frontier drawn children, `limit` at most; returns how many places they take."""
        parents, count = growth.frontier_scores, self.policy.children(level)
        likeliest = picker.likeliest(logits, parents, count)
        counts = sibling_counts(parents, likeliest, limit)
        if self._breadth is not None:
            counts = torch.minimum(counts, self._breadth(likeliest))
        growth.expand(*picker.draw(logits, parents, counts, count, growth.frontier, self._lens))
        return min(limit, parents.shape[1] * count)

    def _verify(self, tree: Tree) -> torch.Tensor:
        """The target's logits `[B, N, V]`."""
        if tree.tokens.shape[1] > 1 and self.policy.may_record:
            self.target.rounds_ahead = None
        prefix, positions = self._placed
        return self.target.forward(tree.tokens, positions, tree.visible, prefix_lens=prefix)

    def _decide(
        self, request: Request, tree: Tree, logits: torch.Tensor, budgets: list[int]
    ) -> list[RowVerdict] | None:
        """What every row accepts: by one op where all processors are known to it, else node by
        node; None where some node turned NaN."""
        rows = [
            RowText(
                self._ids[row : row + 1],
                self._lens[row] + self._pads[row],
                self._lens[row],
                budgets[row],
                request.ends,
                request.keep_scores,
                request.reads_ids,
            )
            for row in range(len(self._active))
        ]
        if request.picker.in_one_op:
            return decide(logits, tree, request.picker, rows)
        if tree.tokens.shape[1] > 1 and bool(logits[..., 0].isnan().any()):
            return None
        return [walk(logits[row], tree, row, request.picker, text) for row, text in enumerate(rows)]

    def _commit(
        self, request: Request, tree: Tree, verdicts: list[RowVerdict]
    ) -> list[tuple[int, list[int]]]:
        """Keeps the paths' key-value rows and writes the tokens down."""
        news = []
        draft_paths = []
        for row, (state, verdict) in enumerate(zip(self._active, verdicts)):
            tokens, kept = verdict.tokens, len(verdict.tokens)
            state.new_tokens += tokens
            state.scores += verdict.scores
            state.logits += verdict.logits
            state.finished = verdict.ended or len(state.new_tokens) >= request.max_new_tokens
            self._lens[row] += kept
            share = self.stats.per_row[state.index]
            share.rounds += 1
            share.new_tokens += kept
            share.accepted += len(verdict.path) - 1
            news.append((state.index, tokens))
            forwarded = verdict.draft_rows
            # up to the first node that the draft had not forwarded
            draft_paths.append(forwarded[: [*forwarded, -1].index(-1)])
        self._write([verdict.tokens for verdict in verdicts])
        self.target.cache.commit([verdict.path for verdict in verdicts])
        if tree.draft_rows is not None:
            self.drafts[0].commit(draft_paths)
        if any(state.finished for state in self._active):
            self._drop_finished(request.picker)
        return news

    def _write(self, new: list[list[int]]) -> None:
        """Puts every row's new tokens, which its length counts already, into its text."""
        if len(new) == 1:
            place = self._tokens[0, self._lens[0] - len(new[0]) : self._lens[0]]
            place.copy_(on_device(new[0], place.device))
            return
        longest = max(map(len, new))
        # a row with fewer repeats its last
        tokens = [row + row[-1:] * (longest - len(row)) for row in new]
        places = [
            [length - len(row) + min(step, len(row) - 1) for step in range(longest)]
            for length, row in zip(self._lens, new)
        ]
        places_there, tokens_there = on_device([places, tokens], self._tokens.device)
        self._tokens.scatter_(1, places_there, tokens_there)

    def _count(self, outcome: Outcome, nodes: int) -> None:
        stats = self.stats
        stats.rounds += 1
        stats.new_tokens += outcome.new_tokens
        stats.draft_forwards += outcome.draft_levels
        stats.drafted_nodes += nodes - len(outcome.paths)
        stats.accept_lengths.update(len(path) - 1 for path in outcome.paths)


@dataclass(frozen=True)
class _LevelPlan:
    """Levels that are grown without a look at them.

    Attributes:
        children: most children of a node, of every level.
        frontiers: most nodes to expand and the least score, of every further level.
        ranking: of the children.
        selects: the nodes too; else their scores are looked at first.
        max_nodes: to be selected, the root among them.
    """

    children: tuple[int, ...]
    frontiers: tuple[tuple[int, float], ...]
    ranking: Ranking
    selects: bool
    max_nodes: int


# Of tensors and constants alone, so that graphs can be captured of them.
def _grow_levels_ahead(
    growth: Growth,
    tokens: torch.Tensor,
    lens: torch.Tensor,
    prefix_lens: torch.Tensor,
    width: int,
    sharpness: torch.Tensor,
    seed: torch.Tensor | None,
    rows: torch.Tensor | None,
    source: ModelSource,
    plan: _LevelPlan,
) -> torch.Tensor | tuple[Tree, tuple[torch.Tensor, torch.Tensor]]:
    """The tree and where it is placed; where no nodes are selected yet, of every row one after the
    other how likely each further level was reached, and the scores of the root and the likeliest
    candidates."""
    logits, root_row, chain, offset = source.enter(tokens, lens, prefix_lens, width)
    growth.begin_levels(offset + sum(width for width, _ in plan.frontiers), root_row, chain)
    reached = []
    for level, count in enumerate(plan.children):
        keys = (lens, sharpness, seed, rows)
        rank_by_kernel(growth, logits, *keys, level, count, plan.ranking)
        if level < len(plan.frontiers):
            scores = growth.choose_frontier(level + 1, *plan.frontiers[level])
            reached.append(scores.exp().sum(1, keepdim=True).clamp_max(1.0))
            nodes, visible = growth.enter_rows(offset)
            logits = source.level_logits(nodes, level + 1, visible, offset)
            offset += nodes.shape[1]
    if not plan.selects:
        # the root's is the greatest
        scores = growth.all_scores()
        likeliest = scores.topk(min(plan.max_nodes, scores.shape[1]), dim=1).values
        return torch.cat([*reached, likeliest], dim=1)
    tree = growth.select(plan.max_nodes, max(len(plan.children), _DEEP), (plan.max_nodes,))
    return tree, _placed(lens, tree.depths)


def _run_on(continuations: torch.Tensor) -> torch.Tensor:
    """Continuations that end before their time begin anew."""
    known = (continuations >= 0).sum(2, keepdim=True).clamp_min_(1)
    steps = torch.arange(continuations.shape[2], device=continuations.device)
    return continuations.gather(2, steps % known)


def _lookup_scores(growth: Growth | None, roots: torch.Tensor) -> torch.Tensor:
    """Those of the looked-up nodes; no column where there are none."""
    return roots.new_empty(len(roots), 0) if growth is None else growth.lookup_scores()


def _placed(lens: torch.Tensor, depths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 `[B]` committed rows, all but the roots', and `[B, N]` positions of nodes behind
    them."""
    prefix = lens - 1
    return prefix, prefix.unsqueeze(1) + depths


def _roots_placed(tokens: torch.Tensor, lens: torch.Tensor) -> tuple[torch.Tensor, tuple]:
    """int64 `[B]` roots, and where they are placed."""
    prefix = lens - 1
    positions = prefix.unsqueeze(1)
    return tokens.gather(1, positions).squeeze(1), (prefix, positions)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
