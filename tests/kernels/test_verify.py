"""Greedy and sampled verification: PyTorch and Triton against the reference, "
"the reference by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tree_cases import FAST, INTERPRETED, SHAPES, batches, chain, same
from treespec.kernels import ops, reference

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])
NAN, INF = float("nan"), float("inf")


def one_hot_logits(choices: list[int], vocab_size: int = 5) -> torch.Tensor:
    """Logits [1, N, V] whose argmax at node n is ``choices[n]``."""
    return torch.nn.functional.one_hot(torch.tensor([choices]), vocab_size).float()


def as_lists(verdict) -> tuple:
    return tuple(x[0].tolist() for x in verdict)


class TestByHand:
    """Node 0 has children 1 (token 3) and 2 (token 1); node 2 has children 3 (token 4) and 4 (token
    0).
    """

    tokens = torch.tensor([[9, 3, 1, 4, 0]])
    parents = torch.tensor([[-1, 0, 0, 2, 2]])
    num_nodes = torch.tensor([5])

    def verify(self, choices, implementation):
        inputs = one_hot_logits(choices), self.tokens, self.parents, self.num_nodes
        if implementation == "reference":
            return as_lists(reference.verify_greedy(*inputs))
        return as_lists(ops.verify_greedy(*inputs, implementation=implementation))

    @pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
    @pytest.mark.parametrize("choices, wanted", [
        ([1, 0, 0, 0, 2], ([0, 2, 4, -1, -1], 2, 2)),
        ([1, 0, 4, 3, 0], ([0, 2, 3, -1, -1], 2, 3)),
        ([3, 2, 0, 0, 0], ([0, 1, -1, -1, -1], 1, 2)),
        ([2, 0, 0, 0, 0], ([0, -1, -1, -1, -1], 0, 2)),
        # Node 4 carries token 0, but hangs from node 2.
        ([0, 0, 0, 0, 0], ([0, -1, -1, -1, -1], 0, 0)),
    ])  # fmt: skip
    def test_path(self, implementation, choices, wanted):
        assert self.verify(choices, implementation) == wanted

    @pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
    def test_of_equal_siblings_the_lowest_is_taken(self, implementation):
        inputs = (one_hot_logits([2, 1, 1, 4]), torch.tensor([[0, 2, 2, 1]]), torch.tensor([[-1,
        0, 0, 2]]),
                  torch.tensor([4]))  # fmt: skip
        run = reference.verify_greedy if implementation == "reference" else ops.verify_greedy
        options = {} if implementation == "reference" else {"implementation": implementation}
        assert as_lists(run(*inputs, **options)) == ([0, 1, -1, -1], 1, 1)

    @pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
    def test_ties_go_to_the_lowest_token(self, implementation):
        logits = torch.zeros(1, 2, 3000)
        # 300, 556 and 1324 meet in one lane of the kernel, 2900 in another.
        logits[0, 0, [556, 300, 1324, 2900]] = 7
        run = reference.verify_greedy if implementation == "reference" else ops.verify_greedy
        options = {} if implementation == "reference" else {"implementation": implementation}
        inputs = torch.tensor([[0, 556]]), torch.tensor([[-1, 0]]), torch.tensor([2])
        assert as_lists(run(logits, *inputs, **options)) == ([0, -1], 0, 300)


@FAST
@given(
    batches(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_torch_greedy_is_the_reference(batch, dtype, seed):
    tokens, _parents, _num_nodes = batch
    logits = rough_logits(tokens.shape, 4, seed, dtype)
    same(ops.verify_greedy(logits, *batch), reference.verify_greedy(logits, *batch))


@INTERPRETED
@given(
    batches(max_nodes=7, max_batch=2),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 99),
)
def test_triton_greedy_is_the_reference(batch, dtype, seed):
    logits = rough_logits(batch[0].shape, 4, seed, dtype)
    same(
        ops.verify_greedy(logits, *batch, implementation="triton"),
        reference.verify_greedy(logits, *batch),
    )


def rough_logits(shape, vocab_size, seed, dtype, broken: bool = True) -> torch.Tensor:
    """Whole numbers, so that ties are common; some rows hold NaN, some nothing above -inf."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocab_size, generator=generator).mul(2).round()
    if broken:
        luck = torch.rand(shape, generator=generator)
        logits[luck < 0.1, vocab_size // 2] = NAN
        logits[luck > 0.9] = -INF
    return logits.to(dtype)


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_named_shapes_follow_a_deep_path(shape, implementation):
    """The target follows the last leaf's path as far as it goes."""
    parents = SHAPES[shape]
    size = len(parents)
    tokens = torch.tensor([[node % 7 for node in range(size)]])
    path, node = [], size - 1
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    choices = [0] * size
    for above, below in itertools.pairwise(path):
        choices[above] = below % 7
    inputs = one_hot_logits(choices, 7), tokens, torch.tensor([parents]), torch.tensor([size])
    got = ops.verify_greedy(*inputs, implementation=implementation)
    same(got, reference.verify_greedy(*inputs))
    assert got.accept_length[0] >= (size > 1)


@BOTH
@pytest.mark.parametrize("vocab_size", [7, 1000, 50257, 151936, 262144])
def test_vocabulary_sizes(vocab_size, implementation):
    """The greatest logit sits in the last tokens, in a part of the vocabulary of its own."""
    tokens = torch.tensor([[0, vocab_size - 1, vocab_size - 3]])
    logits = torch.zeros(1, 3, vocab_size, dtype=torch.bfloat16)
    logits[0, 0, vocab_size - 1] = 3
    logits[0, 1, [vocab_size - 2, vocab_size - 3]] = 2
    logits[0, 2] = NAN
    inputs = tokens, torch.tensor([chain(3)]), torch.tensor([3])
    got = ops.verify_greedy(logits, *inputs, implementation=implementation)
    assert as_lists(got) == ([0, 1, 2], 2, -1)


@BOTH
def test_strided_logits_and_int32(implementation):
    logits = one_hot_logits([2, 4, 1]).expand(2, 3, 5)
    strided = torch.full((2, 3, 10), 99.0)[..., ::2]
    strided.copy_(logits)
    tokens = torch.tensor([[0, 2, 4], [0, 2, 3]], dtype=torch.int32)
    parents = torch.tensor([chain(3)] * 2, dtype=torch.int32)
    num_nodes = torch.tensor([3, 2], dtype=torch.int32)
    got = ops.verify_greedy(strided, tokens, parents, num_nodes, implementation=implementation)
    same(got, reference.verify_greedy(logits, tokens, parents, num_nodes))
    assert got.accept_length.tolist() == [2, 1]


@BOTH
def test_nodes_that_do_not_exist_are_not_read(implementation):
    logits = torch.full((2, 3, 5), NAN)
    logits[0, 0] = one_hot_logits([2])[0, 0]
    tokens, parents = torch.tensor([[0, 2, 2]] * 2), torch.tensor([[-1, 0, 0]] * 2)
    got = ops.verify_greedy(
        logits, tokens, parents, torch.tensor([1, 0]), implementation=implementation
    )
    assert got.path.tolist() == [[0, -1, -1], [-1, -1, -1]]
    assert got.bonus_token.tolist() == [2, -1] and got.accept_length.tolist() == [0, 0]


RULES = ["coupled", "target_only", "without_replacement", "traversal"]


def sampled_case(batch, vocab_size, seed):
    """Inputs of ``verify_sampled`` whose draft probabilities are NaN wherever no rule may look."""
    tokens, parents, num_nodes = batch
    generator = torch.Generator().manual_seed(seed)
    draft_probs = torch.randn(*tokens.shape, vocab_size, generator=generator).mul(2).softmax(-1)
    draft_probs[torch.rand(draft_probs.shape, generator=generator) < 0.1] = 0
    for b in range(tokens.shape[0]):
        inner = set(parents[b, 1 : int(num_nodes[b])].tolist())
        for node in range(tokens.shape[1]):
            if node not in inner:
                draft_probs[b, node] = NAN
    depths = reference.node_depths(parents, num_nodes)
    logits = rough_logits(tokens.shape, vocab_size, seed, torch.float32) * 0.7
    # Ties would make top-k and top-p hang on the last bit of a sum.
    logits += torch.rand(logits.shape, generator=generator)
    return logits, draft_probs, depths + seed


warper_settings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 3, 50]),
        "top_p": st.sampled_from([1.0, 0.8, 0.3]),
        "min_p": st.sampled_from([0.0, 0.15]),
    }
)


@FAST
@given(batches(vocab_size=5), st.sampled_from(RULES), warper_settings, st.integers(0, 2**64 - 1))
def test_torch_sampled_is_the_reference(batch, rule, warpers, seed):
    logits, draft_probs, positions = sampled_case(batch, 5, seed % 100)
    options = dict(positions=positions, draft_probs=draft_probs, rule=rule, seed=seed, **warpers)
    same(
        ops.verify_sampled(logits, *batch, **options),
        reference.verify_sampled(logits, *batch, **options),
    )


@INTERPRETED
@given(
    batches(vocab_size=5, max_nodes=6, max_batch=2),
    st.sampled_from(RULES),
    st.integers(0, 2**64 - 1),
)
def test_triton_sampled_is_the_reference(batch, rule, seed):
    logits, draft_probs, positions = sampled_case(batch, 5, seed % 100)
    options = {
        "positions": positions,
        "draft_probs": draft_probs,
        "rule": rule,
        "seed": seed,
        "temperature": 0.8,
    }
    got = ops.verify_sampled(logits, *batch, **options, implementation="triton")
    same(got, reference.verify_sampled(logits, *batch, **options))


ALL_FILTERS = {"top_k": 4, "top_p": 0.8, "min_p": 0.05}


@pytest.mark.parametrize(
    "rule, warpers",
    [
        ("coupled", {"top_k": 3}),
        ("coupled", {"top_p": 0.6}),
        ("coupled", {"min_p": 0.2}),
        ("target_only", ALL_FILTERS),
        ("without_replacement", ALL_FILTERS),
        ("traversal", ALL_FILTERS),
    ],
)
def test_triton_filters_are_the_reference(rule, warpers):
    batch = torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 0, 0]]), torch.tensor([3])
    for seed in (3, 2**63 + 4):
        logits, draft_probs, positions = sampled_case(batch, 6, seed % 97)
        options = dict(
            positions=positions, draft_probs=draft_probs, rule=rule, seed=seed, **warpers
        )
        got = ops.verify_sampled(logits, *batch, **options, implementation="triton")
        same(got, reference.verify_sampled(logits, *batch, **options))


@BOTH
def test_a_vocabulary_of_several_tiles(implementation):
    """2,600 tokens, tokens of all four Philox words on the path."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 2600, generator=generator) * 6
    parents, num_nodes = torch.tensor([chain(4)]), torch.tensor([4])
    positions = torch.tensor([[8, 9, 10, 11]])
    noise = reference.gumbel_noise(5, torch.tensor([2]), positions + 1, 2600)
    choices = (logits + noise).argmax(-1)
    tokens = torch.cat([torch.tensor([[0]]), choices[:, :3]], 1)
    verdict = ops.verify_sampled(
        logits, tokens, parents, num_nodes,
        positions=positions, seed=torch.tensor([5]), rows=torch.tensor([2]),
        implementation=implementation,
    )  # fmt: skip
    assert as_lists(verdict) == ([0, 1, 2, 3], 3, int(choices[0, 3]))


@BOTH
def test_settings_of_each_row_are_its_own(implementation):
    """A batch with a tensor for every setting is its rows verified one by one."""
    batch = torch.tensor([[0, 1]] * 3), torch.tensor([[-1, 0]] * 3), torch.tensor([2, 2, 1])
    logits, draft_probs, positions = sampled_case(batch, 5, 3)
    settings = {
        "temperature": torch.tensor([0.4, 1.0, 2.0]), "top_k": torch.tensor([0, 2, 3]),
        "top_p": torch.tensor([1.0, 0.7, 0.9]), "min_p": torch.tensor([0.1, 0.0, 0.3]),
        "seed": torch.tensor([4, 5, 6]), "rows": torch.tensor([7, 1, 0]),
    }  # fmt: skip
    for rule in ("coupled", "without_replacement"):
        together = ops.verify_sampled(
            logits, *batch, positions=positions, draft_probs=draft_probs, rule=rule,
            implementation=implementation, **settings,
        )  # fmt: skip
        for b in range(3):
            cut = slice(b, b + 1)
            alone = reference.verify_sampled(
                logits[cut], *(x[cut] for x in batch), positions=positions[cut],
                draft_probs=draft_probs[cut], rule=rule, **{name: x[cut] for name,
                x in settings.items()},
            )  # fmt: skip
            same([x[cut] for x in together], alone)


@BOTH
def test_coupled_at_low_temperature_is_greedy(implementation):
    batch = torch.tensor([[0, 2, 4]]), torch.tensor([chain(3)]), torch.tensor([3])
    logits = one_hot_logits([2, 4, 1])
    verdict = ops.verify_sampled(
        logits,
        *batch,
        positions=torch.tensor([[0, 1, 2]]),
        temperature=0.01,
        seed=1,
        implementation=implementation,
    )
    same(verdict, reference.verify_greedy(logits, *batch))


class TestNoiseAtHand:
    """A tree of depth 4 whose tokens are the target's picks along one path."""

    def case(self, filters=False):
        generator = torch.Generator().manual_seed(3)
        parents, num_nodes = torch.tensor([SHAPES["binary_63"][:20]] * 2), torch.tensor([20, 15])
        depths = ops.node_depths(parents, num_nodes)
        keys = {"seed": 6, "rows": torch.tensor([4, 9])}
        positions = torch.tensor([[50], [7]]) + depths
        noise = ops.gumbel_noise(6, keys["rows"], positions[:, :1] + 1 + torch.arange(6), 40)
        logits = torch.randn(2, 20, 40, generator=generator)
        picks = (logits + noise[torch.arange(2)[:, None], depths]).argmax(2)
        tokens = picks.gather(1, parents.clamp(min=0))
        options = {**keys, "positions": positions}
        if filters:
            options |= {"temperature": 0.7, "top_k": 5}
        return (logits, tokens, parents, num_nodes), options, noise

    @pytest.mark.parametrize(
        "implementation, filters", [("torch", False), ("torch", True), ("triton", False)]
    )
    def test_it_is_the_noise_that_would_be_made(self, implementation, filters):
        trees, options, noise = self.case(filters)
        wanted = ops.verify_sampled(*trees, **options)
        got = ops.verify_sampled(*trees, **options, noise=noise, implementation=implementation)
        same(got, wanted)
        assert filters or wanted.accept_length.tolist() == [4, 3]

    def test_the_torch_path_uses_it_and_the_kernel_makes_its_own(self):
        trees, options, noise = self.case()
        wanted = ops.verify_sampled(*trees, **options)
        got = ops.verify_sampled(*trees, **options, noise=-noise)
        assert not torch.equal(got.bonus_token, wanted.bonus_token)
        got = ops.verify_sampled(*trees, **options, noise=-noise, implementation="triton")
        same(got, wanted)

    def test_errors(self):
        trees, options, noise = self.case()
        with pytest.raises(ValueError, match=r"noise must be float32 \[B, D, V\] .*\[2, 6, 39\]"):
            ops.verify_sampled(*trees, **options, noise=noise[..., :-1])
        with pytest.raises(ValueError, match=r"noise must hold positions .* D > 4; got \[2, 4"):
            ops.verify_sampled(*trees, **options, noise=noise[:, :4])


class TestErrors:
    logits = torch.zeros(1, 3, 4)
    tokens = torch.tensor([[0, 1, 2]])
    parents = torch.tensor([[-1, 0, 1]])
    num_nodes = torch.tensor([3])

    @pytest.mark.parametrize("change, message", [
        ({"parents": torch.tensor([[-1, 2, 1]])},
         "parents must name an earlier node .* got 2 for node 1 of row 0"),
        ({"parents": torch.tensor([[-1, 0, -1]])},
         "parents must name an earlier node .* got -1 for node 2"),
        ({"tokens": torch.tensor([[0, 1, 4]])},
         r"tokens must lie in 0\.\.3.*got 4 for node 2 of row 0"),
        ({"tokens": torch.tensor([[0, -1, 1]])}, "tokens must lie .* got -1 for node 1"),
        ({"num_nodes": torch.tensor([4])}, r"num_nodes must lie in 0\.\.3, the capacity N; got 4"),
        ({"num_nodes": torch.tensor([-1])}, "num_nodes must lie .* got -1"),
        ({"num_nodes": torch.tensor([3, 3])},
         r"num_nodes must be .*\[B\] = \[1\].*got int64 \[2\]"),
        ({"tokens": torch.zeros(1, 3)}, "tokens must be int32 or int64"),
        ({"parents": torch.zeros(1, 4, dtype=torch.int64)},
         r"parents must be .*\[1, 3\].*got int64 \[1, 4\]"),
        ({"logits": torch.zeros(1, 3, 4, dtype=torch.int64)}, "logits must be float16"),
        ({"logits": [[0.0]]}, "logits must be .* got list"),
        ({"logits": torch.zeros(1, 257, 4), "tokens": torch.zeros(1, 257, dtype=torch.int64),
              "parents": torch.tensor([chain(257)])}, "parents must hold 1 to 256 nodes"),
    ])  # fmt: skip
    def test_message(self, change, message):
        inputs = {
            "logits": self.logits,
            "tokens": self.tokens,
            "parents": self.parents,
            "num_nodes": self.num_nodes,
        }
        with pytest.raises(ValueError, match=message):
            ops.verify_greedy(**{**inputs, **change})

    def test_implementation(self, monkeypatch):
        inputs = self.logits, self.tokens, self.parents, self.num_nodes
        with pytest.raises(ValueError, match='implementation must be "auto"'):
            ops.verify_greedy(*inputs, implementation="cuda")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="cannot run: tensors are on the CPU"):
                ops.verify_greedy(*inputs, implementation="triton")

    def test_bad_nodes_on_a_device_are_never_accepted(self):
        """A kernel cannot raise: tokens outside V and parents out of order lead nowhere, and
        nothing
        hangs.
        """
        from treespec.kernels.verify import launch_verify_greedy

        logits = one_hot_logits([2, 1, 1, 3])
        verdict = launch_verify_greedy(
            logits, torch.tensor([[0, 7, -1, 2]]), torch.tensor([[0, 0, 5, 3]]), torch.tensor([9])
        )
        assert as_lists(verdict) == ([0, -1, -1, -1], 0, 2)


@pytest.mark.parametrize(
    "filters", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.7}]
)
def test_triton_thresholds_keep_the_tokens_the_reference_keeps(filters, device):
    """Which tokens stay, and the log-sum-exp of those, at four nodes with ties among the logits."""
    from treespec.kernels.reference_acceptance import warped_probs
    from treespec.kernels.vocabulary_cut import launch_cut
    from treespec.kernels.warpers import Warpers

    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(2)).mul(2)
    logits[0, 1] = logits[0, 1].round()
    parents, num_nodes = torch.tensor([chain(4)], device=device), torch.tensor([4], device=device)
    warpers = Warpers(temperature=0.8, **filters)
    draft_probs = torch.full((1, 4, 9), 1 / 9, device=device)
    threshold, logsumexp = launch_cut(logits.to(device), parents, num_nodes, warpers, draft_probs)
    for node in range(4):
        scores = logits[0, node] / 0.8
        kept = scores >= threshold[0, node].item()
        wanted = torch.tensor(warped_probs(logits[0, node].tolist(), *warpers)) > 0
        assert kept.tolist() == wanted.tolist()
        assert logsumexp[0, node].item() == pytest.approx(
            scores[wanted].logsumexp(0).item(), abs=1e-5
        )
