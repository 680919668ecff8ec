"""Explain decisions: render the steps of each as lines. This module decides nothing."""

from collections.abc import Sequence

from minter.policy.plans import Decision, PlannedToken
from minter.scopes import (
    Scope,
)


def explain(decision: Decision, notes: Sequence[str] = ()) -> list[str]:
    """Render the steps of a decision, one line for each step, and the notes on the request itself."""
    lines = [f"note: {note}" for note in notes]
    for planned in decision.planned_tokens:
        lines.append(f"file {planned.need.file} {planned.need.side}[{planned.need.index}]: granted")
        lines += [f"  {step.rule}: {step.text}" for step in planned.plan.steps]
        lines.append(f"  scope: {planned.scope}")
        life = planned.lifetime
        lines.append(f"  lifetime: {life.seconds} s, of which {life.fixed} s are not waiting")
        lines += [f"  note: {note}" for note in life.notes(planned.plan.cap_rule)]
    for refused in decision.refused:
        need = refused.need
        where = "request" if need is None else f"file {need.file} {need.side}[{need.index}]"
        lines.append(f"{where}: refused")
        lines.append(f"  {refused.error.reason}: {refused.error.message}")
    return lines


def asked_scopes(planned: PlannedToken) -> frozenset[Scope]:
    """Return the parsed scopes of a planned token, for tests and traces."""
    return frozenset(Scope.parse(word) for word in planned.scope.split(" "))
