"""Shapes: defaults, validation with messages that name the field, and the conventions of the
reference experiment.
"""

from __future__ import annotations

import dataclasses
import math

import pytest

from treespec import AdaptiveTree, BestFirstTree, Chain, FixedTree
from treespec.policy import AdaptivePolicy, ShapePolicy, make_policy
from treespec.shapes import MAX_DEPTH, MAX_NODES, Shape, resolve_shape

SHAPES = (Chain, FixedTree, BestFirstTree, AdaptiveTree)


def integer_fields():
    bounds = {
        Chain: {"length": (1, MAX_DEPTH)},
        FixedTree: {
            "depth": (1, MAX_DEPTH),
            "branching": (1, 64),
            "max_nodes": (2, MAX_NODES),
            "first_branching": (1, 64),
        },
        BestFirstTree: {"max_nodes": (2, MAX_NODES), "depth": (1, MAX_DEPTH), "width": (1, 64)},
        AdaptiveTree: {
            "max_depth": (1, MAX_DEPTH),
            "base_depth": (1, 8),
            "max_branching": (1, 64),
            "branching": (1, 3),
            "window": (1, 1000),
            "max_nodes": (2, MAX_NODES),
        },
    }
    return [
        (shape, name, low, high)
        for shape, names in bounds.items()
        for name, (low, high) in names.items()
    ]


# What another field must be for a field to take its extremes.
NEIGHBOURS = {
    (FixedTree, "depth"): {"max_nodes": MAX_NODES},
    (FixedTree, "max_nodes"): {"depth": 1},
    (AdaptiveTree, "max_depth"): {"base_depth": 1},
    (AdaptiveTree, "max_branching"): {"branching": 1},
}

FRACTIONS = [(FixedTree, "prune_threshold")] + [
    (AdaptiveTree, name)
    for name in (
        "high_confidence",
        "low_confidence",
        "stop_threshold",
        "deepen_threshold",
        "target_acceptance",
        "tolerance",
        "threshold_step",
    )
]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_frozen_and_compare_by_value(shape):
    made = shape()
    assert made == shape() and hash(made) == hash(shape())
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.max_nodes = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(made)[0].name, 3)


def test_defaults_are_the_documented_ones():
    assert Chain() == Chain(length=6)
    assert FixedTree() == FixedTree(
        depth=7, branching=2, prune_threshold=0.05, max_nodes=64, first_branching=None
    )
    assert BestFirstTree() == BestFirstTree(max_nodes=32, depth=8, width=8)


@pytest.mark.parametrize(("shape", "name", "low", "high"), integer_fields())
def test_integers_have_bounds_that_are_named(shape, name, low, high):
    for value in (low - 1, -1, high + 1):
        with pytest.raises(
            ValueError,
            match=rf"^{shape.__name__}: {name} must be between {low} and {high}; got {value}$",
        ):
            shape(**{name: value})
    for value in (2.0, 2.5, "2", True):
        with pytest.raises(
            TypeError, match=rf"^{shape.__name__}: {name} must be an integer; got {value!r}$"
        ):
            shape(**{name: value})
    fitting = NEIGHBOURS.get((shape, name), {})
    for value in (low, high):
        assert getattr(shape(**{**fitting, name: value}), name) == value


@pytest.mark.parametrize(("shape", "name"), FRACTIONS)
def test_fractions_have_bounds_that_are_named(shape, name):
    for value in (-0.01, 1.0, 1, 7, math.nan):
        with pytest.raises(
            ValueError, match=rf"^{shape.__name__}: {name} must be in \[0, 1\); got {value}$"
        ):
            shape(**{name: value})
    for value in ("0.1", None, False):
        with pytest.raises(
            TypeError, match=rf"^{shape.__name__}: {name} must be a number; got {value!r}$"
        ):
            shape(**{name: value})


def test_relations_between_fields():
    with pytest.raises(
        ValueError, match=r"^FixedTree: max_nodes must be at least depth \+ 1 = 9; got 8$"
    ):
        FixedTree(depth=8, max_nodes=8)
    assert FixedTree(depth=8, max_nodes=9).max_nodes == 9
    with pytest.raises(
        ValueError, match=r"low_confidence must not exceed high_confidence; got 0.5 > 0.4$"
    ):
        AdaptiveTree(low_confidence=0.5, high_confidence=0.4)
    with pytest.raises(ValueError, match=r"base_depth must be between 1 and 4; got 5$"):
        AdaptiveTree(max_depth=4)
    with pytest.raises(ValueError, match=r"branching must be between 1 and 3; got 4$"):
        AdaptiveTree(branching=4)


def test_resolve_shape():
    assert resolve_shape("auto") is None
    for shape in SHAPES:
        assert resolve_shape(shape()) == shape()
    with pytest.raises(
        ValueError,
        match=r"^tree must be \"auto\" or a shape such as BestFirstTree\(\); got 'tree'$",
    ):
        resolve_shape("tree")
    for wrong in (3, None, Chain, [Chain()]):
        with pytest.raises(
            TypeError, match=r'^tree must be "auto", Chain, .* or AdaptiveTree; got \w+$'
        ):
            resolve_shape(wrong)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_prints_its_fields_and_has_depth_and_cap(shape):
    made = shape()
    assert isinstance(made, Shape)
    assert str(made).startswith(f"{shape.__name__}(") and all(
        f"{field.name}={getattr(made, field.name)}" in str(made)
        for field in dataclasses.fields(made)
    )
    assert made.depth >= 1 and made.max_nodes >= 2


def test_a_chain_is_its_length_of_single_children():
    shape = Chain(length=6)
    assert (shape.depth, shape.max_nodes) == (6, 7)
    policy = make_policy(shape, with_model=True, with_lookup=False)
    assert [policy.children(level) for level in range(6)] == [1] * 6
    assert [policy.frontier(level)[0] for level in range(1, 6)] == [1] * 5


def test_conventions_of_the_reference_experiment():
    """Its D=7, B=2 has 8 drafted levels whose first has one child; 0 as threshold is no pruning."""
    policy = make_policy(
        FixedTree(depth=8, branching=2, first_branching=1), with_model=True, with_lookup=False
    )
    assert isinstance(policy, ShapePolicy) and policy.max_depth == 8
    assert [policy.children(level) for level in range(8)] == [1] + [2] * 7
    # levels 1, 2, 3, ... of a tree whose root has one child and every other node two
    assert [policy.frontier(level)[0] for level in range(1, 5)] == [1, 2, 4, 8]
    assert policy.frontier(3)[1] == pytest.approx(math.log(0.05))

    free = make_policy(FixedTree(depth=8, prune_threshold=0.0), with_model=True, with_lookup=False)
    assert free.frontier(3) == (8, -math.inf)
    assert free.children(0) == 2


def test_no_level_expands_more_nodes_than_the_cap():
    policy = make_policy(
        FixedTree(depth=10, branching=3, max_nodes=32), with_model=True, with_lookup=False
    )
    assert max(policy.frontier(level)[0] for level in range(1, 10)) == 32


def test_adaptive_defaults_are_dynatrees():
    shape = AdaptiveTree()
    assert (shape.base_depth, shape.max_depth) == (5, 8)
    assert (shape.branching, shape.max_branching) == (2, 3)
    assert (shape.high_confidence, shape.low_confidence) == (0.9, 0.4)
    assert (shape.stop_threshold, shape.deepen_threshold) == (0.1, 0.5)
    assert (shape.target_acceptance, shape.tolerance, shape.threshold_step, shape.window) == (
        0.7,
        0.1,
        0.05,
        10,
    )
    assert isinstance(make_policy(shape, with_model=True, with_lookup=False), AdaptivePolicy)
