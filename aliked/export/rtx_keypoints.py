"""The graph that TensorRT for RTX is given, where it chooses keypoints and reads features at them.

Forms of the same function in half precision and for images of one size, as those of `rtx_graph`;
what each brings is in docs/tensorrt-graph.md.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from aliked.configs import RADIUS
from aliked.export.rewriter import Nodes, Rewriter, attributes_of, is_plain, wide_kernel

WINDOW = 2 * RADIUS + 1
AT_ONCE = 8  # pixels of a row that become channels: in memory they lie as before
LOW = np.float16(-65504)  # in place of the logit where there is no candidate: a score of 0
ROUNDS = 3  # of suppression, as in `detection.found_in_rounds`
MOVES = {"Flatten", "Gather", "Pad", "Reshape", "Slice"}  # of values to another place
# What suppression by scores is made of, in an exported graph.
SUPPRESSION = {"Equal": ROUNDS, "MatMul": 2 * (ROUNDS - 1), "Where": 2 * ROUNDS - 1}
INDEX_BITS = 22  # a logit takes the other 41 bits of a whole number that is not negative
PLACE, ZERO = np.array(2**INDEX_BITS), np.array(2**40)
STEP = np.array(2.0**-24, np.float32)  # the smallest half, of which all are multiples
TO_GRID = ("Unsqueeze", "Concat", "Unsqueeze", "Sub", "Div", "Mul", "Gather")  # back to positions
BELOW_ALL = np.array(-65520, np.float32)  # which rounds to minus infinity of halves


@dataclass(frozen=True)
class Choice:
    """Where a graph chooses the K best pixels by their scores."""

    conv: onnx.NodeProto  # gives logits of the padded frame, [B, 1, H, W]
    scores: str  # of the image in it, [B, 1, h, w]
    top: int
    left: int
    top_k: list[onnx.NodeProto]  # of groups of pixels, then of what is left of them


def choices(rewriter: Rewriter) -> Iterator[Choice]:
    """Where the K best pixels are chosen by sigmoids of halves; twice in a graph of two images."""
    for conv in rewriter.graph.node:
        steps = rewriter.following(conv, "Cast", "Sigmoid") if conv.op_type == "Conv" else []
        if len(steps) < 2 or not is_plain(rewriter, conv):
            continue
        scores, begin = steps[1].output[0], {2: 0, 3: 0}
        while [node.op_type for node in rewriter.users[scores]] == ["Slice"]:
            (cut,) = rewriter.users[scores]
            start, axis = (rewriter.value(cut.input[i]) for i in (1, 3))
            if len(axis) != 1 or axis[0] not in begin:
                break
            scores, begin[int(axis[0])] = cut.output[0], begin[int(axis[0])] + int(start[0])
        made_of = {scores}
        for node in rewriter.graph.node:
            if made_of.intersection(node.input):
                made_of.update(node.output)
        made = [node for node in rewriter.graph.node if made_of.intersection(node.output)]
        top_k = [node for node in made if node.op_type == "TopK"]
        more = any(node.op_type == "ScatterElements" for node in made)  # in rounds, as older files
        choice = Choice(conv, scores, begin[2], begin[3], top_k)
        if top_k and not more and _is_known(rewriter, choice, made_of):
            yield choice


def _is_known(rewriter: Rewriter, choice: Choice, made_of: set[str]) -> bool:
    """Whether the candidates are the maxima of the scores; not those above a threshold only."""
    found, shape = choice.top_k[0].input[0], rewriter.shape(choice.conv.output[0])
    while found in rewriter.makers and rewriter.makers[found].op_type in MOVES:
        found = rewriter.makers[found].input[0]
    inside, todo = {}, [found]
    while todo:
        name = todo.pop()
        if name in made_of and name != choice.scores and name not in inside:
            inside[name] = rewriter.makers[name]
            todo += inside[name].input
    counts = Counter(node.op_type for node in inside.values())
    known = all(counts[op_type] == count for op_type, count in SUPPRESSION.items())
    return known and shape[1] == 1 and shape[3] % AT_ONCE == 0


def choose_by_logits(rewriter: Rewriter) -> None:
    """Suppress and choose by half-precision logits, and score only what is chosen.

    A top-k sorts 16 bits in half the time of 32. Scores are sigmoids of these logits and choose
    the same pixels; only where different logits have the same score in float32, which is 1, does
    the larger win.
    """
    instead: dict[str, list[onnx.NodeProto]] = {}
    for choice in choices(rewriter):
        instead |= _chosen_by_logits(rewriter, choice)
    rewriter.replace(instead)


def _chosen_by_logits(rewriter: Rewriter, choice: Choice) -> dict[str, list[onnx.NodeProto]]:
    shape = rewriter.shape(choice.top_k[0].input[0])
    new = Suppression(rewriter, choice)
    wide = new.logits()
    logits = new.in_rows(wide)
    candidates = new.candidates(new.maxima(wide, logits), shape)
    in_lists = len(choice.top_k) > 1 and math.prod(shape) <= 2**INDEX_BITS
    choose = _by_numbers if in_lists else _as_they_are
    instead = {choice.scores: new, **look_up(new, logits)}
    return instead | choose(rewriter, choice.top_k, candidates)


def _by_numbers(
    rewriter: Rewriter, top_k: list[onnx.NodeProto], candidates: str
) -> dict[str, list[onnx.NodeProto]]:
    """Nodes in the place of every TopK, and of what merges lists between them."""
    last = top_k[-1]
    users = rewriter.users[last.output[1]]
    chosen = next(node for node in users if node.op_type == "GatherElements")
    best, values = best_of_lists(rewriter, top_k, candidates, chosen.output[0])
    _score(best, values, last)
    return {node.output[0]: [] for node in (*top_k, chosen)} | {last.output[0]: best}


def _as_they_are(
    rewriter: Rewriter, top_k: list[onnx.NodeProto], candidates: str
) -> dict[str, list[onnx.NodeProto]]:
    """The first TopK with candidates as logits, and the last with scores made of what it gives."""
    begin, last = copied(top_k[0]), top_k[-1]
    begin.input[0] = candidates
    end = begin if len(top_k) == 1 else copied(last)
    end.output[0] = f"{last.output[0]} logits"
    best = Nodes(rewriter, last.output[0])
    best.append(end)
    _score(best, end.output[0], last)
    return {top_k[0].output[0]: [begin], last.output[0]: best}


def _score(best: Nodes, logits: str, top_k: onnx.NodeProto) -> None:
    """Add what makes the scores of a TopK of logits."""
    logits = best.add("Cast", logits, to=TensorProto.FLOAT)
    best.add("Sigmoid", logits, out=top_k.output[0])


def copied(node: onnx.NodeProto) -> onnx.NodeProto:
    """A copy of a node."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


class Suppression(Nodes):
    """The nodes from logits to candidates."""

    def __init__(self, rewriter: Rewriter, choice: Choice):
        super().__init__(rewriter, f"{choice.scores} candidates")
        self.choice = choice
        self.batch, _, self.height, self.width = rewriter.shape(choice.conv.output[0])
        self.size = rewriter.shape(choice.scores)[2:]  # of the image in the frame

    def logits(self) -> str:
        """The logits of the frame, low beside the image: `AT_ONCE` pixels of a row as channels."""
        weight, *bias = map(self.rewriter.value, self.choice.conv.input[1:])
        kernel = wide_kernel(weight, AT_ONCE)
        bias = [np.tile(values, AT_ONCE) for values in bias]
        size = {"kernel_shape": [3, AT_ONCE + 2], "strides": [1, AT_ONCE], "pads": [1, 1, 1, 1]}
        logits = self.add("Conv", self.choice.conv.input[0], kernel, *bias, **size)
        # ONNX Runtime's convolutions on a CPU keep what is beyond half precision for some of their
        # readers; equal values would not be.
        shape = np.array([self.batch, AT_ONCE, self.height, self.width // AT_ONCE])
        if self.size == [self.height, self.width]:
            return self.add("Reshape", logits, shape)
        most = np.full((1, self.height, self.width), LOW)
        top, left = self.choice.top, self.choice.left
        most[:, top : top + self.size[0], left : left + self.size[1]] = -LOW
        most = most.reshape(1, self.height, -1, AT_ONCE).transpose(0, 3, 1, 2)
        return self.add("Reshape", self.add("Min", logits, np.ascontiguousarray(most)), shape)

    def in_rows(self, x: str) -> str:
        """A map with pixels as channels, [B, 8, H, W / 8], as [B, H, W]."""
        x = self.add("Transpose", x, perm=[0, 2, 3, 1])
        # With another axis at first: otherwise the library computes what reads it twice.
        x = self.add("Reshape", x, np.array([self.batch, self.height, self.width, 1]))
        x = self.add("Transpose", x, perm=[0, 3, 1, 2])
        return self.add("Reshape", x, np.array([self.batch, self.height, self.width]))

    def maximum(self, x: str, axes: list[int], rank: int) -> str:
        """Maximum of the pixels up to `RADIUS` away, along one axis and then along the next."""
        pads = np.zeros((2, rank), np.int64)
        pads[:, axes] = RADIUS
        x = self.add("Pad", x, pads.ravel(), np.array(LOW))
        for axis in axes:
            length = self.height if axis == rank - 2 else self.width
            parts = [self.part(x, [axis], [i], [i + length]) for i in range(WINDOW)]
            x = self.fold("Max", parts)
        return x

    def only_maxima(self, x: str, best: str) -> str:
        """A map, low where a pixel is not the best of its window."""
        return self.add("Where", self.add("Equal", x, best), x, np.array(LOW))

    def near_any(self, maxima: str) -> str:
        """Which pixels have a maximum in the window around them, as in `detection.near_any`."""
        vertical, horizontal = (
            (abs(np.arange(side)[:, None] - np.arange(side)) <= RADIUS).astype(np.float16)
            for side in (self.height, self.width)
        )
        x = self.add("Greater", maxima, np.array(LOW))
        x = self.add("Cast", x, to=TensorProto.FLOAT16)
        x = self.add("MatMul", vertical, self.add("MatMul", x, horizontal))
        return self.add("Greater", x, np.array(0, np.float16))

    def maxima(self, wide: str, logits: str) -> str:
        """What `detection.suppress_non_maxima` leaves of logits, low elsewhere.

        The first windows go along columns where a row's pixels are channels: to put them in their
        place costs something for each of five values then, not of 25.
        """
        best = self.maximum(self.in_rows(self.maximum(wide, [2], 4)), [2], 3)
        maxima = found = self.only_maxima(logits, best)
        rest = logits
        for _ in range(ROUNDS - 1):
            rest = self.add("Where", self.near_any(maxima), np.array(LOW), rest)
            maxima = self.only_maxima(rest, self.maximum(rest, [1, 2], 3))
            found = self.add("Max", found, maxima)
        return found

    def candidates(self, found: str, shape: list[int]) -> str:
        """The image without its outer `RADIUS` pixels, as the first top-k takes it."""
        begin = [self.choice.top + RADIUS, self.choice.left + RADIUS]
        sides = [side - 2 * RADIUS for side in self.size]
        ends = [start + side for start, side in zip(begin, sides, strict=True)]
        x = self.part(found, [1, 2], begin, ends)
        count, room = math.prod(sides), math.prod(shape[1:])
        x = self.add("Reshape", x, np.array([self.batch, count]))
        pads = np.array([0, 0, 0, room - count])
        x = self.add("Pad", x, pads, np.array(-np.inf, np.float16)) if room > count else x
        return self.add("Reshape", x, np.array(shape))


def best_of_lists(
    rewriter: Rewriter, top_k: list[onnx.NodeProto], candidates: str, index: str
) -> tuple[Nodes, str]:
    """The nodes of `detection.top_k_of_groups` or `_in_parts`; the logits they give beside `index`.

    A logit and its index are one whole number, so that lists are merged by Max and Min alone: the
    library has a loop for every tensor of indices that is chosen by comparing others.
    """
    new = Nodes(rewriter, f"{top_k[0].output[0]} merged")
    batch, groups, length = rewriter.shape(top_k[0].input[0])
    numbers, kept = "", 0
    _, parts, _ = rewriter.shape(top_k[-1].input[0])  # of a list; 1 of what is sorted at once
    for done, node in enumerate(top_k):
        if numbers:
            _, now, _ = rewriter.shape(node.input[0])
            if parts == 1:
                numbers = contenders(new, numbers, [batch, now, groups // now, kept])
            else:
                shape, size = [batch, groups, kept], 2 ** (done - 1)
                numbers = of_pairs(new, numbers, shape, min(size, parts), size < parts)
            groups, candidates = now, logits_of(new, numbers)
        top = copied(node)
        top.input[0], top.output[0] = candidates, f"{node.output[0]} logits"
        new.append(top)
        kept = int(rewriter.value(node.input[1])[0])
        if numbers:
            numbers = new.add("GatherElements", numbers, top.output[1], axis=2)
        else:
            place = new.add("Add", top.output[1], (np.arange(groups) * length)[:, None])
            numbers = new.add("Add", numbers_of(new, top.output[0]), place)
    whole = new.add("Mul", new.add("Div", numbers, PLACE), PLACE)
    new.add("Sub", numbers, whole, out=index)
    return new, top.output[0]


def numbers_of(new: Nodes, logits: str) -> str:
    """Logits as whole numbers, multiples of `PLACE`, none of them negative."""
    x = new.add("Cast", logits, to=TensorProto.FLOAT)
    x = new.add("Mul", new.add("Max", x, BELOW_ALL), 1 / STEP)  # of minus infinity there is none
    x = new.add("Add", new.add("Cast", x, to=TensorProto.INT64), ZERO)
    return new.add("Mul", x, PLACE)


def logits_of(new: Nodes, numbers: str) -> str:
    """The logits in numbers of `numbers_of` with an index added, in half precision."""
    x = new.add("Sub", new.add("Div", numbers, PLACE), ZERO)
    x = new.add("Mul", new.add("Cast", x, to=TensorProto.FLOAT), STEP)
    return new.add("Cast", x, to=TensorProto.FLOAT16)


def contenders(new: Nodes, numbers: str, shape: list[int]) -> str:
    """`detection.contenders` of numbers, for `shape` [B, G, lists, K]."""
    batch, groups, lists, kept = shape
    pairs = lists // 2
    x = new.add("Reshape", numbers, np.array([batch, groups, 2, pairs, kept]))
    one, other = (new.add("Gather", x, np.array(side), axis=2) for side in (0, 1))
    other = new.add("Slice", other, *map(np.array, ([-1], [-(2**62)], [3], [-1])))  # turned round
    x = new.add("Max", one, other)
    x = new.add("Reshape", x, np.array([batch, groups, pairs, 2, kept // 2]))
    halves = [new.add("Gather", x, np.array(half), axis=3) for half in (0, 1)]
    upper, lower = new.add("Max", *halves), new.add("Min", *halves)
    losers = [new.add("Gather", lower, np.array(pair), axis=2) for pair in range(pairs)]
    rest = new.fold("Max", losers)
    upper = new.add("Reshape", upper, np.array([batch, groups, pairs * (kept // 2)]))
    return new.add("Concat", upper, rest, axis=2)


def of_pairs(new: Nodes, numbers: str, shape: list[int], size: int, all_of_both: bool) -> str:
    """`detection.of_pairs` of numbers, for `shape` [B, P, L]."""
    batch, parts, length = shape
    pairs = parts // (2 * size)
    end = 2 * pairs * size
    x = new.part(numbers, [1], [0], [end]) if end < parts else numbers
    x = new.add("Reshape", x, np.array([batch, 2, pairs, size * length]))
    one, other = (new.add("Gather", x, np.array(side), axis=1) for side in (0, 1))
    other = new.add("Slice", other, *map(np.array, ([-1], [-(2**62)], [2], [-1])))  # turned round
    halves = [new.add("Max", one, other)] + ([new.add("Min", one, other)] if all_of_both else [])
    count, side = pairs, size * length
    while True:
        rows = [new.add("Unsqueeze", half, np.array([2])) for half in halves]
        x = new.add("Concat", *rows, axis=2)
        count *= len(halves)
        if side == length:
            break
        side //= 2
        x = new.add("Reshape", x, np.array([batch, count, 2, side]))
        pair = [new.add("Gather", x, np.array(half), axis=2) for half in (0, 1)]
        halves = [new.add("Max", *pair), new.add("Min", *pair)]
    x = new.add("Reshape", x, np.array([batch, count, length]))
    return (
        new.add("Concat", x, new.part(numbers, [1], [end], [parts]), axis=1) if end < parts else x
    )


def look_up(new: Suppression, logits: str) -> dict[str, Nodes]:
    """Nodes in the place of what reads the map of scores; `new` gets what they have in common."""
    rewriter, choice, (height, width) = new.rewriter, new.choice, new.size
    ends = [choice.top + height, choice.left + width]
    image = new.part(logits, [1, 2], [choice.top, choice.left], ends)
    x = new.add("Sigmoid", new.add("Cast", image, to=TensorProto.FLOAT))
    # For readers that nobody knows; nothing of it is left otherwise.
    new.add("Reshape", x, np.array([new.batch, 1, height, width]), out=choice.scores)
    instead = {}
    for node in rewriter.graph.node:
        maps = rewriter.preceding(node.input[0], "Reshape") if node.input else []
        at = Nodes(rewriter, node.output[0])
        # Each look-up has a Reshape of its own: what several share, the library copies first.
        if node.op_type == "GatherElements" and maps and maps[0].input[0] == choice.scores:
            x = at.add("Reshape", image, np.array([new.batch, 1, height * width]))
            x = at.add("GatherElements", x, node.input[1], axis=2)
            at.add("Sigmoid", at.add("Cast", x, to=TensorProto.FLOAT), out=at.name)
            instead[at.name] = at
        if node.op_type == "GridSample" and node.input[0] == choice.scores:
            places = rewriter.preceding(node.input[1], *TO_GRID)
            if len(places) == len(TO_GRID):
                x = at.add("Reshape", image, np.array([new.batch, height * width]))
                x = interpolated(at, x, places[-1].input[0], new.size)
                at.add("Reshape", x, np.array(rewriter.shape(at.name)), out=at.name)
                instead[at.name] = at
    return instead


def interpolated(new: Nodes, logits: str, positions: str, size: list[int]) -> str:
    """Scores between pixels, at positions [B, N, 2] inside the image: [B, N, 1]."""
    low = new.add("Floor", positions)
    index = x_and_y(new, new.add("Cast", low, to=TensorProto.INT64))
    fraction = new.add("Sub", positions, low)
    shares = [
        x_and_y(new, new.add("Sub", np.array(1, np.float32), fraction)),
        x_and_y(new, fraction),
    ]
    parts = []
    for down, right in np.ndindex(2, 2):
        # The last pixel again where the next would be outside, and would count nothing; the first
        # where a position is NaN, of which no index can be made.
        x, y = (
            new.within(new.add("Add", part, np.array(step)), side - 1)
            for part, step, side in zip(index, (right, down), size[::-1], strict=True)
        )
        at = new.add("Add", new.add("Mul", y, np.array(size[1])), x)
        x = new.add("GatherElements", logits, new.add("Squeeze", at, np.array([2])), axis=1)
        x = new.add("Sigmoid", new.add("Cast", x, to=TensorProto.FLOAT))
        x = new.add("Unsqueeze", x, np.array([2]))
        parts.append(new.add("Mul", x, new.add("Mul", shares[right][0], shares[down][1])))
    return new.fold("Add", parts)


def x_and_y(new: Nodes, pairs: str) -> list[str]:
    """The x and the y of [B, N, 2], each [B, N, 1]."""
    return [new.part(pairs, [2], [i], [i + 1]) for i in (0, 1)]


def read_by_place(rewriter: Rewriter) -> None:
    """Read features at N x P places as such, where P pixels belong to each of N positions.

    The library computes what lies behind a Reshape value by value. Where four pixels are weighted,
    lengths are of what is read, in float32, and one factor with the share.
    """
    instead: dict[str, list[onnx.NodeProto]] = {}
    for node in rewriter.graph.node:
        reshape = rewriter.following(node, "Reshape") if node.op_type == "Div" else []
        if reshape:
            instead |= _read_by_place(rewriter, node, reshape[0])
    rewriter.replace(instead)


def _read_by_place(
    rewriter: Rewriter, div: onnx.NodeProto, reshape: onnx.NodeProto
) -> dict[str, Nodes]:
    out, shape = reshape.output[0], rewriter.shape(reshape.output[0])
    features = rewriter.preceding(div.input[0], "Gather", "Concat")
    length = rewriter.preceding(div.input[1], "Cast", "Clip", "ReduceL2")
    if len(features) < 2 or len(length) < 3 or not rewriter.is_half(out):
        return {}
    reads = [rewriter.preceding(name, "Cast", "GridSample") for name in features[1].input]
    if any(len(steps) < 2 for steps in reads) or len({read.input[1] for _, read in reads}) > 1:
        return {}
    new = Nodes(rewriter, f"{out} read")
    batch, _, positions, pixels = shape
    places = np.array([batch, positions, pixels, 2])
    grid = new.add("Reshape", reads[0][1].input[1], places)
    levels = [
        new.add("GridSample", read.input[0], grid, **attributes_of(read)) for _, read in reads
    ]
    weighted = rewriter.following(reshape, "Mul", "ReduceSum")
    if len(weighted) < 2 or not _is_sum_of_last(rewriter, weighted[1]):
        # Of what is rounded: as lengths and features of the same kernel, one in place of two.
        halves = [new.add("Cast", level, to=TensorProto.FLOAT16) for level in levels]
        rounded = [new.add("Cast", half, to=TensorProto.FLOAT) for half in halves]
        norm = new.add("Clip", _length(new, rounded), *length[1].input[1:])
        norm = new.add("Cast", norm, to=TensorProto.FLOAT16)
        new.add("Div", new.add("Concat", *halves, axis=1), norm, out=out)
        return {out: new}
    norm = new.add("Clip", _length(new, levels), *length[1].input[1:])
    share = next(name for name in weighted[0].input if name != out)
    cast = rewriter.preceding(share, "Cast")  # from float32
    share = cast[0].input[0] if cast else new.add("Cast", share, to=TensorProto.FLOAT)
    factor = new.add("Mul", share, new.add("Div", np.array(1, np.float32), norm))
    sums = [_sum_of_last(new, new.add("Mul", level, factor), pixels) for level in levels]
    sums = new.add("Concat", *sums, axis=1)
    new.add("Cast", sums, out=weighted[1].output[0], to=TensorProto.FLOAT16)
    return {weighted[1].output[0]: new}


def _length(new: Nodes, levels: list[str]) -> str:
    """Lengths of vectors along the channels of all levels."""
    squares = [new.add("Mul", level, level) for level in levels]
    sums = [new.add("ReduceSum", x, np.array([1]), keepdims=1) for x in squares]
    return new.add("Sqrt", new.fold("Add", sums))


def _is_sum_of_last(rewriter: Rewriter, node: onnx.NodeProto) -> bool:
    """Whether a ReduceSum is one over the last of four axes, which goes."""
    axes = rewriter.value(node.input[1]) if len(node.input) == 2 else []
    return list(axes) in ([3], [-1]) and not attributes_of(node).get("keepdims", 1)


def _sum_of_last(new: Nodes, x: str, count: int) -> str:
    parts = [new.part(x, [3], [i], [i + 1]) for i in range(count)]
    return new.add("Squeeze", new.fold("Add", parts), np.array([3]))
