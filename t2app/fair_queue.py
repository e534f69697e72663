"""A queue in which users take turns."""

from collections import deque
from collections.abc import Hashable, Iterator
from itertools import chain
from typing import Generic, TypeVar

_T = TypeVar("_T")


class FairQueue(Generic[_T]):
    """Items of several users: a user's own in their order, one of each user in turn."""

    def __init__(self):
        # In the order of their turns; a user without an item is not in it.
        self._of_user: dict[Hashable, deque[_T]] = {}

    def __bool__(self) -> bool:
        return bool(self._of_user)

    def __iter__(self) -> Iterator[_T]:
        return chain.from_iterable(self._of_user.values())

    def push(self, user: Hashable, item: _T) -> None:
        self._of_user.setdefault(user, deque()).append(item)

    def first(self) -> _T:
        """The item whose turn it is."""
        return next(iter(self._of_user.values()))[0]

    def pop(self) -> _T:
        """Take the item whose turn it is; its user's next one comes after everybody else's."""
        user = next(iter(self._of_user))
        items = self._of_user.pop(user)
        item = items.popleft()
        if items:
            self._of_user[user] = items
        return item

    def remove(self, user: Hashable, item: _T) -> None:
        """Take an item out of turn, if it is still there."""
        items = self._of_user.get(user, ())
        if item in items:
            items.remove(item)
            if not items:
                del self._of_user[user]
