"""One row and one key/value head: its window, its slots, and the softmax over both."""

from __future__ import annotations

import torch
from torch import Tensor

from memkit.engine.inputs import AttendInputs
from memkit.pieces.needs import Need
from memkit.pieces.window import BlockWindowSpec
from memkit.reference.assignment import Assigned, assign
from memkit.reference.expecting import but_sinks, expected
from memkit.reference.observing import Observing, compete, mean
from memkit.reference.rules import Rules
from memkit.reference.slot import Slot, Token
from memkit.reference.words import definitely, stacked

__all__ = ["Head"]


class Head:
    """The stream of one row and one key/value head: the tokens it still holds, and its slots.

    seen: tokens before this call; left: tokens that have left the window; origin: the first token held. Where the
    caller says where chunks end, chunks: where those in the window begin; ended: whether a boundary ended the last.
    """

    def __init__(self, rules: Rules, inputs: AttendInputs, row: int, head: int) -> None:
        self.rules, memory = rules, inputs.memory
        self.seen = 0 if memory is None else int(memory.seen_rows[row])
        self.chunks, self.ended, live = list[int](), False, 0
        self.boundaries: list[bool] | None = None
        if rules.cut_by_caller:
            if memory is not None and memory.cuts is not None:
                self.chunks, self.ended = list(memory.cuts.begins[row]), memory.cuts.ended[row]
                live = memory.cuts.slots[row]
            self.boundaries = None if inputs.row_boundaries is None else inputs.row_boundaries[row].tolist()
            self.left = self.chunks[0] if self.chunks else 0
        else:
            self.left = 0 if self.seen == 0 else rules.sees_from(self.seen - 1)
            live = rules.slots(self.left)
        self.origin, held = self.left, self.seen - self.left
        self.given = None if inputs.plan is None else (inputs.plan, row, head)
        self.slots: list[Slot] = []
        self.record: list[Assigned] = []
        self.counts: list[int] = []
        self.as_read: tuple[Tensor, Tensor, Tensor] | None = None
        self.observing = None
        if rules.policy.observes:
            begin = self.open_chunk(self.seen)
            self.observing = Observing(rules, inputs, row, head, self.seen, self.left, live, begin)

        new = slice(0, int(inputs.row_lengths[row]))
        keys, values = inputs.keys[row, head, new].double(), None
        if inputs.values is not None:
            values = inputs.values[row, head, new].double()
        learned = self.rules.policy.merging.learned and not rules.sinks_are_tokens
        weights = keys.new_ones(len(keys)) if learned else None
        if inputs.weights is not None:
            weights = inputs.weights[row, head, new].double()
        places = new_places(rules, inputs, row)
        if memory is not None:
            streams, end = memory.window.streams, memory.window.end
            old = slice(end - held, end)
            keys = torch.cat((streams["keys"][row, head, old].double(), keys))
            if values is not None:
                values = torch.cat((streams["values"][row, head, old].double(), values))
            if weights is not None:
                weights = torch.cat((streams["weights"][row, head, old].double(), weights))
            if places is not None:
                places = torch.cat((streams["positions"][row, 0, old], places))
            width = keys.shape[1] + (0 if values is None else streams["values"].shape[-1])
            for index in range(live):
                sums = memory.store.sums[row, head, index, :width].double()
                numbers = memory.store.numbers[row, head, index]
                self.slots.append(rules.slot(torch.cat((sums, numbers)), keys.shape[1]))
        self.keys, self.weights, self.places = keys, weights, places
        # A plan is made without values.
        self.values = keys[:, :0] if values is None else values

    def token(self, position: int, first: bool) -> Token:
        """The token at `position`, which must still be held; first: of the row's first chunk."""
        at = position - self.origin
        return Token(
            treatment=self.rules.treatment,
            position=position,
            key=self.keys[at],
            value=self.values[at],
            first=first,
            weight=None if self.weights is None else self.weights[at],
            place=None if self.places is None else self.places[at],
        )

    def arrive(self, position: int) -> None:
        """A token arrives: what it no longer sees leaves the window, chunk by chunk."""
        rules = self.rules
        if not rules.cut_by_caller:
            while self.left < rules.sees_from(position):
                end = self.left + rules.chunk
                self.leave(end, rules.slots(end) - rules.slots(self.left))
            return
        if self.over(position):
            self.chunks.append(position)
            assert isinstance(rules.spec.window, BlockWindowSpec)
            if len(self.chunks) > rules.spec.window.chunks:
                begin, end = self.chunks[:2]
                self.leave(end, rules.new_slots(len(self.slots), begin, end, position))
                del self.chunks[0]
        self.ended = self.boundaries is not None and self.boundaries[position - self.seen]

    def over(self, tokens: int) -> bool:
        """Whether the newest chunk is, after so many tokens: then the next token begins one."""
        return not self.chunks or self.ended or tokens - self.chunks[-1] == self.rules.chunk

    def chunk_begin(self, position: int) -> int:
        """Where the chunk of the token at `position`, which has just arrived, begins."""
        return self.chunks[-1] if self.rules.cut_by_caller else position // self.rules.chunk * self.rules.chunk

    def open_chunk(self, tokens: int) -> int:
        """Where the chunk of the next token begins, after so many tokens."""
        if not self.rules.cut_by_caller:
            return self.chunk_begin(tokens)
        return tokens if self.over(tokens) else self.chunks[-1]

    def sees_from(self, position: int) -> int:
        """The first token that the query at `position`, which has just arrived, sees exactly."""
        return self.chunks[0] if self.rules.cut_by_caller else self.rules.sees_from(position)

    def leave(self, end: int, new_slots: int) -> None:
        """The oldest chunk, up to `end`, becomes part of the slots; so many of its tokens found one."""
        rules, begin, before = self.rules, self.left, len(self.slots)
        chunk = [self.token(position, begin == 0) for position in range(begin, end)]
        self.counts.append(before + new_slots)
        if rules.policy.competes:
            assigned = []
        else:
            of_tokens = None
            if self.observing is not None:
                of_tokens = [mean(self.observing.tokens[token.position]) for token in chunk]
            assigned = (
                self.from_plan(begin, end)
                if self.given is not None
                else assign(rules, chunk, self.slots, new_slots, of_tokens)
            )
        if self.observing is not None or rules.policy.competes:
            self.slots = compete(rules, chunk, self.slots, new_slots, None if self.given else assigned, self.observing)
            self.left, self.as_read = end, None
            return
        weights = rules.weights(chunk)
        self.slots += [self.nothing()] * new_slots
        # Founders first, so that a token may join a slot whose founder stands behind it in the chunk.
        for token, weight, (slot, founds) in zip(chunk, weights, assigned, strict=True):
            if founds:
                assert slot >= before
                self.slots[slot] = rules.alone(token, weight, founds=True)
        for token, weight, (slot, founds) in zip(chunk, weights, assigned, strict=True):
            if slot >= 0 and not founds:
                self.slots[slot] = rules.joined(self.slots[slot], rules.alone(token, weight, founds=False))
        self.record += assigned
        self.left = end
        self.as_read = None

    def from_plan(self, begin: int, end: int) -> list[Assigned]:
        """What an injected plan says about tokens begin … end − 1."""
        assert self.given is not None
        given, row, head = self.given
        columns = range(begin - int(given.begin[row]), end - int(given.begin[row]))
        return [(int(given.slot[row, head, j]), bool(given.founded[row, head, j])) for j in columns]

    def nothing(self) -> Slot:
        """A slot without tokens."""
        width = self.keys.shape[1] + self.values.shape[1] + len(self.rules.policy.statistics)
        return self.rules.slot(self.keys.new_zeros(width), self.keys.shape[1])

    def memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """The slots' keys as queries meet them [m, d], values [m, v], and what their scores get on top [m]."""
        if self.as_read is None:
            exact = self.rules.sinks_are_tokens
            keys = [slot.key if exact else slot.met for slot in self.slots]
            values = [slot.value if exact else slot.answer for slot in self.slots]
            biases = [torch.zeros_like(slot.count) if exact else slot.bias for slot in self.slots]
            self.as_read = (
                stacked(keys, self.keys[0]),
                stacked(values, self.values[0]),
                stacked(biases, self.keys[0, 0]),
            )
        return self.as_read

    def read(self, query: Tensor, head: int, position: int) -> Tensor:
        """The answer [v] to query head `head` at `position`."""
        shares, values = self.shares(query, head, position)
        return shares @ values

    def observe(self, position: int) -> None:
        """After a chunk's last token its observed queries judge every row."""
        if self.observing is None:
            return
        if self.rules.cut_by_caller:
            begin, over = self.chunks[-1], self.over(position + 1)
        else:
            begin, over = position + 1 - self.rules.chunk, (position + 1) % self.rules.chunk == 0
        if not over:
            return
        first, asked = self.sees_from(position), self.observing.asked(begin, position)
        self.observing.judge(
            [(*self.shares(query, head, at), at) for query, head, at in asked],
            len(self.slots),
            range(first, position + 1),
            None if self.rules.policy.expects is None else self.expected(asked, position),
        )

    def expected(self, asked: list[tuple[Tensor, int, int]], last: int) -> list[float]:
        """What slots and window are expected to get from those who go on behind the token at `last`.

        asked: observed queries (query, head, position).
        """
        places, origin = definitely(self.places), self.origin
        window = self.keys[self.sees_from(last) - origin : last + 1 - origin]
        keys, _, biases = self.memory()
        return expected(
            self.rules,
            but_sinks([((query, head, places[at - origin]), at) for query, head, at in asked], self.rules.spec.sinks),
            places[last - origin] + 1,
            torch.cat((keys, window)).detach(),
            torch.cat((biases, biases.new_zeros(len(window)))).detach(),
            len(keys),
        )

    def shares(self, query: Tensor, head: int, position: int) -> tuple[Tensor, Tensor]:
        """Of query head `head`'s query at `position`: its softmax over slots and visible tokens [m + n], and the values
        [m + n, v] of these.

        scale · τ_mem · q·K_i + bias_i for slots, scale · τ_win · q·k_j for tokens; sinks of a policy without growth
        are tokens wherever they stand.
        """
        rules = self.rules
        visible = slice(self.sees_from(position) - self.origin, position + 1 - self.origin)
        windowed = query if rules.window_scale is None else rules.window_scale[head] * query
        if rules.sinks_are_tokens:
            remembering = windowed
        else:
            place = None if self.places is None else self.places[position - self.origin]
            remembering = rules.treatment.memory_query(query, place)
            if rules.memory_scale is not None:
                remembering = rules.memory_scale[head] * remembering
        keys, values, biases = self.memory()
        of_slots = rules.scale * (keys @ remembering) + biases
        of_tokens = rules.scale * (self.keys[visible] @ windowed)
        return torch.cat((of_slots, of_tokens)).softmax(0), torch.cat((values, self.values[visible]))


def new_places(rules: Rules, inputs: AttendInputs, row: int) -> Tensor | None:
    """Rotary positions of a row's new tokens, [n] float64: as given, else going on where the memory stands."""
    if Need.ROTATION not in rules.policy.needs:
        return None
    assert inputs.rotation is not None
    count = int(inputs.row_lengths[row])
    if inputs.rotation.positions is not None:
        return inputs.rotation.positions[row, :count].double().to(inputs.keys.device)
    begin = inputs.keys.new_zeros((), dtype=torch.float64)
    if inputs.memory is not None and inputs.memory.next_positions is not None:
        begin = inputs.memory.next_positions[row]
    return begin + torch.arange(count, dtype=torch.float64, device=inputs.keys.device)
