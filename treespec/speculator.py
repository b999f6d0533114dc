"""`TreeSpeculator`: the text a target model would write, by drafting trees and verifying each in
one forward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StopStringCriteria,
)

from treespec import checks
from treespec.auto import AutoPolicy
from treespec.engine import Engine, Request
from treespec.many import generate_many
from treespec.model import TreeModel
from treespec.policy import Policy, make_policy
from treespec.rehearsal import Rehearsal
from treespec.sampling import REJECTION_RULES, RULES, TokenPicker
from treespec.shapes import Shape, resolve_shape
from treespec.sources import DraftSource, NgramSource, OneShotSource
from treespec.sources.model import ModelSource
from treespec.stats import SpeculationStats

if TYPE_CHECKING:
    from treespec.report import ProfileReport, SelfCheckReport


class TreeSpeculator:
    """Makes a causal LM generate the very same text faster.

    Args:
        target: any decoder-only causal LM of transformers whose type can verify a tree; it is
            checked at once on a small tree, and left exactly as it was after every call.
        draft: a smaller causal LM with the same vocabulary; "ngram" (lookup in the text so far); a
            `DraftSource`; a list of these, merged into one tree; or None, plain decoding in the
            same engine.
        tree: "auto" (decides by measured cost and running acceptance, and adds lookup by itself) or
            a shape: `Chain`, `FixedTree`, `BestFirstTree`, `AdaptiveTree`, which use exactly the
                sources given.
        tokenizer: needed for `stop_strings` and for text prompts.
        sampling: rule by which drafted tokens are accepted when sampling; all keep the target's
            distribution. "coupled": same seed, same text, with or without speculation.
            "target_only": the same text, but the draft does not know the noise; for comparison.
            "without_replacement" and "traversal": rejection of tokens drawn from a draft model, so
            no lookups; other text at the same seed. Greedy text is the same under all.
        attention: "triton" (an error where it cannot run), "torch", or "auto": Triton on a GPU,
            PyTorch elsewhere.
        cuda_graphs: "auto" captures the forwards of a round, and what is between them, as CUDA
            graphs on a GPU where that can be; with True it is an error where it cannot; False does
            not.
        capture: "auto" records small forwards on a CPU as straight lines of ATen calls; False turns
            that off.

    Raises:
        TypeError, ValueError, NotImplementedError: if a model or an option does not fit; the
            message names the argument.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | str | DraftSource | list | tuple | None = None,
        tree: str | Shape = "auto",
        tokenizer: Any = None,
        sampling: str = "coupled",
        attention: str = "auto",
        cuda_graphs: bool | str = "auto",
        capture: bool | str = "auto",
    ) -> None:
        self.shape = resolve_shape(tree)
        checks.option("sampling", sampling, RULES)
        checks.option("attention", attention, ("auto", "torch", "triton"))
        checks.option("cuda_graphs", cuda_graphs, ("auto", True, False))
        checks.option("capture", capture, ("auto", True, False))
        checks.causal_lm("target", target)
        checks.on_gpu(cuda_graphs, target)
        parts = checks.draft_parts(draft, target)
        if sampling in REJECTION_RULES:
            checks.drawn_drafts(sampling, parts)
        self.target = target
        self.tokenizer = tokenizer
        self.sampling = sampling
        ready = partial(
            TreeModel,
            record=capture is not False,
            attention=attention,
            graphs=cuda_graphs is not False,
        )
        self._target = ready(target, "target")
        self._model = None
        lookups: list[OneShotSource] = []
        for part in parts:
            if isinstance(part, PreTrainedModel):
                self._model = ready(part, "draft")
            elif isinstance(part, str):
                lookups.append(NgramSource())
            else:
                lookups.append(part)
        if cuda_graphs is True:
            for model in filter(None, (self._target, self._model)):
                checks.graphs_captured(model)
        self.lookup_added = (
            self.shape is None
            and self._model is not None
            and not lookups
            and sampling not in REJECTION_RULES
        )
        if self.lookup_added:
            lookups.append(NgramSource())
        self._policy = self._make_policy(bool(lookups))
        sources: list[DraftSource] = list(lookups)
        if self._model is not None:
            sources.append(ModelSource(self._model, self._policy.max_rows))
        self._engine = Engine(self._target, sources, self._policy)

    def _make_policy(self, with_lookup: bool) -> Policy:
        if self._model is None and not with_lookup:
            return Policy()
        if self.shape is not None:
            return make_policy(self.shape, self._model is not None, with_lookup)
        from treespec import tuner
        from treespec.auto import AutoPolicy

        costs, origin = tuner.load(tuner.make_key(self._target, self._model))
        share = self._model.num_parameters / self._target.num_parameters if self._model else 0.0
        return AutoPolicy(self._model is not None, with_lookup, costs, origin, share)

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        seed: int | torch.Generator | None = None,
        streamer: Any = None,
        stop_strings: str | list[str] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Generates like `target.generate`, token for token.

        Args:
            input_ids: int `[B, W]`, left-padded.
            attention_mask: `[B, W]` zeros over the padding.
            seed: of sampling; an int, a `torch.Generator`, or None to draw one from torch's global
                generator.
            streamer: of transformers; batch 1.
            stop_strings: end a row after any of these; needs `tokenizer`.
            **kwargs: as in `target.generate`: `max_new_tokens`, `do_sample`, `temperature`,
                `generation_config`, `logits_processor`, `stopping_criteria`, `eos_token_id`,
                `num_return_sequences`, ...

        Returns:
            int64 `[B, W + new]`, padded like transformers', or a `GenerateDecoderOnlyOutput` with
            `return_dict_in_generate` (its `past_key_values` is None).

        Raises:
            TypeError, ValueError, NotImplementedError: before any work; the message names the
                argument.
        """
        request, config = self._prepare(input_ids, attention_mask, seed, stop_strings, kwargs)
        return self._run(request, config, streamer)

    def stream(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        seed: int | torch.Generator | None = None,
        stop_strings: str | list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[torch.Tensor]:
        """Generates for one prompt, yielding every round's new ids as a 1-D LongTensor.

        Arguments and errors are those of `generate`; what was yielded stays valid whatever happens
        later.
        """
        request, _ = self._prepare(input_ids, attention_mask, seed, stop_strings, kwargs)
        if len(request.prompts) != 1:
            raise ValueError(
                f"input_ids must hold one prompt to stream; got {len(request.prompts)}"
            )
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[torch.Tensor]:
        for news in self._engine.run(request):
            for _, tokens in news:
                yield torch.tensor(tokens, dtype=torch.long, device=request.input_ids.device)

    def generate_many(
        self,
        prompts: list,
        max_new_tokens: int | None = None,
        max_batch: int = 32,
        progress: bool = False,
        output: str | Path | None = None,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """Generates for many prompts, in batches of similar length.

        Args:
            prompts: texts (with `tokenizer`), lists of ids, or 1-D tensors.
            max_new_tokens: as in `generate`.
            max_batch: most prompts at a time.
            progress: show a progress bar.
            output: a JSON-lines file that every finished prompt is appended to; prompts it already
                holds are not generated again, so an interrupted run can be resumed.
            **kwargs: as in `generate`. A `seed` is used for every batch, with a row's place in its
                batch.

        Returns:
            Per prompt, in the order given, a 1-D LongTensor of prompt and new ids without padding.
        """
        if max_new_tokens is not None:
            kwargs["max_new_tokens"] = max_new_tokens
        return generate_many(self, prompts, max_batch, progress, output, kwargs)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor=None,
        stopping_criteria=None,
        generation_config=None,
        *,
        seed: int | torch.Generator | None = None,
        **model_kwargs: Any,
    ):
        """What `target.generate(..., custom_generate=spec)` calls.

        An argument named here that `generate` prepares too, such as `attention_mask`, would be
        passed twice.
        """
        checks.seed(seed)
        if model is not self.target:
            raise ValueError(
                "custom_generate must be called on the target this speculator was made for"
            )
        past = model_kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            raise NotImplementedError("past_key_values: a filled cache cannot be continued")
        request = self._request(
            input_ids,
            model_kwargs.get("attention_mask"),
            logits_processor,
            stopping_criteria,
            generation_config,
            seed,
        )
        return self._run(request, generation_config, None)

    def _prepare(
        self, input_ids, attention_mask, seed, stop_strings, kwargs
    ) -> tuple[Request, Any]:
        """Lets transformers work out configuration, processors and stopping rules, then stops short
        of decoding."""
        checks.input_ids(input_ids, self._target.vocab_size)
        checks.attention_mask(attention_mask, input_ids)
        checks.seed(seed)
        checks.generate_options(kwargs, self.target.generation_config)
        input_ids = input_ids.to(self._target.device, torch.long)
        tokenizer = kwargs.pop("tokenizer", None) or self.tokenizer
        stop_strings = checks.stop_strings(
            stop_strings, kwargs, self.target.generation_config, tokenizer
        )
        if stop_strings is not None:
            criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
            criteria.append(StopStringCriteria(tokenizer, stop_strings))
            kwargs["stopping_criteria"] = criteria
        kept: dict[str, Any] = {}

        def keep(model, input_ids, **prepared):
            kept.update(prepared, input_ids=input_ids)

        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask.to(self._target.device)
        with checks.stop_strings_hidden(self.target.generation_config, kwargs):
            self.target.generate(input_ids, custom_generate=keep, **kwargs)
        config = kept["generation_config"]
        return (
            self._request(
                kept["input_ids"],
                kept.get("attention_mask"),
                kept["logits_processor"],
                kept["stopping_criteria"],
                config,
                seed,
            ),
            config,
        )

    def _request(self, input_ids, attention_mask, processors, criteria, config, seed) -> Request:
        checks.generation_config(config)
        width = input_ids.shape[1]
        limit = self._target.position_limit
        budget = config.max_length - width
        prompts = checks.unpadded(input_ids, attention_mask)
        longest = max(len(prompt) for prompt in prompts)
        if limit is not None and longest + budget > limit:
            raise ValueError(
                f"max_new_tokens: the prompt's {longest} tokens and {budget} new ones exceed the "
                "target's "
                f"{limit} positions"
            )
        if self._model is not None and self._model.position_limit is not None:
            if longest + budget > self._model.position_limit:
                raise ValueError(
                    f"max_new_tokens: the prompt's {longest} tokens and {budget} new ones exceed "
                    "the draft's "
                    f"{self._model.position_limit} positions"
                )
        stop = [
            c for c in criteria or [] if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))
        ]
        picker = TokenPicker(
            processors if processors is not None else [],
            config.do_sample,
            checks.resolve_seed(seed) if config.do_sample else 0,
            list(range(len(prompts))),
            self._target.vocab_size,
            self._target.device,
            self.sampling,
            self._target.implementation,
        )
        if picker.rejects:
            checks.known_warpers(self.sampling, picker.warpers, processors)
        return Request(
            input_ids=input_ids,
            prompts=prompts,
            max_new_tokens=budget,
            picker=picker,
            eos_ids=checks.eos_ids(criteria),
            # every criterion is asked, also after one has said yes: they may keep count
            stop=(lambda ids: sum(bool(torch.as_tensor(c(ids, None)).all()) for c in stop) > 0)
            if stop
            else None,
            pad_id=config.pad_token_id if config.pad_token_id is not None else 0,
            keep_scores=bool(
                config.return_dict_in_generate and (config.output_scores or config.output_logits)
            ),
        )

    def _run(self, request: Request, config, streamer):
        if streamer is not None:
            if len(request.prompts) > 1:
                raise ValueError(f"streamer works with one sequence; got {len(request.prompts)}")
            streamer.put(request.input_ids.cpu())
        for news in self._engine.run(request):
            if streamer is not None:
                for _, tokens in news:
                    streamer.put(torch.tensor(tokens))
        if streamer is not None:
            streamer.end()
        return self._output(request, config)

    def _output(self, request: Request, config):
        rows = self._engine.rows
        longest = max(len(row.new_tokens) for row in rows)
        new = torch.full((len(rows), longest), request.pad_id, dtype=torch.long)
        for row in rows:
            new[row.index, : len(row.new_tokens)] = torch.tensor(row.new_tokens, dtype=torch.long)
        sequences = torch.cat([request.input_ids, new.to(request.input_ids.device)], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_by_step([row.scores for row in rows], longest)
            if config.output_scores
            else None,
            logits=_by_step([row.logits for row in rows], longest)
            if config.output_logits
            else None,
        )

    @property
    def stats(self) -> SpeculationStats:
        """Counts and times of the last call."""
        return self._engine.stats

    def explain(self) -> str:
        """Which attention path, which shape and why, capture state, and what this model type
        allows."""
        from treespec.report import explain

        return explain(self)

    def self_check(
        self, input_ids: torch.Tensor, num_nodes: int = 32, new_tokens: int = 32, seed: int = 0
    ) -> SelfCheckReport:
        """Proves losslessness on this very pair: logits of random trees against sequences, and
        tokens at T = 0 and T > 0.

        Args:
            input_ids: int `[1, W]`, a prompt.
            num_nodes: nodes of the random trees.
            new_tokens: tokens generated for the token checks.
            seed: of the trees and of sampling.

        Returns:
            A `SelfCheckReport`; `passed` says whether all held.
        """
        from treespec.report import self_check

        return self_check(self, input_ids, num_nodes, new_tokens, seed)

    def prefill(self, input_ids: torch.Tensor) -> int:
        """Forwards a common beginning once; later prompts that begin with it skip that part of
        their prefill.

        A second call replaces the first prefix, `reset` forgets it.

        Args:
            input_ids: int `[1, W]`.

        Returns:
            Tokens that are kept, W.
        """
        checks.input_ids(input_ids, self._target.vocab_size)
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"input_ids must be one prefix [1, W]; got shape {list(input_ids.shape)}"
            )
        ids = input_ids.to(self._target.device, torch.long)
        for model in filter(None, (self._target, self._model)):
            model.keep_prefix(ids)
        return ids.shape[1]

    def warmup(
        self, batch_sizes: list[int] | int = 1, max_length: int = 512, **options: Any
    ) -> None:
        """Allocates buffers and records the usual forwards, so that the first real call is not the
        slow one.

        Args:
            batch_sizes: rows of the calls to come.
            max_length: tokens of their longest sequence, prompt and new ones together.
            **options: how they pick tokens, as `generate` takes it: `do_sample`, `temperature` and
                so on. It matters on a GPU, where verdicts are captured too; greedy when left out.
        """
        sizes = [batch_sizes] if isinstance(batch_sizes, int) else list(batch_sizes)
        if not sizes or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in sizes):
            raise ValueError(f"batch_sizes must be positive integers; got {batch_sizes!r}")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 16:
            raise ValueError(f"max_length must be an integer of at least 16; got {max_length!r}")
        for name in {"max_new_tokens", "seed"} & options.keys():
            raise TypeError(f"{name}: warmup() writes nothing that is kept; leave this out")
        new_tokens = min(64, max_length // 2)
        options = {"do_sample": False} | options | {"max_new_tokens": new_tokens}
        # a repeating prompt makes lookups and wide trees occur
        pattern = torch.arange(max_length - new_tokens) % 7 % self._target.vocab_size
        for batch in sizes:
            ids = pattern.repeat(batch, 1)
            self._run_warm(ids, options)
            if not isinstance(self._policy, AutoPolicy):
                continue
            if self._engine.steps.captured:
                self._rehearse(ids, options)
            else:
                from treespec import tuner

                tuner.record(self, batch)

    def _run_warm(self, ids: torch.Tensor, options: dict[str, Any]) -> None:
        """Writes a text to its end, whatever it says, recording what it makes for the first
        time."""
        # the pattern may hold the padding token
        mask, seed = torch.ones_like(ids), 0 if options["do_sample"] else None
        request, _ = self._prepare(ids, mask, seed, None, dict(options))
        request.eos_ids, request.stop, request.warming = frozenset(), None, True
        for _ in self._engine.run(request):
            pass

    def _rehearse(self, ids: torch.Tensor, options: dict[str, Any]) -> None:
        """Makes rounds of every shape that "auto" may choose, until they are captured."""
        rehearsal = Rehearsal(self._model is not None, bool(self._engine.lookups))
        self._engine.policy = rehearsal
        try:
            while rehearsal.left:
                self._run_warm(ids, options)
        finally:
            self._engine.policy = self._policy
        if len(ids) == 1:
            self._policy.prepared()

    def profile(self, input_ids: torch.Tensor, max_new_tokens: int = 64) -> ProfileReport:
        """Measures where the time of a round goes on this machine, for this prompt.

        Args:
            input_ids: int `[B, W]`, a typical prompt.
            max_new_tokens: tokens generated for the measurement.

        Returns:
            A `ProfileReport`: milliseconds a round by part, and of one verification by nodes and
                one draft level by width.
        """
        from treespec.report import profile

        return profile(self, input_ids, max_new_tokens)

    def reset(self) -> None:
        """Releases the buffers and forgets what was learnt about costs and acceptance."""
        self._target.release()
        if self._model is not None:
            self._model.release()
        self._policy = self._make_policy(bool(self._engine.lookups))
        self._engine = Engine(self._target, self._engine.sources, self._policy)


def _by_step(rows: list[list[torch.Tensor]], steps: int) -> tuple[torch.Tensor, ...]:
    """Per generated position `[B, V]`; a row that had finished repeats its last entry."""
    return tuple(torch.cat([row[min(step, len(row) - 1)] for row in rows]) for step in range(steps))
