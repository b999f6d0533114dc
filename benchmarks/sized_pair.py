"""Speed at a size nobody bundles: a target of random weights, with the acceptance of a recorded run
replayed.

    python benchmarks/sized_pair.py --output benchmarks/results/NAME.json

A random target has no draft that agrees with it, so agreement is *simulated*: the demo pair is run
for real and the accept length of every round is written down; then a real draft model of the given
size does its real forwards for the sized target, and its answers are replaced so that each round
accepts as many tokens as the recorded one did. Times are real, acceptance is replayed; every row
and the JSON say so. The text is checked against `target.generate` in float32 before any time
counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from compare_peers import environment
from transformers import AutoModelForCausalLM, LlamaConfig

from treespec import BestFirstTree, TreeSpeculator, load_demo_pair
from treespec.demo import load_prompts
from treespec.engine import Engine
from treespec.model import TreeModel
from treespec.policy import Policy, make_policy
from treespec.sources.model import ModelSource


class ReplayedDraft(ModelSource):
    """A draft whose forwards are real and whose agreement is prescribed.

    Args:
        model: the draft.
        max_rows: as in `ModelSource`.
        text: the ids the target writes, prompt included.
        accept_lengths: drafted tokens to get right, a round each; repeated when used up.
    """

    def __init__(
        self, model: TreeModel, max_rows: int, text: list[int], accept_lengths: list[int]
    ) -> None:
        super().__init__(model, max_rows)
        self.text = text
        self.accept_lengths = accept_lengths
        self._round = -1

    def begin(self, sequences, capacity):
        self._round = -1
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


def recorded_accept_lengths(shape: BestFirstTree, new_tokens: int) -> list[int]:
    """Accept lengths, round by round, of the demo pair on the bundled prompts."""
    target, draft, tokenizer = load_demo_pair()
    spec = TreeSpeculator(target, [draft, "ngram"], shape)
    lengths: list[int] = []
    observe = spec._policy.observe
    spec._policy.observe = lambda outcome: (
        lengths.append(len(outcome.paths[0]) - 1),
        observe(outcome),
    )
    for prompt in load_prompts("dev")[::10]:
        spec.generate(
            tokenizer(prompt["prompt"], return_tensors="pt").input_ids[:, -256:],
            max_new_tokens=new_tokens,
        )
    return lengths


def run_engine(
    engine: Engine, spec: TreeSpeculator, ids: torch.Tensor, new_tokens: int
) -> list[int]:
    request, _ = spec._prepare(
        ids, None, None, None, {"max_new_tokens": new_tokens, "do_sample": False}
    )
    for _ in engine.run(request):
        pass
    return engine.rows[0].new_tokens


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--draft-layers", type=int, default=2)
    parser.add_argument("--draft-hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--nodes", type=int, default=8, help="nodes of a tree, root included")
    parser.add_argument("--depth", type=int, default=3, help="drafted levels")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()

    def model(layers: int, hidden: int):
        config = LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            initializer_range=0.05,
        )
        torch.manual_seed(layers)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()

    target, draft = model(args.layers, args.hidden), model(args.draft_layers, args.draft_hidden)
    parameters = sum(p.numel() for p in target.parameters())
    shape = BestFirstTree(args.nodes, args.depth, 3)
    lengths = recorded_accept_lengths(shape, args.new_tokens)
    spec = TreeSpeculator(target, None)
    ids = torch.randint(args.vocabulary, (1, 64), generator=torch.Generator().manual_seed(0))
    # the text to replay is that of the engine's plain decoding: in 16 bits transformers' own may
    # round elsewhere
    plain_engine = Engine(spec._target, [], Policy())
    text = ids[0].tolist() + run_engine(plain_engine, spec, ids, args.new_tokens)
    policy = make_policy(shape, True, False)
    source = ReplayedDraft(TreeModel(draft, "draft"), policy.max_rows, text, lengths)
    tree_engine = Engine(spec._target, [source], policy)
    # random weights make many ties in 16 bits, where trees and single tokens round differently:
    # settle on one text
    for _ in range(args.new_tokens):
        found = ids[0].tolist() + run_engine(tree_engine, spec, ids, args.new_tokens)
        if found == source.text:
            break
        source.text = found

    methods = {
        "transformers plain": lambda: target.generate(
            ids, max_new_tokens=args.new_tokens, do_sample=False
        )[0, 64:].tolist(),
        "treespec plain": lambda: run_engine(plain_engine, spec, ids, args.new_tokens),
        "treespec tree, replayed acceptance": lambda: run_engine(
            tree_engine, spec, ids, args.new_tokens
        ),
    }
    texts = {name: method() for name, method in methods.items()}
    if args.dtype == "float32" and any(
        found != texts["transformers plain"] for found in texts.values()
    ):
        print("error: the text is not identical; nothing is reported", file=sys.stderr)
        return 1
    for method in methods.values():
        method()
    samples: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(args.repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            samples[name].append(time.perf_counter() - start)
    base = statistics.median(samples["transformers plain"])
    rows = []
    for name, seconds in samples.items():
        row = {
            "method": name,
            "ratio": base / statistics.median(seconds),
            "tokens_per_second": args.new_tokens / statistics.median(seconds),
            "identical_to_plain_engine": texts[name] == texts["treespec plain"],
            "acceptance": "replayed from the demo pair, simulated"
            if "replayed" in name
            else "none",
            "seconds": seconds,
        }
        if "replayed" in name:
            stats = tree_engine.stats
            row["tokens_per_round"] = stats.tokens_per_round
            row["round_ms"] = {
                part: getattr(stats, f"{part}_ms") / stats.rounds
                for part in ("draft", "verify", "commit")
            }
            print(f"tokens a round {stats.tokens_per_round:.2f}, ms a round {row['round_ms']}")
        rows.append(row)
        print(f"{name:36s} {row['tokens_per_second']:7.1f} tok/s  {row['ratio']:.2f}x")
    print(
        f"target of {parameters / 1e6:.0f} M random weights; acceptance is replayed, not the "
        "models' own"
    )
    if args.output:
        arguments = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
        }
        record = {
            "environment": environment(),
            "arguments": arguments,
            "parameters": parameters,
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
