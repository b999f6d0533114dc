"""Draft sources: a causal LM, lookups in the text itself, or anything that follows
`DraftSource`."""

from treespec.sources.base import DraftSource, OneShotSource, Proposal, Sequences, StepwiseSource
from treespec.sources.ngram import NgramSource

__all__ = ["DraftSource", "NgramSource", "OneShotSource", "Proposal", "Sequences", "StepwiseSource"]
