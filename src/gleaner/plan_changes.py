"""What is planned otherwise than before, number by number, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What a person would not compare: texts that the job is made from, and whole ways out.
_LEFT_OUT = {"alternatives", "chat_template", "warnings", "v"}


def changes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each value of a plan that is another one, in the order of the plans; empty when none is."""
    old, new = ({plan["tier"]: plan for plan in plans} for plans in (before, after))
    lines = []
    for tier in [*new, *(name for name in old if name not in new)]:
        if tier not in old or tier not in new:
            lines.append(f"{tier}: {'planned for the first time' if tier in new else 'not planned any more'}")
            continue
        was, is_now = dict(_values(old[tier])), dict(_values(new[tier]))
        for name in [*is_now, *(name for name in was if name not in is_now)]:
            one, other = was.get(name, "nothing"), is_now.get(name, "nothing")
            if one != other:
                lines.append(f"{tier}: {name}: {one} -> {other}")
    return lines


def _values(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Each single value with its way, such as `memory[vasp-01 CUDA0].weights`; lists of words are one value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if name or key not in _LEFT_OUT:
                yield from _values(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _values(item, f"{name}[{item.get('device', number)}]")
    elif isinstance(value, list):
        yield name, ",".join(map(str, value)) or "nothing"
    else:
        yield name, str(value)
