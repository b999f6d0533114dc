"""How tokens are picked: logits processors, coupled noise, and the scores by which drafts rank
their children.

Under coupled sampling the token at a position is the argmax of the processed logits plus Gumbel
noise keyed on (seed, row, position), an exact sample (Gumbel-max); a draft ranks its children by
its own logits plus the *same* noise, so the two agree more often than independent draws would
(Daliri et al., 2408.07978). See docs/concepts.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import SuppressTokensLogitsProcessor, TopPLogitsWarper

from treespec.kernels import ops
from treespec.kernels.torch_acceptance import finite_argmax, follow
from treespec.kernels.warpers import Warpers, warped_scores
from treespec.steps import Steps
from treespec.transfer import floats_on_device, on_device
from treespec.tree import Growth, Tree

# Log-probabilities `[B, F, K]` of children to how many of them each node has.
Breadth = Callable[[torch.Tensor], torch.Tensor]

RULES = ("coupled", "target_only", "without_replacement", "traversal")
# Rules that need siblings drawn from the draft, by numbers the target does not share.
REJECTION_RULES = ("without_replacement", "traversal")

# Of the others, a draft minds the one that forbids tokens.
_DRAFT_PROCESSOR = SuppressTokensLogitsProcessor
# Processors that the acceptance ops apply themselves, in transformers' order: attribute, argument.
_WARPERS = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p",
}
# What processors of transformers hold of every row of a batch.
_ROW_STATE = ("prompt_ignore_length", "encoder_input_ids", "generated_ngrams")
_NOISE_BLOCK = 32
_CUT = float("-inf")


class CoupledNoise:
    """Gumbel noise of every row, made in blocks of positions and kept until the text has passed
    them.

    Args:
        seed: non-negative 64-bit integer.
        row_ids: the rows' numbers in the call; they stay a row's own when rows before it finish.
        vocab_size: V.
        device: where the noise is used.
    """

    def __init__(
        self, seed: int, row_ids: list[int], vocab_size: int, device: torch.device
    ) -> None:
        self.seed = seed
        self.row_ids = list(row_ids)
        self.vocab_size = vocab_size
        self.device = device
        self._blocks: dict[tuple[int, int], torch.Tensor] = {}

    def at(self, row: int, position: int) -> torch.Tensor:
        """Float32 `[V]` noise of the token drawn for `position` of active row `row`."""
        row_id, block = self.row_ids[row], position // _NOISE_BLOCK
        key = (row_id, block)
        if key not in self._blocks:
            self._blocks.pop((row_id, block - 2), None)
            start = block * _NOISE_BLOCK
            positions = torch.arange(start, start + _NOISE_BLOCK, device=self.device)[None]
            rows = torch.tensor([row_id], device=self.device)
            self._blocks[key] = ops.gumbel_noise(self.seed, rows, positions, self.vocab_size)[0]
        return self._blocks[key][position % _NOISE_BLOCK]

    def level(self, positions: list[int]) -> torch.Tensor:
        """Float32 `[B, 1, V]`, one position a row."""
        if len(positions) == 1:
            return self.at(0, positions[0]).view(1, 1, -1)
        return torch.stack([self.at(row, position) for row, position in enumerate(positions)])[
            :, None
        ]

    def drop_row(self, row: int) -> None:
        self.row_ids[row] = self.row_ids[-1]
        self.row_ids.pop()


def processor_of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """A processor as one row needs it: without the other rows' share of what it holds of a
    batch."""
    held = {
        name: value[row : row + 1]
        for name in _ROW_STATE
        if (value := _batched(processor, name)) is not None
    }
    # SynthID makes its state of a batch at its first call
    if not held and not hasattr(processor, "_init_state"):
        return processor
    own = copy.copy(processor)
    vars(own).update(held, batch_size=1)
    return own


def warpers_of(processors: LogitsProcessorList) -> dict[str, float] | None:
    """Processors as keyword arguments of `ops.verify_sampled`; None where they say more than
    that."""
    order = list(_WARPERS)
    places = [
        order.index(name) if (name := type(p).__name__) in order else -1 for p in processors
    ]
    if -1 in places or places != sorted(set(places)):
        return None
    if any(
        getattr(p, "min_tokens_to_keep", 1) != 1 or getattr(p, "filter_value", _CUT) != _CUT
        for p in processors
    ):
        return None
    names = [_WARPERS[order[place]] for place in places]
    return {name: getattr(p, name) for name, p in zip(names, processors)}


def _batched(processor: LogitsProcessor, name: str) -> torch.Tensor | list | None:
    value = getattr(processor, name, None)
    return value if isinstance(value, (torch.Tensor, list)) else None


class TokenPicker:
    """The target's choice of a token and the drafts' ranking of theirs.

    Args:
        processors: everything `target.generate` would apply, warpers included, in its order.
        do_sample: draw tokens rather than take the likeliest.
        seed: of the noise; ignored without `do_sample`.
        row_ids: numbers of the rows.
        vocab_size: V of the target.
        device: of the logits.
        rule: one of `RULES`.
        implementation: of the ops: "auto", "triton" or "torch".

    Attributes:
        warpers: the processors as arguments of `ops.verify_sampled`, or None where one of them is
            not among these and the walk must ask it at every node.
        steps: calls functions of tensors, on a GPU perhaps as graphs.
        lens: int64 `[B]` on the device, committed tokens of every row, if they are at hand.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        do_sample: bool,
        seed: int,
        row_ids: list[int],
        vocab_size: int,
        device: torch.device,
        rule: str = "coupled",
        implementation: str = "auto",
    ) -> None:
        self.warpers = warpers_of(processors)
        self.implementation = implementation
        self.steps = Steps()
        self.lens: torch.Tensor | None = None
        self._keys_on_device: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sharpness: tuple[float, torch.Tensor] | None = None
        self._processors = [
            LogitsProcessorList(processor_of_row(p, row) for p in processors) for row in row_ids
        ]
        self.do_sample = do_sample
        self.rule = rule
        self.vocab_size = vocab_size
        self.noise = CoupledNoise(seed, row_ids, vocab_size, device) if do_sample else None
        self._draft_processors = [p for p in processors if isinstance(p, _DRAFT_PROCESSOR)]
        # no sort of the vocabulary for a guess
        self._draft_warpers = {
            _WARPERS[type(p).__name__]: getattr(p, _WARPERS[type(p).__name__])
            for p in processors
            if type(p).__name__ in _WARPERS and not isinstance(p, TopPLogitsWarper)
        }

    def pick(
        self, ids: torch.Tensor, logits: torch.Tensor, row: int, position: int
    ) -> tuple[int, torch.Tensor]:
        """The target's token for `position`.

        Args:
            ids: int64 `[1, L]`, all tokens before it, as `target.generate` would hold them.
            logits: `[V]` the target's logits there.
            row: active row.
            position: unpadded position of the token.

        Returns:
            The token and the processed scores `[1, V]`.

        Raises:
            ValueError: if no token can be picked because scores are NaN or all -inf.
        """
        scores = self.scores(ids, logits, row)
        chosen = scores if self.noise is None else scores + self.noise.at(row, position)
        value, index = chosen.max(-1)
        token, best = int(index), float(value)
        if best != best or best == _CUT:
            raise self.cannot_pick(scores, position)
        return token, scores

    def scores(self, ids: torch.Tensor, logits: torch.Tensor, row: int) -> torch.Tensor:
        """The processed scores `[1, V]` of `logits` `[V]` after `ids` `[1, L]`."""
        if not self._processors[row]:
            return logits[None]
        # a copy: processors may write in place
        return self._processors[row](ids, logits[None].to(torch.float32, copy=True))

    @staticmethod
    def cannot_pick(scores: torch.Tensor, position: int) -> ValueError:
        what = "NaN" if bool(scores.isnan().any()) else "all -inf"
        return ValueError(
            f"target: no token can be picked at position {position}: its scores are {what}"
        )

    @property
    def in_one_op(self) -> bool:
        """Whether the ops know all processors, so that one of them decides a whole batch."""
        return self.warpers is not None and (self.do_sample or not self.warpers)

    def follows(self, tree: Tree) -> bool:
        """Whether `follow` serves this batch of trees, whose processors are all known `warpers`."""
        drawn = self.rejects and tree.draft_probs is not None
        return self.implementation == "torch" and not drawn

    def follow(
        self, logits: torch.Tensor, tree: Tree, lens: list[int]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The paths of `verify` and the tokens picked at their nodes, the last the bonus token;
        with noise that is kept from round to round, and without tensors where lists are wanted.

        Args:
            logits: `[B, N, V]` of the target.
            tree: the trees.
            lens: committed tokens of every row, the root among them.
        """
        assert self.warpers is not None
        warpers, levels = Warpers(**self.warpers), count()

        def choose(rows: Sequence[int], nodes: Sequence[int]) -> list[int]:
            level = next(levels)
            scores = torch.stack([logits[row, node] for row, node in zip(rows, nodes)])
            scores = scores if scores.dtype == torch.float64 else scores.float()
            if self.warpers:
                scores = warped_scores(scores, warpers)
            if self.noise is not None:
                at = self.noise.at
                scores = scores + torch.stack([at(row, lens[row] + level) for row in rows])
            return finite_argmax(scores.numpy(force=True)).tolist()

        return follow(choose, tree.tokens, tree.parents, tree.num_nodes)

    def verify(self, logits: torch.Tensor, tree: Tree, lens: list[int]) -> ops.Verdict:
        """The verdict on a batch of trees whose processors are all known `warpers`.

        Args:
            logits: `[B, N, V]` of the target.
            tree: the trees.
            lens: committed tokens of every row, the root among them.
        """
        trees = (logits, tree.tokens, tree.parents, tree.num_nodes)
        if self.noise is None:
            return ops.verify_greedy(*trees, implementation=self.implementation)
        assert self.warpers is not None
        roots = on_device(lens, logits.device) if self.lens is None else self.lens
        rejects = self.rejects and tree.draft_probs is not None
        return ops.verify_sampled(
            *trees,
            positions=roots.unsqueeze(1) - 1 + tree.depths,
            draft_probs=tree.draft_probs if rejects else None,
            # a bare root is decided by the shared noise, which no rejection has used
            rule=self.rule if rejects else "coupled",
            drafting="sampled" if rejects else None,
            implementation=self.implementation,
            **self._keys(logits.device),
            **self.warpers,
        )

    def told(self, logits: torch.Tensor, tree: Tree, lens: list[int]) -> torch.Tensor:
        """int64 `[B, 3 + 2N]` or more: accept length and bonus token by `verify`, the number of
        nodes, the path, the tokens that the path carries, with a draft its rows of the path's
        nodes, and of more nodes than the root whether some node's logits are NaN."""
        if not self.steps.captured or self.rejects:
            verdict = self.verify(logits, tree, lens)
            return _told(verdict, logits, tree.tokens, tree.num_nodes, tree.draft_rows)
        trees = (logits, tree.tokens, tree.parents, tree.num_nodes, tree.draft_rows)
        if self.noise is None:
            return self.steps(_told_greedy, *trees)
        keys = self._keys(logits.device)
        return self.steps(
            _told_sampled,
            *trees,
            tree.depths,
            self.lens,
            keys["seed"],
            keys["rows"],
            tuple(self.warpers.items()),
        )

    @property
    def rejects(self) -> bool:
        """Whether siblings are drawn from the draft and accepted by a rejection rule."""
        return self.noise is not None and self.rule in REJECTION_RULES

    @property
    def knows_pick(self) -> bool:
        """Whether a draft sees the noise that decides the target's pick."""
        return self.noise is not None and self.rule == "coupled"

    def likeliest(
        self, logits: torch.Tensor, parent_scores: torch.Tensor, num_children: int
    ) -> torch.Tensor:
        """Log-probabilities `[B, F, K]` of a draft's likeliest tokens after nodes of cumulative
        log-probabilities `parent_scores` `[B, F]`, noise aside."""
        scores = ops.draft_children(
            self._processed(logits),
            parent_scores,
            num_children,
            implementation=self.implementation,
            **self._draft_warpers,
        )[1]
        return scores - parent_scores.unsqueeze(2)

    def children(
        self,
        logits: torch.Tensor,
        parent_scores: torch.Tensor,
        num_children: int,
        positions: list[int],
        sharpness: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens a draft finds likeliest to be the ones the target will pick.

        Args:
            logits: `[B, F, V]` of the draft.
            parent_scores: float32 `[B, F]` cumulative log-probabilities of the nodes they follow.
            num_children: K.
            positions: unpadded position of the tokens, one a row (a level has one position).
            sharpness: factor on the scores: a pick is more certain than a draw
                (docs/design/003-auto.md).

        Returns:
            tokens: int64 `[B, F, K]`, -1 where there is no child.
            scores: float32 `[B, F, K]` cumulative log-probabilities, -inf where there is no child.
        """
        logits = self._processed(logits)
        known: dict = {}
        if self.knows_pick:
            places = on_device(positions, logits.device).unsqueeze(1)
            known = self._keys(logits.device)
            known |= {"drafting": "coupled", "positions": places.expand(-1, logits.shape[1])}
            if self.implementation == "torch":
                known["noise"] = self.noise.level(positions)[..., : logits.shape[2]]
        return ops.draft_children(
            logits,
            parent_scores,
            num_children,
            sharpness=sharpness,
            implementation=self.implementation,
            **self._draft_warpers,
            **known,
        )

    def ranking(self, breadth: Breadth | None) -> Ranking | None:
        """How a draft's tokens are ranked, in constants; None where its processors hold more."""
        if self._draft_processors:
            return None
        return Ranking(breadth, self.vocab_size, tuple(self._draft_warpers.items()))

    def keys_of_rank(self, sharpness: float, device: torch.device) -> tuple:
        """What else ranks them, on the device: float32 `[B]` factors on their scores, and int64
        `[B]` seeds and rows of the noise that a draft knows, twice None where it knows none."""
        if self._sharpness is None or self._sharpness[0] != sharpness:
            factors = np.full(len(self._processors), sharpness)
            self._sharpness = sharpness, floats_on_device(factors, device)
        factors = self._sharpness[1]
        if not self.knows_pick:
            return factors, None, None
        return factors, *self._keys(device).values()

    def rank(
        self,
        growth: Growth,
        logits: torch.Tensor,
        level: int,
        count: int,
        positions: list[int],
        sharpness: float,
        breadth: Breadth | None,
    ) -> None:
        """Gives a growth's frontier its likeliest children, as `children` finds them.

        Args:
            growth: whose frontier.
            logits: `[B, F, V]` of the draft.
            level: of the frontier.
            count: K, most children.
            positions: committed tokens of every row.
            sharpness: factor on the scores.
            breadth: tells the children of every node, as `Policy.breadth` does; None for K.
        """
        ranking = self.ranking(breadth) if self.steps.captured else None
        if ranking is not None:
            keys = self.keys_of_rank(sharpness, logits.device)
            self.steps.on(growth, rank_by_kernel, logits, self.lens, *keys, level, count, ranking)
            return
        places = [length + level for length in positions]
        parents = growth.frontier_scores
        tokens, scores = self.children(logits, parents, count, places, sharpness)
        growth.expand(tokens, kept_children(scores, parents, breadth))

    def draw(
        self,
        logits: torch.Tensor,
        parent_scores: torch.Tensor,
        counts: torch.Tensor,
        num_children: int,
        nodes: torch.Tensor,
        lens: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Children drawn from a draft without replacement, in the order drawn.

        Args:
            logits: `[B, F, V]` of the draft.
            parent_scores: float32 `[B, F]`.
            counts: int64 `[B, F]` children of each node, at most `num_children`.
            num_children: K.
            nodes: int64 `[B, F]`, numbers of the nodes, each used once a round.
            lens: committed tokens of every row; they tell rounds apart.

        Returns:
            tokens and scores as of `children`, and float32 `[B, F, V]` what was drawn from.
        """
        logits = self._processed(logits)
        roots = on_device(lens, logits.device) - 1
        tokens, scores = ops.draft_children(
            logits,
            parent_scores,
            num_children,
            drafting="sampled",
            breadth=counts,
            nodes=nodes,
            root_positions=roots,
            implementation=self.implementation,
            **self._keys(logits.device),
            **self._draft_warpers,
        )
        flat = warped_scores(logits.float().flatten(0, 1), Warpers(**self._draft_warpers))
        probs = flat.softmax(-1).view_as(logits)
        return tokens, scores, F.pad(probs, (0, self.vocab_size - probs.shape[2]))

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        """A draft's logits `[B, F, V]` without tokens that the target does not have or may not
        pick."""
        # a draft's vocabulary may be padded further than the target's
        logits = logits[..., : self.vocab_size]
        for processor in self._draft_processors:
            flat = logits.to(torch.float32, copy=True).flatten(0, 1)
            logits = processor(None, flat).view_as(logits)
        return logits

    def _keys(self, device: torch.device) -> dict:
        """What the noise is keyed on, as arguments of `ops.draft_children`."""
        if self._keys_on_device is None:
            seed, rows = self.noise.seed, self.noise.row_ids
            if self.implementation != "torch":
                # a graph's constants would tie it to one seed
                seed = on_device([seed - (seed >> 63 << 64)] * len(rows), device)
            self._keys_on_device = seed, on_device(rows, device)
        seed, rows = self._keys_on_device
        return {"seed": seed, "rows": rows}

    def drop_row(self, row: int) -> None:
        self._keys_on_device = self._sharpness = None
        self._processors[row] = self._processors[-1]
        self._processors.pop()
        if self.noise is not None:
            self.noise.drop_row(row)


@dataclass(frozen=True)
class Ranking:
    """How a draft's tokens are ranked: children of a node, tokens that count, and warpers."""

    breadth: Breadth | None
    vocab_size: int
    warpers: tuple[tuple[str, float], ...]


def kept_children(
    scores: torch.Tensor, parents: torch.Tensor, breadth: Breadth | None
) -> torch.Tensor:
    """Scores `[B, F, K]` of children, -inf for those beyond the breadth of their parent, of scores
    `[B, F]`."""
    if breadth is None:
        return scores
    counts = breadth(scores - parents.unsqueeze(2))
    order = torch.arange(scores.shape[2], device=scores.device)
    return scores.masked_fill(order >= counts.unsqueeze(2), _CUT)


# Of tensors and constants alone, so that graphs can be captured of them.
def rank_by_kernel(
    growth: Growth,
    logits: torch.Tensor,
    lens: torch.Tensor,
    sharpness: torch.Tensor,
    seed: torch.Tensor | None,
    rows: torch.Tensor | None,
    level: int,
    count: int,
    ranking: Ranking,
) -> None:
    """`TokenPicker.rank` without anything from the host."""
    logits, parents = logits[..., : ranking.vocab_size], growth.frontier_scores
    known = {}
    if seed is not None:
        places = (lens.unsqueeze(1) + level).expand(-1, logits.shape[1])
        known = {"drafting": "coupled", "positions": places, "seed": seed, "rows": rows}
    tokens, scores = ops.draft_children(
        logits,
        parents,
        count,
        sharpness=sharpness,
        implementation="triton",
        **dict(ranking.warpers),
        **known,
    )
    growth.expand(tokens, kept_children(scores, parents, ranking.breadth))


def _told(
    verdict: ops.Verdict,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    num_nodes: torch.Tensor,
    draft_rows: torch.Tensor | None,
) -> torch.Tensor:
    path = verdict.path.clamp_min(0)
    heads = torch.stack([verdict.accept_length, verdict.bonus_token, num_nodes], dim=1)
    told = [heads, verdict.path, tokens.gather(1, path)]
    if draft_rows is not None:
        told.append(draft_rows.gather(1, path))
    if tokens.shape[1] > 1:
        told.append(logits[..., 0].isnan().any(1, keepdim=True).long())
    return torch.cat(told, dim=1)


def _told_greedy(logits, tokens, parents, num_nodes, draft_rows) -> torch.Tensor:
    verdict = ops.verify_greedy(logits, tokens, parents, num_nodes, implementation="triton")
    return _told(verdict, logits, tokens, num_nodes, draft_rows)


def _told_sampled(
    logits, tokens, parents, num_nodes, draft_rows, depths, lens, seed, rows, warpers
) -> torch.Tensor:
    verdict = ops.verify_sampled(
        logits,
        tokens,
        parents,
        num_nodes,
        positions=lens.unsqueeze(1) - 1 + depths,
        seed=seed,
        rows=rows,
        implementation="triton",
        **dict(warpers),
    )
    return _told(verdict, logits, tokens, num_nodes, draft_rows)
