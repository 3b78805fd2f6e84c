"""Key-Value Means by its authors' code and by memkit, on the same tensors and in one run.

    git clone https://github.com/featherless-ai/KVM-paper
    python tools/versus_authors.py --repo KVM-paper

Both are held against PyTorch's fused full attention: prefill of a long text, forward and backward of a shorter one,
with 256 slots and with 16·√t, batch 1, 6 heads of 64 channels, chunks of 256, a window of 2. Of theirs, only what
begins with queries, keys, values and merge weights is timed (`SequenceMixer.forward_prefill`), without its output
projection, eagerly, as it runs on a CPU. The three take turns; medians count. Before anything is timed, their outputs
are compared with ours; their values are rounded to bfloat16 where slots are read, so that much they may differ. Nothing
of theirs is kept here.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import memkit
from memkit.interop.kvm_paper.policies import model_spec
from memkit.lm.mixers import AttentionMixerSpec

HEADS, HEAD_WIDTH = 6, 64
CONFIGS = {
    "256 slots": "configs/prolong/120M/kvm_wd.yaml",
    "16·√t slots": "configs/prolong/120M/kvm_sqrt16_wd.yaml",
}
"""The authors' configurations, in their repository."""

BFLOAT16_STEP = 2.0**-8
"""What rounding to bfloat16 changes of a number, at most, as a share of it."""

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Sides:
    """Three ways from queries, keys, values [1, h, t, d] and merge weights [1, h, t] to outputs [1, h, t, d]."""

    full: Call
    authors: Call
    ours: Call

    @classmethod
    def of(cls, repo: Path, config: str) -> Sides:
        """Full attention; and what a configuration of the authors' is by their code and by ours."""
        fields = yaml.safe_load((repo / config).read_text(encoding="utf-8"))["model"]
        fields |= {"hidden_size": HEADS * HEAD_WIDTH, "num_attention_heads": HEADS, "rope_partial_dim": HEAD_WIDTH // 2}
        fields.setdefault("kvm_apply_merge_gate_to_appends", 0)  # left out, releases of their code differ in it
        mixer_spec = model_spec(fields).layers.default
        assert isinstance(mixer_spec, AttentionMixerSpec)  # as their KVM configurations say
        policy = mixer_spec.policy.build()
        parameters = memkit.PolicyParameters(policy, HEADS, HEAD_WIDTH)
        mixer = _authors_mixer(repo, fields)

        def full(queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
            return scaled_dot_product_attention(queries, keys, values, is_causal=True)

        def authors(queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
            joined = mixer.forward_prefill(queries, keys, values, weights.unsqueeze(-1), None, None, None)
            return joined.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        def ours(queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
            return memkit.attend(policy, queries, keys, values, weights=weights, parameters=parameters)[0]

        return cls(full, authors, ours)

    def named(self) -> Iterator[tuple[str, Call]]:
        """The three by name."""
        yield from (("full", self.full), ("authors", self.authors), ("memkit", self.ours))


def _authors_mixer(repo: Path, fields: dict[str, Any]) -> Any:
    """Their layer in float32, without its output projection."""
    if str(repo) not in sys.path:
        sys.path.insert(0, str(repo))
    if not (repo / "utils" / "fla_rocm_patches.py").is_file():  # asked for on import, but not published
        patch = types.ModuleType("utils.fla_rocm_patches")
        patch.__dict__["patch_fla_kda_rocm_autotune"] = lambda: None  # of a kernel that this layer does not have
        sys.modules.setdefault(patch.__name__, patch)
    backbone, module = (importlib.import_module(name) for name in ("model.rwkv7_backbone", "model.kvm_mixer"))
    known = backbone.MixerConfigDataclass.model_fields
    config = backbone.MixerConfigDataclass(**{name: value for name, value in fields.items() if name in known})
    mixer = module.SequenceMixer(config, 0).float()
    mixer.c_proj = nn.Identity()
    return mixer


def drawn(tokens: int) -> list[Tensor]:
    """Queries, keys, values and merge weights, random."""
    tensors = [torch.randn(1, HEADS, tokens, HEAD_WIDTH) for _ in range(3)]
    return [*tensors, torch.rand(1, HEADS, tokens) + 0.5]


def difference(sides: Sides, tokens: int) -> float:
    """The largest difference between the authors' outputs and ours, over the largest output."""
    given = drawn(tokens)
    with torch.no_grad():
        theirs, ours = sides.authors(*given), sides.ours(*given)
    return float((theirs - ours).abs().max() / ours.abs().max())


def prefill(call: Call, given: list[Tensor]) -> None:
    """Read, without a graph."""
    with torch.no_grad():
        call(*given)


def step(call: Call, given: list[Tensor]) -> None:
    """Forward, and backward to all that was given."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    call(*leaves).backward(given[0])


def seconds(
    run: Callable[[Call, list[Tensor]], None], sides: Sides, tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Of each side, in turn, after one run each that does not count."""
    given = drawn(tokens)
    spent: dict[str, list[float]] = {name: [] for name, _ in sides.named()}
    for repeat in range(repeats + 1):
        for name, call in sides.named():
            begin = time.perf_counter()
            run(call, given)
            if repeat:
                spent[name].append(time.perf_counter() - begin)
    return spent


def main() -> None:
    """Print a line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True, help="a checkout of the authors' repository")
    parser.add_argument("--prefill", type=int, default=32768, metavar="TOKENS")
    parser.add_argument("--train", type=int, default=16384, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    repo: Path = given.repo.resolve()
    if not (repo / "model" / "kvm_mixer.py").is_file():
        parser.error(f"{given.repo} is no checkout of the authors' repository: it has no model/kvm_mixer.py")
    torch.manual_seed(0)
    print("| | authors, × full | memkit, × full | memkit, × authors | full; authors; memkit, s |")
    print("|---|---|---|---|---|")
    for name, config in CONFIGS.items():
        sides = Sides.of(repo, config)
        apart = difference(sides, 2048)
        if apart > 4 * BFLOAT16_STEP:
            raise SystemExit(f"{name}: outputs differ by {apart:.1e} of the largest; nothing to be timed")
        for label, run, tokens in (("prefill", prefill, given.prefill), ("forward and backward", step, given.train)):
            spent = seconds(run, sides, tokens, given.repeats)
            full, authors, ours = (statistics.median(spent[side]) for side in ("full", "authors", "memkit"))
            spread = "; ".join(f"{min(each):.2f}–{max(each):.2f}" for each in spent.values())
            factors = f"{full / authors:.1f} | {full / ours:.1f} | {authors / ours:.1f}"
            print(f"| {label} of {tokens:,}, {name} | {factors} | {spread} |", flush=True)
        print(f"(outputs of both differ by at most {apart:.1e} of the largest)", file=sys.stderr)


if __name__ == "__main__":
    main()
