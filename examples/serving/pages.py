"""Who holds which page of the cache: a free list, counts of holders, and pages that are shared."""

from collections import Counter
from collections.abc import Sequence


class Pages:
    """Pages of `size` positions, numbered from 0 to `count`.

    A page that a whole piece of a prompt fills can be shared by every prompt that begins with the
    same tokens. It stays findable after its last holder has left, until it is needed for others:
    the free list gives away the page that was freed first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.most_used = 0
        self._free = dict.fromkeys(range(count))  # in order of freeing; also has a fast removal
        self._holders: Counter[int] = Counter()
        self._page_of: dict[tuple[int, ...], int] = {}  # by all tokens up to the page's end
        self._prefix_of: dict[int, tuple[int, ...]] = {}

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def needed(self, positions: int) -> int:
        """How many pages hold so many positions."""
        return -(-positions // self.size)

    def take(self, prompt: Sequence[int], positions: int) -> tuple[list[int], int] | None:
        """Pages for a sequence that begins with a prompt and grows to so many positions.

        Returns:
          The pages in order, and how many tokens of the prompt the first of them, which are
          shared, hold already; the last token is never among them, since its logits are wanted.
          None where too few pages are free: then nothing is taken.
        """
        shared = []
        for end in range(self.size, len(prompt), self.size):
            page = self._page_of.get(tuple(prompt[:end]))
            if page is None:
                break
            shared.append(page)
        missing = self.needed(positions) - len(shared)
        free = [page for page in self._free if page not in shared]
        if missing > len(free):
            return None
        pages = shared + free[:missing]
        for page in pages:
            self._free.pop(page, None)
            self._holders[page] += 1
        for page in free[:missing]:
            if page in self._prefix_of:
                del self._page_of[self._prefix_of.pop(page)]
        self.most_used = max(self.most_used, self.used)
        return pages, len(shared) * self.size

    def publish(self, prompt: Sequence[int], pages: Sequence[int]) -> None:
        """Lets later prompts share the pages that this prompt has filled to their ends."""
        for i in range(len(prompt) // self.size):
            prefix = tuple(prompt[: (i + 1) * self.size])
            if prefix not in self._page_of:
                self._page_of[prefix] = pages[i]
                self._prefix_of[pages[i]] = prefix

    def release(self, pages: Sequence[int]) -> None:
        """Gives pages back; the last first, so that the beginning of a prompt stays longest."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free[page] = None
