"""MemoryLM: a decoder-only language model whose layers remember as their policies say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from memkit.engine.inputs import Lengths
from memkit.errors import InputError, MemoryStateError, ModelError, shown
from memkit.lm.boundaries import checked
from memkit.lm.catalog import load_model_spec, weights_file, write_model
from memkit.lm.generation import Prompts, Settings, stream
from memkit.lm.memory import ModelMemory
from memkit.lm.mixer import Mixer
from memkit.lm.parts import Linear, Mlp, Span, State
from memkit.lm.spec import MixerSpec, ModelSpec
from memkit.lm.weights import adapted
from memkit.processes import HeadExchange
from memkit.whole import whole_numbers

__all__ = ["Block", "MemoryLM"]


STRETCHES = "this model's processes have a stretch of each text"


class Block(nn.Module):
    """x += scale · mixer(LN(x)), then x += scale · mlp(LN(x))."""

    def __init__(self, mixer: MixerSpec, model: ModelSpec, layer: int) -> None:
        super().__init__()
        self.scale = model.residual_scale
        self.mixer_norm = nn.LayerNorm(model.width)
        self.mixer: Mixer = mixer.build(model, layer)
        self.mlp_norm = nn.LayerNorm(model.width)
        self.mlp = Mlp(model.mlp, model.width)

    def forward(
        self, x: Tensor, embedded: Tensor | None, first: Tensor | None, state: State, span: Span
    ) -> tuple[Tensor, Tensor | None, State]:
        """x [b, t, width] → the same, the values of the first layer of this kind, and what the layer carries.

        embedded [b, t, width]: the embeddings, where this layer is the first of its kind; first: its values, elsewhere.
        All that uses the block's parameters is in here, so that whoever splits them over processes may gather them
        for this call alone.
        """
        begun: State = {}
        if embedded is not None:
            first, begun = self.mixer.first_values(self.mixer_norm(embedded), state, span)
        mixed, carried = self.mixer(self.mixer_norm(x), first, state, span)
        x = x + self.scale * mixed
        added, mlp = self.mlp(self.mlp_norm(x), state, span)
        return x + self.scale * added, first, {**begun, **carried, **mlp}


class MemoryLM(nn.Module):
    """The model a `ModelSpec` declares.

    ```python
    model = memkit.load_model("tiny-kvm-sqrt")
    logits, memory = model(ids)              # ids [b, t] → logits [b, t, vocabulary]
    logits, memory = model(more_ids, memory)  # goes on where it stopped, one token or many
    ```

    However a text is split into calls, the logits are the same. `activation_checkpointing = True` computes blocks
    anew in the backward pass instead of keeping what they computed.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.embedding_norm = nn.LayerNorm(spec.width)
        blocks = [Block(mixer, spec, layer) for layer, mixer in enumerate(spec.mixers)]
        self.blocks = nn.ModuleList(blocks)
        self.head_norm = nn.LayerNorm(spec.width)
        self.head = Linear(spec.width, spec.vocabulary)
        self.takes_boundaries = any(block.mixer.takes_boundaries for block in blocks)
        """Whether any layer lets the caller say where chunks end."""
        self.exchange: HeadExchange | None = None
        """Where a text is split over processes, see `split_text`."""
        self._first_of_kind = spec.value_layers
        if not self.head.weight.is_meta:
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Set all parameters to what training starts from: every block adds nothing at first."""
        nn.init.uniform_(self.embedding.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * (self.spec.vocabulary / self.spec.width) ** 0.5)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.mixer.initialise(layer, self.spec.depth)
            block.mlp.initialise(layer, self.spec.depth)

    def forward(
        self,
        ids: Tensor,
        memory: ModelMemory | None = None,
        lengths: Lengths | None = None,
        boundaries: Tensor | None = None,
    ) -> tuple[Tensor, ModelMemory]:
        """ids [b, t] → logits [b, t, vocabulary], those at t for token t + 1, and the memory to go on with.

        memory: what an earlier call returned; without gradients this call takes it over (`memory.fork()` copies).
        lengths [b]: valid tokens of this call per row, the rest padding on the right, whose logits are 0.
        boundaries [b, t] bool: which tokens are the last of their chunk, for layers with `chunker: boundaries`.
        """
        lengths = self._lengths(ids, lengths)
        x, memory = self.read(ids, memory, lengths, boundaries)
        logits = self.head(x)
        if lengths is None:
            return logits, memory
        valid = Span(lengths.to(ids.device), None).valid(ids.shape[1])
        assert valid is not None
        return logits.masked_fill(~valid, 0), memory

    def read(
        self,
        ids: Tensor,
        memory: ModelMemory | None = None,
        lengths: Lengths | None = None,
        boundaries: Tensor | None = None,
    ) -> tuple[Tensor, ModelMemory]:
        """As a call, but short of the head: what `head` takes, [b, t, width]."""
        lengths = self._lengths(ids, lengths)
        span = self._span(ids, memory, lengths, checked(boundaries, ids, self.takes_boundaries))
        states: list[State] = [{} for _ in self.blocks] if memory is None else memory.layers
        carried: list[State] = [{} for _ in self.blocks]
        x = embedded = self.embedding_norm(self.embedding(ids))
        firsts: dict[int, Tensor | None] = {}
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            kind = self._first_of_kind[layer]
            arguments = (x, embedded if kind == layer else None, firsts.get(kind), states[layer], span)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, firsts[kind], carried[layer] = checkpoint(block, *arguments, use_reentrant=False)  # type: ignore[misc]
            else:
                x, firsts[kind], carried[layer] = block(*arguments)
        seen = torch.zeros(ids.shape[0], dtype=torch.long) if memory is None else memory.seen
        tokens = ids.shape[1] * (1 if self.exchange is None else self.exchange.size)
        brought = torch.full_like(seen, tokens) if lengths is None else lengths
        return self.head_norm(x), ModelMemory(self.spec, seen + brought, carried)

    def loss(
        self,
        ids: Tensor,
        lengths: Lengths | None = None,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        boundaries: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of every next token, in nats.

        Args:
            ids: [b, t].
            lengths: [b], valid tokens of each row, the rest padding on the right, which does not count.
            documents: [b, t], as for `read_packed`: a document's first token does not count.
            targets: [b, t] bool: which tokens count where they are predicted, as answers do and their questions do
                not; a row's first token is never predicted. None: all.
            boundaries: [b, t], as for a call.

        Raises:
            InputError: what does not fit ids, or leaves nothing to predict (what tensors hold is looked at on the CPU
                alone).
        """
        if self.exchange is not None:
            if lengths is not None or documents is not None or targets is not None or boundaries is not None:
                raise InputError(f"{STRETCHES}, and its loss is of every next token; give ids alone")
            return self._loss_of_stretch(ids, self.exchange)
        lengths = self._lengths(ids, lengths)
        chosen = None if targets is None else self._targets(ids, targets)
        if documents is not None:
            self._check_documents(ids, documents)
        # The last logits predict nothing here. A target that does not count costs less than logits cut short: a copy of
        # them all, and another of their gradients.
        wanted = torch.cat((ids[:, 1:], ids.new_full((ids.shape[0], 1), -100)), dim=1)
        if lengths is not None:
            valid = Span(lengths.to(ids.device), None).valid(ids.shape[1])
            assert valid is not None
            wanted[:, :-1].masked_fill_(~valid[:, 1:, 0], -100)
        if documents is not None:
            wanted[:, :-1].masked_fill_(documents[:, 1:] != documents[:, :-1], -100)
        if chosen is not None:
            wanted[:, :-1].masked_fill_(~chosen[:, 1:], -100)
        if not ids[:, 1:].numel() or (wanted.device.type == "cpu" and not bool((wanted != -100).any())):
            raise InputError(
                "a loss needs at least one token after a row's first, within its length, of the document of the one "
                f"before it, and a target, got none in ids {tuple(ids.shape)}; give more of the text, or other targets"
            )
        if documents is None:
            logits = self(ids, lengths=lengths, boundaries=boundaries)[0]
        else:
            logits = self.read_packed(ids, documents, boundaries)
        logits = logits.flatten(0, 1)
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted.flatten())

    def _loss_of_stretch(self, ids: Tensor, exchange: HeadExchange) -> Tensor:
        """This process's part of `loss`, such that the mean over processes is the loss of the whole text."""
        logits = self(ids)[0]
        wanted = torch.cat((ids[:, 1:], exchange.following(ids)), dim=1).flatten()
        logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        predicted = ids.shape[0] * (ids.shape[1] * exchange.size - 1)
        return cross_entropy(logits, wanted, reduction="sum") * exchange.size / predicted

    def read_packed(self, ids: Tensor, documents: Tensor, boundaries: Tensor | None = None) -> Tensor:
        """Logits of rows that hold several documents each, none of which sees another.

        ids, documents [b, t]: a token's document is the run of equal numbers it stands in. Documents are read as rows
        of their own, those of similar length together, so less than half of what is read is padding. boundaries
        [b, t], as for a call.
        """
        self._lengths(ids, None)
        ends = checked(boundaries, ids, self.takes_boundaries)
        self._check_documents(ids, documents)
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = begins.flatten().nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([ids.numel()]))
        flat = ids.flatten()
        places: list[Tensor] = []
        found: list[Tensor] = []
        magnitude = lengths.double().log2().floor().long()
        for each in magnitude.unique():
            begin, length = starts[magnitude == each], lengths[magnitude == each]
            where = begin[:, None] + torch.arange(int(length.max()), device=ids.device)
            valid = where < (begin + length)[:, None]
            here = where.clamp(max=ids.numel() - 1)
            logits, _ = self(flat[here], None, length, None if ends is None else ends.flatten()[here.cpu()])
            places.append(where[valid])
            found.append(logits[valid])
        if not found:
            return self(ids, boundaries=boundaries)[0]
        return torch.cat(found)[torch.cat(places).argsort()].view(*ids.shape, -1)

    def generate(self, prompts: Prompts, **settings: Unpack[Settings]) -> Tensor:
        """New tokens for every prompt, [b, n], n ≤ max_new_tokens; after a row's stop id, which is included, `pad_id`.

        prompts: ids [b, t], or a list of lists. mask [b, t]: 0 for padding of the prompts, on either side; or
        lengths [b]: of the prompts, the rest padding on the right.
        max_new_tokens: at most so many. temperature 0 (the default): the likeliest token; else drawn, from the `top_k`
        likeliest, and of these the fewest that hold `top_p` of the probability. seed: of the drawing. stop_ids: a row
        ends with any of these; generation when all rows have. boundary_ids: ids that are the last of their chunk, for
        layers with `chunker: boundaries`. A row's tokens do not depend on the other rows but for the drawing.
        """
        steps = list(self.stream(prompts, **settings))
        return torch.stack(steps, dim=1) if steps else torch.zeros(len(prompts), 0, dtype=torch.long)

    def stream(self, prompts: Prompts, **settings: Unpack[Settings]) -> Iterator[Tensor]:
        """What `generate` returns, column by column, as it comes: [b] each."""
        return stream(self, prompts, **settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.yaml`, every field and policy written out, and `model.safetensors`; makes the folder.

        Where heads, or parameters, are split over processes every process calls it, and the first writes them whole.
        Raises `ModelError` for parameters that share memory.
        """
        write_model(folder, self.spec, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MemoryLM:
        """Read what `save_pretrained` wrote. Raises `ModelError` where the folder has no weights, or others'."""
        weights = weights_file(Path(folder))
        if weights is None:
            raise ModelError(f"{folder}: no weights here (no safetensors file beside its YAML)")
        return cls.with_weights(load_model_spec(Path(folder)), weights)

    @classmethod
    def with_weights(cls, spec: ModelSpec, file: Path, *, other_policies: bool = False) -> MemoryLM:
        """The model with weights from a safetensors file. Raises `ModelError` where they are not this model's.

        other_policies: the weights are of a model with other policies: what only these learned is left out, and what
        this one's learn starts as it does in training.
        """
        with torch.device("meta"):
            made = cls(spec)
        try:
            weights = load_file(str(file))
            made.load_state_dict(adapted(weights, made.state_dict()) if other_policies else weights, assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ModelError(f"{file}: not this model's weights: {' '.join(str(error).split())[:300]}") from None
        return made.requires_grad_().eval()

    def _span(self, ids: Tensor, memory: ModelMemory | None, lengths: Tensor | None, boundaries: Tensor | None) -> Span:
        """The call's tokens, checked."""
        if (
            ids.device.type == "cpu"
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < self.spec.vocabulary
        ):
            raise InputError(
                f"ids must lie between 0 and {self.spec.vocabulary - 1}, got {int(ids.min())} … {int(ids.max())}"
            )
        if memory is not None:
            if not isinstance(memory, ModelMemory):
                raise InputError(f"memory must be what an earlier call returned, or None, got {shown(memory)}")
            if memory.spec is not self.spec and memory.spec != self.spec:
                raise MemoryStateError("this memory belongs to another model; start with memory=None")
            if len(memory.seen) != ids.shape[0]:
                raise InputError(
                    f"memory is for {len(memory.seen)} rows, got ids of {ids.shape[0]}; reorder() changes rows"
                )
        if self.exchange is not None:
            if lengths is not None or boundaries is not None:
                raise InputError(f"{STRETCHES}, equally long in all; give neither lengths nor boundaries")
            self.exchange.check(ids.shape[1])
        begun = None if memory is None else (memory.seen > 0).to(ids.device)
        return Span(None if lengths is None else lengths.to(ids.device), begun, boundaries, self.exchange)

    @staticmethod
    def _lengths(ids: Tensor, lengths: Lengths | None) -> Tensor | None:
        """lengths [b] int64 on the CPU, checked, as are ids' axes and dtype."""
        if not isinstance(ids, Tensor):
            raise InputError(f"ids must be a tensor of whole numbers [batch, tokens], got {shown(ids)}")
        if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InputError(f"ids must be whole numbers [batch, tokens], got {ids.dtype} {tuple(ids.shape)}")
        if lengths is None:
            return None
        limits = f"lie between 0 and the call's {ids.shape[1]} tokens"
        return whole_numbers("lengths", lengths, 0, ids.shape[1], count=ids.shape[0], limits=limits)

    @staticmethod
    def _check_documents(ids: Tensor, documents: Tensor) -> None:
        if not isinstance(documents, Tensor) or documents.shape != ids.shape:
            got = tuple(documents.shape) if isinstance(documents, Tensor) else shown(documents)
            raise InputError(f"documents must be as ids, {tuple(ids.shape)}, got {got}")

    @staticmethod
    def _targets(ids: Tensor, targets: Tensor) -> Tensor:
        """targets [b, t] bool, checked."""
        if not isinstance(targets, Tensor) or targets.dtype != torch.bool or targets.shape != ids.shape:
            got = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else shown(targets)
            raise InputError(f"targets must be true or false for each of ids, {tuple(ids.shape)}, got {got}")
        return targets.to(ids.device)

    @property
    def parameter_count(self) -> int:
        """Numbers that the model learns."""
        return sum(parameter.numel() for parameter in self.parameters())
