"""Speed at a size nobody bundles: random weights, with the acceptance of a recorded run replayed.

A random target has no draft that agrees with it, so agreement is *simulated*: the bundled pair is
run for real with a shape, and the accept length of every round is written down; then a draft of the
given size does its real forwards for the sized target, and its answers are replaced so that each
round accepts as many tokens as the recorded one did. Times are real, acceptance is replayed, and
every table and file says so.

Only shapes whose trees have a fixed size can be replayed: what pruning, the adaptive rules and
`auto` do depends on a draft's own probabilities. Lookup in random text says nothing about lookup.
"""

from __future__ import annotations

import torch

from treespec.bench.methods import (
    REFERENCE_SHAPES,
    Continuation,
    Method,
    Run,
    Task,
    our_method,
    stats_of,
    transformers_methods,
)
from treespec.bench.models import Pair
from treespec.engine import Engine
from treespec.model import TreeModel
from treespec.policy import make_policy
from treespec.shapes import Shape
from treespec.sources.model import ModelSource

ACCEPTANCE = "simulated: replayed from a run of the bundled pair, not the models' own"
_FIXED_SIZE = ("linear", "unpruned", "best-first")
_RECORDED_PROMPTS = 6
_MOST_SETTLINGS = 64


class ReplayedDraft(ModelSource):
    """A draft whose forwards are real and whose agreement is prescribed.

    Args:
        model: the draft.
        max_rows: as in `ModelSource`.
        accept_lengths: drafted tokens to get right, a round each; repeated when used up.
    """

    def __init__(self, model: TreeModel, max_rows: int, accept_lengths: list[int]) -> None:
        super().__init__(model, max_rows)
        self.accept_lengths = accept_lengths
        self.text: list[int] = []
        self.first_round = 0

    @property
    def can_be_captured(self) -> bool:
        """What is prescribed comes from the host, level by level."""
        return False

    def begin(self, sequences, capacity):
        self._round = self.first_round - 1
        super().begin(sequences, capacity)

    def root_logits(self, sequences):
        self._round += 1
        self._length = sequences.lens[0]
        logits, *rest = super().root_logits(sequences)
        return self._prescribe(logits, 0), *rest

    def level_logits(self, tokens, depth, visible, offset):
        return self._prescribe(super().level_logits(tokens, depth, visible, offset), depth)

    def _prescribe(self, logits: torch.Tensor, depth: int) -> torch.Tensor:
        """The likeliest node of a level is the one on the path: it gets the right child, or a wrong
        one."""
        place = self._length + depth
        right = self.text[place] if place < len(self.text) else 0
        wanted = self.accept_lengths[self._round % len(self.accept_lengths)]
        logits = logits.float().clamp(-1.0, 1.0)
        logits[..., right] = -20.0
        if depth < wanted:
            logits[0, 0, right] = 20.0
        return logits


def record_accept_lengths(shape: Shape, new_tokens: int, device: torch.device) -> list[int]:
    """Accept lengths, round by round, of the bundled pair with a shape on the bundled prompts."""
    from treespec import TreeSpeculator, load_demo_pair
    from treespec.demo import load_prompts, spread_prompts

    target, draft, tokenizer = load_demo_pair(device=device)
    target.generation_config.eos_token_id = None
    spec = TreeSpeculator(target, draft, shape)
    lengths: list[int] = []
    observe = spec._policy.observe

    def listen(outcome) -> None:
        lengths.append(len(outcome.paths[0]) - 1)
        observe(outcome)

    spec._policy.observe = listen  # type: ignore[method-assign]
    for prompt in spread_prompts(load_prompts("dev"), _RECORDED_PROMPTS):
        ids = tokenizer(prompt["prompt"], return_tensors="pt").input_ids[:, -256:]
        spec.generate(ids.to(device), max_new_tokens=min(new_tokens, 200), do_sample=False)
    return lengths


class SizedRow:
    """A shape of ours on a sized pair, its acceptance replayed.

    Args:
        pair: models of random weights.
        shape: a shape whose trees have a fixed size.
        new_tokens: of the recorded run.
    """

    def __init__(self, pair: Pair, shape: Shape, new_tokens: int) -> None:
        self.pair, self.shape, self.new_tokens = pair, shape, new_tokens

    def make(self) -> Run:
        """Records the acceptance and builds the engine that replays it."""
        from treespec import TreeSpeculator

        policy = make_policy(self.shape, True, False)
        lengths = record_accept_lengths(self.shape, self.new_tokens, self.pair.target.device)
        graphs = self.pair.cuda_graphs
        model = TreeModel(self.pair.draft, "draft", graphs=graphs is not False)
        self.source = ReplayedDraft(model, policy.max_rows, lengths)
        self.spec = TreeSpeculator(self.pair.target, None, cuda_graphs=graphs)
        self.spec._engine = Engine(self.spec._target, [self.source], policy)
        return self._run

    def _run(self, task: Task) -> Continuation:
        ids = self.spec.generate(task.input_ids, **task.generate_options())
        stats = self.spec.stats
        rounds = sum(row.rounds for row in stats.per_row)
        return Continuation(ids[:, task.input_ids.shape[1] :].cpu(), rounds, stats_of(stats))

    def prepare(self, method: Method, task: Task, oracle: torch.Tensor) -> None:
        """Settles which text is replayed. Random weights make ties, which 16 bits round one way in
        a tree and another way alone; in float32 the oracle's text stays."""
        run = method.run
        prompt = task.input_ids[0].tolist()
        self.source.first_round = int(task.id.rpartition("-")[2]) * 17
        self.source.text = prompt + oracle[0].tolist()
        for _ in range(0 if self.pair.exact else _MOST_SETTLINGS):
            found = prompt + run(task).ids[0].tolist()
            if found == self.source.text:
                return
            self.source.text = found


def _sized_method(pair: Pair, name: str, family: str, shape: Shape, new_tokens: int) -> Method:
    row = SizedRow(pair, shape, new_tokens)
    full = f"treespec {name} (draft)"
    method = Method(full, row.make, family, True, shape, "draft")
    method.prepare = lambda task, oracle: row.prepare(method, task, oracle)
    return method


def sized_methods(
    pair: Pair, more: list[tuple[str, Shape | str]], new_tokens: int
) -> tuple[list[Method], dict[str, str]]:
    """Rows on a sized pair, and what is left out and why."""
    theirs = [method for method in transformers_methods(pair) if method.family == "plain"]
    theirs += [method for method in transformers_methods(pair) if "static cache" in method.name]
    methods = [*theirs, our_method(pair, "plain", "engine", None, None)]
    not_run = {
        "assisted generation, lookup and other libraries": "random weights agree on nothing"
    }
    for name, family, shape in [*REFERENCE_SHAPES, *((name, "own", s) for name, s in more)]:
        if family in _FIXED_SIZE:
            assert isinstance(shape, Shape)
            methods.append(_sized_method(pair, name, family, shape, new_tokens))
        else:
            reason = "its trees depend on a draft's own probabilities, which are not replayed"
            not_run[f"treespec {name}"] = reason
    return methods, not_run
