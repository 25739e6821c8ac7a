"""Place: at which collective of which step a rank is, and since when."""

from __future__ import annotations

from time import monotonic


class Place:
    """Where a rank stands: its own thread writes, whoever makes a table of the ranks reads.

    Writing is one assignment of a tuple, so that it costs next to nothing and another thread may
    read at any moment.

    >>> place = Place()
    >>> place.begin(step=3)
    >>> number = place.start("all_reduce(axes=('ep',))", "[float32[2]]")
    >>> place.wait(number, "all_reduce(axes=('ep',))", "[float32[2]]")
    >>> print(place)
    in step 3, waiting for 0.0 s in its collective no. 1 (no. 1 of the step), \
all_reduce(axes=('ep',)) of [float32[2]]
    """

    def __init__(self) -> None:
        self.started = 0  # collectives
        self.step: tuple[int, int] | None = None  # and how many were started before it
        self.last: tuple[str, int, object, object, float] = ("", 0, None, None, monotonic())

    def begin(self, step: int) -> None:
        """Step ``step`` begins."""
        self.step = step, self.started

    def start(self, op: object, what: object) -> int:
        """The number of a collective that starts; its texts are made if they are asked for."""
        self.started = number = self.started + 1
        self.last = "computing for {} since", number, op, what, monotonic()
        return number

    def wait(self, number: int, op: object, what: object) -> None:
        """The result of this collective is awaited."""
        self.last = "waiting for {} in", number, op, what, monotonic()

    def go_on(self, number: int, op: object, what: object) -> None:
        """The result of this collective has come."""
        self.last = "computing for {} since", number, op, what, monotonic()

    @property
    def when(self) -> str:
        """The step under way, as the beginning of a sentence."""
        return "" if self.step is None else f"in step {self.step[0]}, "

    def collective(self, number: int, op: object, what: object) -> str:
        """One of the collectives, in words."""
        earlier = self.started if self.step is None else self.step[1]
        of_step = f" (no. {number - earlier} of the step)" if number > earlier else ""
        return f"its collective no. {number}{of_step}, {op} of {what}"

    def __str__(self) -> str:
        doing, number, op, what, since = self.last
        age = f"{monotonic() - since:.1f} s"
        if not number:
            return f"{self.when}has started no collective for {age}"
        ahead = f"; it has started {self.started}" if self.started > number else ""
        return f"{self.when}{doing.format(age)} {self.collective(number, op, what)}{ahead}"
