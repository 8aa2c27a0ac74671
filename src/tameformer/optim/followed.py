"""What has to be done to some weights after an optimizer has stepped them, whichever optimizer it is and whoever calls it."""

import weakref
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


@runtime_checkable
class Follower(Protocol):
    """Something that follows a weight."""

    def followed(self) -> Tensor | None:
        """The parameter whose steps are followed, as it is now; None for none at the moment."""
        ...


Member = TypeVar("Member", bound=Follower)


class Followed(Generic[Member]):
    """The followers alive in this process, and the one hook that sees every optimizer's step while there are any.

    Followers are not kept alive by this; when the last is gone, so is the hook after the next step.

    Args:
        after_step: Given the followers of the weights that were stepped, in the optimizer's order, which is the same in all
            processes, so that these may communicate. Not called for none.
    """

    def __init__(self, after_step: Callable[[list[Member]], None]) -> None:
        self.live: weakref.WeakSet[Member] = weakref.WeakSet()
        self.hook: Any = None
        self._after_step = after_step

    def add(self, member: Member) -> None:
        """Follow; once is enough."""
        self.live.add(member)
        if self.hook is None:
            self.hook = register_optimizer_step_post_hook(self._stepped)

    def discard(self, member: Member) -> None:
        """Follow no more."""
        self.live.discard(member)
        self._release()

    def _release(self) -> None:
        if not self.live and self.hook is not None:
            self.hook.remove()
            self.hook = None

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        place = {id(parameter): number for number, parameter in enumerate(parameters)}
        due = [member for member in self.live if id(member.followed()) in place]
        if due:
            self._after_step(sorted(due, key=lambda member: place[id(member.followed())]))
        # torch is walking through the hooks, and only the last may take itself away.
        if self.hook is not None and self.hook.id == next(reversed(self.hook.hooks_dict_ref())):
            self._release()
