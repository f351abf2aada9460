"""How a warp of `sparse_matrix.py`'s kernels loads sampling points, and stores their gradients.

A lane has a query. In memory a query's points are neighbours, so neighbouring lanes load neighbours
and exchange them through shared memory, fields of 16 bits two in a word.
"""

from collections import Counter
from typing import NamedTuple

from pallas_kernels.deformable_conv.image import Image
from pallas_kernels.deformable_conv.points import Points
from pallas_kernels.deformable_conv.warp import LANES, Warp

QUERIES = LANES  # that a warp takes at a time
WORD = 4  # bytes


class Part(NamedTuple):
    """What is in a word, or in half of it."""

    field: int  # of points.per_query
    component: int  # of a pair (x, y); else 0


def exchange_bytes(points: Points) -> int:
    """Of shared memory that a warp needs to exchange the points of such arrays."""
    rank, words, halves = points.weights.ndim, 0, Counter()
    for array in points.per_query:
        components = 1 if array.ndim == rank else 2
        if array.dtype.itemsize == WORD:
            words += components
        elif components == 2:
            words += 1
        else:
            halves[array.dtype] += 1
    words += sum(-(-count // 2) for count in halves.values())
    return _bytes(words, points.weights.shape[-1])


def _bytes(words: int, num_points: int) -> int:
    """Of `words` for each point of 32 queries, with a stride that is odd: in different banks."""
    return words * QUERIES * (num_points | 1) * WORD


class PointRows:
    """The sampling points of one group of one image, 32 queries at a time."""

    def __init__(self, warp: Warp, image: Image, points: Points, group, first_entry):
        """The entry of token n in arrays [B, tokens, G, ...] is first_entry + n G."""
        self.warp, self.image, self.points = warp, image, points
        self._first_entry = first_entry
        self._per_group = [warp.load(ref, group) for ref in points.per_group]
        rank = warp.rank(points.weights)
        self._counts = [1 if warp.rank(ref) == rank else 2 for ref in points.per_query]
        self._words = self._words_of(points.per_query)

    @property
    def bytes(self) -> int:
        """Of shared memory that an exchange takes."""
        return _bytes(len(self._words), self.image.num_points)

    def load(self, tile) -> list:
        """Begins to load tile number `tile`: what neighbouring lanes load, for `exchange`."""
        warp, loaded = self.warp, []
        for index, *_ in self._elements(tile):
            for parts in self._words:
                refs = [self.points.per_query[part.field] for part in parts]
                at = [index * self._counts[part.field] + part.component for part in parts]
                if self._is_pair(parts) or warp.item_bytes(refs[0]) == WORD:
                    loaded.append(warp.load_pair(refs[0], at[0]))
                else:
                    loaded += [warp.load_half(ref, i) for ref, i in zip(refs, at, strict=True)]
        return loaded

    def exchange(self, loaded: list, scratch) -> list:
        """The words of each point of the lane's query; `scratch` is shared memory of the warp."""
        warp, loaded = self.warp, iter(loaded)
        for _, row, k, _ in self._elements(warp.constant(0)):
            for n, parts in enumerate(self._words):
                word = next(loaded)
                if len(parts) == 2 and not self._is_pair(parts):
                    word = word | (next(loaded) << 16)
                warp.store_shared(self._place(scratch, row, k, n), word)
        warp.wait_for_lanes()
        words = [
            [
                warp.load_shared_bits(self._place(scratch, warp.lane, k, n))
                for n in range(len(self._words))
            ]
            for k in range(self.image.num_points)
        ]
        warp.wait_for_lanes()
        return words

    def fields(self, words: list, k: int) -> Points:
        """Point k, in float32, of its words."""
        warp = self.warp
        numbers = {}
        for word, parts in zip(words, self._words, strict=True):
            ref = self.points.per_query[parts[0].field]
            if warp.item_bytes(ref) == WORD:
                numbers[parts[0]] = warp.as_float(word)
            else:
                numbers |= zip(parts, warp.unpack(word, warp.dtype(ref)), strict=False)
        per_query = [
            numbers[Part(field, 0)]
            if count == 1
            else (numbers[Part(field, 0)], numbers[Part(field, 1)])
            for field, count in enumerate(self._counts)
        ]
        return type(self.points)(*per_query, *self._per_group, *self._constants(k))

    def store_gradients(self, refs, tile, gradients: list, scratch) -> None:
        """Writes, for each point, the gradients of the lane's per-query fields."""
        warp, words = self.warp, self._words_of(refs)
        assert len(words) <= len(self._words), "no room for the gradients"
        warp.wait_for_lanes()
        for k, gradient in enumerate(gradients):
            for n, parts in enumerate(words):
                numbers = [
                    gradient[field][component] if self._counts[field] == 2 else gradient[field]
                    for field, component in parts
                ]
                if warp.item_bytes(refs[parts[0].field]) == WORD:
                    (word,) = numbers
                else:
                    dtype = warp.dtype(refs[parts[0].field])
                    word = warp.pack(numbers[0], numbers[-1], dtype)
                warp.store_shared(self._place(scratch, warp.lane, k, n), word)
        warp.wait_for_lanes()
        for index, row, k, exists in self._elements(tile):
            for n, parts in enumerate(words):
                word = warp.load_shared_bits(self._place(scratch, row, k, n))
                at = [index * self._counts[part.field] + part.component for part in parts]
                ref = refs[parts[0].field]
                if self._is_pair(parts) or warp.item_bytes(ref) == WORD:
                    warp.store_pair(ref, at[0], word, mask=exists)
                    continue
                for i, part in enumerate(parts):
                    warp.store_half(refs[part.field], at[i], word >> (16 * i), mask=exists)
        warp.wait_for_lanes()

    def _words_of(self, refs) -> list[list[Part]]:
        """The parts of each word of a point: pairs of 16 bits in one, others two in one."""
        words, halves = [], {}
        for field, (ref, count) in enumerate(zip(refs, self._counts, strict=True)):
            parts = [Part(field, component) for component in range(count)]
            if self.warp.item_bytes(ref) == WORD:
                words += [[part] for part in parts]
            elif count == 2:
                words.append(parts)
            else:
                halves.setdefault(self.warp.dtype(ref), []).extend(parts)
        for parts in halves.values():
            words += [parts[i : i + 2] for i in range(0, len(parts), 2)]
        return words

    def _is_pair(self, parts: list[Part]) -> bool:
        return len(parts) == 2 and parts[0].field == parts[1].field

    def _place(self, scratch, row, k, word: int):
        num_points = self.image.num_points
        return scratch + (row * (num_points | 1) + k) * WORD + _bytes(word, num_points)

    def _elements(self, tile):
        """(where in arrays [B, tokens, G, K], row, k, whether it is there) for each step."""
        warp, image = self.warp, self.image
        lane = warp.opaque(warp.lane)  # else all would be kept in registers from tile to tile
        for step in range(image.num_points):
            element = lane + step * LANES
            row, k = element // image.num_points, element % image.num_points
            token = tile * QUERIES + row
            exists = None
            if image.tokens % QUERIES:
                exists = token < image.tokens
                token = warp.select(exists, token, warp.constant(image.tokens - 1))
            entry = self._first_entry + token * image.groups
            yield entry * image.num_points + k, row, k, exists

    def _constants(self, k: int) -> list:
        warp = self.warp
        constants = []
        for ref in self.points.constant:
            if warp.rank(ref) == 1:
                constants.append(warp.load(ref, warp.constant(0), 2))
            else:  # [K, 2]
                x, y = warp.load(ref, warp.constant(2 * k), 2)
                constants.append({(0, 0): x, (0, 1): y})
        return constants
