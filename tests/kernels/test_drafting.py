"""Children of a frontier: PyTorch and Triton against the reference, the reference by hand; drawn
children by their distribution, and all draftings together with the rules that judge them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_model import CHAIN, TREE, chi_square_p, decode, exact_distribution, grow, tables
from tree_cases import FAST, INTERPRETED
from treespec.kernels import ops, reference

ALL = pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])
DRAFTINGS = ("top", "coupled", "sampled")
INF, NAN = float("inf"), float("nan")
FALSE_ALARM = 1e-6


def run(implementation, *inputs, **options):
    if implementation == "reference":
        return reference.draft_children(*inputs, **options)
    return ops.draft_children(*inputs, **options, implementation=implementation)


def same_children(got, wanted) -> None:
    """Equal tokens, absent children and dtypes; log-probabilities to a few float32 roundings."""
    assert torch.equal(got[0].cpu(), wanted[0])
    torch.testing.assert_close(got[1].cpu(), wanted[1], rtol=1e-6, atol=4e-6)


def noise_keys(batch, frontier, seed=3):
    """Everything "coupled" and "sampled" ask for."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "seed": seed,
        "rows": torch.randint(0, 2**31, (batch,), generator=generator),
        "positions": torch.randint(0, 2**20, (batch, frontier), generator=generator),
        "nodes": torch.randint(0, 256, (batch, frontier), generator=generator),
        "root_positions": torch.randint(0, 2**20, (batch,), generator=generator),
    }


@ALL
class TestByHand:
    def children(self, implementation, logits, count, **options):
        tokens, logprobs = run(
            implementation, torch.tensor([[logits]]), torch.tensor([[-1.0]]), count, **options
        )
        return tokens[0, 0].tolist(), logprobs[0, 0].exp()

    def test_the_likeliest_come_first_and_ties_go_to_the_lower_token(self, implementation):
        logits = torch.tensor([1.0, 4.0, 2.0, 4.0, 1.0, 1.0]).log().tolist()
        tokens, probs = self.children(implementation, logits, 4)
        assert tokens == [1, 3, 2, 0]
        torch.testing.assert_close(probs, torch.tensor([4.0, 4.0, 2.0, 1.0]) / 13 / math.e)

    def test_more_children_than_tokens(self, implementation):
        tokens, probs = self.children(implementation, [0.0, 1.0, -INF], 5)
        assert tokens == [1, 0, -1, -1, -1] and probs[2:].tolist() == [0, 0, 0]

    def test_temperature_filters_and_sharpness(self, implementation):
        """Squared by the temperature, cut to three, then squared again."""
        logits = torch.tensor([3.0, 2.0, 1.0, 1.5]).log().tolist()
        tokens, probs = self.children(
            implementation, logits, 4, temperature=0.5, top_k=3, sharpness=2.0
        )
        weights = torch.tensor([3.0, 2.0, 1.5]) ** 4
        assert tokens == [0, 1, 3, -1]
        torch.testing.assert_close(probs[:3] * math.e, weights / weights.sum())

    def test_a_probability_float32_does_not_hold_is_none(self, implementation):
        tokens, _ = self.children(implementation, [0.0, -104.0, -102.0, -1e30], 4)
        assert tokens == [0, 2, -1, -1]

    @pytest.mark.parametrize("bad", [[NAN, 1.0, 2.0], [INF, 1.0, 2.0], [-INF, -INF, -INF]])
    def test_a_draft_that_has_turned_bad_proposes_nothing(self, implementation, bad):
        assert self.children(implementation, bad, 2)[0] == [-1, -1]

    def test_pruned_and_absent_parents_have_no_children(self, implementation):
        parents = torch.tensor([[-1.0, -2.5, -INF, NAN, -2.0]])
        tokens, logprobs = run(
            implementation, torch.zeros(1, 5, 3), parents, 2, min_logprob=-2.0,
            breadth=torch.tensor([[5, 2, 2, 2, 1]]),
        )  # fmt: skip
        assert tokens[0].tolist() == [[0, 1], [-1, -1], [-1, -1], [-1, -1], [0, -1]]
        wanted = [[-1.0, -1.0], [-INF] * 2, [-INF] * 2, [-INF] * 2, [-2.0, -INF]]
        torch.testing.assert_close(logprobs[0], torch.tensor(wanted) - math.log(3))


@st.composite
def frontiers(draw, filters: bool):
    """Few distinct logits, so that ties are common; parents and tokens missing; broken rows."""
    batch, frontier = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    vocab_size = draw(st.integers(1, 12))
    value = st.sampled_from([0.0, -0.0, 0.5, 2.0, -1.0, 7.0, -INF, -200.0])
    rare = st.sampled_from([0.0] * 30 + [NAN, INF])
    logits = [
        [[draw(value) for _ in range(vocab_size)] for _ in range(frontier)] for _ in range(batch)
    ]
    for row in logits:
        for line in row:
            line[0] += draw(rare)
    parent = st.sampled_from([0.0, -0.5, -3.0, -INF, NAN])
    cum_logprobs = [[draw(parent) for _ in range(frontier)] for _ in range(batch)]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    options = noise_keys(batch, frontier, draw(st.integers(0, 2**63 - 1)))
    options["drafting"] = draw(st.sampled_from(DRAFTINGS))
    by_row = torch.tensor([0.5, 1.0, 1.5])[:batch]
    options["sharpness"] = draw(st.sampled_from([1.0, 1.5, by_row]))
    options["min_logprob"] = draw(st.sampled_from([-INF, -1.0]))
    breadth = [[draw(st.integers(0, 5)) for _ in range(frontier)] for _ in range(batch)]
    options["breadth"] = draw(st.sampled_from([None, torch.tensor(breadth)]))
    if filters:
        options["temperature"] = draw(st.sampled_from([0.7, 2.0]))
        options["top_k"] = torch.tensor([draw(st.integers(0, 4)) for _ in range(batch)])
        options["top_p"] = draw(st.sampled_from([1.0, 0.8]))
        options["min_p"] = draw(st.sampled_from([0.0, 0.1]))
    inputs = torch.tensor(logits, dtype=dtype), torch.tensor(cum_logprobs)
    return inputs, draw(st.integers(1, 9)), options


@FAST
@given(frontiers(filters=True))
def test_torch_is_the_reference(case):
    (logits, parents), count, options = case
    wanted = reference.draft_children(logits, parents, count, **options)
    same_children(ops.draft_children(logits, parents, count, **options), wanted)


@pytest.mark.parametrize("distinct", [5, 60, None], ids=lambda n: f"{n} distinct")
@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_torch_looks_at_what_top_k_leaves(drafting, distinct):
    """With ties at the end of the top k, which pass together, and broken rows."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(3, 4, 120, generator=generator) * 3
    if distinct:
        logits = (logits * distinct / 20).round() * 20 / distinct
    logits[0, 1, 7], logits[1, 2, 5] = NAN, INF
    logits[2, 0] = -INF
    parents = -torch.rand(3, 4, generator=generator)
    keys = noise_keys(3, 4)
    keys["positions"] = keys["positions"][:, :1].expand(-1, 4)
    for more in ({}, {"temperature": 0.7}, {"top_p": 0.8}, {"min_p": 0.05, "temperature": 1.5}):
        options = {**keys, "drafting": drafting, "top_k": 6, "sharpness": 1.3, **more}
        wanted = reference.draft_children(logits, parents, 9, **options)
        same_children(ops.draft_children(logits, parents, 9, **options), wanted)
        if drafting != "coupled":
            continue
        rows, places = options["rows"], options["positions"][:, :1]
        noise = ops.gumbel_noise(options["seed"], rows, places, 120)
        given_noise = ops.draft_children(logits, parents, 9, **options, noise=noise)
        same_children(given_noise, wanted)


@INTERPRETED
@given(frontiers(filters=False))
def test_triton_is_the_reference(case):
    (logits, parents), count, options = case
    wanted = reference.draft_children(logits, parents, count, **options)
    same_children(run("triton", logits, parents, count, **options), wanted)


@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_triton_filters_are_the_reference(drafting):
    logits = torch.randn(2, 1, 40, generator=torch.Generator().manual_seed(2)) * 3
    options = {
        **noise_keys(2, 1), "drafting": drafting, "temperature": torch.tensor([0.7, 1.5]),
        "top_k": 9, "min_p": 0.01, "sharpness": torch.tensor([0.6, 1.3]),
    }  # fmt: skip
    wanted = reference.draft_children(logits, torch.zeros(2, 1), 12, **options)
    same_children(run("triton", logits, torch.zeros(2, 1), 12, **options), wanted)
    assert (wanted[0] == -1).any()


@BOTH
@pytest.mark.parametrize("vocab_size", [7, 1000, 50257, 151936, 262144])
def test_vocabulary_sizes(vocab_size, implementation, device):
    """Coarse logits, so that many are equal, in a view with strides; the last token is a child."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(1, 2, vocab_size + 5, generator=generator).bfloat16()[:, 1:, :vocab_size]
    logits[0, 0, -1] = 50.0
    inputs = logits.to(device), torch.full((1, 1), -1.0, device=device)
    wanted = reference.draft_children(logits, torch.full((1, 1), -1.0), 6)
    assert wanted[0][0, 0, 0] == vocab_size - 1
    same_children(run(implementation, *inputs, 6), wanted)


@pytest.mark.parametrize("drafting", ["coupled", "sampled"])
def test_noise_of_several_parts(drafting, device):
    """9,000 tokens are three parts of the kernel; 64 children."""
    logits = torch.randn(1, 1, 9000, generator=torch.Generator().manual_seed(1))
    options = {**noise_keys(1, 1), "drafting": drafting}
    wanted = reference.draft_children(logits, torch.zeros(1, 1), 64, **options)
    placed = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    for implementation in ("torch", "triton"):
        got = run(implementation, logits.to(device), torch.zeros(1, 1, device=device), 64, **placed)
        same_children(got, wanted)


class TestNoise:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(4))
    parents = torch.zeros(2, 3)
    keys = noise_keys(2, 3)

    def children(self, drafting, **change):
        options = {**self.keys, "drafting": drafting, **change}
        return ops.draft_children(self.logits, self.parents, 5, **options)

    def test_coupled_children_know_the_noise_of_their_positions(self):
        shared = ops.gumbel_noise(3, self.keys["rows"], self.keys["positions"], 50)
        got = self.children("coupled")
        same_children(got, ops.draft_children(self.logits + shared, self.parents, 5))
        same_children(self.children("coupled", noise=shared), got)
        assert not torch.equal(self.children("coupled", noise=-shared)[0], got[0])

    def test_one_noise_for_a_whole_level(self):
        positions = torch.tensor([[8], [9]])
        shared = ops.gumbel_noise(3, self.keys["rows"], positions, 50)
        wanted = self.children("coupled", positions=positions.expand(-1, 3))
        same_children(self.children("coupled", noise=shared), wanted)

    def test_drawn_children_have_the_stream_that_rejection_rules_leave_them(self):
        stream = 4 * self.keys["root_positions"] + 1
        own = ops.gumbel_noise(3, self.keys["rows"], self.keys["nodes"], 50, stream=stream)
        tokens, logprobs = self.children("sampled")
        assert torch.equal(tokens, (self.logits + own).topk(5).indices)
        plain = self.logits.log_softmax(2).gather(2, tokens)
        torch.testing.assert_close(logprobs, plain)
        same_children(self.children("sampled", noise=own), (tokens, logprobs))

    @BOTH
    def test_a_draft_equal_to_the_target_is_always_right(self, implementation):
        """The first coupled child is the token the target picks at that very position."""
        keys = {"seed": 9, "rows": torch.tensor([5, 6])}
        roots = torch.tensor([[30], [41]])
        tokens, _ = ops.draft_children(
            self.logits[:, :1], torch.zeros(2, 1), 1, drafting="coupled", temperature=0.8,
            positions=roots + 1, implementation=implementation, **keys,
        )  # fmt: skip
        verdict = ops.verify_sampled(
            self.logits[:, :2], torch.cat([torch.zeros(2, 1), tokens[:, 0]], 1).long(),
            torch.tensor([[-1, 0]] * 2), torch.tensor([2, 2]),
            positions=torch.cat([roots, roots + 1], 1), drafting="coupled", temperature=0.8, **keys,
        )  # fmt: skip
        assert verdict.accept_length.tolist() == [1, 1]


def grow_by_op(draft, states, shape, drafting, seed, rows, positions, temperature):
    """``sampling_model.grow`` with the children of ``draft_children``."""
    batch, size = states.shape[0], len(shape)
    tokens = torch.zeros(batch, size, dtype=torch.long)
    node_states = states[:, None].repeat(1, size)
    draft_probs = torch.full((batch, size, 4), NAN)
    depth = [0] * size
    for node in range(size):
        children = [child for child in range(1, size) if shape[child] == node]
        if not children:
            continue
        logits = draft[node_states[:, node]]
        draft_probs[:, node] = (logits / temperature).softmax(1)
        found, _ = ops.draft_children(
            logits[:, None], torch.zeros(batch, 1), len(children), drafting=drafting,
            temperature=temperature, seed=seed, rows=rows,
            positions=positions[:, None] + depth[node] + 1,
            nodes=torch.full((batch, 1), node), root_positions=positions,
        )  # fmt: skip
        for place, child in enumerate(children):
            depth[child] = depth[node] + 1
            tokens[:, child] = found[:, 0, place]
            node_states[:, child] = node_states[:, node] % 4 * 4 + found[:, 0, place]
    return tokens, node_states, draft_probs


class TestLossless:
    @pytest.mark.parametrize("rule, drafting, shape", [
        ("coupled", "coupled", TREE), ("traversal", "sampled", TREE),
        ("without_replacement", "sampled", CHAIN),
    ])  # fmt: skip
    def test_text_is_that_of_the_tested_drafter(self, rule, drafting, shape):
        text, rate = decode(shape, rule, drafting, 3000, 6, drafter=grow_by_op)
        wanted, wanted_rate = decode(shape, rule, drafting, 3000, 6, drafter=grow)
        assert torch.equal(text, wanted) and rate == wanted_rate

    def test_drawn_trees_leave_the_target_distribution(self):
        outcomes, _ = decode(TREE, "traversal", "sampled", 60_000, 7, drafter=grow_by_op)
        assert chi_square_p(outcomes, exact_distribution(tables()[0])) > FALSE_ALARM

    @pytest.mark.parametrize("order, fits", [((0, 1), True), ((1, 0), False)])
    def test_pairs_are_drawn_without_replacement(self, order, fits):
        """P(i, then j) = q(i) q(j) / (1 - q(i)); turned round it is another distribution."""
        probs = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
        rows = torch.arange(40_000)
        zeros = torch.zeros(len(rows), 1)
        tokens, _ = ops.draft_children(
            probs.log().expand(len(rows), 1, 4), zeros, 2, drafting="sampled", seed=8, rows=rows,
            nodes=zeros.long(), root_positions=zeros[:, 0].long(),
        )  # fmt: skip
        pairs = tokens[:, 0, order[0]] * 4 + tokens[:, 0, order[1]]
        exact = probs[:, None] * probs / (1 - probs[:, None])
        p_value = chi_square_p(pairs, exact.fill_diagonal_(0).flatten())
        assert (p_value > FALSE_ALARM) == fits


@pytest.mark.parametrize("change, message", [
    ({"logits": torch.zeros(3, 4)}, r"logits must be .*\[B, F, V\]"),
    ({"logits": torch.zeros(1, 2, 0)}, "logits must have no empty vocabulary"),
    ({"cum_logprobs": torch.zeros(1, 3)}, r"cum_logprobs must be .*\[B, F\] = \[1, 2\]"),
    ({"num_children": 0}, r"num_children must be an int in 1\.\.64; got 0"),
    ({"num_children": 65}, r"num_children must be an int in 1\.\.64; got 65"),
    ({"drafting": "best"}, "drafting must be one of top, coupled, sampled; got 'best'"),
    ({"sharpness": 0.0}, "sharpness must be positive and finite; got 0.0"),
    ({"sharpness": torch.ones(3)}, r"sharpness must be .* \[B\] = \[1\]"),
    ({"min_logprob": NAN}, "min_logprob must be a number; got nan"),
    ({"breadth": torch.zeros(1, 2)}, "breadth must be int32 or int64"),
    ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
    ({"drafting": "coupled"}, "seed must be given with drafting 'coupled'; got None"),
    ({"drafting": "coupled", "seed": 1}, "positions must be given with drafting 'coupled'"),
    ({"drafting": "sampled", "seed": 1, "positions": torch.zeros(1, 2).long()},
     "nodes must be given with drafting 'sampled'"),
    ({"drafting": "sampled", "seed": 1, "nodes": torch.zeros(1, 2).long()},
     "root_positions must be given with drafting 'sampled'"),
    ({"drafting": "sampled", "seed": 1, "nodes": torch.zeros(1, 2).long(),
      "root_positions": torch.zeros(2).long()}, r"root_positions must be .*\[B\] = \[1\]"),
    ({"drafting": "coupled", "seed": -1, "positions": torch.zeros(1, 2).long()},
     "seed must be an int in"),
    ({"drafting": "coupled", "seed": 1, "positions": torch.zeros(1, 3).long()},
     r"positions must be .*\[B, F\] = \[1, 2\]"),
    ({"drafting": "coupled", "seed": 1, "positions": torch.zeros(1, 2).long(),
      "rows": torch.zeros(2).long()}, r"rows must be .*\[B\] = \[1\]"),
    ({"drafting": "coupled", "seed": 1, "positions": torch.zeros(1, 2).long(),
      "noise": torch.zeros(1, 2, 6)}, r"noise must be float32 \[B, F, V\] or, coupled"),
    ({"drafting": "sampled", "seed": 1, "nodes": torch.zeros(1, 2).long(),
      "root_positions": torch.zeros(1).long(), "noise": torch.zeros(1, 1, 5)},
     r"noise must be .* = \[1, 2, 5\]"),
])  # fmt: skip
def test_errors(change, message):
    inputs = {
        "logits": torch.zeros(1, 2, 5),
        "cum_logprobs": torch.zeros(1, 2),
        "num_children": 2,
    }
    with pytest.raises(ValueError, match=message):
        ops.draft_children(**{**inputs, **change})
