"""Near names: the "did you mean" of every lookup."""

from __future__ import annotations

from typing import Iterable, List, Tuple


def near_names(name: object, known: Iterable[str], limit: int = 3) -> Tuple[str, ...]:
    """Up to `limit` known names that resemble `name`, best first; substring matches count before spelling."""
    import difflib

    wanted = str(name).upper()
    candidates: List[str] = [str(item) for item in known]
    upper = {item.upper(): item for item in candidates}
    inside = [item for key, item in upper.items() if len(wanted) > 2 and (wanted in key or key in wanted and len(key) > 3)]
    inside.sort(key=lambda item: abs(len(item) - len(wanted)))
    close = difflib.get_close_matches(wanted, upper, n=limit, cutoff=0.6)
    # Swapped letters are the commonest slip, and no worse a match for difflib than another letter.
    close.sort(key=lambda key: sorted(key) != sorted(wanted))
    similar = [upper[key] for key in close]
    return tuple(dict.fromkeys(similar[:1] + inside + similar))[:limit]
