"""Who holds which page of the cache: a free list, counts of holders, and pages that are shared."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple


class Taken(NamedTuple):
    """The pages of a sequence.

    Attributes:
      pages: in order.
      shared: how many tokens of the prompt the first pages hold, which are shared.
      source: a page that begins as the first own page does, and is to be copied to it; or None.
      copied: how many tokens of the prompt that copy holds.
    """

    pages: list[int]
    shared: int
    source: int | None = None
    copied: int = 0


class Pages:
    """Pages of `size` positions, numbered from 0 to `count`.

    A page that a whole piece of a prompt fills is shared by every prompt that begins with the
    same tokens. Of the page in which two prompts part, the second one gets a copy: only its owner
    writes to it. A page stays findable after its last holder has left, until it is needed for
    others: the free list gives away the page that was freed first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.most_used = 0
        self._free = dict.fromkeys(range(count))  # in order of freeing; also has a fast removal
        self._holders: Counter[int] = Counter()
        # By all tokens before a page: the pages that follow, and the prompt's tokens in each.
        self._after: defaultdict[tuple[int, ...], dict[int, tuple[int, ...]]] = defaultdict(dict)
        self._prefix_of: dict[int, tuple[int, ...]] = {}

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def needed(self, positions: int) -> int:
        """How many pages hold so many positions."""
        return -(-positions // self.size)

    def take(self, prompt: Sequence[int], positions: int) -> Taken | None:
        """Pages for a sequence that begins with a prompt and grows to so many positions.

        The last token of the prompt is never among those that are there, since its logits are
        wanted.

        Returns:
          The pages; None where too few are free: then nothing is taken.
        """
        shared: list[int] = []
        source, common = self._longest(prompt, 0)
        while source is not None and common == self.size:
            shared.append(source)
            source, common = self._longest(prompt, len(shared) * self.size)
        missing = self.needed(positions) - len(shared)
        free = [page for page in self._free if page not in shared]
        if missing > len(free):
            return None
        pages = shared + free[:missing]
        for page in pages:
            self._free.pop(page, None)
            self._holders[page] += 1
        for page in free[:missing]:
            self._forget(page)
        self.most_used = max(self.most_used, self.used)
        return Taken(pages, len(shared) * self.size, source, common)

    def publish(self, prompt: Sequence[int], pages: Sequence[int]) -> None:
        """Lets later prompts share, or copy, the pages that this prompt has filled."""
        for i in range(self.needed(len(prompt))):
            begin = i * self.size
            tokens = tuple(prompt[begin : begin + self.size])
            known = self._after[tuple(prompt[:begin])]
            if not any(other[: len(tokens)] == tokens for other in known.values()):
                known[pages[i]] = tokens
                self._prefix_of[pages[i]] = tuple(prompt[:begin])

    def release(self, pages: Sequence[int]) -> None:
        """Gives pages back; the last first, so that the beginning of a prompt stays longest."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free[page] = None

    def _longest(self, prompt: Sequence[int], begin: int) -> tuple[int | None, int]:
        """The page that continues prompt[:begin] alike for the most tokens, and their number."""
        wanted = tuple(prompt[begin : min(begin + self.size, len(prompt) - 1)])
        best, most = None, 0
        for page, tokens in self._after.get(tuple(prompt[:begin]), {}).items():
            pairs = zip(wanted, tokens, strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            common = min(len(wanted), len(tokens)) if common is None else common
            if common > most:
                best, most = page, common
        return best, most

    def _forget(self, page: int) -> None:
        """Makes a page that is given away one that no prompt finds."""
        prefix = self._prefix_of.pop(page, None)
        if prefix is not None:
            del self._after[prefix][page]
            if not self._after[prefix]:
                del self._after[prefix]
