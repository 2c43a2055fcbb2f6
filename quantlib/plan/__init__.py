"""Plan what a model takes, from its headers and its configuration, before anything is loaded."""

from quantlib.plan.lines import Line, Plan, Section
from quantlib.plan.planner import plan

__all__ = ["Line", "Plan", "Section", "plan"]
