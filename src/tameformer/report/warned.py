"""What the detectors told while the run went on, as far as it still stands."""

from collections.abc import Sequence

from tameformer.report.read import Event


def standing(events: Sequence[Event]) -> dict[str, list[Event]]:
    """The verdicts by their quantity, in the order told; without those of steps that the run went back behind.

    Example:
        >>> told = [Event(30, "verdict", "", {"quantity": "loss"}), Event(40, "rollback", "", {"to_step": 20})]
        >>> standing(told[:1]).keys(), standing(told).keys()
        (dict_keys(['loss']), dict_keys([]))
    """
    kept: list[Event] = []
    for event in events:
        if event.kind == "rollback":
            back = event.details.get("to_step", event.step)
        else:
            back = event.step if event.kind == "resume" else None
        if isinstance(back, int):
            kept = [verdict for verdict in kept if verdict.step <= back]
        if event.kind == "verdict":
            kept.append(event)
    found: dict[str, list[Event]] = {}
    for verdict in kept:
        found.setdefault(str(verdict.details.get("quantity", "")), []).append(verdict)
    return found


def sentence(verdicts: Sequence[Event]) -> tuple[bool, str]:
    """Whether verdicts on one quantity are bad, and the first of the worst of them, with how many there are."""
    bad = [verdict for verdict in verdicts if verdict.details.get("level") == "bad"]
    first = (bad or list(verdicts))[0]
    more = f" (One of {len(verdicts)} such warnings.)" if len(verdicts) > 1 else ""
    return bool(bad), f"Step {first.step:,}: {first.message}{more}"
